"""Load training images: a named data set, a folder of images, or an array."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ddpm_mnist.datasets import LABELLED, load_labelled
from ddpm_mnist.lab import InputError

# Limit on the size of an image in a folder: the header of a small file can claim any number of pixels.
MAX_PIXELS = 1 << 24


# Possible numbers of channels: grey or colour, without or with transparency.
CHANNELS = (1, 2, 3, 4)


# Formats whose suffixes Pillow registers but which it cannot read.
ONLY_NAMED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


def load_images(
    data: str, split: str = "train", image_size: int | tuple[int, int] | None = None, root: Path | None = None
) -> Tensor:
    """Load the images of `data`: uint8 (N, H, W) for one channel, (N, H, W, 3) for colour.

    Args:
        data: one of `LABELLED`; a folder, which is searched recursively for images (links are followed, hidden files
            and folders skipped) in sorted order; or a .npy file, uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3).
        split: "train" or "test"; folders and .npy files have "train" only.
        image_size: (H, W), or one number for both. Images are cropped at the centre to this aspect ratio and resized.
            The images of a folder may then differ in size, and grey ones are converted if others are in colour. None:
            images keep their size.
        root: as for `load_mnist`.

    Raises:
        InputError: the data does not exist or is not as described here.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    path = Path(data)
    if data not in LABELLED and split != "train":
        raise InputError(f'"{data}" has no split "{split}": only {", ".join(LABELLED)} have')
    if data in LABELLED:
        images = load_labelled(data, split, root)[0].numpy()
    elif path.is_dir():
        try:
            return torch.from_numpy(_read_folder(path, size))
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    elif path.suffix.lower() == ".npy" and path.is_file():
        images = _read_array(path)
    else:
        wrong = "is no .npy file" if path.exists() else "does not exist"
        raise InputError(f'data "{data}" {wrong}: give {", ".join(LABELLED)}, a folder of images, or a .npy file')
    if size and images.shape[1:3] != size:
        images = np.stack([_fit(Image.fromarray(image), size) for image in images])
    return torch.from_numpy(images)


def _read_folder(folder: Path, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Read all images in `folder` and its subfolders; they must have one shape."""
    Image.init()
    kinds = Image.OPEN.keys() - ONLY_NAMED
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds}
    files = sorted(_files(folder))
    paths = [path for path in files if path.suffix.lower() in suffixes]
    others = [path for path in files if path.suffix.lower() not in suffixes]
    if not paths:
        raise InputError(f"{folder} holds no images: give a folder of files like .png or .jpg")
    if others:
        print(f"{folder}: {others[0]}{f' and {len(others) - 1} more' * (len(others) > 1)} left out, not images by name")
    images = [_read_image(path, size) for path in paths]
    if size and len({image.ndim for image in images}) > 1:
        images = [image if image.ndim == 3 else np.stack([image] * 3, axis=2) for image in images]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise InputError(
                f"{path} is {_shape(image)}, {paths[0]} is {_shape(images[0])}: give image_size to make them alike"
            )
    return np.stack(images)


def _files(folder: Path) -> Iterator[Path]:
    """Yield every file in `folder` and its subfolders that is not hidden, following links.

    Raises:
        InputError: a link is broken or leads to a folder above it, or an entry is no regular file.
    """

    def fail(error: OSError) -> None:
        raise error

    for name, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        # Hidden files are no data: .ipynb_checkpoints holds copies, macOS writes a ._name beside each file.
        folders[:] = [inner for inner in folders if inner[0] != "."]
        for inner in folders:
            path = Path(name, inner)
            if path.is_symlink() and Path(name).resolve().is_relative_to(path.resolve()):
                raise InputError(f"{path} links to a folder that it lies in: delete the link")
        for file in files:
            if file[0] != ".":
                path = Path(name, file)
                if not path.is_file():
                    what = "a link that leads nowhere" if path.is_symlink() else "no file"
                    raise InputError(f"{path} is {what}: delete it")
                yield path


def _shape(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[0]}×{image.shape[1]} in {'grey' if image.ndim == 2 else 'colour'}"


def _read_image(path: Path, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Read an image, rotated by its EXIF orientation, in grey (H, W) or in colour (H, W, 3)."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"has {file.width}×{file.height} pixels, more than {MAX_PIXELS:,}")
            # An .mpo file is a camera's .jpg: the photo is the first image, smaller copies follow.
            if (count := getattr(file, "n_frames", 1)) > 1 and file.format != "MPO":
                raise ValueError(f"holds {count} images: save each as a file of its own")
            if file.mode in ("I", "F") or any(map(_is_of_16_bits, file.tile)):
                raise ValueError(f"has more than 8 bits a pixel (mode {file.mode})")
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError("is transparent in places: lay it on a background first")
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except Exception as error:  # Pillow's plugins raise many types of exceptions
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} cannot be read as an image of 8 bits: {reason}") from error
    return np.asarray(image) if size in (None, (image.height, image.width)) else _fit(image, size)


def _is_of_16_bits(tile: Any) -> bool:
    """Return whether a tile has more than 8 bits per channel in the file: Pillow silently reduces colours to 8."""
    codec, _, _, options = tile
    return codec == "SGI16" or ";16" in str(options) or (codec.startswith("ppm") and options[1] > 255)


def _fit(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Crop `image` at its centre to the aspect ratio of `size` (H, W), and resize it to `size`."""
    return np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS))


def _read_array(path: Path) -> NDArray[np.uint8]:
    """Read the array in `path`: uint8 (N, H, W) or (N, H, W, 3)."""
    right = "an array of images is uint8, of shape (N, H, W) or (N, H, W, 1) in grey, (N, H, W, 3) in colour"
    try:
        # Memory-mapped first, which checks the size in the header against the file's size before memory is allocated.
        mapped = np.lib.format.open_memmap(path, mode="r")
        if (rest := path.stat().st_size - mapped.offset - mapped.nbytes) > 0:
            raise ValueError(f"{rest:,} bytes follow the array")
        images = np.array(mapped)
    except Exception as error:  # from the header, which is parsed as a Python literal, or from the system
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be read: {reason}; {right}") from error
    if images.dtype != np.uint8:
        raise InputError(f"{path} holds {images.dtype}: {right}")
    if images.ndim == 3 and images.shape[2] in CHANNELS:
        raise InputError(f"{path} has shape {images.shape}, which may be one image with its channels: {right}")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim != 3 and (images.ndim != 4 or images.shape[3] != 3):
        raise InputError(f"{path} has shape {images.shape}: {right}")
    if not images.size:
        raise InputError(f"{path} is empty, of shape {images.shape}: {right}")
    return images
