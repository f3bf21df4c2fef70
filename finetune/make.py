"""Train a student: sample the teacher's trajectories, calibrate, distil, freeze."""

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_mnist.data import load_images
from ddpm_mnist.lab import InputError, processes
from ddpm_mnist.lab.config_file import save_config
from ddpm_mnist.lab.run_state import RunState
from ddpm_mnist.lab.terminal import progress
from ddpm_mnist.lab.write import write_json
from ddpm_mnist.sampling.sampler import choose_conditions, to_float
from ddpm_mnist.sampling.solver import Solver
from eval.models import Model, device, load_model
from finetune.baselines import published_distill, published_start
from finetune.config import RunConfig, fingerprint
from finetune.distill import distill
from finetune.trajectories import Trajectories, make_trajectories
from quant import QuantizedUNet, calibrate, freeze, quantize
from quant.context import plain_torch
from quant.integer.binding import choose
from quant.integer.program import refuse_unsupported
from quant.structure import check_structure


@dataclass
class Distilled:
    """The result of a distillation.

    Attributes:
        ptq: the calibrated student before distillation, frozen (post-training quantization).
        student: the distilled student, frozen.
        seconds: duration of each stage.
    """

    ptq: QuantizedUNet
    student: QuantizedUNet
    seconds: dict[str, float]


def distill_student(config: RunConfig) -> None:
    """Train a student: sample the teacher's trajectories from noise, calibrate, distil.

    No data is needed, except for the objective "denoising". Several processes share all stages but the calibration;
    one process with the config.yaml that they write trains the same student.

    Writes config.yaml, model.safetensors, config.json, scheduler/, log.jsonl and state/ into the run folder.

    Raises:
        InputError: the teacher does not exist, the student cannot run in `runtime`, or the folder belongs to another
            configuration.
    """
    _, run = distill_from(load_teacher(config.teacher), with_whole_batch(config))
    run.finish()


@plain_torch()
def distill_from(
    teacher: Model,
    config: RunConfig,
    buffer: Trajectories | None = None,
    announce: Callable[[RunConfig, Model, int], None] = lambda *_: None,
) -> tuple[Distilled, RunState]:
    """Train a student of a loaded teacher, as `distill_student` does, but leave the run open (and locked).

    Args:
        config: with the batch size of all processes together (see `with_whole_batch`).
        buffer: the result of `make_buffer`, if it exists already.
        announce: called before the long stages with config, teacher and the number of finished updates.
    """
    solver = check_student(config, teacher)
    images = training_images(config, teacher) if config.uses_data else None
    run = RunState(config.output, fingerprint(config, teacher), config.tracker)
    announce(config, teacher, run.progress(config.distill.num_updates)[0])
    save_config(config, config.output / "config.yaml")
    start = time.monotonic()
    buffer = make_buffer(config, teacher) if buffer is None else buffer
    seconds = {"trajectories": time.monotonic() - start}
    made = make_student(config, teacher.denoiser, solver, buffer, run, images)
    write_json(config.output / "scheduler" / "scheduler_config.json", teacher.schedule.scaled(solver.eps_scale))
    if processes.is_main():  # last, so that a folder with a config.json is complete
        made.student.save_pretrained(config.output)
    return dataclasses.replace(made, seconds=seconds | made.seconds), run


def make_student(
    config: RunConfig,
    unet: nn.Module,
    solver: Solver,
    buffer: Trajectories,
    run: RunState,
    images: Tensor | None = None,
) -> Distilled:
    """Calibrate and distil a student of `unet` on the trajectories in `buffer`, or resume from the state in `run`.

    Args:
        images: uint8, for the objective "denoising" only.
    """
    start = time.monotonic()
    torch.manual_seed(config.seed)  # for the initial adapters
    with progress("calibration", 1) as advance:
        calibrated = calibrated_student(config, unet, solver, buffer)
        advance(1)
    processes.copy_from_main(calibrated)
    ptq = freeze(calibrated)
    calibration = time.monotonic() - start

    student = copy.deepcopy(calibrated)
    if config.recipe == "published":
        published_distill(student, solver, buffer, config.distill, run, config.seed, config.lr_factor)
    else:
        distill(student, solver, buffer, config.distill, run, config.seed, images)
    processes.copy_from_main(student)
    distillation = time.monotonic() - start - calibration
    return Distilled(ptq, freeze(student), {"calibration": calibration, "distillation": distillation})


