import contextlib
import importlib
import io
import json
import re
import signal

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.command import run_command
from ddpm_mnist.lab.run_state import read_log
from ddpm_mnist.sampling.noise_schedule import read_schedule
from ddpm_mnist.sampling.solver import SamplerConfig
from ddpm_mnist.unet import save_teacher
from eval.export import ExportConfig, export
from eval.models import load_model
from finetune.config import RunConfig
from finetune.run import run
from quant import freeze

SMALL = """
teacher: {teacher}
output: {output}
sampler: {{num_steps: 3}}
student: {{weight_bits: 3, act_bits: 5, rank: 2, search: min-max}}
num_trajectories: 6
calibration_trajectories: 4
num_images: 10
grid_columns: 4
distill: {{num_updates: 3, batch_size: 4, rollout_steps: 2, log_every: 1}}
"""


@pytest.fixture
def config_path(write_config):
    return write_config(SMALL, "run")


def test_the_main_job_leaves_a_whole_run_folder(config_path, tmp_path, capsys):
    run_command("prog", run, RunConfig, ["--config", str(config_path), "--seed", "5", "--tracker", "tensorboard"])
    folder = tmp_path / "run"
    for name in (
        "model.safetensors",
        "config.json",
        "scheduler/scheduler_config.json",
        "log.jsonl",
        "state/latest.pt",
    ):
        assert (folder / name).is_file(), name
    for name in ("grid.png", "loss.png", "step_sizes.png"):
        assert (folder / name).stat().st_size > 5000, name

    scores = json.loads((folder / "metrics.json").read_text())
    assert [score["model"] for score in scores] == ["teacher", "ptq", "student"]
    assert [score["weight_bits"] for score in scores] == [32, 3, 3]
    assert [score["act_bits"] for score in scores] == [32, 5, 5]
    assert scores[0]["mse_to_teacher"] == 0 < scores[2]["mse_to_teacher"]
    assert {score["num_images"] for score in scores} == {10}

    report = (folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3
    assert "http" not in report
    for needle in (
        "W3A5",
        "up_blocks.0.resnets.0.conv_shortcut",
        "attention products",
        "weight_bits: 3",
        "seed: 5",
    ):
        assert needle in report, needle

    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate_factor"):
        assert [event.step for event in shown.Scalars(name)] == [1, 2, 3]
        assert [event.value for event in shown.Scalars(name)] == pytest.approx([row[name] for row in log])
    tags = shown.Tags()
    for kind in ("weight_step_size", "act_step_size"):
        assert f"{kind}/conv_in" in tags["scalars"]
        assert len({tag for tag in tags["scalars"] if tag.startswith(kind)}) > 10
    assert tags["images"] == ["grid"]
    assert shown.Images("grid")[0].width > 100

    out = capsys.readouterr().out
    for line in (
        "6 trajectories of 3 steps ",
        "3 updates of 4 rollouts ",
        "scores of 3 models on 10 images ",
    ):
        assert f"\n{line}" in f"\n{out}"
    assert "report.html" in out
    assert "grid.png" in out

    student = load_model(str(folder))
    assert (student.weight_bits, student.act_bits) == (3, 5)

    again = yaml.safe_load((folder / "config.yaml").read_text())
    assert (again["seed"], again["student"]["act_bits"], again["sampler"]["num_steps"]) == (5, 5, 3)


def test_the_saved_config_makes_the_same_student(config_path, tmp_path):
    run_command("prog", run, RunConfig, ["--config", str(config_path)])
    again = str(tmp_path / "again")
    run_command("prog", run, RunConfig, ["--config", str(tmp_path / "run" / "config.yaml"), "--output", again])
    first, second = (load_model(folder).denoiser.state_dict() for folder in (str(tmp_path / "run"), again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_surroundings_have_no_influence(config_path, tmp_path, strange_surroundings):
    options = yaml.safe_load(config_path.read_text())
    made = []
    for name, surroundings in (("plain", contextlib.nullcontext), ("strange", strange_surroundings)):
        words = [f"--{key}={json.dumps(value)}" for key, value in options.items() if key not in ("output", "teacher")]
        words += ["--teacher", options["teacher"], "--output", str(tmp_path / name)]
        with surroundings():
            run_command("prog", run, RunConfig, words)
        scores = json.loads((tmp_path / name / "metrics.json").read_text())
        made.append([(tmp_path / name / "model.safetensors").read_bytes(), [{**s, "seconds": 0} for s in scores]])
    assert made[0] == made[1]


def test_without_updates_the_student_is_the_calibrated_one(config_path, tmp_path):
    arguments = ["--config", str(config_path), "--distill.num_updates", "0"]
    run_command("prog", run, RunConfig, arguments)
    # The second time from the state of the first: how it is shown is no part of a run.
    run_command("prog", run, RunConfig, [*arguments, "--tracker", "tensorboard"])
    assert EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Tags()["images"] == ["grid"]
    _, ptq, student = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (ptq["fid"], ptq["mse_to_teacher"]) == (student["fid"], student["mse_to_teacher"])
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_student_is_scored_on_integers_unless_told_otherwise(config_path, tmp_path):
    arguments = ["--config", str(config_path)]
    run_command("prog", run, RunConfig, arguments)
    run_command("prog", run, RunConfig, [*arguments, "--runtime", "simulated", "--output", str(tmp_path / "simulated")])
    scores = [json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("run", "simulated")]
    assert [score["runtime"] for score in scores[0]] == ["float", "integer", "integer"]
    assert [score["runtime"] for score in scores[1]] == ["float", "simulated", "simulated"]
    for ours, theirs in zip(*scores, strict=True):
        assert ours["mse_to_teacher"] == pytest.approx(theirs["mse_to_teacher"], rel=0.1)


def test_a_folder_of_another_run_is_refused_and_left_alone(config_path, tmp_path, capsys):
    arguments = ["--config", str(config_path)]
    run_command("prog", run, RunConfig, arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for option, then, value in (("student.act_bits", "5", "8"), ("runtime", "integer", "simulated")):
        with pytest.raises(SystemExit) as caught:
            run_command("prog", run, RunConfig, [*arguments, f"--{option}", value])
        assert caught.value.code == 2
        assert f"was begun with {option} = {then}, now it is {value}: " in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student.weight_bits", "0"], "weight_bits must be 1, 1.58 or a whole number in 2…8, not 0"),
        (["--student.act_bits", "40"], "act_bits must be a whole number in 2…8, not 40"),
        (["--student.wieght_bits", "4"], "wieght_bits"),
        (
            [
                "--distill.lr_adapters",
                "0",
                "--distill.lr_weight_scales",
                "0",
                "--distill.lr_act_scales",
                "0",
                "--distill.lr_zero_points",
                "0",
                "--distill.lr_affine",
                "0",
            ],
            "must not all be 0",
        ),
        (["--output", "pyproject.toml/x"], "cannot write pyproject.toml/x/log.jsonl: Not a directory"),
        (
            ["--distill.objective", "magic"],
            "objective must be one of rollout, per-step, per-step-in-order, denoising, not",
        ),
        (["--distill.learn", "magic"], "learn must be adapters or weights, not magic"),
        (["--tracker", "magic"], 'tracker must be one of none, tensorboard, wandb, trackio, not "magic"'),
        (["--recipe", "magic"], 'recipe must be "distill" or "published", not "magic"'),
        (["--teacher_steps", "0"], "teacher_steps must be at least 1, not 0"),
        (["--teacher_steps", "51"], "num_steps 1020 cannot be spaced over 1000 timesteps"),
        (["--teacher_steps", "61", "--sampler.num_steps", "2"], "num_steps 122 cannot be spaced over 1000 timesteps"),
        (["--sampler.solver", "ddim", "--sampler.eta", "1"], "eta must be 0"),
        (["--sampler.num_steps", "1"], "distill.rollout_steps must be at most sampler.num_steps, 1"),
        (["--calibration_trajectories", "9999"], "calibration_trajectories must be at most num_trajectories"),
        (["--runtime", "magic"], 'runtime must be integer or simulated, not "magic"'),
        (["--student.search", "magic"], 'search must be "error" or "min-max", not "magic"'),
        (["--distill.num_updates", "-1"], "num_updates must not be negative, not -1"),
        (["--teacher", "nobody"], 'no model "nobody"'),
        (["--num_trajectories", "262145"], "num_trajectories must be at most 2^18, 262144, not"),
    ],
)
def test_wrong_input_gets_one_line_before_anything_starts(arguments, message, tmp_path, refuse):
    assert message in refuse(run, RunConfig, ["--output", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_weights_is_another_run(config_path, tmp_path, unet, capsys):
    arguments = ["--config", str(config_path)]
    run_command("prog", run, RunConfig, arguments)
    unet.conv_in.weight.mul_(1.01)
    save_teacher(unet, tmp_path / "teacher")
    with pytest.raises(SystemExit) as caught:
        run_command("prog", run, RunConfig, arguments)
    assert caught.value.code == 2
    assert "was begun with teacher's weights = " in capsys.readouterr().err


def test_a_damaged_state_gets_one_line(config_path, tmp_path, capsys):
    arguments = ["--config", str(config_path)]
    run_command("prog", run, RunConfig, arguments)
    capsys.readouterr()
    path = tmp_path / "run" / "state" / "latest.pt"
    saved = torch.load(path)
    del saved["state"]["update"]
    without_updates = io.BytesIO()
    torch.save(saved, without_updates)
    for content in (b"PK", without_updates.getvalue()):
        path.write_bytes(content)
        with pytest.raises(SystemExit) as caught:
            run_command("prog", run, RunConfig, arguments)
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert "latest.pt cannot be read" in err
        assert err.count("latest.pt") == err.count("\n") == 1
        assert err.endswith("to start anew\n")


def test_a_student_that_integers_cannot_follow_is_refused_before_anything_starts(
    config_path, tmp_path, capsys, monkeypatch
):
    def refuse(unet):
        raise ValueError("mid_block: a Block is not supported on integers")

    monkeypatch.setattr("finetune.make.refuse_unsupported", refuse)
    arguments = ["--config", str(config_path)]
    with pytest.raises(SystemExit) as caught:
        run_command("prog", run, RunConfig, arguments)
    assert caught.value.code == 2
    message = 'as runtime "integer": mid_block: a Block is not supported on integers'
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    other = ["--runtime", "simulated", "--output", str(tmp_path / "other")]
    run_command("prog", run, RunConfig, [*arguments, *other])
    assert (tmp_path / "other" / "report.html").is_file()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        run_command("prog", run, RunConfig, ["--output", str(tmp_path / "run"), "--tracker", name])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert f'tracker "{name}" needs its package: pip install {name}' in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_interrupted_says_so_and_goes_on(config_path, tmp_path, monkeypatch, capsys):
    arguments = ["--config", str(config_path), "--distill.save_every", "1"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for phase in (
            "finetune.make.make_trajectories",
            "finetune.make.calibrate",
            "finetune.distill.keep_step_sizes_positive",
            "ddpm_mnist.lab.run_state.torch.save",
            "finetune.run.draw",
            "finetune.run.score_images",
            "finetune.run.write_report",
        ):
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
                patch.setattr(phase, lambda *_, **__: signal.raise_signal(signal.SIGINT))
                run_command("prog", run, RunConfig, arguments)
            assert caught.value.code == 130, phase
            assert capsys.readouterr().err == "prog: interrupted\n", phase
            assert not [path for path in (tmp_path / "run").rglob(".*") if path.name != ".lock"]
    finally:
        signal.signal(signal.SIGINT, before)
    run_command("prog", run, RunConfig, arguments)
    assert "Going on from update 3 of 3." in capsys.readouterr().out
    assert [row["update"] for row in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3]
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("phase", ["finetune.make.freeze", "finetune.run.image_grid"])
def test_a_folder_that_is_taken_away_is_not_made_again(phase, config_path, tmp_path, monkeypatch, capsys):
    module, _, name = phase.rpartition(".")
    function = getattr(importlib.import_module(module), name)

    def take_away(*arguments):
        if (tmp_path / "run" / "state" / "latest.pt").exists():
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return function(*arguments)

    monkeypatch.setattr(phase, take_away)
    with pytest.raises(SystemExit) as caught:
        run_command("prog", run, RunConfig, ["--config", str(config_path)])
    assert caught.value.code == 2
    assert re.fullmatch(r"prog: cannot write .*run was deleted, or its \.lock\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_factor_on_eps_travels_with_the_student(config_path, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.export.export_onnx", lambda denoiser, path: path.touch())  # half a minute
    run_command("prog", run, RunConfig, ["--config", str(config_path), "--sampler.eps_scale", "1.06"])
    student = load_model(str(tmp_path / "run"))
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {score["eps_scale"] for score in scores} == {student.solver(SamplerConfig()).eps_scale} == {1.06}
    for kind in ("packed", "onnx"):
        weights = export(ExportConfig(str(tmp_path / "run"), kind, tmp_path / kind))
        config = json.loads((weights.parent / "scheduler" / "scheduler_config.json").read_text())
        assert read_schedule(config).eps_scale == 1.06
    assert load_model(str(tmp_path / "packed")).schedule.fields == student.schedule.fields

    def fail(denoiser, path):
        assert (path.parent / "scheduler" / "scheduler_config.json").is_file()  # no model is there without it
        raise ValueError("no such operator")

    monkeypatch.setattr("eval.export.export_onnx", fail)
    with pytest.raises(InputError, match='run" cannot be exported: no such operator'):
        export(ExportConfig(str(tmp_path / "run"), "onnx", tmp_path / "none"))
    assert not any((tmp_path / "none").iterdir())


def test_the_plan_draws_no_more_than_the_job(config_path, tmp_path, capsys):
    run_command("prog", run, RunConfig, ["--config", str(config_path), "--batch_size", str(1 << 40)])
    assert "together, on this machine" in capsys.readouterr().out


def test_a_student_is_no_teacher(student, tmp_path):
    freeze(student).save_pretrained(tmp_path / "student")
    with pytest.raises(InputError, match="full precision"):
        run(RunConfig(teacher=str(tmp_path / "student"), output=tmp_path / "run"))
