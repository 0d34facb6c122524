"""`launch costs`: what all runs of this home have cost."""

from __future__ import annotations

import csv
import sys
from typing import Optional, get_args

from launcher import api, console, costs
from launcher.errors import Exit, UsageError
from trainer.loading import nearest

#: Runs listed without `--all`; the total counts all of them.
_LISTED = 20
_FIELDS = ("runs", "hours", "usd", "unpriced_hours", "usd_per_hour", "unpriced_now")


def show(
    *, since: Optional[str], by: Optional[str], everything: bool, as_json: bool, as_csv: bool
) -> int:
    """Print the table, one JSON document, or CSV with a line of names. `everything`: list all runs
    or groups instead of the first ones."""
    if as_json and as_csv:
        raise UsageError("--json does not go with --csv", "choose one")
    if by is not None and by not in costs.GROUPS:
        raise UsageError(f"--by {by}: {nearest(by, costs.GROUPS)}")
    now = api.env().clock.now()
    start = None if since is None else costs.since(since, now)
    group = next(name for name in get_args(costs.By) if name == (by or "run"))
    found = costs.costs(api.list_runs(all=True), now, group, start)
    if as_json:
        console.document(
            {
                "by": found.by,
                "since": found.since,
                "rows": [row.to_json() for row in found.rows],
                "total": found.total.to_json(),
            }
        )
    elif as_csv:
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow((found.by, *_FIELDS))
        table.writerows(
            (row.key, *(_plain(name, getattr(row, name)) for name in _FIELDS)) for row in found.rows
        )
    else:
        for line in lines(found, None if everything else _LISTED):
            console.say(line)
    return Exit.OK


def lines(found: costs.Costs, limit: Optional[int]) -> list[str]:
    """The table for a reader, and what the total leaves out."""
    listed = found.rows[:limit]
    rows = [_cells(row) for row in (*listed, found.total)]
    table = console.columns(
        (found.by.upper(), "RUNS", "HOURS", "SPENT", "PRICE UNKNOWN", "NOW"), rows,
        right=(1, 2, 3, 4, 5),
    )  # fmt: skip
    if len(listed) < len(found.rows):
        left = len(found.rows) - len(listed)
        table.append(f"{left} more: `launch costs --all` lists them; the total counts them")
    if found.total.unpriced_hours:
        hours = console.figure(found.total.unpriced_hours, 2)
        table.append(f"{hours} hours have no known price and are in no sum; "
                     "hardware.usd_per_hour of a recipe tells it")  # fmt: skip
    return table


def _plain(name: str, figure: float) -> str:
    """For a spreadsheet: dollars to the cent, hours and rates to four digits."""
    if isinstance(figure, int):
        return str(figure)
    return f"{figure:.2f}" if name == "usd" else f"{figure:.4f}"


def _cells(row: costs.Row) -> tuple[str, ...]:
    unknown = f"{row.unpriced_hours:,.2f} h" if row.unpriced_hours else "-"
    now = f"{console.usd(row.usd_per_hour)}/h" if row.usd_per_hour else "-"
    if row.unpriced_now:
        now = "unknown" if not row.usd_per_hour else f"over {now}"
    paid = console.usd(row.usd if row.usd or not row.unpriced_hours else None)
    return row.key, str(row.runs), f"{row.hours:,.2f}", paid, unknown, now