def calibrated_student(config: RunConfig, unet: nn.Module, solver: Solver, buffer: Trajectories) -> QuantizedUNet:
    """Quantize `unet`, and calibrate its activation ranges on the first `calibration_trajectories` trajectories."""
    timesteps, count = solver.timesteps.tolist(), config.calibration_trajectories
    states = calibration_states(buffer, solver, count)
    conditions = {name: value[:count] for name, value in buffer.conditions.items()}
    null = config.sampler.null_class
    if "class_labels" in conditions and null is not None and config.sampler.guidance_scale != 1:
        # With guidance, half of the network's evaluations are for the null class.
        states = {t: torch.cat([x, x]) for t, x in states.items()}
        labels = conditions["class_labels"]
        conditions["class_labels"] = torch.cat([labels, torch.full_like(labels, null)])
    if config.recipe == "published":
        return published_start(unet, config.student, timesteps, states, **conditions)
    student = quantize(unet, config.student, timesteps)
    calibrate(student, states, **conditions)
    return student


def calibration_states(buffer: Trajectories, solver: Solver, count: int) -> dict[int, torch.Tensor]:
    """Return the states x_t (count, C, H, W) of the first `count` trajectories at each timestep t of the solver."""
    return {t: buffer.x[:count, step] for step, t in enumerate(solver.timesteps.tolist())}


def with_whole_batch(config: RunConfig) -> RunConfig:
    """Return `config` with the distillation's batch size multiplied by the number of processes."""
    batch_size = config.distill.batch_size * processes.count()
    return dataclasses.replace(config, distill=dataclasses.replace(config.distill, batch_size=batch_size))


def load_teacher(name: str) -> Model:
    """Load a model (see `load_model`); raise InputError unless it has full precision."""
    teacher = load_model(name)
    if teacher.weight_bits != 32:
        raise InputError(f'the teacher must be of full precision, "{name}" is {teacher.bits}')
    return teacher


def check_student(config: RunConfig, teacher: Model) -> Solver:
    """Return the student's solver; raise InputError for settings that would only fail after the long stages."""
    solver, teacher_solver = teacher.solver(config.sampler), teacher.solver(config.teacher_sampler)
    try:
        check_structure(teacher.denoiser)
        if config.runtime == "integer":
            refuse_unsupported(teacher.denoiser)
            choose()
    except ValueError as error:
        raise InputError(f'no student of "{config.teacher}" as runtime "{config.runtime}": {error}') from error
    fine = teacher_solver.timesteps[:: config.teacher_steps]
    if not torch.equal(fine, solver.timesteps):
        if config.recipe == "published" and config.teacher_steps == 1:
            raise InputError('recipe "published" has DDIM\'s timesteps, which are others: take sampler.solver "ddim"')
        raise InputError(f"teacher_steps {config.teacher_steps}: the student's timesteps are not the teacher's")
    return solver


def training_images(config: RunConfig, teacher: Model) -> torch.Tensor:
    """Load the images for the objective "denoising"; raise InputError unless they fit the teacher."""
    images = processes.from_main(lambda: load_images(config.data))
    if choose_conditions(teacher.denoiser, config.sampler, range(1)):
        raise InputError('distill.objective "denoising" is for teachers without classes')
    if (shape := tuple(to_float(images[:1]).shape[1:])) != teacher.shape:
        raise InputError(f"data: {config.data} has images of {shape}, the teacher draws {teacher.shape}")
    return images


def make_buffer(config: RunConfig, teacher: Model) -> Trajectories:
    """Sample the teacher's trajectories from noise, with one state per step of the student."""
    with progress("teacher's trajectories", config.num_trajectories) as advance:
        options = config.num_trajectories, config.seed, config.batch_size, device(), advance
        buffer = make_trajectories(teacher.denoiser, teacher.solver(config.teacher_sampler), *options)
    return buffer.every(config.teacher_steps)
