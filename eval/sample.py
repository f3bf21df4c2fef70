"""Sample images from a model and write them as an array or a picture."""

import glob
import hashlib
import io
import json
import math
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.locks import is_still_there, lock_file
from ddpm_mnist.lab.processes import count, from_main
from ddpm_mnist.lab.terminal import progress
from ddpm_mnist.lab.write import keep_mode, prepare_output, write_bytes
from ddpm_mnist.sampling.noise import STREAM
from ddpm_mnist.sampling.sampler import SEED_LIMIT, sample
from ddpm_mnist.sampling.solver import SamplerConfig
from eval.models import Model, check_runtime, load_model
from quant import IntegerUNet
from quant.context import plain_torch


@dataclass
class DrawConfig(SamplerConfig):
    model: str = "teacher"
    """The name of a released model, a run folder, or a diffusers folder."""
    num_images: int = 64
    """Images to sample, at least 1."""
    seed: int = 0
    """Image i starts from the noise of seed + i: 0 to 2^31 - num_images."""
    batch_size: int = 64
    """Images to denoise at once, at least 1. It affects the speed, and images only through rounding of floats."""
    runtime: str = "integer"
    """Runtime of a student: "integer", or "simulated" in float."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_runtime(self.runtime)
        if self.num_images > SEED_LIMIT:
            raise ValueError(f"num_images must be at most 2^31, not {self.num_images}")
        if not 0 <= self.seed <= SEED_LIMIT - self.num_images:
            raise ValueError(f"seed must lie in 0…2^31 - num_images, not {self.seed}")


@dataclass
class SampleConfig(DrawConfig):
    output: Path = Path("samples.npy")
    """Output file. .npy: array uint8 (N, H, W), or (N, H, W, C) in colour. .png: a picture of all images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.suffix not in (".npy", ".png"):
            raise ValueError(f"output must end in .npy or .png, not {self.output}")


def origin_of(model: Model, config: DrawConfig) -> dict[str, Any]:
    """Return everything that determines the model's images, so that stored images of other settings are not reused."""
    names = ("num_images", "num_steps", "seed", "solver", "eta", "labels", "guidance_scale", "runtime")
    drawn = {name: getattr(config, name) for name in names}
    drawn |= {"labels": list(config.labels), "runtime": model.runtime, "eps_scale": model.solver(config).eps_scale}
    return {**drawn, "weights": model.weights_digest(), "scheduler": model.schedule.fields, "noise": STREAM}


def stored_shape(model: Model) -> tuple[int, ...]:
    """Return the shape of one image as it is stored: (H, W), or (H, W, C) for C > 1."""
    channels, height, width = model.shape
    return (height, width) if channels == 1 else (height, width, channels)


@plain_torch()
def draw(model: Model, config: DrawConfig) -> tuple[Tensor, float]:
    """Sample images uint8 (num_images, H, W) or (…, C) from `model`; return them and the duration in seconds."""
    _print_isa(model)
    solver = model.solver(config)
    start, device = time.monotonic(), model.denoiser.device
    with progress(f"sampling {model.name}", config.num_images) as advance:
        images = sample(model.denoiser, solver, config.num_images, config.seed, config.batch_size, device, advance)
    return images, time.monotonic() - start


def _print_isa(model: Model) -> None:
    if isinstance(model.denoiser, IntegerUNet):
        print(f"{model.name} runs on integers: {model.denoiser.core.isa}")


@plain_torch()
def write_samples(config: SampleConfig) -> Path:
    """Sample images from a model and write them as an array (.npy) or a picture (.png).

    An array is written batch by batch, in constant memory. After an interruption, the same command resumes.
    """
    model = load_model(config.model, config.runtime)
    model.solver(config)  # raises if the model does not support the config
    if config.output.suffix == ".png":
        model.check_pictures()
    prepare_output(config.output)
    if config.output.suffix == ".npy":
        write_array(model, config, config.output)
    else:
        images, _ = draw(model, config)
        write_bytes(config.output, picture(images, columns=max(1, round(config.num_images**0.5))))
    print(f"{config.num_images} images of {config.model} in {config.output}")
    return config.output


