"""Measure the peak memory of a function."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_memory(step: Callable[[], Any]) -> float | None:
    """Call `step` and return the peak growth of resident memory in MiB; None if the system does not report it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):  # TypeError: CDLL(None) on Windows
        step()
        return None
    step()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field: str) -> int:
    """Return a field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
