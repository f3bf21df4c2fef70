"""The main job: sample the teacher's trajectories → calibrate → distil → score → grid → report."""

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from ddpm_mnist.data import load_images
from ddpm_mnist.lab import InputError, processes
from ddpm_mnist.lab.config_file import save_config
from ddpm_mnist.lab.run_state import RunState, read_log
from ddpm_mnist.lab.terminal import progress, span
from ddpm_mnist.lab.tracking import check_tracker
from ddpm_mnist.lab.write import write_bytes, write_json
from ddpm_mnist.sampling.noise import STREAM
from ddpm_mnist.sampling.sampler import SEED_LIMIT, choose_labels, to_float
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from eval.features import load_ruler
from eval.fid import print_scores, score_images
from eval.grid import fid_label, row_label
from eval.models import Model, check_runtime, device, load_model, runnable
from eval.plots import image_grid, loss_curve, step_sizes, to_png
from eval.report import write_report
from eval.sample import DrawConfig, draw
from finetune.baselines import published_distill, published_start
from finetune.distill import DistillConfig, distill
from finetune.trajectories import MAX_SEED, NOISES, Trajectories, make_trajectories
from quant import QuantConfig, QuantizedUNet, calibrate, freeze, quantize
from quant.context import plain_torch
from quant.integer.core import choose
from quant.integer.program import refuse_unsupported
from quant.structure import check_structure
from quant.summary import shares, summarise


