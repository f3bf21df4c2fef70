"""Measure time and memory of one update: distillation compared with ordinary training of the teacher."""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from ddpm_mnist.lab.command import run_command
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from ddpm_mnist.scheduler import make_noise_schedule
from eval.bench.memory import peak_memory
from eval.models import load_model
from finetune.distill import DistillConfig, distillation_loss, parameter_groups
from finetune.make import calibration_states
from finetune.trajectories import make_trajectories
from quant import QuantConfig, calibrate, quantize
from quant.context import plain_torch


@dataclass
class StepCostConfig:
    batch_size: int = 64
    """Images per update of the teacher and of the per-step objective, at least 1."""
    rounds: int = 9
    """Rounds, at least 1: each times one update of every kind. The table shows medians."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@plain_torch()
@torch.enable_grad()
def measure_step_cost(config: StepCostConfig) -> dict[str, float]:
    """Time one update of each kind; print medians, peak memory, and their ratios to the teacher's.

    The student and the rollout have the settings of the quick run.
    """
    unet = load_model("teacher").denoiser.cpu()
    solver = Solver(SamplerConfig())
    buffer = make_trajectories(unet, solver, 16, seed=0)
    student = quantize(unet, QuantConfig(rank=16), solver.timesteps.tolist())
    calibrate(student, calibration_states(buffer, solver, 16))
    unet.requires_grad_(True)
    schedule = make_noise_schedule()

    def updater(parameters: list[nn.Parameter], loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.Adam(parameters, lr=1e-9, fused=True)

        def update() -> None:
            optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        return update

    def teacher_loss(count: int) -> torch.Tensor:
        t, eps = torch.randint(1000, (count,)), torch.randn(count, 1, 28, 28)
        return F.mse_loss(unet(schedule.add_noise(torch.zeros_like(eps), eps, t), t).sample, eps)

    def student_updater(options: DistillConfig) -> Callable[[], None]:
        learned = [parameter for group in parameter_groups(student, options) for parameter in group["params"]]
        return updater(learned, lambda: distillation_loss(student, solver, buffer, options, seed=0, update=0))

    batch, teacher, rollout = config.batch_size, list(unet.parameters()), DistillConfig("rollout")
    evaluations = rollout.batch_size * rollout.rollout_steps
    kinds = {  # pairs: a teacher's update, then the distillation that is compared with it
        f"teacher, batch {batch}": updater(teacher, lambda: teacher_loss(batch)),
        f"per-step distillation, batch {batch}": student_updater(DistillConfig("per-step", batch_size=batch)),
        f"teacher, batch {evaluations}": updater(teacher, lambda: teacher_loss(evaluations)),
        f"rollout distillation, {rollout.batch_size} trajectories × {rollout.rollout_steps} steps": student_updater(
            rollout
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    memory = {}
    for name, update in kinds.items():  # the first update allocates the optimizer's state
        update()
        memory[name] = peak_memory(update)
    for _ in range(config.rounds):
        for name, update in kinds.items():
            start = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    table = Table(title=f"One update, median of {config.rounds} rounds ({machine}, torch {torch.__version__})")
    table.add_column("kind")
    for column in ("seconds", "ratio", "MiB", "ratio"):
        table.add_column(column, justify="right")
    names = list(kinds)
    for index, name in enumerate(names):
        beside = names[index // 2 * 2]
        cells = [f"{medians[name]:.3f}", f"{medians[name] / medians[beside]:.2f}"]
        if (ours := memory[name]) is not None and (theirs := memory[beside]):
            cells += [f"{ours:.0f}", f"{ours / theirs:.2f}"]
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return medians


if __name__ == "__main__":
    run_command("python -m finetune.step_cost", measure_step_cost, StepCostConfig, sys.argv[1:])
