"""What can go wrong with the foundations: one clear line each, and what to do about it.

The launcher turns them into its own errors and exit codes.
"""

from __future__ import annotations

from collections.abc import Sequence


class EngineError(Exception):
    """Base: `str(error)` is what happened, `hint` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Passphrase(EngineError):
    """The passphrase of the state is missing, empty or wrong."""


class Unreadable(EngineError):
    """The state holds declarations of recipes that this launch cannot read."""


class Locked(EngineError):
    """Another update holds the state, or one that died left its lock. `stale`: surely dead."""

    def __init__(self, message: str, stale: bool) -> None:
        super().__init__(message)
        self.stale = stale


class Failed(EngineError):
    """Some resources were refused; what was made before is recorded. `existing`: logical names of
    those that the cloud says are there already."""

    def __init__(self, message: str, existing: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.existing = tuple(existing)


class Stopped(EngineError):
    """The user interrupted it. `killed`: the engine had no time to write down what it did."""

    def __init__(self, message: str, killed: bool) -> None:
        super().__init__(message)
        self.killed = killed
