"""Log lines of a job from Cloud Logging: each once, in time order, however late or often they come.

An entry may become readable seconds after its time, and minutes if a machine was cut off. So the
newest seconds are held back, each look reads again what lies shortly before the last line given, a
look now and then and the last ones what lies minutes before it, and what was given is known by its
insert id. All times are the service's: neither this machine's clock nor that of a worker need be
right. A page of a list request costs one turn of `quota`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Optional

from launcher import google
from launcher.backends.base import Env, JobHandle, Line, LogQuery, Ref
from launcher.backends.vertex import quota, refs
from launcher.backends.vertex.request import JOB
from launcher.errors import Transient

#: Seconds: entries younger than this wait for those that are late.
SETTLE = 5.0
#: Seconds before the last line that are read again.
OVERLAP = 30.0
#: Seconds before those that a wide look reads too, seconds from one such look to the next, and the
#: pages that it may cost: of what is written faster only the older part is looked through.
LOOK_BACK, WIDE_EVERY, _WIDE_PAGES = 600.0, 60.0, 10
#: The same when the job is over: there are only `DRAIN` seconds left.
WIDE_AT_THE_END = 10.0
#: Seconds after the end of a job until its last entries are there.
DRAIN = 30.0
#: Seconds by which a time in a filter, which has microseconds, may lie before the one meant.
_ROUNDED = 1e-3
_PAGE = 1000
#: What boot puts before a worker's line where a job has several: its global rank.
_RANK = re.compile(r"\[worker (\d+)\] ")


@dataclass(repr=False)
class _Given:
    """Insert id -> its number among the lines given, and its time; shared by all cursors of one
    reader. The time is the entry's own: by it the service finds an entry again, however long ago
    it was received."""

    numbers: dict[str, tuple[int, float]] = field(default_factory=dict)
    count: int = 0
    wide_at: float = 0.0  # by this machine's clock: when the next wide look is due
    #: The cursor of another process, which has no memory: what sorts up to it was given there.
    floor: tuple[float, str] = (0.0, "")

    def __repr__(self) -> str:
        return "given"  # cursors are compared by their repr

    def has(self, entry: _Entry) -> bool:
        return entry.insert_id in self.numbers or (entry.at, entry.insert_id) <= self.floor

    def add(self, insert_id: str, time: float) -> int:
        self.count += 1
        self.numbers[insert_id] = (self.count, time)
        return self.count

    def until(self, number: int) -> _Given:
        """What was given up to that number; an older cursor goes on from there by itself."""
        if number == self.count:
            return self
        kept = {name: entry for name, entry in self.numbers.items() if entry[0] <= number}
        return _Given(kept, number, self.wide_at, self.floor)

    def forget(self, before: float) -> None:
        kept = {name: entry for name, entry in self.numbers.items() if entry[1] >= before}
        self.numbers = kept


@dataclass(frozen=True)
class _Entry:
    """`at`: its time, or when the service received it if that was before: a clock runs ahead."""

    time: float
    at: float
    insert_id: str
    worker: int
    text: str


def read(job: JobHandle, query: LogQuery, env: Env) -> Iterator[Line]:
    """What there is after `query.cursor`. Errors: `Transient` when it is not this reader's turn, or
    for what passes; the lines given before it stand."""
    ref = next((ref for ref in reversed(job.refs) if ref.kind == JOB), None)
    if ref is None:
        return
    number = refs.number(ref)
    if query.cursor.get("job", number) != number:  # the attempt turned out to be another job
        query = replace(query, cursor={})
    cursor = query.cursor
    known = cursor.get("given")
    now = env.clock.now()
    given = known.until(int(cursor["number"])) if isinstance(known, _Given) else _Given()
    if cursor and not isinstance(known, _Given):
        given.floor = float(cursor["time"]), str(cursor["id"])
    given.wide_at = given.wide_at or now + WIDE_EVERY
    every = WIDE_AT_THE_END if query.last else WIDE_EVERY
    wide = bool(cursor) and now >= given.wide_at - WIDE_EVERY + every
    if wide:  # before it is done: one that is cut must not keep the next lines waiting
        given.wide_at = now + WIDE_EVERY
    if isinstance(known, _Given):  # a look that gives nothing leaves the cursor as it was
        known.wide_at = given.wide_at
    for page, answered in _pages(ref, query, env, wide):
        until = (now if answered is None else answered) - SETTLE
        for entry in sorted(page, key=lambda entry: (entry.at, entry.insert_id)):
            if entry.at > until or given.has(entry):
                continue
            count = given.add(entry.insert_id, entry.time)
            newest = max(entry.at, float(cursor.get("time", 0.0)))
            cursor = {"job": number, "time": newest, "id": entry.insert_id, "number": count,
                      "given": given}  # fmt: skip
            if query.worker in (None, entry.worker):
                yield Line(entry.worker, entry.time, entry.text, cursor)
    if cursor:
        given.forget(float(cursor["time"]) - LOOK_BACK - OVERLAP - _ROUNDED)


def _pages(
    ref: Ref, query: LogQuery, env: Env, wide: bool
) -> Iterator[tuple[list[_Entry], Optional[float]]]:
    """The entries page by page, each with the service's time of its answer."""
    (project, _), number, workers = refs.where(ref), refs.number(ref), refs.workers(ref)
    who = f"{os.getpid()} {number} {query.worker}"
    base = google.endpoint(env.environ, "logging", "https://logging.googleapis.com")
    session = google.session(env.environ)
    what, url = f"reading the logs of {ref.name}", f"{base}/v2/entries:list"
    for back in (False, True) if wide else (False,):
        body: dict[str, Any] = {
            "resourceNames": [f"projects/{project}"], "filter": _filter(ref, query, back),
            "orderBy": "timestamp asc", "pageSize": _PAGE,
        }  # fmt: skip
        for count in itertools.count(1):
            if not back:
                quota.take(env.home, project, who, env.clock.now())
            elif not quota.spare(env.home, project, env.clock.now()):
                return  # the turns are for new lines
            answer, answered = google.dated(session, "POST", url, what, ref.place, json=body)
            entries = answer.get("entries", ())
            yield [_entry(raw, workers) for raw in entries], answered
            if not answer.get("nextPageToken") or (back and count == _WIDE_PAGES):
                break
            body = {**body, "pageToken": answer["nextPageToken"]}


