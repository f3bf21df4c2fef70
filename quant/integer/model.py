"""Denoiser on integers: `integer = to_integer(student)` has the interface of `student`."""

import copy
import ctypes
import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from diffusers.models.embeddings import GaussianFourierProjection, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from quant.context import plain_torch
from quant.integer import binding
from quant.integer.layers import LARGEST_DIGIT, Layers, owned
from quant.integer.lines import Program
from quant.integer.program import follow_time_embedding, follow_unet, refuse_unsupported
from quant.structure import refuse_hooks
from quant.student import QuantizedUNet

MAX_STEPS = 1000  # number of cached moments
MAX_NUMBER = 1 << 20  # larger numbers exceed the range of the core's sine and cosine


class Moment:
    """Parameters of the lines for a timestep and a class. A sum of products becomes (sum − shift) · slope + offset.

    Attributes:
        quantizers: `binding.QUANTIZER`, the input quantizers of `layers.numbered`.
        shifts: int32 (C,), over the output channels of all these layers, each padded to a multiple of 16.
        slopes, offsets: float32 (C,), likewise.
        norm_table: the normalisations, with the scale and shift from `modulate`.
        structure: structure that the core reads.
    """

    def __init__(self, scales: Tensor, zero_points: Tensor, largest: Tensor, layers: Layers, code_offset: int):
        """Compute the parameters from the L layers' input `scales` float32, `zero_points` and `largest` codes int32."""
        one = np.float32(1)
        self.quantizers = np.empty(len(layers.numbered), binding.QUANTIZER)
        self.shifts = np.zeros(layers.channels, np.int32)
        self.slopes, self.offsets = (np.zeros(layers.channels, np.float32) for _ in range(2))
        rows = zip(layers.values(), scales.numpy(), zero_points.numpy(), largest.numpy(), strict=True)
        for low, scale, zero_point, top in rows:
            for layer in (low,) if low.high is None else (low, low.high):
                self.quantizers[layer.number] = (one / scale, -zero_point, top - zero_point, zero_point, layer.shift)
                digit = zero_point >> layer.shift & LARGEST_DIGIT
                self.shifts[layer.channels] = layer.weight_sum * (digit - code_offset)
                self.slopes[layer.channels] = layer.scales * (scale * np.float32(1 << layer.shift))
                self.offsets[layer.channels] = layer.bias
        self.norm_table = type(layers.norm_table).from_buffer_copy(layers.norm_table)
        self._modulated: list[np.ndarray] = []
        arrays = (self.quantizers, self.shifts, self.slopes, self.offsets)
        self.structure = binding.MomentStruct(*(array.ctypes.data for array in arrays), self.norm_table)

    def modulate(self, number: int, weight: np.ndarray, bias: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> None:
        """Multiply the output of a normalisation by 1 + `scale` and add `shift`; all arrays are float32 (channels,)."""
        factor = np.float32(1) + scale
        weight, bias = weight * factor, bias * factor + shift
        self._modulated += [weight, bias]  # keep them alive: the table has only their addresses
        self.norm_table[number].weight, self.norm_table[number].bias = weight.ctypes.data, bias.ctypes.data


@dataclass
class _InputRange:
    """Valid timesteps or class labels of a network."""

    name: str
    rows: int | None
    """Number of rows, if they are row indices of an embedding table; else None."""
    positive: bool
    """Whether they must be positive, because the network takes their logarithm."""

    @classmethod
    def of(cls, name: str, *embeddings: nn.Module) -> "_InputRange":
        """Return the valid inputs of the first of `embeddings` that limits them."""
        for module in embeddings:
            if isinstance(module, nn.Embedding):
                return cls(name, module.num_embeddings, False)
            if isinstance(module, GaussianFourierProjection):
                return cls(name, None, True)
        return cls(name, None, False)

    def read(self, given: Any, count: int) -> list[float]:
        """Return a number for each of `count` samples; integers stay exact, others are rounded to float32."""
        try:
            x = torch.as_tensor(float(given) if isinstance(given, Fraction | Decimal) else given).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the {self.name} must be numbers, not a {type(given).__name__}") from error
        if x.dim() > 1 or x.numel() not in (1, count) or x.dtype == torch.bool or x.is_complex() or x.is_meta:
            kind = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
            raise ValueError(f"the {self.name} must be a number, or one for each of {count} samples, not {kind}")
        if x.is_floating_point():
            x = x.to(torch.float32)
        numbers: list[float] = x.reshape(-1).expand(count).tolist()
        for number in numbers:
            if not math.isfinite(number):
                raise ValueError(f"the {self.name} must be a finite number")
            if abs(number) > MAX_NUMBER:
                raise ValueError(f"the {self.name} must lie within ±{MAX_NUMBER:,}, not {number}")
            if self.positive and number <= 0:
                raise ValueError(f"the {self.name} must be positive, for its logarithm is taken, not {number}")
            if self.rows is not None and (number != int(number) or not 0 <= number < self.rows):
                raise ValueError(f"the {self.name} must be an integer from 0 to {self.rows - 1}, not {number}")
        return numbers


def _address(x: Tensor) -> int:
    """Return the address of the elements of `x`, or 0 if it has no memory."""
    try:
        return x.numpy().ctypes.data if x.untyped_storage().nbytes() else 0
    except RuntimeError:  # fake tensors, and tensors inside a transform of torch.func
        return 0


class _Projection:
    """Embedding of a timestep or class: the output of `time_proj`, or a row of an embedding table.

    Attributes:
        width: number of values.
    """

    def __init__(self, module: nn.Module, integer_core: binding.Core):
        self._core, self._module = integer_core, module
        self.width: int
        if isinstance(module, nn.Embedding):
            self._rows, self.width = owned(module.weight), module.embedding_dim
        elif isinstance(module, Timesteps):
            self.width = module.num_channels
        else:
            self._frequencies = owned(module.weight)  # type: ignore[arg-type]
            self.width = 2 * len(self._frequencies)

    def write(self, number: float, to: np.ndarray) -> None:
        """Write the embedding of `number` into `to`, float32 (width, …)."""
        module: Any = self._module
        if isinstance(module, nn.Embedding):
            to[: self.width] = self._rows[int(number)]
        elif isinstance(module, Timesteps):
            half, shift = self.width // 2, module.downscale_freq_shift
            self._core.sinusoids(number, half, shift, module.flip_sin_to_cos, to.ctypes.data)
        else:
            start = self._frequencies.ctypes.data
            self._core.fourier(number, len(self._frequencies), start, module.flip_sin_to_cos, to.ctypes.data)


class IntegerUNet(nn.Module):
    """Denoiser on integers: `eps = model(x_t, t).sample`, with float32 output, on the CPU.

    It has no parameters and cannot be trained, moved or changed, because it computes with copies of the student's
    parameters in its own memory. Its state dict is the student's. Copying and unpickling rebuild it from `student`.

    The bytes of ε depend only on the student, x_t, t and the class, not on the batch, the number of threads, the
    instruction set or the operating system. If a sample of x_t has a value that is not finite, its ε is NaN. Threads
    may share a model.

    Attributes:
        core: functions of the instruction set in use.
        time: program from timestep and class to the values that they add to each block.
        programs: programs from x_t to ε by height and width, created on first use.
        moments: cached moments by timestep and class (None without classes), at most `MAX_STEPS`.
        seconds: None, or float64 (2,), to which the threads' time for codes and for products is added.
    """

    @plain_torch()
    def __init__(self, student: QuantizedUNet, isa: str | None = None):
        super().__init__()
        student.require_float32()
        refuse_hooks(student)
        refuse_unsupported(student.unet)
        self.core, self._isa = binding.choose(isa), isa
        self._held = (student,)  # in a tuple: as an attribute, it would be a submodule
        self.clock = copy.deepcopy(student.clock)
        self.layers = Layers(list(student.layers()), list(student.unet.modules()))
        self.time = follow_time_embedding(student.unet, self.layers)
        quantizers = [layer.act_quantizer for layer in self.layers]
        self._largest = torch.tensor([quantizer.qmax for quantizer in quantizers], dtype=torch.int32)
        self._tables = [(q.scale.detach().clone(), q.zero_point.detach().clone()) for q in quantizers]
        config, proj, classes = student.config, student.unet.time_proj, student.unet.class_embedding
        self._in_channels, self._divided = config.in_channels, config.time_embedding_type == "fourier"
        self._timestep = _InputRange.of("timestep", proj)
        self._label = None if classes is None else _InputRange.of("class label", classes, proj)
        self._projection = _Projection(proj, self.core)
        self._class_projection = _Projection(classes if isinstance(classes, nn.Embedding) else proj, self.core)
        self.seconds: np.ndarray | None = None
        self.programs: dict[tuple[int, int], Program] = {}
        self.moments: dict[tuple[float, float | None], Moment] = {}

    @property
    def student(self) -> QuantizedUNet:
        """The frozen student that the model was created from, on the CPU."""
        return self._held[0]

    # diffusers' pipelines read these three properties.
    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @torch.compiler.disable
    @torch.no_grad()
    @plain_torch(inference=True)
    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """Predict ε. Samples of one batch may have different timesteps and classes.

        Args:
            sample: float of any precision (N, C, H, W), on the CPU.
            timestep: a number, or one for each sample, (N,); it may lie between two training timesteps.
            class_labels: (N,), for a network with classes.
            return_dict: whether to return a `UNet2DOutput` or a tuple.

        Raises:
            ValueError: an argument is invalid, the network does not support the image size, or torch is tracing.
        """
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise ValueError("an integer model cannot be traced or exported: export the frozen student")
        if not isinstance(sample, Tensor) or not sample.is_floating_point() or sample.layout != torch.strided:
            raise ValueError("the sample must be a tensor of floats")
        if sample.dim() != 4:
            raise ValueError(f"the sample must be (N, {self._in_channels}, height, width), not {tuple(sample.shape)}")
        count, channels, height, width = sample.shape
        if channels != self._in_channels:
            raise ValueError(f"the sample must have {self._in_channels} channels, not {channels}")
        if sample.device.type != "cpu":
            raise ValueError(f"the sample must lie on the CPU, where integers run, not on {sample.device}")
        if self._label is None and class_labels is not None:
            raise ValueError("this network has no classes: class_labels must be None")
        if self._label is not None and class_labels is None:
            raise ValueError("this network has classes: class_labels must say which, (N,)")
        timesteps = self._timestep.read(timestep, count)
        labels = [None] * count if self._label is None else self._label.read(class_labels, count)
        program = self._program(height, width)
        moments = [self._moment(t, label) for t, label in zip(timesteps, labels, strict=True)]
        x = sample.detach().to(torch.float32).resolve_neg().contiguous()
        if count and not _address(x):
            raise ValueError("the sample must have memory: it is a fake tensor, inside a transform, or was freed")
        eps = torch.empty(count, *program.shapes[-1], dtype=torch.float32, device="cpu")
        pointers = (ctypes.c_void_p * count)(*(ctypes.addressof(moment.structure) for moment in moments))
        seconds = None if self.seconds is None else self.seconds.ctypes.data
        self.core.denoise(
            program.structure, pointers, _address(x), eps.data_ptr(), count,
            binding.openmp(), torch.get_num_threads(), seconds,
        )  # fmt: skip
        if self._divided:
            eps /= torch.tensor(timesteps, dtype=torch.float32)[:, None, None, None]
        return UNet2DOutput(sample=eps) if return_dict else (eps,)

    # Threads may share a model: two may create the same program or moment, and each uses its own.
    def _program(self, height: int, width: int) -> Program:
        if (program := self.programs.get((height, width))) is None:
            program = self.programs[height, width] = follow_unet(self.student.unet, self.layers, height, width)
        return program

    def _moment(self, t: float, label: float | None) -> Moment:
        if (moment := self.moments.get((t, label))) is None:
            if len(self.moments) >= MAX_STEPS:
                self.moments.clear()
            moment = self.moments[t, label] = self._new_moment(t, label)
        return moment

    def _new_moment(self, t: float, label: float | None) -> Moment:
        self.clock.set(torch.tensor([t], dtype=torch.float32))
        try:
            read = ([self.clock.read(table) for table in tables] for tables in self._tables)
            scales, zero_points = zip(*read, strict=True)
        finally:
            self.clock.unset()
        integers = torch.cat(zero_points).round().int().clamp(torch.zeros_like(self._largest), self._largest)
        moment = Moment(torch.cat(scales), integers, self._largest, self.layers, self.core.code_offset)
        program = self.time.program
        memory = np.zeros(program.memory, np.float32)
        self._projection.write(t, memory[program.offsets[0] :])
        if label is not None:
            self._class_projection.write(label, memory[program.offsets[1] :])
        self.core.execute(program.structure, moment.structure, memory.ctypes.data)
        # Add the time embedding to the offset of each block's first convolution, or apply it to a normalisation.
        for conv, state in self.time.added.items():
            start, channels = program.offsets[state], self.layers[conv].channels
            moment.offsets[channels] += memory[start : start + self.layers[conv].out_channels]
        for norm, state in self.time.modulated.items():
            number, start = self.layers.norms[norm], program.offsets[state]
            weight, bias = self.layers.norm_numbers[number]
            scale, shift = np.split(memory[start : start + 2 * len(weight)], 2)
            moment.modulate(number, weight, bias, scale, shift)
        return moment

    # `state_dict` and `load_state_dict` of a parent module call these two.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.student.state_dict(destination=destination, prefix=f"{prefix}student.", keep_vars=keep_vars)

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        raise ValueError("an integer model cannot load values: call to_integer on the other student")

    def __reduce__(self) -> tuple:
        return IntegerUNet, (self.student, self._isa)


@plain_torch()
def to_integer(student: QuantizedUNet, isa: str | None = None) -> IntegerUNet:
    """Return the frozen `student` as a denoiser on integers, on the CPU, with the same interface and the same codes.

    Args:
        isa: the instruction set, which affects only the speed; None: that of `EFFICIENTDM_ISA`, or the fastest that
            this processor has.

    Raises:
        ValueError: the student is not frozen or has an unsupported part, the installation has no integer core, or the
            processor lacks the instruction set.
    """
    if not isinstance(student, QuantizedUNet):
        raise ValueError(f"a {type(student).__name__} has no codes: only a frozen student runs on integers")
    return IntegerUNet(copy.deepcopy(student).cpu(), isa)
