"""Write files whole: a reader sees the old file or the new one, never half of one."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddpm_mnist.lab import InputError, processes
from ddpm_mnist.lab.locks import HALF, forget_lost_lock, require_folder


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half of one.

    Of several processes the main one writes, here and in `RunState`.

    Raises:
        InputError: the disk is full or read-only, or the like; what was there is there still.
    """
    if not processes.is_main():
        return
    require_folder(path)
    path = path.resolve() if path.is_symlink() else path  # the link stays one
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        keep_mode(path, beside)
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def keep_mode(path: Path, beside: Path) -> None:
    """Give the file `beside`, which will take the place of `path`, the permissions of what is there."""
    if path.exists():
        beside.chmod(path.stat().st_mode & 0o777)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{HALF}")


def cannot_write(path: Path, error: OSError) -> InputError:
    """Make the error that says why `path` cannot be written."""
    return InputError(f"cannot write {path}: {error.strerror}")


def write_text(path: Path, text: str) -> None:
    """Write as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write as JSON, as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def prepare_output(path: Path) -> None:
    """Make the folder of an output before long work starts; InputError if it cannot hold the file."""
    processes.from_main(lambda: _prepare_output(path))


def _prepare_output(path: Path) -> None:
    try:
        forget_lost_lock(path.parent)
        require_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is no regular file")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"cannot write {path}: it is read-only")
        beside = _beside(path.resolve())
        beside.touch()  # is it allowed, and is the name not too long?
        beside.unlink(missing_ok=True)
    except InputError:
        raise
    except FileExistsError as error:
        what = "a link that leads nowhere" if os.path.islink(error.filename) else "a file, and no folder"
        raise InputError(f"cannot write {path}: {error.filename} is {what}") from error
    except OSError as error:
        raise cannot_write(path, error) from error
    except (ValueError, RuntimeError) as error:  # a name with a zero byte; links in a circle
        raise InputError(f"cannot write {str(path)!r}: {error}") from error


def holds_model(folder: Path) -> bool:
    """Whether something lies there that a model is made of, which is not to be written over."""
    parts = ("config.json", "unet", "model_index.json", "model.safetensors", "model.onnx", "scheduler", "metrics.json")
    return any((folder / part).exists() for part in parts)
