"""Write files atomically: a reader sees the old file or the new one, never a part."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddpm_mnist.lab import InputError, processes
from ddpm_mnist.lab.locks import TEMPORARY_SUFFIX, forget_lost_lock, require_folder


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: to a temporary file in the same folder, which then replaces `path`.

    Only the main process writes.

    Raises:
        InputError: the file cannot be written, e.g. on a full or read-only disk. An existing file stays unchanged.
    """
    if not processes.is_main():
        return
    require_folder(path)
    path = path.resolve() if path.is_symlink() else path  # replace the target, not the link
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
    """Copy the permissions of `path`, if it exists, to the temporary file `beside` that will replace it."""
    if path.exists():
        beside.chmod(path.stat().st_mode & 0o777)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the InputError for a failed write to `path`."""
    return InputError(f"cannot write {path}: {error.strerror}")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically (see `write_bytes`)."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` atomically (see `write_bytes`)."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def prepare_output(path: Path) -> None:
    """Create the folder of the output file `path` before a long job starts; raise InputError if the file cannot be
    written."""
    processes.from_main(lambda: _prepare_output(path))


def _prepare_output(path: Path) -> None:
    try:
        forget_lost_lock(path.parent)
        require_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is not a regular file")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"cannot write {path}: it is read-only")
        beside = _beside(path.resolve())
        beside.touch()  # raises if the folder is not writable or the name is too long
        beside.unlink(missing_ok=True)
    except InputError:
        raise
    except FileExistsError as error:
        what = "a link that leads nowhere" if os.path.islink(error.filename) else "a file, and no folder"
        raise InputError(f"cannot write {path}: {error.filename} is {what}") from error
    except OSError as error:
        raise cannot_write(path, error) from error
    except (ValueError, RuntimeError) as error:  # a null byte in the name; a cycle of symbolic links
        raise InputError(f"cannot write {str(path)!r}: {error}") from error


def holds_model(folder: Path) -> bool:
    """Return whether `folder` contains files of a model, which must not be overwritten."""
    parts = ("config.json", "unet", "model_index.json", "model.safetensors", "model.onnx", "scheduler", "metrics.json")
    return any((folder / part).exists() for part in parts)
