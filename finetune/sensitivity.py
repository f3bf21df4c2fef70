"""How much an error at each denoising step costs the image: what the rollouts' loss is weighted with."""

import torch
from torch import Tensor

from ddpm_mnist.sampler import Denoiser, Solver
from finetune.trajectories import Trajectories


@torch.no_grad()
def step_sensitivity(teacher: Denoiser, student: Denoiser, solver: Solver, trajectories: Trajectories) -> Tensor:
    """The amplification of an error from each state to the image, float (T,), mean 1.

    At each step alone the student takes the teacher's place, and the teacher denoises what comes out to the end;
    entry k is the squared error of the image over that of the state after step k, means over the teacher's
    `trajectories` under this solver. An error of the first half grows some ten times as much as one of the last
    steps, though it is the smaller: it decides which digit appears, and with how much ink.
    """
    x_true, eps_true = trajectories.x, trajectories.eps
    count, num_steps = eps_true.shape[:2]
    amplification = []
    for first in range(num_steps):
        before = max(first - 1, 0)
        step = torch.full((count,), before, device=x_true.device)
        x0_prev = solver.predict_x0(step, x_true[:, before], eps_true[:, before])
        x, denoiser = x_true[:, first], student
        for number in range(first, num_steps):
            step = torch.full_like(step, number)
            t = solver.timesteps.to(step.device)[step]
            x0 = solver.predict_x0(step, x, denoiser(x, t).sample)
            x, x0_prev, denoiser = solver.advance(step, x, x0, x0_prev), x0, teacher
            if number == first:
                error = (x - x_true[:, number + 1]).square().mean()
        # A student that equals its teacher makes no error, which does not grow.
        amplification.append((x - x_true[:, -1]).square().mean() / error.clamp(min=1e-12))
    weights = torch.stack(amplification)
    return weights / weights.mean()
