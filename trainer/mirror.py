"""Copies a run's folder to a store while the run goes on, and never makes a step wait.

    mirror = Mirror(folder, open_store("gs://bucket/runs/r1"), warn=warn).start()
    mirror.poke()                      # optional: something worth a look was written
    missing = mirror.close(bound=600)  # what could not be sent, one line each

The folder is what is looked at: nothing has to be told, so the mirror may run in the process that
writes or in another one. What is behind is the difference between the folder and what was sent,
so there is no queue to overflow. Bringing a run back is restore.py's part.

Metrics and logs, which only grow, become numbered parts (mirror_parts.py). TensorBoard's files,
which readers want whole, are written again at most every half minute. Of a checkpoint the manifest
comes last, of a shard of stored targets `meta.json`, of a finished stage `run_meta.json`: who sees
them finds all that they stand for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.manifest import MANIFEST
from trainer.mirror_parts import Parts
from trainer.store import Denied, NotFound, Store, StoreError, Transient, sha256_file

#: Files above this size travel apart from the small ones, and only once they rest.
SMALL_BYTES = 1 << 20
#: What the launcher writes to the store itself, at the root of a run.
NOT_OURS = ("control", "journal")
_CHECKPOINT = re.compile(r"(?:(.+)/)?checkpoints/step-(\d+)")
_SHARD = re.compile(r"(?:.+/)?targets/shard-\d+/meta\.json")
_POINTER = re.compile(r"(?:(.+)/)?checkpoints/(last|best)\.json")
_LONGEST_WAIT = 60.0
_LANES = ("small", "large")

Stamp = tuple[int, int, int]  # bytes, mtime in ns, inode


@dataclass(frozen=True)
class _Task:
    """One thing that is not in the store yet. `act` changes that, if its time has come."""

    name: str
    lane: str
    act: Callable[[], object]


class _Lane:
    """What goes through one thread: a large checkpoint must not hold up the metrics."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.wake = threading.Event()
        self.failures = 0
        self.thread: threading.Thread | None = None


