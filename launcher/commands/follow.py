"""Following a run: a live view on a terminal, plain lines elsewhere, and how it ended."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Optional

from launcher import api, console, records, report, retry
from launcher.artifacts import here, journals
from launcher.backends.base import Env, Line, Phase
from launcher.errors import Exit, LaunchError
from launcher.logs import Reader, awaited, looks
from launcher.run import Run

#: Log lines shown of what was there before, or was hidden by the view when the run failed.
_LAST_LINES = 20
_BEFORE = "--- the last lines logged before this command ---"
_SINCE = "--- logged since ---"


def follow(run: Run, env: Env, *, since: float, as_json: bool) -> int:
    """Show the run until it is over, then its comparison, gates, artifacts and report; returns the
    run's exit code. Ctrl-C detaches: 0, and the run goes on. `since`: when the command was given;
    of what was logged before it, only the last lines are shown, marked as such."""
    try:
        ended = watch(run, env, since=since, as_json=as_json)
    except KeyboardInterrupt:
        console.notice(f"\ndetached: {run.name} goes on")
        console.notice(f"  launch attach {run.name}   comes back")
        console.notice(f"  launch stop {run.name}     stops it, with a checkpoint")
        return Exit.OK
    written = reported(ended)
    if as_json:
        console.document(facts(ended, written))
    else:
        for line in ending(ended, written):
            console.say(line)
    return int(ended.exit_code or 0)


def watch(run: Run, env: Env, *, since: float, as_json: bool, hint: str = "") -> Run:
    """Show the run until it is over. Ctrl-C is the caller's; `hint` says what it does there."""
    if console.can_show_live() and not as_json:
        return _live(run, env, since, hint)
    return _plain(run, env, since, console.notice if as_json else console.say)


def ending(run: Run, written: Optional[Path]) -> list[str]:
    """What a run leaves its reader with, as lines."""
    lines = [""]
    for stage, rows in records.tables(run):
        lines += [f"{stage}:", *("  " + line for line in console.comparison(rows)), ""]
    for stage, passed, sentences in _gates(run):
        word = console.paint("passed" if passed else "failed", "green" if passed else "red")
        lines.append(f"gate of {stage}: {word}")
        lines += [f"  {sentence}" for sentence in sentences]
    took = console.duration(run.lasted(run.ended or run.created))
    why = f": {run.why}" if run.why else ""
    phase = console.paint(run.phase.value, console.style(run.phase.value))
    lines.append(f"{run.name} {phase} after {took}, {console.spent(run)}{why}")
    lines.append(f"artifacts: {run.root}")
    if written is not None:
        lines.append(f"report:    {written}  (launch report {run.name} writes it again)")
    if run.phase in (Phase.FAILED, Phase.LOST, Phase.CANCELLED):
        lines += _next(run)
    return lines


def _next(run: Run) -> list[str]:
    """What to do about a run that did not succeed. A resumed run reads its own recipe, as it was
    recorded, and the files that it names, as they are by then."""
    resume, code = f"`launch resume {run.name}", _fault(run)
    if run.exit_code == Exit.BUDGET and "launch resume" in run.why:
        return [f"resumed, it {_resumption(run)}; a budget counts all attempts together"]
    if run.exit_code == Exit.BUDGET:
        keys = re.findall(r"budget\.\w+", run.why) or ["budget.hours"]
        more = " ".join(f"--set {key}=MORE" for key in dict.fromkeys(keys))
        return [f"{resume} {more}` {_resumption(run)}; a budget counts all attempts together"]
    if code == 64:
        return [
            "the recipe is at fault, or a file that it names: fix it, then `launch up` the recipe",
            f"{resume} --set KEY=VALUE` (without --set: the same recipe) {_resumption(run)}",
        ]
    if code is None:
        return [f"{resume}` {_resumption(run)}"]
    fault = retry.HOPELESS[code].removeprefix("the ")
    return [f"the {fault} is at fault: fix it first, then {resume}` {_resumption(run)}"]


