"""docs/efficientdm.py, the method in one file, computes what the package computes."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from eval.models import load_model
from finetune.distill import per_step_loss
from finetune.trajectories import Trajectories
from quant import QuantConfig, quantize
from quant.functional import code_range, fake_quantize
from quant.quantizers import ActivationQuantizer, Clock, WeightQuantizer

SCRIPT = Path(__file__).parents[1] / "docs" / "efficientdm.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("efficientdm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_fake_quantize_and_its_gradients(script, bits, signed):
    torch.manual_seed(bits)
    codes = code_range(bits, signed)
    x, upstream = torch.randn(2, 5, 40)
    scale, zero_point = torch.rand(5) / 4 + 0.1, torch.zeros(5) if signed else torch.rand(5) * codes[-1]
    results = []
    for function, bounds in ((script.fake_quantize, (codes[0], codes[-1])), (fake_quantize, (codes,))):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, scale, zero_point)]
        y = function(*inputs, *bounds)
        results.append([y, *torch.autograd.grad(y, inputs, upstream)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_searched_step_sizes(script, bits):
    torch.manual_seed(bits)
    weight, values = torch.randn(6, 3, 3, 3), nn.functional.silu(torch.randn(500))
    weights, activations = WeightQuantizer(bits, 6), ActivationQuantizer(bits, Clock([1]))
    weights.initialise(weight)
    activations.initialise(values)
    assert torch.equal(script.best_weight_steps(weight, bits), weights.scale)
    assert torch.equal(torch.stack(script.best_act_range(values, bits)), torch.cat(list(activations.parameters())))


def test_merged_weights_and_the_loss_with_its_gradients(script):
    """Without attention, whose projections the package makes one layer."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3, add_attention=False,
    )  # fmt: skip
    solver = Solver(SamplerConfig(num_steps=4))
    states, answers = torch.randn(6, 5, 1, 8, 8), torch.randn(6, 4, 1, 8, 8)
    ours = script.Student(unet, solver.timesteps, bits=4, rank=2)
    ours.calibrate(states)
    config = QuantConfig(4, 4, edge_act_bits=8, rank=2, split_skips=False)
    package = quantize(unet, config, solver.timesteps)
    theirs = dict(package.layers())
    assert [layer.bits for layer in ours.layers()] == [layer.act_quantizer.bits for layer in theirs.values()]
    for name, layer in theirs.items():
        own = ours.unet.get_submodule(name)
        assert torch.equal(own.s_w, layer.weight_quantizer.scale)
        own.lora_b.data.normal_(std=0.1)
        layer.lora_a.data, layer.lora_b.data = own.lora_a.data, own.lora_b.data
        layer.act_quantizer.scale.data, layer.act_quantizer.zero_point.data = own.s_x.data, own.z_x.data
        assert torch.equal(own.quantized_weight(), layer.quantized_weight())
    who, step = torch.tensor([5, 0, 3]), torch.tensor([3, 1, 0])
    loss = script.distillation_loss(ours, states[who, step], solver.timesteps[step], answers[who, step])
    expected = per_step_loss(package, solver, Trajectories(states, answers), who, step)
    assert loss == expected
    for name, layer in theirs.items():
        own = ours.unet.get_submodule(name)
        act = layer.act_quantizer
        pairs = (
            (own.lora_a, layer.lora_a),
            (own.lora_b, layer.lora_b),
            (own.s_w, layer.weight_quantizer.scale),
            (own.s_x, act.scale),
            (own.z_x, act.zero_point),
        )
        own_gradients = torch.autograd.grad(loss, [one for one, _ in pairs], retain_graph=True)
        their_gradients = torch.autograd.grad(expected, [other for _, other in pairs], retain_graph=True)
        assert all(map(torch.equal, own_gradients, their_gradients)), name


def test_trajectories(script):
    """diffusers' own scheduler rounds its coefficients otherwise."""
    teacher, solver = load_model("teacher"), Solver(SamplerConfig(num_steps=3), load_model("teacher").schedule)
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    states, answers, timesteps = script.denoise(teacher.denoiser, noise, 3)
    assert torch.equal(timesteps, solver.timesteps)
    x, x0_prev = noise, noise
    for number in range(3):
        step = torch.full((2,), number)
        answer = solver.model_output(teacher.denoiser, step, x, {})
        x0 = solver.predict_x0(step, x, answer)
        x, x0_prev = solver.advance(step, x, x0, x0_prev), x0
        assert answers[:, number] == pytest.approx(answer, abs=1e-4)
        assert states[:, number + 1] == pytest.approx(x, abs=1e-4)
