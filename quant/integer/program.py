"""Following a UNet into a program: a line per layer, in the order of execution.

Whatever in diffusers' blocks changes what they compute is either honoured here or refused by name.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UpBlock2D,
)
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from quant.integer import core
from quant.integer.core import ATTENTION, LANES, QUANTIZE, SILU
from quant.layers import QuantConv2d, QuantLayer, SkipConv2d


def filled(channels: int) -> int:
    """`channels` up to the next multiple of 16."""
    return math.ceil(channels / LANES) * LANES


class IntegerLayer:
    """A frozen layer as the core reads it; a linear layer is a convolution of 1×1.

    Attributes:
        weight: int8 (channels / 16, height, width, input channels / 4, 16, 4), filled up with zeros.
        weight_sum: int32 (channels,), of all weights of an output channel.
        scales, bias: float32 (channels,), the weights' step sizes, and the bias.
        padding: top, left, bottom, right.
        first_channel: where its output channels begin among those of all layers, each filled up to 16.
    """

    def __init__(self, number: int, name: str, layer: QuantLayer, pad_end: int, first_channel: int):
        if layer.codes is None:
            raise ValueError("only a frozen student runs on integers: call quant.freeze first")
        codes = layer.codes if isinstance(layer, QuantConv2d) else layer.codes[:, :, None, None]
        geometry = layer.geometry if isinstance(layer, QuantConv2d) else (1, 0, 1, 1)
        stride, padding, dilation, groups = geometry
        if isinstance(padding, str):
            raise ValueError(f'{name}: padding "{padding}" is not supported on integers, only numbers')
        if groups != 1:
            raise ValueError(f"{name}: {groups} groups are not supported on integers, only 1")
        self.number, self.name, self.layer, self.first_channel = number, name, layer, first_channel
        self.stride, self.dilation, (y, x) = (_pair(value) for value in (stride, dilation, padding))
        self.padding = [y, x, y + pad_end, x + pad_end]
        self.out_channels, self.in_channels, *self.kernel = codes.shape
        self.largest_product = layer.act_quantizer.qmax * -layer.weight_quantizer.qmin
        if 2 * self.largest_product * codes[0].numel() >= 1 << 31:  # twice, for the zero point takes as much
            raise ValueError(f"{name}: sums of {codes[0].numel():,} products are too large for integers of 32 bits")
        full = F.pad(codes, (0, 0, 0, 0, 0, -self.in_channels % 4, 0, -self.out_channels % LANES))
        pattern = "(o sixteen) (c four) h w -> o h w c sixteen four"
        self.weight = rearrange(full, pattern, sixteen=LANES, four=4).contiguous().numpy()
        self.weight_sum = codes.flatten(1).sum(1, dtype=torch.int32).numpy()
        self.scales, self.bias = (x.detach().numpy() for x in (layer.weight_quantizer.scale, layer.bias))

    @property
    def channels(self) -> slice:
        """Its output channels among those of all layers."""
        return slice(self.first_channel, self.first_channel + self.out_channels)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what the layer makes of an image."""
        top, left, bottom, right = self.padding
        return (
            (height + top + bottom - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1,
            (width + left + right - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1,
        )

    def structure(self) -> core.Layer:
        """For the core; `self` must outlive it."""
        sizes = (self.in_channels, self.out_channels, *self.kernel, *self.stride, *self.dilation, *self.padding)
        return core.Layer(*sizes, self.largest_product, self.first_channel, self.weight.ctypes.data)


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value] * 2 if isinstance(value, int) else list(value)


class Layers(dict[QuantLayer, IntegerLayer]):
    """The layers of a student with their integer form, and its normalisations, in the order of their definition.

    Attributes:
        channels: output channels of all layers together, each filled up to 16.
        table, norm_table: what the core reads.
    """

    def __init__(self, named: list[tuple[str, QuantLayer]], modules: list[nn.Module]):
        super().__init__()
        # Without padding of its own, diffusers' downsampling fills up below and to the right.
        filled_up = {m.conv for m in modules if isinstance(m, Downsample2D) and m.use_conv and m.padding == 0}
        self.channels = 0
        for number, (name, layer) in enumerate(named):
            self[layer] = IntegerLayer(number, name, layer, int(layer in filled_up), self.channels)
            self.channels += filled(self[layer].out_channels)
        self.table = (core.Layer * len(self))(*(layer.structure() for layer in self.values()))
        norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
        self.norms = {norm: number for number, norm in enumerate(norms)}
        self._numbers = [[p.detach().numpy() for p in (norm.weight, norm.bias)] for norm in norms]
        self.norm_table = (core.Norm * len(norms))(
            *(
                core.Norm(norm.num_groups, norm.eps, weight.ctypes.data, bias.ctypes.data)
                for norm, (weight, bias) in zip(norms, self._numbers, strict=True)
            )
        )


@dataclass
class Line:
    """A line of `core.Line`, its states still numbered: -1 is nothing as skip or residual."""

    kind: int
    layer: int
    norm: int
    source: int
    skip: int
    residual: int
    target: int
    factor: int
    heads: int


class Program:
    """Lines over numbered states, the first of which is given.

    Attributes:
        lines: in the order of execution.
        shapes: of each state, channels, height, width.
        offsets: of each state in the `memory` floats of a thread: no two that are needed at the same time overlap.
        structure: what the core reads.
    """

    def __init__(self, layers: Layers, shape: tuple[int, int, int]):
        self.lines: list[Line] = []
        self.shapes = [shape]
        self._layers = layers

    def emit(
        self, layer: Any, source: int, kind: int = QUANTIZE, norm: Any = None, skip: int = -1, residual: int = -1,
        factor: int = 1, heads: int = 0,
    ) -> int:  # fmt: skip
        """Append a line; the number of its target."""
        integer, target = self._layers[layer], len(self.shapes)
        channels, height, width = self.shapes[source]
        channels = channels // (3 if kind == ATTENTION else 1) + (self.shapes[skip][0] if skip >= 0 else 0)
        if channels != integer.in_channels:
            raise ValueError(f"{integer.name}: {channels} channels meet a layer of {integer.in_channels}")
        if skip >= 0 and self.shapes[skip][1:] != (height, width):
            raise ValueError(f"{integer.name}: a skip of {self.shapes[skip][1:]} pixels meets {(height, width)}")
        number = -1 if norm is None else self._layers.norms[norm]
        self.lines.append(Line(kind, integer.number, number, source, skip, residual, target, factor, heads))
        shape = (integer.out_channels, *integer.output_size(height * factor, width * factor))
        if min(shape) < 1 or (residual >= 0 and self.shapes[residual] != shape):
            raise ValueError(f"{integer.name}: images of {self.shapes[0]} are too small or do not divide")
        self.shapes.append(shape)
        return target

    def place(self, results: list[int]) -> "Program":
        """Give every state its place in memory; `results` stay in theirs to the end."""
        last_use = dict.fromkeys(results, len(self.lines))
        for at, line in reversed(list(enumerate(self.lines))):
            for state in (line.source, line.skip, line.residual):
                last_use.setdefault(state, at)
        sizes = [filled(channels) * height * width for channels, height, width in self.shapes]
        self.offsets, live, self.memory = {-1: -1, 0: 0}, {0}, sizes[0]
        for at, line in enumerate(self.lines):
            start = 0
            for other in sorted(live, key=self.offsets.__getitem__):
                if start + sizes[line.target] <= self.offsets[other]:
                    break
                start = max(start, self.offsets[other] + sizes[other])
            self.offsets[line.target] = start
            self.memory = max(self.memory, start + sizes[line.target])
            live = {state for state in live | {line.target} if last_use.get(state, at) > at}
        placed = (core.Line * len(self.lines))(*map(self._placed, self.lines))
        first, last = self.shapes[0], self.shapes[results[-1]]
        ends = (0, first[0], first[1] * first[2], self.offsets[results[-1]], last[0], last[1] * last[2])
        self.structure = core.Program(
            *ends, len(placed), placed, self._layers.table, self._layers.norm_table, self.memory
        )
        return self

    def _placed(self, line: Line) -> core.Line:
        channels, height, width = self.shapes[line.source]
        skip_channels = 0 if line.skip < 0 else self.shapes[line.skip][0]
        source, skip, residual, target = (
            self.offsets[state] for state in (line.source, line.skip, line.residual, line.target)
        )
        return core.Line(
            line.kind, line.layer, line.norm, source, channels, skip, skip_channels, residual, target,
            height, width, line.factor, line.heads,
        )  # fmt: skip


def follow_unet(unet: UNet2DModel, layers: Layers, height: int, width: int) -> Program:
    """From the sample (in_channels, height, width) to ε.

    Raises:
        ValueError: images of that size do not fit the network.
    """
    parts: Any = unet
    program = Program(layers, (parts.config.in_channels, height, width))

    def residual(block: Any, x: int, skip: int = -1) -> int:
        hidden = program.emit(block.conv1, x, SILU, block.norm1, skip)
        shortcut = block.conv_shortcut
        if isinstance(shortcut, SkipConv2d):
            x = program.emit(shortcut.skip, skip, residual=program.emit(shortcut.hidden, x))
        elif shortcut is not None:
            x = program.emit(shortcut, x, skip=skip)
        return program.emit(block.conv2, hidden, SILU, block.norm2, residual=x)

    def attend(block: Any, x: int) -> int:
        if block is None:
            return x
        qkv = program.emit(block.to_qkv, x, norm=block.group_norm)
        return program.emit(block.to_out[0], qkv, ATTENTION, residual=x, heads=block.heads)

    x = program.emit(parts.conv_in, 0)
    skips = [x]
    for block in parts.down_blocks:
        for resnet, attention in _pairs(block):
            x = attend(attention, residual(resnet, x))
            skips.append(x)
        for sampler in block.downsamplers or []:
            x = program.emit(sampler.conv, x)
            skips.append(x)
    if parts.mid_block is not None:
        first, *rest = parts.mid_block.resnets
        x = residual(first, x)
        for resnet, attention in zip(rest, parts.mid_block.attentions, strict=True):
            x = residual(resnet, attend(attention, x))
    for block in parts.up_blocks:
        for resnet, attention in _pairs(block):
            x = attend(attention, residual(resnet, x, skips.pop()))
        for sampler in block.upsamplers or []:
            x = program.emit(sampler.conv, x, factor=2)
    return program.place([program.emit(parts.conv_out, x, SILU, parts.conv_norm_out)])


def follow_time_embedding(unet: UNet2DModel, layers: Layers) -> tuple[Program, dict[QuantLayer, int]]:
    """From the sinusoids of a timestep to what it adds to a convolution: a program, and the state for each of them."""
    parts: Any = unet
    program = Program(layers, (parts.time_proj.num_channels, 1, 1))
    embedding = program.emit(parts.time_embedding.linear_2, program.emit(parts.time_embedding.linear_1, 0), SILU)
    added = {
        block.conv1: program.emit(block.time_emb_proj, embedding, SILU)
        for block in unet.modules()
        if isinstance(block, ResnetBlock2D)
    }
    return program.place(list(added.values())), added


def _pairs(block: Any) -> list[tuple[ResnetBlock2D, Attention | None]]:
    """The residual blocks of an up- or down-sampling block, each with the attention behind it."""
    return list(zip(block.resnets, getattr(block, "attentions", [None] * len(block.resnets)), strict=True))


def refuse_unsupported(unet: UNet2DModel) -> None:
    """ValueError naming the first part of `unet` that a program does not follow."""

    def require(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise ValueError(f"{name}: {what} is not supported on integers")

    options: Any = unet.config
    parts: Any = unet
    require(not options.center_input_sample, "unet", "center_input_sample")
    require(options.time_embedding_type != "fourier", "unet", 'time_embedding_type "fourier"')
    require(isinstance(parts.time_proj, Timesteps), "time_proj", f"a {type(parts.time_proj).__name__}")
    act = parts.time_embedding.act
    require(isinstance(act, nn.SiLU), "time_embedding", f"a {type(act).__name__}")
    require(unet.class_embedding is None, "unet", "class conditioning")
    blocks = {"down_blocks": (DownBlock2D, AttnDownBlock2D), "up_blocks": (UpBlock2D, AttnUpBlock2D)}
    for place, kinds in blocks.items():
        for number, block in enumerate(getattr(unet, place)):
            require(type(block) in kinds, f"{place}.{number}", f"a {type(block).__name__}")
    require(isinstance(unet.mid_block, UNetMidBlock2D | None), "mid_block", f"a {type(unet.mid_block).__name__}")
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            require(
                module.time_embedding_norm == "default", name, f'time_embedding_norm "{module.time_embedding_norm}"'
            )
            require(not module.up and not module.down, name, "resampling inside a residual block")
            require(module.output_scale_factor == 1, name, f"output_scale_factor {module.output_scale_factor}")
            require(isinstance(module.nonlinearity, nn.SiLU), name, f"a {type(module.nonlinearity).__name__}")
        elif isinstance(module, Attention):
            require(module.residual_connection, name, "attention without its residual connection")
            require(module.rescale_output_factor == 1, name, f"rescale_output_factor {module.rescale_output_factor}")
            require(module.group_norm is not None, name, "attention without group_norm")
            require(module.spatial_norm is None, name, "spatial_norm")
            require(module.norm_q is None and module.norm_k is None, name, "a norm of queries or keys")
        elif isinstance(module, Downsample2D | Upsample2D):
            require(module.use_conv and module.norm is None, name, "resampling without a convolution, or with a norm")
        if isinstance(module, Upsample2D):
            require(module.interpolate and not module.use_conv_transpose, name, "a transposed convolution")
