"""Where integers and simulation differ: the share of codes that fall on the other side of a border, layer by layer.

From equal inputs both compute the same codes, except where a float lies within rounding error of the border between
two: normalisation, SiLU and attention are floats in both, summed in another order.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ddpm_mnist import InputError
from ddpm_mnist.command import run_command
from ddpm_mnist.sampler import SamplerConfig, Solver, denoise
from eval.models import load_model
from eval.sample import DrawConfig
from quant import IntegerUNet, QuantizedUNet, to_integer
from quant.functional import round_zero_point
from quant.integer import core
from quant.integer.model import Moment
from quant.integer.program import Line, filled


@dataclass
class ExactnessConfig:
    student: str = "w4a4"
    """The student: a released name or a run folder."""
    num_images: int = 32
    """Images whose denoising both follow, from the simulation's states."""
    num_steps: int = 20
    """Denoising steps."""
    seed: int = 0
    """Image i starts from the noise of seed + i."""

    def __post_init__(self) -> None:
        DrawConfig(num_steps=self.num_steps, num_images=self.num_images, seed=self.seed)  # refuses what is outside


def line_codes(integer: IntegerUNet, line: Line, moment: Moment, x: Tensor) -> Tensor:
    """The codes, as floats, that the core makes of x (N, C, H, W) in a line of a program, not enlarged."""
    count, channels, height, width = x.shape
    placed = core.Line(
        line.kind, line.layer, line.norm, 0, channels, -1, 0, -1, -1, height, width, factor=1, heads=line.heads
    )
    states = np.zeros((count, height, width, filled(channels)), np.float32)
    states[..., :channels] = rearrange(x, "n c h w -> n h w c").numpy()
    codes = np.empty((count, height, width, channels // (3 if line.kind == core.ATTENTION else 1)), np.uint8)
    quantizer = moment.quantizers[line.layer : line.layer + 1].ctypes.data
    for state, code in zip(states, codes, strict=True):
        integer.core.encode(placed, integer.layers.norm_table, quantizer, state.ctypes.data, code.ctypes.data)
    return rearrange(torch.from_numpy(codes), "n h w c -> n c h w").float()


@torch.no_grad()
def flipped_shares(student: QuantizedUNet, x: Tensor, t: int) -> dict[str, float]:
    """For each layer that runs on integers the share of its input's codes that differ from the simulation's.

    Every line of the integer program gets what the simulation gave to the same place, so no flip is counted twice.

    Args:
        x: float (N, C, H, W), states at the timestep `t`.
    """
    integer = to_integer(student)
    integer(x, t)  # makes the program and the timestep's step sizes
    programs, moment = (integer.time_program, integer.programs[x.shape[2], x.shape[3]]), integer.moments[t]
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Tensor] = {}
    coded: dict[str, Tensor] = {}

    def hook(name: str, kept: dict[str, Tensor], of_output: bool) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            kept[name] = output if of_output else inputs[0]

        return keep

    def keep_codes(name: str, quantizer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        scale, zero_point = (values[0] for values in quantizer.read())
        coded[name] = (output / scale).round() + round_zero_point(zero_point, quantizer.qmin, quantizer.qmax)

    norms: dict[int, nn.GroupNorm] = {}
    hooks = []
    for name, layer in student.layers():
        hooks.append(layer.act_quantizer.register_forward_hook(partial(keep_codes, name)))
        hooks.append(layer.register_forward_hook(hook(name, entering, False)))
        hooks.append(layer.register_forward_hook(hook(name, leaving, True)))
    for number, norm in enumerate(module for module in student.unet.modules() if isinstance(module, nn.GroupNorm)):
        norms[number] = norm
        hooks.append(norm.register_forward_hook(hook(f"norm {number}", entering, False)))
    try:
        student(x, t)
    finally:
        for handle in hooks:
            handle.remove()

    names, shares = [layer.name for layer in integer.layers.values()], {}
    for program in programs:
        made_by: dict[int, str] = {}
        for line in program.lines:
            name, (_, height, width) = names[line.layer], program.shapes[line.source]
            made_by[line.target] = name
            height, width = height * line.factor, width * line.factor
            if line.norm >= 0:
                source = entering[f"norm {line.norm}"].reshape(len(x), -1, height, width)
            else:
                kept = entering[name] if line.kind == core.QUANTIZE else leaving[made_by[line.source]]
                source = _as_image(kept, height, width)
            theirs = _as_image(coded[name], height, width)
            shares[name] = (line_codes(integer, line, moment, source) != theirs).float().mean().item()
    return shares


def _as_image(x: Tensor, height: int, width: int) -> Tensor:
    """Features (N, C), tokens (N, H·W, C), or an image that was filled up below and to the right → (N, C, H, W)."""
    if x.dim() == 2:
        return x[:, :, None, None]
    return rearrange(x, "n (h w) c -> n c h w", h=height) if x.dim() == 3 else x[..., :height, :width]


def report(config: ExactnessConfig) -> dict[str, float]:
    """Count the codes that integers and simulation do not share, per layer, along the denoising of a student."""
    student = load_model(config.student).denoiser
    if not isinstance(student, QuantizedUNet):
        raise InputError(f'"{config.student}" is no student: a run folder or a released student is needed')
    student.cpu()
    solver = Solver(SamplerConfig(num_steps=config.num_steps))
    totals: dict[str, float] = {}
    for step in denoise(student, solver, range(config.seed, config.seed + config.num_images)):
        shares = flipped_shares(student, step.x, int(solver.timesteps[step.number]))
        for name, share in shares.items():
            totals[name] = totals.get(name, 0.0) + share / config.num_steps
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
