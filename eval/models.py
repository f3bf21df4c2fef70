"""A model argument → a denoiser."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import UNet2DModel
from safetensors import SafetensorError
from torch import nn

from ddpm_mnist import InputError
from ddpm_mnist.unet import PRETRAINED
from quant import QuantizedUNet

RELEASED = {"teacher": PRETRAINED}


@dataclass
class Model:
    """A denoiser with its name and bits."""

    name: str
    denoiser: nn.Module
    """`eps = denoiser(x_t, t).sample`"""
    weight_bits: int = 32
    """32 for full precision; for a student the bits of its inner layers."""
    act_bits: int = 32
    folder: Path | None = None

    @property
    def bits(self) -> str:
        """ "W4A4", or "full precision"."""
        return "full precision" if self.weight_bits == 32 else f"W{self.weight_bits}A{self.act_bits}"


def device() -> torch.device:
    """The accelerator, if there is one."""
    return PartialState().device


def load_model(argument: str) -> Model:
    """Load a released model by its name, a run folder, or a folder of diffusers (a pipeline's or a UNet's).

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
        if "quantization" in config:
            student = QuantizedUNet.from_pretrained(place)
            bits = student.quant_config
            model = Model(argument, student, bits.weight_bits, bits.act_bits, folder)
        else:
            model = Model(argument, UNet2DModel.from_pretrained(place).eval(), folder=folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f'model "{argument}" cannot be loaded from {place}: {str(error).splitlines()[0]}') from error
    shape: Any = model.denoiser.config
    if (shape.in_channels, shape.sample_size) != (1, 28):
        raise InputError(f'model "{argument}" draws {shape.in_channels}×{shape.sample_size}², not 1×28² images')
    model.denoiser.requires_grad_(False).to(device())
    return model
