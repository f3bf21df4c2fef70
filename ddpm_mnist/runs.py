"""What every long job does with its folder: whole files only, a log that survives, a state to resume from."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_mnist import InputError


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


class RunState:
    """The resumable part of a run: `state/latest.pt` and the lines of `log.jsonl` up to it.

    A state belongs to one configuration. A folder whose state was made by another is refused, so that no
    run continues under settings that its earlier part did not have.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.path = folder / "state" / "latest.pt"
        self.log_path = folder / "log.jsonl"
        self.fingerprint = fingerprint

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None for a new run; the log is cut back to the moment of that state."""
        if not self.path.exists():
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self.log_path.write_text("")
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{self.path} cannot be read; delete it to start anew ({error})") from error
        for key in sorted(self.fingerprint.keys() | saved["fingerprint"].keys()):
            then, now = saved["fingerprint"].get(key), self.fingerprint.get(key)
            if then != now:
                raise InputError(
                    f"{self.path.parent.parent} was begun with {key} = {then}, now it is {now}: "
                    "choose another output folder, or delete this one"
                )
        with self.log_path.open("r+b") as log:
            log.truncate(saved["log_bytes"])
        return saved["state"]

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state` (tensors, numbers, and containers of them), in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        log_bytes = self.log_path.stat().st_size
        torch.save({"fingerprint": self.fingerprint, "log_bytes": log_bytes, "state": state}, beside)
        beside.replace(self.path)

    def log(self, **row: Any) -> None:
        with self.log_path.open("a") as log:
            log.write(json.dumps(row) + "\n")


def update_generator(seed: int, update: int, rank: int = 0) -> torch.Generator:
    """The generator of everything that one update of one process draws, so that a resumed run repeats it.

    torch's generator on the CPU uses 32 bits of its seed and drops the rest without a word. Seeds and ranks are
    spread over those bits by odd constants; the updates of each count up from there.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + rank * 0x85EBCA77 + update) % (1 << 32))


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def progress(label: str, total: int, completed: int = 0, visible: bool = True) -> Iterator[Callable[..., None]]:
    """A progress bar with the time left; yields `advance(completed, status="")`."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[status]}"), disable=not visible) as bar:
        task = bar.add_task("", total=total, completed=completed, status="")
        yield lambda completed, status="": bar.update(task, completed=completed, status=status)