def write_array(model: Model, config: DrawConfig, path: Path) -> None:
    """Sample the images of `draw` into the .npy file `path`, one batch per process at a time.

    They are written to a temporary file, which is renamed at the end (see `_PartialArray`). Its name contains a digest
    of everything that determines the images, so that only the same command resumes it.
    """
    _print_isa(model)
    # The batch size is included because it changes the last bits of floats.
    decides = json.dumps({**origin_of(model, config), "batch_size": config.batch_size}, sort_keys=True)
    digest = hashlib.sha256(decides.encode()).hexdigest()[:12]
    solver, device = model.solver(config), model.denoiser.device
    with _PartialArray(path, digest) as array:
        done = from_main(lambda: array.begin(config, stored_shape(model)))
        with progress(f"sampling {model.name}", config.num_images, done) as advance:
            while done < config.num_images:
                some = min(config.batch_size * count(), config.num_images - done)
                images = sample(model.denoiser, solver, some, config.seed + done, config.batch_size, device)
                from_main(partial(array.append, images.numpy().tobytes()))
                done += some
                advance(done)
        from_main(array.end)


class _PartialArray:
    """An unfinished .npy file: a temporary file `.<name>.<digest>.partial` in the same folder, locked until the end.

    Only the main process opens the file and calls the methods.
    """

    def __init__(self, path: Path, digest: str):
        self.path = path.resolve() if path.is_symlink() else path  # replace the target, not the link
        self.beside = self.path.with_name(f".{self.path.name}.{digest}.partial")
        self._file: BinaryIO | None = None

    def __enter__(self) -> "_PartialArray":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self, config: DrawConfig, one: tuple[int, ...]) -> int:
        """Open and lock the file; truncate it to whole batches, or write the header of a new one.

        Args:
            one: shape of one image.

        Returns:
            The number of images in the file.

        Raises:
            InputError: another process is writing the file, or it cannot be written.
        """
        self._file = self._locked()
        header = io.BytesIO()
        described = {"descr": "|u1", "fortran_order": False, "shape": (config.num_images, *one)}
        np.lib.format.write_array_header_1_0(header, described)
        begin, image_bytes = header.getvalue(), math.prod(one)
        with self.beside.open("rb") as file:
            done = (self.beside.stat().st_size - len(begin)) // (image_bytes * config.batch_size) * config.batch_size
            if file.read(len(begin)) != begin or done > config.num_images:
                done = 0
        self._file.truncate(len(begin) + done * image_bytes if done else 0)
        if done:
            print(f"Going on from image {done} of {config.num_images}.")
        else:
            self.append(begin)
        return done

    def _locked(self) -> BinaryIO:
        """Open and lock the temporary file."""
        while True:
            try:
                file = self.beside.open("ab")
                lock_file(file)
            except BlockingIOError as error:
                raise InputError(f"another process is drawing these images: {self.beside} is its file") from error
            except OSError as error:
                raise InputError(f"cannot write {self.path}: {error.strerror} ({self.beside.name})") from error
            if is_still_there(file, self.beside):
                return file
            file.close()  # another process finished and removed the file between open and lock: try again

    def append(self, content: bytes) -> None:
        assert self._file is not None
        self._file.write(content)
        self._file.flush()

    def end(self) -> None:
        """Rename the file to `path`; delete unlocked temporary files for `path` with other settings.

        Raises:
            InputError: the file was deleted by another program.
        """
        assert self._file is not None
        if not is_still_there(self._file, self.beside):
            raise InputError(f"cannot write {self.path}: {self.beside} was deleted")
        keep_mode(self.path, self.beside)
        if sys.platform == "win32":  # no locks here, and an open file cannot be renamed or deleted
            self._file.close()
        self.beside.replace(self.path)
        for other in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.partial"):
            with suppress(OSError):  # including BlockingIOError, if the file is locked
                with other.open("ab") as file:
                    lock_file(file)
                    if sys.platform != "win32":
                        other.unlink()
                other.unlink(missing_ok=True)


def picture(images: Tensor, columns: int) -> bytes:
    """Arrange images uint8 (N, H, W) or (N, H, W, 3) in rows of `columns`, separated by two black pixels; return the
    bytes of a PNG file."""
    images = images if images.dim() == 4 else images.unsqueeze(-1)
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    cells = images.new_zeros(rows * columns, height + 2, width + 2, channels)
    cells[:count, 2:, 2:] = images
    sheet = rearrange(cells, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns).numpy()
    sheet = np.pad(sheet, ((0, 2), (0, 2), (0, 0)))
    content = io.BytesIO()
    Image.fromarray(sheet if channels == 3 else sheet[..., 0]).save(content, "png")
    return content.getvalue()
