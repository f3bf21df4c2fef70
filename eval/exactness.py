"""Where integers and simulation differ: the share of codes that fall on the other side of a border, layer by layer.

From equal inputs both compute the same codes, except where a float lies within rounding error of the border between
two: normalisation, SiLU and attention are floats in both, summed in another order.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from quant import QuantConv2d, QuantizedUNet, to_integer
from quant.functional import round_zero_point
from quant.integer import ATTENTION, NORM, NORM_SILU, Instruction, IntegerLayer, Quantizer, fused_operator
from quant.quantizers import Clock


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


def line_codes(line: Instruction, x: Tensor, quantizer: Quantizer, norm: nn.GroupNorm | None = None) -> Tensor:
    """The codes that `integer.cpp` makes of x (N, C, H, W) in a line of a program, seen through an identity layer."""
    channels = x.shape[1] // (3 if line.kind == ATTENTION else 1)
    layer = QuantConv2d(nn.Conv2d(channels, channels, 1), 8, 8, 1, Clock([0]))
    nn.init.dirac_(layer.weight)
    nn.init.zeros_(layer.bias)
    layer.freeze()
    identity = IntegerLayer(0, "identity", layer, 0, fused=True)
    line = line._replace(layer=0, norm=0 if norm else -1, source=-1, source_channels=x.shape[1], skip=-1)
    line = line._replace(skip_channels=0, residual=-1, target=-1, height=x.shape[2], width=x.shape[3], factor=1)
    norms = [norm] if norm else []
    y = fused_operator()(
        x.contiguous(memory_format=torch.channels_last),
        torch.tensor([line]),
        [identity.weight],
        [identity.weight_sum],
        [torch.full_like(identity.scales, 1 / quantizer.scale)],
        torch.tensor([(channels, 1, 1, 1, 1, 0, 0, 0, 0)]),
        [n.weight for n in norms],
        [n.bias for n in norms],
        [n.num_groups for n in norms],
        [n.eps for n in norms],
        torch.tensor([quantizer], dtype=torch.float64),
        [torch.zeros(channels)],
        0,
    )
    assert layer.codes is not None
    return (y / layer.codes.max().item()).round() + quantizer.zero_point


@torch.no_grad()
def flipped_shares(student: QuantizedUNet, x: Tensor, t: int) -> dict[str, float]:
    """For each layer that runs on integers the share of its input's codes that differ from the simulation's.

    Every line of the integer program gets what the simulation gave to the same place, so no flip is counted twice.

    Args:
        x: float (N, C, H, W), states at the timestep `t`.
    """
    integer = to_integer(student)
    integer(x, t)  # makes the program and the timestep's step sizes
    program, moment = integer.programs[x.shape[2], x.shape[3]], integer.moments[t]
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

    shares, previous = {}, ""
    for line in program.instructions:
        name, quantizer = list(integer.layers.values())[line.layer].name, moment.quantizers[line.layer]
        height, width = line.height * line.factor, line.width * line.factor
        if line.kind == ATTENTION:
            source = _as_image(leaving[previous], height)
        elif line.kind in (NORM, NORM_SILU):
            source = entering[f"norm {line.norm}"].reshape(len(x), -1, height, width)
        else:
            source = entering[name]
        ours = line_codes(line, source, quantizer, norms.get(line.norm))
        shares[name], previous = (ours != _as_image(coded[name], height)).float().mean().item(), name
    return shares


def _as_image(x: Tensor, height: int) -> Tensor:
    """Tokens (N, H·W, C) → (N, C, H, W); an image stays as it is."""
    return rearrange(x, "n (h w) c -> n c h w", h=height) if x.dim() == 3 else x


def report(config: ExactnessConfig) -> dict[str, float]:
    """Count the codes that integers and simulation do not share, per layer, along the denoising of a student."""
    student = load_model(config.student).denoiser
    if not isinstance(student, QuantizedUNet):
        raise InputError(f'"{config.student}" is no student: a run folder or a released student is needed')
    student.cpu()
    if fused_operator() is None:
        raise InputError("integer.cpp does not run here: the layers run one by one, with the simulation's own codes")
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
