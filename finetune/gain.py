"""The student's gain: its ε is scaled until its images differ from one another as much as its teacher's do."""

import copy
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ddpm_mnist import InputError
from ddpm_mnist.runs import progress
from ddpm_mnist.sampler import SamplerConfig, sample, to_float
from eval.models import runnable
from quant import QuantizedUNet

# Factors 1 + gain that are tried, in this order, until the variance is reached.
GAINS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05)


class Restored(NamedTuple):
    """What `restore_variance` found."""

    student: QuantizedUNet
    gain: float
    tried: dict[float, float]
    """For each gain that was tried, the variance over the teacher's."""

    def record(self) -> dict[str, Any]:
        return {"gain": self.gain, "variance over the teacher's": self.tried}


@torch.no_grad()
def restore_variance(
    student: QuantizedUNet,
    teacher: UNet2DModel,
    t: int,
    sampler: SamplerConfig,
    teacher_images: Tensor,
    seed: int,
    runtime: str,
    batch_size: int = 64,
) -> Restored:
    """Scale a frozen student's ε by 1 + gain, so that the variance of its images comes up to that of its teacher's.

    A squared error averages over what the student cannot tell apart, and rounding leaves noise in the states that the
    student does not know to remove: its images are more alike than the teacher's. An ε that is a little too large
    removes a little too much noise, and gives the variance back. It is measured where the digits are told apart, in
    the teacher's own bottleneck, on noises that the student has not seen: no data is needed, and the gain costs
    nothing at run time, for the last convolution takes it. (Against the drift of a float sampler Ning et al., arXiv
    2308.15321, scale ε by one factor too, downwards.) A student that varies enough is left as it is; where no gain of
    `GAINS` is enough, it gets the one that comes nearest.

    Args:
        t: the timestep at which the teacher looks at the images: that of its last step, whose states are all but
            images.
        sampler: the student's.
        teacher_images: uint8 (N, 28, 28), N ≥ 2, what the teacher draws from the noises of `seed` on.
        runtime: how the student samples, one of `eval.models.RUNTIMES`.

    Raises:
        InputError: the teacher's images are all alike.
    """
    goal = bottleneck_variance(teacher, teacher_images, t)
    if not goal > 0:
        raise InputError("the teacher's images do not vary: variance_images must be 0")
    tried: dict[float, float] = {}
    with progress("restoring the variance", len(GAINS)) as advance:
        for gain in GAINS:
            denoiser = runnable(scaled(student, 1 + gain), runtime)
            images = sample(denoiser, sampler, len(teacher_images), seed, batch_size, denoiser.device)
            tried[gain] = bottleneck_variance(teacher, images, t) / goal
            advance(len(tried), f"gain {gain:.2f}: variance {tried[gain]:.3f} of the teacher's")
            if tried[gain] >= 1:
                break
    gain = interpolate(tried)
    if tried[max(tried)] < 1:
        print(f"No gain up to {max(GAINS)} gives the student its teacher's variance; {gain} comes nearest.")
    return Restored(scaled(student, 1 + gain), gain, tried)


def interpolate(tried: dict[float, float]) -> float:
    """The gain at which the variance, on a line through the last two that were tried, is the teacher's."""
    *before, (gain, variance) = tried.items()
    if variance < 1:
        return max(tried, key=lambda gain: tried[gain])
    if not before:
        return gain
    last_gain, last_variance = before[-1]
    return last_gain + (gain - last_gain) * (1 - last_variance) / (variance - last_variance)


def scaled(student: QuantizedUNet, factor: float) -> QuantizedUNet:
    """A copy of a frozen student whose ε is `factor` times as large."""
    student = copy.deepcopy(student)
    student.scale_output(factor)
    return student


@torch.no_grad()
def bottleneck_variance(teacher: UNet2DModel, images: Tensor, t: int) -> float:
    """Total variance of the channels' means in the teacher's middle block, over `images` uint8 (N, 28, 28) at t."""
    features: list[Tensor] = []

    def keep(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        features.append(output.mean((2, 3)).cpu())

    hook = teacher.mid_block.register_forward_hook(keep)
    try:
        for batch in images.split(64):
            teacher(to_float(batch).to(teacher.device), t)
    finally:
        hook.remove()
    return torch.cat(features).double().var(dim=0).sum().item()
