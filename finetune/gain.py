"""The student's gain: its ε is scaled until its images differ from one another as much as its teacher's do."""

import copy
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_mnist.runs import progress
from ddpm_mnist.sampler import SamplerConfig, Solver, sample, to_float, to_uint8
from eval.models import runnable
from finetune.trajectories import Trajectories, first_noise
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
    sampler: SamplerConfig,
    buffer: Trajectories,
    seed: int,
    runtime: str,
    batch_size: int = 64,
) -> Restored:
    """Scale a frozen student's ε by 1 + gain, so that the variance of its images is that of its teacher's.

    A squared error draws what the student cannot tell apart to its mean, and rounding leaves noise in the states that
    the student takes for its own: both make its images more alike than the teacher's. An ε that is a little too large
    removes a little too much noise, and gives the variance back. It is measured where the digits are told apart, in
    the teacher's own bottleneck, on the noises of the `buffer`: no data is needed, and the gain costs nothing at run
    time, for the last convolution takes it. (Ning et al., arXiv 2308.15321, scale ε against the drift of a sampler
    too, by one factor for all.) A student that varies enough is left as it is.

    Args:
        sampler: the student's.
        seed: the buffer's.
        runtime: how the student samples, one of `eval.models.RUNTIMES`.
    """
    t = int(Solver(sampler).timesteps[-1])
    goal = bottleneck_variance(teacher, to_uint8(buffer.x[:, -1]), t)
    tried: dict[float, float] = {}
    with progress("restoring the variance", len(GAINS)) as advance:
        for gain in GAINS:
            denoiser = runnable(scaled(student, 1 + gain), runtime)
            images = sample(denoiser, sampler, len(buffer.x), first_noise(seed), batch_size, denoiser.device)
            tried[gain] = bottleneck_variance(teacher, images, t) / goal
            advance(len(tried), f"gain {gain:.2f}: variance {tried[gain]:.3f} of the teacher's")
            if tried[gain] >= 1:
                break
    gain = interpolate(tried)
    return Restored(scaled(student, 1 + gain), gain, tried)


def interpolate(tried: dict[float, float]) -> float:
    """The gain at which the variance, on a line through the last two that were tried, is the teacher's."""
    *before, (gain, variance) = tried.items()
    if not before or variance < 1:
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
    hook = teacher.mid_block.register_forward_hook(lambda block, inputs, output: features.append(output.mean((2, 3))))
    try:
        for batch in images.split(64):
            teacher(to_float(batch).to(teacher.device), t)
    finally:
        hook.remove()
    return torch.cat(features).double().var(dim=0).sum().item()
