"""The pictures: each function makes one matplotlib figure."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor


def to_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, its margins cut off."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def image_grid(rows: Sequence[tuple[str, Tensor]]) -> Figure:
    """One labelled row per entry: the label, and images uint8 (N, 28, 28), the same N in every row."""
    columns = len(rows[0][1])
    figure = Figure(figsize=(1.9 + 0.62 * columns, 0.1 + 0.62 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, rows, strict=True):
        axis.imshow(rearrange(images.numpy(), "n h w -> h (n w)"), cmap="gray", vmin=0, vmax=255)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def loss_curve(updates: Sequence[int], losses: Sequence[float]) -> Figure:
    """Distillation loss over updates."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(updates, losses, linewidth=1)
    axis.set(xlabel="update", ylabel="loss", yscale="log")
    axis.grid(alpha=0.3)
    return figure


def step_sizes(names: Sequence[str], timesteps: Sequence[int], scales: Tensor) -> Figure:
    """Learned activation step sizes (layers, T) over the denoising timesteps, each relative to its layer's mean."""
    figure = Figure(figsize=(7.5, 1.2 + 0.17 * len(names)), layout="constrained")
    axis = figure.subplots()
    relative = (scales / scales.mean(1, keepdim=True)).log2()
    bound = max(relative.abs().max().item(), 0.1)
    picture = axis.imshow(relative.numpy(), aspect="auto", cmap="RdBu_r", vmin=-bound, vmax=bound)
    axis.set_yticks(range(len(names)), names, fontsize=6)
    axis.set_xticks(range(len(timesteps)), [str(t) for t in timesteps], fontsize=6, rotation=90)
    axis.set_xlabel("timestep t, noise on the left, image on the right")
    figure.colorbar(picture, label="log₂(step size / layer's mean)")
    return figure


def scores_chart(scores: Sequence[Mapping[str, Any]]) -> Figure:
    """FID of each model, as bars on a logarithmic axis; the first is the teacher, whose FID is the line to reach."""
    figure = Figure(figsize=(7, 0.6 + 0.28 * len(scores)), layout="constrained")
    axis = figure.subplots()
    names = [f"{score['model']} · W{score['weight_bits']}A{score['act_bits']}" for score in scores[1:]]
    bars = axis.barh(["teacher", *names], [score["fid"] for score in scores], color=["black", *["C0"] * len(names)])
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.axvline(scores[0]["fid"], color="black", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", xlabel=f"FID at {scores[0]['num_images']:,} images")
    axis.invert_yaxis()
    axis.margins(x=0.15)
    return figure