def _filter(ref: Ref, query: LogQuery, back: bool) -> str:
    """What lies after the cursor and shortly before it; `back`: what lies minutes before that."""
    lines = ['resource.type="ml_job"', f'resource.labels.job_id="{refs.number(ref)}"']
    starts = [] if query.since is None else [query.since]
    if query.cursor:
        overlap = float(query.cursor["time"]) - OVERLAP
        starts.append(overlap - LOOK_BACK if back else overlap)
        if back:
            lines.append(f'timestamp<="{_stamp(overlap)}"')
    # Without a bound the service looks at the last day only.
    lines.append(f'timestamp>="{_stamp(max(starts, default=0.0))}"')
    if query.worker is not None:
        node = query.worker // refs.workers(ref)
        pool = "workerpool0-0" if node == 0 else f"workerpool1-{node - 1}"
        tasks = [pool, "service"] if node == 0 else [pool]
        lines.append(f"({' OR '.join(f'resource.labels.task_name={_quoted(t)}' for t in tasks)})")
    return " AND ".join(lines)


def _quoted(text: str) -> str:
    return f'"{text}"'


def _entry(raw: Mapping[str, Any], workers: int) -> _Entry:
    task = str(raw.get("resource", {}).get("labels", {}).get("task_name", ""))
    payload = raw.get("jsonPayload", {})
    text = str(raw.get("textPayload", payload.get("message")) or "").rstrip("\n")
    time = _seconds(str(raw.get("timestamp", "")))
    received = raw.get("receiveTimestamp")
    at = time if received is None else min(time, _seconds(str(received)))
    worker = node_of(task) * workers
    if told := _RANK.match(text):
        worker, text = int(told[1]), text[told.end() :]
    return _Entry(time, at, str(raw.get("insertId", "")), worker, text)


def node_of(task: str) -> int:
    """`workerpool0-0` is node 0, `workerpool1-2` node 3; what the service itself says about the job
    goes with node 0. What boot says, and does not mark, goes with the first worker of its node."""
    pool, _, index = task.removeprefix("workerpool").partition("-")
    if not (pool.isdigit() and index.isdigit()):
        return 0
    return 0 if pool == "0" else 1 + int(index)


def _seconds(text: str) -> float:
    """RFC 3339 in UTC; the service gives up to nine digits of a second."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    try:
        start = datetime.strptime(whole, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
        return start.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)
    except ValueError as error:
        raise Transient(f"a log entry has the time {text!r}", 5.0) from error


def _stamp(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
