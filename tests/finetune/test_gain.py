import pytest
import torch

from ddpm_mnist import InputError
from ddpm_mnist.sampler import SamplerConfig, Solver, sample
from eval.models import load_model
from finetune.gain import GAINS, interpolate, match_noise, noise_left, scaled
from finetune.pipeline import calibration_states
from finetune.trajectories import MAX_SEED, first_noise, held_out_noise, make_trajectories
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
        ({0.0: 0.998}, 0.0),
        ({0.0: 1.02, 0.01: 0.98}, 0.005),
        ({0.0: 1.03, 0.01: 1.01, 0.02: 1.0}, 0.02),
        ({0.0: 1.1, 0.01: 1.04, 0.02: 1.02}, 0.02),
        ({0.0: 1.1, 0.01: 1.04, 0.02: 1.06}, 0.01),
    ],
)
def test_the_gain_lies_on_the_line_through_the_last_two(tried, gain):
    assert interpolate(tried) == pytest.approx(gain)


def test_the_noise_is_what_the_network_answers(unet):
    images = torch.randint(256, (70, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    x = images.float()[:, None] / 127.5 - 1
    assert noise_left(unet, images, 49) == pytest.approx((unet(x, 49).sample ** 2).mean().item(), rel=1e-4)


def test_the_teacher_sees_the_noise_that_is_added():
    teacher, sampler = load_model("teacher").denoiser, SamplerConfig("dpm++", 10)
    images = sample(teacher, Solver(sampler), 32, seed=0)
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(images + strength * z).round().clamp(0, 255).byte() for strength in (0, 10, 20)]
    clean, some, more = (noise_left(teacher, x, 49) for x in noisy)
    assert 2 * clean < some < more


@pytest.fixture(scope="module")
def matched_from_a_small_eps():
    """A W8A8 student of the released teacher whose ε is 3% too small; it with its gain; and again."""
    teacher, sampler, count = load_model("teacher").denoiser, SamplerConfig("dpm++", 10), 128
    solver, noise = Solver(sampler), held_out_noise(0, count)
    student = quantize(teacher, QuantConfig(8, 8), solver.timesteps.tolist())
    calibrate(student, calibration_states(make_trajectories(teacher, solver, 32, seed=0), solver, 32))
    small = scaled(freeze(student), 0.97)
    options = teacher, solver, sample(teacher, solver, count, noise), noise, "integer"
    matched = match_noise(small, *options)
    return matched, match_noise(matched.student, *options)


def test_a_student_whose_eps_is_too_small_gets_it_back(matched_from_a_small_eps):
    matched, again = matched_from_a_small_eps
    assert list(matched.tried) == list(GAINS[: len(matched.tried)])
    assert matched.tried[0.0] > 1.1
    assert matched.gain == pytest.approx(0.03, abs=0.01)
    assert again.tried[0.0] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("noise", "gain"), [(1.0, 0.0), (1.5, 0.02)])
def test_a_student_that_leaves_no_more_is_left_as_it_is(noise, gain, student, unet, monkeypatch):
    """And one that no gain brings down to its teacher gets the gain that comes nearest."""
    values = iter([1.0, *(noise - (0.1 if trial == 2 else 0.0) for trial in range(len(GAINS)))])
    monkeypatch.setattr("finetune.gain.noise_left", lambda *_: next(values))
    frozen, images = freeze(student), torch.zeros(2, 28, 28, dtype=torch.uint8)
    matched = match_noise(frozen, unet, Solver(SamplerConfig(num_steps=6)), images, 0, "simulated")
    assert matched.gain == gain
    before, after = (model.unet.conv_out.weight_quantizer.scale.item() for model in (frozen, matched.student))
    assert after == pytest.approx(before * (1 + gain), rel=1e-3)
    assert gain or after == before


def test_a_teacher_that_sees_no_noise_is_refused(student, unet):
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    with pytest.raises(InputError, match="gain_images must be 0"):
        match_noise(freeze(student), unet, Solver(SamplerConfig(num_steps=6)), images, 0, "simulated")


def test_no_buffer_holds_the_noises_that_are_held_out():
    assert held_out_noise(3, 2048) + 2048 == first_noise(4)
    assert held_out_noise(MAX_SEED, 2048) + 2048 == 1 << 32
