import numpy as np
import pytest
import torch

from ddpm_mnist.sampler import SamplerConfig, Solver, to_float
from eval.models import load_model
from finetune.gain import GAINS, bottleneck_variance, interpolate, restore_variance, scaled
from finetune.pipeline import calibration_states
from finetune.trajectories import make_trajectories
from quant import QuantConfig, calibrate, freeze, quantize, to_integer


def test_a_scaled_student_answers_a_larger_eps_from_the_same_codes(student, buffer, solver):
    frozen = freeze(student)
    larger = scaled(frozen, 1.25)
    x, t = buffer.x[:, 2], solver.timesteps[2]
    before = frozen(x, t).sample
    tolerance = {"rtol": 2e-3, "atol": 1e-5}  # of half precision
    torch.testing.assert_close(larger(x, t).sample, 1.25 * before, **tolerance)
    on_integers = to_integer(frozen)(x, t).sample
    torch.testing.assert_close(to_integer(larger)(x, t).sample, 1.25 * on_integers, **tolerance)
    for (_, a), (_, b) in zip(larger.layers(), frozen.layers(), strict=True):
        assert torch.equal(a.codes, b.codes)
    assert torch.equal(frozen(x, t).sample, before)


def test_a_scaled_student_is_saved_bit_for_bit(student, buffer, solver, tmp_path):
    larger = scaled(freeze(student), 1.0123)
    larger.save_pretrained(tmp_path)
    x, t = buffer.x[:, 2], solver.timesteps[2]
    assert torch.equal(type(larger).from_pretrained(tmp_path)(x, t).sample, larger(x, t).sample)


def test_only_a_frozen_student_is_scaled(student):
    with pytest.raises(ValueError, match="frozen"):
        scaled(student, 1.01)


@pytest.mark.parametrize(
    ("tried", "gain"),
    [
        ({0.0: 1.002}, 0.0),
        ({0.0: 0.98, 0.01: 1.02}, 0.005),
        ({0.0: 0.97, 0.01: 0.99, 0.02: 1.0}, 0.02),
        ({0.0: 0.9, 0.01: 0.96, 0.02: 0.98}, 0.02),
    ],
)
def test_the_gain_lies_on_the_line_through_the_last_two(tried, gain):
    assert interpolate(tried) == pytest.approx(gain)


def test_the_variance_is_that_of_the_middle_blocks_channels(unet):
    images = torch.randint(256, (70, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    seen = []
    hook = unet.mid_block.register_forward_hook(lambda block, inputs, output: seen.append(output))
    unet(to_float(images), 49)
    hook.remove()
    expected = np.var(seen[0].double().mean((2, 3)).numpy(), axis=0, ddof=1).sum()
    assert bottleneck_variance(unet, images, 49) == pytest.approx(expected, rel=1e-4)
    assert bottleneck_variance(unet, images[:1].repeat(5, 1, 1), 49) == pytest.approx(0, abs=1e-9)


def test_a_student_whose_eps_is_too_small_gets_its_variance_back():
    teacher, sampler, count = load_model("teacher").denoiser, SamplerConfig("dpm++", 10), 128
    solver = Solver(sampler)
    buffer = make_trajectories(teacher, solver, count, seed=0)
    student = quantize(teacher, QuantConfig(8, 8), solver.timesteps.tolist())
    calibrate(student, calibration_states(buffer, solver, 32))
    small = scaled(freeze(student), 0.97)
    restored = restore_variance(small, teacher, sampler, buffer, 0, "integer")
    assert list(restored.tried) == list(GAINS[: len(restored.tried)])
    assert restored.tried[0.0] < 0.99
    assert 0.01 < restored.gain < 0.05
    again = restore_variance(restored.student, teacher, sampler, buffer, 0, "integer")
    assert again.tried[0.0] == pytest.approx(1, abs=0.01)
