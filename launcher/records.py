"""What a run wrote: metrics parts, evaluations, tables, gates. Linear time, no printing.

The formats are those of docs/contracts.md. Files may be growing, cut or absent: a torn line is left
out, a missing file is an empty answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from launcher.artifacts import here

if TYPE_CHECKING:
    from launcher.run import Run

#: Bytes from the end of a metrics part that hold the newest lines (a line is about 300).
_TAIL = 64 * 1024


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics lines of a stage folder in the order of their steps. Of each (kind, step) only
    the highest attempt is kept, and of it the last restart; within that the last line, except
    events, which are all kept."""
    kept: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in _lines(folder):
        kind, step = line.get("kind"), line.get("global_step")
        if not isinstance(kind, str) or not isinstance(step, int):
            continue
        place = kept.setdefault((kind, step), [])
        if place and _attempt(place[0]) > _attempt(line):
            continue
        if place and (_attempt(place[0]) < _attempt(line) or kind != "event"):
            place.clear()
        place.append(line)
    return [line for _, lines in sorted(kept.items(), key=_by_step) for line in lines]


def evaluation(folder: Path) -> dict[str, Any]:
    """`evaluation.json` of a stage folder; empty when there is none yet."""
    return _object(folder / "evaluation.json")


def meta(folder: Path) -> dict[str, Any]:
    """`run_meta.json` of a stage folder; empty when the stage has not started."""
    return _object(folder / "run_meta.json")


def arguments(folder: Path) -> dict[str, Any]:
    """`args_snapshot.json` of a stage folder: its configuration as run."""
    return _object(folder / "args_snapshot.json")


def tables(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """The comparison tables that the run's stages recorded: (stage id, rows), in stage order. Of
    each stage the newest table counts."""
    found = []
    for stage in run.stages:
        folder = here(run, stage.folder)
        lines = [line for line in metrics(folder) if line["kind"] == "table"]
        if lines:
            newest = max(lines, key=lambda line: (*_attempt(line), line["global_step"]))
            rows = newest.get("rows")
            if isinstance(rows, list):
                found.append((stage.id, [row for row in rows if isinstance(row, dict)]))
    return found


def gates(*journals: Path) -> list[dict[str, Any]]:
    """The newest `gate` record of each stage, `{"id", "passed", "lines"}`, of a journal in one or
    several folders."""
    newest: dict[str, dict[str, Any]] = {}
    files = {file.name: file for folder in journals for file in folder.glob("[0-9]*.json")}
    for _, file in sorted(files.items()):
        record = _object(file)
        if record.get("kind") == "gate" and isinstance(record.get("id"), str):
            newest[record["id"]] = record
    return list(newest.values())


def progress(folder: Path) -> dict[str, Any]:
    """The newest step line of a stage folder, plus `eta_seconds` when its horizon is known: what
    is left divided by the speed of the last lines. Reads only the end of the newest part."""
    steps: list[dict[str, Any]] = []
    for part in reversed(_parts(folder)):
        steps = [line for line in _tail(part) if _is_step(line)]
        if steps:
            break
    if not steps:
        return {}
    newest = dict(steps[-1])
    eta = _eta(steps[-20:])
    if eta is not None:
        newest["eta_seconds"] = eta
    return newest


def run_progress(run: Run) -> dict[str, Any]:
    """`progress` of the stage that wrote last, or of none."""
    for stage in reversed(run.stages):
        found = progress(here(run, stage.folder))
        if found:
            return {"stage": stage.id, **found}
    return {}


def resumed(folder: Path) -> dict[int, int]:
    """attempt -> the step at which its trainer last went on from a checkpoint, by its own word."""
    found: dict[int, int] = {}
    for line in _lines(folder, holding=b'"resumed"'):
        attempt, step = line.get("attempt"), line.get("global_step")
        if line.get("event") == "resumed" and isinstance(attempt, int) and isinstance(step, int):
            found[attempt] = step
    return found


def has_checkpoint(folder: Path) -> bool:
    """Whether a stage left a whole checkpoint (its manifest is written last)."""
    return any(folder.glob("checkpoints/step-*/MANIFEST.json"))


def part_order(name: str) -> tuple[int, ...]:
    """Where a part of a log or of metrics belongs: by job, attempt, restart and part; `00-0002`,
    `00-0002r1`, `0002-00003`, `0002r10-00000`."""
    fields = name.partition(".")[0].split("-")
    key: list[int] = []
    for field in fields:
        base, _, restart = field.partition("r")
        if not (base.isdigit() and (restart or "0").isdigit()):
            return ()
        key += [int(base), int(restart or 0)]
    return tuple(key)


def number(value: Any) -> Optional[float]:
    """A recorded number as a float, `"nan"` and `"inf"` included; None: not a number."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return None


def series(lines: list[dict[str, Any]], kind: str, name: str) -> list[tuple[float, float]]:
    """(global step, value) of every finite `name` in lines of `kind`: one curve."""
    points = []
    for line in lines:
        value = number(line.get(name)) if line["kind"] == kind else None
        if value is not None and math.isfinite(value):
            points.append((float(line["global_step"]), value))
    return points


def _is_step(line: Mapping[str, Any]) -> bool:
    return line.get("kind") == "step" and isinstance(line.get("global_step"), int)


def _eta(steps: list[dict[str, Any]]) -> Optional[float]:
    last, first = steps[-1], steps[0]
    horizon, step = number(last.get("steps")), number(last.get("global_step"))
    if horizon is None or step is None:
        return None
    left = max(horizon - step, 0.0)
    if not left:
        return 0.0
    done = step - (number(first.get("global_step")) or 0.0)
    took = (number(last.get("time")) or 0.0) - (number(first.get("time")) or 0.0)
    if done <= 0 or took <= 0:
        return None
    return left * took / done


def _parts(folder: Path) -> list[Path]:
    parts = sorted((folder / "metrics").glob("*.jsonl"), key=lambda part: part_order(part.name))
    return parts or sorted(folder.glob("metrics.jsonl"))


def _lines(folder: Path, holding: bytes = b"") -> Iterator[dict[str, Any]]:
    for part in _parts(folder):
        try:
            with part.open("rb") as handle:
                for raw in handle:
                    yield from _parsed(raw) if holding in raw else ()
        except OSError:
            continue


def _tail(part: Path) -> list[dict[str, Any]]:
    try:
        with part.open("rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - _TAIL))
            chunk = handle.read()
    except OSError:
        return []
    rows = chunk.splitlines(keepends=True)
    whole = rows if size <= _TAIL else rows[1:]  # the first line may have been cut by the seek
    return [line for raw in whole for line in _parsed(raw)]


def _parsed(raw: bytes) -> Iterator[dict[str, Any]]:
    """The line, unless it is torn: no newline yet, or not a JSON object."""
    if not raw.endswith(b"\n"):
        return
    try:
        line = json.loads(raw)
    except ValueError:
        return
    if isinstance(line, dict):
        yield line


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _attempt(line: Mapping[str, Any]) -> tuple[int, int]:
    """The attempt, and which restart by the service within it."""
    attempt, restart = line.get("attempt"), line.get("restart")
    return (
        attempt if isinstance(attempt, int) else 0,
        restart if isinstance(restart, int) else 0,
    )


def _by_step(item: tuple[tuple[str, int], list[dict[str, Any]]]) -> tuple[int, str]:
    (kind, step), _ = item
    return step, kind
