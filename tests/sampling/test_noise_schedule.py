"""A folder's own scheduler, against diffusers' solvers made from it."""

import inspect
import itertools
import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from ddpm_mnist.lab import InputError
from ddpm_mnist.sampling import noise_schedule as schedule
from ddpm_mnist.sampling.exact import cosine
from ddpm_mnist.sampling.noise import draw_noise, image_generators
from ddpm_mnist.sampling.noise_schedule import read_schedule
from ddpm_mnist.sampling.sampler import denoise, to_uint8
from ddpm_mnist.sampling.solver import SamplerConfig, Solver

NUM_STEPS = 10


class Toy:
    """A denoiser that answers something smooth of x and t."""

    config = SimpleNamespace(sample_size=[6, 4], in_channels=2, out_channels=2, get=lambda name: None)

    def __call__(self, x, t, *_):
        t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1) / 1000
        return SimpleNamespace(sample=torch.tanh(0.8 * x + t) + 0.3 * torch.sin(5 * x.flip(-1) + t))


def config_of(scheduler):
    """What `save_pretrained` writes."""
    return json.loads(scheduler.to_json_string())


def theirs(config, solver, num_steps, x):
    """The images of diffusers' solver with the folder's own scheduler."""
    if solver == "ddim":
        scheduler, options = DDIMScheduler.from_config(config), {"use_clipped_model_output": True}
    else:
        if config["_class_name"] == "DEISMultistepScheduler":  # diffusers renames these two too late
            config = {**config, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
        clips = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}
        clips = clips if config.get("clip_sample") or config.get("thresholding") else {}
        scheduler, options = DPMSolverMultistepScheduler.from_config(config, **clips), {}
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(Toy()(x, t).sample, t, x, **options).prev_sample
    return x


def compare(config, solver, num_steps=NUM_STEPS):
    """None where it is refused, else the largest difference in grey levels."""
    seeds = range(3, 7)
    try:
        steps = denoise(Toy(), Solver(SamplerConfig(solver, num_steps), read_schedule(config)), seeds)
        *_, last = steps
    except InputError:
        return None
    x = theirs(config, solver, num_steps, draw_noise(image_generators(seeds), (2, 6, 4)))
    if not x.isfinite().all():
        return 255
    return (to_uint8(last.x_next).int() - to_uint8(x).int()).abs().max().item()


