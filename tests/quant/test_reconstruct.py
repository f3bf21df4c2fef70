"""Reconstruction: the rounded weights of numpy's least squares, column by column, and what they are for."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from quant import QuantConfig, calibrate, freeze, quantize
from quant.functional import quantize as to_codes
from quant.layers import QuantConv2d, QuantLinear
from quant.quantizers import Clock
from quant.reconstruct import DAMPING, FEWEST_ROWS, reconstruct

CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (1, 3), "padding": (0, 2), "dilation": (1, 2), "groups": 4},
    {"kernel_size": 1},
]


def make_layer(weight_bits=4, act_bits=4, **options):
    torch.manual_seed(0)
    bits = weight_bits, act_bits, 2, Clock([0])
    return QuantConv2d(nn.Conv2d(8, 12, **options), *bits) if options else QuantLinear(nn.Linear(12, 7), *bits)


def make_inputs(layer, seed=1, count=64):
    """What the float network hands to the layer, and a quantized one: correlated channels, and one that is off."""
    generator = torch.Generator().manual_seed(seed)
    channels = 8 if layer.weight.dim() == 4 else 12
    mixed = torch.randn(count, 9, 10, channels, generator=generator) @ torch.randn(
        channels, channels, generator=torch.Generator().manual_seed(0)
    )
    exact = mixed.movedim(-1, 1).relu() if layer.weight.dim() == 4 else mixed.relu()
    return exact, 1.1 * exact + 0.1 + 0.02 * torch.randn(exact.shape, generator=generator)


def reconstructed(layer, exact, real):
    layer.act_quantizer.clock.set(torch.zeros(2 * len(exact)))
    layer.act_quantizer.initialise(real.flatten())
    layer.weight_quantizer.initialise(layer.weight)
    return reconstruct("error", layer, (torch.cat([exact, real]),), None)


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_an_output_is_the_product_of_its_inputs(options):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 12, **options), torch.randn(3, 8, 9, 10)
    y = conv(x).movedim(1, -1).flatten(0, -2)
    places = torch.randperm(len(y))[:50]
    rows = make_layer(**options).inputs_of(x, places).unflatten(1, (conv.groups, -1)).transpose(0, 1)
    product = rows @ conv.weight.flatten(1).unflatten(0, (conv.groups, -1)).mT
    torch.testing.assert_close(product.transpose(0, 1).flatten(1) + conv.bias, y[places])


def round_in_turn(weight, gram, scale, codes):
    """One row of weights: each column in turn is rounded, and least squares finds all that are still free anew."""
    best, weight = weight, weight.copy()
    for column in range(len(weight)):
        code = to_codes(torch.tensor([weight[column]]).float(), scale, torch.zeros(1), codes)
        weight[column] = code.item() * scale.item()
        if free := len(weight) - column - 1:
            left = gram[-free:, : column + 1] @ (best - weight)[: column + 1]
            weight[-free:] = best[-free:] + np.linalg.solve(gram[-free:, -free:], left)
    return weight


@pytest.mark.parametrize("options", [{}, CONVOLUTIONS[0], CONVOLUTIONS[2]])
@pytest.mark.parametrize("bits", [8, 4, 2, 1.58, 1])
def test_weights_are_those_of_repeated_least_squares(bits, options):
    layer = make_layer(bits, **options)
    exact, real = make_inputs(layer, count=20)
    before = layer.weight.detach().flatten(1).double().numpy().copy()
    answer = layer.apply_weight(exact, layer.weight).detach()
    reconstructed(layer, exact, real)
    x = layer.act_quantizer(torch.cat([exact, real])).chunk(2)[1].detach()
    answer = answer.movedim(1, -1) if options else answer
    rows = layer.inputs_of(x, torch.arange(answer[..., 0].numel())).double().numpy()
    target = answer.flatten(0, -2).double().numpy()
    assert len(rows) <= FEWEST_ROWS, "all of them are looked at"
    groups = np.split(rows - rows.mean(0), layer.groups, axis=1)
    damping = DAMPING * np.mean([np.square(x).sum(0) for x in groups])
    found, means = layer.quantized_weight().detach().flatten(1).double().numpy(), np.split(rows.mean(0), layer.groups)
    for channel, row in enumerate(found):
        group = channel * layer.groups // len(found)
        pull = np.sqrt(damping) * np.eye(found.shape[1])  # rows of the system that hold to the weight as it was
        system = np.vstack([groups[group], pull])
        answers = np.concatenate([target[:, channel] - target[:, channel].mean(), pull @ before[channel]])
        best = np.linalg.lstsq(system, answers, rcond=None)[0]
        scale = layer.weight_quantizer.scale.detach()[channel][None]
        expected = round_in_turn(best, system.T @ system, scale, layer.weight_quantizer.codes)
        np.testing.assert_allclose(row, expected, atol=1e-6)
        bias = target[:, channel].mean() - means[group] @ row
        np.testing.assert_allclose(layer.bias[channel].item(), bias, atol=1e-4)


@pytest.mark.parametrize("options", [{}, *CONVOLUTIONS])
def test_the_layer_is_nearer_on_inputs_that_it_has_not_seen(options):
    layer, rounded = make_layer(act_bits=8, **options), make_layer(act_bits=8, **options)
    exact, real = make_inputs(layer)
    answer = reconstructed(layer, exact, real)
    for name, parameter in rounded.act_quantizer.named_parameters():
        parameter.data.copy_(layer.act_quantizer.get_parameter(name))
    rounded.weight_quantizer.initialise(rounded.weight)
    torch.testing.assert_close(answer.chunk(2)[0], rounded.apply_weight(exact, rounded.weight))
    exact, real = make_inputs(layer, seed=2)
    target, errors = rounded.apply_weight(exact, rounded.weight), []
    for student in (layer, rounded):
        student.act_quantizer.clock.set(torch.zeros(len(real)))
        errors.append((student(real) - target).square().mean().item())
    assert errors[0] < 0.5 * errors[1]


def test_a_layer_whose_input_is_always_the_same_keeps_its_weight():
    layer = make_layer()
    before = layer.weight.detach().clone()
    constant = torch.randn(12, generator=torch.Generator().manual_seed(3)).expand(20, 3, 12)
    answer = reconstructed(layer, constant, constant + 0.1)
    # Column after column is rounded as it comes, but for what the noise of a mean in float32 says.
    assert (layer.weight - before).norm() < 1e-3 * before.norm()
    torch.testing.assert_close(*answer.chunk(2))  # the bias takes the whole difference


def make_unet(**options):
    return UNet2DModel(
        8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **options,
    ).eval()  # fmt: skip


def test_a_calibrated_student_is_nearer_to_its_teacher():
    torch.manual_seed(0)
    unet = make_unet()
    x, errors = torch.randn(256, 1, 8, 8), []
    states = dict(zip([900, 300], torch.randn(2, 64, 1, 8, 8), strict=True))
    for reconstruction in (True, False):
        student = quantize(unet, QuantConfig(4, 8, rank=2, reconstruction=reconstruction), [900, 300])
        calibrate(student, states)
        errors.append((freeze(student)(x, 300).sample - unet(x, 300).sample).square().mean().item())
    assert errors[0] < 0.5 * errors[1]


def test_every_state_has_its_turn():
    """Rows of conditions are often in order: taking the first ones alone would fit a few classes."""
    torch.manual_seed(0)
    unet = make_unet(num_class_embeds=10)
    timesteps, labels = list(range(0, 1000, 100)), torch.arange(10).repeat_interleave(2)
    student = quantize(unet, QuantConfig(rank=2, reconstruction=True), timesteps)
    seen = []
    student.unet.class_embedding.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    calibrate(student, {t: torch.randn(20, 1, 8, 8) for t in timesteps}, class_labels=labels)
    assert len(seen[-1]) == 8 * 20
    assert all(seen[-1].bincount(minlength=10) == 16)


def test_channels_last_is_the_same_network():
    states = {900: torch.randn(16, 1, 8, 8)}
    students = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        unet = make_unet().to(memory_format=memory_format)
        students.append(quantize(unet, QuantConfig(rank=2, reconstruction=True), [900]))
        calibrate(students[-1], states)
    one, other = (student.state_dict() for student in students)
    for name, x in one.items():
        torch.testing.assert_close(other[name], x, rtol=1e-4, atol=1e-5)
