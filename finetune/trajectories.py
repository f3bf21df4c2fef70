"""Sample the training data: trajectories of the teacher's denoising from noise."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddpm_mnist.lab.processes import share_out
from ddpm_mnist.sampling.sampler import SEED_LIMIT, batches, choose_conditions, denoise
from ddpm_mnist.sampling.solver import Conditions, Denoiser, Solver
from quant.context import plain_torch

# Noise seeds have 32 bits. Sampled and scored images use those below 2^31. Above, the trajectories of each training
# seed have a separate range of NOISES seeds.
NOISES = 1 << 18
MAX_SEED = (1 << 13) - 1


@dataclass
class Trajectories:
    """M trajectories of T steps.

    Attributes:
        x: float (M, T + 1, C, H, W), the states from noise (0) to image (T).
        outputs: float (M, T, C, H, W), the teacher's output at each state but the last, with the sampler's guidance.
        conditions: further arguments of the teacher and the student, each (M, …), such as class_labels.
    """

    x: Tensor
    outputs: Tensor
    conditions: Conditions = field(default_factory=dict)

    def conditions_of(self, who: Tensor) -> Conditions:
        """Return the conditions of the trajectories `who` long (N,)."""
        return {name: value[who] for name, value in self.conditions.items()}

    def every(self, stride: int) -> "Trajectories":
        """Return every `stride`-th state, for a student whose steps are `stride` times as long."""
        return Trajectories(self.x[:, ::stride], self.outputs[:, ::stride], self.conditions)


def first_noise(seed: int) -> int:
    """Return the first noise seed of the trajectories for the training seed `seed`."""
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
    conditions: Conditions | None = None,
) -> Trajectories:
    """Sample `count` trajectories of the teacher from noise, and keep all states on `device`.

    The batches are distributed over the processes; each gets all trajectories.

    Args:
        count: M, at most 2^18.
        seed: 0 … 2^13 - 1; each has a separate range of noise seeds, which scored images do not use.
        conditions: further arguments of the teacher, each (K, …); trajectory i gets row i mod K. None: the classes
            of `solver.config`.
    """

    first = first_noise(seed)
    if conditions is None:
        conditions = choose_conditions(teacher, solver.config, range(first, first + count))
    rows = torch.arange(count)
    conditions = {name: value[rows.to(value.device) % len(value)].to(device) for name, value in conditions.items()}

    def record(seeds: range) -> tuple[Tensor, Tensor]:
        own = {name: value[seeds.start - first : seeds.stop - first] for name, value in conditions.items()}
        steps = list(denoise(teacher, solver, seeds, device, own))
        states = torch.stack([steps[0].x, *(step.x_next for step in steps)], dim=1)
        return states.cpu(), torch.stack([step.output for step in steps], dim=1).cpu()

    parts = list(batches(first, count, batch_size))
    recorded = share_out(record, parts, lambda done: progress(min(done * batch_size, count)))
    states, outputs = (torch.cat(tensors).to(device) for tensors in zip(*recorded, strict=True))
    return Trajectories(states, outputs, conditions)
