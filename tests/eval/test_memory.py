from types import SimpleNamespace

import torch
from diffusers import UNet2DModel

from ddpm_mnist.lab.command import run_command
from eval.bench.memory import peak_memory
from finetune import step_cost
from finetune.step_cost import StepCostConfig, measure_step_cost


def test_the_peak_is_what_a_step_holds_at_once():
    one, three = (peak_memory(lambda n=n: [torch.ones(16 << 20) for _ in range(n)]) for n in (1, 3))
    assert 63 < one < 80
    assert 191 < three < 208


def test_the_step_cost_names_time_and_memory_beside_the_teachers(monkeypatch, capsys):
    unet = UNet2DModel(
        28, 1, 1, block_out_channels=(4,), norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), mid_block_type=None,
    )  # fmt: skip
    monkeypatch.setattr(step_cost, "load_model", lambda name: SimpleNamespace(denoiser=unet))
    run_command("prog", measure_step_cost, StepCostConfig, ["--batch_size", "2", "--rounds", "1"])
    out = capsys.readouterr().out
    for needle in ("teacher, batch 2", "per-step distillation, batch 2", "teacher, batch 80", "MiB"):
        assert needle in out
    assert out.count("1.00") >= 4
