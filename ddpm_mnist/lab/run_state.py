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
    """The resumable part of a run: `state/latest.pt` and the lines of `log.jsonl` up to it. Until `finish` it locks
    the folder.

    A state belongs to one configuration. A folder whose state was made by another is refused, so that no
    run continues under settings that its earlier part did not have.

    Attributes:
        state: what was saved last, or None for a new run. The log is cut back to that moment. Of several processes
            the main one alone reads the folder and writes into it.
        tracker: where the rows of the log are shown besides.

    Raises:
        InputError: the folder belongs to another configuration or to a process that is at work, holds a model but no
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
        if self.log_path.exists():  # left by a job that ended before its first state, or somebody else's
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
        """Inside, whatever keeps the state from being taken over is an InputError that names its file."""
        try:
            yield
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}") from error
        except Exception as error:  # whatever is wrong with a state, it is of no use
            reason = str(error) or type(error).__name__
            if str(self.path) not in reason:
                reason = f"{self.path} cannot be read: {reason}"
            raise InputError(f"{reason}; delete {self.path.parents[1]} to start anew") from error

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
        if not processes.is_main():
            return
        require_folder(self.path)
        try:
            log_bytes = self.log_path.stat().st_size
        except OSError as error:
            raise cannot_write(self.path, error) from error
        content = io.BytesIO()  # of a full disk torch.save itself would tell no OSError
        torch.save({"fingerprint": self.fingerprint, "log_bytes": log_bytes, "state": state}, content)
        write_bytes(self.path, content.getvalue())

    def log(self, **row: Any) -> None:
        """Append a line to the log, and show it in the tracker."""
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
        """End the tracker and unlock the folder: what one process of a ladder has made, another opens next."""
        self.tracker.finish()
        unlock_folder(self.folder)


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


def update_generator(seed: int, update: int) -> torch.Generator:
    """The generator of everything that one update draws, in all processes together, so that a resumed run repeats it.

    torch's generator on the CPU uses 32 bits of its seed and drops the rest without a word. Seeds are spread over
    those bits by an odd constant; the updates of each count up from there.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + update) % (1 << 32))


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
