"""The mean error of every denoising step, taken back after training."""

import torch

from ddpm_mnist.sampler import Solver
from finetune.trajectories import Trajectories
from quant import QuantizedUNet

# Offsets are sought in ± this; ε has variance 1.
LARGEST = 0.05


@torch.no_grad()
def match_means(student: QuantizedUNet, solver: Solver, buffer: Trajectories, batch_size: int = 64) -> None:
    """Set `student.eps_offset` so that its own trajectories keep the mean of the teacher's, step after step.

    A squared error is least at the mean of what is uncertain, which has less ink than a digit. The student denoises
    the buffer's noises; at each step one number is added to ε, by bisection, such that the next states have the
    mean over images and pixels that the teacher's have. Its effect on later steps is part of what they see.
    """
    x, num_steps = buffer.x[:, 0], buffer.eps.shape[1]
    x0_prev = torch.zeros_like(x)
    with student.shared_weights():
        for number in range(num_steps):
            step = torch.full((len(x),), number, device=x.device)
            t = solver.timesteps.to(x.device)[step]
            student.eps_offset[number] = 0.0
            pairs = zip(x.split(batch_size), t.split(batch_size), strict=True)
            eps = torch.cat([student(some, times).sample for some, times in pairs])
            target = buffer.x[:, number + 1].mean()
            low, high = -LARGEST, LARGEST
            for _ in range(20):
                middle = (low + high) / 2
                x0 = solver.predict_x0(step, x, eps + middle)
                x_next = solver.advance(step, x, x0, x0_prev)
                # The more noise is predicted, the darker the state.
                low, high = (middle, high) if x_next.mean() > target else (low, middle)
            student.eps_offset[number] = middle
            x, x0_prev = x_next, x0
