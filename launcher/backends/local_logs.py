"""Log parts on a file system, read from a cursor: `R/logs/worker-<n>/<job>-<attempt>.log`, those of
restarts within the attempt (`<attempt>r<k>`), and numbered ones of a store (`-<ppppp>`)."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from launcher.backends.base import JobHandle, Line, LogQuery
from launcher.records import part_order

_STAMP = len("2026-11-21T08:32:46.123456Z")
_CHUNK = 1 << 20


def read_parts(folder: Path, job: JobHandle, query: LogQuery) -> Iterator[Line]:
    """Whole lines after the cursor, of all workers (or one) in time order; a torn last line is
    left for later. The cursor holds, per worker, the part and the offset in it, and is that of
    all workers: the newest line's cursor goes on after every line yielded so far."""
    index = job.name.rpartition("-j")[2]
    name = re.compile(rf"{int(index):02d}-{job.attempt:04d}(?:r\d+)?(?:-\d+)?\.log")
    position: dict[str, Any] = dict(query.cursor)
    streams = []
    names = (path.name[len("worker-") :] for path in folder.glob("worker-*"))
    for number in sorted(int(name) for name in names if name.isdecimal()):
        if query.worker is None or query.worker == number:
            streams.append(_parts(folder / f"worker-{number}", name, number, position))
    for when, number, text, part, end in heapq.merge(*streams, key=lambda item: item[:2]):
        position[str(number)] = {"part": part, "offset": end}
        if query.since is None or when >= query.since:
            yield Line(number, when, text, dict(position))


def _parts(
    folder: Path, name: re.Pattern[str], worker: int, position: Mapping[str, Any]
) -> Iterator[tuple[float, int, str, str, int]]:
    """(time, worker, text, part, offset after it) of the lines of one worker, part after part."""
    try:
        names = [item for item in os.listdir(folder) if name.fullmatch(item)]  # noqa: PTH208
    except FileNotFoundError:
        return
    newest = part_order(str((position.get(str(worker)) or {}).get("part", "")))
    for part in sorted(names, key=part_order):
        if part_order(part) >= newest:
            for when, number, text, end in _read(folder / part, worker, position):
                yield when, number, text, part, end


def _read(
    path: Path, worker: int, position: Mapping[str, Any]
) -> Iterator[tuple[float, int, str, int]]:
    """(time, worker, text, offset after it) of each whole line of one part."""
    seen = position.get(str(worker)) or {}
    offset = int(seen["offset"]) if seen.get("part") == path.name else 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        rest, when = b"", 0.0
        while chunk := file.read(_CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                when, text = _stamped(line.decode("utf-8", "replace"), when)
                yield when, worker, text, offset


def _stamped(line: str, before: float) -> tuple[float, str]:
    """The time in front of a line and the rest; a line without one has the time before it."""
    try:  # `strptime` takes ten times as long, and Python 3.10 reads no `Z` here
        when = datetime.fromisoformat(line[: _STAMP - 1])
    except ValueError:
        return before, line
    if line[_STAMP - 1 : _STAMP + 1] not in ("Z ", "Z"):
        return before, line
    return when.replace(tzinfo=timezone.utc).timestamp(), line[_STAMP + 1 :]
