"""What every long job does with its folder: whole files only, a log that survives, a state to resume from."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_mnist import InputError, processes


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half of one.

    Of several processes the main one writes, here and in `RunState`.
    """
    if not processes.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def prepare_output(path: Path) -> None:
    """Make the folder of an output before long work starts; InputError if it cannot hold the file."""
    processes.from_main(lambda: _prepare_output(path))


def _prepare_output(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: no permission to write into {path.parent}")


class RunState:
    """The resumable part of a run: `state/latest.pt` and the lines of `log.jsonl` up to it.

    A state belongs to one configuration. A folder whose state was made by another is refused, so that no
    run continues under settings that its earlier part did not have.

    Attributes:
        state: what was saved last, or None for a new run. The log is cut back to that moment. Of several processes
            the main one alone reads the folder and writes into it.

    Raises:
        InputError: the folder belongs to another configuration, holds a model but no state, or cannot be read.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.path = folder / "state" / "latest.pt"
        self.log_path = folder / "log.jsonl"
        self.fingerprint = fingerprint
        self.state: dict[str, Any] | None = processes.from_main(lambda: self._open(folder))

    def _open(self, folder: Path) -> dict[str, Any] | None:
        if self.path.exists():
            return self._resume(folder)
        if (folder / "config.json").exists() or (folder / "unet").exists():
            raise InputError(f"{folder} holds a model but no state to go on from: choose another output folder")
        prepare_output(self.log_path)
        self.log_path.write_text("")
        return None

    def _resume(self, folder: Path) -> dict[str, Any]:
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            theirs, log_bytes, state = saved["fingerprint"], saved["log_bytes"], saved["state"]
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{self.path} cannot be read; delete {folder} to start anew ({reason})") from error
        ours, theirs = _flat(self.fingerprint), _flat(theirs)
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
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state` (tensors, numbers, and containers of them), in one step."""
        if not processes.is_main():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        log_bytes = self.log_path.stat().st_size
        torch.save({"fingerprint": self.fingerprint, "log_bytes": log_bytes, "state": state}, beside)
        beside.replace(self.path)

    def log(self, **row: Any) -> None:
        if not processes.is_main():
            return
        with self.log_path.open("a") as log:
            log.write(json.dumps(row) + "\n")


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """`nested` with the keys of its parts joined by dots, as they are typed."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        parts = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}" if name else key: part for name, part in parts.items()}
    return flat


def update_generator(seed: int, update: int) -> torch.Generator:
    """The generator of everything that one update draws, in all processes together, so that a resumed run repeats it.

    torch's generator on the CPU uses 32 bits of its seed and drops the rest without a word. Seeds are spread over
    those bits by an odd constant; the updates of each count up from there.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + update) % (1 << 32))


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def progress(label: str, total: int, completed: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar with the time left; yields `advance(completed, status="")`."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[status]}")) as bar:
        task = bar.add_task("", total=total, completed=completed, status="")
        yield lambda completed, status="": bar.update(task, completed=completed, status=status)
