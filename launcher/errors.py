"""The error family: one clear line each, an exit code, and what to do about it.

Signals of backends tell the engine where to go next (`again`): here, the next place, or nowhere.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Optional


class Exit(int, Enum):
    """Exit codes of the command line."""

    OK = 0
    BUG = 1
    USAGE = 2  # recipe, usage or unknown run
    ACCESS = 3
    CAPACITY = 4
    BUDGET = 5
    JOB = 6  # the job or a gate failed
    LEAKED = 7  # something may still bill
    HELD = 8  # another driver holds the run
    INTERRUPTED = 130


class LaunchError(Exception):
    """Base: `str(error)` is what happened and where; `hint` is what to do."""

    code = Exit.BUG

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(LaunchError):
    """A bad recipe, option or run name."""

    code = Exit.USAGE


class NotFromHere(LaunchError):
    """A run whose processes, or whose recipe, belong to another machine."""

    code = Exit.USAGE


class RecipeErrors(UsageError):
    """Everything wrong with a recipe at once; each problem is `file:line:col: what ...`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class JobFailed(LaunchError):
    code = Exit.JOB


class Damaged(JobFailed):
    """Some of what a job left is not what it says of itself; the rest was brought."""


class BudgetSpent(LaunchError):
    code = Exit.BUDGET


class HeldElsewhere(LaunchError):
    """Another driver holds the run: `driven by HOST since T`."""

    code = Exit.HELD


class JournalDamaged(LaunchError):
    """A record that cannot be read and has no whole copy."""

    code = Exit.USAGE


class Again(str, Enum):
    """Where the engine may try again after a signal."""

    HERE = "here"
    NEXT_PLACE = "next place"
    NEVER = "never"


class Signal(LaunchError):
    """Raised by backends; the engine decides by `again`."""

    again = Again.NEVER


class NoCapacity(Signal):
    code = Exit.CAPACITY
    again = Again.NEXT_PLACE

    def __init__(self, place: str, why: str = "") -> None:
        super().__init__(f"no capacity in {place}" + (f": {why}" if why else ""))
        self.place = place


class QuotaFull(Signal):
    code = Exit.CAPACITY
    again = Again.NEXT_PLACE

    def __init__(self, place: str, metric: str) -> None:
        super().__init__(f"quota {metric} is used up in {place}", f"ask for more {metric}")
        self.place, self.metric = place, metric


class Denied(Signal):
    code = Exit.ACCESS


class BadRequest(Signal):
    code = Exit.USAGE

    def __init__(self, field: str, message: str, hint: str = "") -> None:
        super().__init__(f"{field}: {message}", hint)
        self.field = field


class Transient(Signal):
    """A service that does not answer, or not now: try again here, not before `after` seconds.
    `refused`: the request was surely not applied; otherwise it may have been, or may still be."""

    code = Exit.ACCESS
    again = Again.HERE

    def __init__(self, message: str, after: float = 1.0, refused: bool = False) -> None:
        super().__init__(message)
        self.after, self.refused = after, refused


class Leaked(Signal):
    """`refs` could not be confirmed gone; `commands` finish the work by hand."""

    code = Exit.LEAKED

    def __init__(self, refs: list[Any], commands: Optional[list[str]] = None) -> None:
        names = ", ".join(getattr(ref, "name", str(ref)) for ref in refs)
        super().__init__(f"may still bill: {names}", "\n".join(commands or []))
        self.refs, self.commands = refs, commands or []
