"""The reads of logs that one project allows a minute, shared by every process of this machine.

Cloud Logging answers 60 list requests a minute for a project, and that limit cannot be raised. All
who follow runs take their turns from one file under $LAUNCH_HOME, guarded by a file lock. Whoever
comes too early is given a time, and finds it kept.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from launcher.errors import Transient

#: Fewer than the service allows: others (the console, gcloud) read logs too.
A_MINUTE = 50
_WINDOW = 60.0


def take(home: Path, project: str, who: str, now: float) -> None:
    """Take one read at `now` (UTC seconds). `who` names the reader, so that it finds the turn that
    it was given. Errors: `Transient` with the seconds until its turn."""
    with _turns(home, project, now) as turns:
        at, turns[:] = _turn(turns, who, now)
    if at > now:
        raise Transient(f"{A_MINUTE} reads of logs a minute are used up in {project}", at - now)


def spare(home: Path, project: str, now: float) -> bool:
    """Take one read at `now` if nobody waits for it: for what may as well be read later."""
    with _turns(home, project, now) as turns:
        free = len(turns) < A_MINUTE
        if free:
            turns[:] = sorted([*turns, (now, "")])
    return free


@contextmanager
def _turns(home: Path, project: str, now: float) -> Iterator[list[tuple[float, str]]]:
    """The turns of the last minute and those given, to be changed in place."""
    folder = home / "google"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"logging-{re.sub('[^a-z0-9-]', '-', project)}.json"
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+") as turns_file:
        fcntl.flock(turns_file, fcntl.LOCK_EX)
        # A clock that was set back leaves turns in a far future: they are nobody's.
        turns = [t for t in _read(turns_file) if now - _WINDOW < t[0] < now + 100 * _WINDOW]
        yield turns
        turns_file.seek(0)
        turns_file.truncate()
        json.dump(turns, turns_file)


def _turn(
    turns: list[tuple[float, str]], who: str, now: float
) -> tuple[float, list[tuple[float, str]]]:
    """When it is the turn of `who`, and all turns then. A turn that is taken is nobody's any more,
    so that the next one is asked for anew."""
    kept = next((at for at, name in turns if name == who), None)
    if kept is not None and kept > now:
        return kept, turns
    if kept is not None:
        turns = [turn for turn in turns if turn[1] != who]
        return now, sorted([*turns, (now, "")])
    at = max(now, turns[-A_MINUTE][0] + _WINDOW) if len(turns) >= A_MINUTE else now
    return at, sorted([*turns, (at, who if at > now else "")])


def _read(file: IO[str]) -> list[tuple[float, str]]:
    try:
        return sorted((float(at), str(who)) for at, who in json.load(file))
    except (ValueError, TypeError):
        return []  # a damaged file costs a minute's count, not the logs
