"""How much memory a piece of work takes at its peak."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_memory(step: Callable[[], Any]) -> float | None:
    """MiB by which the resident memory grows at its peak during `step`; None where the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed goes back first
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):  # the last: Windows has no library of the whole process
        step()
        return None
    step()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field: str) -> int:
    """A line of the process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
