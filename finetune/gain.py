"""The student's gain: its ε is scaled until as little noise is left in its images as in its teacher's."""

import copy
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_mnist import InputError
from ddpm_mnist.processes import share_out
from ddpm_mnist.runs import progress
from ddpm_mnist.sampler import Solver, choose_labels, sample, to_float
from eval.models import runnable
from quant import QuantizedUNet

# Gains that are tried, in this order, until no more noise is left than in the teacher's images.
GAINS = tuple(step / 100 for step in range(11))


class Matched(NamedTuple):
    """What `match_noise` found."""

    student: QuantizedUNet
    gain: float
    tried: dict[float, float]
    """For each gain that was tried, the noise that is left over that in the teacher's images."""

    def record(self) -> dict[str, Any]:
        """What gain.json says."""
        return {"gain": self.gain, "noise left over the teacher's": self.tried}


@torch.no_grad()
def match_noise(
    student: QuantizedUNet,
    teacher: UNet2DModel,
    solver: Solver,
    teacher_images: Tensor,
    seed: int,
    runtime: str,
    batch_size: int = 64,
) -> Matched:
    """Scale a frozen student's ε by 1 + gain, so that about as much noise is left in its images as in its teacher's.

    Rounding adds noise to every state that the student does not know of, and a squared error teaches it to answer
    carefully: it takes too little noise away. An ε that is a little too large takes more. How much is left the
    teacher says, who was trained to see it: no data is needed, and the gain costs nothing at run time, for the last
    convolution takes it. (Against the drift of a float sampler Ning et al., arXiv 2308.15321, scale ε by one factor
    too, downwards.) A student that leaves no more than its teacher stays as it is; where no gain of `GAINS` is
    enough, it gets the one that comes nearest.

    Args:
        solver: the student's sampler, of a teacher that answers ε.
        teacher_images: uint8 (N, H, W) or (N, H, W, C), what the teacher draws from the noises of `seed` on.
        runtime: how the student samples, one of `eval.models.RUNTIMES`.

    Raises:
        InputError: the teacher sees no noise at all.
    """
    labels = choose_labels(teacher, solver.config, range(seed, seed + len(teacher_images)))
    look_at = max(solver.schedule.num_train_timesteps // 20 - 1, 0)  # little noise, whatever the number of steps
    goal = noise_left(teacher, teacher_images, look_at, labels)
    if not goal > 0:
        raise InputError("the teacher sees no noise in its own images: gain_images must be 0")
    tried: dict[float, float] = {}
    with progress("matching the noise that is left", len(GAINS)) as advance:
        for gain in GAINS:
            denoiser = runnable(scaled(student, 1 + gain), runtime)
            images = sample(denoiser, solver, len(teacher_images), seed, batch_size, denoiser.device)
            tried[gain] = noise_left(teacher, images, look_at, labels) / goal
            advance(len(tried), f"gain {gain:.2f}: {tried[gain]:.3f} of the teacher's")
            if tried[gain] <= 1:
                break
    gain = interpolate(tried)
    if min(tried.values()) > 1:
        print(f"No gain up to {max(GAINS)} leaves as little noise as the teacher does; {gain} comes nearest.")
    return Matched(scaled(student, 1 + gain), gain, tried)


def interpolate(tried: dict[float, float]) -> float:
    """The gain at which the noise, on a line through the last two that were tried, is the teacher's."""
    *before, (gain, noise) = tried.items()
    if noise > 1:
        return min(tried, key=lambda gain: tried[gain])
    if not before:
        return gain
    last_gain, last_noise = before[-1]
    return last_gain + (gain - last_gain) * (last_noise - 1) / (last_noise - noise)


def scaled(student: QuantizedUNet, factor: float) -> QuantizedUNet:
    """A copy of a frozen student whose ε is `factor` times as large."""
    student = copy.deepcopy(student)
    student.scale_output(factor)
    return student


@torch.no_grad()
def noise_left(teacher: UNet2DModel, images: Tensor, t: int, labels: Tensor | None = None) -> float:
    """Mean square of the ε that the teacher sees at the timestep t in `images`, uint8 (N, H, W) or (N, H, W, C)."""
    device = teacher.device

    def squares(start: int) -> float:
        part = slice(start, start + 64)
        given = () if labels is None else (labels[part].to(device),)
        return teacher(to_float(images[part]).to(device), t, *given).sample.square().sum().item()

    return sum(share_out(squares, range(0, len(images), 64))) / images.numel()
