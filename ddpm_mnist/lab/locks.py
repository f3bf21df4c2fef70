"""Lock a folder, so that two processes never write into it at once."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ddpm_mnist.lab import InputError, processes

# The end of a name, which begins with a dot, while its content is being written.
HALF = ".half"


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


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock `folder` inside the context: see `lock_folder`."""
    lock_folder(folder)
    try:
        yield
    finally:
        unlock_folder(folder)


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
    if not locked:
        file.close()
        path.unlink()
        return
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
    """Delete temporary files that a killed process left in a locked folder, and below it in folders without a lock.

    The folders of a ladder's students are two deep.
    """
    for path in folder.iterdir():
        with suppress(OSError):
            if path.name.startswith(".") and path.name.endswith(HALF):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif depth and path.is_dir() and not path.is_symlink() and not (path / ".lock").exists():
                _clear_half_written(path, depth - 1)


def forget_lost_lock(folder: Path) -> None:
    """Close the lock that an earlier job of this process has on `folder`, if the folder was deleted meanwhile."""
    lock = folder.resolve() / ".lock"
    if lock in _locks and not is_still_there(_locks[lock], lock):
        _locks.pop(lock).close()


def require_folder(path: Path) -> None:
    """Raise InputError if `path` is in a locked folder that was deleted meanwhile: writing would make it anew, without
    the rest."""
    for lock in list(_locks):
        if path.resolve().is_relative_to(lock.parent) and not is_still_there(_locks[lock], lock):
            _locks.pop(lock).close()  # this job ends here; the next one may make the folder anew
            raise InputError(f"cannot write {path}: {lock.parent} was taken away, or its .lock")


def _forget_locks() -> None:
    """In a forked child: its parent holds the locks, and it would keep them after the parent's end."""
    for file in _locks.values():
        file.close()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def unlock_folder(folder: Path) -> None:
    """Unlock `folder`, if this process has locked it, and delete its `.lock`."""
    path = folder.resolve() / ".lock"
    if file := _locks.pop(path, None):
        if is_still_there(file, path):
            path.unlink()
        file.close()
