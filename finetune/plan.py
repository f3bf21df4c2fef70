"""Estimate how long each stage of a run takes on this machine."""

import time

import torch

from ddpm_mnist.lab.terminal import span
from ddpm_mnist.sampling.sampler import choose_conditions
from ddpm_mnist.sampling.solver import Solver
from eval.models import Model
from finetune.config import RunConfig
from quant.integer.core import choose

# Costs in evaluations of the teacher on one sample. Learning from one of the student: forwards and twice backwards make
# three, and a student's update costs 1.5 times a teacher's (`finetune.step_cost`).
LEARNING = 4.5
# Calibration, for each state that it looks at, and what reconstruction adds.
CALIBRATION, RECONSTRUCTION = 13, 8
# An evaluation of the student: simulated, and on integers (`efficientdm bench`).
SIMULATED, INTEGER = 1.5, {"avx512vnni": 0.3, "avxvnni": 0.3, "avx2": 0.4, "portable": 5}


def print_plan(config: RunConfig, teacher: Model, done: int) -> None:
    """Print the stages, and about how long each takes on this machine, from a few evaluations of the teacher.

    Args:
        done: updates of an earlier start.
    """
    solver, options = teacher.solver(config.sampler), config.distill
    steps, teacher_steps = config.sampler.num_steps, config.teacher_sampler.num_steps
    rollout = config.recipe == "distill" and options.objective == "rollout"
    updates = options.num_updates - done
    evaluations = updates * options.batch_size * (options.rollout_steps if rollout else 1)
    student = SIMULATED if config.runtime == "simulated" else INTEGER.get(choose().isa, 1)
    calibration = CALIBRATION + RECONSTRUCTION * config.student.reconstruction
    scored = config.num_images * steps
    most = max(config.num_trajectories, config.num_images)  # of one batch
    unit = _seconds_per_evaluation(teacher, solver, min(config.batch_size, most))
    stages = (  # and their costs, in evaluations of the teacher on one sample
        (f"{config.num_trajectories} trajectories of {teacher_steps} steps", config.num_trajectories * teacher_steps),
        ("calibration", config.calibration_trajectories * steps * calibration),
        (f"{updates} updates of {options.batch_size}" + " rollouts" * rollout, evaluations * LEARNING),
        (f"scores of 3 models on {config.num_images} images", scored * (1 + 2 * student)),
    )
    for stage, cost in stages:
        print(f"{stage:<40} about {span(cost * unit)}")
    print(f"{'together, on this machine':<40} about {span(sum(cost for _, cost in stages) * unit)}", flush=True)


@torch.no_grad()
def _seconds_per_evaluation(teacher: Model, solver: Solver, batch_size: int) -> float:
    """Of one sample in a batch, in the fastest of three."""
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
