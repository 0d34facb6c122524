"""What goes wrong, and when: schedules that a server asks before it answers each request.

A schedule is a value of the test: the same one, asked the same, answers the same, so that a
failure can be replayed from its seed.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Optional, Protocol

Kind = Literal[
    "status",  # answer with `status`, nothing applied
    "cut_before",  # close the connection, nothing applied
    "cut_after",  # apply the request, close the connection instead of answering
    "cut_upload",  # close the connection after `at_bytes` of the request's body
    "cut_download",  # close the connection after `at_bytes` of the answer's body
    "corrupt",  # apply the request; what it carries or returns is damaged (the service says how)
    "page",  # answer 200 with a page of HTML, as a network's login page does; nothing applied
    "slow",  # `seconds` pass on the server's clock, then all goes well
]


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong with one request."""

    kind: Kind
    status: int = 503
    at_bytes: int = 0
    seconds: float = 0.0


class Schedule(Protocol):
    def next(self, request: str) -> Optional[Fault]:
        """The fault for this request, if any. `request` is "METHOD /decoded/path?query"; called
        once a request, from several threads."""
        ...


class Script:
    """Faults in order: each entry is (regular expression, fault), and is used once, by the first
    request that it matches while no entry before it does. `left` are those not used yet."""

    def __init__(self, entries: Iterable[tuple[str, Fault]] = ()) -> None:
        self.left = list(entries)
        self._lock = threading.Lock()

    def add(self, pattern: str, fault: Fault, times: int = 1) -> None:
        with self._lock:
            self.left += [(pattern, fault)] * times

    def clear(self) -> None:
        with self._lock:
            self.left.clear()

    def next(self, request: str) -> Optional[Fault]:
        with self._lock:
            for index, (pattern, fault) in enumerate(self.left):
                if re.search(pattern, request):
                    del self.left[index]
                    return fault
        return None


class Seeded:
    """Faults by chance, the same for the same seed.

    `rates` gives each fault its share of the requests. What a request meets depends on the seed, on
    its path and on how often that path was asked for, not on what other threads do meanwhile. At
    most `in_a_row` requests to one path fail one after the other, so that bounded retries end."""

    def __init__(self, seed: int, rates: Mapping[Fault, float], in_a_row: int = 2) -> None:
        if sum(rates.values()) > 1 or any(rate < 0 for rate in rates.values()):
            raise ValueError(f"rates must be shares that add up to at most 1, got {rates}")
        self.seed, self.rates, self.in_a_row = seed, dict(rates), in_a_row
        self.met: list[tuple[str, Fault]] = []
        self._asked: dict[str, int] = {}
        self._row: dict[str, int] = {}
        self._lock = threading.Lock()

    def next(self, request: str) -> Optional[Fault]:
        path = request.partition("?")[0]
        with self._lock:
            count = self._asked[path] = self._asked.get(path, 0) + 1
            fault = self._draw(random.Random(f"{self.seed} {count} {path}").random())
            if fault is None or self._row.get(path, 0) >= self.in_a_row:
                self._row[path] = 0
                return None
            self._row[path] = self._row.get(path, 0) + 1
            self.met.append((request, fault))
            return fault

    def _draw(self, chance: float) -> Optional[Fault]:
        for fault, rate in self.rates.items():
            if chance < rate:
                return fault
            chance -= rate
        return None


class Both:
    """The first fault that one of several schedules has; all of them are asked."""

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self.schedules = list(schedules)

    def next(self, request: str) -> Optional[Fault]:
        found = [schedule.next(request) for schedule in self.schedules]
        return next((fault for fault in found if fault is not None), None)
