"""Draw the figures: each function returns one matplotlib figure."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from einops import rearrange
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from eval.table import Row, bits_product


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """Return a figure as the bytes of a PNG file, with tight margins."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def image_grid(rows: Sequence[tuple[str, Tensor]]) -> Figure:
    """Draw a grid of images.

    Args:
        rows: label and images uint8 (N, H, W) or (N, H, W, C) of each row, with the same N.
    """
    columns, (height, width) = len(rows[0][1]), rows[0][1].shape[1:3]
    figure = Figure(figsize=(1.9 + 0.62 * columns, 0.1 + 0.62 * height / width * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, rows, strict=True):
        pixels = rearrange(images.numpy(), "n h w ... -> h (n w) ...")
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, parse_math=False)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def loss_curve(updates: Sequence[float], losses: Sequence[float]) -> Figure:
    """Plot the distillation loss over updates."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(updates, losses, linewidth=1, marker=".", markersize=3)
    axis.set(xlabel="update", ylabel="loss", yscale="log")
    axis.grid(alpha=0.3)
    return figure


def step_sizes(names: Sequence[str], timesteps: Sequence[float], scales: Tensor) -> Figure:
    """Plot activation step sizes (layers, T or 1) over the denoising timesteps, relative to the mean of their layer."""
    figure = Figure(figsize=(7.5, 1.2 + 0.17 * len(names)), layout="constrained")
    axis = figure.subplots()
    relative = (scales / scales.mean(1, keepdim=True)).log2().expand(-1, len(timesteps))
    bound = max(relative.abs().max().item(), 0.1)
    picture = axis.imshow(relative.numpy(), aspect="auto", cmap="RdBu_r", vmin=-bound, vmax=bound)
    axis.set_yticks(range(len(names)), names, fontsize=6)
    axis.set_xticks(range(len(timesteps)), [str(t) for t in timesteps], fontsize=6, rotation=90)
    axis.set_xlabel("timestep t, noise on the left, image on the right")
    figure.colorbar(picture, label="log₂(step size / layer's mean)")
    return figure


def rungs_chart(rows: Sequence[Row]) -> Figure:
    """Plot the FID of each row as a bar on a logarithmic axis; the dashed line is the teacher's, the first row."""
    figure = Figure(figsize=(7, 0.6 + 0.24 * len(rows)), layout="constrained")
    axis = figure.subplots()
    fids = [row.fid for row in rows]
    names = [f"{row.name} · {row.bits}" for row in rows]
    colors = ["black" if row.bits == "32" else "C0" for row in rows]
    bars = axis.barh(names, fids, xerr=[0 if math.isnan(row.spread) else row.spread for row in rows], color=colors)
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.axvline(fids[0], color="black", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", xlabel="FID")
    axis.tick_params(axis="y", labelsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15, y=0.01)
    return figure


def bits_chart(rows: Sequence[Row], baselines: Sequence[str]) -> Figure:
    """Plot the FID of the full method over bit-widths, ordered by weight bits times activation bits.

    Args:
        baselines: names of rows to show as grey points.
    """
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    students = [row for row in rows if row.bits != "32" and row.num_steps == rows[0].num_steps]
    whole = [row for row in students if is_whole(row)]
    others = [row for row in students if row.name in baselines]

    places = sorted({row.bits for row in whole + others}, key=lambda bits: (bits_product(bits), bits))
    for row in whole + others:
        place, spread = places.index(row.bits), 0 if math.isnan(row.spread) else row.spread
        color, size, label = ("C0", 7, f"{row.fid:.2f}") if row in whole else ("0.6", 4, row.name)
        axis.errorbar(place, row.fid, yerr=spread, fmt="o", color=color, markersize=size)
        axis.annotate(label, (place, row.fid), (6, -3), textcoords="offset points", fontsize=7)
    axis.axhline(rows[0].fid, color="black", linewidth=0.8, linestyle="--", label="teacher, full precision")
    axis.set_xticks(range(len(places)), places, rotation=45 if len(places) > 6 else 0)
    axis.set(yscale="log", ylabel="FID")
    axis.margins(x=0.2)
    axis.legend()
    _plain_ticks(axis.yaxis)
    return figure


def cost_chart(rows: Sequence[Row]) -> Figure:
    """Plot FID over milliseconds per image: the teacher at several numbers of steps as a line, students as points."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    teacher = sorted((row for row in rows if row.bits == "32"), key=lambda row: row.num_steps)
    axis.plot([row.milliseconds for row in teacher], [row.fid for row in teacher], "o-", color="black", label="teacher")
    # Students with the base's number of steps are shown only if they are the full method.
    for row in rows:
        if row.bits != "32" and (row.num_steps != rows[0].num_steps or is_whole(row)):
            axis.plot(row.milliseconds, row.fid, "o", color="C0")
            label = row.bits if row.name == row.bits.lower() else f"{row.name} {row.bits}"
            axis.annotate(label, (row.milliseconds, row.fid), (4, 3), textcoords="offset points", fontsize=6)
    for row in teacher:
        label = f"{row.num_steps} steps"
        axis.annotate(label, (row.milliseconds, row.fid), (4, 3), textcoords="offset points", fontsize=7)
    axis.set(xscale="log", yscale="log", xlabel="milliseconds per image", ylabel="FID")
    axis.margins(x=0.15)
    axis.legend()
    _plain_ticks(axis.xaxis)
    _plain_ticks(axis.yaxis)
    return figure


def speed_chart(bench: Mapping[str, Any]) -> Figure:
    """Plot images per second of every runtime at the largest batch size, the fastest on top, integer ones in colour.

    Args:
        bench: the JSON object that `efficientdm bench` writes.
    """
    machine, largest = bench["machine"], max(row["batch_size"] for row in bench["rows"])
    rows = [row for row in bench["rows"] if row["batch_size"] == largest]
    rows.sort(key=lambda row: row["images_per_second"])
    figure = Figure(figsize=(7, 1 + 0.26 * len(rows)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(
        [f"{row['model']}, {row['runtime']}" for row in rows],
        [row["images_per_second"] for row in rows],
        color=["C0" if row["runtime"].startswith("integer") else "0.65" for row in rows],
    )
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axis.set_xlabel(f"images per second, {largest} at a time")
    axis.set_title(
        f"{bench['student']} student and its teacher: {machine['processor']}, {machine['threads']} threads, "
        f"integers on {machine['isa']}",
        fontsize=8,
    )
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.1, y=0.02)
    return figure


def errors_chart(paths: Mapping[str, Tensor]) -> Figure:
    """Plot the mean squared distance to the states of the first entry over the denoising steps.

    Args:
        paths: states (N, T + 1, C, H, W) of each entry, from the same noise.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    (_, teacher), *others = paths.items()
    for number, (name, x) in enumerate(others):
        errors = (x - teacher).square().mean((0, 2, 3, 4))
        axis.plot(
            range(1, len(errors)), errors[1:], label=name, linewidth=1, linestyle=("-", "--", ":")[number // 10 % 3]
        )
    axis.set(xlabel="denoising step", ylabel="mean squared distance to the teacher's state", yscale="log")
    axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def is_whole(row: Row) -> bool:
    """Return whether a row is the full method (at any bit-widths)."""
    return row.name in ("full", row.bits.lower())


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with 1, 2, 3, 5, 10, … instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
