"""Make a computation independent of the process's torch settings: default dtype and device, precision, autocast."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# Process-wide settings: getter, setter, and torch's default value.
_mkldnn: Any = torch.backends.mkldnn
_SETTINGS = (
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    # `torch.set_float32_matmul_precision("medium")` allows products of float32 in bfloat16.
    (lambda: _mkldnn.matmul.fp32_precision, lambda value: setattr(_mkldnn.matmul, "fp32_precision", value), "ieee"),
    (lambda: _mkldnn.conv.fp32_precision, lambda value: setattr(_mkldnn.conv, "fp32_precision", value), "ieee"),
)
_lock = threading.Lock()
_inside = 0  # number of open contexts in all threads
_own = threading.local()  # `.count`: number of open contexts in this thread
_before: list[Any] = []


@contextmanager
def plain_torch(inference: bool = False) -> Iterator[None]:
    """Compute with torch's defaults: float32 on the CPU, no autocast, no inference mode, no reduced precision.

    This is a context manager and a decorator. Inside, results depend on the arguments only. The default dtype and the
    precision are process-wide, so other threads also see torch's defaults while a context is open.

    Args:
        inference: keep inference mode if it is on. Parameters that are created in it can never be trained.
    """
    with ExitStack() as contexts:
        for device_type in _device_types():
            # Only if it is on: the context would become part of an exported or compiled graph.
            if torch.is_autocast_enabled(device_type):
                contexts.enter_context(torch.autocast(device_type, enabled=False))
        if torch.is_inference_mode_enabled() and not inference:
            contexts.enter_context(torch.inference_mode(False))
            contexts.enter_context(torch.no_grad())  # leaving inference mode would enable gradients
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
    """Apply torch's defaults when the first context opens, and restore the settings when the last one closes."""
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
    """In a forked child, count only the contexts of the forking thread, because no other thread exists there."""
    global _lock, _inside
    _lock = threading.Lock()
    others, _inside = _inside, getattr(_own, "count", 0)
    if others and not _inside:
        _apply(_before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
