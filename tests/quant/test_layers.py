import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quant.layers import QuantConv2d, QuantLinear
from quant.quantizers import Clock

CONV = nn.Conv2d(6, 8, 3, stride=2, padding=1)
CASES = [(QuantConv2d, CONV, (5, 6, 9, 9)), (QuantLinear, nn.Linear(6, 8), (5, 4, 6))]


def make_layer(kind, float_layer):
    torch.manual_seed(0)
    clock = Clock([10])
    layer = kind(float_layer, 4, 8, 3, clock)
    layer.weight_quantizer.initialise(layer.weight)
    with torch.no_grad():
        layer.act_quantizer.scale.fill_(0.03)
        layer.act_quantizer.zero_point.fill_(128)
    clock.set(torch.tensor([10]))
    return layer


@pytest.mark.parametrize(("kind", "float_layer", "shape"), CASES)
def test_with_b_at_zero_the_layer_is_plain_quantization(kind, float_layer, shape):
    layer, x = make_layer(kind, float_layer), torch.randn(shape)
    scale = layer.weight_quantizer.scale.detach()
    zeros = torch.zeros(8, dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(float_layer.weight.detach(), scale, zeros, 0, -8, 7)
    x_hat = torch.fake_quantize_per_tensor_affine(x, 0.03, 128, 0, 255)
    expected = layer.apply_weight(x_hat, weight)
    assert (expected - float_layer(x)).abs().max() > 0
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_the_product_is_the_two_convolution_form():
    """(W0 + B·A) ∗ x = W0 ∗ x + B₁ₓ₁ ∗ (A ∗ x), for a convolution with stride and padding."""
    layer, x = make_layer(QuantConv2d, CONV), torch.randn(5, 6, 9, 9)
    nn.init.normal_(layer.lora_b)
    a = layer.lora_a.view(3, 6, 3, 3)
    two = CONV(x) + F.conv2d(F.conv2d(x, a, None, 2, 1), layer.lora_b.view(8, 3, 1, 1))
    torch.testing.assert_close(layer.apply_weight(x, layer.merged_weight()), two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "float_layer", "shape"), CASES)
def test_the_sum_is_quantized_not_its_parts(kind, float_layer, shape):
    layer = make_layer(kind, float_layer)
    nn.init.normal_(layer.lora_b, std=0.1)
    weight = layer.quantized_weight().flatten(1)
    codes = weight / layer.weight_quantizer.scale[:, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert set(codes.round().int().unique().tolist()) <= set(range(-8, 8))


def test_padding_other_than_zeros_is_refused():
    with pytest.raises(ValueError, match="padding_mode"):
        make_layer(QuantConv2d, nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
