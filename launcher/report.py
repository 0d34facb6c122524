"""A run as one HTML file: no network, no library, light and dark. Charts are `launcher.chart`'s.

Everything that a run wrote is escaped: a stage or a model may be called anything.
"""

from __future__ import annotations

import html
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from launcher import chart, console, home, records
from launcher.artifacts import here, journals
from launcher.report_page import PAGE, SCRIPT, STYLE
from launcher.run import Run

#: Events beyond this many are left out, the oldest first.
_MOST_EVENTS = 200


def write(run: Run, to: Optional[Path] = None) -> Path:
    """Write the report to `to` (default: report.html under the artifact root) and return its path.

    Of a run in a store: in the copy here. Errors: `LaunchError`, when the disk refuses.
    """
    root = here(run)
    path = to or root / "report.html"
    if path.is_dir():
        path = path / f"{run.name}.html"
    home.write(path, page(run, root))
    return path


def page(run: Run, root: Path) -> str:
    """The whole document. `root`: the artifact root as a folder."""
    lines = {stage.id: records.metrics(here(run, stage.folder)) for stage in run.stages}
    body = [
        _header(run),
        _gates(run),
        *(_comparison(stage, rows) for stage, rows in records.tables(run)),
        *_charts(lines),
        _stages(run),
        _attempts(run),
        _events(lines),
        _versions(run),
        _recipe(root),
    ]
    title = _escape(f"{run.name}: {run.phase.value}")
    parts = "\n".join(part for part in body if part)
    return PAGE.format(title=title, style=STYLE, script=SCRIPT, body=parts)


def _header(run: Run) -> str:
    word, seconds = "lasted" if run.ended is not None else "so far", run.lasted(time.time())
    facts = [
        ("recipe", run.recipe),
        ("started", _utc(run.created)),
        (word, console.duration(seconds)),
        ("cost", console.spent(run)),
        ("attempts", str(sum(len(job.attempts) for job in run.jobs))),
        ("where", ", ".join(dict.fromkeys(_places(run))) or "-"),
        ("owner", run.owner),
        ("run", run.id),
    ]
    cards = "".join(f"<div><dt>{k}</dt><dd>{_escape(v)}</dd></div>" for k, v in facts)
    why = f"<p>{_escape(run.why)}</p>" if run.why else ""
    phase = run.phase.value
    return (
        f'<header><h1>{_escape(run.name)} <span class="phase {phase}">{phase}</span></h1>{why}'
        f"<dl>{cards}</dl></header>"
    )


def _gates(run: Run) -> str:
    recorded = {record["id"]: record for record in records.gates(*journals(run))}
    shown = []
    for stage in run.stages:
        if stage.gate is None:
            continue
        record = recorded.get(stage.id, {})
        passed = stage.gate == "passed"
        lines = [str(line) for line in record.get("lines", [])] or [stage.gate]
        text = "<br>".join(_escape(line) for line in lines)
        word = "passed" if passed else "failed"
        shown.append(
            f'<p class="gate {word}"><b>Gate of {_escape(stage.id)}: {word}.</b> {text}</p>'
        )
    return "\n".join(shown)


def _comparison(stage: str, rows: list[dict[str, Any]]) -> str:
    names = console.comparison_columns(rows)
    body = [[console.cell(name, row.get(name)) for name in names] for row in rows]
    numeric = [any(records.number(row.get(name)) is not None for row in rows) for name in names]
    return f"<section><h2>Comparison: {_escape(stage)}</h2>{_table(names, body, numeric)}</section>"


