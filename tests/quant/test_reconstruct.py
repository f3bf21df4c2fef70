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
from quant.reconstruct import DAMPING, reconstruct

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


def round_in_turn(weight, rows, scale, codes):
    """One row of weights: each column in turn is rounded, and least squares finds all that are still free anew."""
    target, weight = rows @ weight, weight.copy()
    for column in range(len(weight)):
        code = to_codes(torch.tensor([weight[column]]).float(), scale, torch.zeros(1), codes)
        weight[column] = code.item() * scale.item()
        if column + 1 < len(weight):
            left = target - rows[:, : column + 1] @ weight[: column + 1]
            weight[column + 1 :] = np.linalg.lstsq(rows[:, column + 1 :], left, rcond=None)[0]
    return weight


@pytest.mark.parametrize("bits", [8, 4, 2, 1.58, 1])
def test_weights_are_those_of_repeated_least_squares(bits):
    layer = make_layer(bits)
    before = layer.weight.detach().double().numpy().copy()
    exact, real = make_inputs(layer, count=40)
    target = layer.apply_weight(exact, layer.weight).detach().flatten(0, -2).double().numpy()
    reconstructed(layer, exact, real)
    rows = layer.act_quantizer(torch.cat([exact, real])).chunk(2)[1].detach().flatten(0, -2).double().numpy()
    centred, target_centred = rows - rows.mean(0), target - target.mean(0)
    # Damping, as rows of the system: every weight is pulled to what it was.
    pull = np.sqrt(DAMPING * np.square(centred).sum(0).mean()) * np.eye(rows.shape[1])
    system = np.vstack([centred, pull])
    answers = np.vstack([target_centred, pull @ before.T])
    best = np.linalg.lstsq(system, answers, rcond=None)[0].T
    found = layer.quantized_weight().detach().double().numpy()
    for row, scale, expected in zip(found, layer.weight_quantizer.scale.detach(), best, strict=True):
        codes = layer.weight_quantizer.codes
        np.testing.assert_allclose(row, round_in_turn(expected, system, scale[None], codes), atol=1e-6)
    np.testing.assert_allclose(layer.bias.detach(), target.mean(0) - rows.mean(0) @ found.T, atol=1e-4)


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
    constant = torch.full((4, 3, 12), 0.5)
    answer = reconstructed(layer, constant, constant + 0.1)
    torch.testing.assert_close(layer.weight, before)
    torch.testing.assert_close(*answer.chunk(2))  # the bias takes the whole difference


def test_a_calibrated_student_is_nearer_to_its_teacher():
    torch.manual_seed(0)
    unet = UNet2DModel(
        8, 1, 1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    x, errors = torch.randn(256, 1, 8, 8), []
    states = dict(zip([900, 300], torch.randn(2, 64, 1, 8, 8), strict=True))
    for reconstruction in (True, False):
        student = quantize(unet, QuantConfig(4, 8, rank=2, reconstruction=reconstruction), [900, 300])
        calibrate(student, states)
        errors.append((freeze(student)(x, 300).sample - unet(x, 300).sample).square().mean().item())
    assert errors[0] < 0.5 * errors[1]
