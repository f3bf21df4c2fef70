"""Save and load students: `model.safetensors`, with weights packed to their bit-width, and `config.json`.

Codes are packed (`quant.packing`) into one tensor of bytes per layer. Step sizes, zero points, biases and normalisation
parameters are stored unchanged, so that a loaded model computes bit for bit the same as the saved one.
"""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from quant.functional import code_range
from quant.packing import pack, unpack

FORMAT = 3
WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_CONFIG_BYTES = 16 << 20


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], bits: dict[str, float], config: dict[str, Any]) -> None:
    """Write `tensors` and `config` into `folder`.

    Args:
        bits: bit-width of each tensor that holds codes (int8), by name.
        config: data from which the model is rebuilt, in JSON types.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packed = {name: pack(x, bits[name]) if name in bits else x.cpu().contiguous() for name, x in tensors.items()}
    weights = save_tensors(packed)
    codes = {
        name: {"bits": width, "step": code_range(width, signed=True).step, "shape": list(tensors[name].shape)}
        for name, width in bits.items()
    }
    content = {"format": FORMAT, **config, "codes": codes}
    content["sha256"] = _digest(content, weights)
    # Both files are written before either is renamed, so that a full disk leaves an existing checkpoint intact.
    files = {WEIGHTS: weights, CONFIG: (json.dumps(content, indent=2) + "\n").encode()}
    beside = {name: folder / f".{name}.{os.getpid()}.{threading.get_ident()}.half" for name in files}
    try:
        for name, data in files.items():
            beside[name].write_bytes(data)
        for name, path in beside.items():
            path.replace(folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, with codes unpacked to int8, and the configuration that `write_checkpoint` wrote.

    Raises:
        ValueError: a file is truncated or altered, or this version does not support its format or codes.
    """
    config = _read_config(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise ValueError(f"{CONFIG} is of format {config.get('format')}, this version reads format {FORMAT}")
    weights = (folder / WEIGHTS).read_bytes()
    if _digest(config, weights) != config.get("sha256"):
        raise ValueError(f"{WEIGHTS} or {CONFIG} is truncated or altered: their SHA-256 is not the one that was saved")
    try:
        tensors = load_tensors(weights)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} is not a safetensors file: {error}") from error
    for name, code in config["codes"].items():
        step = code.get("step", 1)  # missing in older files, which have no mid-rise codes
        if step != code_range(code["bits"], signed=True).step:
            raise ValueError(f"{name}: this version reads no codes of {code['bits']} bits that are {step} apart")
        tensors[name] = unpack(tensors[name], code["bits"], code["shape"])
    return tensors, config


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_CONFIG_BYTES:,} bytes")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return config


def _digest(config: dict[str, Any], weights: bytes) -> str:
    """Return the SHA-256 of a checkpoint's weights and configuration, without the digest in the configuration."""
    rest = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode() + weights).hexdigest()
