"""What every long job does with its folder: whole files only, a log that survives, a state to resume from."""

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_mnist import InputError
from ddpm_mnist.tracking import Tracker


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half of one.

    Raises:
        InputError: the disk is full or read-only, or the like; what was there is there still.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror}")


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def prepare_output(path: Path) -> None:
    """Make the folder of an output before long work starts; InputError if it cannot hold the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: no permission to write into {path.parent}")


_locks: dict[Path, BinaryIO] = {}


def lock_folder(folder: Path) -> None:
    """Keep other processes out of `folder`, which exists, until this one ends, however it does.

    The lock is the system's, on the file `.lock`, which stays. Windows and file systems without locks have none.
    Of several processes that one job was launched as, the first holds it.

    Raises:
        InputError: another process writes into the folder.
    """
    if sys.platform == "win32":
        return
    import fcntl

    path = folder.resolve() / ".lock"
    if path in _locks or os.environ.get("RANK", "0") != "0":
        return
    file = path.open("ab+", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().decode()
        raise InputError(f"process {owner} is writing into {folder}: wait for it, or choose another folder") from error
    except OSError:  # no locks here
        return
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    _locks[path] = file


class RunState:
    """The resumable part of a run: `state/latest.pt` and the lines of `log.jsonl` up to it. It locks the folder.

    A state belongs to one configuration. A folder whose state was made by another is refused, so that no
    run continues under settings that its earlier part did not have.

    Attributes:
        state: what was saved last, or None for a new run. The log is cut back to that moment.
        tracker: where the rows of the log are shown besides.

    Raises:
        InputError: the folder belongs to another configuration or to a process that is at work, holds a model but no
            state, or cannot be read.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], tracker: str = "none"):
        self.path = folder / "state" / "latest.pt"
        self.log_path = folder / "log.jsonl"
        self.fingerprint = fingerprint
        self.state: dict[str, Any] | None = None
        prepare_output(self.log_path)
        lock_folder(folder)
        if self.path.exists():
            self._resume(folder)
        elif (folder / "config.json").exists() or (folder / "unet").exists():
            raise InputError(f"{folder} holds a model but no state to go on from: choose another output folder")
        else:
            write_text(self.log_path, "")
        self.tracker = Tracker(tracker, folder)

    def _resume(self, folder: Path) -> None:
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            theirs, log_bytes, self.state = saved["fingerprint"], saved["log_bytes"], saved["state"]
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{self.path} cannot be read; delete {folder} to start anew ({reason})") from error
        ours, theirs = flat(self.fingerprint), flat(theirs)
        for key in sorted(ours.keys() | theirs.keys()):
            then, now = theirs.get(key), ours.get(key)
            if then != now:
                raise InputError(
                    f"{folder} was begun with {key} = {then}, now it is {now}: "
                    "choose another output folder, or delete this one"
                )
        if not self.log_path.exists():
            raise InputError(f"{self.log_path} is gone; delete {folder} to start anew")
        with self.log_path.open("r+b") as log:
            log.truncate(log_bytes)

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state` (tensors, numbers, and containers of them), in one step."""
        try:
            log_bytes = self.log_path.stat().st_size
        except OSError as error:  # the folder was taken away
            raise _cannot_write(self.path, error) from error
        content = io.BytesIO()  # of a full disk torch.save itself would tell no OSError
        torch.save({"fingerprint": self.fingerprint, "log_bytes": log_bytes, "state": state}, content)
        write_bytes(self.path, content.getvalue())

    def log(self, **row: Any) -> None:
        try:
            with self.log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
        except OSError as error:
            raise _cannot_write(self.log_path, error) from error
        self.tracker.log(row)


def flat(nested: dict[str, Any]) -> dict[str, Any]:
    """`nested` with the keys of its parts joined by dots, as they are typed."""
    joined: dict[str, Any] = {}
    for key, value in nested.items():
        parts = flat(value) if isinstance(value, dict) else {"": value}
        joined |= {f"{key}.{name}" if name else key: part for name, part in parts.items()}
    return joined


def update_generator(seed: int, update: int, rank: int = 0) -> torch.Generator:
    """The generator of everything that one update of one process draws, so that a resumed run repeats it.

    torch's generator on the CPU uses 32 bits of its seed and drops the rest without a word. Seeds and ranks are
    spread over those bits by odd constants; the updates of each count up from there.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + rank * 0x85EBCA77 + update) % (1 << 32))


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def span(seconds: float) -> str:
    """ "45 s", "1 min 20 s" or "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


# Seconds between two lines of a job at least, its first and last apart.
LINES_APART = 5


@contextmanager
def progress(label: str, total: int, completed: int = 0, visible: bool = True) -> Iterator[Callable[..., None]]:
    """Show how far a job is, with the time left; yields `advance(completed, status="")`.

    In a terminal a bar; elsewhere (a file, a container's log, a notebook) a line at the start, one for every tenth, and
    one at the end with the time that it took.
    """
    if Console().is_terminal:
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), disable=not visible) as bar:
            task = bar.add_task("", total=total, completed=completed, status="")
            yield lambda completed, status="": bar.update(task, completed=completed, status=status)
        return
    show = print if visible and completed < total else lambda *_, **__: None
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
