"""Cloud Logging as far as it is read here: entries.list, with entries that come late or twice."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from launcher.clock import Clock
from launcher.google import library
from launcher.rehearsal.http import HttpError, Request, Response, answer
from launcher.rehearsal.routes import Method, parse, to_json

PATH = f"/{library('google.cloud.logging_v2._http').Connection.API_VERSION}/entries:list"
_types = library("google.cloud.logging_v2.types")
_LONGEST = 1000
_TOKEN = re.compile(
    r'\s*(?:(\()|(\))|(AND|OR)\b|([\w.\-]+)\s*(>=|<=|!=|=|>|<)\s*("[^"]*"|[^\s()]+))'
)

Test = Callable[["Entry"], bool]


@dataclass(frozen=True)
class Entry:
    """`readable`: when list requests begin to show it; `times`: how often each of them does."""

    time: float
    insert_id: str
    job_id: str
    task: str
    project: str
    text: str
    readable: float
    times: int = 1

    def field(self, name: str) -> str:
        return {
            "resource.type": "ml_job", "resource.labels.job_id": self.job_id,
            "resource.labels.task_name": self.task, "timestamp": stamp(self.time),
            "insertId": self.insert_id, "severity": "INFO", "logName": self.log,
        }[name]  # fmt: skip

    @property
    def log(self) -> str:
        return f"projects/{self.project}/logs/{self.task}"

    def to_json(self) -> dict[str, Any]:
        labels = {"job_id": self.job_id, "task_name": self.task, "project_id": self.project}
        return {
            "logName": self.log, "insertId": self.insert_id, "timestamp": stamp(self.time),
            "receiveTimestamp": stamp(self.readable), "severity": "INFO",
            "resource": {"type": "ml_job", "labels": labels},
            "jsonPayload": {"message": self.text, "levelname": "INFO"},
        }  # fmt: skip


class Logging:
    """The entries of all jobs. With a folder they outlive the process. `lists` holds the times of
    the list requests."""

    def __init__(self, clock: Clock, folder: Optional[Path] = None) -> None:
        self.clock, self.lists = clock, list[float]()
        self._file = folder / "entries.jsonl" if folder else None
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self.methods = [Method("ListLogEntries", _types.ListLogEntriesRequest, self._list)]
        if self._file is not None and self._file.exists():
            lines = self._file.read_text().splitlines()
            self._entries = [Entry(**json.loads(line)) for line in lines]

    def write(
        self, project: str, job_id: str, task: str, text: str,
        time: Optional[float] = None, late: float = 0.0, times: int = 1,
    ) -> None:  # fmt: skip
        """One line, of `time` (now), to be read `late` seconds after it."""
        with self._lock:
            time = self.clock.now() if time is None else time
            insert_id = f"{len(self._entries):012x}"
            entry = Entry(time, insert_id, job_id, task, project, text, time + late, times)
            self._entries.append(entry)
            if self._file is not None:
                with self._file.open("a") as out:
                    out.write(json.dumps(asdict(entry)) + "\n")

    def handle(self, request: Request) -> Optional[Response]:
        if request.path != PATH or request.method != "POST":
            return None
        return answer(to_json(self._list(parse(_types.ListLogEntriesRequest, request.json()))))

    def _list(self, asked: Any) -> Any:
        test = compile_filter(asked.filter)
        projects = {name.removeprefix("projects/") for name in asked.resource_names}
        with self._lock:
            now = self.clock.now()
            self.lists.append(now)
            found = [e for e in self._entries if e.readable <= now and e.project in projects]
        found = [entry for entry in found if test(entry) for _ in range(entry.times)]
        found.sort(key=lambda e: (e.time, e.insert_id), reverse=asked.order_by.endswith("desc"))
        start, size = int(asked.page_token or 0), min(asked.page_size or 50, _LONGEST)
        page: dict[str, Any] = {"entries": [e.to_json() for e in found[start : start + size]]}
        if start + size < len(found):
            page["nextPageToken"] = str(start + size)
        return parse(_types.ListLogEntriesResponse, page)


def compile_filter(text: str) -> Test:
    """The part of the filter language that clients use for jobs: comparisons, AND, OR, parentheses.
    Errors: `HttpError` 400."""
    tokens, end = [], 0
    while text[end:].strip():
        found = _TOKEN.match(text, end)
        if found is None:
            raise HttpError(400, f"Unparseable filter: {text[end:].strip()!r}")
        tokens.append(found.groups())
        end = found.end()
    test = _any(tokens) if tokens else lambda entry: True
    if tokens:
        raise HttpError(400, f"Unparseable filter: {text!r}")
    return test


def stamp(seconds: float) -> str:
    """UTC seconds as RFC 3339 with microseconds."""
    moment = datetime.fromtimestamp(round(seconds, 6), timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _any(tokens: list[Any]) -> Test:
    """Consumes an expression: terms joined by AND, which bind tighter than OR."""
    choices = [_all(tokens)]
    while tokens and tokens[0][2] == "OR":
        tokens.pop(0)
        choices.append(_all(tokens))
    return lambda entry: any(choice(entry) for choice in choices)


def _all(tokens: list[Any]) -> Test:
    terms = [_term(tokens)]
    while tokens and (tokens[0][2] == "AND" or tokens[0][0] or tokens[0][3]):
        if tokens[0][2] == "AND":
            tokens.pop(0)
        terms.append(_term(tokens))
    return lambda entry: all(term(entry) for term in terms)


def _term(tokens: list[Any]) -> Test:
    if not tokens:
        raise HttpError(400, "Unparseable filter: it ends too early")
    opened, _, _, name, operator, value = tokens.pop(0)
    if opened:
        inner = _any(tokens)
        if not tokens or not tokens.pop(0)[1]:
            raise HttpError(400, "Unparseable filter: a parenthesis is open")
        return inner
    if name is None:
        raise HttpError(400, "Unparseable filter")
    return _comparison(name, operator, value.strip('"'))


def _comparison(name: str, operator: str, value: str) -> Test:
    if name == "timestamp":
        value = _padded(value)

    def test(entry: Entry) -> bool:
        try:
            has = entry.field(name)
        except KeyError:
            raise HttpError(400, f"Field not found: {name!r}") from None
        return {
            "=": has == value, "!=": has != value, ">": has > value, "<": has < value,
            ">=": has >= value, "<=": has <= value,
        }[operator]  # fmt: skip

    return test


def _padded(text: str) -> str:
    """A time with six digits of a second, so that texts compare as times do."""
    whole, _, fraction = text.removesuffix("Z").removesuffix("+00:00").partition(".")
    return f"{whole}.{fraction[:6]:0<6}Z"
