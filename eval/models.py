"""A model argument → a denoiser."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import UNet2DModel
from diffusers.utils import logging
from safetensors import SafetensorError

from ddpm_mnist import InputError
from ddpm_mnist.unet import PRETRAINED
from quant import IntegerUNet, QuantizedUNet, to_integer
from quant.integer.core import choose

STUDENTS = ("w8a8", "w4a8", "w4a4", "w2a4")
RELEASED = {"teacher": PRETRAINED, **{name: PRETRAINED / name for name in STUDENTS}}
# How a student runs: on the CPU's integers, or simulated in float, on the accelerator if there is one.
RUNTIMES = ("integer", "simulated")


@dataclass
class Model:
    """A denoiser with its name and bits."""

    name: str
    denoiser: Any
    """`eps = denoiser(x_t, t).sample`"""
    weight_bits: int = 32
    """32 for full precision; for a student the bits of its inner layers."""
    act_bits: int = 32
    folder: Path | None = None

    @property
    def bits(self) -> str:
        """ "W4A4", or "full precision"."""
        return "full precision" if self.weight_bits == 32 else f"W{self.weight_bits}A{self.act_bits}"

    @property
    def runtime(self) -> str:
        """ "float", or one of `RUNTIMES`."""
        if isinstance(self.denoiser, IntegerUNet):
            return "integer"
        return "simulated" if isinstance(self.denoiser, QuantizedUNet) else "float"

    def weights_digest(self) -> str:
        """The first 12 digits of its weights' SHA-256."""
        weights = hashlib.sha256()
        for tensor in self.denoiser.state_dict().values():
            weights.update(tensor.cpu().numpy().tobytes())
        return weights.hexdigest()[:12]


def device() -> torch.device:
    """The accelerator, if there is one."""
    return PartialState().device


def check_runtime(runtime: str) -> None:
    """ValueError where there is no such runtime, or where integers cannot run here."""
    if runtime not in RUNTIMES:
        raise ValueError(f'runtime must be {" or ".join(RUNTIMES)}, not "{runtime}"')
    if runtime == "integer":
        choose()


def runnable(student: QuantizedUNet, runtime: str) -> IntegerUNet | QuantizedUNet:
    """The frozen `student` as `runtime`, one of `RUNTIMES`, runs it; ValueError where integers do not follow it."""
    return to_integer(student) if runtime == "integer" else student.to(device())


def load_model(argument: str, runtime: str = "simulated") -> Model:
    """Load a released model by its name, a run folder, or a folder of diffusers (a pipeline's or a UNet's).

    Args:
        runtime: for a student, one of `RUNTIMES`.

    Raises:
        InputError: there is no such model, or its files are broken or of another shape than (N, 1, 28, 28).
    """
    folder = RELEASED.get(argument, Path(argument))
    place = next((p for p in (folder, folder / "unet") if (p / "config.json").is_file()), None)
    if place is None:
        names = ", ".join(RELEASED)
        raise InputError(f'no model "{argument}": neither released ({names}) nor a folder with a config.json')
    try:
        config = json.loads((place / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("config.json is no JSON object")
        if "quantization" in config:
            student = QuantizedUNet.from_pretrained(place)
            bits = student.quant_config
            model = Model(argument, runnable(student, runtime), bits.weight_bits, bits.act_bits, folder)
        else:
            model = Model(argument, _load_unet(place).requires_grad_(False).to(device()), folder=folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f'model "{argument}" cannot be loaded from {place}: {reason}') from error
    options = model.denoiser.config
    if (options.in_channels, options.out_channels, options.sample_size) != (1, 1, 28):
        shape = f"{options.in_channels} → {options.out_channels} channels of {options.sample_size} pixels"
        raise InputError(f'model "{argument}" denoises {shape}, not 1 → 1 channels of 28 pixels')
    return model


def _load_unet(place: Path) -> UNet2DModel:
    """A UNet of diffusers; its library logs what it finds wrong and loads it all the same."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        unet, found = UNet2DModel.from_pretrained(place, use_safetensors=True, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    if found["missing_keys"] or found["unexpected_keys"]:
        names = [*found["missing_keys"], *found["unexpected_keys"]]
        raise ValueError(f"its weights do not fit its config: {names[0]} and {len(names) - 1} more")
    return unet.eval()
