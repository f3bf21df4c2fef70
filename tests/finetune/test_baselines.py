import pytest
import torch
from diffusers import DDIMScheduler

from ddpm_mnist.lab.run_state import RunState, read_log
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from finetune import baselines
from finetune.baselines import published_distill, published_start
from finetune.distill import DistillConfig, denoising_loss, distill, draw_batch, parameter_groups
from finetune.trajectories import make_trajectories
from quant import QuantConfig


@pytest.fixture(scope="module")
def made_once(make_models):
    return make_models(8)


@pytest.fixture
def images():
    return torch.randint(0, 256, (40, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def published(unet, solver, buffer):
    states = {t: buffer.x[:, step] for step, t in enumerate(solver.timesteps.tolist())}
    return published_start(unet, QuantConfig(rank=2), solver.timesteps.tolist(), states)


def test_as_published_all_steps_start_alike_on_rounded_weights_and_untouched_biases(unet, published):
    biases = {name: module.bias for name, module in unet.named_modules() if getattr(module, "bias", None) is not None}
    ranges = set()
    for name, layer in published.layers():
        assert len(layer.act_quantizer.scale) == 6
        assert layer.act_quantizer.scale.unique().numel() == layer.act_quantizer.zero_point.unique().numel() == 1
        ranges.add(layer.act_quantizer.scale[0].item())
        torch.testing.assert_close(layer.weight, layer.weight_quantizer(layer.weight))
        if name in biases:
            assert torch.equal(layer.bias, biases[name])
    assert len(ranges) > 5


def test_as_published_learning_rates_fall_linearly_from_the_authors_values(
    published, solver, buffer, tmp_path, monkeypatch
):
    seen = {}

    def spy(student, groups, loss_of, config, run, decay):
        seen.update(groups={g["name"]: g["peak_lr"] for g in groups}, factors=[decay(config, u) for u in range(4)])
        seen.update(losses=[loss_of(u).item() for u in range(2)], clip=config.max_grad_norm)

    monkeypatch.setattr(baselines, "fit", spy)
    # The recipe has rates of its own, whatever the config's are.
    own = {"lr_weight_scales": 0, "lr_act_scales": 0, "lr_zero_points": 0}
    config = DistillConfig(num_updates=4, batch_size=5, scale_aware=False, **own)
    published_distill(published, solver, buffer, config, RunState(tmp_path, {}), 0, lr_factor=3.0)
    for name, layer in published.layers():
        rates = [seen["groups"][f"{name}.{kind}"] for kind in ("lora", "weight_scale", "act_scale", "act_zero_point")]
        expected = [3 * layer.weight_quantizer.scale.mean().item() / 2500, 3e-6, 1.5e-3, 1.5e-3]
        assert rates == pytest.approx(expected)
    assert not any(name.endswith(("bias", "norms")) for name in seen["groups"])
    assert seen["factors"] == [1, 0.75, 0.5, 0.25]
    assert seen["clip"] == float("inf")
    who, step = draw_batch(DistillConfig("per-step-in-order", batch_size=5), buffer, 0, 1)
    eps = published(buffer.x[who, 1], solver.timesteps[1]).sample
    assert step.tolist() == [1] * 5
    assert seen["losses"][1] == pytest.approx((eps - buffer.outputs[who, 1]).square().mean().item(), rel=1e-5)


def test_in_order_a_pass_follows_the_same_trajectories(buffer):
    config = DistillConfig("per-step-in-order", batch_size=5)
    who = [draw_batch(config, buffer, 0, update)[0].tolist() for update in range(12)]
    assert who[0] == who[5] != who[6] == who[11]


def test_the_denoising_loss_is_that_of_diffusers_noise(student, solver, images, monkeypatch):
    """Against `DDIMScheduler.add_noise`: a student that answers with what it is given shows x_t to the loss."""
    config, seen = DistillConfig("denoising", batch_size=7), {}

    def answer(x, t):
        seen.update(x=x, t=t)
        return type("Output", (), {"sample": torch.zeros_like(x)})

    monkeypatch.setattr(type(student), "__call__", lambda self, x, t: answer(x, t))
    loss = denoising_loss(student, solver, images, config, seed=0, update=3)
    scheduler = DDIMScheduler()
    alpha, sigma = (scheduler.alphas_cumprod[seen["t"]].sqrt(), (1 - scheduler.alphas_cumprod[seen["t"]]).sqrt())
    generator = torch.Generator().manual_seed(3)
    who = torch.randint(len(images), (7,), generator=generator)
    torch.randint(6, (7,), generator=generator)
    eps = torch.randn(7, 1, 8, 8, generator=generator)
    x0 = images[who, None].float() / 127.5 - 1
    torch.testing.assert_close(seen["x"], scheduler.add_noise(x0, eps, seen["t"]))
    assert loss.item() == pytest.approx(eps.square().mean().item(), rel=1e-5)
    assert alpha.min() < 0.1 < 0.5 < sigma.max()


def test_full_fine_tuning_learns_weights_biases_and_norms_and_no_adapters(student, solver, buffer, images, tmp_path):
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    config = DistillConfig("denoising", learn="weights", num_updates=3, batch_size=8, warmup_updates=0)
    distill(student, solver, buffer, config, RunState(tmp_path, {}), 0, images)
    # Where nothing is cut off, as among codes of 16 bits, a zero point has no gradient.
    fine = {f"unet.{name}.act_quantizer.zero_point" for name, x in student.layers() if x.act_quantizer.qmax > 255}
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora" in name or name in fine), name
    assert read_log(tmp_path / "log.jsonl")[-1]["update"] == 3


def test_weights_learn_in_proportion_to_their_step_sizes(student):
    groups = {
        g["name"]: g["peak_lr"] for g in parameter_groups(student, DistillConfig(learn="weights", lr_weights=0.2))
    }
    for name, layer in student.layers():
        assert groups[f"{name}.weight"] == pytest.approx(0.2 * layer.weight_quantizer.scale.mean().item())


def test_every_second_state_is_a_trajectory_of_half_as_many_steps(unet):
    fine, coarse = Solver(SamplerConfig(num_steps=6)), Solver(SamplerConfig(num_steps=3))
    buffer = make_trajectories(unet, fine, count=3, seed=0)
    half = buffer.every(2)
    assert torch.equal(half.x, buffer.x[:, [0, 2, 4, 6]])
    assert torch.equal(half.outputs, buffer.outputs[:, [0, 2, 4]])
    assert fine.timesteps[::2].tolist() == coarse.timesteps.tolist()
