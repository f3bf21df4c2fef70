"""Measure how the integer runtime and the simulation differ: the share of different codes in each layer.

From equal inputs both compute the same codes, except where a float lies within rounding error of the boundary between
two codes: normalisation, activations, attention and resampling use floats in both, but sum them in different orders.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.command import run_command
from ddpm_mnist.sampling.sampler import choose_conditions, denoise
from ddpm_mnist.sampling.solver import SamplerConfig
from eval.models import load_model
from eval.sample import DrawConfig
from quant import IntegerUNet, QuantizedUNet, to_integer
from quant.functional import round_zero_point
from quant.integer import binding
from quant.integer.layers import NORMS, pad_to_lanes
from quant.integer.lines import Line, Program
from quant.integer.model import Moment


@dataclass
class ExactnessConfig:
    student: str = "w4a4"
    """The student: the name of a released model, or a run folder."""
    num_images: int = 32
    """Images to denoise with the simulation, whose states both runtimes evaluate, at least 1."""
    num_steps: int = 20
    """Denoising steps, at least 1."""
    seed: int = 0
    """Image i starts from the noise of seed + i: 0 to 2^31 - num_images."""

    def __post_init__(self) -> None:
        DrawConfig(num_steps=self.num_steps, num_images=self.num_images, seed=self.seed)  # validates the ranges


def line_codes(integer: IntegerUNet, line: Line, moment: Moment, x: Tensor) -> Tensor:
    """Return the codes, as floats, that the core computes from x (N, C, H, W) in a program line, before upsampling.

    If codes have two digits, `line` is that of the low digits; the high digits are computed as well.
    """
    count, channels, height, width = x.shape
    placed = binding.LineStruct(
        line.kind, line.layer, line.norm, 0, channels, -1, 0, -1, -1, height, width, factor=1, heads=line.heads
    )
    states = _states(x)
    digits = np.empty((count, height, width, channels // (3 if line.kind == binding.ATTENTION else 1)), np.uint8)
    codes, layer = np.zeros(digits.shape, np.int32), integer.layers.numbered[line.layer]
    for of_digit in (layer,) if layer.high is None else (layer, layer.high):
        quantizer = moment.quantizers[of_digit.number :].ctypes.data
        for state, made in zip(states, digits, strict=True):
            integer.core.encode(placed, moment.norm_table, quantizer, state.ctypes.data, made.ctypes.data)
        codes += digits.astype(np.int32) << of_digit.shift
    return rearrange(torch.from_numpy(codes), "n h w c -> n c h w").float()


def line_state(integer: IntegerUNet, line: Line, moment: Moment, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the state of `shape` that the core computes from x (N, C, H, W) in a program line without a layer."""
    _, channels, height, width = x.shape
    states, size = _states(x), pad_to_lanes(shape[0]) * shape[1] * shape[2]
    placed = binding.LineStruct(
        line.kind, -1, line.norm, 0, channels, -1, 0, -1, states[0].size, height, width, 1, 0,
        line.resampling, line.centre, line.divisor,
    )  # fmt: skip
    made = []
    for state in states:
        memory = np.concatenate([state.reshape(-1), np.zeros(size, np.float32)])
        integer.core.change(placed, moment.norm_table, memory.ctypes.data)
        made.append(memory[-size:].reshape(*shape[1:], -1)[..., : shape[0]])
    return rearrange(torch.from_numpy(np.stack(made)), "n h w c -> n c h w")


def _states(x: Tensor) -> np.ndarray:
    """Convert x (N, C, H, W) to the core's layout: (N, H, W, C) with padded channels."""
    count, channels, height, width = x.shape
    states = np.zeros((count, height, width, pad_to_lanes(channels)), np.float32)
    states[..., :channels] = rearrange(x, "n c h w -> n h w c").numpy()
    return states


