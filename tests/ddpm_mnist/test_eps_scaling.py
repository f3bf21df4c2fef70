"""The factor on ε: in the folder's scheduler, in the house's sampler, in diffusers' pipelines."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler

from ddpm_mnist.lab import InputError
from ddpm_mnist.sampling.noise import draw_noise, image_generators
from ddpm_mnist.sampling.noise_schedule import default_schedule, read_schedule
from ddpm_mnist.sampling.sampler import denoise, sample
from ddpm_mnist.sampling.solver import SamplerConfig, Solver, make_scheduler
from ddpm_mnist.scheduler import EpsilonScalingScheduler, make_sampling_scheduler
from ddpm_mnist.train import TeacherConfig
from ddpm_mnist.unet import save_teacher
from eval.models import load_model

SCALE = 1.06


def test_a_pipeline_from_the_folder_draws_the_images_of_the_house(unet, tmp_path, monkeypatch):
    save_teacher(unet, tmp_path, SCALE)
    model = load_model(str(tmp_path))
    solver = model.solver(SamplerConfig())
    assert solver.eps_scale == SCALE
    ours = sample(model.denoiser, solver, num_images=3, seed=3, device=model.denoiser.device)
    noise = draw_noise(image_generators(range(3, 6)), (1, 28, 28))
    monkeypatch.setattr("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", lambda *_, **__: noise)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.scheduler, EpsilonScalingScheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(3, num_inference_steps=20, output_type="np").images
    theirs = torch.from_numpy(theirs[..., 0] * 255).round()
    assert (ours - theirs).abs().max() <= 1
    plain = sample(model.denoiser, model.solver(SamplerConfig(eps_scale=1.0)), 3, seed=3)
    assert (plain - theirs).abs().max() > 1


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_the_factor_is_that_of_a_network_with_a_larger_answer(unet, name):
    class Scaled:
        config = unet.config

        def __call__(self, x, t, *_):
            return SimpleNamespace(sample=SCALE * unet(x, t).sample)

    config = SamplerConfig(name, 10, eps_scale=SCALE)
    scheduler, x = make_scheduler(config, default_schedule()), draw_noise(image_generators(range(4)), (1, 28, 28))
    options = {"use_clipped_model_output": True} if name == "ddim" else {}
    for t in scheduler.timesteps:
        x = scheduler.step(Scaled()(x, t).sample, t, x, **options).prev_sample
    for step in denoise(unet, Solver(config), range(4)):
        ours = step.x_next
    assert (ours - x).abs().max() < 5e-5


def test_another_scheduler_takes_the_factor_and_samples_as_before():
    schedule = read_schedule(json.loads(DDIMScheduler(beta_schedule="squaredcos_cap_v2").to_json_string()))
    scaled = read_schedule(schedule.scaled(SCALE))
    assert schedule.scaled(1.0) == schedule.config
    for name in ("ddim", "dpm++"):
        ours, theirs = Solver(SamplerConfig(name), scaled), Solver(SamplerConfig(name, eps_scale=SCALE), schedule)
        assert torch.equal(ours.coefficients, theirs.coefficients)
        x, eps = torch.randn(2, 20, 1, 4, 4)
        x0 = [solver.predict_x0(torch.arange(20), x, eps) for solver in (ours, theirs)]
        assert torch.equal(*x0)
        assert x0[0].abs().max() == 1
    assert EpsilonScalingScheduler.from_config(scaled.config).config.thresholding


def test_a_scheduler_goes_to_disk_and_back(tmp_path):
    scheduler = make_sampling_scheduler(SCALE)
    scheduler.save_pretrained(tmp_path)
    back = EpsilonScalingScheduler.from_pretrained(tmp_path)
    stock = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert back.config.eps_scale == EpsilonScalingScheduler.from_config(back.config).config.eps_scale == SCALE
    for name, value in stock.config.items():
        assert name.startswith("_") or back.config[name] == value
    assert EpsilonScalingScheduler.from_config(DDIMScheduler().config).config.eps_scale == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps_scale": 0}, "eps_scale = 0, which is not a number"),
        ({"eps_scale": "1.1"}, "eps_scale = '1.1', which is not a number"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "eps_scale = 1.06, which is not known here"),
        ({"prediction_type": "v_prediction"}, "eps_scale is a factor on ε, and the model answers v_prediction"),
    ],
)
def test_what_diffusers_would_not_do_is_refused(change, message):
    config = {**json.loads(make_sampling_scheduler(SCALE).to_json_string()), **change}
    with pytest.raises(InputError, match=message):
        Solver(SamplerConfig(), read_schedule(config))


def test_a_factor_is_positive_and_for_epsilon():
    for value in (0.0, -1.0, 1e-9, float("nan"), float("inf")):
        for take in (SamplerConfig, TeacherConfig, EpsilonScalingScheduler):
            with pytest.raises(ValueError, match="eps_scale must be a number of at least 1e-06"):
                take(eps_scale=value)
    with pytest.raises(ValueError, match="factor on ε"):
        EpsilonScalingScheduler(SCALE, prediction_type="sample")
