import contextlib
import importlib
import io
import json
import shutil
import signal
from types import SimpleNamespace

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
from finetune.make import distill_student
from finetune.plan import print_plan
from finetune.run import run

SMALL = """
teacher: {teacher}
output: {output}
seed: 5
sampler: {{num_steps: 3, eps_scale: 1.06}}
student: {{weight_bits: 3, act_bits: 5, rank: 2, search: min-max}}
num_trajectories: 6
calibration_trajectories: 4
num_images: 10
grid_columns: 4
distill: {{num_updates: 3, batch_size: 4, rollout_steps: 2, log_every: 1}}
"""


@pytest.fixture(scope="module")
def finished(write_config, tmp_path_factory):
    """A whole run, which no test changes: its configuration's path, its folder, its scores, and what it said."""
    config, said = write_config(tmp_path_factory.mktemp("finished"), SMALL), io.StringIO()
    with contextlib.redirect_stdout(said):
        run_command("prog", run, RunConfig, ["--config", str(config), "--tracker", "tensorboard"])
    folder = config.with_name("run")
    scores = json.loads((folder / "metrics.json").read_text())
    return SimpleNamespace(config=config, folder=folder, scores=scores, said=said.getvalue())


@pytest.fixture(scope="module")
def untrained(finished):
    """The scores of the same run simulated and without updates."""
    folder = finished.folder.with_name("untrained")
    words = ["--runtime", "simulated", "--distill.num_updates", "0", "--output", str(folder)]
    run_command("prog", run, RunConfig, ["--config", str(finished.config), *words])
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def begun(finished, tmp_path):
    """The words that go on with a copy of the finished run, in `tmp_path / "run"`."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return ["--config", str(finished.config), "--output", str(tmp_path / "run")]


@pytest.fixture
def words(finished, tmp_path):
    """The words that begin the run anew, in `tmp_path / "run"`."""
    return ["--config", str(finished.config), "--output", str(tmp_path / "run")]


def test_the_main_job_leaves_a_whole_run_folder(finished):
    for name in ("config.json", "scheduler/scheduler_config.json", "log.jsonl", "state/latest.pt"):
        assert (finished.folder / name).is_file(), name
    for name in ("grid.png", "loss.png", "step_sizes.png"):
        assert (finished.folder / name).stat().st_size > 5000, name
    student = load_model(str(finished.folder))
    assert (student.weight_bits, student.act_bits) == (3, 5)


def test_teacher_calibrated_and_distilled_student_are_scored(finished):
    scores = finished.scores
    assert [score["model"] for score in scores] == ["teacher", "ptq", "student"]
    assert [score["weight_bits"] for score in scores] == [32, 3, 3]
    assert [score["act_bits"] for score in scores] == [32, 5, 5]
    assert scores[0]["mse_to_teacher"] == 0 < scores[2]["mse_to_teacher"]
    assert {score["num_images"] for score in scores} == {10}


def test_the_report_holds_pictures_scores_layers_and_configuration(finished):
    report = (finished.folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3
    assert "http" not in report
    layers = "up_blocks.0.resnets.0.conv_shortcut", "attention products"
    for needle in ("W3A5", *layers, "weight_bits: 3", "seed: 5"):
        assert needle in report, needle


def test_the_tracker_shows_losses_step_sizes_and_the_grid(finished):
    shown = EventAccumulator(str(finished.folder / "tensorboard")).Reload()
    log = read_log(finished.folder / "log.jsonl")
    for name in ("loss", "learning_rate_factor"):
        assert [event.step for event in shown.Scalars(name)] == [1, 2, 3]
        assert [event.value for event in shown.Scalars(name)] == pytest.approx([row[name] for row in log])
    tags = shown.Tags()
    for kind in ("weight_step_size", "act_step_size"):
        assert f"{kind}/conv_in" in tags["scalars"]
        assert len({tag for tag in tags["scalars"] if tag.startswith(kind)}) > 10
    assert tags["images"] == ["grid"]
    assert shown.Images("grid")[0].width > 100


def test_the_job_says_its_plan_and_where_its_pages_are(finished):
    for line in ("6 trajectories of 3 steps ", "3 updates of 4 rollouts ", "scores of 3 models on 10 images "):
        assert f"\n{line}" in f"\n{finished.said}"
    assert "report.html" in finished.said
    assert "grid.png" in finished.said


def test_the_saved_config_makes_the_same_student(finished, tmp_path):
    words = ["--config", str(finished.folder / "config.yaml"), "--output", str(tmp_path / "again")]
    run_command("prog", distill_student, RunConfig, words)
    first, second = (load_model(str(folder)).denoiser.state_dict() for folder in (finished.folder, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_surroundings_have_no_influence(finished, tmp_path, strange_surroundings):
    options = yaml.safe_load(finished.config.read_text())
    words = ["--teacher", options.pop("teacher"), "--output", str(tmp_path / "run")]
    words += [f"--{key}={json.dumps(value)}" for key, value in options.items() if key != "output"]
    with strange_surroundings():
        run_command("prog", run, RunConfig, words)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (finished.folder, tmp_path / "run")]
    assert weights[0] == weights[1]
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [{**score, "seconds": 0} for score in scores] == [{**score, "seconds": 0} for score in finished.scores]


def test_without_updates_the_student_is_the_calibrated_one(untrained):
    _, ptq, student = untrained
    assert (ptq["fid"], ptq["mse_to_teacher"]) == (student["fid"], student["mse_to_teacher"])


def test_how_a_run_is_shown_is_no_part_of_it(begun, capsys):
    run_command("prog", distill_student, RunConfig, [*begun, "--tracker", "none", "--grid_columns", "3"])
    assert "Going on from update 3 of 3." in capsys.readouterr().out


def test_the_student_is_scored_on_integers_unless_told_otherwise(finished, untrained):
    assert [score["runtime"] for score in finished.scores] == ["float", "integer", "integer"]
    assert [score["runtime"] for score in untrained] == ["float", "simulated", "simulated"]
    assert finished.scores[1]["mse_to_teacher"] == pytest.approx(untrained[1]["mse_to_teacher"], rel=0.1)


@pytest.mark.parametrize(
    ("option", "then", "value"), [("student.act_bits", "5", "8"), ("runtime", "integer", "simulated")]
)
def test_a_folder_of_another_run_is_refused_and_left_alone(option, then, value, begun, finished, tmp_path, refuse):
    said = refuse(run, RunConfig, [*begun, f"--{option}", value])
    assert f"was begun with {option} = {then}, now it is {value}: " in said
    for path in finished.folder.rglob("*"):
        assert path.is_dir() or (tmp_path / "run" / path.relative_to(finished.folder)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student.weight_bits", "0"], "weight_bits must be 1, 1.58 or a whole number in 2…8, not 0"),
        (["--student.act_bits", "40"], "act_bits must be a whole number in 2…8, not 40"),
        (["--student.wieght_bits", "4"], "wieght_bits"),
        (
            [f"--distill.lr_{name}=0" for name in ("adapters", "weight_scales", "act_scales", "zero_points", "affine")],
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


def test_a_teacher_of_other_weights_is_another_run(begun, tmp_path, unet, refuse):
    unet.conv_in.weight.mul_(1.01)
    save_teacher(unet, tmp_path / "other")
    assert "was begun with teacher's weights = " in refuse(
        run, RunConfig, [*begun, "--teacher", str(tmp_path / "other")]
    )


def test_a_damaged_state_gets_one_line(begun, tmp_path, refuse):
    path = tmp_path / "run" / "state" / "latest.pt"
    saved = torch.load(path)
    del saved["state"]["update"]
    without_updates = io.BytesIO()
    torch.save(saved, without_updates)
    for content in (b"PK", without_updates.getvalue()):
        path.write_bytes(content)
        said = refuse(run, RunConfig, begun)
        assert "latest.pt cannot be read" in said
        assert said.count("latest.pt") == 1
        assert said.endswith("to start anew\n")


def test_a_student_that_integers_cannot_follow_is_refused_before_anything_starts(words, tmp_path, refuse, monkeypatch):
    def refuse_network(unet):
        raise ValueError("mid_block: a Block is not supported on integers")

    monkeypatch.setattr("finetune.make.refuse_unsupported", refuse_network)
    message = 'as runtime "integer": mid_block: a Block is not supported on integers'
    assert message in refuse(run, RunConfig, words)
    assert not (tmp_path / "run").exists()
    run_command("prog", distill_student, RunConfig, [*words, "--runtime", "simulated"])
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(name, tmp_path, monkeypatch, refuse):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["--output", str(tmp_path / "run"), "--tracker", name]
    assert f'tracker "{name}" needs its package: pip install {name}' in refuse(run, RunConfig, words)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_interrupted_says_so_and_goes_on(words, tmp_path, monkeypatch, capsys):
    words = [*words, "--distill.save_every", "1"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for phase in (
            "finetune.make.make_trajectories",
            "finetune.make.calibrate",
            "finetune.distill.keep_step_sizes_positive",
            "ddpm_mnist.lab.run_state.torch.save",
            "finetune.run.draw",
            "finetune.run.write_report",
        ):
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
                patch.setattr(phase, lambda *_, **__: signal.raise_signal(signal.SIGINT))
                run_command("prog", run, RunConfig, words)
            assert caught.value.code == 130, phase
            assert capsys.readouterr().err == "prog: interrupted\n", phase
            assert not [path for path in (tmp_path / "run").rglob(".*") if path.name != ".lock"]
    finally:
        signal.signal(signal.SIGINT, before)
    run_command("prog", distill_student, RunConfig, words)
    assert "Going on from update 3 of 3." in capsys.readouterr().out
    assert [row["update"] for row in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("phase", ["finetune.make.freeze", "finetune.run.image_grid"])
def test_a_folder_that_is_taken_away_is_not_made_again(phase, begun, tmp_path, monkeypatch):
    module, _, name = phase.rpartition(".")
    function = getattr(importlib.import_module(module), name)

    def take_away(*arguments):
        if (tmp_path / "run").exists():
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return function(*arguments)

    monkeypatch.setattr(phase, take_away)
    with pytest.raises(InputError, match=r"^cannot write .*run was deleted, or its \.lock$"):
        run(run_command("prog", lambda config: config, RunConfig, begun))
    assert not (tmp_path / "run").exists()


def test_a_factor_on_eps_travels_with_the_student(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.export.export_onnx", lambda denoiser, path: path.touch())  # half a minute
    student = load_model(str(finished.folder))
    assert {score["eps_scale"] for score in finished.scores} == {student.solver(SamplerConfig()).eps_scale} == {1.06}
    for kind in ("packed", "onnx"):
        weights = export(ExportConfig(str(finished.folder), kind, tmp_path / kind))
        config = json.loads((weights.parent / "scheduler" / "scheduler_config.json").read_text())
        assert read_schedule(config).eps_scale == 1.06
    assert load_model(str(tmp_path / "packed")).schedule.fields == student.schedule.fields


def test_an_export_that_fails_leaves_nothing(finished, tmp_path, monkeypatch):
    def fail(denoiser, path):
        assert (path.parent / "scheduler" / "scheduler_config.json").is_file()  # no model is there without it
        raise ValueError("no such operator")

    monkeypatch.setattr("eval.export.export_onnx", fail)
    with pytest.raises(InputError, match='run" cannot be exported: no such operator'):
        export(ExportConfig(str(finished.folder), "onnx", tmp_path / "none"))
    assert not any((tmp_path / "none").iterdir())


def test_the_plan_draws_no_more_than_the_job(finished, capsys):
    config = RunConfig(
        num_images=10, num_trajectories=6, calibration_trajectories=4, batch_size=1 << 40, grid_columns=4
    )
    print_plan(config, load_model(str(finished.config.with_name("teacher"))), 0)
    assert "together, on this machine" in capsys.readouterr().out


def test_a_student_is_no_teacher(finished, tmp_path):
    with pytest.raises(InputError, match="full precision"):
        run(RunConfig(teacher=str(finished.folder), output=tmp_path / "run"))
