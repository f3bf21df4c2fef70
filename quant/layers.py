"""Quantized convolutions and linear layers with QALoRA adapters (EfficientDM, eq. 6)."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.quantizers import ActivationQuantizer, Clock, WeightQuantizer


class QuantLayer(nn.Module):
    """Quantized layer with adapters: y = Q(x; s_x) · Q(W0 + B·A; s_w) + bias.

    The adapters are added to W0 before quantization, so that a single low-bit weight remains after training. B is
    initialised to zero: a new layer computes the same as plain quantization of W0. W0 is frozen, and so is the bias
    unless training enables its gradient. A layer without a bias gets one of zeros, because calibration uses it to
    correct the mean of the output.

    `freeze` ends training: it replaces W0 and the adapters by codes.

    Attributes:
        weight: W0, of `weight_shape`.
        lora_a: (rank, c_in·k·k), Kaiming-uniform. For a convolution: the k×k convolution to `rank` channels.
        lora_b: (c_out, rank). For a convolution: the 1×1 convolution after it.
        codes: int8, of `weight_shape`; None before `freeze`.
    """

    codes: Tensor | None
    groups = 1

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        weight_bits: float,
        act_bits: int,
        rank: int,
        clock: Clock,
        per_step: bool = True,
    ):
        super().__init__()
        weight = layer.weight.detach().clone(memory_format=torch.contiguous_format)  # the network may be channels-last
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = self.weight.new_zeros(len(self.weight)) if layer.bias is None else layer.bias.detach().clone()
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.weight_shape = self.weight.shape
        channels, fan_in = self.weight.flatten(1).shape
        self.lora_a = nn.Parameter(torch.empty(rank, fan_in))
        self.lora_b = nn.Parameter(torch.zeros(channels, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.weight_quantizer = WeightQuantizer(weight_bits, channels)
        self.act_quantizer = ActivationQuantizer(act_bits, clock, per_step)
        self.register_buffer("codes", None)
        self.shared_weight: Tensor | None = None

    def merged_weight(self) -> Tensor:
        """Return W0 + B·A."""
        return self.weight + (self.lora_b @ self.lora_a).view_as(self.weight)

    def quantized_weight(self) -> Tensor:
        """Return Q(W0 + B·A; s_w): merge the adapters, then quantize."""
        if self.codes is not None:
            return self.weight_quantizer.dequantize(self.codes)
        return self.weight_quantizer(self.merged_weight())

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the weight and the adapters by the codes of the merged weight."""
        if self.codes is not None:
            return
        self.codes = self.weight_quantizer.quantize(self.merged_weight())
        del self.weight, self.lora_a, self.lora_b
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantized_weight() if self.shared_weight is None else self.shared_weight
        return self.apply_weight(self.act_quantizer(x), weight)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the layer's output for x with `weight` in place of its own; the bias is added."""
        raise NotImplementedError

    def inputs_of(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the inputs (M, c_in·k·k) of the outputs at `places` (M,), flat indices of all but the channel axis."""
        raise NotImplementedError


class QuantConv2d(QuantLayer):
    """Quantized convolution: x float (N, c_in, H, W) → (N, c_out, H', W')."""

    def __init__(self, layer: nn.Conv2d, *options: Any):
        if layer.padding_mode != "zeros":
            raise ValueError(f'only padding_mode "zeros" is supported, not "{layer.padding_mode}"')
        super().__init__(layer, *options)
        self.geometry: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self.groups = layer.groups

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, *self.geometry)

    def inputs_of(self, x: Tensor, places: Tensor) -> Tensor:
        stride, padding, dilation, _ = self.geometry
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        for i in (0, 1):
            x = x.unfold(2 + i, dilation[i] * (self.weight_shape[2 + i] - 1) + 1, stride[i])
        patches = x[..., :: dilation[0], :: dilation[1]]  # (N, c_in, H', W', k, k), a view
        n, row, column = torch.unravel_index(places, (len(x), *patches.shape[2:4]))
        return patches[n, :, row, column].flatten(1)


class QuantLinear(QuantLayer):
    """Quantized linear layer: x float (N, …, c_in) → (N, …, c_out)."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def inputs_of(self, x: Tensor, places: Tensor) -> Tensor:
        return x.flatten(0, -2)[places]


class SkipConv2d(nn.Module):
    """Convolution over a concatenation [hidden, skip], computed as the sum of one convolution per half.

    The result is the same, but each half can be quantized separately. x float (N, c_hidden + c_skip, H, W) →
    (N, c_out, H', W').
    """

    def __init__(self, conv: nn.Conv2d, hidden_channels: int):
        super().__init__()
        self.channels = (hidden_channels, conv.in_channels - hidden_channels)
        self.hidden, self.skip = (copy.deepcopy(conv) for _ in self.channels)
        halves = conv.weight.detach().split(self.channels, dim=1)
        self.hidden.weight, self.skip.weight = (nn.Parameter(half.clone()) for half in halves)
        self.skip.bias = None

    def forward(self, x: Tensor) -> Tensor:
        hidden, skip = x.split(self.channels, dim=1)
        return self.hidden(hidden) + self.skip(skip)
