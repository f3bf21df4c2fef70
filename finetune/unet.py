"""Distil a student of any diffusers UNet with one Python call."""

import copy
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_mnist.lab.run_state import RunState
from ddpm_mnist.lab.terminal import progress
from ddpm_mnist.sampling.noise_schedule import read_schedule
from ddpm_mnist.sampling.solver import Conditions, Denoiser, Solver
from eval.models import Model, digest
from finetune.config import RunConfig, student_fields
from finetune.make import make_student
from finetune.trajectories import Trajectories, make_trajectories
from quant import QuantizedUNet
from quant.context import plain_torch
from quant.structure import check_structure


@plain_torch()
def distill_unet(
    unet: nn.Module,
    scheduler: Any,
    weight_bits: float = 4,
    act_bits: int = 4,
    *,
    config: RunConfig | None = None,
    states: Mapping[float, Tensor] | None = None,
    output: str | Path | None = None,
    **conditions: Tensor,
) -> QuantizedUNet:
    """Quantize `unet` and distil it on its own denoising trajectories, without data.

    This does the same as `efficientdm distill --teacher FOLDER`: sample trajectories from noise, calibrate, distil,
    freeze.

    Example:
        >>> student = distill_unet(pipeline.unet, pipeline.scheduler, weight_bits=4, act_bits=4)
        >>> student.save_pretrained("my-student")
        >>> integer = quant.to_integer(student)  # integer(x, t).sample

    Args:
        unet: a UNet2DModel or UNet2DConditionModel; it is not modified.
        scheduler: the diffusers scheduler that it was trained with, which gives the noise schedule and the prediction
            type. The solver and its number of steps come from `config.sampler`.
        weight_bits: 1, 1.58 or 2…8.
        act_bits: 2…8.
        config: all other settings; by default `RunConfig()`. For a first test:
            `RunConfig(num_trajectories=64, distill=DistillConfig(num_updates=5))`.
        states: states x_t (M, C, H, W) for each timestep t, from any sampler, to use instead of trajectories. The
            student is then trained on single states (objective "per-step").
        output: folder for the student, its scheduler and its training state, from which an interrupted call resumes.
            By default nothing is written.
        conditions: further arguments of the UNet, each (K, …): `class_labels` (K,), `encoder_hidden_states` (K, L, D).
            Trajectory i gets row i mod K; with `states`, K must be M. By default the classes of `config.sampler`.

    Returns:
        The frozen student.

    Raises:
        ValueError: the UNet or its scheduler has an unsupported part, which the message names; or `output` belongs to
            another configuration.
    """
    config = config or RunConfig()
    bits = dataclasses.replace(config.student, weight_bits=weight_bits, act_bits=act_bits)
    config = dataclasses.replace(config, student=bits, runtime="simulated")
    check_structure(unet)
    teacher: Any = copy.deepcopy(unet).float().eval().requires_grad_(False)
    solver: Any
    if states is None:
        solver, buffer = _sample(teacher, scheduler, config, conditions)
    else:
        solver, buffer = _evaluate(teacher, states, conditions, config.batch_size)
        count = min(config.calibration_trajectories, len(buffer.x))
        distill = dataclasses.replace(config.distill, objective="per-step")
        config = dataclasses.replace(
            config, distill=distill, num_trajectories=len(buffer.x), calibration_trajectories=count
        )
    identity = {"unet": digest(teacher.state_dict()), "states": digest(states or {}), "inputs": digest(conditions)}
    identity |= {"scheduler": str(dict(scheduler.config))}
    with tempfile.TemporaryDirectory() as nowhere:
        folder = Path(output or nowhere)
        run = RunState(folder, student_fields(config) | identity)
        student = make_student(config, teacher, solver, buffer, run).student
        if output is not None:
            scheduler.save_pretrained(folder / "scheduler")
            student.save_pretrained(folder)  # last, so that a folder with a config.json is complete
        run.finish()
    return student


def _sample(teacher: Any, scheduler: Any, config: RunConfig, conditions: Conditions) -> tuple[Solver, Trajectories]:
    """Sample trajectories of the UNet with the noise schedule of `scheduler`."""
    # As in the scheduler's file, but with all fields set, also those at the defaults of the class.
    fields = {**scheduler.config, "_class_name": type(scheduler).__name__, "_use_default_values": []}
    model = Model("unet", teacher, read_schedule(fields))
    solver, fine = model.solver(config.sampler), model.solver(config.teacher_sampler)
    with progress("teacher's trajectories", config.num_trajectories) as advance:
        options = config.num_trajectories, config.seed, config.batch_size, teacher.device, advance, conditions or None
        return solver, make_trajectories(teacher, fine, *options).every(config.teacher_steps)


class _StatesOnly:
    """The part of `Solver` that training on given states needs: their timesteps."""

    def __init__(self, timesteps: Sequence[float]):
        self.timesteps = torch.tensor(timesteps)

    def model_output(self, denoiser: Denoiser, step: Tensor, x: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(x, self.timesteps.to(x.device)[step], **conditions).sample


@torch.no_grad()
def _evaluate(
    teacher: Any, states: Mapping[float, Tensor], conditions: Conditions, batch_size: int
) -> tuple[_StatesOnly, Trajectories]:
    """Evaluate the UNet at the given states, and return them with its outputs as `Trajectories`."""
    shapes, rows = {x.shape for x in states.values()}, {len(x) for x in (*states.values(), *conditions.values())}
    if len(shapes) != 1 or len(rows) != 1:
        raise ValueError("states must have one shape (M, C, H, W) at all timesteps, and each condition M rows")
    x = torch.stack(list(states.values()), dim=1).to(teacher.device, torch.float32)
    buffer = Trajectories(x, x, {name: value.to(teacher.device) for name, value in conditions.items()})
    solver, outputs = _StatesOnly(list(states)), []
    for who in torch.arange(len(x), device=x.device).split(batch_size):
        steps = (torch.full_like(who, step) for step in range(len(states)))
        of_steps = [solver.model_output(teacher, s, x[who, s], buffer.conditions_of(who)) for s in steps]
        outputs.append(torch.stack(of_steps, dim=1))
    return solver, dataclasses.replace(buffer, outputs=torch.cat(outputs))
