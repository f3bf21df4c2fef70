"""Save and resume a run: its state, its log and its lock."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddpm_mnist.lab import InputError, flat, processes
from ddpm_mnist.lab.locks import lock_folder, require_folder, unlock_folder
from ddpm_mnist.lab.read import parse_json, read_limited, read_state
from ddpm_mnist.lab.tracking import Tracker
from ddpm_mnist.lab.write import cannot_write, holds_model, prepare_output, write_bytes, write_text


class RunState:
    """The resumable state of a run, `state/latest.pt`, and its log, `log.jsonl`. Locks the folder until `finish`.

    A state belongs to one configuration: a folder with the state of another is refused, so that no run continues with
    different settings. Only the main process reads and writes the folder.

    Args:
        folder: run folder; created if missing.
        fingerprint: the settings that must not change between the parts of a run.
        tracker: as for `Tracker`.

    Attributes:
        state: the last saved state, or None for a new run. The log is truncated to its length at that save.
        tracker: the tracker that also receives the rows of the log.

    Raises:
        InputError: the folder belongs to another configuration, is locked by another process, holds a model but no
            state, or cannot be read.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], tracker: str = "none"):
        self.folder = folder
        self.path = folder / "state" / "latest.pt"
        self.log_path = folder / "log.jsonl"
        self.fingerprint = fingerprint
        self.state: dict[str, Any] | None = processes.from_main(lambda: self._open(folder))
        self.tracker = Tracker(tracker if processes.is_main() else "none", folder)

    def _open(self, folder: Path) -> dict[str, Any] | None:
        prepare_output(self.log_path)
        lock_folder(folder)
        try:
            return self._begin(folder)
        except BaseException:
            unlock_folder(folder)
            raise

    def _begin(self, folder: Path) -> dict[str, Any] | None:
        if self.path.exists():
            return self._resume(folder)
        if holds_model(folder):
            raise InputError(f"{folder} holds a model but no state to go on from: choose another output folder")
        if self.log_path.exists():  # of a job that ended before its first save, or a foreign file: check it
            read_log(self.log_path)
        elif (folder / "config.yaml").exists():
            raise InputError(f"{folder} holds a config.yaml that no run left there: choose another output folder")
        write_text(self.log_path, "")
        return None

    def _resume(self, folder: Path) -> dict[str, Any]:
        with self.restoring():
            saved = read_state(self.path)
            ours, theirs = flat(self.fingerprint), flat(saved["fingerprint"])
            differing = [key for key in sorted(ours.keys() | theirs.keys()) if theirs.get(key) != ours.get(key)]
            log_bytes, state = saved["log_bytes"], saved["state"]
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
        return state

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Context manager that turns any exception while the state is restored into an InputError that names its
        file."""
        try:
            yield
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}") from error
        except Exception as error:  # damaged or foreign states raise many types of exceptions
            reason = str(error) or type(error).__name__
            if str(self.path) not in reason:
                reason = f"{self.path} cannot be read: {reason}"
            raise InputError(f"{reason}; delete {self.path.parents[1]} to start anew") from error

    def progress(self, total: int) -> tuple[int, float]:
        """Return the number of finished updates, at most `total`, and their seconds; (0, 0.0) for a new run."""
        if self.state is None:
            return 0, 0.0
        with self.restoring():
            update, seconds = self.state["update"], self.state["seconds"]
            if type(update) is not int or not 0 <= update <= total or not 0 <= seconds < float("inf"):
                raise ValueError(f"it says {update} of {total} updates in {seconds} seconds")
            return update, float(seconds)

    def save(self, state: dict[str, Any]) -> None:
        """Write `state` (tensors, numbers, and containers of them) atomically."""
        if not processes.is_main():
            return
        require_folder(self.path)
        try:
            log_bytes = self.log_path.stat().st_size
        except OSError as error:
            raise cannot_write(self.path, error) from error
        content = io.BytesIO()  # on a full disk torch.save would not raise OSError
        torch.save({"fingerprint": self.fingerprint, "log_bytes": log_bytes, "state": state}, content)
        write_bytes(self.path, content.getvalue())

    def log(self, **row: Any) -> None:
        """Append `row` to the log and send it to the tracker."""
        if not processes.is_main():
            return
        try:
            with self.log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
        except OSError as error:
            require_folder(self.log_path)
            raise cannot_write(self.log_path, error) from error
        self.tracker.log(row)

    def finish(self) -> None:
        """End the tracker and unlock the folder, so that another process of a ladder can open it."""
        self.tracker.finish()
        unlock_folder(self.folder)


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], names: set[str]) -> None:
    """Load the per-parameter state of `saved`, a `state_dict()`, into `optimizer`; its options are left unchanged.

    Args:
        names: keys of the state of a parameter: "step" is a scalar, all others have the parameter's shape.

    Raises:
        ValueError: `saved` belongs to other parameters or to another optimizer.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, kept in saved["state"].items():
        for name in names | kept.keys():
            # Shapes must be checked: a fused step reads as many numbers as its parameter has, beyond a smaller tensor.
            shape = () if name == "step" else parameters[number].shape
            if name not in names or not kept[name].is_floating_point() or kept[name].shape != shape:
                raise ValueError(f"{name} of parameter {number} is not this optimizer's")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})


def update_generator(seed: int, update: int) -> torch.Generator:
    """Return the generator for all random numbers of one update, the same in every process and in a resumed run.

    torch's CPU generator uses only 32 bits of its seed and silently drops the rest. An odd constant spreads the seeds
    over those bits; the number of the update is added.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + update) % (1 << 32))


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows of a log: dicts of numbers with at least update, loss and seconds.

    Raises:
        InputError: a line is not such a row.
    """
    try:
        rows = [parse_json(line, path.name) for line in read_limited(path).splitlines()]
        for row in rows:
            if not {"update", "loss", "seconds"} <= row.keys() or not all(
                isinstance(x, int | float) for x in row.values()
            ):
                raise ValueError(
                    f"{path.name} has a line without update, loss and seconds, or with a value that is not a number"
                )
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not the log of a run: {error}") from error
    return rows
