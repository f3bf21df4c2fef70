"""Format scores as tables: with confidence intervals, or as means and standard deviations over distillations."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # sampling imports this module for its labels and must not import torchmetrics
    from eval.metrics import Score

# Heading, field and number of decimals of each score.
SCORES = (
    ("FID ↓", "fid", 2),
    ("FID, second network ↓", "fid_second", 2),
    ("KID ↓", "kid", 4),
    ("precision ↑", "precision", 3),
    ("recall ↑", "recall", 3),
    ("Inception score ↑", "inception_score", 2),
    ("same digit ↑", "same_digit", 3),
    ("MSE to teacher ↓", "mse_to_teacher", 4),
    ("FID to teacher ↓", "fid_to_teacher", 2),
)
WORTH = (("classifier's accuracy ↑", "classifier_accuracy", 4), ("from real ones", "classifier_accuracy_of_real", 4))


def bits_label(weight_bits: float, act_bits: int) -> str:
    """Format bit-widths: "W4A4", "W1.58A4"; "32" for full precision."""
    return "32" if weight_bits == 32 else f"W{weight_bits:g}A{act_bits}"


def bits_product(label: str) -> float:
    """Return weight bits times activation bits of a `bits_label`."""
    return 32 * 32 if label == "32" else math.prod(float(part) for part in label[1:].split("A"))


def number(score: float | None, digits: int, interval: Sequence[float] | None = None) -> str:
    """Format a score with half the width of its interval, e.g. "1.23 ± 0.04"; "–" if it is None or NaN."""
    if score is None or math.isnan(score):
        return "–"
    half = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.{digits}f}"
    return f"{score:.{digits}f}{half}"


def score_table(scores: Sequence["Score"], floor: dict[str, Any] | None) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of a table with a column per model and a row per score.

    The ruler's floor is another column if it is for the same number of images.
    """
    shown = floor if floor and floor["num_images"] == scores[0].num_images and scores[0].fid is not None else None
    headings = ["", *(score.model for score in scores)]
    rows = [
        ["bits", *(bits_label(score.weight_bits, score.act_bits) for score in scores)],
        ["runtime", *(score.runtime for score in scores)],
    ]
    for heading, name, digits in (*SCORES, *WORTH):
        values = [(getattr(score, name), getattr(score, f"{name}_interval", None)) for score in scores]
        if any(value is not None for value, _ in values) or (heading, name, digits) in SCORES:
            rows.append([heading, *(number(value, digits, interval) for value, interval in values)])
            if shown:
                rows[-1].append(number(shown.get(name), digits))
    rows.append(["seconds", *(f"{score.seconds:.0f}" for score in scores)])
    if shown:
        headings.append("real test images")
        rows = [[*row, ""] if len(row) < len(headings) else row for row in rows]
    return headings, rows


def drawn(score: "Score") -> str:
    """Describe how the images of a score were sampled."""
    factor = "" if score.eps_scale == 1 else f", ε × {score.eps_scale:g}"
    return f"{score.num_images:,} images, {score.solver} in {score.num_steps} steps{factor}, seed {score.seed}"


def floor_note(scores: Sequence["Score"], floor: dict[str, Any] | None) -> str:
    """Return a sentence about the floor if it is for another number of images and so has no column; else ""."""
    if not floor or scores[0].fid is None or floor["num_images"] == scores[0].num_images:
        return ""
    of = "; ".join(f"{heading[:-2]} {number(floor[name], digits)}" for heading, name, digits in SCORES if name in floor)
    return f"The {floor['num_images']:,} real test images score {of}: a floor for as many images, not for these."


@dataclass
class Row:
    """A row of the ladder's table: means and some standard deviations over the distillations of a rung.

    A score that the ruler cannot compute is NaN, as is the standard deviation of a single distillation.
    """

    name: str
    bits: str
    num_steps: int
    count: int
    fid: float
    spread: float
    """Standard deviation of `fid`."""
    ratio: float
    """FID divided by the teacher's in the same number of steps; NaN if there is none."""
    fid_second: float
    fid_second_spread: float
    kid: float
    precision: float
    recall: float
    same_digit: float
    same_digit_spread: float
    mse_to_teacher: float
    fid_to_teacher: float
    milliseconds: float
    """Time per image."""


def summarise_scores(scores: list[dict[str, Any]]) -> list[Row]:
    """Return a row per model of `scores`, in their order, in which the teacher's come first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for score in scores:
        rows.setdefault(score["model"], []).append(score)

    def values(group: list[dict[str, Any]], key: str) -> list[float]:
        return [math.nan if score[key] is None else score[key] for score in group]

    def mean(group: list[dict[str, Any]], key: str) -> float:
        return sum(values(group, key)) / len(group)

    def spread(group: list[dict[str, Any]], key: str) -> float:
        known = [value for value in values(group, key) if not math.isnan(value)]
        return statistics.stdev(known) if len(known) > 1 else math.nan

    teacher = {score["num_steps"]: values([score], "fid")[0] for score in scores if score["weight_bits"] == 32}
    return [
        Row(
            name=name,
            bits=bits_label(group[0]["weight_bits"], group[0]["act_bits"]),
            num_steps=group[0]["num_steps"],
            count=len(group),
            fid=mean(group, "fid"),
            spread=spread(group, "fid"),
            ratio=mean(group, "fid") / (teacher.get(group[0]["num_steps"]) or math.nan),
            fid_second=mean(group, "fid_second"),
            fid_second_spread=spread(group, "fid_second"),
            kid=mean(group, "kid"),
            precision=mean(group, "precision"),
            recall=mean(group, "recall"),
            same_digit=mean(group, "same_digit"),
            same_digit_spread=spread(group, "same_digit"),
            mse_to_teacher=mean(group, "mse_to_teacher"),
            fid_to_teacher=mean(group, "fid_to_teacher"),
            milliseconds=1000 * mean(group, "seconds") / group[0]["num_images"],
        )
        for name, group in rows.items()
    ]


def markdown(
    rows: Sequence[Row], num_images: int, seed: int, solver: str, names: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return `rows` as a Markdown table.

    Args:
        names: additional names of some rows, by row name.
    """
    headings = ["rung", "bits", "steps", "distillations", "FID", "ratio", "FID, second network", "same digit"]
    headings += ["precision", "recall", "KID", "MSE to teacher", "FID to teacher", "ms per image"]
    lines = [
        f"{num_images:,} images each from seed {seed} on, {solver}. ± standard deviation over the distillations;",
        "ratio of FID to the teacher's in as many steps; same digit and distances: beside the teacher's images in the",
        "base's number of steps. Each score's 95% interval over other seeds is in the JSON.",
        "",
        f"| {' | '.join(headings)} |",
        "|---|---|" + "---:|" * (len(headings) - 2),
    ]
    for row in rows:
        name = f"{row.name} ({names[row.name]})" if row.name in names else row.name
        cells = [name, row.bits, str(row.num_steps), "" if row.bits == "32" else str(row.count)]
        cells += [_spread(row.fid, row.spread, 2), number(row.ratio, 2)]
        cells += [_spread(row.fid_second, row.fid_second_spread, 2), _spread(row.same_digit, row.same_digit_spread, 3)]
        cells += [number(row.precision, 3), number(row.recall, 3), number(row.kid, 4), number(row.mse_to_teacher, 4)]
        cells += [number(row.fid_to_teacher, 2), number(row.milliseconds, 1)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(mean: float, spread: float, digits: int) -> str:
    return number(mean, digits, None if math.isnan(spread) else (mean - spread, mean + spread))
