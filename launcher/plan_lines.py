"""A plan in words: one line a fact, and the arithmetic behind it on request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Optional

from launcher.amount import figure
from launcher.backends.base import Offer
from launcher.forecast import (
    NOT_COUNTED,
    Forecast,
    dollars,
    gib,
    hours_text,
    settings,
    unpriced,
)
from launcher.spec import OWN_PRICE

if TYPE_CHECKING:
    from launcher.plan import JobPlan, RunPlan

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
#: Of a sha256 in a name a reader gets twelve digits; --json has all.
_SHA256 = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
_COLUMNS = 100
_IF = "if nothing is preempted or retried"
#: Places without a price that a line names.
_PLACES = 3


def lines(plan: RunPlan) -> list[str]:
    """The plan for a reader."""
    count = sum(len(job.stages) for job in plan.jobs)
    found = [f"{plan.recipe}: {_many(count, 'stage')} in {_many(len(plan.jobs), 'job')}"]
    for job in plan.jobs:
        found += _job_lines(job, count > 1)
    found.append(f"artifacts: {plan.root}")
    if all(job.offers for job in plan.jobs):  # what has no place has no price
        found.append(_cost_line(plan))
    found += _expected(plan)
    for note in (*plan.notes, *_price_notes(plan)):
        found += _broken(f"note: {note}")
    if plan.refusal is not None:
        found.append(f"cannot start: {plan.refusal.message}")
    return found


def explanation(plan: RunPlan) -> list[str]:
    """The whole arithmetic of the forecasts, and where the prices come from."""
    found: list[str] = []
    for job in plan.jobs:
        for forecast in job.forecasts:
            said = [*forecast.explain, *(f"not known: {why}" for why in forecast.unknown)]
            if said:
                found += [
                    "",
                    f"{forecast.stage} ({forecast.kind})",
                    *(f"  {line}" for line in said),
                ]
    sources = [o.price_source for job in plan.jobs for o in job.offers if o.price_source]
    if sources:
        found += ["", "prices", *(f"  {source}" for source in dict.fromkeys(sources))]
    if any(forecast.hours for job in plan.jobs for forecast in job.forecasts):
        found += ["", "not counted", f"  {NOT_COUNTED}"]
    return found


def memory_texts(forecast: Forecast) -> list[str]:
    """`16.1 of 22.5 GiB, 6.4 free`, or that it does not fit and the change that helps first, or
    why it is not known and what to do; a line each. Empty: there is nothing to say."""
    memory = forecast.memory
    if memory is None:
        return [text for one in forecast.absent
                for text in (f"not known: {one.why}", f"  {one.remedy}")]  # fmt: skip
    if memory.limit is None or memory.margin is None:
        return []
    text = f"{gib(memory.bytes)} of {gib(memory.limit)} GiB"
    if memory.fits:
        return [f"{text}, {gib(memory.margin)} free"]
    if not forecast.changes:
        return [f"{text}: does not fit"]
    change = forecast.changes[0]
    told = [change.effect] if change.effect else []
    told += ["--explain has other ways"] if len(forecast.changes) > 1 else []
    found = [f"{text}: does not fit"]
    found.append(f"  fits with: {settings(change)}: {gib(change.memory.bytes)} GiB")
    return [*found, f"    {'; '.join(told)}"] if told else found


def time_text(forecast: Forecast) -> Optional[str]:
    """`131 million tokens at 2,912/s (assumed): 12.5 h`; None: it is not forecast at all."""
    if not forecast.counts:
        return None
    if forecast.hours is None:
        why = "; ".join(w for w in forecast.unknown if not w.startswith("memory: "))
        return f"not known: {why.removeprefix('time: ').removeprefix('speed: ')}"
    parts = []
    if forecast.tokens is not None:
        parts.append(f"{figure(forecast.tokens)} tokens")
    if forecast.tokens_per_second is not None:
        parts.append(f"at {forecast.tokens_per_second:,.0f}/s")
    basis = forecast.basis
    if basis == "measured" or basis == "given":
        basis += f" {forecast.source}" if basis == "measured" else " by the recipe"
    parts += [f"({basis})"] if basis else []
    hours = hours_text(forecast.hours)
    if basis.startswith("given") and len(parts) == 1:
        return f"{hours} ({basis})"
    return f"{' '.join(parts)}: {hours}" if parts else hours


def price_text(offer: Offer) -> str:
    """`0.44 USD/h`, `free`, or that it is unknown and why."""
    if offer.usd_per_hour == 0:
        return "free"
    if offer.usd_per_hour is None:
        why = offer.price_source.partition(" for ")[0]  # the line names machine and place
        return "price unknown" + (f" ({why})" if why else "")
    own = f" ({OWN_PRICE})" if offer.price_source == OWN_PRICE else ""
    return f"{offer.usd_per_hour:.2f} USD/h{own}"


def dollars_text(usd: tuple[float, float]) -> str:
    low, high = (f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in usd)
    return f"{low} USD" if low == high else f"{low} to {high} USD"


def _job_lines(job: JobPlan, several: bool) -> Iterator[str]:
    nodes = f" on {job.nodes} nodes" if job.nodes > 1 else ""
    yield f"job {job.index}: {', '.join(job.stages)}"
    yield f"  needs {job.accelerator}{nodes} ({job.backend})"
    for forecast in job.forecasts:
        of = f" of {forecast.stage}" if several else ""
        for text in memory_texts(forecast):
            yield f"  {text}" if text.startswith(" ") else f"  memory{of}: {text}"
        if (time := time_text(forecast)) is not None:
            yield from _broken(f"  time{of}: {time}")
    counted = [forecast.hours for forecast in job.forecasts if forecast.counts]
    known = [hours for hours in counted if hours is not None]
    whole = bool(known) and len(known) == len(counted)
    for offer in job.offers:
        word = "place" if offer is job.offers[0] else "else"
        machine = f", {offer.machine}" if offer.machine else ""
        total = ""
        if whole and offer.usd_per_hour:
            hours = (sum(low for low, _ in known), sum(high for _, high in known))
            usd = dollars(hours, [offer])
            total = f", {dollars_text(usd)} in all" if usd is not None else ""
        yield f"  {word} {offer.place}{machine}, {offer.capacity}: {price_text(offer)}{total}"
    from launcher.plan import fill

    for intent in job.intents:
        name = _SHA256.sub(r"\1", fill(intent.name, {"attempt": 1}))
        bills = " (bills)" if intent.billable and job.usd_per_hour != 0 else ""
        yield f"  creates {intent.kind} {name}{bills}"


def _cost_line(plan: RunPlan) -> str:
    if plan.usd_total == 0:
        return "cost: nothing"
    rate = "price unknown" if plan.usd_per_hour is None else f"{plan.usd_per_hour:.2f} USD/h"
    hours = "no limit of hours" if plan.hours is None else f"{plan.hours:g} h"
    total = "an unknown sum" if plan.usd_total is None else f"{plan.usd_total:.2f} USD"
    missing = unpriced([offer for job in plan.jobs for offer in job.offers])
    if missing and plan.usd_priced is not None:
        total = f"{plan.usd_priced:.2f} USD {_where(missing)}"
    return f"cost: {rate}, at most {total} ({hours})"


def _where(missing: Sequence[str]) -> str:
    more = len(missing) - _PLACES
    named = ", ".join(missing[:_PLACES]) + (f" and {more} more" if more > 0 else "")
    return f"where the price is known; not known in {named}"


def _broken(line: str) -> Iterator[str]:
    """A line that is too long, in two at a semicolon."""
    head, separator, rest = line.rpartition("; ")
    if len(line) <= _COLUMNS or not separator:
        yield line
        return
    yield head
    yield f"    {rest}"


def _expected(plan: RunPlan) -> Iterator[str]:
    """What it will take if all goes well, and where the budget ends it before."""
    forecast = plan.forecast
    if forecast is None:
        return
    if forecast.unknown:
        yield f"expected: not known: {'; '.join(forecast.unknown)}"
    elif forecast.hours is not None:
        offers = [offer for job in plan.jobs for offer in job.offers]
        free = bool(offers) and all(offer.usd_per_hour == 0 for offer in offers)
        price, end = "" if free else ", at a price that is not known", True
        if forecast.usd is not None and not free:
            price = f", {dollars_text(forecast.usd)}"
        elif forecast.unpriced and forecast.usd_priced is not None:
            price, end = f", {dollars_text(forecast.usd_priced)} {_where(forecast.unpriced)}", False
        text = f"expected: {hours_text(forecast.hours)}{price}"
        yield f"{text}, {_IF}" if end else text
        if not end:
            yield f"  {_IF}"
    for note in forecast.notes:
        yield f"warning: {note}"


def _price_notes(plan: RunPlan) -> list[str]:
    """Where the prices come from, once, without the long name of the table."""
    found = {}
    for job in plan.jobs:
        for offer in job.offers:
            if offer.usd_per_hour and offer.price_source not in ("", OWN_PRICE):
                head, more, rest = offer.price_source.partition(";")
                dates = _DATE.findall(rest)
                found[f"prices: {head}" + (f", table of {dates[-1]}" if dates else "")] = more
    return [text + (" (--explain names it)" if more else "") for text, more in found.items()]


def _many(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
