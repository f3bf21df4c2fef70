"""What every long job does with its folder: whole files only, a log that survives, a state to resume from."""

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_mnist import InputError, processes
from ddpm_mnist.files import parse_json, read_limited, read_state
from ddpm_mnist.tracking import Tracker

# The end of a name, which begins with a dot, while its content is being written.
HALF = ".half"


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half of one.

    Of several processes the main one writes, here and in `RunState`.

    Raises:
        InputError: the disk is full or read-only, or the like; what was there is there still.
    """
    if not processes.is_main():
        return
    require_folder(path)
    path = path.resolve() if path.is_symlink() else path  # the link stays one
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        keep_mode(path, beside)
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def keep_mode(path: Path, beside: Path) -> None:
    """Give the file `beside`, which will take the place of `path`, the permissions of what is there."""
    if path.exists():
        beside.chmod(path.stat().st_mode & 0o777)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{HALF}")


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror}")


def write_text(path: Path, text: str) -> None:
    """Write as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write as JSON, as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def prepare_output(path: Path) -> None:
    """Make the folder of an output before long work starts; InputError if it cannot hold the file."""
    processes.from_main(lambda: _prepare_output(path))


def _prepare_output(path: Path) -> None:
    try:
        lock = path.parent.resolve() / ".lock"
        if lock in _locks and not is_still_there(_locks[lock], lock):  # of an earlier job in this process
            _locks.pop(lock).close()
        require_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is no regular file")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"cannot write {path}: it is read-only")
        beside = _beside(path.resolve())
        beside.touch()  # is it allowed, and is the name not too long?
        beside.unlink(missing_ok=True)
    except InputError:
        raise
    except FileExistsError as error:
        what = "a link that leads nowhere" if os.path.islink(error.filename) else "a file, and no folder"
        raise InputError(f"cannot write {path}: {error.filename} is {what}") from error
    except OSError as error:
        raise _cannot_write(path, error) from error
    except (ValueError, RuntimeError) as error:  # a name with a zero byte; links in a circle
        raise InputError(f"cannot write {str(path)!r}: {error}") from error


_locks: dict[Path, BinaryIO] = {}


def lock_folder(folder: Path) -> None:
    """Lock `folder`, which exists, until `unlock_folder` or until this process ends; delete what a killed process left
    half-written.

    The lock is the system's, on the file `.lock`. Windows and file systems without locks have none.
    Of several processes that one job was launched as, the main one holds it.

    Raises:
        InputError: another process writes into the folder.
    """
    processes.from_main(lambda: _lock_folder(folder))


def _lock_folder(folder: Path) -> None:
    path = folder.resolve() / ".lock"
    if path in _locks:
        return
    while True:
        file = path.open("ab+", buffering=0)
        try:
            locked = lock_file(file)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(20).decode(errors="replace")
            message = f"process {owner} is writing into {folder}: wait for it, or choose another folder"
            raise InputError(message) from error
        if is_still_there(file, path):
            break
        file.close()  # another process deleted it between the two lines, as it unlocked the folder
    if locked:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        _locks[path] = file
        _clear_half_written(path.parent)


def lock_file(file: BinaryIO) -> bool:
    """Lock an open file until it is closed or this process ends; False where the system or its disk has no locks.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def is_still_there(file: BinaryIO, path: Path) -> bool:
    """Whether the open `file` is still what lies at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _clear_half_written(folder: Path, depth: int = 2) -> None:
    """Away with what a killed process left in a folder that is locked, and in those below it that have no lock of their
    own: a ladder's are two deep."""
    for path in folder.iterdir():
        with suppress(OSError):
            if path.name.startswith(".") and path.name.endswith(HALF):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif depth and path.is_dir() and not path.is_symlink() and not (path / ".lock").exists():
                _clear_half_written(path, depth - 1)


def require_folder(path: Path) -> None:
    """InputError if `path` is in a folder that was locked and then taken away: whatever is written would make it anew,
    without the rest."""
    for lock in list(_locks):
        if path.resolve().is_relative_to(lock.parent) and not is_still_there(_locks[lock], lock):
            _locks.pop(lock).close()  # this job ends here; the next one may make the folder anew
            raise InputError(f"cannot write {path}: {lock.parent} was taken away, or its .lock")


def unlock_folder(folder: Path) -> None:
    """Unlock `folder`, if this process has locked it, and delete its `.lock`."""
    path = folder.resolve() / ".lock"
    if file := _locks.pop(path, None):
        if is_still_there(file, path):
            path.unlink()
        file.close()


def holds_model(folder: Path) -> bool:
    """Whether something lies there that a model is made of, which is not to be written over."""
    parts = ("config.json", "unet", "model_index.json", "model.safetensors", "model.onnx", "scheduler", "metrics.json")
    return any((folder / part).exists() for part in parts)


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
            raise _cannot_write(self.path, error) from error
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
            raise _cannot_write(self.log_path, error) from error
        self.tracker.log(row)

    def finish(self) -> None:
        """End the tracker and unlock the folder: what one process of a ladder has made, another opens next."""
        self.tracker.finish()
        unlock_folder(self.folder)


def flat(nested: dict[str, Any]) -> dict[str, Any]:
    """`nested` with the keys of its parts joined by dots, as they are typed."""
    joined: dict[str, Any] = {}
    for key, value in nested.items():
        parts = flat(value) if isinstance(value, dict) else {"": value}
        joined |= {f"{key}.{name}" if name else key: part for name, part in parts.items()}
    return joined


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


def span(seconds: float) -> str:
    """ "45 s", "1 min 20 s" or "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


# Seconds between two lines of a job at least, its first and last apart.
LINES_APART = 5


@contextmanager
def progress(label: str, total: int, completed: int = 0) -> Iterator[Callable[..., None]]:
    """Show how far a job is, with the time left; yields `advance(completed, status="")`.

    In a terminal a bar; elsewhere (a file, a container's log, a notebook) a line at the start, one for every tenth, and
    one at the end with the time that it took.
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
