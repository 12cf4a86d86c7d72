"""Signals that ask a training to stop: between steps they wait for the step, afterwards they interrupt."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# A scheduler that stops torchrun and its ranks sends each rank two signals, and means one.
SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """Whether SIGINT or SIGTERM came. The first only says so; one more, a second or more later, interrupts at once."""

    def __init__(self) -> None:
        self.waits = True
        self._first: float | None = None

    def __call__(self) -> bool:
        return self._first is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_again = self._first is not None and now > self._first + SAME_REQUEST_SECONDS
        if self._first is None:
            self._first = now
        if is_again or not self.waits:
            raise KeyboardInterrupt

    def interrupt_at_once(self) -> None:
        """From now on a signal interrupts whatever runs, because nothing asks in between."""
        self.waits = False
        if self():
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Receive SIGINT and SIGTERM in a StopRequest; as before afterwards."""
    request = StopRequest()
    previous = {}
    with suppress(ValueError):  # not in the main thread: the caller's own handling stays
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request.handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