class Mirror:
    """Keeps `store`, below `prefix`, like `folder`. One mirror for one folder.

    `tensorboard`: the store that event files go to instead. `period`: seconds between two looks, so
    about how far behind the small files are; at least 1, since object stores take one write to an
    object a second. `warn` hears of an outage once, and of everything else that cannot be sent.
    `now` and `sleep` are the clock."""

    def __init__(
        self,
        folder: str | Path,
        store: Store,
        *,
        prefix: str = "",
        tensorboard: Store | None = None,
        period: float = 3.0,
        tensorboard_period: float = 30.0,
        warn: Callable[[str], None] | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if period < 1:
            raise ValueError(f"period must be at least 1 second, got {period}")
        self.folder, self.store, self.prefix = Path(folder), store, prefix
        self.period, self.now, self.sleep = period, now, sleep
        self._tensorboard, self._tensorboard_period = tensorboard, tensorboard_period
        self._tell = warn or _to_stderr
        self._lanes = {name: _Lane(name) for name in _LANES}
        self._closing = False
        self._deadline = 0.0
        self._listing = threading.Lock()
        self._found: set[str] | None = None  # the keys that were there at the start
        self._parts = Parts(self._put)
        self._sent: dict[str, Stamp] = {}  # whole files
        self._seen: dict[str, Stamp] = {}  # large files, at the last look
        self._sent_at: dict[str, float] = {}
        self._complete: dict[str, bytes] = {}  # checkpoint -> its manifest, in the store
        self._begun: set[str] = set()  # checkpoints of which this mirror sent something
        self._spared: set[str] = set()  # the best checkpoint of an earlier machine
        self._told: set[str] = set()
        self._outage = False

    def start(self) -> Mirror:
        """Look at the folder from now on, in two threads."""
        for lane in self._lanes.values():
            lane.thread = threading.Thread(
                target=self._run, args=(lane,), name=f"mirror-{lane.name}", daemon=True
            )
            lane.thread.start()
        return self

    def poke(self) -> None:
        """Look now, not at the end of the period. Returns at once."""
        for lane in self._lanes.values():
            lane.wake.set()

    def step(self, lane: str) -> float:
        """One look by one lane ("small" or "large"); the seconds until the next one is due.
        For who has no threads; never raises for what the store or the folder do."""
        state = self._lanes[lane]
        try:
            self._know_store()
            for task in self._behind(self._closing):
                if task.lane == lane:
                    self._attempt(task)
        except Exception as error:  # whatever it is, it must not end a training
            state.failures += 1
            if not self._outage:
                self._outage = True
                why = str(error) if isinstance(error, StoreError) else repr(error)
                self._tell(
                    f"the copy of {self.folder} is behind: {why}; training goes on, the copy "
                    "catches up by itself"
                )
            return float(min(self.period * 2 ** min(state.failures, 10), _LONGEST_WAIT))
        state.failures = 0
        self._outage = any(other.failures for other in self._lanes.values())
        return self.period

    def behind(self) -> list[str]:
        """What is in the folder and not, or not like this, in the store; empty at the end."""
        return [task.name for task in self._behind(everything=True)]

    def close(self, bound: float = 600.0) -> list[str]:
        """Send what is left, for at most `bound` seconds; what is still missing, one line each.
        A second call looks again."""
        self._closing, self._deadline = True, self.now() + bound
        self.poke()
        threads = [lane.thread for lane in self._lanes.values() if lane.thread is not None]
        for thread in threads:
            thread.join(max(self._deadline - self.now(), 0.0))
        if not any(thread.is_alive() for thread in threads):
            self._drain()
        missing = self.behind()
        return [f"{name}: not copied to {self.store.uri}/{self.prefix}" for name in missing]

    def _run(self, lane: _Lane) -> None:
        while not self._closing:
            delay = self.step(lane.name)
            if not self._closing:
                lane.wake.wait(delay)
                lane.wake.clear()
        # The other lane's work may be what this one waits for: each goes on until all is there.
        while self._left() > 0 and self.behind():
            delay = self.step(lane.name)
            lane.wake.clear()
            if self.behind():
                lane.wake.wait(max(min(delay, self._left(), 1.0), 0.0))

    def _drain(self) -> None:
        while self._left() > 0 and self.behind():
            delay = min(self.step(lane) for lane in _LANES)
            if self.behind():
                self.sleep(max(min(delay, self._left()), 0.0))

    def _left(self) -> float:
        return self._deadline - self.now()

    def _know_store(self) -> None:
        with self._listing:
            if self._found is None:
                self._found = set(self.store.list(self.prefix))

    def _attempt(self, task: _Task) -> None:
        """Do a task; an outage ends the look, anything else concerns this file only."""
        try:
            task.act()
        except (Transient, Denied):
            raise
        except (StoreError, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, (NotFound, FileNotFoundError)) and self._vanished(task.name):
                return  # removed while it was being sent
            if task.name not in self._told:
                self._told.add(task.name)
                self._tell(f"{task.name}: not copied yet: {error}")

    def _vanished(self, name: str) -> bool:
        return not (self.folder / name).exists()

    def _behind(self, everything: bool) -> list[_Task]:
        """What is to be done, in order; looks at the folder only. Not `everything`: without what
        may wait, such as a line that has no end yet."""
        checkpoints: list[tuple[int, str]] = []
        files: list[_Task] = []
        pointers: list[_Task] = []
        metas: list[_Task] = []
        for relative, path in self._walk(self.folder, ""):
            if match := _CHECKPOINT.fullmatch(relative):
                checkpoints.append((int(match.group(2)), relative))
            elif _POINTER.fullmatch(relative) or _SHARD.fullmatch(relative):
                pointers += self._whole(relative, path, everything)
            elif path.name == "run_meta.json":
                metas += self._whole(relative, path, everything)
            else:
                files += self._file(relative, path, everything)
        newest = [self._checkpoint(name) for _, name in sorted(checkpoints, reverse=True)]
        prune = self._to_prune({name for _, name in checkpoints})
        return [task for found in newest for task in found] + files + pointers + prune + metas

    def _walk(self, folder: Path, below: str) -> Iterator[tuple[str, Path]]:
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(folder.iterdir()):
                relative = f"{below}{path.name}"
                if path.name.startswith(".") or relative in NOT_OURS:
                    continue
                if path.is_file() or _CHECKPOINT.fullmatch(relative):
                    yield relative, path
                elif path.is_dir():
                    yield from self._walk(path, f"{relative}/")

    def _file(self, relative: str, path: Path, everything: bool) -> list[_Task]:
        folders = relative.split("/")[:-1]
        appended = {"metrics": ".jsonl", "logs": ".log"}
        if not any(path.suffix == appended.get(name) for name in folders):
            return self._whole(relative, path, everything)
        if not self._parts.behind(relative, path, everything):
            return []
        return [_Task(relative, "small", lambda: self._parts.send(relative, path, self._closing))]

    def _put(self, key: str, data: bytes) -> None:
        """Write a value unless an earlier mirror of this folder did."""
        key = self.prefix + key
        if self._found and key in self._found:
            self._found.discard(key)
            if self.store.checksum(key) == hashlib.sha256(data).hexdigest():
                return
        self.store.put_bytes(key, data)

    def _whole(self, relative: str, path: Path, everything: bool) -> list[_Task]:
        stamp = _stamp(path)
        if stamp is _ABSENT or self._sent.get(relative) == stamp:
            return []
        if "tensorboard" in relative.split("/")[:-1]:
            since = self.now() - self._sent_at.get(relative, float("-inf"))
            if since < self._tensorboard_period and not everything:
                return []
            return [_Task(relative, "large", lambda: self._send_events(relative, path))]
        marks = _POINTER.fullmatch(relative) or _SHARD.fullmatch(relative)
        ordered = marks or path.name == "run_meta.json"
        large = bool(ordered) or stamp[0] > SMALL_BYTES
        act = self._send_in_order if ordered else self._send_whole
        return [_Task(relative, "large" if large else "small", lambda: act(relative, path))]

    def _send_whole(self, relative: str, path: Path) -> None:
        stamp = _stamp(path)
        if stamp[0] <= SMALL_BYTES:
            self._put(relative, path.read_bytes())
        elif self._closing or self._seen.get(relative) == stamp:
            key = self.prefix + relative
            if not self._is_there(key, path):
                self.store.put_file(key, path)
        else:
            self._seen[relative] = stamp  # it may still be being written
            return
        self._sent[relative] = stamp

    def _is_there(self, key: str, path: Path) -> bool:
        if not self._found or key not in self._found:
            return False
        self._found.discard(key)
        return self.store.checksum(key) == sha256_file(path)

    def _send_events(self, relative: str, path: Path) -> None:
        stamp = _stamp(path)
        data = path.read_bytes()
        if self._tensorboard is None:
            self._put(relative, data)
        else:
            parts = [part for part in relative.split("/") if part != "tensorboard"]
            self._tensorboard.put_bytes("/".join(parts), data)
        self._sent[relative], self._sent_at[relative] = stamp, self.now()

    def _send_in_order(self, relative: str, path: Path) -> None:
        data, stamp = path.read_bytes(), _stamp(path)
        if not self._waits(relative, data):
            self._put(relative, data)
            self._sent[relative] = stamp

    def _waits(self, relative: str, data: bytes) -> bool:
        """Pointers wait for their checkpoint, a shard and a finished stage for all that is theirs.
        What makes no sense waits for nothing."""
        folder, _, name = relative.rpartition("/")
        if _SHARD.fullmatch(relative):
            return bool(self._open(folder, relative))
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            facts = json.loads(data)
            if name != "run_meta.json":
                return not self._stands(f"{folder}/{facts['path']}")
            return bool(facts.get("completed") and self._open(folder, relative))
        return False

    def _stands(self, checkpoint: str) -> bool:
        """Whether a checkpoint is complete in the store: this mirror's, or an earlier machine's."""
        if (self.folder / checkpoint).exists():
            return checkpoint in self._complete
        return f"{self.prefix}{checkpoint}/{MANIFEST}" in (self._found or ())

    def _open(self, folder: str, but: str) -> list[str]:
        below = f"{folder}/" if folder else ""
        names = [name for name in self.behind() if name.startswith(below) and name != but]
        return [name for name in names if name.rpartition("/")[2] != "run_meta.json"]

    def _checkpoint(self, relative: str) -> list[_Task]:
        manifest = _manifest(self.folder / relative)
        if manifest is None or self._complete.get(relative) == manifest:
            return []
        return [_Task(relative, "large", lambda: self._send_checkpoint(relative))]

    def _send_checkpoint(self, relative: str) -> None:
        folder, base = self.folder / relative, f"{self.prefix}{relative}/"
        manifest = _manifest(folder)
        if manifest is None:
            return
        found = self._found or set()
        if base + MANIFEST in found and self.store.get_bytes(base + MANIFEST) == manifest:
            self._complete[relative] = manifest
            return
        if base + MANIFEST in found or relative in self._complete:
            self._complete.pop(relative, None)  # another checkpoint of that step: it ends first
            self.store.delete(base + MANIFEST)
        self._begun.add(relative)
        for name, facts in sorted(json.loads(manifest)["files"].items()):
            self._send_verified(base + name, folder / name, facts["sha256"])
        self.store.put_bytes(base + MANIFEST, manifest)
        self._complete[relative] = manifest

    def _send_verified(self, key: str, path: Path, digest: str) -> None:
        # What an attempt before an outage sent need not be sent again.
        with contextlib.suppress(NotFound):
            if self.store.checksum(key) == digest:
                return
        self.store.put_file(key, path)
        if (there := self.store.checksum(key)) != digest:
            raise StoreError(
                f"{path}: its manifest says sha256 {digest}, what was sent has {there}; the copy "
                "of this checkpoint stays incomplete"
            )

    def _to_prune(self, local: set[str]) -> list[_Task]:
        """Checkpoints in the store that the folder has no more. Only what a newer one, complete in
        the store, has made superfluous: a folder that was emptied empties no store."""
        there = {_checkpoint_of(key[len(self.prefix) :]) for key in list(self._found or ())}
        tasks = []
        for relative in sorted((there | self._begun) - local - {None}, key=str):
            stage, step = _place(str(relative))
            newer = [name for name in local if _place(name)[0] == stage and _place(name)[1] > step]
            held = [name for name in newer if name in self._complete]
            # One that an earlier machine left may be all there is: two newer ones must stand.
            enough = len(held) >= (1 if relative in self._begun else 2)
            if enough and relative not in self._spared and self._best(stage) != step:
                tasks.append(_Task(str(relative), "large", self._pruner(str(relative))))
        return tasks

    def _pruner(self, relative: str) -> Callable[[], None]:
        def prune() -> None:
            base = f"{self.prefix}{relative}/"
            stage, step = _place(relative)
            if self._best(stage) is None and self._best_there(stage) == step:
                self._spared.add(relative)
                return
            self.store.delete(base + MANIFEST)  # from here on it is no checkpoint
            for key in self.store.list(base):
                self.store.delete(key)
            self._complete.pop(relative, None)
            self._begun.discard(relative)
            if self._found:
                self._found = {key for key in self._found if not key.startswith(base)}

        return prune

    def _best(self, stage: str) -> int | None:
        with contextlib.suppress(OSError):
            return _step_in((self.folder / f"{stage}checkpoints/best.json").read_bytes())
        return None

    def _best_there(self, stage: str) -> int | None:
        with contextlib.suppress(NotFound):
            return _step_in(self.store.get_bytes(f"{self.prefix}{stage}checkpoints/best.json"))
        return None


def _step_in(pointer: bytes) -> int | None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return int(json.loads(pointer)["step"])
    return None


_ABSENT: Stamp = (0, 0, 0)


def _stamp(path: Path) -> Stamp:
    try:
        facts = path.stat()
    except OSError:
        return _ABSENT
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _manifest(folder: Path) -> bytes | None:
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError:
        return None


def _checkpoint_of(key: str) -> str | None:
    match = re.match(rf"({_CHECKPOINT.pattern})/", key)
    return match.group(1) if match else None


def _place(relative: str) -> tuple[str, int]:
    """(stage folder with its slash or nothing, step) of a checkpoint."""
    match = _CHECKPOINT.fullmatch(relative)
    assert match is not None
    return f"{match.group(1)}/" if match.group(1) else "", int(match.group(2))


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"warning: {line}\n")
