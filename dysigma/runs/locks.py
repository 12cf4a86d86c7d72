"""A run folder is used by one process at a time."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import RunError

if TYPE_CHECKING:
    pass


def _is_free(file: Any, shared: bool = False) -> bool:
    """Lock an open file for this process (shared: for others too) until it is closed; False if another holds it."""
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError) as error:
        warnings.warn(
            f"no locks on this system ({error}): let one process alone use {file.name}",
            stacklevel=4,
        )
    return True


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process alone; RunError if another process holds it.

    The system holds the lock on ``.lock`` for as long as the process lives, so that a killed one leaves none behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+") as file:
        if not any(
            _is_free(file) for _ in map(time.sleep, (0, 0.2))
        ):  # a listing holds it for a moment
            raise RunError(
                f"{folder} is in use by {path.read_text().strip()}; wait for it, stop it, or choose another --out. The "
                "lock ends with that process, however it ends: a file .lock left over locks nothing"
            )
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        file.flush()
        yield
