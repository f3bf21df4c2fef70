"""Layers and normalisations of a frozen student in the memory layout of the core.

The core gets addresses. The memory of a tensor may move while the tensor exists (by `.data = …` or `share_memory_()`,
which is called on every tensor sent to another process), so each address is that of a NumPy array that owns its memory.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import Downsample2D
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from quant.integer import binding
from quant.integer.binding import LANES
from quant.layers import QuantConv2d, QuantLayer

LARGEST_DIGIT = 255  # the core multiplies codes of 8 bits

# Modules that become a `binding.NormStruct`.
NORMS = (nn.GroupNorm, AdaGroupNorm)


def owned(x: Tensor) -> np.ndarray:
    """Return a read-only copy of x that owns its memory: nothing else can move, free or change it."""
    array = np.array(x.detach().cpu().numpy(), order="C")
    array.flags.writeable = False
    return array


def pad_to_lanes(channels: int) -> int:
    """Return `channels` rounded up to a multiple of 16."""
    return math.ceil(channels / LANES) * LANES


class IntegerLayer:
    """Frozen layer in the memory layout of the core; a linear layer is a 1×1 convolution.

    Attributes:
        weight: int8 (channels / 16, height, width, input channels / 4, 16, 4), padded with zeros.
        weight_sum: int32 (channels,), the sum of the weights of each output channel.
        scales, bias: float32 (channels,), the step sizes of the weight, and the bias.
        padding: top, left, bottom, right.
        first_channel: index of its first output channel among those of all layers, each padded to a multiple of 16.
        shift: lowest of the 8 bits that it reads from each input code, 0 or 8.
        high: the same layer for the upper 8 of 16 bits; None if input codes have at most 8 bits.
    """

    def __init__(self, number: int, name: str, layer: QuantLayer, pad_end: int, first_channel: int):
        if layer.codes is None:
            raise ValueError("only a frozen student runs on integers: call quant.freeze first")
        codes: Tensor = layer.codes if isinstance(layer, QuantConv2d) else layer.codes[:, :, None, None]
        geometry = layer.geometry if isinstance(layer, QuantConv2d) else (1, 0, 1, 1)
        stride, padding, dilation, groups = geometry
        if isinstance(padding, str):
            raise ValueError(f'{name}: padding "{padding}" is not supported on integers, only numbers')
        self.number, self.name, self.first_channel = number, name, first_channel
        self.shift = 0
        self.high: IntegerLayer | None = None
        self.stride, self.dilation, (y, x) = (_pair(value) for value in (stride, dilation, padding))
        self.padding = [y, x, y + pad_end, x + pad_end]
        self.weight_sum = owned(codes.flatten(1).sum(1, dtype=torch.int32))
        codes = dense(codes, groups)
        self.out_channels, self.in_channels, *self.kernel = codes.shape
        largest_digit = min(layer.act_quantizer.qmax, LARGEST_DIGIT)
        self.largest_product = largest_digit * -layer.weight_quantizer.qmin
        # Twice, because the correction for the zero point may be as large. With an offset of 128, codes reach -128.
        largest = max(largest_digit, 128) * -layer.weight_quantizer.qmin
        if 2 * largest * codes[0].numel() >= 1 << 31:
            raise ValueError(f"{name}: sums of {codes[0].numel():,} products are too large for integers of 32 bits")
        full = F.pad(codes, (0, 0, 0, 0, 0, -self.in_channels % 4, 0, -self.out_channels % LANES))
        pattern = "(o sixteen) (c four) h w -> o h w c sixteen four"
        self.weight = owned(rearrange(full, pattern, sixteen=LANES, four=4))
        self.scales, self.bias = owned(layer.weight_quantizer.scale), owned(layer.bias)

    def of_high_digits(self, number: int, first_channel: int) -> "IntegerLayer":
        """Create `high` and return it. With q = 256 · high + low, and the zero point z split in the same way,

            sum w · (q - z) = 256 · sum w · (high - z_high) + sum w · (low - z_low),

        so `high` has the same weights. Its bias is zero, because the bias is added only once.
        """
        self.high = copy.copy(self)
        self.high.number, self.high.first_channel, self.high.shift = number, first_channel, 8
        self.high.bias = np.zeros_like(self.bias)
        return self.high

    @property
    def channels(self) -> slice:
        """Slice of its output channels among those of all layers."""
        return slice(self.first_channel, self.first_channel + self.out_channels)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the output for an input of this height and width."""
        top, left, bottom, right = self.padding
        return (
            (height + top + bottom - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1,
            (width + left + right - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1,
        )

    def structure(self) -> binding.LayerStruct:
        """Return the structure that the core reads; `self` must outlive it."""
        sizes = (self.in_channels, self.out_channels, *self.kernel, *self.stride, *self.dilation, *self.padding)
        return binding.LayerStruct(*sizes, self.largest_product, self.first_channel, self.weight.ctypes.data)


def dense(codes: Tensor, groups: int) -> Tensor:
    """Expand the weight (c_out, c_in / groups, …) of a grouped convolution to (c_out, c_in, …), filled with zeros."""
    if groups == 1:
        return codes
    rows = codes.unflatten(0, (groups, -1))
    full = codes.new_zeros(groups, rows.shape[1], groups, *codes.shape[1:])
    for group in range(groups):
        full[group, :, group] = rows[group]
    return full.flatten(0, 1).flatten(1, 2)


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value] * 2 if isinstance(value, int) else list(value)


class Layers(dict[QuantLayer, IntegerLayer]):
    """Integer layer of each layer of a student, in the order of definition, and the student's normalisations.

    Attributes:
        numbered: all integer layers by number, including those for high digits.
        channels: total number of output channels of these, each layer padded to a multiple of 16.
        norms: number of each normalisation.
        norm_numbers: weight and bias of each normalisation, float32 (channels,).
        table, norm_table: structures that the core reads.
    """

    def __init__(self, named: list[tuple[str, QuantLayer]], modules: list[nn.Module]):
        super().__init__()
        # With padding = 0, diffusers' Downsample2D pads at the bottom and at the right before the convolution.
        filled_up = {m.conv for m in modules if isinstance(m, Downsample2D) and m.use_conv and m.padding == 0}
        self.numbered: list[IntegerLayer] = []
        self.channels = 0
        for name, layer in named:
            low = self[layer] = IntegerLayer(len(self.numbered), name, layer, int(layer in filled_up), self.channels)
            self._append(low)
            if layer.act_quantizer.qmax > LARGEST_DIGIT:
                self._append(low.of_high_digits(len(self.numbered), self.channels))
        self.table = (binding.LayerStruct * len(self.numbered))(*(layer.structure() for layer in self.numbered))
        norms: list[Any] = [module for module in modules if isinstance(module, NORMS)]
        self.norms: dict[nn.Module, int] = {norm: number for number, norm in enumerate(norms)}
        self.norm_numbers = [_weight_and_bias(norm) for norm in norms]
        self.norm_table = (binding.NormStruct * len(norms))(
            *(
                binding.NormStruct(norm.num_groups, norm.eps, weight.ctypes.data, bias.ctypes.data)
                for norm, (weight, bias) in zip(norms, self.norm_numbers, strict=True)
            )
        )

    def _append(self, layer: IntegerLayer) -> None:
        self.numbered.append(layer)
        self.channels += pad_to_lanes(layer.out_channels)


def _weight_and_bias(norm: Any) -> list[np.ndarray]:
    if isinstance(norm, AdaGroupNorm):  # the time embedding gives scale and shift
        channels = norm.linear.bias.numel() // 2
        return [np.ones(channels, np.float32), np.zeros(channels, np.float32)]
    return [owned(norm.weight), owned(norm.bias)]
