"""`launch offers`: priced places for a recipe, best first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from launcher import api, console, shipped
from launcher.errors import Exit, UsageError
from launcher.forecast import NOT_COUNTED, Range, three
from launcher.offering import Ranked, rank
from launcher.plan_lines import dollars_text

_HEAD = ("", "BACKEND", "PLACE", "MACHINE", "DEVICES", "CAPACITY", "FITS", "TOKENS/S", "HOURS",
         "USD/H", "USD")  # fmt: skip
#: Columns of numbers.
_NUMBERS = ("TOKENS/S", "HOURS", "USD/H", "USD")
#: Left out one after the other where the table would be wider than this: they follow from the rest.
_WIDEST, _SPARE = 98, ("MACHINE", "CAPACITY", "TOKENS/S")


def offers(
    recipe: str, overrides: Sequence[str], *, any_accelerator: bool, limit: int, as_json: bool
) -> int:
    """Print the best `limit` offers of each job. Errors: `UsageError` where there is none."""
    path = shipped.find(recipe)
    asked = api.validate(path, overrides).recipe
    found = rank(asked, api.env(), any_accelerator)
    shown = [
        row
        for _, rows in groupby(found.ranked, key=lambda one: one.job)
        for row in list(rows)[:limit]
    ]
    if as_json:
        console.document(
            {"offers": [row.to_json() for row in shown], "left_out": list(found.left_out)}
        )
        return Exit.OK
    if not shown:
        raise UsageError(
            f"no backend of this machine offers what {path.name} asks for: "
            f"{'; '.join(found.left_out)}",
            "--any looks at other accelerators too",
        )
    for job, rows in groupby(shown, key=lambda one: one.job):
        _print(job, list(rows))
    by_job = [{row.fits for row in rows} for _, rows in groupby(shown, key=lambda one: one.job)]
    if any(False in fits and True not in fits for fits in by_job):
        console.notice(_no_fit(path.stem, any_accelerator))
    left = len(found.ranked) - len(shown)
    if left:
        console.notice(f"{left} more; --limit N shows more of them")
    cap = asked.budget.usd_per_hour
    dear = sum(cap is not None and (row.offer.usd_per_hour or 0.0) > cap for row in shown)
    if dear:
        console.notice(f"{dear} of these cost more than budget.usd_per_hour ({cap:g}) allows")
    for reason in found.left_out:
        console.notice(f"left out: {reason}")
    if any(row.recipe for row in shown):
        console.notice("* is what the recipe asks for")
    if any(row.assumed for row in shown):
        console.notice(
            "~ rests on an assumed speed, so do hours and dollars: off by a factor of two, perhaps"
        )
    if any("?" in _cells(row) for row in shown):
        console.notice("? is not known; launch plan RECIPE says why")
    if len({(row.offer.accelerator.partition(":")[2]) for row in shown}) > 1:
        console.notice("with other numbers of devices: as many rows in a step (train.accumulate)")
    console.notice(f"not counted: {NOT_COUNTED}")
    return Exit.OK


def _print(job: int, rows: list[Ranked]) -> None:
    console.say(f"job {job}: {', '.join(rows[0].stages)}")
    kept = list(_HEAD)
    if len({row.offer.backend for row in rows}) == 1:
        kept.remove("BACKEND")
    lines = _table(rows, kept)
    for spare in _SPARE:
        if max(len(console.plain(line)) for line in lines) > _WIDEST:
            kept.remove(spare)
            lines = _table(rows, kept)
    for line in lines:
        console.say(f"  {line}")


def _table(rows: list[Ranked], kept: list[str]) -> list[str]:
    body = []
    for row in rows:
        cells = dict(zip(_HEAD, _cells(row)))
        body.append([cells[name] for name in kept])
    return console.columns(kept, body, [kept.index(name) for name in _NUMBERS if name in kept])


def _no_fit(recipe: str, any_accelerator: bool) -> str:
    if any_accelerator:
        return f"no accelerator of the table fits; launch plan {recipe} says what would help"
    return "a job fits nowhere here; --any compares other accelerators"


def _cells(row: Ranked) -> list[str]:
    offer = row.offer
    about = "~" if row.assumed else ""
    fits = {True: "yes", False: "no", None: "?"}[row.fits]
    rate = row.tokens_per_second
    price = "?" if offer.usd_per_hour is None else f"{offer.usd_per_hour:.2f}"
    total = "?" if row.usd is None else about + dollars_text(row.usd).removesuffix(" USD")
    return [
        "*" if row.recipe else "", offer.backend, offer.place, offer.machine or "-",
        offer.accelerator, offer.capacity, fits, "?" if rate is None else f"{about}{rate:,.0f}",
        "?" if row.hours is None else about + _range(row.hours),
        price, total,
    ]  # fmt: skip


def _range(hours: Range) -> str:
    """Hours with three digits, with one below 0.01."""
    low, high = (three(value) if value >= 0.01 else f"{value:.1g}" for value in hours)
    return low if low == high else f"{low} to {high}"
