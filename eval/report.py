"""Write the report of a run: a self-contained HTML page."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from ddpm_mnist.lab.write import write_text
from eval.metrics import Score
from eval.plots import to_png
from eval.table import drawn, floor_note, score_table
from quant.summary import LayerSummary, shares


def embed(figure: Figure) -> str:
    """Return a figure as the data URL of a PNG image."""
    return "data:image/png;base64," + base64.b64encode(to_png(figure)).decode()


def write_report(
    path: Path,
    *,
    title: str,
    facts: Sequence[str],
    scores: Sequence[Score],
    floor: dict[str, Any] | None = None,
    grid: Figure,
    loss: Figure,
    step_sizes: Figure,
    layers: Sequence[LayerSummary],
    config: str,
) -> None:
    """Write the report to `path`.

    Args:
        facts: sentences that describe the run.
        floor: the ruler's floor, or None.
        config: the resolved configuration as YAML.
    """
    headings, rows = score_table(scores, floor)
    values: dict[str, Any] = {
        "title": title,
        "facts": facts,
        "scores": scores,
        "headings": headings,
        "rows": rows,
        "drawn": drawn(scores[0]),
        "floor_note": floor_note(scores, floor),
        "grid": embed(grid),
        "loss": embed(loss),
        "step_sizes": embed(step_sizes),
        "layers": layers,
        "parameters": sum(layer.parameters for layer in layers),
        "macs": sum(layer.macs for layer in layers),
        "shares": shares(list(layers)),
        "config": config,
    }
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    write_text(path, environment.get_template("report.html.j2").render(values))
