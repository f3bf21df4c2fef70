"""Score a model: compare its images with real ones, and with the teacher's from the same noise."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.command import run_command
from ddpm_mnist.lab.processes import from_main, share_out
from ddpm_mnist.lab.write import prepare_output, write_json
from eval.features import Ruler, load_ruler
from eval.metrics import Score, measure
from eval.models import Model, load_model
from eval.sample import DrawConfig, draw
from eval.table import drawn, floor_note, score_table
from eval.train_features import classifier_accuracy, load_sets
from quant.context import plain_torch


@dataclass
class FidConfig(DrawConfig):
    num_images: int = 10_000
    """Images to score, at least 2. Compare only scores of equal numbers."""
    teacher: str = "teacher"
    """The model to compare with, by the scores same_digit, mse_to_teacher and fid_to_teacher. Its images must have the
    same shape."""
    features: str | None = None
    """Feature network of the scores (the ruler): a folder of `efficientdm features`, or "inception". None: the released
    one, for MNIST. Images of another shape are only compared with the teacher's."""
    reference: str | None = None
    """Reference images for "inception": a folder or a .npy file. Other rulers have their own."""
    classifier: bool = False
    """Whether to train classifiers on the images and on as many real ones, and compare their accuracies on real test
    images. Takes minutes, and needs the ruler's training data."""
    output: Path = Path("fid.json")
    """JSON file with a field for each score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.suffix != ".json":
            raise ValueError(f"output must end in .json, not {self.output}")
        if self.num_images < 2:
            raise ValueError(f"num_images must be at least 2, not {self.num_images}: a covariance needs two")


def score_images(
    model: Model, images: Tensor, seconds: float, teacher_images: Tensor, config: DrawConfig, ruler: Ruler
) -> Score:
    """Return the score of `images` uint8 (N, H, W) or (N, H, W, C), sampled from `model` with `config`."""
    return Score(
        model=model.name,
        weight_bits=model.weight_bits,
        act_bits=model.act_bits,
        runtime=model.runtime,
        num_images=len(images),
        num_steps=config.num_steps,
        solver=config.solver,
        eps_scale=model.solver(config).eps_scale,
        eta=config.eta,
        labels=list(config.labels),
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        seconds=round(seconds, 1),
        **measure(images, teacher_images, ruler),
    )


def print_scores(scores: list[Score], floor: dict[str, Any] | None = None) -> None:
    """Print a table of `scores`, a column each, with the ruler's `floor` if it has one."""
    first = scores[0]
    headings, rows = score_table(scores, floor)
    table = Table(
        title=f"{drawn(first)}, ruler {first.features}", caption=f"± 95% interval. {floor_note(scores, floor)}"
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110, markup=False).print(table)


@plain_torch()
def print_fid(config: FidConfig) -> Score:
    """Score a model against reference images, by default MNIST, and against the teacher's images from the same noise.

    Prints a table and writes a JSON file. The statistics of MNIST are included, so only `classifier` needs data.
    """
    model, teacher = (load_model(name, config.runtime) for name in (config.model, config.teacher))
    if model.shape != teacher.shape:
        shapes = f'{teacher.shape}, "{config.model}" of {model.shape}'
        raise InputError(f'"{config.teacher}" draws images of {shapes}: --teacher names the model to compare with')
    ruler = load_ruler(config.features, config.reference)
    for each in (model, teacher):
        each.solver(config)  # raises if the model does not support the config
    if config.classifier and ruler.shape is not None and model.shape != (1, *ruler.shape):
        raise InputError(f"classifier needs a ruler of images of {model.shape}: --features names another")
    sets = from_main(lambda: load_sets(ruler, config.num_images)) if config.classifier else {}
    prepare_output(config.output)
    images, seconds = draw(model, config)
    teacher_images = images if config.model == config.teacher else draw(teacher, config)[0]
    score = score_images(model, images, seconds, teacher_images, config, ruler)
    if sets:
        _, logits = ruler.extract(images)
        real, labels = sets["train"]
        lessons = [(images, logits.argmax(1)), (real[: len(images)], labels[: len(images)])]
        score.classifier_accuracy, score.classifier_accuracy_of_real = share_out(
            lambda lesson: classifier_accuracy(*lesson, logits.shape[1], sets["test"]), lessons
        )
    write_json(config.output, dataclasses.asdict(score))
    print_scores([score], ruler.floor)
    return score


if __name__ == "__main__":
    run_command("python -m eval.fid", print_fid, FidConfig, sys.argv[1:])
