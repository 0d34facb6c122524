"""Waiting with an end: how long a teardown waits for what does not go, or does not answer, and what
it says meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

from launcher.clock import Clock

#: How long a resource may stay DELETING, or a backend deaf, before it counts as leaked. Waits are
#: added up: a machine that sleeps meanwhile has not waited.
PATIENCE = 900.0
#: Why what is not there is looked for once more.
LATE = "not there, but it might show late"
#: Seconds of a wait before its first line, and between two lines.
_QUIET, _EVERY = 5.0, 60.0


@dataclass(frozen=True)
class Waiting:
    """`say` takes a line for the reader. `until`: when all waits together are over, UTC seconds;
    None: each ends by itself, after `PATIENCE`."""

    clock: Clock
    say: Callable[[str], None]
    until: Optional[float] = None

    def begin(self) -> Wait:
        """A wait that begins now."""
        return Wait(self)

    def at_most(self, seconds: float) -> float:
        """`seconds`, or those until all waits are over."""
        left = math.inf if self.until is None else self.until - self.clock.now()
        return max(0.0, min(seconds, left))


class Wait:
    """One wait, in as many sleeps as it takes."""

    def __init__(self, rules: Waiting) -> None:
        self._rules = rules
        self._began = rules.clock.now()
        self._waited = 0.0
        self._told = -math.inf  # `_waited` at the last line

    @property
    def over(self) -> bool:
        return self._waited > PATIENCE or self._rules.at_most(math.inf) <= 0

    def sleep(self, seconds: float, why: str, at_once: bool = False) -> None:
        """Sleep, but not past the end of all waits. `why` is told of a wait that is not short, or
        `at_once`."""
        quiet = self._waited + seconds < _QUIET or self._waited < self._told + _EVERY
        if at_once or not quiet:
            self._told = self._waited
            left = self._rules.at_most(PATIENCE - self._waited)
            end = self._rules.clock.now() + left
            since = f"waiting since {_time(self._began)}, until {_time(end)} at most"
            self._rules.say(f"{why}; {since}")
        self._rest(seconds)

    def look_again(self, seconds: float, why: str) -> bool:
        """Sleep before a further look, of which `why` tells the reason; False: all waits are over
        before that."""
        if seconds > _QUIET:
            left, next_look = self._rules.at_most(seconds), f"looking again in {seconds:.0f} s"
            if left < seconds:
                next_look = f"waiting {left:.0f} s for it, of {seconds:.0f} s"
            self._rules.say(f"{why}; {next_look}")
        return self._rest(seconds)

    def _rest(self, seconds: float) -> bool:
        allowed = self._rules.at_most(seconds)
        self._rules.clock.sleep(allowed)
        self._waited += allowed
        return allowed >= seconds


def _time(when: float) -> str:
    return time.strftime("%H:%M:%SZ", time.gmtime(when))