BETAS = ("linear", "squaredcos_cap_v2", "scaled_linear")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CLIPS = ({"clip_sample": True}, {"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 0.6})


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("total", [100, 1000, 4000])
@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_every_schedule_samples_as_diffusers_does(solver, total, zero_snr):
    refused = 0
    for betas, prediction, clip, spacing in itertools.product(
        BETAS, PREDICTIONS, CLIPS, ("leading", "trailing", "linspace")
    ):
        options = {"beta_schedule": betas, "prediction_type": prediction, "timestep_spacing": spacing, **clip}
        scheduler = DDPMScheduler(num_train_timesteps=total, rescale_betas_zero_snr=zero_snr, **options)
        difference = compare(config_of(scheduler), solver)
        if difference is None:
            refused += 1
            without_signal = zero_snr and solver == "ddim" and prediction == "epsilon" and spacing != "leading"
            assert without_signal or (solver == "dpm++" and "clip_sample_range" in clip), options
        else:
            assert difference <= 1, options
    assert refused == {("ddim", False): 0, ("ddim", True): 18}.get((solver, zero_snr), 27)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": False}),
        ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}),
        ("DDIMScheduler", {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}),
        ("DDIMScheduler", {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()}),
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", {"lower_order_final": False}),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
        ("DPMSolverSinglestepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("DEISMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("HeunDiscreteScheduler", {}),
        ("LMSDiscreteScheduler", {}),
    ],
)
@pytest.mark.parametrize("num_steps", [3, NUM_STEPS, 20])
@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_every_scheduler_is_read_as_diffusers_reads_it(solver, num_steps, name, options):
    difference = compare(config_of(getattr(diffusers, name)(**options)), solver, num_steps)
    if solver == "dpm++" and "lambda_min_clipped" in options:
        assert difference is None
    else:
        assert difference <= 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ScoreSdeVeScheduler", {}, "ScoreSdeVeScheduler, has no noise schedule of DDPM's kind"),
        ("EDMEulerScheduler", {}, "EDMEulerScheduler, has no noise schedule"),
        ("FlowMatchEulerDiscreteScheduler", {}, "FlowMatchEulerDiscreteScheduler, has no noise schedule"),
        ("DDPMScheduler", {"thresholding": True}, "thresholding = True, which is not supported"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type = learned_range, which is not supported"),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule = sigmoid, which is not supported, only linear"),
        (
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True},
            "use_karras_sigmas = True, which is not",
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 'algorithm_type = .*"dpm\\+\\+"'),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order = 3"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "solver_type = heun"),
    ],
)
def test_what_the_solver_cannot_do_is_refused_by_name(name, options, message):
    with pytest.raises(InputError, match=message):
        Solver(SamplerConfig(), read_schedule(config_of(getattr(diffusers, name)(**options))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"churn": 0.1}, "churn = 0.1, which is not known here"),
        ({"_class_name": "TomorrowScheduler"}, "TomorrowScheduler, has no noise schedule"),
        ({"prediction_type": "flow_prediction"}, "prediction_type = flow_prediction, which is not supported"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps must be a number"),
        ({"num_train_timesteps": 100_001}, "num_train_timesteps must be a number"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be a number"),
        ({"beta_start": -1.0}, "beta_start = -1.0, which is not a number of at least 0"),
        ({"beta_end": 1.5}, "betas must be 1,000 numbers between 0 and 1"),
        ({"beta_end": "0.02"}, "beta_end = '0.02', which is not a number"),
        ({"steps_offset": None}, "steps_offset = None, which is not a number"),
        ({"clip_sample_range": 0}, "clip_sample_range = 0, which is not a number of at least 1e-06"),
        ({"clip_sample_range": float("nan")}, "clip_sample_range = nan, which is not a number"),
        ({"trained_betas": [0.1, 0.2]}, "betas must be 1,000 numbers"),
        ({"trained_betas": {"a": 1}}, "its scheduler cannot be used"),
        ({"clip_sample_range": "wide"}, "clip_sample_range = 'wide', which is not a number"),
        ({"steps_offset": 999}, "cannot be spaced over 1000"),
        ({"beta_schedule": ["linear"]}, "beta_schedule = "),
        ({"_use_default_values": 1}, "_use_default_values = 1, which is not a list"),
    ],
)
def test_a_scheduler_of_no_use_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Solver(SamplerConfig("ddim"), read_schedule({**config_of(DDPMScheduler()), **changes}))


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_what_a_scheduler_was_not_told_is_left_to_defaults(solver):
    live = {"_class_name": "DDPMScheduler", **DDPMScheduler(beta_end=0.01).config}
    assert "timestep_spacing" in live["_use_default_values"]
    changes = {"timestep_spacing": "trailing", "prediction_type": "sample", "clip_sample": False}
    assert compare({**live, **changes}, solver) <= 1
    assert "_use_default_values" not in read_schedule(live).scaled(1.1)


def test_every_field_of_the_installed_diffusers_is_known():
    known = schedule.HONOURED | schedule.OF_OTHER_SOLVERS | schedule.SUPPORTED.keys()
    for name in set(schedule.CLASSES) - {"EpsilonScalingScheduler"}:
        assert set(inspect.signature(getattr(diffusers, name)).parameters) <= known, name


def test_cosine():
    x = np.linspace(0, np.pi / 2, 100_001)
    np.testing.assert_allclose(cosine(x), np.cos(x), rtol=0, atol=3e-16)
