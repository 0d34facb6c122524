"""Ctrl-C while the engine works: finish, then abort, then kill; and always say which.

The engine runs in a session of its own, so that the terminal's Ctrl-C reaches only us; it hears of
it from here. A SIGTERM or SIGHUP (a job of a CI system that is cancelled, a terminal that is
closed) counts as a Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Generic, Optional, TypeVar

from infra.errors import Stopped

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAID = (
    "stopping: what has begun is being finished (Ctrl-C again: abort it)",
    "aborting: what is in flight may be made and not recorded (Ctrl-C again: kill)",
    "killed",
)


class Interrupts:
    """Counts the interrupts of one command and passes them on to the engine's process."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.RLock()
        self._child: Optional[subprocess.Popen[str]] = None
        self.count = 0
        self.killed = False

    def run(self, work: Callable[[], T]) -> T:
        """`work()` in a thread while this one listens for signals. Errors: its own; `Stopped` for
        whatever it raises after an interrupt."""
        if threading.current_thread() is not threading.main_thread():
            return work()
        outcome: _Outcome[T] = _Outcome(work)
        thread = threading.Thread(target=outcome.run, name="engine")
        before = {number: signal.signal(number, self._heard) for number in _SIGNALS}
        try:
            thread.start()
            outcome.over.wait()
            thread.join()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if outcome.error is not None:
            if self.count and not isinstance(outcome.error, Stopped):
                raise self.stopped() from outcome.error
            raise outcome.error
        return outcome.value

    @contextmanager
    def watching(self, child: subprocess.Popen[str]) -> Iterator[None]:
        """While `child` runs, it hears of interrupts; of one that came just before, too."""
        with self._lock:
            self._child = child
            if self.count:
                self._pass_on()
        try:
            yield
        finally:
            with self._lock:
                self._child = None

    def refuse(self) -> None:
        """Before something new is begun. Errors: `Stopped` after an interrupt."""
        if self.count:
            raise self.stopped()

    def stopped(self) -> Stopped:
        if self.killed:
            return Stopped("the engine was killed and could not record what was in flight", True)
        return Stopped("interrupted; what was done is recorded", False)

    def _heard(self, number: int, frame: Optional[FrameType]) -> None:
        with self._lock:
            self.count += 1
            with suppress(OSError):  # the terminal may be what went away
                self._say(_SAID[min(self.count, len(_SAID)) - 1])
            self._pass_on()

    def _pass_on(self) -> None:
        if self._child is None or self._child.poll() is not None:
            return
        with suppress(ProcessLookupError):
            if self.count < len(_SAID):
                self._child.send_signal(signal.SIGINT)
            else:
                self.killed = True
                os.killpg(self._child.pid, signal.SIGKILL)


class _Outcome(Generic[T]):
    """What a thread's work returned or raised."""

    value: T

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.error: Optional[BaseException] = None
        self.over = threading.Event()

    def run(self) -> None:
        try:
            self.value = self._work()
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()
