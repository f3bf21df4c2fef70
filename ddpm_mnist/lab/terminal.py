"""Show the progress of a long job."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def span(seconds: float) -> str:
    """Format a duration: "45 s", "1 min 20 s" or "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


# Minimum number of seconds between two progress lines of a job, except its first and last.
LINES_APART = 5


@contextmanager
def progress(label: str, total: int, completed: int = 0) -> Iterator[Callable[..., None]]:
    """Show the progress of a job and its remaining time; yield `advance(completed, status="")`.

    In a terminal this is a bar. Elsewhere (a file, a container's log, a notebook) it is a line at the start, one per
    tenth of the job, and one at the end with the elapsed time.
    """
    if Console().is_terminal:
        name, status = (TextColumn(f"{{task.{part}}}", markup=False) for part in ("description", "fields[status]"))
        columns = (name, BarColumn(), MofNCompleteColumn(), status)
        with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True)) as bar:
            task = bar.add_task(label, total=total, completed=completed, status="")
            yield lambda completed, status="": bar.update(task, completed=completed, status=status)
        return
    show = print if completed < total else lambda *_, **__: None
    start = last_time = time.monotonic()
    first = last = completed
    said = ""

    def advance(completed: int, status: str = "") -> None:
        nonlocal last, last_time, said
        now, said = time.monotonic(), f", {status}" if status else ""
        tenth = completed * 10 // total > last * 10 // total
        if first < completed < total and tenth and now - last_time >= LINES_APART:
            left = (now - start) / (completed - first) * (total - completed)
            show(f"{label} {completed}/{total}, {span(left)} left{said}", flush=True)
            last, last_time = completed, now

    show(f"{label} {completed}/{total}", flush=True)
    yield advance
    show(f"{label} done in {span(time.monotonic() - start)}{said}", flush=True)
