"""Estimate the duration of each stage of a run on this machine."""

import time

import torch

from ddpm_mnist.lab.terminal import span
from ddpm_mnist.sampling.sampler import choose_conditions
from ddpm_mnist.sampling.solver import Solver
from eval.models import Model
from finetune.config import RunConfig
from quant.integer.binding import choose

# All costs are in teacher evaluations on one sample. Training on one student evaluation: the forward pass is 1, the
# backward pass 2, and a student's update costs 1.5 times a teacher's (`finetune.step_cost`).
UPDATE_COST = 4.5
# Calibration per state, and its additional cost with reconstruction.
CALIBRATION, RECONSTRUCTION = 13, 8
# One student evaluation: simulated, and with integers by instruction set (`efficientdm bench`).
SIMULATED, INTEGER = 1.5, {"avx512vnni": 0.3, "avxvnni": 0.3, "avx2": 0.4, "portable": 5}


def print_plan(config: RunConfig, teacher: Model, done: int) -> None:
    """Time a few teacher evaluations, and print the stages of the run with their estimated durations.

    Args:
        done: number of updates that were finished before the run was interrupted.
    """
    solver, options = teacher.solver(config.sampler), config.distill
    steps, teacher_steps = config.sampler.num_steps, config.teacher_sampler.num_steps
    rollout = config.recipe == "distill" and options.objective == "rollout"
    updates = options.num_updates - done
    evaluations = updates * options.batch_size * (options.rollout_steps if rollout else 1)
    student = SIMULATED if config.runtime == "simulated" else INTEGER.get(choose().isa, 1)
    calibration = CALIBRATION + RECONSTRUCTION * config.student.reconstruction
    scored = config.num_images * steps
    most = max(config.num_trajectories, config.num_images)  # no batch is larger
    unit = _seconds_per_evaluation(teacher, solver, min(config.batch_size, most))
    stages = (  # (name, cost)
        (f"{config.num_trajectories} trajectories of {teacher_steps} steps", config.num_trajectories * teacher_steps),
        ("calibration", config.calibration_trajectories * steps * calibration),
        (f"{updates} updates of {options.batch_size}" + " rollouts" * rollout, evaluations * UPDATE_COST),
        (f"scores of 3 models on {config.num_images} images", scored * (1 + 2 * student)),
    )
    for stage, cost in stages:
        print(f"{stage:<40} about {span(cost * unit)}")
    print(f"{'together, on this machine':<40} about {span(sum(cost for _, cost in stages) * unit)}", flush=True)


@torch.no_grad()
def _seconds_per_evaluation(teacher: Model, solver: Solver, batch_size: int) -> float:
    """Return the seconds of a teacher evaluation per sample: the fastest of three batches."""
    at = teacher.denoiser.device
    conditions = choose_conditions(teacher.denoiser, solver.config, range(batch_size))
    conditions = {name: value.to(at) for name, value in conditions.items()}
    x, step = torch.zeros(batch_size, *teacher.shape, device=at), torch.zeros(batch_size, dtype=torch.long, device=at)
    seconds = []
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        solver.model_output(teacher.denoiser, step, x, conditions).sum().item()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / batch_size