def _fault(run: Run) -> Optional[int]:
    """The exit code of a run that failed by what trying again cannot change, else None."""
    attempts = [job.attempts[-1] for job in run.jobs if job.attempts]
    code = attempts[-1].exit_code if attempts and run.phase is Phase.FAILED else None
    return code if code in retry.HOPELESS else None


def _resumption(run: Run) -> str:
    """What a resumed run begins with: the stage that is not done."""
    stage = next((stage for stage in run.stages if stage.phase is not Phase.SUCCEEDED), None)
    if any(one.gate not in (None, "passed") for one in run.stages):
        return "goes on from the last checkpoint, and asks the gate again"
    if stage is None or records.has_checkpoint(here(run, stage.folder)):
        return "goes on from the last checkpoint"
    if stage is run.stages[0]:
        return "starts it again: there is no checkpoint"
    return f"starts stage {stage.id} again: it has no checkpoint"


def _plain(run: Run, env: Env, since: float, write: Callable[[str], None]) -> Run:
    """Worker 0's lines through `write`, and changes of phase on stderr."""
    known: dict[str, str] = {}
    last, first, waiting = run, True, False
    for last, lines in looks(lambda: api.status(run.id), Reader(env, worker=0)):
        old = first and run.created < since - 1
        if old:
            _told(lines, since, write)
        else:
            for line in lines:
                write(line.text)
        for name, phase in _phases(last):
            if known.get(name) != phase:
                console.notice(f"{name}: {phase}")
                known[name] = phase
        first = False
        if not waiting and (late := awaited(last, env.clock.now())) > 0:
            waiting = True
            console.notice(f"{last.name} is over; waiting for the last log lines ({late:.0f} s)")
    return last


def _told(lines: Iterable[Line], since: float, write: Callable[[str], None]) -> None:
    """All lines from `since` on; before them, between two marks, the last of the older ones: what
    an earlier attempt said must not pass for the beginning of this one."""
    before: deque[str] = deque(maxlen=_LAST_LINES)
    fresh: list[str] = []
    for line in lines:
        (before if line.time < since else fresh).append(line.text)
    if before:
        fresh = [_BEFORE, *before, _SINCE, *fresh]
    for text in fresh:
        write(text)


def _live(run: Run, env: Env, since: float, hint: str) -> Run:
    from launcher.commands.live import DETACHES, View

    recent: deque[Line] = deque(maxlen=_LAST_LINES)
    last = run
    with View(hint or DETACHES) as view:
        for last, lines in looks(lambda: api.status(run.id), Reader(env, worker=0)):
            recent.extend(lines)
            view.run(last, env.clock.now(), awaited(last, env.clock.now()))
    if last.phase in (Phase.FAILED, Phase.LOST):
        _told(recent, since, console.notice)
    return last


def _phases(run: Run) -> list[tuple[str, str]]:
    """The run's phase under its name, and that of each stage that has begun."""
    begun = [stage for stage in run.stages if stage.phase is not Phase.PLANNED]
    return [
        (run.name, run.phase.value),
        *((f"{run.name}/{stage.id}", stage.phase.value) for stage in begun),
    ]


def _gates(run: Run) -> list[tuple[str, bool, list[str]]]:
    """(stage, passed, sentences) of every gate that was asked."""
    recorded = {r["id"]: r for r in records.gates(*journals(run))}
    found = []
    for stage in run.stages:
        if stage.gate is not None:
            passed = stage.gate == "passed"
            sentences = [str(line) for line in recorded.get(stage.id, {}).get("lines", [])]
            found.append((stage.id, passed, sentences or [stage.gate]))
    return found


def facts(run: Run, written: Optional[Path]) -> dict[str, Any]:
    """`ending` for a program."""
    return {
        **run.to_json(),
        "tables": [{"stage": stage, "rows": rows} for stage, rows in records.tables(run)],
        "gates": [{"stage": s, "passed": p, "lines": lines} for s, p, lines in _gates(run)],
        "report": None if written is None else str(written),
    }


def reported(run: Run) -> Optional[Path]:
    """The report, when it can be written: a full disk must not hide how the run ended."""
    try:
        return report.write(run)
    except LaunchError as error:
        console.notice(f"no report: {error}")
        return None
