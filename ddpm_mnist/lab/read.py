"""Files that are read back: whatever stands in them, the answer is their content or one line that says what is wrong.

No reader here runs code, or takes more memory than the file's own size asks for.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_mnist.lab import one_line

# A record of a run, a config of a network: more than this is none.
MAX_JSON_BYTES = 16 << 20


def read_limited(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """The text in `path`, UTF-8; ValueError for another encoding, or more than `limit` bytes."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def read_json(path: Path) -> Any:
    """The value in `path`.

    Raises:
        ValueError: it is no JSON, or holds a key twice, or too large a number, or is nested too deeply; in one line.
    """
    return parse_json(read_limited(path), path.name)


def parse_json(text: str, name: str) -> Any:
    """The value in `text`; ValueError that begins with `name` where it holds none, as for `read_json`."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_int=_short)
    except (ValueError, RecursionError) as error:
        raise ValueError(one_line(f"{name} is no JSON: {error}")) from error


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
    """What `torch.save` wrote into `path`: dense tensors, numbers, texts, and containers of them.

    Raises:
        ValueError: it is something else, damaged, or takes more memory than its own size; in one line.
        PermissionError: it may not be read.
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
    except Exception as error:  # each way to be broken has an error of its own
        raise ValueError(one_line(f"{path} cannot be read: {error or type(error).__name__}")) from error


def _check_plain(value: Any) -> None:
    """ValueError for anything but dense tensors of finite numbers, numbers, texts, and containers of them."""
    if isinstance(value, dict):
        _check_plain([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            _check_plain(part)
    elif type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu":
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor of {tuple(value.shape)} is larger than what is there")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError("it holds what is no finite number")
    elif not isinstance(value, bool | int | float | str | None):
        raise ValueError(f"a {type(value).__name__} does not belong there")
