"""Scores in tables: means and spreads over the distillations of each model."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Row:
    """A row of the table: means over the distillations of a rung, and the standard deviation of their FID."""

    name: str
    bits: str
    num_steps: int
    count: int
    fid: float
    spread: float
    """Standard deviation; not a number for a single distillation."""
    ratio: float
    """FID over that of the teacher in as many steps; not a number where there is none."""
    kid: float
    mse_to_teacher: float
    fid_to_teacher: float
    milliseconds: float
    """Per image."""


def number(score: float | None, digits: int) -> str:
    """A score in a table; "–" where the ruler does not measure it."""
    return "–" if score is None else f"{score:.{digits}f}"


def summarise_scores(scores: list[dict[str, Any]]) -> list[Row]:
    """A row per model of `scores`, in their order; the teacher's come first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for score in scores:
        rows.setdefault(score["model"], []).append(score)
    teacher = {score["num_steps"]: score["fid"] for score in scores if score["weight_bits"] == 32}

    def mean(group: list[dict[str, Any]], key: str) -> float:
        return sum(score[key] for score in group) / len(group)

    return [
        Row(
            name=name,
            bits="32" if group[0]["weight_bits"] == 32 else f"W{group[0]['weight_bits']}A{group[0]['act_bits']}",
            num_steps=group[0]["num_steps"],
            count=len(group),
            fid=mean(group, "fid"),
            spread=statistics.stdev(score["fid"] for score in group) if len(group) > 1 else math.nan,
            ratio=mean(group, "fid") / teacher.get(group[0]["num_steps"], math.nan),
            kid=mean(group, "kid"),
            mse_to_teacher=mean(group, "mse_to_teacher"),
            fid_to_teacher=mean(group, "fid_to_teacher"),
            milliseconds=1000 * mean(group, "seconds") / group[0]["num_images"],
        )
        for name, group in rows.items()
    ]


def markdown(rows: Sequence[Row], num_images: int, seed: int, solver: str) -> str:
    """`rows` as a table in Markdown."""
    lines = [
        f"{num_images:,} images each from seed {seed} on, {solver}. FID ± standard deviation over the distillations;",
        "ratio to the teacher in as many steps; distances to the teacher's images of the base's number of steps.",
        "",
        "| rung | bits | steps | distillations | FID | ratio | KID | MSE to teacher | FID to teacher | ms per image |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = "–" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
        fid = f"{row.fid:.2f}" + (f" ± {row.spread:.2f}" if row.count > 1 else "")
        lines.append(
            f"| {row.name} | {row.bits} | {row.num_steps} | {row.count if row.bits != '32' else ''} | {fid} "
            f"| {ratio} | {row.kid:.4f} | {row.mse_to_teacher:.4f} | {row.fid_to_teacher:.2f} "
            f"| {row.milliseconds:.1f} |"
        )
    return "\n".join(lines) + "\n"
