"""What the engine decides by: may a job be tried again, where, after how long. Pure functions of
the attempts in the journal, so that a driver that starts again decides as the one before it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Optional

from launcher.backends.base import Offer, Phase
from launcher.errors import Again, Denied, Exit, Signal
from launcher.run import Attempt
from launcher.spec import Retry

#: Exit codes of boot that trying again cannot change (docs/contracts.md).
HOPELESS = {64: "the configuration", 65: "the data", 78: "the environment"}
#: How often one request is sent before its attempt counts as failed.
REQUESTS = 8

# Why an attempt is over; each but the last three has its count in `retry:`, and `deadline` that of
# `preempted`: it was cut off in the middle too, but nobody has taken its machine.
CAPACITY = "capacity"
PREEMPTED = "preempted"
DEADLINE = "deadline"
INFRASTRUCTURE = "infrastructure"
JOB = "job"
ACCESS = "access"
REQUEST = "request"
STOP = "stop"

_EXIT = {CAPACITY: Exit.CAPACITY, PREEMPTED: Exit.CAPACITY, ACCESS: Exit.ACCESS,
         REQUEST: Exit.USAGE}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a run ends."""

    phase: Phase
    why: str
    exit_code: int


def cause_of_signal(signal: Exception) -> str:
    """Why an attempt that could not be placed is over."""
    if isinstance(signal, Signal) and signal.again is Again.NEXT_PLACE:
        return CAPACITY
    if isinstance(signal, Signal) and signal.again is Again.HERE:
        return INFRASTRUCTURE
    return ACCESS if isinstance(signal, (Denied, OSError)) else REQUEST


def cause_of_phase(phase: Phase) -> str:
    """Why an attempt that was placed is over; empty while it is not, or when it succeeded."""
    return {
        Phase.PREEMPTED: PREEMPTED,
        Phase.FAILED: JOB,
        Phase.LOST: INFRASTRUCTURE,
        Phase.CANCELLED: STOP,
    }.get(phase, "")


def give_up(
    attempts: Sequence[Attempt], retry: Retry, changed: float = -math.inf
) -> Optional[Outcome]:
    """The end of the run when the newest of `attempts` was one too many; None: try again.
    `attempts` are those of one job since it was last resumed. `changed`: when its recipe was last
    changed, UTC seconds: one that was sent before with a deadline, and reached it, is not counted.
    """
    last = attempts[-1]
    cause = counted_as(last)
    if at_deadline(last, changed):
        return None
    if last.exit_code in HOPELESS:
        why = f"{last.why} (not tried again: exit code {last.exit_code} blames "
        return Outcome(Phase.FAILED, f"{why}{HOPELESS[last.exit_code]})", Exit.JOB)
    if last.cause in (ACCESS, REQUEST):
        return Outcome(Phase.FAILED, last.why, _EXIT[last.cause])
    allowed = {CAPACITY: retry.capacity, PREEMPTED: retry.preempted,
               INFRASTRUCTURE: retry.infrastructure}.get(cause, retry.job)  # fmt: skip
    times = sum(counted_as(a) == cause and not at_deadline(a, changed) for a in attempts)
    if times <= allowed:
        return None
    counted = f" ({times} times; retry.{cause}: {allowed})" if times > 1 else ""
    phase = Phase.LOST if last.phase is Phase.LOST else Phase.FAILED
    return Outcome(phase, f"{last.why}{counted}", _EXIT.get(cause, Exit.JOB))


def counted_as(attempt: Attempt) -> str:
    """The cause by whose count and place an attempt is judged."""
    return PREEMPTED if attempt.cause == DEADLINE else attempt.cause


def at_deadline(attempt: Attempt, changed: float) -> bool:
    """Whether a limit of time that was set before `changed` ended the attempt."""
    before = attempt.started is not None and attempt.started <= changed
    return before and attempt.cause == DEADLINE


def choose(offers: Sequence[Offer], attempts: Sequence[Attempt], now: float) -> tuple[Offer, float]:
    """The offer to try next and the seconds to wait before it, at `now` (UTC seconds).

    `offers` are in the order of their capacities, and within one of its places. They are walked in
    rounds: nothing is asked again before everything has been, and a capacity is left only when all
    its places were asked. Within a capacity those come last that had none a moment ago, and last of
    all the place that preempted: it has machines, but keeps taking them. Each offer rests after its
    refusals in a row for 30 s, doubling to 10 minutes.
    """
    starving = starved(attempts)
    failed = Counter((attempt.place, attempt.capacity) for attempt in starving)
    before = attempts[len(attempts) - len(starving) - 1] if len(attempts) > len(starving) else None
    cut = before is not None and (before.phase is Phase.PREEMPTED or before.cause == DEADLINE)
    left = before if cut else None
    capacities = [*dict.fromkeys(offer.capacity for offer in offers)]

    def turn(offer: Offer) -> tuple[int, int, bool, bool]:
        preempted = left is not None and (left.place, left.capacity) == (
            offer.place, offer.capacity,
        )  # fmt: skip
        rests = _rest(offer, attempts, now) > 0
        rounds = failed[offer.place, offer.capacity]
        return rounds, capacities.index(offer.capacity), rests, preempted

    offer = min(offers, key=turn)
    wait = _rest(offer, attempts, now)
    if attempts and attempts[-1].cause != CAPACITY:
        cause = counted_as(attempts[-1])
        wait = max(wait, backoff(sum(counted_as(a) == cause for a in attempts)))
    return offer, wait


def _rest(offer: Offer, attempts: Sequence[Attempt], now: float) -> float:
    """Seconds until an offer without capacity is worth another request."""
    there = [a for a in attempts if (a.place, a.capacity) == (offer.place, offer.capacity)]
    refused = starved(there)
    if not refused:
        return 0.0
    whole = min(30.0 * 2.0 ** min(len(refused) - 1, 5), 600.0)
    since = refused[-1].ended if refused[-1].ended is not None else now
    return min(max(since + whole - now, 0.0), whole)  # a clock may have been set back


def starved(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The newest attempts that found no capacity, back to the last one that did."""
    return list(takewhile(lambda a: a.cause == CAPACITY, reversed(attempts)))[::-1]


def backoff(times: int) -> float:
    """Seconds to wait after the `times`-th failure in a row: 1, 2, 4 ... 60."""
    return min(2.0 ** (max(times, 1) - 1), 60.0)


def settling(seconds: float) -> Iterator[float]:
    """The waits, together `seconds`, before each further look for what may not show yet: one soon,
    for what is only a little late, and the one that decides."""
    soon = seconds / 12
    if seconds > 0:
        yield soon
        yield seconds - soon
