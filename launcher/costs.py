"""What the runs of this home have cost: hours and dollars by what they are grouped by. Pure: the
runs are given, and only attempts count, each for the time in which its machines worked.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, Optional

from launcher.clock import ago
from launcher.errors import UsageError
from launcher.fold import duration
from launcher.run import Attempt, JobState, Run

By = Literal["run", "recipe", "backend", "accelerator", "month", "owner"]
#: What `--by` takes; runs themselves are listed without it.
GROUPS: tuple[str, ...] = ("recipe", "backend", "accelerator", "month", "owner")


@dataclass
class Row:
    """One group. `hours` are those of machines at work; `usd` of them as far as prices are known;
    `unpriced_hours` have cost what nobody knows. `usd_per_hour`: what works now."""

    key: str
    runs: int = 0
    hours: float = 0.0
    usd: float = 0.0
    unpriced_hours: float = 0.0
    usd_per_hour: float = 0.0
    unpriced_now: int = 0  # attempts at work now whose price is unknown
    _ids: set[str] = field(default_factory=set, repr=False)

    def add(self, run: Run, hours: float, attempt: Optional[Attempt], now: bool) -> None:
        self._ids.add(run.id)
        self.runs = len(self._ids)
        self.hours += hours
        rate = attempt.usd_per_hour if attempt is not None else 0.0
        if rate is None:
            self.unpriced_hours += hours
            self.unpriced_now += now
        else:
            self.usd += rate * hours
            self.usd_per_hour += rate if now else 0.0

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "_ids"}


@dataclass
class Costs:
    """`rows`: the dearest first; months and runs the newest first."""

    by: str
    since: Optional[float]
    rows: list[Row]
    total: Row


def costs(runs: Iterable[Run], now: float, by: By = "run", since: Optional[float] = None) -> Costs:
    """The costs of `runs` (newest first) from `since` (UTC seconds) until `now`: of an attempt that
    began before, only the part after it. A run without any part of it after `since` is left out."""
    rows: dict[str, Row] = {}
    total = Row("total")
    for run in runs:
        asked = [attempt for job in run.jobs for attempt in job.attempts]
        if not asked and (since is None or run.created >= since):
            key = _key(by, run, None, None, run.created)
            for row in (rows.setdefault(key, Row(key)), total):
                row.add(run, 0.0, None, False)
        for job in run.jobs:
            for attempt in job.attempts:
                for start, end in _spans(attempt, now, since, by == "month"):
                    key = _key(by, run, job, attempt, start)
                    works = attempt.ended is None and end == now and end > start
                    for row in (rows.setdefault(key, Row(key)), total):
                        row.add(run, (end - start) / 3600, attempt, works)
    listed = [*rows.values()]
    if by == "month":
        listed.sort(key=lambda row: row.key, reverse=True)
    elif by != "run":
        listed.sort(key=lambda row: (-row.usd, -row.hours, row.key))
    return Costs(by, since, listed, total)


def since(text: str, now: float) -> float:
    """`7d` (or h, w) before `now`, or an ISO date or time; without a zone it is local time. UTC
    seconds. Errors: `UsageError`; also for `m`, which some take for months and some for minutes."""
    try:
        return ago(text, now, units="hdw")
    except (ValueError, OverflowError) as error:  # the second: of a year that no clock has
        raise UsageError(
            f"--since {text}: no time that is known", "write 7d, 12h, 2w, or 2026-11-01"
        ) from error


def _spans(
    attempt: Attempt, now: float, since: Optional[float], months: bool
) -> Iterator[tuple[float, float]]:
    """(from, to) of the attempt's time at work after `since`; with `months` cut at each turn of
    the month, UTC. One that cost no time is one empty span."""
    lasted = duration(attempt, now)
    end = attempt.ended if attempt.ended is not None else now
    if not lasted:  # it waits, or never had a machine
        end = attempt.started if attempt.started is not None else end
    start = end - lasted
    if since is not None and end < since:
        return
    start = start if since is None else max(start, since)
    end = max(start, end)
    while months and (turn := _next_month(start)) < end:
        yield start, turn
        start = turn
    yield start, end


def _next_month(when: float) -> float:
    at = datetime.fromtimestamp(when, timezone.utc)
    year, month = (at.year + 1, 1) if at.month == 12 else (at.year, at.month + 1)
    return datetime(year, month, 1, tzinfo=timezone.utc).timestamp()


def _key(
    by: By, run: Run, job: Optional[JobState], attempt: Optional[Attempt], start: float
) -> str:
    if by == "month":
        return time.strftime("%Y-%m", time.gmtime(start))
    if by == "backend":
        return job.backend if job is not None else "none yet"
    if by == "accelerator":
        if attempt is None:
            return "none yet"
        return attempt.accelerator or "unknown"
    return {"recipe": run.recipe, "owner": run.owner}.get(by, run.name)
