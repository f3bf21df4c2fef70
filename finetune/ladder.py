"""The ladder: what each technique gives, and what each bit costs, on one teacher with one ruler."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ddpm_mnist import InputError
from ddpm_mnist.runs import RunState, write_bytes, write_json, write_text
from eval.fid import score_images
from eval.grid import fid_label, row_label
from eval.models import Model, load_model, runnable
from eval.plots import image_grid, scores_chart, to_png
from eval.sample import DrawConfig, draw
from finetune.pipeline import RunConfig, distill_student, fingerprint

TEACHER = "teacher"
NO_TRAINING = {"distill.num_updates": 0}
PER_STEP = {"distill.objective": "per-step"}

# What each rung changes of the base, in the order of the table; the full method is the base itself.
RUNGS: dict[str, dict[str, Any]] = {
    "ptq-min-max": {**NO_TRAINING, "student.search": "min-max", "student.per_step": False},
    "ptq-error": {**NO_TRAINING, "student.per_step": False},
    "ptq-error-per-step": NO_TRAINING,
    "qalora": {**PER_STEP, "student.per_step": False, "distill.scale_aware": False},
    "scale-aware": {**PER_STEP, "student.per_step": False},
    "talsq": PER_STEP,
    "in-order": {**PER_STEP, "distill.objective": "per-step-in-order"},
    "rollout-uniform": {"distill.weighting": "uniform"},
    "full": {},
    **{
        f"w{weight_bits}a{act_bits}": {"student.weight_bits": weight_bits, "student.act_bits": act_bits}
        for weight_bits, act_bits in ((8, 8), (6, 6), (4, 8), (3, 3), (2, 8), (2, 4))
    },
}


@dataclass
class LadderConfig:
    output: Path = Path("runs/ladder")
    """Folder for a run folder per rung, and for ladder.json, ladder.md, chart.png and grid.png."""
    rungs: tuple[str, ...] = tuple(RUNGS)
    """Rungs to climb; one that is finished is not run again."""
    base: RunConfig = field(default_factory=RunConfig)
    """The full method; every rung changes a part of it. Its output, runtime and grid_columns serve all rungs."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.rungs if name not in RUNGS]
        if unknown:
            raise ValueError(f"no rung {unknown[0]}; there are {', '.join(RUNGS)}")


def climb(config: LadderConfig) -> Path:
    """Run the rungs, each into a folder of its own, and write one table, one chart and one picture of all.

    A rung of one loss per step gets as many network evaluations an update as a rollout. Returns the table.

    Raises:
        InputError: no such teacher, or a rung's folder belongs to another configuration.
    """
    drawing = DrawConfig(
        **dataclasses.asdict(config.base.sampler),
        num_images=config.base.num_images,
        seed=config.base.score_seed,
        batch_size=config.base.batch_size,
        runtime=config.base.runtime,
    )
    teacher = load_model(config.base.teacher)
    teacher_images, seconds = _images(config.output / TEACHER, teacher, drawing)
    scores = [dataclasses.asdict(score_images(teacher, teacher_images, seconds, teacher_images, drawing))]
    rows = [(row_label(teacher, _label(scores[0])), teacher_images[: config.base.grid_columns])]
    for name in config.rungs:
        run = rung_config(config.base, name, config.output / name)
        metrics = run.output / "metrics.json"
        if metrics.exists():
            RunState(run.output, fingerprint(run, teacher))  # refuses a rung of other settings
        else:
            student = runnable(distill_student(run).student, run.runtime)
            model = Model(name, student, run.student.weight_bits, run.student.act_bits)
            images, seconds = _images(run.output, model, drawing)
            write_json(metrics, dataclasses.asdict(score_images(model, images, seconds, teacher_images, drawing)))
        score = json.loads(metrics.read_text())
        if (score["num_images"], score["seed"]) != (drawing.num_images, drawing.seed):
            raise InputError(f"{metrics} is of {score['num_images']} images from seed {score['seed']}: delete it")
        model = Model(name, None, score["weight_bits"], score["act_bits"])
        images = torch.load(run.output / "images.pt", weights_only=True)
        scores.append(score)
        rows.append((row_label(model, _label(score)), images[: config.base.grid_columns]))
    write_json(config.output / "ladder.json", scores)
    write_bytes(config.output / "grid.png", to_png(image_grid(rows)))
    write_bytes(config.output / "chart.png", to_png(scores_chart(scores)))
    table = config.output / "ladder.md"
    write_text(table, _markdown(scores))
    print(table.read_text())
    return table


def rung_config(base: RunConfig, name: str, output: Path) -> RunConfig:
    """`base` with the changes of the rung."""
    changes = dict(RUNGS[name])
    if changes.get("distill.objective", "rollout") != "rollout":
        changes["distill.batch_size"] = base.distill.batch_size * base.distill.rollout_steps
    parts: dict[str, dict[str, Any]] = {"student": {}, "distill": {}}
    own: dict[str, Any] = {"output": output}
    for key, value in changes.items():
        part, _, field_name = key.rpartition(".")
        (parts[part] if part else own)[field_name] = value
    nested = {part: dataclasses.replace(getattr(base, part), **values) for part, values in parts.items()}
    return dataclasses.replace(base, **own, **nested)


def _images(folder: Path, model: Model, drawing: DrawConfig) -> tuple[torch.Tensor, float]:
    """The model's images, drawn once and kept in `folder`, and the seconds that they took."""
    path = folder / "images.pt"
    if not path.exists():
        images, seconds = draw(model, drawing)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(".images.pt")
        torch.save(images, beside)
        beside.replace(path)
        write_json(folder / "seconds.json", seconds)
    return torch.load(path, weights_only=True), json.loads((folder / "seconds.json").read_text())


def _label(score: dict[str, Any]) -> str:
    return fid_label(score["fid"], score["num_images"])


def _markdown(scores: list[dict[str, Any]]) -> str:
    first = scores[0]
    lines = [
        f"{first['num_images']:,} images each, {first['solver']} in {first['num_steps']} steps, seed {first['seed']}.",
        "",
        "| rung | bits | FID | to the teacher's | KID | MSE to teacher | FID to teacher |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for score in scores:
        bits = "32" if score["weight_bits"] == 32 else f"W{score['weight_bits']}A{score['act_bits']}"
        fid, kid, mse = score["fid"], score["kid"], score["mse_to_teacher"]
        lines.append(
            f"| {score['model']} | {bits} | {fid:.2f} | {fid / first['fid']:.2f} | {kid:.4f} | {mse:.4f} "
            f"| {score['fid_to_teacher']:.2f} |"
        )
    return "\n".join(lines) + "\n"
