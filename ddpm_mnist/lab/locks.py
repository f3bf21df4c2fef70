"""Lock folders, so that two processes never write into the same one."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ddpm_mnist.lab import InputError, processes

# Suffix of temporary files and folders, whose names begin with a dot.
TEMPORARY_SUFFIX = ".half"


_locks: dict[Path, BinaryIO] = {}


def lock_folder(folder: Path) -> None:
    """Lock the existing `folder` until `unlock_folder` is called or this process ends.

    Also delete temporary files that a killed process left there. The lock is an advisory lock (flock) on the file
    `.lock`; on Windows and on file systems without locks the folder stays unlocked. If a job has several processes,
    the main one holds the lock.

    Raises:
        InputError: another process holds the lock.
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
        file.close()  # another process unlocked the folder, and deleted .lock, between open and lock: try again
    if not locked:
        file.close()
        path.unlink()
        return
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    _locks[path] = file
    _clear_half_written(path.parent)


def lock_file(file: BinaryIO) -> bool:
    """Lock an open file until it is closed or this process ends.

    Returns:
        False if the operating system or the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
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
    """Return whether `path` still refers to the open `file`: it may have been deleted or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _clear_half_written(folder: Path, depth: int = 2) -> None:
    """Delete temporary files that a killed process left in the locked `folder` and in its subfolders without a lock.

    Args:
        depth: levels of subfolders to search. A ladder has its students' folders two levels deep.
    """
    for path in folder.iterdir():
        with suppress(OSError):
            if path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif depth and path.is_dir() and not path.is_symlink() and not (path / ".lock").exists():
                _clear_half_written(path, depth - 1)


def forget_lost_lock(folder: Path) -> None:
    """Close the lock that an earlier job of this process holds on `folder`, if the folder has been deleted since."""
    lock = folder.resolve() / ".lock"
    if lock in _locks and not is_still_there(_locks[lock], lock):
        _locks.pop(lock).close()


def require_folder(path: Path) -> None:
    """Raise InputError if `path` is in a locked folder that has been deleted: writing would create it again without its
    other files."""
    for lock in list(_locks):
        if path.resolve().is_relative_to(lock.parent) and not is_still_there(_locks[lock], lock):
            _locks.pop(lock).close()  # this job fails; a later job of this process may create the folder again
            raise InputError(f"cannot write {path}: {lock.parent} was deleted, or its .lock")


def _forget_locks() -> None:
    """Close inherited locks in a forked child, which would otherwise keep them after its parent has ended."""
    for file in _locks.values():
        file.close()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def unlock_folder(folder: Path) -> None:
    """Unlock `folder` and delete its lock file, if this process holds the lock."""
    path = folder.resolve() / ".lock"
    if file := _locks.pop(path, None):
        if is_still_there(file, path):
            path.unlink()
        file.close()