@dataclass
class RunConfig:
    """A student: made, scored and drawn."""

    output: Path = Path("runs/student")
    """Run folder. A run that was interrupted goes on from its last state."""
    teacher: str = "teacher"
    """The full-precision model: a released name, or a folder of diffusers."""
    seed: int = 0
    """Seeds the adapters, the noise of the buffer and, with the update's number, what an update draws: 0 to 8191."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    student: QuantConfig = field(default_factory=QuantConfig)
    recipe: str = "distill"
    """"distill": as the sections student and distill say. "published": as the paper's training code has it
    (finetune/baselines.py), with their bits, rank, batch and number of updates."""
    lr_factor: float = 1.0
    """What the published learning rates are multiplied with, above 0, under that recipe alone."""
    teacher_steps: int = 1
    """Steps of the teacher that one step of the student stands for, at least 1."""
    num_trajectories: int = 2048
    """Trajectories of the teacher in the buffer, from 1 to 2^18."""
    calibration_trajectories: int = 64
    """How many of them the calibration of the activations looks at, at least 1."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: str = "mnist"
    """For distill.objective "denoising" alone: the images, as the teacher's config names them."""
    num_images: int = 2000
    """Images to score each model on, at least 2 and grid_columns."""
    features: str | None = None
    """The ruler: a folder of `efficientdm features`, or "inception". None: the released one, of MNIST. Images that it
    does not fit are compared with the teacher's alone."""
    score_seed: int = 0
    """The first seed of the images that are scored, 0 to 2^31 - num_images."""
    batch_size: int = 64
    """Images that are sampled at once, at least 1."""
    grid_columns: int = 12
    """Images per row of the grid, at least 1."""
    runtime: str = "integer"
    """How the student runs when it is scored: "integer", or "simulated" in float."""
    tracker: str = "none"
    """Where the loss, step sizes and the grid are shown besides: "none", "tensorboard", "wandb" or "trackio"."""

    def __post_init__(self) -> None:
        if self.recipe not in ("distill", "published"):
            raise ValueError(f'recipe must be "distill" or "published", not "{self.recipe}"')
        if self.lr_factor <= 0:
            raise ValueError(f"lr_factor must be positive, not {self.lr_factor}")
        if self.lr_factor != 1 and self.recipe != "published":
            raise ValueError('lr_factor must be 1 but for the recipe "published"')
        for name in ("teacher_steps", "num_trajectories", "calibration_trajectories", "batch_size", "grid_columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_runtime(self.runtime)
        check_tracker(self.tracker)
        if self.calibration_trajectories > self.num_trajectories:
            raise ValueError(f"calibration_trajectories must be at most num_trajectories, {self.num_trajectories}")
        if self.num_images < max(2, self.grid_columns):
            raise ValueError(f"num_images must be at least 2 and grid_columns, not {self.num_images}")
        if self.num_trajectories > NOISES:
            raise ValueError(f"num_trajectories must be at most 2^18, {NOISES}, not {self.num_trajectories}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must lie in 0…{MAX_SEED}, not {self.seed}")
        if self.num_images > SEED_LIMIT:
            raise ValueError(f"num_images must be at most 2^31, not {self.num_images}")
        if not 0 <= self.score_seed <= SEED_LIMIT - self.num_images:
            raise ValueError(f"score_seed must lie in 0…2^31 - num_images, not {self.score_seed}")
        if self.distill.rollout_steps > self.sampler.num_steps and self.distill.objective == "rollout":
            raise ValueError(f"distill.rollout_steps must be at most sampler.num_steps, {self.sampler.num_steps}")
        if self.sampler.eta:
            raise ValueError("sampler.eta must be 0: distillation needs the teacher's exact trajectory")

    @property
    def teacher_sampler(self) -> SamplerConfig:
        """How the teacher fills the buffer."""
        if self.recipe == "published":
            return dataclasses.replace(self.sampler, solver="ddim", eta=1.0, eps_scale=1.0)
        return dataclasses.replace(self.sampler, num_steps=self.sampler.num_steps * self.teacher_steps)


@dataclass
class Made:
    """What a distillation leaves behind."""

    config: RunConfig
    """With the batch of all processes together."""
    teacher: Model
    ptq: QuantizedUNet
    """The student before distillation, frozen."""
    student: QuantizedUNet
    """The student, frozen."""
    seconds: dict[str, float]
    """Seconds per stage."""
    run: RunState
    """Its folder, locked, and its tracker."""


def load_teacher(argument: str) -> Model:
    """The model of that name or folder; InputError if there is none, or if it is not of full precision."""
    teacher = load_model(argument)
    if teacher.weight_bits != 32:
        raise InputError(f'the teacher must be of full precision, "{argument}" is {teacher.bits}')
    return teacher


@plain_torch()
def distill_student(config: RunConfig, announce: Callable[[RunConfig, Model, int], None] = lambda *_: None) -> Made:
    """Make a student: sample the teacher's trajectories from noise, calibrate, distil.

    Needs no data, but for the objective "denoising". Several processes share out all but the calibration; the
    config.yaml that they leave makes the same student in one.

    Writes config.yaml, model.safetensors, config.json, scheduler/, log.jsonl and state/ into the run folder.

    Args:
        announce: called with the config, the teacher and the number of updates that are done already, once all is well.

    Raises:
        InputError: no such teacher; the student cannot run as `runtime` says; or the folder belongs to another
            configuration.
    """
    batch_size = config.distill.batch_size * processes.count()
    config = dataclasses.replace(config, distill=dataclasses.replace(config.distill, batch_size=batch_size))
    teacher = load_teacher(config.teacher)
    solver = check_student(config, teacher)
    images = _training_images(config, teacher) if _uses_data(config) else None
    run = RunState(config.output, fingerprint(config, teacher), config.tracker)
    announce(config, teacher, run.progress(config.distill.num_updates)[0])
    save_config(config, config.output / "config.yaml")
    stopwatch = _Stopwatch()
    drawn = dataclasses.astuple(config.teacher_sampler)
    buffer = _trajectories(config.teacher, drawn, config.num_trajectories, config.seed, config.batch_size)
    buffer = buffer.every(config.teacher_steps)
    stopwatch.lap("trajectories")

    torch.manual_seed(config.seed)
    timesteps = solver.timesteps.tolist()
    states = calibration_states(buffer, solver, config.calibration_trajectories)
    conditions = {}
    if buffer.labels is not None:
        labels, null = buffer.labels[: config.calibration_trajectories], config.sampler.null_class
        if null is not None and config.sampler.guidance_scale != 1:  # then half of all that is asked is of this class
            states = {t: torch.cat([x, x]) for t, x in states.items()}
            labels = torch.cat([labels, torch.full_like(labels, null)])
        conditions = {"class_labels": labels}
    with progress("calibration", 1) as advance:
        if config.recipe == "published":
            ptq = published_start(teacher.denoiser, config.student, timesteps, states, **conditions)
        else:
            ptq = quantize(teacher.denoiser, config.student, timesteps)
            calibrate(ptq, states, **conditions)
        advance(1)
    processes.copy_from_main(ptq)
    frozen_ptq = freeze(ptq)
    stopwatch.lap("calibration")

    student = copy.deepcopy(ptq)
    if config.recipe == "published":
        published_distill(student, solver, buffer, config.distill, run, config.seed, config.lr_factor)
    else:
        distill(student, solver, buffer, config.distill, run, config.seed, images)
    processes.copy_from_main(student)
    stopwatch.lap("distillation")
    student = freeze(student)
    write_json(config.output / "scheduler" / "scheduler_config.json", teacher.schedule.scaled(solver.eps_scale))
    if processes.is_main():  # last: a folder with a config.json is whole
        student.save_pretrained(config.output)
    return Made(config, teacher, frozen_ptq, student, stopwatch.seconds, run)


def check_student(config: RunConfig, teacher: Model) -> Solver:
    """The sampler that the student will have; InputError for what would fail after the long part."""
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


def _training_images(config: RunConfig, teacher: Model) -> torch.Tensor:
    """What the objective "denoising" learns from; InputError where it does not fit the teacher."""
    images = processes.from_main(lambda: load_images(config.data))
    if choose_labels(teacher.denoiser, config.sampler, range(1)) is not None:
        raise InputError('distill.objective "denoising" is for teachers without classes')
    if (shape := tuple(to_float(images[:1]).shape[1:])) != teacher.shape:
        raise InputError(f"data: {config.data} has images of {shape}, the teacher draws {teacher.shape}")
    return images


@lru_cache(maxsize=3)  # the rungs of a ladder share them, seed by seed
def _trajectories(teacher: str, sampler: tuple, count: int, seed: int, batch_size: int) -> Trajectories:
    model = load_model(teacher)
    with progress("teacher's trajectories", count) as advance:
        solver = model.solver(SamplerConfig(*sampler))
        return make_trajectories(model.denoiser, solver, count, seed, batch_size, device(), advance)


def calibration_states(buffer: Trajectories, solver: Solver, count: int) -> dict[int, torch.Tensor]:
    """The first `count` trajectories' states x_t (count, C, H, W) at each timestep t of the solver."""
    return {t: buffer.x[:count, step] for step, t in enumerate(solver.timesteps.tolist())}


@plain_torch()
def run(config: RunConfig) -> Path:
    """The main job: trajectories from noise → calibration → distillation → scores → grid → report.

    Writes a run folder: the student, config.yaml, metrics.json (teacher, ptq, student), log.jsonl, grid.png,
    step_sizes.png, loss.png and report.html.

    Raises:
        InputError: no such teacher, or the folder belongs to another configuration.
    """
    ruler = load_ruler(config.features)
    load_teacher(config.teacher).check_pictures()
    made = distill_student(config, print_plan)
    config = made.config
    bits = config.student.weight_bits, config.student.act_bits
    models = [
        dataclasses.replace(made.teacher, name="teacher"),
        Model("ptq", runnable(made.ptq, config.runtime), made.teacher.schedule, *bits),
        Model("student", runnable(made.student, config.runtime), made.teacher.schedule, *bits),
    ]
    drawing = DrawConfig(
        **dataclasses.asdict(config.sampler),
        num_images=config.num_images,
        seed=config.score_seed,
        batch_size=config.batch_size,
        runtime=config.runtime,
    )
    drawn = [draw(model, drawing) for model in models]
    teacher_images, _ = drawn[0]
    scores, rows = [], []
    for model, (images, seconds) in zip(models, drawn, strict=True):
        scores.append(score_images(model, images, seconds, teacher_images, drawing, ruler))
        fid, same_digit = scores[-1].fid, None if model.weight_bits == 32 else scores[-1].same_digit
        label = row_label(model, "" if fid is None else fid_label(fid, config.num_images, same_digit))
        rows.append((label, images[: config.grid_columns]))
    write_json(config.output / "metrics.json", [dataclasses.asdict(score) for score in scores])
    if not processes.is_main():
        return config.output

    labels = choose_labels(made.student, config.sampler, range(1))
    conditions = {} if labels is None else {"class_labels": labels.to(made.student.device)}
    layers = summarise(made.student, made.teacher.shape, **conditions)
    log = read_log(config.output / "log.jsonl")
    names, quantizers = zip(*((name, layer.act_quantizer) for name, layer in made.student.layers()), strict=True)
    figures = {
        "grid": image_grid(rows),
        "loss": loss_curve([row["update"] for row in log], [row["loss"] for row in log]),
        "step_sizes": step_sizes(
            names, made.student.clock.timesteps, torch.stack([q.scale.detach().cpu() for q in quantizers])
        ),
    }
    for name, figure in figures.items():
        write_bytes(config.output / f"{name}.png", to_png(figure))
    made.run.tracker.picture("grid", (config.output / "grid.png").read_bytes(), config.distill.num_updates)
    write_report(
        config.output / "report.html",
        title=_title(config, models[-1].bits),
        facts=_facts(config, made, log[-1]["seconds"] if log else 0.0),
        scores=scores,
        floor=ruler.floor,
        layers=layers,
        config=(config.output / "config.yaml").read_text("utf-8"),
        **figures,
    )
    made.run.finish()
    print_scores(scores, ruler.floor)
    print("Bits:", ", ".join(f"{key} {macs:.1%} of the MACs" for key, (_, macs) in shares(layers).items()))
    print(f"Pictures: {', '.join(str(config.output / f'{name}.png') for name in figures)}")
    print(f"Report:   {config.output / 'report.html'}")
    return config.output


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
    for what, cost in stages:
        print(f"{what:<40} about {span(cost * unit)}")
    print(f"{'together, on this machine':<40} about {span(sum(cost for _, cost in stages) * unit)}", flush=True)


@torch.no_grad()
def _seconds_per_evaluation(teacher: Model, solver: Solver, batch_size: int) -> float:
    """Of one sample in a batch, in the fastest of three."""
    labels, at = choose_labels(teacher.denoiser, solver.config, range(batch_size)), teacher.denoiser.device
    x, step = torch.zeros(batch_size, *teacher.shape, device=at), torch.zeros(batch_size, dtype=torch.long, device=at)
    seconds = []
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        solver.ask(teacher.denoiser, step, x, None if labels is None else labels.to(at)).sum().item()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / batch_size


def fingerprint(config: RunConfig, teacher: Model) -> dict:
    """What decides the student: its part of the configuration, the teacher's very weights, and where noise is from."""
    fields = dataclasses.asdict(config)
    for free in ("output", "teacher", "num_images", "features", "score_seed", "grid_columns", "tracker"):
        del fields[free]
    for free in ("log_every", "save_every"):
        del fields["distill"][free]
    schedule = {"teacher's scheduler": teacher.schedule.fields, "noise": STREAM}
    return {**fields, "teacher's weights": teacher.weights_digest(), **schedule}


def _title(config: RunConfig, bits: str) -> str:
    return f"{bits} student, " + (f"trained on {config.data}" if _uses_data(config) else "distilled without data")


def _uses_data(config: RunConfig) -> bool:
    return config.recipe == "distill" and config.distill.objective == "denoising"


def _facts(config: RunConfig, made: Made, distillation: float) -> list[str]:
    bits, options, seconds = config.student, config.distill, made.seconds
    shortcut = ", shortcut over the last skip" if bits.edge_shortcut else ""
    apart = bits.per_step and config.recipe == "distill"
    ranges = "for each denoising step" if apart else "for all denoising steps together"
    if config.recipe == "published":
        what = "the recipe of EfficientDM's published code"
    elif options.objective == "rollout":
        what = f"rollouts of {options.rollout_steps} steps"
    else:
        what = f"the objective “{options.objective}”"
    adapted = config.recipe == "published" or options.learn == "adapters"
    learned = f"adapters of rank {bits.rank}" if adapted else "weights, biases, normalisations"
    if config.recipe == "distill" and adapted and options.lr_affine:
        learned += ", biases, normalisations"
    return [
        f"The teacher denoised {config.num_trajectories} noises with {config.teacher_sampler.solver} in "
        f"{config.teacher_sampler.num_steps} steps ({seconds['trajectories']:.0f} s). "
        + (f"The student learned on {config.data} itself." if _uses_data(config) else "No data was used."),
        f"Weights {bits.weight_bits} bits, activations {bits.act_bits} bits; first and last convolution{shortcut} and "
        f"time embedding {bits.edge_bits} bits, their inputs {bits.edge_act_bits}. Activation ranges were set {ranges} "
        f"on {config.calibration_trajectories} trajectories ({seconds['calibration']:.0f} s): that is the row “ptq”.",
        f"The student learned for {options.num_updates} updates of {options.batch_size} by {what} "
        f"({distillation:.0f} s): {learned}, step sizes and zero points.",
    ]


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._start = now - self._start, now
