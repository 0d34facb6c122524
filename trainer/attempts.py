"""Which start of a job this is: `attempts/<part>.json` in the artifact root, created once.

A service may start a container again within one attempt of ours. The boot that then finds the
attempt taken is its first restart, `attempts/<part>r1.json`, and so on. One that finds it taken by
another job of the service was created twice, and leaves: two would write the same checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.boot import CONFIG, BootError, Spec
from trainer.store import Store, StoreError

#: Where a service tells its container which of its jobs it is; the same after a restart.
_SERVICE_JOB = "CLOUD_ML_JOB_ID"


@dataclass(frozen=True)
class Start:
    """One start of an attempt. `first`: when the attempt was first started, seconds since the
    epoch; `key`: its record in the store, empty on nodes that keep none; `before`: the record of
    the start before this one, empty where there is none or it cannot be read."""

    restart: int
    first: float
    key: str
    record: Mapping[str, Any]
    before: Mapping[str, Any]

    @property
    def suffix(self) -> str:
        """What names of parts carry behind the attempt."""
        return f"r{self.restart}" if self.restart else ""


def begin(store: Store, spec: Spec, started: float) -> Start:
    """Take the next free record of this attempt. Errors: `StoreError`; `BootError` 64 when the
    attempt is another job's."""
    if spec.node:
        _refuse_another(store, spec)
        return _follow(store, spec, started)
    restart = 0
    while True:
        key = _key(spec, restart)
        at = {"job": spec.raw["job_index"], "attempt": spec.raw["attempt"]}
        record = {"v": 1, **at, "restart": restart, "started": started}
        if ours := os.environ.get(_SERVICE_JOB):
            record["service_job"] = ours
        if store.create_once(key, _encoded(record)):
            first = _first(store, spec, started) if restart else started
            before = _read(store, _key(spec, restart - 1)) if restart else {}
            return Start(restart, first, key, record, before)
        _refuse_another(store, spec)
        restart += 1


def end(store: Store, start: Start, facts: Mapping[str, Any]) -> None:
    """Replace the record with one that says how this start ended. Errors: `StoreError`."""
    if start.key:
        store.put_bytes(start.key, _encoded({**start.record, "ended": time.time(), **facts}))


def _refuse_another(store: Store, spec: Spec) -> None:
    theirs, ours = _read(store, _key(spec, 0)).get("service_job"), os.environ.get(_SERVICE_JOB)
    if theirs and ours and theirs != ours:
        raise BootError(
            CONFIG, f"attempt {spec.raw['attempt']} is job {theirs}, and this is job {ours}: it"
            " was created twice; nothing was done here",
        )  # fmt: skip


def _follow(store: Store, spec: Spec, started: float) -> Start:
    """A node without records of its own: its logs tell which start this is."""
    ranks = range(spec.node * spec.workers, (spec.node + 1) * spec.workers)
    ours = {f"boot-{spec.node}", *(f"worker-{rank}" for rank in ranks)}
    name = re.compile(rf"logs/([^/]+)/{re.escape(spec.part)}(?:r(\d+))?(?:-\d+)?\.log")
    found = [name.fullmatch(key) for key in store.list("logs/")]
    seen = [int(match[2] or 0) for match in found if match and match[1] in ours]
    return Start(max(seen, default=-1) + 1, _first(store, spec, started), "", {}, {})


def _first(store: Store, spec: Spec, started: float) -> float:
    """When the attempt was first started; now, when its record does not say."""
    first = _read(store, _key(spec, 0)).get("started")
    return min(float(first), started) if isinstance(first, (int, float)) else started


def _key(spec: Spec, restart: int) -> str:
    return f"attempts/{spec.part}{f'r{restart}' if restart else ''}.json"


def _read(store: Store, key: str) -> Mapping[str, Any]:
    """A record; empty when it is not there or cannot be read."""
    with contextlib.suppress(StoreError, ValueError):
        record = json.loads(store.get_bytes(key))
        return record if isinstance(record, dict) else {}
    return {}


def _encoded(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()
