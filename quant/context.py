"""Keep the process's settings of torch out of a computation: default dtype and device, precision, autocast."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# Settings of the whole process, and the values under which torch computes by default: a getter, a setter, the value.
_mkldnn: Any = torch.backends.mkldnn
_SETTINGS = (
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    # `torch.set_float32_matmul_precision("medium")` lets products of float32 be rounded to bfloat16.
    (lambda: _mkldnn.matmul.fp32_precision, lambda value: setattr(_mkldnn.matmul, "fp32_precision", value), "ieee"),
    (lambda: _mkldnn.conv.fp32_precision, lambda value: setattr(_mkldnn.conv, "fp32_precision", value), "ieee"),
)
_lock = threading.Lock()
_inside = 0  # contexts that are open in all threads
_own = threading.local()  # `.count`: those of this thread
_before: list[Any] = []


@contextmanager
def plain_torch(inference: bool = False) -> Iterator[None]:
    """Compute as torch does by default: float32 on the CPU, no autocast, no inference mode, no reduced precision.

    A context manager and a decorator: inside, results depend on the arguments alone. The default dtype and the
    precision belong to the whole process, so other threads see those of torch while one is inside.

    Args:
        inference: keep inference mode where it is on. Parameters that are made in it can never be trained.
    """
    with ExitStack() as contexts:
        for device_type in _device_types():
            # Only where it is on: an exported or compiled graph would keep the context.
            if torch.is_autocast_enabled(device_type):
                contexts.enter_context(torch.autocast(device_type, enabled=False))
        if torch.is_inference_mode_enabled() and not inference:
            contexts.enter_context(torch.inference_mode(False))
            contexts.enter_context(torch.no_grad())  # as before: leaving inference mode would switch gradients on
        if torch.get_default_device().type != "cpu":
            contexts.enter_context(torch.device("cpu"))
        if not torch.compiler.is_compiling():
            contexts.enter_context(_default_settings())
        yield


def _device_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


@contextmanager
def _default_settings() -> Iterator[None]:
    """Set the process's settings with the first context that is opened, and restore them with the last."""
    global _inside
    with _lock:
        if _inside == 0:
            _before[:] = [get() for get, _, _ in _SETTINGS]
            _apply([value for _, _, value in _SETTINGS])
        _inside += 1
        _own.count = getattr(_own, "count", 0) + 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            _own.count -= 1
            if _inside == 0:
                _apply(_before)


def _apply(values: list[Any]) -> None:
    for (get, set_, _), value in zip(_SETTINGS, values, strict=True):
        if get() != value:
            set_(value)


def _forget_other_threads() -> None:
    """In a forked child, where only the forking thread lives on: count its contexts alone."""
    global _lock, _inside
    _lock = threading.Lock()
    others, _inside = _inside, getattr(_own, "count", 0)
    if others and not _inside:
        _apply(_before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
