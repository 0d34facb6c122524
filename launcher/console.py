"""What a person sees: results on stdout, notices on stderr, aligned columns, JSON documents.

Rendering only: every function here gets the facts it prints. Colour is for terminals; a pipe gets
whole names in plain text.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any, Optional

from launcher import records
from launcher.artifacts import here
from launcher.clock import duration as duration
from launcher.errors import LaunchError, UsageError
from launcher.money import burn
from launcher.run import JSON_VERSION

if TYPE_CHECKING:
    from launcher.backends.base import Check
    from launcher.run import Attempt, Driver, JobState, Run, StageState

_CODES = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "dim": "2", "bold": "1"}
_PHASE = {
    "succeeded": "green", "running": "blue", "starting": "blue", "provisioning": "blue",
    "failed": "red", "lost": "red", "preempted": "yellow", "cancelled": "yellow",
    "stopping": "yellow", "ended": "yellow", "pass": "green", "warn": "yellow", "fail": "red",
    "skip": "dim",
}  # fmt: skip
_STEERING = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b(?:[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
#: What is shown of a job that has ended by its own word, while nobody drove its run.
ENDED = "ended"
#: The columns of a comparison that come first, and in this order.
_FIRST = ("model", "parameters", "step", "training_seconds", "val_loss", "val_ppl", "val_tokens")


def say(text: str = "") -> None:
    """One line of a result, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def notice(text: str) -> None:
    """One line that is not a result, on stderr; without what would steer a terminal."""
    _to_stderr(plain(text))


def write(text: str) -> None:
    """One line of a result among many: not flushed, so that logs pass at full speed."""
    sys.stdout.write(text + "\n")


def document(facts: dict[str, Any]) -> None:
    """One JSON document with its version, on stdout. Numbers that are not finite are strings."""
    say(json.dumps(_finite({"v": JSON_VERSION, **facts}), indent=1, default=str))


def error(problem: LaunchError) -> None:
    """What happened, then what to do about it, on stderr."""
    for line in str(problem).splitlines() or [type(problem).__name__]:
        _to_stderr(paint("error: ", "red", sys.stderr) + plain(line))
    for line in problem.hint.splitlines():
        notice("  " + line)


def failure(problem: LaunchError, code: int) -> None:
    """`error` for a program: one line of JSON on stdout."""
    facts = {"message": str(problem), "hint": problem.hint, "exit_code": code}
    say(json.dumps({"v": JSON_VERSION, "error": facts}))


def plain(text: str) -> str:
    """`text` without terminal sequences, control characters (but line ends and tabs) and marks that
    turn the direction of writing: names and reasons may come from the journal of a stranger."""
    return _STEERING.sub("", text)


