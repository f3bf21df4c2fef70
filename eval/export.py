"""Export a model: a student with bit-packed weights, or a teacher or student as ONNX."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.command import run_command
from ddpm_mnist.lab.locks import locked_folder
from ddpm_mnist.lab.processes import by_main
from ddpm_mnist.lab.terminal import progress
from ddpm_mnist.lab.write import holds_model, prepare_output, write_json
from eval.models import Model, load_model
from quant import QuantizedUNet
from quant.export import export_onnx


@dataclass
class ExportConfig:
    model: str = "teacher"
    """The name of a released model, a run folder, or a diffusers folder."""
    format: str = "onnx"
    """"onnx": a graph for ONNX Runtime and others. "packed": a student with bit-packed weights."""
    output: Path = Path("exported")
    """Folder for model.onnx, or model.safetensors and config.json, and for the model's scheduler/."""

    def __post_init__(self) -> None:
        if self.format not in ("onnx", "packed"):
            raise ValueError(f'format must be "onnx" or "packed", not "{self.format}"')


@by_main
def export(config: ExportConfig) -> Path:
    """Export a model as ONNX or with bit-packed weights; return the path of the file with the weights.

    Raises:
        InputError: the model does not exist, the output exists already, or `format` is "packed" for a full-precision
            model.
    """
    model = load_model(config.model)
    packed = config.format == "packed"
    if packed and not isinstance(model.denoiser, QuantizedUNet):
        raise InputError(f'"{config.model}" is of full precision: only a student has codes to pack')
    path = config.output / ("model.safetensors" if packed else "model.onnx")
    prepare_output(path)
    with locked_folder(config.output):
        _export(model, config, path)
    print(f"{config.model}, {model.bits}, in {path} ({path.stat().st_size:,} bytes)")
    return path


def _export(model: Model, config: ExportConfig, path: Path) -> None:
    """Write the scheduler and the weights, or neither."""
    if holds_model(config.output):
        raise InputError(f"{config.output} holds a model: choose another output")
    schedule = config.output / "scheduler" / "scheduler_config.json"
    try:
        write_json(schedule, dict(model.schedule.config))  # first: a model without scheduler would be read as DDPM's
        if config.format == "packed":
            model.denoiser.save_pretrained(config.output)
        else:
            with progress("export", 1) as advance:
                export_onnx(model.denoiser, path)
                advance(1)
    except BaseException as error:
        shutil.rmtree(schedule.parent, ignore_errors=True)
        if isinstance(error, ValueError):
            raise InputError(f'"{config.model}" cannot be exported: {error}') from error
        raise


if __name__ == "__main__":
    run_command("python -m eval.export", export, ExportConfig, sys.argv[1:])
