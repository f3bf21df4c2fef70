import copy
import hashlib

import pytest
import torch
from diffusers import DDIMPipeline, DPMSolverMultistepScheduler

from ddpm_mnist.lab import InputError
from ddpm_mnist.sampling.noise import draw_noise, image_generators
from ddpm_mnist.sampling.noise_schedule import default_schedule
from ddpm_mnist.sampling.sampler import batches, denoise, sample, to_uint8
from ddpm_mnist.sampling.solver import SamplerConfig, Solver, make_scheduler
from ddpm_mnist.scheduler import make_noise_schedule

SOLVERS = [("ddim", 0.0), ("ddim", 1.0), ("dpm++", 0.0)]


def probe(config, dtype):
    """Feed diffusers' own step with unit vectors, one axis for x, each x0 and z, and read (a, b, c, s) off it.

    Its tables are float32; for float64 they are put in its place.
    """
    scheduler, num_steps = make_scheduler(config, default_schedule()), config.num_steps
    options = {"prediction_type": "sample", "clip_sample": False, "thresholding": False}
    scheduler = type(scheduler).from_config(scheduler.config, **options)
    scheduler.set_timesteps(num_steps)
    if dtype == torch.float64:
        scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=dtype)).cumprod(0)
        levels = scheduler.alphas_cumprod[scheduler.timesteps]
        scheduler.sigmas = torch.cat([((1 - levels) / levels).sqrt(), torch.zeros(1, dtype=dtype)])
    *x0_axes, x_axis, z_axis = torch.eye(num_steps + 2, dtype=dtype)
    options = {}
    if config.solver == "ddim":
        options = {"eta": config.eta, "use_clipped_model_output": True, "variance_noise": z_axis}
    rows = []
    for step, t in enumerate(scheduler.timesteps):
        out = scheduler.step(x0_axes[step], t, x_axis, **options).prev_sample
        before = out[step - 1] if step else torch.zeros(())
        rows.append(torch.stack([out[num_steps], out[step], before, out[num_steps + 1]]))
    return torch.stack(rows)


# The float32 tables of diffusers are good to some six digits, and to fewer the closer the steps.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 5e-8)])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 14, 15, 20, 50, 100])
@pytest.mark.parametrize(("name", "eta"), [*SOLVERS, ("ddim", 0.5)])
def test_coefficients_equal_diffusers(name, eta, num_steps, dtype, tolerance):
    config = SamplerConfig(name, num_steps, eta)
    solver = Solver(config)
    torch.testing.assert_close(solver.coefficients.to(dtype), probe(config, dtype), rtol=0, atol=tolerance)
    assert solver.is_stochastic == (eta > 0 and num_steps > 1)


@pytest.mark.parametrize(
    ("config", "digest"),
    [
        (SamplerConfig("dpm++", 20), "c0e21d76dfdf121628e47b6b1e90bf786addbc36f90a588384a707fdfbd2512b"),
        (SamplerConfig("ddim", 20, eta=1.0), "bd181facb542350263d52c7a7129b62dfac91f89c5f2ecb19d33ad5436888205"),
    ],
)
def test_coefficients_stay_what_they_are(config, digest):
    coefficients = Solver(config).coefficients.numpy()
    assert hashlib.sha256(coefficients.astype("<f4").tobytes()).hexdigest() == digest