def colour(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that wants colour (https://no-color.org)."""
    dumb = os.environ.get("TERM") == "dumb"
    return terminal(stream) and not os.environ.get("NO_COLOR") and not dumb


def terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def can_ask() -> bool:
    """Whether there is a person to ask: the answer comes from stdin, the question is on stderr."""
    return terminal(sys.stdin) and terminal(sys.stderr)


def can_show_live() -> bool:
    """Whether a part of the screen may be drawn again: not when anything is piped or dumb."""
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    return terminal(sys.stdout) and terminal(sys.stderr) and not dumb


def style(phase: str) -> str:
    """The colour of a phase or a check's result; "" for none."""
    return _PHASE.get(phase, "")


def paint(text: str, style: str, stream: Optional[IO[str]] = None) -> str:
    code = _CODES.get(style)
    if code is None or not colour(stream or sys.stdout):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def confirm(question: str, refusal: str) -> bool:
    """Ask on the terminal; only `y` or `yes` is a yes. Without one: `UsageError`, whose hint is
    `--yes`, because silence must not spend money or end a job."""
    if not can_ask():
        raise UsageError(refusal, "add --yes to go on without being asked")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def columns(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()
) -> list[str]:
    """Aligned columns, two spaces apart, never cut. `right`: columns aligned to the right. The
    first line is the header; cells that are phases or results are coloured."""
    to_right = set(right)
    rows = [[" ".join(plain(cell).splitlines()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *rows)]

    def line(cells: Sequence[str], header: bool = False) -> str:
        shown = []
        for place, (cell, width) in enumerate(zip(cells, widths)):
            padded = cell.rjust(width) if place in to_right else cell.ljust(width)
            if place == len(cells) - 1:
                padded = padded.rstrip()
            shown.append(paint(padded, "dim" if header else style(cell)))
        return "  ".join(shown).rstrip()

    return [line(headers, header=True), *(line(row) for row in rows)]


def runs(found: Sequence[Run], now: float) -> list[str]:
    """`launch status`: one line a run, newest first."""
    headers = ("NAME", "PHASE", "STAGE", "STEP", "LOSS", "TOKENS/S", "ETA", "SPENT", "STARTED")
    rows = []
    for run in found:
        last = run.progress
        eta = records.number(last.get("eta_seconds")) if _goes_on(run) else None
        rows.append(
            (
                run.name,
                phase(run),
                str(last.get("stage") or _current(run)),
                steps(last),
                figure(last.get("train_loss")),
                figure(last.get("tokens_per_sec"), 0),
                duration(eta) if eta is not None else "-",
                spent(run),
                f"{duration(now - run.created)} ago",
            )
        )
    return columns(headers, rows, right=(3, 4, 5, 6, 7))


def phase(run: Run) -> str:
    """The phase of a run, `ENDED` where its job has ended and nobody drives it."""
    newest = [attempt for job in run.jobs for attempt in job.attempts][-1:]
    ended = run.ended is None and any(attempt.unconfirmed for attempt in newest)
    return ENDED if ended else run.phase.value


def _goes_on(run: Run) -> bool:
    return run.ended is None and phase(run) != ENDED


def stage_phase(run: Run, stage: StageState) -> str:
    """The phase of a stage; `ENDED` of the one that was under way when the job ended."""
    goes = stage.phase.value != "planned" and not stage.phase.over
    return ENDED if goes and phase(run) == ENDED else stage.phase.value


def run_lines(run: Run, now: float) -> list[str]:
    """`launch status RUN`: the run, its stages, its jobs and what it holds."""
    word = phase(run)
    why = plain(run.why) if run.why else ""
    if word == ENDED:
        why = "by its own word; a driver is still to confirm it"
    lines = [f"{paint(plain(run.name), 'bold')}  {paint(word, style(word))}  {why}".rstrip()]
    facts = [f"ran {duration(run.lasted(now))}", f"spent {spent(run)}"]
    if rate := burn(run):
        facts.append(f"{usd(rate)} per hour")
    facts.append(f"holds {run.held.value}" if run.live else "holds nothing")
    if run.exit_code is not None:
        facts.append(f"exit code {run.exit_code}")
    lines += ["  " + " · ".join(facts), ""]
    lines += ["  " + line for line in stages(run)]
    last = run.progress
    if last and _goes_on(run):
        lines += ["", "  " + progress(last)]
    if to_come := outlook(run):
        lines += ["", "  " + to_come]
    attempts = [(job, attempt) for job in run.jobs for attempt in job.attempts]
    if attempts:
        again = any(a.from_step is not None or a.restarts for _, a in attempts)
        rows = [
            (
                job.name, str(attempt.number), *([_beginning(run, job, attempt)] if again else ()),
                attempt.place or "-", ENDED if attempt.unconfirmed else attempt.phase.value,
                attempt.held.value, "-" if attempt.exit_code is None else str(attempt.exit_code),
                reason(attempt),
            )
            for job, attempt in attempts
        ]  # fmt: skip
        headers = ("JOB", "ATTEMPT", *(("FROM",) if again else ()), "PLACE", "PHASE", "HOLDS",
                   "EXIT", "WHY")  # fmt: skip
        lines += ["", *("  " + line for line in columns(headers, rows))]
    lines += ["", f"  artifacts  {plain(run.root)}"]
    if run.driver and run.ended is None:
        lines.append(f"  driver     {plain(_driver(run.driver))}")
    return lines


def _beginning(run: Run, job: JobState, attempt: Attempt) -> str:
    """The step that an attempt went on from, as its trainer says, else that of the newest
    checkpoint when it was asked for; and how often the service itself started it again."""
    at, told = attempt.from_step, None
    for stage in run.stages:
        if stage.job == job.index and attempt.from_step is not None:
            told = records.resumed(here(run, stage.folder)).get(attempt.number, told)
    step = f"step {told if told is not None else at}" if told or at else "the beginning"
    if told is not None and at and told != at:
        step += f" (newest: {at})"
    times = f", {attempt.restarts} restart{'s' if attempt.restarts > 1 else ''}"
    return step + (times if attempt.restarts else "")


def reason(attempt: Attempt) -> str:
    """Why an attempt is over, in words."""
    if attempt.cause == "deadline":
        return f"ended by the deadline that its budget had set ({attempt.why})"
    return attempt.why or "-"


def _driver(who: Driver) -> str:
    if who.alive is False:
        return f"none; process {who.pid} on {who.host} has died"
    unknown = " (another host: whether it lives is not known here)" if who.alive is None else ""
    return f"{who.host}, process {who.pid}{unknown}"


def stages(run: Run) -> list[str]:
    """One line a stage, with the newest numbers of each."""
    rows = []
    for stage in run.stages:
        folder = here(run, stage.folder)
        mine = run.progress.get("stage") == stage.id
        last = run.progress if mine else records.progress(folder)
        rows.append(
            (
                stage.id,
                stage.stage,
                stage_phase(run, stage),
                steps(last),
                figure(last.get("train_loss")),
                figure(records.evaluation(folder).get("val_loss")),
                stage.gate or "-",
            )
        )
    headers = ("STAGE", "KIND", "PHASE", "STEP", "LOSS", "HELD-OUT", "GATE")
    return columns(headers, rows, right=(3, 4, 5))


def progress_line(run: Run) -> str:
    """`status --watch` where nothing can be drawn again: a run in one line."""
    now = "" if run.ended is not None or not run.progress else f"  {progress(run.progress)}"
    return plain(f"{run.name}: {phase(run)}{now}")


def progress(last: dict[str, Any]) -> str:
    """The newest step line as a sentence."""
    words = [f"{last.get('stage', 'stage')}: step {steps(last)}"]
    for name, label, digits in (("train_loss", "loss", 4), ("tokens_per_sec", "tokens/s", 0)):
        if records.number(last.get(name)) is not None:
            words.append(f"{label} {figure(last[name], digits)}")
    eta = records.number(last.get("eta_seconds"))
    if eta is not None:
        words.append(f"ETA {duration(eta)}")
    return plain("  ".join(words))


def comparison(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A recorded comparison as columns: names first, then numbers to the right."""
    names = comparison_columns(rows)
    shown = [[cell(name, row.get(name)) for name in names] for row in rows]
    numeric = [i for i, name in enumerate(names) if any(_is_number(row.get(name)) for row in rows)]
    return columns(names, shown, right=numeric)


def comparison_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of a comparison: the well-known ones first, then the others as they came."""
    present = list(dict.fromkeys(name for row in rows for name in row))
    known = [name for name in _FIRST if name in present]
    return known + [name for name in present if name not in known]


def cell(name: str, value: Any) -> str:
    """One value of a comparison: whole numbers with separators, others with fitting digits."""
    number = records.number(value)
    if number is None:
        return "-" if value is None else str(value)
    if name.endswith("seconds"):
        return figure(number, 1)
    whole = math.isfinite(number) and number.is_integer() and not isinstance(value, float)
    return figure(number, 0 if whole else 4)


def checks(rows: Sequence[Check]) -> list[str]:
    """Doctor's rows, each with its fix below it when there is something to fix."""
    table = columns(("CHECK", "RESULT", "DETAIL"), [(r.name, r.result, r.detail) for r in rows])
    lines = table[:1]
    for row, line in zip(rows, table[1:]):
        lines.append(line)
        if row.fix and row.result in ("warn", "fail"):
            lines.append(f"  fix: {row.fix}")
    return lines


def wrapped(text: str) -> list[str]:
    """Prose for a terminal of at most 100 columns; one line for a pipe."""
    if not terminal(sys.stdout):
        return [text]
    import shutil
    import textwrap

    return textwrap.wrap(text, min(shutil.get_terminal_size().columns, 100) - 2)


def steps(last: dict[str, Any]) -> str:
    if "global_step" not in last:
        return "-"
    of = f"/{last['steps']}" if last.get("steps") else ""
    return f"{last['global_step']}{of}"


def figure(value: Any, digits: int = 4) -> str:
    number = records.number(value)
    return "-" if number is None else f"{number:,.{digits}f}"


def usd(amount: Optional[float]) -> str:
    if amount is None:
        return "price unknown"
    return "$0" if amount == 0 else f"${amount:,.2f}"


def spent(run: Run) -> str:
    """What a run has cost: `$3.20`, `at least $3.20` where some of its prices are unknown."""
    least = "at least " if run.unpriced and run.spent_usd else ""
    return least + usd(run.spent_usd)


def outlook(run: Run) -> str:
    """What a live run costs now, will have cost, and which limit of its budget comes first; empty:
    nothing is known of that, or it is free and without limits."""
    known = run.money
    rate, end, cost = known.get("usd_per_hour"), known.get("end_seconds"), known.get("end_usd")
    limit = known.get("limit") or {}
    if not limit and not rate and not ("usd_per_hour" in known and rate is None):
        return ""
    words = ["price unknown" if rate is None else f"{usd(rate)} per hour now"]
    if limit:
        unit = "USD" if limit["key"] == "budget.usd" else "h"
        reached = f"reached in {duration(limit['left'])}"
        if known.get("limit_first") and end is not None:
            reached += f", before its end in {duration(end)}"
        words.append(f"{limit['key']} {limit['used']:.2f} of {limit['of']:.2f} {unit}, {reached}")
    if end is not None and cost is not None:
        what = f"at the end of stage {known['stage']}" if "stage" in known else "at its end"
        words.append(f"about {usd(cost)} {what}, in {duration(end)}")
    return plain(" · ".join(words))


def moment(seconds: float) -> str:
    """UTC, to the microsecond, as boot writes it into the logs."""
    whole, micros = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{micros:06d}Z"


def current(run: Run) -> Optional[StageState]:
    """The stage that a run is in: the first that is not over, else the last."""
    waiting = [stage for stage in run.stages if not stage.phase.over]
    return waiting[0] if waiting else (run.stages[-1] if run.stages else None)


def _current(run: Run) -> str:
    stage = current(run)
    return stage.id if stage else "-"


def _to_stderr(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _is_number(value: Any) -> bool:
    return records.number(value) is not None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
