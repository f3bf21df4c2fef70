import contextlib
import dataclasses
import io
import json
import math
import shutil

import matplotlib.image
import pytest
from safetensors.torch import load_file, save_file

from ddpm_mnist.lab.command import run_command
from eval import plots
from eval.table import Row, summarise_scores
from finetune.config import RunConfig
from finetune.ladder import RUNGS, LadderConfig, climb, rung_config
from quant.integer.binding import VARIABLE

SMALL = """
output: {output}
rungs: [ptq-min-max, published, w2a4, full-10-steps, for-5-steps]
seeds: 2
teacher_steps: [2]
base:
  teacher: {teacher}
  sampler: {{num_steps: 3}}
  student: {{rank: 2, search: min-max}}
  num_trajectories: 6
  calibration_trajectories: 4
  num_images: 12
  grid_columns: 4
  distill: {{num_updates: 2, batch_size: 3, rollout_steps: 2, log_every: 1}}
"""


@pytest.fixture(scope="module")
def finished(write_config, tmp_path_factory):
    """The configuration of a ladder that has been climbed, which no test changes; it lies in `run` beside it."""
    path = write_config(tmp_path_factory.mktemp("ladder"), SMALL)
    with contextlib.redirect_stdout(io.StringIO()):
        run_command("prog", climb, LadderConfig, ["--config", str(path)])
    return path


@pytest.fixture
def climbed(finished, tmp_path):
    """The words that go on with a copy of that ladder in `tmp_path / "run"`; its teacher is beside it."""
    for name in ("run", "teacher"):
        shutil.copytree(finished.with_name(name), tmp_path / name)
    words = ["--output", str(tmp_path / "run"), "--base.teacher", str(tmp_path / "teacher")]
    return ["--config", str(finished), *words]


def scores_of(folder):
    return json.loads((folder / "ladder.json").read_text())


def test_the_ladder_scores_every_distillation_of_every_rung(finished):
    scores = scores_of(finished.with_name("run"))
    names = ["ptq-min-max", "published", *["w2a4"] * 2, "full-10-steps", "for-5-steps"]
    assert [score["model"] for score in scores] == ["teacher", "teacher-2-steps", *names]
    assert [score["num_steps"] for score in scores] == [3, 2, *[3] * 4, 10, 5]
    assert [score.get("distillation_seed") for score in scores] == [None, None, 0, 0, 0, 1, 0, 0]
    assert scores[0]["mse_to_teacher"] == 0 < scores[1]["mse_to_teacher"]
    assert len({score["fid"] for score in scores}) == len(scores)
    assert {score["weight_bits"] for score in scores if score["model"] == "w2a4"} == {2}


def test_the_ladder_writes_a_table_and_pictures(finished):
    folder = finished.with_name("run")
    table = (folder / "ladder.md").read_text()
    assert "| w2a4 | W2A4 | 3 | 2 |" in table
    assert "| ptq-min-max (step2) | W4A4 | 3 | 1 |" in table
    assert "| full-10-steps | W4A4 | 10 | 1 |" in table
    for name in ("grid", "widths", "rungs", "bits", "cost", "errors", "digit", "step_sizes_w2a4"):
        assert matplotlib.image.imread(folder / f"{name}.png")[..., :3].std() > 0.03, name


def test_a_finished_rung_is_not_run_again_and_a_new_one_is_added(climbed, tmp_path):
    student = tmp_path / "run" / "ptq-min-max" / "0" / "model.safetensors"
    before = student.stat().st_mtime_ns
    run_command("prog", climb, LadderConfig, [*climbed, "--rungs", '["step2", "in-order"]'])
    assert student.stat().st_mtime_ns == before
    assert [s["model"] for s in scores_of(tmp_path / "run")][2:] == ["ptq-min-max", "in-order"]


def test_a_ladder_may_be_the_teacher_alone(climbed, tmp_path):
    run_command("prog", climb, LadderConfig, [*climbed, "--rungs", '["step1"]'])
    assert [s["model"] for s in scores_of(tmp_path / "run")] == ["teacher", "teacher-2-steps"]


def test_a_row_is_the_mean_over_the_distillations_with_their_spread():
    score = {"weight_bits": 32, "act_bits": 32, "kid": 0.0, "mse_to_teacher": 0.0, "fid_to_teacher": 0.0}
    score |= dict.fromkeys(("fid_second", "precision", "recall", "same_digit"), 0.5)
    score |= {"num_images": 100, "seconds": 5.0, "num_steps": 20}
    scores = [{**score, "model": "teacher", "fid": 2.0}]
    scores += [{**score, "model": "w4a4", "weight_bits": 4, "act_bits": 4, "fid": fid} for fid in (3.0, 4.0, 5.0)]
    scores += [{**score, "model": "few", "weight_bits": 4, "act_bits": 4, "fid": 3.0, "num_steps": 5}]
    teacher, rung, few = summarise_scores(scores)
    assert (teacher.fid, teacher.ratio, teacher.bits, teacher.milliseconds) == (2.0, 1.0, "32", 50.0)
    assert (rung.fid, rung.spread, rung.ratio, rung.count, rung.bits) == (4.0, 1.0, 2.0, 3, "W4A4")
    assert math.isnan(teacher.spread)
    assert math.isnan(few.ratio), "no teacher in 5 steps"
    assert math.isnan(summarise_scores([{**scores[0], "fid": 0.0}])[0].ratio), "a file may say so"


