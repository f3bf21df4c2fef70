"""Draw a grid with a labelled row of images per model, from the same noise in each column."""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.command import run_command
from ddpm_mnist.lab.read import read_json
from ddpm_mnist.lab.write import prepare_output, write_bytes
from ddpm_mnist.sampling.solver import SamplerConfig
from eval.features import load_ruler
from eval.metrics import Sums, fid_of_sums
from eval.models import Model, load_model
from eval.plots import image_grid, to_png
from eval.sample import DrawConfig, draw, stored_shape
from quant.context import plain_torch


@dataclass
class GridConfig(SamplerConfig):
    models: list[str] = field(
        default_factory=list,
        metadata={"help": "Released names, run folders or folders of diffusers, a row each."},
    )
    columns: int = 12
    """Images per row, at least 1."""
    seed: int = 0
    """Column i starts from the noise of seed + i: 0 to 2^31 - max(columns, num_images)."""
    num_images: int = 0
    """Images to compute each row's FID on, at least 2. 0: show the FID recorded in the model's folder, if any."""
    features: str | None = None
    """Feature network of that FID (the ruler): a folder of `efficientdm features`. None: the released one, for
    MNIST."""
    runtime: str = "integer"
    """Runtime of the students: "integer", or "simulated" in float."""
    output: Path = Path("grid.png")
    """PNG file of the grid."""

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
        self.drawing  # noqa: B018 (validates seed and runtime)

    @property
    def drawing(self) -> DrawConfig:
        """The config for sampling the images of a model."""
        count = max(self.columns, self.num_images)
        sampler = {field.name: getattr(self, field.name) for field in fields(SamplerConfig)}
        return DrawConfig(**sampler, num_images=count, seed=self.seed, runtime=self.runtime)


def recorded_fid(model: Model, drawing: DrawConfig) -> str:
    """Return the label of the FID recorded in the model's folder for this sampler, or "" if there is none."""
    path = (model.folder or Path()) / "metrics.json"
    if not path.is_file():
        return ""
    try:
        scores = read_json(path)
        score = scores[-1] if isinstance(scores, list) else scores
        of_classes = score.get("labels", []), score.get("guidance_scale", 1.0)  # absent for models without classes
        recorded = score["solver"], score["num_steps"], score.get("eps_scale", 1.0), score["eta"], *of_classes
        same_digit = score.get("same_digit")  # absent if only FID was computed
        if not all(isinstance(x, int | float | None) for x in (score["fid"], same_digit, score["num_images"])):
            raise ValueError("a score is no number")
        label = "" if score["fid"] is None else fid_label(score["fid"], score["num_images"], same_digit)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no scores: {error}") from error
    eps_scale = model.schedule.eps_scale if drawing.eps_scale is None else drawing.eps_scale
    of_classes = list(drawing.labels), drawing.guidance_scale
    now = drawing.solver, drawing.num_steps, eps_scale, drawing.eta, *of_classes
    return label if recorded == now else ""


def fid_label(fid: float, num_images: int, same_digit: float | None = None) -> str:
    """Format FID, the number of images and, on a second line, the share of the teacher's digits unless None."""
    label = f"FID {fid:.2f} ({num_images:,})"
    return label if same_digit is None else f"{label}\nsame digit {same_digit:.0%}"


def row_label(model: Model, fid: str) -> str:
    """Return the label of a row: name, bits and `fid`, a result of `fid_label`, on separate lines."""
    return "\n".join(line for line in (model.title, model.bits, fid) if line)


@plain_torch()
def draw_models(config: GridConfig) -> Path:
    """Draw a grid with a labelled row of images per model (name, bits, FID), from the same noise in each column."""
    models = [load_model(argument, config.runtime) for argument in config.models]
    for model in models:
        model.solver(config)  # raises if the model does not support the config
        model.check_pictures()
        if model.shape != models[0].shape:
            raise InputError(f'"{model.name}" draws images of {model.shape}, "{models[0].name}" of {models[0].shape}')
    ruler = load_ruler(config.features)
    reference = ruler.reference if config.num_images and ruler.fits(stored_shape(models[0])) else None
    if config.num_images and reference is None:
        raise InputError(f"num_images must be 0: the ruler {ruler.digest} has no FID of images of {models[0].shape}")
    prepare_output(config.output)
    rows = []
    for model in models:
        images, _ = draw(model, config.drawing)
        if reference is not None:
            features, _ = ruler.extract(images[: config.num_images])
            fid = fid_label(fid_of_sums(Sums.of(features), Sums.kept(reference)), config.num_images)
        else:
            fid = recorded_fid(model, config.drawing)
        rows.append((row_label(model, fid), images[: config.columns]))
    write_bytes(config.output, to_png(image_grid(rows)))
    print(f"{len(rows)} rows in {config.output}")
    return config.output


if __name__ == "__main__":
    run_command("python -m eval.grid", draw_models, GridConfig, sys.argv[1:])
