"""The logs of a run, from however many workers, jobs and attempts: in time order, each line once.

A backend yields what is there and ends (contract 5 of `launcher.backends.base`); resuming after a
cut connection, dropping what was already shown, and following until the end happen here.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timezone
from typing import Any, Optional

from launcher import backends, home
from launcher.artifacts import LOGS, here, is_remote, known_names, open_artifacts
from launcher.backends.base import Env, JobHandle, Line, LogQuery
from launcher.backends.local_logs import read_parts
from launcher.clock import ago
from launcher.errors import Denied, LaunchError, Transient, UsageError
from launcher.run import Attempt, JobState, Run

#: How many lines back a backend may repeat itself and still be noticed.
_REMEMBERED = 50_000
#: Looks in a row that may fail before `Transient` is passed on.
_PATIENCE = 20
#: Seconds without a line after which a run whose driver is dead is no longer followed.
_SILENCE = 20.0


class Reader:
    """What a run has logged since the last look. Keeps a cursor for each attempt of each job."""

    def __init__(
        self, env: Env, worker: Optional[int] = None, since: Optional[float] = None
    ) -> None:
        self.env, self.worker, self.since = env, worker, since
        self.count = 0  # lines given so far
        self._attempts: dict[tuple[str, int], _Position] = {}

    def new(self, run: Run) -> Iterator[Line]:
        """The lines that were not read yet: attempts in order, and within one attempt by time.

        Errors: those of the backend; `Transient` may come between two lines. Nothing is lost or
        doubled then: call again.
        """
        for job in run.jobs:
            for attempt in job.attempts:
                position = self._attempts.setdefault((job.name, attempt.number), _Position())
                yield from self._attempt(run, job, attempt, position)

    def _attempt(
        self, run: Run, job: JobState, attempt: Attempt, position: _Position
    ) -> Iterator[Line]:
        for line in self._lines(run, job, attempt, position):
            fresh = position.take(line)
            if not fresh or (self.worker is not None and line.worker != self.worker):
                continue
            if self.since is None or line.time >= self.since:
                self.count += 1
                yield line

    def _lines(
        self, run: Run, job: JobState, attempt: Attempt, position: _Position
    ) -> Iterator[Line]:
        """The backend's lines; of an attempt that is over and of which it has none, or that it may
        not show, those that boot has left in the store."""
        handle = JobHandle(run.id, job.name, attempt.number, run.root, tuple(attempt.refs))
        refused = False
        if not position.from_store:
            over = run.ended is not None
            query = LogQuery(self.worker, position.cursor, self.since, over)
            try:
                yield from backends.load(job.backend).logs(handle, query, self.env)
            except Denied:
                if position.cursor or not is_remote(run.root):
                    raise
                refused = True
            nothing = attempt.phase.over and not position.cursor
            position.from_store = is_remote(run.root) and (refused or nothing)
        if position.from_store:
            place = home.folder(self.env.home, run.id)
            artifacts = open_artifacts(run.root, place, self.env.environ, self.env.clock)
            artifacts.refresh(LOGS)
            query = LogQuery(self.worker, position.cursor, self.since)
            yield from read_parts(artifacts.folder / "logs", handle, query)
            if not position.cursor and not refused and self._late(job, attempt):
                position.from_store = False  # nothing there either: the service's may still come

    def _late(self, job: JobState, attempt: Attempt) -> bool:
        """Whether the first lines of an attempt that is over may still arrive. (The service noted
        its end, by its own clock.)"""
        since = self.env.clock.now() - (attempt.ended or 0.0)
        return 0 <= since < backends.load(job.backend).can.drain


def read(
    run: Run,
    env: Env,
    *,
    worker: Optional[int] = None,
    since: Optional[float] = None,
    tail: Optional[int] = None,
) -> Iterable[Line]:
    """Everything logged so far, or exactly the last `tail` lines of it."""
    lines = _patiently(Reader(env, worker, since), run)
    return lines if tail is None else deque(lines, maxlen=max(tail, 0))


def workers(run: Run) -> list[int]:
    """The workers that the run has had so far, in order: boot opens a worker's log before it
    starts the worker."""
    if is_remote(run.root):
        names = [name.split("/")[1] for name in known_names(run, "logs/worker-")]
    else:
        names = [place.name for place in (here(run) / "logs").glob("worker-*")]
    found = (re.fullmatch(r"worker-(\d+)", name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def follow(
    look: Callable[[], Run],
    env: Env,
    *,
    worker: Optional[int] = None,
    since: Optional[float] = None,
    tail: Optional[int] = None,
) -> Iterator[Line]:
    """Lines as they come, until the run is over and nothing more arrives. With `tail`, only the
    last lines of what was there before. See `looks` for `look` and for what ends it."""
    for first, (_, lines) in enumerate(looks(look, Reader(env, worker, since))):
        yield from deque(lines, maxlen=max(tail, 0)) if tail is not None and not first else lines


def looks(
    look: Callable[[], Run], reader: Reader, every: float = 0.5
) -> Iterator[tuple[Run, Iterator[Line]]]:
    """The run as `look` gives it, again and again, each time with the lines that are new; read them
    before asking for more. Ends when the run is over and was drained.

    Errors: `NoDriver`, when the run's driver is dead and nothing was logged for a while.
    """
    clock = reader.env.clock
    heard = clock.now()
    watched = False
    while True:
        run = look()
        before = reader.count
        yield run, _patiently(reader, run)
        if run.ended is not None:
            break
        watched = True
        orphaned = run.driver is not None and run.driver.alive is False
        if reader.count > before or not orphaned:
            heard = clock.now()
        if clock.now() - heard > _SILENCE:
            raise NoDriver(
                f"{run.name} has no driver any more; its job may go on, but nobody follows up",
                f"`launch resume {run.name}` drives on; `launch status {run.name}` says how it is",
            )
        clock.sleep(every)
    # Once more, some seconds after the end: the last lines may arrive late.
    # Another machine may have noted that end, by another clock: what was seen from here counts.
    drain = _drain(run)
    until = (clock.now() if watched else run.ended) + drain
    if until > clock.now():
        while (late := min(drain, until - clock.now())) > 0:
            clock.sleep(min(late, every))
            yield run, iter(())
        yield run, _patiently(reader, run)


def awaited(run: Run, now: float) -> float:
    """Seconds for which the last lines of a run that is over may still arrive."""
    if run.ended is None:
        return 0.0
    drain = _drain(run)
    return max(0.0, min(drain, run.ended + drain - now))


def _drain(run: Run) -> float:
    return max((backends.load(job.backend).can.drain for job in run.jobs), default=0.0)


class NoDriver(LaunchError):
    """The driver was killed: the run will not end by itself."""


def since(text: str, now: float) -> float:
    """`10m`, `2h`, `30s`, `1d` ago, or an ISO time (UTC unless it says otherwise), in UTC seconds.
    Errors: `UsageError`."""
    try:
        return ago(text, now, zone=timezone.utc)
    except (ValueError, OverflowError):
        raise UsageError(
            f"--since '{text}': not a time", "give 90s, 10m, 2h, 1d, or 2026-11-21T08:30:00Z"
        ) from None


@dataclass
class _Position:
    """How far one attempt has been read."""

    cursor: Mapping[str, Any] = field(default_factory=dict)
    from_store: bool = False  # no longer the backend's lines, but boot's own parts
    _seen: set[tuple[Any, ...]] = field(default_factory=set)
    _order: deque[tuple[Any, ...]] = field(default_factory=deque)

    def take(self, line: Line) -> bool:
        """Move past `line`; False when it was seen before."""
        self.cursor = line.cursor
        key = (line.worker, line.time, line.text, repr(line.cursor))
        if key in self._seen:
            return False
        self._seen.add(key)
        self._order.append(key)
        if len(self._order) > _REMEMBERED:
            self._seen.discard(self._order.popleft())
        return True


def _patiently(reader: Reader, run: Run) -> Iterator[Line]:
    """Everything new, going on after cut connections until several in a row bring nothing."""
    failures = 0
    while True:
        try:
            for line in reader.new(run):
                failures = 0
                yield line
            return
        except Transient as signal:
            failures += 1
            if failures > _PATIENCE:
                raise
            reader.env.clock.sleep(signal.after)
