"""The integer model: `integer = to_integer(student)`, the same denoiser."""

import copy
import ctypes
import threading
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from quant.convert import QuantizedUNet
from quant.integer import core
from quant.integer.program import Layers, Program, follow_time_embedding, follow_unet, refuse_unsupported

MAX_STEPS = 1000  # timesteps whose step sizes and biases are kept
_PREPARING = threading.Lock()  # threads may share a model, but not the clock that a timestep's step sizes are read by


class Moment:
    """What the layers need to know of a timestep. A sum of products becomes (sum − shift) · slope + offset.

    Attributes:
        quantizers: `core.QUANTIZER` (L,), of each layer's input.
        shifts: int32 (C,), over the output channels of all layers, each filled up to 16.
        slopes, offsets: float32 (C,), likewise.
        structure: what the core reads.
    """

    def __init__(self, scales: Tensor, zero_points: Tensor, largest: Tensor, layers: Layers, code_offset: int):
        """scales float32 (L,), zero_points and largest codes int32 (L,)."""
        one = np.float32(1)
        self.quantizers = np.empty(len(layers), core.QUANTIZER)
        self.quantizers["inverse"] = one / scales.numpy()
        self.quantizers["low"] = -zero_points.numpy()
        self.quantizers["high"] = (largest - zero_points).numpy()
        self.quantizers["zero_point"] = zero_points.numpy()
        self.shifts = np.zeros(layers.channels, np.int32)
        self.slopes, self.offsets = (np.zeros(layers.channels, np.float32) for _ in range(2))
        for layer, scale, zero_point in zip(layers.values(), scales.numpy(), zero_points.numpy(), strict=True):
            self.shifts[layer.channels] = layer.weight_sum * (zero_point - code_offset)
            self.slopes[layer.channels] = layer.scales * scale
            self.offsets[layer.channels] = layer.bias
        arrays = (self.quantizers, self.shifts, self.slopes, self.offsets)
        self.structure = core.Moment(*(array.ctypes.data for array in arrays))


class IntegerUNet(nn.Module):
    """A denoiser on integers: `eps = model(x_t, t).sample`, float32 in and out, on the CPU.

    The bytes of ε depend on the student, on x_t and on t alone: not on the batch, the threads, the instruction set or
    the operating system. Where x_t holds something that is not a finite number, ε is none at all. Threads may share a
    model.

    Attributes:
        core: the instruction set that runs it, with its functions.
        time_program: from a timestep's sinusoids to what it adds to each block.
        programs: from x_t to ε, for each height and width that was met.
        moments: for each timestep that was met, at most `MAX_STEPS`.
        seconds: None, or float64 (2,): the threads' time for making codes and for their products is added.
    """

    def __init__(self, student: QuantizedUNet, isa: str | None = None):
        super().__init__()
        refuse_unsupported(student.unet)
        self.core = core.choose(isa)
        self.student, self.clock = student, student.clock
        self.layers = Layers(list(student.layers()), list(student.unet.modules()))
        self.time_program, self._added = follow_time_embedding(student.unet, self.layers)
        self._largest = torch.tensor([layer.act_quantizer.qmax for layer in self.layers], dtype=torch.int32)
        self.seconds: np.ndarray | None = None
        self.programs: dict[tuple[int, int], Program] = {}
        self.moments: dict[float, Moment] = {}

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

    @torch.no_grad()
    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> Any:
        """Samples of one batch may have different timesteps."""
        count, channels, height, width = sample.shape
        if channels != self.config.in_channels:
            raise ValueError(f"the sample must have {self.config.in_channels} channels, not {channels}")
        timesteps = torch.as_tensor(timestep).reshape(-1).expand(count).tolist()
        with _PREPARING:
            if (height, width) not in self.programs:
                self.programs[height, width] = follow_unet(self.student.unet, self.layers, height, width)
            program = self.programs[height, width]
            moments = [self._moment(t) for t in timesteps]
        x = sample.to(torch.float32).contiguous()
        eps = torch.empty(count, *program.shapes[-1])
        pointers = (ctypes.c_void_p * count)(*(ctypes.addressof(moment.structure) for moment in moments))
        seconds = None if self.seconds is None else self.seconds.ctypes.data
        self.core.denoise(
            program.structure, pointers, x.data_ptr(), eps.data_ptr(), count,
            core.openmp(), torch.get_num_threads(), seconds,
        )  # fmt: skip
        return UNet2DOutput(sample=eps) if return_dict else (eps,)

    def _moment(self, t: float) -> Moment:
        if t not in self.moments:
            if len(self.moments) == MAX_STEPS:
                self.moments.clear()
            self.moments[t] = self._new_moment(t)
        return self.moments[t]

    def _new_moment(self, t: float) -> Moment:
        self.clock.set(torch.tensor([t]))
        try:
            scales, zero_points = zip(*(layer.act_quantizer.read() for layer in self.layers), strict=True)
        finally:
            self.clock.unset()
        integers = torch.cat(zero_points).round().int().clamp(torch.zeros_like(self._largest), self._largest)
        moment = Moment(torch.cat(scales), integers, self._largest, self.layers, self.core.code_offset)
        # The time embedding becomes a part of the offset of each block's first convolution.
        proj: Any = self.student.unet.time_proj
        memory = np.zeros(self.time_program.memory, np.float32)
        options = (proj.num_channels // 2, proj.downscale_freq_shift, proj.flip_sin_to_cos)
        self.core.sinusoids(t, *options, memory.ctypes.data)
        self.core.execute(self.time_program.structure, moment.structure, memory.ctypes.data)
        for conv, state in self._added.items():
            start, channels = self.time_program.offsets[state], self.layers[conv].channels
            moment.offsets[channels] += memory[start : start + self.layers[conv].out_channels]
        return moment


def to_integer(student: QuantizedUNet, isa: str | None = None) -> IntegerUNet:
    """The frozen `student` on integers, on the CPU: the same denoiser contract, the same codes.

    Args:
        isa: the instruction set; None: that of `EFFICIENTDM_ISA`, or the best that this processor has. It decides the
            speed alone.

    Raises:
        ValueError: the student is not frozen, or has a part that is not supported, by its name; the installation has
            no integer core, or the processor no such instruction set.
    """
    return IntegerUNet(copy.deepcopy(student).cpu(), isa)
