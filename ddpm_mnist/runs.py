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
from ddpm_mnist.files import one_line, parse_json, read_limited, read_state


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write as JSON, as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def prepare_output(path: Path) -> None:
    """Make the folder of an output before long work starts; InputError if it cannot hold the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    except ValueError as error:  # a name with a zero byte
        raise InputError(f"cannot write {str(path)!r}: {error}") from error
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: no permission to write into {path.parent}")


class RunState:
    """The resumable part of a run: `state/latest.pt` and the lines of `log.jsonl` up to it.

    A state belongs to one configuration. A folder whose state was made by another is refused, so that no
    run continues under settings that its earlier part did not have.

    Attributes:
        state: what was saved last, or None for a new run. The log is cut back to that moment.

    Raises:
        InputError: the folder belongs to another configuration, holds a model but no state, or cannot be read.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.path = folder / "state" / "latest.pt"
        self.log_path = folder / "log.jsonl"
        self.fingerprint = fingerprint
        self.state: dict[str, Any] | None = None
        if self.path.exists():
            self._resume(folder)
            return
        if (folder / "config.json").exists() or (folder / "unet").exists():
            raise InputError(f"{folder} holds a model but no state to go on from: choose another output folder")
        prepare_output(self.log_path)
        self.log_path.write_text("")

    def _resume(self, folder: Path) -> None:
        with self.restoring():
            saved = read_state(self.path)
            ours, theirs = _flat(self.fingerprint), _flat(saved["fingerprint"])
            differing = [key for key in sorted(ours.keys() | theirs.keys()) if theirs.get(key) != ours.get(key)]
            log_bytes, self.state = saved["log_bytes"], saved["state"]
        if differing:
            key = differing[0]
            raise InputError(
                f"{folder} was begun with {key} = {theirs.get(key)}, now it is {ours.get(key)}: "
                "choose another output folder, or delete this one"
            )
        if not self.log_path.exists():
            raise InputError(f"{self.log_path} is gone; delete {folder} to start anew")
        with self.restoring(), self.log_path.open("r+b") as log:
            if type(log_bytes) is not int or not 0 <= log_bytes <= self.log_path.stat().st_size:
                raise ValueError(f"{self.log_path.name} has not the {log_bytes} bytes that it had")
            log.truncate(log_bytes)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Inside, whatever keeps the state from being taken over is an InputError that names its file."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # whatever is wrong with a state, it is of no use
            reason = one_line(str(error) or type(error).__name__)
            raise InputError(
                f"{self.path} cannot be read; delete {self.path.parents[1]} to start anew ({reason})"
            ) from error

    def progress(self, total: int) -> tuple[int, float]:
        """How many of `total` updates the state has seen, and the seconds that they took; (0, 0.0) without a state."""
        if self.state is None:
            return 0, 0.0
        with self.restoring():
            update, seconds = self.state["update"], self.state["seconds"]
            if type(update) is not int or not 0 <= update <= total or not 0 <= seconds < float("inf"):
                raise ValueError(f"it says {update} of {total} updates in {seconds} seconds")
            return update, float(seconds)

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state` (tensors, numbers, and containers of them), in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        log_bytes = self.log_path.stat().st_size
        torch.save({"fingerprint": self.fingerprint, "log_bytes": log_bytes, "state": state}, beside)
        beside.replace(self.path)

    def log(self, **row: Any) -> None:
        """Append a line to the log."""
        with self.log_path.open("a") as log:
            log.write(json.dumps(row) + "\n")


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """`nested` with the keys of its parts joined by dots, as they are typed."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        parts = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}" if name else key: part for name, part in parts.items()}
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], names: set[str]) -> None:
    """Give `optimizer` what its `state_dict()` kept of each parameter; its options stay those of the configuration.

    Args:
        names: what the optimizer keeps of a parameter: "step", one number, and others of the parameter's shape.

    Raises:
        ValueError: `saved` is of other parameters, or another optimizer's.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, kept in saved["state"].items():
        for name in names | kept.keys():
            # A fused step reads as many numbers as its parameter has, whatever is there.
            shape = () if name == "step" else parameters[number].shape
            if name not in names or not kept[name].is_floating_point() or kept[name].shape != shape:
                raise ValueError(f"{name} of parameter {number} is not this optimizer's")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})


def update_generator(seed: int, update: int, rank: int = 0) -> torch.Generator:
    """The generator of everything that one update of one process draws, so that a resumed run repeats it.

    torch's generator on the CPU uses 32 bits of its seed and drops the rest without a word. Seeds and ranks are
    spread over those bits by odd constants; the updates of each count up from there.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + rank * 0x85EBCA77 + update) % (1 << 32))


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log, numbers with names, update, loss and seconds among them; InputError where a line is none."""
    try:
        rows = [parse_json(line, path.name) for line in read_limited(path).splitlines()]
        for row in rows:
            if not {"update", "loss", "seconds"} <= row.keys() or not all(
                isinstance(x, int | float) for x in row.values()
            ):
                raise ValueError(f"{path.name} has a line without update, loss and seconds, or with what is no number")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is no log of a run: {error}") from error
    return rows


@contextmanager
def progress(label: str, total: int, completed: int = 0, visible: bool = True) -> Iterator[Callable[..., None]]:
    """A progress bar with the time left; yields `advance(completed, status="")`."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[status]}"), disable=not visible) as bar:
        task = bar.add_task("", total=total, completed=completed, status="")
        yield lambda completed, status="": bar.update(task, completed=completed, status=status)