@dataclass
class _Activations:
    """Activations of one forward pass of the simulation."""

    entering: dict[str, Tensor] = field(default_factory=dict)
    """Inputs of the layers by name, and of the normalisations by "norm" and number."""
    leaving: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of the layers by name, and of the class embedding as "class"."""
    codes: dict[str, Tensor] = field(default_factory=dict)
    """Input codes of the layers by name."""


def _record(student: QuantizedUNet, x: Tensor, t: float | Tensor, labels: dict[str, Tensor]) -> _Activations:
    """Return the activations of `student(x, t, **labels)`."""
    recorded = _Activations()

    def keep_input(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        recorded.entering[name] = inputs[0]

    def keep_output(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        recorded.leaving[name] = output

    def keep_codes(name: str, quantizer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        scale, zero_point = (values[0] for values in quantizer.read())
        codes = (output / scale).round() + round_zero_point(zero_point, quantizer.qmin, quantizer.qmax)
        recorded.codes[name] = codes

    hooks: list[tuple[nn.Module, Any]] = []
    for name, layer in student.layers():
        hooks += [(layer.act_quantizer, partial(keep_codes, name))]
        hooks += [(layer, partial(keep_input, name)), (layer, partial(keep_output, name))]
    norms = (module for module in student.unet.modules() if isinstance(module, NORMS))
    hooks += [(norm, partial(keep_input, f"norm {number}")) for number, norm in enumerate(norms)]
    if student.unet.class_embedding is not None:
        hooks += [(student.unet.class_embedding, partial(keep_output, "class"))]
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        student(x, t, **labels)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


class _Sources:
    """The simulation's state at the source of each line of a program."""

    def __init__(self, integer: IntegerUNet, program: Program, moment: Moment, simulated: _Activations):
        self._integer, self._program, self._moment, self._simulated = integer, program, moment, simulated
        self.states: dict[int, Tensor] = {}
        """States that a normalisation reads, and those computed from them by lines without a layer."""
        self._computed_by: dict[int, str] = {}  # state → its layer
        self._residuals: dict[int, int] = {}  # state → the state that is added to it
        self._of_high: dict[int, int] = {}  # the same for states of high digits, which are added to the low digits'
        for line in program.lines:
            if line.norm >= 0 and line.skip < 0:
                self.states.setdefault(line.source, self._before_norm(line))

    def follow(self, line: Line) -> None:
        """Note the target of a line whose source is known."""
        if line.layer < 0:
            if line.source in self.states:
                shape = self._program.shapes[line.target]
                state = line_state(self._integer, line, self._moment, self.states[line.source], shape)
                self.states[line.target] = state
        elif self._integer.layers.numbered[line.layer].shift:
            self._of_high[line.target] = line.residual
        else:
            self._residuals[line.target] = self._of_high.get(line.residual, line.residual)
            self._computed_by[line.target] = self._integer.layers.numbered[line.layer].name

    def of(self, line: Line) -> Tensor:
        """Return the source of a line with a layer, (N, C, H, W), before upsampling."""
        name, (_, height, width) = self._integer.layers.numbered[line.layer].name, self._program.shapes[line.source]
        if line.norm >= 0:
            return self._before_norm(line)
        if line.source in self.states and line.skip < 0:
            return self.states[line.source]
        if line.kind == binding.QUANTIZE:
            source = _as_image(self._simulated.entering[name], height * line.factor, width * line.factor)
            return source[..., :: line.factor, :: line.factor]
        source = _as_image(self._simulated.leaving[self._computed_by[line.source]], height, width)
        if self._residuals[line.source] >= 0:  # the class embedding is added to the time embedding
            source = source + _as_image(self._simulated.leaving["class"], height, width)
        return source

    def _before_norm(self, line: Line) -> Tensor:
        x = self._simulated.entering[f"norm {line.norm}"]
        return x.reshape(len(x), -1, *self._program.shapes[line.source][1:])


@torch.no_grad()
def flipped_shares(student: QuantizedUNet, x: Tensor, t: float | Tensor, label: int | None = None) -> dict[str, float]:
    """Return, for each integer layer, the share of its input codes that differ from the simulation's.

    Every line of the integer program gets its input from the simulation, so differences do not propagate.

    Args:
        x: float (N, C, H, W), states at the timestep `t`.
        label: their class, for a student with classes.
    """
    integer = to_integer(student)
    labels = {} if label is None else {"class_labels": torch.full((len(x),), label)}
    integer(x, t, **labels)  # compiles the program and prepares the step sizes of the timestep
    (moment,) = integer.moments.values()
    simulated = _record(student, x, t, labels)
    network = integer.programs[x.shape[2], x.shape[3]]
    shares = {}
    for program in (integer.time.program, network):
        sources = _Sources(integer, program, moment, simulated)
        if program is network:
            sources.states[0] = x
        for line in program.lines:
            sources.follow(line)
            if line.layer < 0 or integer.layers.numbered[line.layer].shift:
                continue
            name, (_, height, width) = integer.layers.numbered[line.layer].name, program.shapes[line.source]
            ours = line_codes(integer, line, moment, sources.of(line))
            if line.factor > 1:
                ours = ours.repeat_interleave(line.factor, 2).repeat_interleave(line.factor, 3)
            theirs = _as_image(simulated.codes[name], height * line.factor, width * line.factor)
            shares[name] = (ours != theirs).float().mean().item()
    return shares


def _as_image(x: Tensor, height: int, width: int) -> Tensor:
    """Convert features (N, C), tokens (N, H·W, C), or an image padded below and on the right to (N, C, H, W)."""
    if x.dim() == 2:
        return x[:, :, None, None]
    return rearrange(x, "n (h w) c -> n c h w", h=height) if x.dim() == 3 else x[..., :height, :width]


def report(config: ExactnessConfig) -> dict[str, float]:
    """Print the share of codes that differ between the integer runtime and the simulation, per layer of a student."""
    model = load_model(config.student)
    student = model.denoiser
    if not isinstance(student, QuantizedUNet):
        raise InputError(f'"{config.student}" is not a student: a run folder or a released student is needed')
    student.cpu()
    solver = model.solver(SamplerConfig(num_steps=config.num_steps))
    totals: dict[str, float] = {}
    seeds = range(config.seed, config.seed + config.num_images)
    labels = choose_conditions(student, solver.config, seeds).get("class_labels")
    classes: list[int | None] = [None] if labels is None else labels.unique().tolist()
    for step in denoise(student, solver, seeds):
        for label in classes:
            x = step.x if labels is None else step.x[labels == label]
            shares = flipped_shares(student, x, solver.timesteps[step.number], label)
            for name, share in shares.items():
                totals[name] = totals.get(name, 0.0) + share * len(x) / len(step.x) / config.num_steps
    table = Table(
        title=f"{config.num_images} images, {config.num_steps} steps: codes that differ from the simulation's"
    )
    table.add_column("layer")
    table.add_column("per million", justify="right")
    for name, share in totals.items():
        table.add_row(name, f"{1e6 * share:.1f}")
    table.add_row("mean", f"{1e6 * sum(totals.values()) / len(totals):.1f}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    return totals


if __name__ == "__main__":
    run_command("python -m eval.exactness", report, ExactnessConfig, sys.argv[1:])
