"""Keep what a process sets for torch out of a computation: default dtype and device, autocast, inference mode."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_dtype_lock = threading.Lock()
_dtype_users = 0
_dtype_before = torch.float32


@contextmanager
def plain_torch(inference: bool = False) -> Iterator[None]:
    """Compute as torch does by default: new tensors in float32 on the CPU, no autocast, no inference mode.

    A context manager and a decorator: inside, results depend on the arguments alone. The default dtype belongs to the
    whole process, so other threads see float32 while one is inside.

    Args:
        inference: keep inference mode where it is on. What is made in it, such as a parameter, can never be trained.
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
            contexts.enter_context(_float32_by_default())
        yield


def _device_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """The first thread inside sets the default dtype, and the last one outside gives it back."""
    global _dtype_users, _dtype_before
    with _dtype_lock:
        counted = _dtype_users > 0 or torch.get_default_dtype() != torch.float32
        if counted and _dtype_users == 0:
            _dtype_before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _dtype_users += counted
    try:
        yield
    finally:
        with _dtype_lock:
            _dtype_users -= counted
            if counted and _dtype_users == 0:
                torch.set_default_dtype(_dtype_before)


def _begin_anew() -> None:
    """In a forked child: the threads that were inside are not there."""
    global _dtype_lock, _dtype_users
    _dtype_lock = threading.Lock()
    if _dtype_users:
        torch.set_default_dtype(_dtype_before)
    _dtype_users = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
