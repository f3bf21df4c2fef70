"""Read text, JSON and saved states safely: return the content, or raise an error with a message of one line.

No reader executes code from a file or allocates much more memory than the file's size.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_mnist.lab import one_line

# Upper limit for records of runs and configs of networks.
MAX_JSON_BYTES = 16 << 20


def read_limited(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """Return the UTF-8 text of `path`; raise ValueError for another encoding or more than `limit` bytes."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`.

    Raises:
        ValueError: the file is no valid JSON, repeats a key, holds a number out of range, or is nested too deeply.
    """
    return parse_json(read_limited(path), path.name)


def parse_json(text: str, name: str) -> Any:
    """Return the JSON value in `text`; raise ValueError as `read_json` does, with `name` in the message."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_int=_short)
    except (ValueError, RecursionError) as error:
        raise ValueError(one_line(f"{name} is not JSON: {error}")) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return keys


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits} is too large a number")
    return number


def _short(digits: str) -> int:
    if abs(number := int(digits)) >= 1 << 63:
        raise ValueError(f"{digits} is too large a number")
    return number


def read_state(path: Path) -> Any:
    """Load an object that `torch.save` wrote: dense finite tensors, numbers, strings, and containers of them.

    Raises:
        ValueError: the file is damaged, holds other objects, or would take more memory than its size.
        PermissionError: the file is not readable.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_plain(content)
        return content
    except PermissionError:
        raise
    except Exception as error:  # damaged files raise many types of exceptions
        raise ValueError(one_line(f"{path} cannot be read: {error or type(error).__name__}")) from error


def _check_plain(value: Any) -> None:
    """Raise ValueError for anything but dense tensors of finite numbers, numbers, strings, and containers of them."""
    if isinstance(value, dict):
        _check_plain([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            _check_plain(part)
    elif type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu":
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor of {tuple(value.shape)} is larger than what is there")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError("it contains a value that is not finite")
    elif not isinstance(value, bool | int | float | str | None):
        raise ValueError(f"a {type(value).__name__} does not belong there")
