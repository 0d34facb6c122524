"""SIGTERM and SIGINT only raise a flag, for the whole life of the process: the loop acts on it at
the next step boundary, a job between its stages. A second signal changes nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """Whether a signal has come since. Handlers are put back at the end (main thread only)."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)

    previous = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