def test_bits_stand_in_the_order_of_their_product():
    names = [("teacher", "32"), ("full", "W4A4"), ("w2a8", "W2A8"), ("w2a4", "W2A4"), ("ptq", "W4A4"), ("lsq", "W4A4")]
    rest = {field.name: math.nan for field in dataclasses.fields(Row)} | {"num_steps": 20, "count": 1}
    rows = [Row(**{**rest, "name": name, "bits": bits, "fid": 2.0 + i}) for i, (name, bits) in enumerate(names)]
    axis = plots.bits_chart(rows, ["ptq"]).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["W2A4", "W2A8", "W4A4"]
    places = {text.get_text(): text.xy for text in axis.texts}
    assert places == {"3.00": (2, 3.0), "4.00": (1, 4.0), "5.00": (0, 5.0), "ptq": (2, 6.0)}


@pytest.mark.parametrize("rung", ["ptq-min-max", "w2a4"])
def test_a_finished_rung_of_other_settings_is_refused(rung, climbed, refuse):
    words = [*climbed, "--rungs", f'["{rung}"]', "--base.student.rank", "3"]
    assert "was begun with student.rank = 2, now it is 3" in refuse(climb, LadderConfig, words, late=True)


def test_a_score_of_another_teacher_is_refused(climbed, tmp_path, refuse):
    path = tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    for name, message in (("images.pt", "was drawn with weights = "), ("metrics.json", "has weights = ")):
        assert f"teacher/{name} {message}" in refuse(climb, LadderConfig, climbed, late=True)
        (tmp_path / "run" / "teacher" / "images.pt").unlink()


def test_images_of_another_drawing_are_refused(climbed, tmp_path, refuse):
    (tmp_path / "run" / "teacher" / "metrics.json").unlink()  # as if it had been stopped while it scored
    for option, name in (("sampler.eps_scale", "eps_scale"), ("score_seed", "seed")):
        said = refuse(climb, LadderConfig, [*climbed, f"--base.{option}", "2"])
        assert f"teacher/images.pt was drawn with {name} = " in said


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_a_file_that_holds_no_score_is_refused(content, climbed, tmp_path, refuse):
    (tmp_path / "run" / "teacher" / "metrics.json").write_text(content)
    assert "teacher/metrics.json holds no score: delete it" in refuse(climb, LadderConfig, climbed)


def test_images_of_another_scheduler_are_refused(climbed, tmp_path, refuse):
    path = tmp_path / "teacher" / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"linear"', '"scaled_linear"'))
    assert "teacher/images.pt was drawn with scheduler = " in refuse(climb, LadderConfig, climbed)


def test_a_student_that_was_not_whole_is_made_again(climbed, tmp_path, monkeypatch):
    def stop(path, value):
        raise KeyboardInterrupt

    words, folder = [*climbed, "--rungs", '["ptq"]'], tmp_path / "run" / "ptq" / "0"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("finetune.make.write_json", stop)
        run_command("prog", climb, LadderConfig, words)
    assert (folder / "state" / "latest.pt").is_file()
    run_command("prog", climb, LadderConfig, words)
    assert (folder / "scheduler" / "scheduler_config.json").is_file()


def test_every_rung_is_a_configuration_of_its_own(tmp_path):
    base = RunConfig()
    configs = [rung_config(base, name, tmp_path) for name, rung in RUNGS.items() if not rung.of]
    assert all(left != right for i, left in enumerate(configs) for right in configs[:i])
    full = rung_config(base, "full", tmp_path, number=2)
    assert (full.student, full.distill, full.seed) == (base.student, base.distill, base.seed + 2)
    evaluations = {
        config.distill.batch_size
        * (config.distill.rollout_steps if config.distill.objective == "rollout" and config.recipe == "distill" else 1)
        for config in configs
    }
    assert evaluations == {base.distill.batch_size * base.distill.rollout_steps}


def test_where_integers_cannot_run_nothing_starts(finished, tmp_path, refuse, monkeypatch):
    monkeypatch.setenv(VARIABLE, "mmx")
    said = refuse(climb, LadderConfig, ["--config", str(finished), "--output", str(tmp_path / "run")])
    assert f'as runtime "integer": {VARIABLE}: this processor has no "mmx"' in said
    assert not (tmp_path / "run").exists()


def test_where_integers_cannot_run_help_is_given(monkeypatch):
    monkeypatch.setenv(VARIABLE, "mmx")
    with pytest.raises(SystemExit) as caught:
        run_command("prog", climb, LadderConfig, ["--help"])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rungs", '["ful"]'], "no rung ful; did you mean full?"),
        (["--rungs", '["moon"]'], "no rung moon; there are ptq-min-max, ptq-error"),
        (["--rungs", '["full", "step7"]'], "rungs must name different rungs, at least one"),
        (["--rungs", "[]"], "rungs must name different rungs, at least one"),
        (["--seeds", "0"], "seeds must be at least 1, not 0"),
        (["--teacher_steps", "[0]"], "teacher_steps must be at least 1, not 0"),
        (["--teacher_steps", "[5, 5]"], "teacher_steps must be different numbers, not [5, 5]"),
        (["--base.distill.objective", "per-step"], "base.distill.objective must be left out: each rung has its own"),
        (["--base.distill.learn", "weights"], "base.distill.learn must be left out"),
        (["--base.recipe", "published"], "base.recipe must be left out"),
        (["--base.output", "elsewhere"], "base.output must be left out"),
        (["--teacher_steps", "[61]"], "num_steps 61 cannot be spaced"),
        (["--base.seed", "8191"], "seed must lie in 0…8191, not 8192"),
        (["--base.lr_factor", "0"], "lr_factor must be positive, not 0"),
    ],
)
def test_wrong_input_gets_one_line(arguments, message, refuse):
    assert message in refuse(climb, LadderConfig, arguments)
