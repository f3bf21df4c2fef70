"""Run the main job: train a student, sample, score, and write a grid and a report."""

import dataclasses
from pathlib import Path

import torch

from ddpm_mnist.lab import processes
from ddpm_mnist.lab.run_state import read_log
from ddpm_mnist.lab.write import write_bytes, write_json
from ddpm_mnist.sampling.sampler import choose_conditions
from eval.features import Ruler, load_ruler
from eval.fid import print_scores, score_images
from eval.grid import fid_label, row_label
from eval.metrics import Score
from eval.models import Model, runnable
from eval.plots import image_grid, loss_curve, step_sizes, to_png
from eval.report import write_report
from eval.sample import DrawConfig, draw
from eval.table import bits_label
from finetune.config import RunConfig
from finetune.make import Distilled, distill_from, load_teacher, with_whole_batch
from finetune.plan import print_plan
from quant import QuantizedUNet
from quant.context import plain_torch
from quant.summary import shares, summarise

Row = tuple[str, torch.Tensor]


@plain_torch()
def run(config: RunConfig) -> Path:
    """Train a student (sample trajectories, calibrate, distil), score it, and write a grid of images and a report.

    Writes a run folder: the student, config.yaml, metrics.json (teacher, ptq, student), log.jsonl, grid.png,
    step_sizes.png, loss.png and report.html.

    Raises:
        InputError: the teacher does not exist, or the folder belongs to another configuration.
    """
    config, ruler = with_whole_batch(config), load_ruler(config.features)
    teacher = load_teacher(config.teacher)
    teacher.check_pictures()
    made, state = distill_from(teacher, config, announce=print_plan)
    scores, rows = score_models(config, models_of(config, teacher, made), ruler)
    write_json(config.output / "metrics.json", [dataclasses.asdict(score) for score in scores])
    if processes.is_main():
        print_scores(scores, ruler.floor)
        write_pages(config, teacher, made, scores, rows, ruler)
        state.tracker.picture("grid", (config.output / "grid.png").read_bytes(), config.distill.num_updates)
        state.finish()
    return config.output


def models_of(config: RunConfig, teacher: Model, made: Distilled) -> list[Model]:
    """Return the teacher, the calibrated and the distilled student, in the runtime in which they are scored."""
    bits = config.student.weight_bits, config.student.act_bits
    students = {"ptq": made.ptq, "student": made.student}
    return [
        dataclasses.replace(teacher, name="teacher"),
        *(Model(name, runnable(x, config.runtime), teacher.schedule, *bits) for name, x in students.items()),
    ]


def score_models(config: RunConfig, models: list[Model], ruler: Ruler) -> tuple[list[Score], list[Row]]:
    """Sample from and score the models, the teacher first; return the scores and the labelled rows of the grid."""
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
    return scores, rows


def write_pages(
    config: RunConfig, teacher: Model, made: Distilled, scores: list[Score], rows: list[Row], ruler: Ruler
) -> None:
    """Write the figures and report.html into the run folder, and print their paths."""
    student, log = made.student, read_log(config.output / "log.jsonl")
    conditions = choose_conditions(student, config.sampler, range(1))
    layers = summarise(student, teacher.shape, **{name: value.to(student.device) for name, value in conditions.items()})
    figures = {
        "grid": image_grid(rows),
        "loss": loss_curve([row["update"] for row in log], [row["loss"] for row in log]),
        "step_sizes": step_sizes(*act_step_sizes(student)),
    }
    for name, figure in figures.items():
        write_bytes(config.output / f"{name}.png", to_png(figure))
    bits = config.student
    learned_from = f"trained on {config.data}" if config.uses_data else "distilled without data"
    write_report(
        config.output / "report.html",
        title=f"{bits_label(bits.weight_bits, bits.act_bits)} student, {learned_from}",
        facts=_facts(config, made.seconds, log[-1]["seconds"] if log else 0.0),
        scores=scores,
        floor=ruler.floor,
        layers=layers,
        config=(config.output / "config.yaml").read_text("utf-8"),
        **figures,
    )
    print("Bits:", ", ".join(f"{key} {macs:.1%} of the MACs" for key, (_, macs) in shares(layers).items()))
    print(f"Pictures: {', '.join(str(config.output / f'{name}.png') for name in figures)}")
    print(f"Report:   {config.output / 'report.html'}")


def act_step_sizes(student: QuantizedUNet) -> tuple[tuple[str, ...], list[float], torch.Tensor]:
    """Return the layer names, the timesteps, and the activation step sizes (layers, T or 1)."""
    names, layers = zip(*student.layers(), strict=True)
    scales = torch.stack([layer.act_quantizer.scale.detach().cpu() for layer in layers])
    return names, student.clock.timesteps, scales


def _facts(config: RunConfig, seconds: dict[str, float], distillation: float) -> list[str]:
    bits, options = config.student, config.distill
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
        + (f"The student learned on {config.data} itself." if config.uses_data else "No data was used."),
        f"Weights {bits.weight_bits} bits, activations {bits.act_bits} bits; first and last convolution{shortcut} and "
        f"time embedding {bits.edge_bits} bits, their inputs {bits.edge_act_bits}. Activation ranges were set {ranges} "
        f"on {config.calibration_trajectories} trajectories ({seconds['calibration']:.0f} s): that is the row “ptq”.",
        f"The student learned for {options.num_updates} updates of {options.batch_size} by {what} "
        f"({distillation:.0f} s): {learned}, step sizes and zero points.",
    ]
