"""Where the next attempt goes, and after how long: the policy alone, over made-up histories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from launcher import retry
from launcher.backends.base import Offer, Phase
from launcher.run import Attempt
from launcher.spec import Retry

CAPACITIES = ("spot", "standard", "flex")
#: What becomes of an attempt: its phase, its cause, how long it lasts in seconds.
ENDS = {
    "r": (Phase.FAILED, retry.CAPACITY, 1.0),
    "q": (Phase.FAILED, retry.CAPACITY, 400.0),  # it queued, then there was none
    "p": (Phase.PREEMPTED, retry.PREEMPTED, 10.0),
    "P": (Phase.PREEMPTED, retry.PREEMPTED, 7200.0),
    "i": (Phase.FAILED, retry.INFRASTRUCTURE, 5.0),
}


def offers(places: int, capacities: int) -> list[Offer]:
    return [
        Offer("x", f"place{number}", "L4:1", capacity)  # type: ignore[arg-type]
        for capacity in CAPACITIES[:capacities]
        for number in range(places)
    ]


def walk(offered: Sequence[Offer], ends: str) -> tuple[list[Attempt], list[tuple[float, Offer]]]:
    """The attempts of a run to which `ends` happen, and (wait, offer) of each choice, the last
    one still open."""
    now, attempts, choices = 1_000.0, list[Attempt](), list[tuple[float, Offer]]()
    for end in [*ends, None]:
        offer, wait = retry.choose(offered, attempts, now)
        choices.append((wait, offer))
        if end is None:
            break
        now += wait
        phase, cause, lasts = ENDS[end]
        attempts.append(
            Attempt(
                len(attempts) + 1, phase, place=offer.place, started=now, ended=now + lasts,
                cause=cause, capacity=offer.capacity,
            )
        )  # fmt: skip
        now += lasts
    return attempts, choices


def tried(offered: Sequence[Offer], ends: str) -> list[str]:
    return [f"{o.capacity} {o.place[-1]}" for _, o in walk(offered, ends)[1]]


def test_after_a_preemption_every_spot_place_comes_before_standard() -> None:
    two = offers(2, 2)
    assert tried(two, "pr") == ["spot 0", "spot 1", "spot 0"]
    # As a stock-out in one place, a preemption in the other, and a stock-out again.
    assert tried(two, "rpr") == ["spot 0", "spot 1", "spot 1", "spot 0"]
    assert tried(two, "rPr") == ["spot 0", "spot 1", "spot 0", "spot 1"]
    assert tried(two, "prrrr")[1:] == ["spot 1", "spot 0", "standard 0", "standard 1", "spot 1"]


def test_stock_outs_walk_the_places_then_the_capacities_then_begin_again_later() -> None:
    _, choices = walk(offers(2, 3), "rrrrrrr")
    names = [f"{offer.capacity} {offer.place[-1]}" for _, offer in choices]
    assert names[:6] == ["spot 0", "spot 1", "standard 0", "standard 1", "flex 0", "flex 1"]
    assert names[6:] == ["spot 0", "spot 1"]
    assert [wait for wait, _ in choices[:6]] == [0.0] * 6
    assert choices[6][0] == 25.0, (
        "thirty seconds after it was refused, five of them spent elsewhere"
    )


def test_a_single_place_is_asked_less_and_less_often() -> None:
    _, choices = walk(offers(1, 1), "r" * 8)
    assert [wait for wait, _ in choices] == [0, 30, 60, 120, 240, 480, 600, 600, 600]


def test_what_queued_long_before_it_was_refused_still_rests_after_the_refusal() -> None:
    _, choices = walk(offers(1, 1), "qq")
    assert [wait for wait, _ in choices] == [0, 30, 60]


def test_a_clock_that_was_set_back_makes_no_wait_longer() -> None:
    refused = Attempt(
        1, Phase.FAILED, place="place0", started=9e6, ended=9e6, cause=retry.CAPACITY,
        capacity="spot",
    )  # fmt: skip
    assert retry.choose(offers(1, 1), [refused], 1_000.0)[1] == 30.0


@settings(derandomize=True, max_examples=300, deadline=None)
@given(some.integers(1, 4), some.integers(1, 3), some.text("rqpPi", max_size=25))
def test_the_walk_is_fair_in_order_and_never_too_early(
    places: int, capacities: int, ends: str
) -> None:
    offered = offers(places, capacities)
    attempts, choices = walk(offered, ends)
    for number, (wait, offer) in enumerate(choices):
        before = attempts[:number]
        failed = Counter((a.place, a.capacity) for a in retry.starved(before))
        here = (offer.place, offer.capacity)
        assert failed[here] == min(failed[o.place, o.capacity] for o in offered), "fair"
        cheaper = CAPACITIES[: CAPACITIES.index(offer.capacity)]
        waiting = [o for o in offered if o.capacity in cheaper]
        assert all(failed[o.place, o.capacity] > failed[here] for o in waiting), "in order"
        assert 0.0 <= wait <= 600.0
        there = [a for a in before if (a.place, a.capacity) == here]
        if there and there[-1].cause == retry.CAPACITY:
            now = before[-1].ended or 0.0
            assert now + wait >= (there[-1].ended or 0.0) + 30.0, "it rests first"


@settings(derandomize=True, max_examples=200, deadline=None)
@given(some.integers(0, 6), some.text("rpi", max_size=30))
def test_it_gives_up_exactly_when_a_cause_has_used_its_count(capacity: int, ends: str) -> None:
    allowed = Retry(preempted=4, capacity=capacity, infrastructure=2, job=0)
    limits = {retry.CAPACITY: capacity, retry.PREEMPTED: 4, retry.INFRASTRUCTURE: 2}
    attempts, _ = walk(offers(2, 2), ends)
    for number in range(1, len(attempts) + 1):
        cause = attempts[number - 1].cause
        times = sum(attempt.cause == cause for attempt in attempts[:number])
        assert (retry.give_up(attempts[:number], allowed) is None) == (times <= limits[cause])


def test_any_walk_ends() -> None:
    """Whatever happens, a run has at most as many attempts as its counts add up to, and one."""
    allowed = Retry(preempted=3, capacity=5, infrastructure=2, job=0)
    for ends in ("rpi" * 20, "prr" * 20, "i" * 20, "rrrrrp" * 20):
        attempts, _ = walk(offers(2, 2), ends)
        lengths = range(1, len(attempts) + 1)
        last = next(n for n in lengths if retry.give_up(attempts[:n], allowed) is not None)
        assert last <= 3 + 5 + 2 + 1


@pytest.mark.parametrize("times", range(1, 9))
def test_backing_off_doubles_up_to_a_minute(times: int) -> None:
    assert retry.backoff(times) == min(2.0 ** (times - 1), 60.0)
