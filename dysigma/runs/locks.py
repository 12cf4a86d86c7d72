"""A run folder is used by one process at a time."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .files import RunError

LOCK = ".lock"
# In a file of its own, because a locked file cannot be read on Windows.
HOLDER = ".lock-holder"
# A listing of runs holds the lock for a moment.
PATIENCE_SECONDS = 0.2


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process alone; RunError if another process holds it.

    The system holds the lock on ``.lock`` for as long as the process lives, so that a killed one
    leaves none behind. Where the system has no locks, a warning says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(folder / LOCK)
    try:
        file_lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        raise RunError(
            f"{folder} is in use by {_holder(folder)}; wait for it, stop it, or choose another "
            "--out. The lock ends with that process, however it ends: a file .lock left over locks "
            "nothing"
        ) from None
    except OSError as error:
        if not (folder / LOCK).exists():
            raise  # the folder cannot be written
        warnings.warn(
            f"no locks on this system ({error}): let one process alone use {folder}", stacklevel=3
        )
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    (folder / HOLDER).write_text(f"{holder} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    try:
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        file_lock.release()


def is_in_use(folder: Path) -> bool:
    """Whether a process holds a run folder now; looking leaves no trace."""
    if not (folder / LOCK).exists():
        return False
    file_lock = FileLock(folder / LOCK)
    try:
        file_lock.acquire(timeout=PATIENCE_SECONDS / 4, poll_interval=0.01)
    except Timeout:
        return True
    except OSError:  # the folder of someone else: its lock cannot be tried
        return (folder / HOLDER).exists()
    file_lock.release()
    return False


def _holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text().strip()
    except OSError:
        return "another process"
