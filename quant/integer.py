"""A frozen student on integers: `integer = to_integer(student)`, the same denoiser.

The UNet is followed by its structure into a program, one instruction per layer: turn a state into codes, multiply
them by the codes of the weights, add. The step size and the zero point of the running timestep are arguments. Whatever
in diffusers' blocks changes what they compute is either honoured here or refused by name.

`integer.cpp` runs the program, compiled on first use, on processors with AVX-512 VNNI. Elsewhere, or without a C++
compiler, the same program runs line by line, with oneDNN's integer operators, which PyTorch carries, and PyTorch's own
between them.
"""

import copy
import hashlib
import logging
import os
import shutil
import sys
import threading
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UpBlock2D,
)
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from quant import functional
from quant.convert import QuantizedUNet
from quant.layers import QuantConv2d, QuantLayer, SkipConv2d
from quant.quantizers import ActivationQuantizer

SOURCE = Path(__file__).with_name("integer.cpp")
MAX_STEPS = 1000  # timesteps whose step sizes and biases are kept
_PREPARING = threading.Lock()  # threads may share a model, but not the clock that a timestep's step sizes are read by


class Instruction(NamedTuple):
    """Codes of a state, through a layer: target = layer(codes(source, skip)) + residual.

    States are numbered; -1 is the sample as a source, the result as a target, nothing as skip or residual.
    """

    kind: int
    """How the codes are made: one of `QUANTIZE`, `NORM`, `NORM_SILU`, `ATTENTION`."""
    layer: int
    norm: int
    source: int
    source_channels: int
    skip: int
    skip_channels: int
    residual: int
    target: int
    height: int
    """Of the source."""
    width: int
    factor: int
    """Codes are enlarged by it, by nearest neighbour."""
    heads: int


QUANTIZE, NORM, NORM_SILU, ATTENTION = range(4)


class Quantizer(NamedTuple):
    """One layer's input at one timestep: codes are round(x / scale) + zero_point in 0 … qmax."""

    scale: float
    zero_point: int
    qmax: int


class Moment(NamedTuple):
    """What the layers need to know of a timestep, in their order."""

    quantizers: list[Quantizer]
    biases: list[Tensor]


@cache
def fused_operator() -> Any:
    """The operator of `integer.cpp`, compiled the first time on a machine; None where it cannot run."""
    if not torch.cpu.get_capabilities().get("avx512_vnni", False):
        return None
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        warnings.warn("no C++ compiler: the integer layers run one by one, slower", stacklevel=2)
        return None
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA, which is not needed
    from torch.utils.cpp_extension import load

    # A build is for this processor, this torch and this source: whatever else shares the cache makes its own.
    flags = ["-O3", "-march=native", "-fopenmp", "-Wno-psabi"]
    build = (sorted(torch.cpu.get_capabilities().items()), torch.__version__, flags, SOURCE.read_text())
    name = f"efficientdm_{hashlib.sha256(repr(build).encode()).hexdigest()[:12]}"
    # `ninja` lies beside the interpreter, which need not be on the path.
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    try:
        load(name, [str(SOURCE)], extra_cflags=flags, is_python_module=False)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"{SOURCE.name}: {reason}; the integer layers run one by one, slower", stacklevel=2)
        return None
    return torch.ops.efficientdm.run


@cache
def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")


