"""The only data there is: the teacher's own denoising, from noise."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_mnist.lab.processes import share_out
from ddpm_mnist.sampling.sampler import SEED_LIMIT, batches, choose_labels, denoise
from ddpm_mnist.sampling.solver import Denoiser, Solver
from quant.context import plain_torch

# Seeds have 32 bits. Those of the images that are drawn and scored lie below 2^31; from there on each buffer has a
# range of its own.
NOISES = 1 << 18
MAX_SEED = (1 << 13) - 1


@dataclass
class Trajectories:
    """M trajectories of T steps.

    Attributes:
        x: float (M, T + 1, C, H, W), the states from noise (0) to image (T).
        answers: float (M, T, C, H, W), the teacher's answer at each state but the last, guided if the sampler says so.
        labels: long (M,), the classes; None for a model without.
    """

    x: Tensor
    answers: Tensor
    labels: Tensor | None = None

    def every(self, stride: int) -> "Trajectories":
        """The states after every `stride` steps, for a student whose step is as long as that."""
        return Trajectories(self.x[:, ::stride], self.answers[:, ::stride], self.labels)


def first_noise(seed: int) -> int:
    """The seed of the first noise of the buffer of that seed."""
    return SEED_LIMIT + seed * NOISES


@plain_torch()
def make_trajectories(
    teacher: Denoiser,
    solver: Solver,
    count: int,
    seed: int,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Trajectories:
    """Denoise `count` noises with the teacher, and keep every step on `device`.

    Several processes share out the batches; each gets all trajectories.

    Args:
        count: M, at most 2^18.
        seed: 0 … 2^13 - 1; each has a range of noises of its own, which no scoring uses.
    """

    def record(seeds: range) -> tuple[Tensor, Tensor]:
        steps = list(denoise(teacher, solver, seeds, device))
        states = torch.stack([steps[0].x, *(step.x_next for step in steps)], dim=1)
        return states.cpu(), torch.stack([step.answer for step in steps], dim=1).cpu()

    first = first_noise(seed)
    parts = list(batches(first, count, batch_size))
    recorded = share_out(record, parts, lambda done: progress(min(done * batch_size, count)))
    states, answers = (torch.cat(tensors).to(device) for tensors in zip(*recorded, strict=True))
    labels = choose_labels(teacher, solver.config, range(first, first + count))
    return Trajectories(states, answers, None if labels is None else labels.to(device))
