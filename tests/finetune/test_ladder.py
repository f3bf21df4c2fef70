import dataclasses
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
rungs: [ptq-min-max, talsq, published, w2a4, full-10-steps, for-5-steps]
teacher_steps: [2]
base:
  teacher: {teacher}
  sampler: {{num_steps: 3}}
  student: {{rank: 2}}
  num_trajectories: 6
  calibration_trajectories: 4
  num_images: 12
  grid_columns: 4
  distill: {{num_updates: 2, batch_size: 3, rollout_steps: 2, log_every: 1}}
"""


@pytest.fixture
def config_path(write_config):
    return write_config(SMALL, "ladder")


def test_the_ladder_writes_tables_and_pictures(config_path, tmp_path, capsys):
    run_command("prog", climb, LadderConfig, ["--config", str(config_path)])
    folder = tmp_path / "ladder"
    scores = json.loads((folder / "ladder.json").read_text())
    names = ["ptq-min-max", *["talsq"] * 3, "published", *["w2a4"] * 3, "full-10-steps", "for-5-steps"]
    assert [score["model"] for score in scores] == ["teacher", "teacher-2-steps", *names]
    assert [score["num_steps"] for score in scores] == [3, 2, *[3] * 8, 10, 5]
    assert [score.get("distillation_seed") for score in scores] == [None, None, 0, 0, 1, 2, 0, 0, 1, 2, 0, 0]
    assert scores[0]["mse_to_teacher"] == 0 < scores[1]["mse_to_teacher"]
    assert len({score["fid"] for score in scores}) == len(scores)
    assert {score["weight_bits"] for score in scores if score["model"] == "w2a4"} == {2}
    table = (folder / "ladder.md").read_text()
    assert "| w2a4 | W2A4 | 3 | 3 |" in table
    assert "| talsq (step5) | W4A4 | 3 | 3 |" in table
    assert "| full-10-steps | W4A4 | 10 | 1 |" in table
    for name in ("grid", "widths", "rungs", "bits", "cost", "errors", "digit", "step_sizes_w2a4"):
        assert matplotlib.image.imread(folder / f"{name}.png")[..., :3].std() > 0.03, name

    # A finished rung is not run again, a new one is added.
    before = (folder / "talsq" / "0" / "model.safetensors").stat().st_mtime_ns
    run_command("prog", climb, LadderConfig, ["--config", str(config_path), "--rungs", '["step5", "in-order"]'])
    assert (folder / "talsq" / "0" / "model.safetensors").stat().st_mtime_ns == before
    assert [s["model"] for s in json.loads((folder / "ladder.json").read_text())][2:] == [*["talsq"] * 3, "in-order"]
    run_command("prog", climb, LadderConfig, ["--config", str(config_path), "--rungs", '["step1"]'])
    assert [s["model"] for s in json.loads((folder / "ladder.json").read_text())] == ["teacher", "teacher-2-steps"]


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


def test_a_finished_rung_of_other_settings_is_refused(config_path, capsys):
    arguments = ["--config", str(config_path), "--rungs"]
    for rung in ("ptq-min-max", "talsq"):
        run_command("prog", climb, LadderConfig, [*arguments, f'["{rung}"]'])
        with pytest.raises(SystemExit) as caught:
            run_command("prog", climb, LadderConfig, [*arguments, f'["{rung}"]', "--base.student.rank", "3"])
        assert caught.value.code == 2
        assert "was begun with student.rank = 2, now it is 3" in capsys.readouterr().err


def test_a_score_of_another_teacher_is_refused(config_path, tmp_path, capsys):
    arguments = ["--config", str(config_path), "--rungs", '["ptq"]']
    run_command("prog", climb, LadderConfig, arguments)
    shutil.rmtree(tmp_path / "ladder" / "ptq")
    path = tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    for name, message in (("images.pt", "was drawn with weights = "), ("metrics.json", "has weights = ")):
        with pytest.raises(SystemExit) as caught:
            run_command("prog", climb, LadderConfig, arguments)
        assert caught.value.code == 2
        assert f"teacher/{name} {message}" in capsys.readouterr().err
        (tmp_path / "ladder" / "teacher" / "images.pt").unlink()


def test_images_of_another_drawing_are_refused(config_path, tmp_path, capsys):
    arguments = ["--config", str(config_path), "--rungs", '["step1"]']
    run_command("prog", climb, LadderConfig, arguments)
    teacher = tmp_path / "ladder" / "teacher"
    (teacher / "metrics.json").unlink()  # as if it had been stopped while it scored
    for option, name in (("sampler.eps_scale", "eps_scale"), ("score_seed", "seed")):
        with pytest.raises(SystemExit) as caught:
            run_command("prog", climb, LadderConfig, [*arguments, f"--base.{option}", "2"])
        assert caught.value.code == 2
        assert f"teacher/images.pt was drawn with {name} = " in capsys.readouterr().err
    run_command("prog", climb, LadderConfig, arguments)
    for content in ("[1]", "{"):
        (teacher / "metrics.json").write_text(content)
        with pytest.raises(SystemExit) as caught:
            run_command("prog", climb, LadderConfig, arguments)
        assert caught.value.code == 2
        assert "teacher/metrics.json holds no score: delete it" in capsys.readouterr().err


def test_a_student_that_was_not_whole_is_made_again(config_path, tmp_path, monkeypatch):
    def stop(path, value):
        raise KeyboardInterrupt

    arguments, folder = ["--config", str(config_path), "--rungs", '["ptq"]'], tmp_path / "ladder" / "ptq" / "0"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("finetune.make.write_json", stop)
        run_command("prog", climb, LadderConfig, arguments)
    assert (folder / "state" / "latest.pt").is_file()
    run_command("prog", climb, LadderConfig, arguments)
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


def test_where_integers_cannot_run_help_is_given_and_nothing_starts(config_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "mmx")
    for arguments, code in ((["--help"], 0), (["--config", str(config_path)], 2)):
        with pytest.raises(SystemExit) as caught:
            run_command("prog", climb, LadderConfig, arguments)
        assert caught.value.code == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f'as runtime "integer": {VARIABLE}: this processor has no "mmx"' in err
    assert not (tmp_path / "ladder").exists()


def test_images_of_another_scheduler_are_refused(config_path, tmp_path, capsys):
    arguments = ["--config", str(config_path), "--rungs", '["ptq"]']
    run_command("prog", climb, LadderConfig, arguments)
    shutil.rmtree(tmp_path / "ladder" / "ptq")
    path = tmp_path / "teacher" / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"linear"', '"scaled_linear"'))
    with pytest.raises(SystemExit) as caught:
        run_command("prog", climb, LadderConfig, arguments)
    assert caught.value.code == 2
    assert "teacher/images.pt was drawn with scheduler = " in capsys.readouterr().err


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