@cache
def sums_are_exact() -> bool:
    """Whether this processor adds products of 8-bit codes in 32 bits (VNNI); others add pairs in 16, which saturate."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


class IntegerLayer:
    """A convolution from codes to float32; a linear layer is a convolution of 1×1.

    Attributes:
        way: "VNNI", a line of `integer.cpp`'s program; "oneDNN"; or "exact float": on the integer values of the codes,
            in a float type that holds every sum.
        padding: top, left, bottom, right.
    """

    def __init__(self, number: int, name: str, layer: QuantLayer, pad_end: int, fused: bool):
        if layer.codes is None:
            raise ValueError("only a frozen student runs on integers: call quant.freeze first")
        codes = layer.codes if isinstance(layer, QuantConv2d) else layer.codes[:, :, None, None]
        geometry = layer.geometry if isinstance(layer, QuantConv2d) else (1, 0, 1, 1)
        stride, padding, dilation, groups = geometry
        self.groups: int = groups
        if isinstance(padding, str):
            raise ValueError(f'{name}: padding "{padding}" is not supported on integers, only numbers')
        self.number, self.name = number, name
        self.stride, self.dilation, (y, x) = (_pair(value) for value in (stride, dilation, padding))
        self.padding = [y, x, y + pad_end, x + pad_end]
        self.in_channels, self.kernel = codes.shape[1] * self.groups, codes.shape[2:]
        self.out_channels = len(codes)
        self.scales = layer.weight_quantizer.scale.detach()
        largest = layer.act_quantizer.qmax * -layer.weight_quantizer.qmin
        if fused:
            self.way = "VNNI"
            filled = F.pad(codes, (0, 0, 0, 0, 0, -codes.shape[1] % 4, 0, -codes.shape[0] % 16))
            pattern = "(o sixteen) (c four) h w -> o h w c sixteen four"
            self.weight = rearrange(filled, pattern, sixteen=16, four=4).contiguous()
            self.weight_sum = codes.flatten(1).sum(1, dtype=torch.int32)
        elif has_onednn() and (sums_are_exact() or 2 * largest < 1 << 15):
            self.way = "oneDNN"
            options = (self.stride, [y, x], self.dilation, self.groups)
            self.weight = torch.ops.onednn.qconv_prepack(codes, self.scales, 1.0, 1, *options, None)
            self.weight_zeros = torch.zeros_like(self.scales, dtype=torch.int8)
        else:
            self.way = "exact float"
            sums = largest * codes[0].numel()
            self.weight = codes.to(torch.float32 if sums < 1 << 24 else torch.float64)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what the layer makes of an image."""
        top, left, bottom, right = self.padding
        return (
            (height + top + bottom - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1,
            (width + left + right - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1,
        )

    def __call__(self, codes: Tensor, quantizer: Quantizer, bias: Tensor) -> Tensor:
        """codes uint8 (N, c_in, H, W) → float (N, c_out, H', W'), by oneDNN or in exact float."""
        scale, zero_point, _ = quantizer
        top, left, bottom, right = self.padding
        # Around the image lie codes of zero; the operators themselves pad with them on all sides alike.
        codes = F.pad(codes, (0, right - left, 0, bottom - top), value=zero_point)
        geometry = (self.stride, [top, left], self.dilation, self.groups)
        if self.way == "oneDNN":
            codes = codes.contiguous(memory_format=torch.channels_last)
            inputs = (codes, scale, zero_point, self.weight, self.scales, self.weight_zeros, bias)
            return torch.ops.onednn.qconv2d_pointwise(*inputs, *geometry, 1.0, 0, torch.float32, "none", [], "")
        sums = F.conv2d(codes.to(self.weight.dtype) - zero_point, self.weight, None, *geometry).float()
        return sums * (self.scales * scale)[:, None, None] + bias[:, None, None]


def _groups(layer: QuantLayer) -> int:
    return layer.geometry[3] if isinstance(layer, QuantConv2d) else 1


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value] * 2 if isinstance(value, int) else list(value)


# What a program refers to: the layers of the student with their integer form.
Layers = dict[QuantLayer, IntegerLayer]


class Program:
    """The layers of a UNet in their order, for images of one size. Built by following the UNet's structure.

    Attributes:
        instructions: in the order of execution.
        shapes: of each state, channels, height, width.
        last_used: for each instruction the states that no later one needs.
        placed: the instructions int64 (I, 13), states as offsets into the `memory` floats of a thread.
    """

    def __init__(self, unet: Any, layers: Layers, norms: list[nn.GroupNorm], height: int, width: int):
        self.instructions: list[Instruction] = []
        self.shapes: list[tuple[int, int, int]] = []
        self._layers = layers
        self._norms = {norm: number for number, norm in enumerate(norms)}
        self._sample = (unet.config.in_channels, height, width)
        x = self._emit(unet.conv_in, -1)
        skips = [x]
        for block in unet.down_blocks:
            for resnet, attention in _pairs(block):
                x = self._attend(attention, self._residual(resnet, x))
                skips.append(x)
            for sampler in block.downsamplers or []:
                x = self._emit(sampler.conv, x)
                skips.append(x)
        if unet.mid_block is not None:
            first, *rest = unet.mid_block.resnets
            x = self._residual(first, x)
            for resnet, attention in zip(rest, unet.mid_block.attentions, strict=True):
                x = self._residual(resnet, self._attend(attention, x))
        for block in unet.up_blocks:
            for resnet, attention in _pairs(block):
                x = self._attend(attention, self._residual(resnet, x, skips.pop()))
            for sampler in block.upsamplers or []:
                x = self._emit(sampler.conv, x, factor=2)
        self._emit(unet.conv_out, x, NORM_SILU, norm=unet.conv_norm_out)
        self.instructions[-1] = self.instructions[-1]._replace(target=-1)
        self.placed, self.memory = self._place()

    def _emit(
        self, layer: Any, source: int, kind: int = QUANTIZE, norm: Any = None, skip: int = -1, residual: int = -1,
        factor: int = 1, heads: int = 0,
    ) -> int:  # fmt: skip
        """Append an instruction; the number of its target."""
        integer, target = self._layers[layer], len(self.shapes)
        channels, height, width = self._sample if source < 0 else self.shapes[source]
        if skip >= 0 and self.shapes[skip][1:] != (height, width):
            raise ValueError(f"{integer.name}: a skip of {self.shapes[skip][1:]} pixels meets {(height, width)}")
        skip_channels = 0 if skip < 0 else self.shapes[skip][0]
        numbers = integer.number, -1 if norm is None else self._norms[norm]
        states = source, channels, skip, skip_channels, residual, target
        self.instructions.append(Instruction(kind, *numbers, *states, height, width, factor, heads))
        shape = (integer.out_channels, *integer.output_size(height * factor, width * factor))
        if min(shape) < 1 or (residual >= 0 and self.shapes[residual] != shape):
            raise ValueError(f"{integer.name}: images of {self._sample} are too small or do not divide")
        self.shapes.append(shape)
        return target

    def _residual(self, block: Any, x: int, skip: int = -1) -> int:
        hidden = self._emit(block.conv1, x, NORM_SILU, block.norm1, skip)
        shortcut = block.conv_shortcut
        if isinstance(shortcut, SkipConv2d):
            x = self._emit(shortcut.skip, skip, residual=self._emit(shortcut.hidden, x))
        elif shortcut is not None:
            x = self._emit(shortcut, x, skip=skip)
        return self._emit(block.conv2, hidden, NORM_SILU, block.norm2, residual=x)

    def _attend(self, block: Any, x: int) -> int:
        if block is None:
            return x
        qkv = self._emit(block.to_qkv, x, NORM, block.group_norm)
        return self._emit(block.to_out[0], qkv, ATTENTION, residual=x, heads=block.heads)

    def _place(self) -> tuple[Tensor, int]:
        """Where each state lies in a thread's memory: none overlaps another that is needed at the same time."""
        last_use = {
            state: at for at, line in enumerate(self.instructions) for state in (line.source, line.skip, line.residual)
        }
        last_use.pop(-1)
        self.last_used = [
            [state for state, use in last_use.items() if use == at] for at in range(len(self.instructions))
        ]
        offsets, live, memory = {-1: -1}, set[int](), 0
        size = {state: channels * height * width for state, (channels, height, width) in enumerate(self.shapes)}
        for at, line in enumerate(self.instructions):
            if line.target >= 0:
                start = 0
                for other in sorted(live, key=offsets.__getitem__):
                    if start + size[line.target] <= offsets[other]:
                        break
                    start = offsets[other] + size[other]
                offsets[line.target] = start
                memory = max(memory, start + size[line.target])
                live.add(line.target)
            live = {state for state in live if last_use.get(state, at) > at}
        placed = [
            line._replace(
                **{field: offsets[getattr(line, field)] for field in ("source", "skip", "residual", "target")}
            )
            for line in self.instructions
        ]
        return torch.tensor(placed), memory


class IntegerUNet(nn.Module):
    """A denoiser on integers: `eps = model(x_t, t).sample`, float32 in and out, on the CPU.

    An image depends neither on the batch nor on the number of threads, bit for bit, where `integer.cpp` runs. Threads
    may share a model.

    Attributes:
        programs: for each height and width that was met.
        moments: for each timestep that was met, at most `MAX_STEPS`.
        seconds: None, or float64 (2,): `integer.cpp` adds its threads' time for making codes and for their products.
    """

    def __init__(self, student: QuantizedUNet):
        super().__init__()
        _refuse_unsupported(student.unet)
        self.student, self.clock = student, student.clock
        modules = list(student.unet.modules())
        # What depends on t alone is computed once per timestep, by the student itself.
        once = {*student.unet.time_embedding.modules()}
        once |= {module.time_emb_proj for module in modules if isinstance(module, ResnetBlock2D)}
        # Without padding of its own, diffusers' downsampling fills up below and to the right.
        filled = {module.conv for module in modules if isinstance(module, Downsample2D) and module.padding == 0}
        named = [(name, layer) for name, layer in student.layers() if layer not in once]
        self._fused: Any = fused_operator() if all(_groups(layer) == 1 for _, layer in named) else None
        self.layers: Layers = {
            layer: IntegerLayer(number, name, layer, int(layer in filled), self.is_fused)
            for number, (name, layer) in enumerate(named)
        }
        shapes = [(i.in_channels, *i.stride, *i.dilation, *i.padding) for i in self.layers.values()]
        self._geometry = torch.tensor(shapes)
        self.norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
        self.seconds: Tensor | None = None
        self.programs: dict[tuple[int, int], Program] = {}
        self.moments: dict[float, Moment] = {}

    @property
    def is_fused(self) -> bool:
        """Whether `integer.cpp` runs the program."""
        return self._fused is not None

    # diffusers' pipelines ask a denoiser for these three.
    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def summary(self) -> str:
        """How many layers run which way, with the names of those that are no integer products."""
        ways = Counter(layer.way for layer in self.layers.values())
        rest = [layer.name for layer in self.layers.values() if layer.way == "exact float"]
        text = ", ".join(f"{count} layers by {way}" for way, count in ways.items())
        return f"{text} ({', '.join(rest)})" if 0 < len(rest) < len(self.layers) else text

    @torch.no_grad()
    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> Any:
        """Samples of one batch may have different timesteps; each timestep runs by itself."""
        t = torch.as_tensor(timestep).reshape(-1).expand(len(sample))
        eps = sample.new_empty(len(sample), self.config.out_channels, *sample.shape[2:])
        for value in t.unique().tolist():
            chosen = t == value
            eps[chosen] = self._denoise(sample[chosen], value)
        return UNet2DOutput(sample=eps) if return_dict else (eps,)

    def _denoise(self, x: Tensor, t: float) -> Tensor:
        channels, height, width = x.shape[1:]
        if channels != self.config.in_channels:
            raise ValueError(f"the sample must have {self.config.in_channels} channels, not {channels}")
        with _PREPARING:
            if (height, width) not in self.programs:
                self.programs[height, width] = Program(self.student.unet, self.layers, self.norms, height, width)
            if t not in self.moments:
                if len(self.moments) == MAX_STEPS:
                    self.moments.clear()
                self.moments[t] = self._moment(t)
            program, moment = self.programs[height, width], self.moments[t]
        x = x.contiguous(memory_format=torch.channels_last)
        return self._run_fused(program, moment, x) if self.is_fused else self._run_line_by_line(program, moment, x)

    def _moment(self, t: float) -> Moment:
        unet, timestep = self.student.unet, torch.tensor([t])
        biases = {layer: layer.bias.detach() for layer in self.layers}
        self.clock.set(timestep)
        try:
            quantizers = [_read_quantizer(layer.act_quantizer) for layer in self.layers]
            # The time embedding becomes a part of the bias of each block's first convolution.
            emb = unet.time_embedding(unet.time_proj(timestep))
            for resnet in (module for module in unet.modules() if isinstance(module, ResnetBlock2D)):
                biases[resnet.conv1] = biases[resnet.conv1] + resnet.time_emb_proj(resnet.nonlinearity(emb))[0]
        finally:
            self.clock.unset()
        return Moment(quantizers, list(biases.values()))

    def _run_fused(self, program: Program, moment: Moment, x: Tensor) -> Tensor:
        layers = list(self.layers.values())
        return self._fused(
            x,
            program.placed,
            [layer.weight for layer in layers],
            [layer.weight_sum for layer in layers],
            [layer.scales for layer in layers],
            self._geometry,
            [norm.weight for norm in self.norms],
            [norm.bias for norm in self.norms],
            [norm.num_groups for norm in self.norms],
            [norm.eps for norm in self.norms],
            torch.tensor(moment.quantizers, dtype=torch.float64),
            moment.biases,
            program.memory,
            self.seconds,
        )

    def _run_line_by_line(self, program: Program, moment: Moment, x: Tensor) -> Tensor:
        layers, states = list(self.layers.values()), {-1: x}
        for number, line in enumerate(program.instructions):
            quantizer = moment.quantizers[line.layer]
            source = states[line.source]
            if line.skip >= 0:
                source = torch.cat([source, states[line.skip]], 1)
            if line.kind in (NORM, NORM_SILU):
                source = self.norms[line.norm](source)
                source = F.silu(source) if line.kind == NORM_SILU else source
            elif line.kind == ATTENTION:
                pattern = "n (qkv heads c) h w -> qkv n heads (h w) c"
                mixed = F.scaled_dot_product_attention(*rearrange(source, pattern, qkv=3, heads=line.heads))
                source = rearrange(mixed, "n heads (h w) c -> n (heads c) h w", h=line.height)
            scale, zero_point = torch.tensor([quantizer.scale, quantizer.zero_point], dtype=torch.float32)
            codes = functional.quantize(source, scale, zero_point, 0, quantizer.qmax).byte()
            codes = codes.repeat_interleave(line.factor, 2).repeat_interleave(line.factor, 3)
            y = layers[line.layer](codes, quantizer, moment.biases[line.layer])
            states[line.target] = y if line.residual < 0 else y.add_(states[line.residual])
            for state in program.last_used[number]:
                del states[state]
        return states[-1]


def to_integer(student: QuantizedUNet) -> IntegerUNet:
    """The frozen `student` on integers, on the CPU: the same denoiser contract, the same codes.

    Raises:
        ValueError: the student is not frozen, or has a part that is not supported, by its name.
    """
    return IntegerUNet(copy.deepcopy(student).cpu())


def _read_quantizer(quantizer: ActivationQuantizer) -> Quantizer:
    scale, zero_point = quantizer.read()
    zero_point = functional.round_zero_point(zero_point, quantizer.qmin, quantizer.qmax)
    return Quantizer(scale.item(), int(zero_point.item()), quantizer.qmax)


def _pairs(block: Any) -> list[tuple[ResnetBlock2D, Attention | None]]:
    """The residual blocks of an up- or down-sampling block, each with the attention behind it."""
    return list(zip(block.resnets, getattr(block, "attentions", [None] * len(block.resnets)), strict=True))


def _refuse_unsupported(unet: UNet2DModel) -> None:
    """ValueError naming the first part of `unet` that `IntegerUNet` does not follow."""

    def require(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise ValueError(f"{name}: {what} is not supported on integers")

    options: Any = unet.config
    require(not options.center_input_sample, "unet", "center_input_sample")
    require(options.time_embedding_type != "fourier", "unet", 'time_embedding_type "fourier"')
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
