"""A labelled row of images per model, from the same noise in each column."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_mnist.command import run_command
from ddpm_mnist.runs import write_bytes
from ddpm_mnist.sampler import SamplerConfig
from eval.metrics import measure
from eval.models import Model, load_model
from eval.plots import image_grid, to_png
from eval.sample import DrawConfig, draw, prepare_output


@dataclass
class GridConfig(SamplerConfig):
    models: list[str] = field(
        default_factory=list,
        metadata={"help": "released names, run folders or folders of diffusers, a row each"},
    )
    columns: int = 12
    """Images per row."""
    seed: int = 0
    """Column i starts from the noise of seed + i."""
    num_images: int = 0
    """Images to measure each row's FID on; 0: show the FID that the model's folder records, if it does."""
    output: Path = Path("grid.png")
    """The picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise ValueError("models needs at least one model")
        if self.columns < 1:
            raise ValueError(f"columns must be at least 1, not {self.columns}")
        if self.num_images != 0 and self.num_images < 2:
            raise ValueError(f"num_images must be 0 or at least 2, not {self.num_images}")
        if self.output.suffix != ".png":
            raise ValueError(f"output must end in .png, not {self.output}")


def recorded_fid(model: Model) -> str:
    """The FID that the model's folder records, with its sample count, or nothing."""
    path = (model.folder or Path()) / "metrics.json"
    if not path.is_file():
        return ""
    score = json.loads(path.read_text())[-1]
    return f"FID {score['fid']:.2f} ({score['num_images']:,})"


def row_label(model: Model, fid: str) -> str:
    """Name, bits and FID, a line each."""
    return "\n".join(line for line in (Path(model.name).name, model.bits, fid) if line)


def draw_models(config: GridConfig) -> Path:
    """Draw one labelled row per model (name, bits, FID), the same noise in each column."""
    prepare_output(config.output)
    rows = []
    for model in [load_model(argument) for argument in config.models]:
        count = max(config.columns, config.num_images)
        drawing = DrawConfig(config.solver, config.num_steps, config.eta, num_images=count, seed=config.seed)
        images, _ = draw(model, drawing)
        fid = recorded_fid(model)
        if config.num_images:
            fid = f"FID {measure(images, images)['fid']:.2f} ({config.num_images:,})"
        rows.append((row_label(model, fid), images[: config.columns]))
    write_bytes(config.output, to_png(image_grid(rows)))
    print(f"{len(rows)} rows in {config.output}")
    return config.output


if __name__ == "__main__":
    run_command("python -m eval.grid", draw_models, GridConfig, sys.argv[1:])
