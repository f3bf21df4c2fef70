"""Draw images with a model, into an array or a picture."""

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.utils import save_image

from ddpm_mnist.runs import prepare_output, progress, write_bytes
from ddpm_mnist.sampler import SEED_LIMIT, SamplerConfig, sample, to_float
from eval.models import Model, check_runtime, load_model
from quant import IntegerUNet


@dataclass
class DrawConfig(SamplerConfig):
    model: str = "teacher"
    """A released name, a run folder, or a folder of diffusers."""
    num_images: int = 64
    """Images to draw, at least 1."""
    seed: int = 0
    """Image i starts from the noise of seed + i: 0 to 2^31 - num_images."""
    batch_size: int = 64
    """Images that are denoised at once, at least 1. It decides the speed, not the images, but for floats' last bits."""
    runtime: str = "integer"
    """How a student runs: "integer", or "simulated" in float."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_runtime(self.runtime)
        if not 0 <= self.seed <= SEED_LIMIT - self.num_images:
            raise ValueError(f"seed must lie in 0…2^31 - num_images, not {self.seed}")


@dataclass
class SampleConfig(DrawConfig):
    output: Path = Path("samples.npy")
    """.npy: uint8 (N, H, W), or (N, H, W, C) of colours. .png: a picture of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.suffix not in (".npy", ".png"):
            raise ValueError(f"output must end in .npy or .png, not {self.output}")


def draw(model: Model, config: DrawConfig) -> tuple[Tensor, float]:
    """The model's images uint8 (num_images, H, W) or (…, C) as `config` says, and the seconds that they took."""
    if isinstance(model.denoiser, IntegerUNet):
        print(f"{model.name} runs on integers: {model.denoiser.core.isa}")
    solver = model.solver(config)
    start, device = time.monotonic(), model.denoiser.device
    with progress(f"sampling {model.name}", config.num_images) as advance:
        images = sample(model.denoiser, solver, config.num_images, config.seed, config.batch_size, device, advance)
    return images, time.monotonic() - start


def write_samples(config: SampleConfig) -> Path:
    """Draw images with a model, as an array (.npy) or a picture (.png)."""
    model = load_model(config.model, config.runtime)
    model.solver(config)  # refuses what does not fit
    if config.output.suffix == ".png":
        model.check_pictures()
    prepare_output(config.output)
    images, _ = draw(model, config)
    content = io.BytesIO()
    if config.output.suffix == ".npy":
        np.save(content, images.numpy())
    else:
        columns = max(1, round(config.num_images**0.5))
        save_image((to_float(images) + 1) / 2, content, nrow=columns, format="png")
    write_bytes(config.output, content.getvalue())
    print(f"{len(images)} images of {config.model} in {config.output}")
    return config.output