def test_noise_is_added_as_in_training():
    solver, schedule = Solver(SamplerConfig()), make_noise_schedule()
    step, (x0, eps) = torch.arange(20), draw_noise(image_generators(range(40)), (1, 28, 28)).split(20)
    noisy = schedule.add_noise(x0, eps, solver.timesteps)
    torch.testing.assert_close(solver.add_noise(step, x0, eps), noisy, rtol=0, atol=2e-6)
    torch.testing.assert_close(solver.predict_x0(step, noisy, eps), x0.clamp(-1, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize(("name", "eta"), SOLVERS)
def test_states_equal_diffusers_scheduler(unet, name, eta, num_steps):
    config = SamplerConfig(name, num_steps, eta)
    scheduler, generators = make_scheduler(config, default_schedule()), image_generators(range(7, 10))
    x = draw_noise(generators, (1, 28, 28))
    for step in denoise(unet, Solver(config), range(7, 10)):
        t = scheduler.timesteps[step.number]
        assert (step.x - x).abs().max() < 5e-5
        options = {"eta": eta, "use_clipped_model_output": True} if name == "ddim" else {}
        if eta:
            options["variance_noise"] = draw_noise(generators, (1, 28, 28))
        x = scheduler.step(unet(x, t).sample, t, x, **options).prev_sample
    assert (step.x_next - x).abs().max() < 5e-5


def test_images_equal_diffusers_pipeline(unet, monkeypatch):
    noise = draw_noise(image_generators(range(3, 7)), (1, 28, 28))
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: noise)
    config = SamplerConfig("ddim", 10)
    pipeline = DDIMPipeline(unet=unet, scheduler=make_scheduler(config, default_schedule()))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(4, num_inference_steps=10, use_clipped_model_output=True, output_type="np").images
    for step in denoise(unet, Solver(config), range(3, 7)):
        ours = step.x_next
    difference = (ours.clamp(-1, 1) / 2 + 0.5)[:, 0] - torch.from_numpy(theirs)[..., 0]
    assert difference.abs().max() < 2e-5


def test_specimen_diffusers_default_carries_the_unclipped_error_on(unet):
    """Without use_clipped_model_output, DDIM clips x0 and keeps ε: not the sampler of the house."""
    config = SamplerConfig("ddim", 10)
    scheduler, x = make_scheduler(config, default_schedule()), draw_noise(image_generators(range(4)), (1, 28, 28))
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    for step in denoise(unet, Solver(config), range(4)):
        ours = step.x_next
    assert (ours - x).abs().max() > 0.1


def test_a_model_that_overflows_is_refused(unet):
    broken = copy.deepcopy(unet)
    broken.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(InputError, match="the model's outputs are not finite"):
        sample(broken, Solver(SamplerConfig("ddim", 2)), num_images=1)


@pytest.mark.parametrize(("name", "eta"), SOLVERS)
def test_an_image_depends_on_its_seed_alone(unet, name, eta):
    config = SamplerConfig(name, 4, eta)
    whole = sample(unet, Solver(config), num_images=7, seed=5, batch_size=7)
    assert whole.dtype == torch.uint8
    assert whole.shape == (7, 28, 28)
    parts = sample(unet, Solver(config), num_images=7, seed=5, batch_size=3)
    later = sample(unet, Solver(config), num_images=2, seed=10, batch_size=1)
    # A float network may round differently in another batch: one grey level is the most that it may show.
    for one, other in ((whole, parts), (whole[5:], later)):
        difference = (one.int() - other.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01


def test_samples_of_one_batch_may_stand_at_different_steps(unet):
    solver = Solver(SamplerConfig("dpm++", 6))
    steps = list(denoise(unet, solver, range(3)))
    where = torch.tensor([0, 5, 3])
    who = torch.arange(3)
    x, eps, expected = (torch.stack([getattr(s, k) for s in steps])[where, who] for k in ("x", "output", "x_next"))
    before = (where - 1).clamp(min=0)
    x_before, eps_before = (torch.stack([getattr(s, k) for s in steps])[before, who] for k in ("x", "output"))
    x0_prev = solver.predict_x0(before, x_before, eps_before)
    actual = solver.advance(where, x, solver.predict_x0(where, x, eps), x0_prev)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_trailing_timesteps():
    solver = Solver(SamplerConfig(num_steps=20))
    assert solver.timesteps.tolist() == list(range(999, 0, -50))


def test_every_number_of_steps_that_is_accepted_can_be_sampled():
    for num_steps in range(1, 130):
        try:
            solver = Solver(SamplerConfig("ddim", num_steps))
        except InputError:
            continue
        assert len(solver.timesteps) == num_steps
        assert solver.timesteps.min() >= 0


def test_no_room_is_made_for_more_steps_than_there_are(monkeypatch):
    asked = []
    monkeypatch.setattr(DPMSolverMultistepScheduler, "set_timesteps", lambda self, steps: asked.append(steps))
    for num_steps in (1001, 10**12):
        with pytest.raises(InputError, match=f"num_steps {num_steps} cannot be spaced over 1000 timesteps"):
            Solver(SamplerConfig(num_steps=num_steps))
    assert asked == []


def test_batches_cover_the_seeds_once():
    assert [list(b) for b in batches(3, 5, 2)] == [[3, 4], [5, 6], [7]]


def test_uint8_ends():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)).flatten().tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "euler"}, 'solver must be "ddim" or "dpm\\+\\+", not "euler"'),
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"num_steps": 61}, "num_steps 61 cannot be spaced"),
        ({"num_steps": 1001}, "num_steps 1001 cannot be spaced over 1000 timesteps"),
        ({"guidance_scale": 2.0}, "guidance_scale needs null_class"),
        ({"guidance_scale": float("nan"), "null_class": 1}, "guidance_scale must be a number"),
        ({"solver": "ddim", "eta": 1.5}, "eta must lie in"),
        ({"eta": 0.5}, "eta is DDIM's"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Solver(SamplerConfig(**options))