def _charts(lines: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Losses, objectives, learning rate and throughput; a stage keeps its colour in all of them."""
    trained = [stage for stage, found in lines.items() if records.series(found, "step", "lr")]
    losses, objectives, rates, speeds = [], [], [], []
    for colour, stage in enumerate(trained):
        found = lines[stage]
        objective = records.series(found, "step", "train_loss")
        # Held-out loss is a cross-entropy: beside it only a cross-entropy can be compared.
        training = records.series(found, "step", "ce_loss") or objective
        held_out = records.series(found, "eval", "val_loss")
        losses.append(chart.Series(f"{stage} training", training, colour))
        losses.append(chart.Series(f"{stage} held out", held_out, colour, bold=True))
        if _differ(training, objective):
            objectives.append(chart.Series(stage, objective, colour))
        rates.append(chart.Series(stage, records.series(found, "step", "lr"), colour))
        speed = records.series(found, "step", "tokens_per_sec")
        speeds.append(chart.Series(stage, speed, colour))
    shown = [
        chart.figure("Loss", "step", "nats per token", losses),
        chart.figure("Training objective, where it is not the loss", "step", "value", objectives),
        chart.figure("Learning rate", "step", "learning rate", rates),
        chart.figure("Throughput", "step", "tokens per second", speeds),
    ]
    if not any(shown):
        return ['<p class="empty">No stage has recorded training steps.</p>']
    return shown


def _differ(one: Sequence[chart.Point], other: Sequence[chart.Point]) -> bool:
    """More than two ways of adding up the same loss do."""
    pairs = zip(one, other)
    return len(one) != len(other) or any(abs(a - b) > 1e-3 * abs(a) for (_, a), (_, b) in pairs)


def _stages(run: Run) -> str:
    headers = ["stage", "kind", "phase", "steps", "parameters", "training time", "held-out loss",
               "best (step)", "seed", "device", "precision"]  # fmt: skip
    rows = []
    for stage in run.stages:
        folder = here(run, stage.folder)
        meta, result = records.meta(folder), records.evaluation(folder)
        train = records.arguments(folder).get("train") or {}
        seconds = records.number(meta.get("training_seconds"))
        best = console.figure(result.get("best_val_loss"))
        if best != "-" and records.number(result.get("best_step")) is not None:
            best += f" ({console.figure(result['best_step'], 0)})"
        rows.append(
            [
                stage.id,
                stage.stage,
                stage.phase.value,
                console.figure(meta.get("global_step"), 0),
                console.figure(meta.get("parameters"), 0),
                console.duration(seconds) if seconds is not None else "-",
                console.figure(result.get("val_loss")),
                best,
                str(train.get("seed", "-")),
                str(meta.get("device", "-")),
                str(meta.get("precision", "-")),
            ]
        )
    numeric = [3 <= column <= 7 for column in range(len(headers))]
    return f"<section><h2>Stages</h2>{_table(headers, rows, numeric)}</section>"


def _attempts(run: Run) -> str:
    headers = ["job", "attempt", "place", "phase", "held", "started", "lasted", "exit", "why"]
    rows = [
        [
            job.name,
            str(attempt.number),
            attempt.place or "-",
            attempt.phase.value,
            attempt.held.value,
            _utc(attempt.started),
            console.duration(attempt.ended - attempt.started)
            if attempt.ended is not None and attempt.started is not None
            else "-",
            "-" if attempt.exit_code is None else str(attempt.exit_code),
            console.reason(attempt),
        ]
        for job in run.jobs
        for attempt in job.attempts
    ]
    if not rows:
        return ""
    numeric = [column in (1, 6, 7) for column in range(len(headers))]
    return f"<section><h2>Jobs and attempts</h2>{_table(headers, rows, numeric)}</section>"


def _events(lines: dict[str, list[dict[str, Any]]]) -> str:
    """What happened on the way. Checkpoints are counted, not listed."""
    events = [
        (stage, line) for stage, found in lines.items() for line in found if line["kind"] == "event"
    ]
    saved = sum(line.get("event") == "checkpoint" for _, line in events)
    events = [(stage, line) for stage, line in events if line.get("event") != "checkpoint"]
    events.sort(key=lambda item: records.number(item[1].get("time")) or 0.0)
    known = {"v", "kind", "attempt", "restart", "stage", "time", "global_step", "event"}
    rows = [
        [
            _utc(records.number(line.get("time"))),
            stage,
            str(line["global_step"]),
            str(line.get("event", "-")),
            "  ".join(f"{key} {value}" for key, value in line.items() if key not in known) or "-",
        ]
        for stage, line in events[-_MOST_EVENTS:]
    ]
    heading = f"<section><h2>Events</h2><p>{saved} checkpoints were written.</p>"
    if not rows:
        return heading + "</section>"
    headers = ["time", "stage", "step", "event", "facts"]
    return heading + _table(headers, rows, [False, False, True, False, False]) + "</section>"


def _versions(run: Run) -> str:
    versions: dict[str, str] = {}
    for stage in run.stages:
        meta = records.meta(here(run, stage.folder))
        versions.update({str(k): str(v) for k, v in (meta.get("versions") or {}).items()})
        if meta.get("commit"):
            versions["commit"] = str(meta["commit"])
    versions["report written with Python"] = platform.python_version()
    items = "".join(f"<div><dt>{_escape(k)}</dt><dd>{_escape(v)}</dd></div>"
                    for k, v in versions.items())  # fmt: skip
    return f"<section><h2>Versions</h2><dl>{items}</dl></section>"


def _recipe(root: Path) -> str:
    try:
        text = (root / "recipe.yaml").read_text(errors="replace")
    except OSError:
        return ""
    return (
        "<section><details><summary>The recipe, as resolved</summary>"
        f"<pre>{_escape(text)}</pre></details></section>"
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    marks = [' class="n"' if right else "" for right in numeric]
    head = "".join(f"<th{mark}>{_escape(name)}</th>" for name, mark in zip(headers, marks))
    body = "".join(
        "<tr>" + "".join(f"<td{m}>{_escape(v)}</td>" for v, m in zip(row, marks)) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _places(run: Run) -> list[str]:
    return [
        f"{job.backend} ({attempt.place})" if attempt.place else job.backend
        for job in run.jobs
        for attempt in job.attempts
    ]


def _utc(seconds: Optional[float]) -> str:
    if seconds is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _escape(text: Any) -> str:
    return html.escape(str(text), quote=True)
