"""What two processes make is what one makes: `jobs.py` does the work."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

LIMIT = 900  # seconds after which a process that hangs is ended


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, str(Path(__file__).with_name("jobs.py")), str(folder)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the launchers have it
    ended = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=LIMIT)
    assert ended.returncode == 0, ended.stderr
    return folder


def codes(made):
    return json.loads((made / "codes.json").read_text())


def said(folder):
    """What every process wrote to stderr and to stdout."""
    return [[path.read_text() for path in sorted(folder.glob(f"*.{stream}"))] for stream in ("err", "out")]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_job_ends_well_and_the_main_process_alone_speaks(made):
    for job, expected in codes(made).items():
        if job not in ("die", "refuse", "interrupt"):
            err, out = said(made / job.replace(" ", "/"))
            assert set(expected) == {0}, (job, err)
            assert not any(out[1:]), job


def test_images_scores_and_trajectories_are_the_same_bytes(made):
    alone = torch.load(made / "share" / "1" / "0.pt", weights_only=True)
    for rank in (0, 1):
        together = torch.load(made / "share" / "2" / f"{rank}.pt", weights_only=True)
        for name, value in alone.items():
            same = torch.equal(value, together[name]) if isinstance(value, torch.Tensor) else value == together[name]
            assert same, (rank, name)
    assert alone["scores"]["precision"] is not None


@pytest.mark.parametrize(
    ("job", "model"), [("teach", "unet/diffusion_pytorch_model"), ("distill", "model"), ("denoise", "model")]
)
def test_two_processes_learn_what_one_with_twice_the_batch_learns(job, model, made):
    one, two = (made / job / number / "run" for number in "12")
    rows = [[(row["update"], row["loss"]) for row in log(folder)] for folder in (one, two)]
    assert [update for update, _ in rows[1]] == [1, 2, 3, 4]
    for (update, ours), (_, theirs) in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5 if update < 3 else 1e-2), update  # last bits grow
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (one, two)]
    sizes = [config.get("distill", config)["batch_size"] for config in configs]
    assert sizes == [4, 4], "what is recorded makes the same in one process"
    assert (two / f"{model}.safetensors").is_file()


def test_a_killed_process_ends_the_other_with_one_line(made):
    assert codes(made)["die"] == [1, -signal.SIGKILL]
    err, _ = said(made / "die")
    assert err[0].splitlines()[-1].startswith("prog: another process has ended or does not answer (")
    assert "Traceback" not in err[0]


def test_a_run_goes_on_after_a_process_was_killed(made):
    weights = [load_file(folder / "run" / "model.safetensors") for folder in (made / "distill" / "2", made / "die")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    without_seconds = [
        [row["loss"] for row in log(folder / "run")] for folder in (made / "distill" / "2", made / "die")
    ]
    assert without_seconds[0] == without_seconds[1]


def test_the_ladders_rungs_are_the_same_bytes(made):
    one, two = (made / "climb" / number / "run" for number in "12")
    scores = [json.loads((folder / "ladder.json").read_text()) for folder in (one, two)]
    for rows in scores:
        for row in rows:
            del row["seconds"]
    assert scores[0] == scores[1]
    students = sorted(path.relative_to(one) for path in one.rglob("model.safetensors"))
    assert len(students) == 2  # ptq and full
    assert all((one / path).read_bytes() == (two / path).read_bytes() for path in students)
    for path in students:
        assert list((two / path).parent.glob("tensorboard/*")), "whichever process made it"


def test_what_is_wrong_for_all_is_refused_by_all(made):
    assert codes(made)["refuse"] == [2, 2]
    assert said(made / "refuse")[0] == ["prog: no such thing\n", "prog, process 1: no such thing\n"]


def test_the_main_process_says_that_all_are_interrupted(made):
    assert codes(made)["interrupt"] == [130, 130]
    assert said(made / "interrupt")[0] == ["prog: interrupted\n", ""]


def test_accelerate_starts_as_many_processes_on_cpus_as_it_is_told(tmp_path):
    job = tmp_path / "job.py"
    job.write_text(
        "import os, sys\n"
        "from ddpm_mnist.lab import processes\n"
        "ranks = processes.share_out(lambda job: os.environ['RANK'], range(3))\n"
        "sys.stdout.write(f'{ranks}\\n')\n"
        "processes.leave()\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    on_cpus = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, "--main_process_port", "0", str(job)]
    ended = subprocess.run(command, env=on_cpus, capture_output=True, text=True, timeout=LIMIT)
    assert (ended.returncode, ended.stdout) == (0, "['0', '1', '0']\n" * 2), ended.stderr
