"""What a run has cost, costs now and will cost, against its budget. Pure arithmetic over its
attempts; the engine decides by it, and `status` shows it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Optional, Protocol

from launcher import clock
from launcher.backends.base import Phase
from launcher.fold import NOT_STARTED, duration, spent
from launcher.run import Attempt, Run

if TYPE_CHECKING:
    from launcher.spec import Budget

#: Seconds of budget that another attempt is worth: less would pay for a machine and no step.
LEAST = 60.0
#: The share of `budget.usd` or `budget.hours` at which a run's notifications say so.
ALMOST = 0.8


class Caps(Protocol):
    """What a budget limits in all: a `Budget` of the recipe, or what a run tells of it."""

    @property
    def usd(self) -> Optional[float]: ...
    @property
    def hours(self) -> Optional[float]: ...


@dataclass(frozen=True)
class Limit:
    """One limit of the budget: how much of it is used, and the seconds that it leaves."""

    key: str  # budget.usd, budget.hours
    used: float
    of: float
    left: float

    def __str__(self) -> str:
        unit = "USD" if self.key == "budget.usd" else "h"
        return f"{self.key}: {self.used:.2f} of {self.of:.2f} {unit}"


def limits(run: Run, budget: Caps, now: float, usd_per_hour: Optional[float]) -> list[Limit]:
    """The limits that hold for a run at this price, the one that is reached first in front. At a
    price that is unknown `budget.usd` leaves nothing once the known part has used it up, and does
    not hold before; what is free it does not limit."""
    found = []
    if budget.hours is not None:
        worked = sum(duration(attempt, now) for attempt in _attempts(run))
        left = budget.hours * 3600 - worked
        found.append(Limit("budget.hours", worked / 3600, budget.hours, left))
    paid = spent(run, now) or 0.0
    if budget.usd is not None and usd_per_hour:
        left = (budget.usd - paid) / usd_per_hour * 3600
        found.append(Limit("budget.usd", paid, budget.usd, left))
    elif budget.usd is not None and usd_per_hour is None and paid >= budget.usd:
        found.append(Limit("budget.usd", paid, budget.usd, 0.0))
    return sorted(found, key=lambda limit: limit.left)


def budget_left(
    run: Run, budget: Caps, now: float, usd_per_hour: Optional[float]
) -> Optional[float]:
    """Seconds that the budget leaves a run at this price; None: no limit."""
    return next((limit.left for limit in limits(run, budget, now, usd_per_hour)), None)


def worth(left: Optional[float], before: Optional[Attempt], now: float) -> float:
    """Seconds of budget that another attempt has to have. After `before`: more than what that one
    kept to save in, for which alone it may have ended."""
    if before is None:
        return 0.0
    return max(LEAST, kept(left or 0.0, before, now))


def kept(left: float, attempt: Attempt, now: float) -> float:
    """The seconds that a job with this much left keeps for saving, of all that it was given."""
    from trainer.boot import reserve  # what only lists runs does not load it

    return reserve(left + duration(attempt, now))


def too_little(run: Run, budget: Caps, now: float, timeout: bool) -> dict[str, str]:
    """The limits of `budget` that would end a live run at once -> why. `timeout`: its service ends
    jobs by itself, so that it is asked to save before that."""
    newest = next(reversed([*_attempts(run)]), None)
    found = {}
    for limit in limits(run, budget, now, newest.usd_per_hour if newest else None):
        if newest is None or newest.ended is not None:
            least = worth(limit.left, newest, now)
        else:
            least = max(LEAST, kept(limit.left, newest, now) if timeout else 0.0)
        if limit.left > least:
            continue
        used = f"{limit.used:.2f} {'spent' if limit.key == 'budget.usd' else 'hours worked'}"
        left = clock.duration(limit.left)
        found[limit.key] = f"{limit.of:g} leaves {left} after the {used}"
        if limit.used - limit.of >= 0.005:
            found[limit.key] = f"{limit.of:g} is less than the {used}"
    return found


def budget_text(budget: Budget) -> str:
    parts = [f"budget.hours: {budget.hours:g}" if budget.hours is not None else "",
             f"budget.usd: {budget.usd:g}" if budget.usd is not None else ""]  # fmt: skip
    return f"the budget is spent ({', '.join(filter(None, parts))})"


def stopped(
    run: Run, budget: Budget, now: float, usd_per_hour: Optional[float], step: Optional[int]
) -> str:
    """Why a run ends whose budget is spent: the limit that was reached first, how far the run came,
    and the command that goes on."""
    first = next(iter(limits(run, budget, now, usd_per_hour)), None)
    if first is None:
        return budget_text(budget)
    worked = sum(duration(attempt, now) for attempt in _attempts(run))
    at = "" if step is None else f" at step {step}"
    lowered = first.used > 1.5 * first.of  # twice that would be spent, too
    least = 0.1 if first.key == "budget.hours" else 0.01  # of a budget of seconds: twice is 0.00
    enough = max(round(2 * (first.used if lowered else first.of), 2), least)
    return (
        f"stopped at {first} after {clock.duration(worked)}{at}; "
        f"raise it: launch resume {run.name} --set {first.key}={enough:g}"
    )


def burn(run: Run) -> Optional[float]:
    """USD an hour of what works now, 0 where nothing does; None: its price is unknown."""
    working = [a for a in _attempts(run) if _works(a)]
    rates = [attempt.usd_per_hour for attempt in working]
    return None if None in rates else sum(rate for rate in rates if rate is not None)


def outlook(run: Run, now: float) -> dict[str, Any]:
    """What is to come of a run that is not over, as JSON; a key is absent where nobody knows.

    `usd_per_hour`: what works now costs (None: unknown). `end_seconds`, `end_usd`: until the stage
    that trains has done its steps at the speed of the last ones, and what the run has cost by then;
    `stage` names it where others follow. `limit`: the limit of the budget that is reached first,
    with the seconds that it leaves; `limit_first`: before that end. `uncapped`: why `budget.usd`
    does not hold."""
    newest = next(reversed([*_attempts(run)]), None)
    rate = burn(run)
    facts: dict[str, Any] = {"usd_per_hour": rate}
    if newest is None or newest.ended is not None:
        return facts
    caps = _Given(run.budget.get("usd"), run.budget.get("hours"))
    first = next(iter(limits(run, caps, now, newest.usd_per_hour)), None)
    if first is not None:
        facts["limit"] = asdict(first)
    eta = run.progress.get("eta_seconds")
    if isinstance(eta, (int, float)) and newest.phase is Phase.RUNNING:
        facts["end_seconds"] = eta
        if rate is not None and (paid := spent(run, now)) is not None:
            facts["end_usd"] = paid + rate * eta / 3600
        if first is not None:  # it stops before, to have time to save
            facts["limit_first"] = first.left - kept(first.left, newest, now) < eta
        stage = run.progress.get("stage")
        if stage is not None and run.stages and run.stages[-1].id != stage:
            facts["stage"] = stage
    if run.budget.get("usd") is not None and newest.usd_per_hour is None:
        facts["uncapped"] = (
            f"the price of {newest.capacity or 'this machine'} in {newest.place} is unknown: "
            "budget.usd does not cap it; hardware.usd_per_hour tells the price"
        )
    return facts


def almost(run: Run, budget: Caps, now: float, usd_per_hour: Optional[float]) -> Optional[Limit]:
    """The limit of which most is used, once that is `ALMOST` all of it."""
    known = limits(run, budget, now, usd_per_hour)
    most = max(known, key=lambda limit: limit.used / limit.of, default=None)
    return most if most is not None and most.used >= ALMOST * most.of else None


@dataclass(frozen=True)
class _Given:
    usd: Optional[float]
    hours: Optional[float]


def _attempts(run: Run) -> list[Attempt]:
    return [attempt for job in run.jobs for attempt in job.attempts]


def _works(attempt: Attempt) -> bool:
    """Whether an attempt has machines at work now."""
    waits = attempt.began is None and attempt.phase in NOT_STARTED
    return attempt.ended is None and not waits
