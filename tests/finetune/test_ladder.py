import json

import matplotlib.image
import pytest

from ddpm_mnist.command import run_command
from finetune.ladder import RUNGS, LadderConfig, climb, rung_config
from finetune.pipeline import RunConfig

SMALL = """
output: {output}
rungs: [ptq-min-max, talsq, full, w2a4]
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


def test_the_ladder_writes_a_table_a_chart_and_a_picture(config_path, tmp_path, capsys):
    run_command("prog", climb, LadderConfig, ["--config", str(config_path)])
    folder = tmp_path / "ladder"
    scores = json.loads((folder / "ladder.json").read_text())
    assert [score["model"] for score in scores[1:]] == ["ptq-min-max", "talsq", "full", "w2a4"]
    assert [(score["weight_bits"], score["act_bits"]) for score in scores[1:]] == [(4, 4), (4, 4), (4, 4), (2, 4)]
    assert scores[0]["mse_to_teacher"] == 0
    assert len({score["fid"] for score in scores}) == 5
    assert "| w2a4 | W2A4 |" in (folder / "ladder.md").read_text()
    for name in ("chart.png", "grid.png"):
        assert matplotlib.image.imread(folder / name)[..., :3].std() > 0.05

    # A finished rung is not run again, a new one is added.
    before = (folder / "talsq" / "model.safetensors").stat().st_mtime_ns
    arguments = ["--config", str(config_path), "--rungs", '["talsq", "rollout-uniform"]']
    run_command("prog", climb, LadderConfig, arguments)
    assert (folder / "talsq" / "model.safetensors").stat().st_mtime_ns == before
    assert [s["model"] for s in json.loads((folder / "ladder.json").read_text())][1:] == ["talsq", "rollout-uniform"]


def test_a_finished_rung_of_other_settings_is_refused(config_path, capsys):
    arguments = ["--config", str(config_path), "--rungs"]
    for rung in ("ptq-min-max", "full"):
        run_command("prog", climb, LadderConfig, [*arguments, f'["{rung}"]'])
        with pytest.raises(SystemExit) as caught:
            run_command("prog", climb, LadderConfig, [*arguments, f'["{rung}"]', "--base.student.rank", "3"])
        assert caught.value.code == 2
        assert "was begun with student = " in capsys.readouterr().err


def test_every_rung_is_a_configuration_of_its_own(tmp_path):
    base = RunConfig()
    configs = [rung_config(base, name, tmp_path) for name in RUNGS]
    assert all(left != right for i, left in enumerate(configs) for right in configs[:i])
    full = rung_config(base, "full", tmp_path)
    assert (full.student, full.distill) == (base.student, base.distill)
    per_step = rung_config(base, "talsq", tmp_path).distill
    assert per_step.batch_size == base.distill.batch_size * base.distill.rollout_steps


def test_an_unknown_rung_gets_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command("prog", climb, LadderConfig, ["--rungs", '["moon"]'])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no rung moon; there are ptq-min-max, ptq-error" in err
