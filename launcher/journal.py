"""The record of a run: create-once records in two places. `fold` makes a `Run` of them.

A record is whole or absent, its number is the fence between drivers, and the copy in
$LAUNCH_HOME heals the one under the artifact root. Nothing here decides; the engine does.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

from launcher.artifacts import Artifacts, Folder, parsed
from launcher.clock import Clock
from launcher.errors import HeldElsewhere, JournalDamaged, UsageError
from launcher.fold import Fold as Fold
from launcher.fold import Record
from launcher.fold import fold as fold
from launcher.home import write
from launcher.run import Run

VERSION = 1
#: Notes of the newest claim, and of the newest recipe, that this home was about to write.
_NOTES = {"driver": "claim.json", "resumed": "opened.json", "changed": "changed.json"}
#: What every record has, whatever its kind.
_ENVELOPE: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "epoch": int,
    "time": (int, float),
    "driver": dict,
}


class Journal:
    """The journal of one run. `root` is the artifact root, `home` the run's folder in
    $LAUNCH_HOME. Call `read` before `append`: a writer must know the newest number."""

    def __init__(self, home: Path, root: Union[Path, Artifacts], clock: Clock) -> None:
        self.artifacts = Folder(root) if isinstance(root, Path) else root
        self.copy = home / "journal"
        self.clock = clock
        self.name = home.name  # how messages call the run
        self.seq = 0
        self.epoch = 0
        self.warnings: list[str] = []
        self._repairs: list[Callable[[], object]] = []

    @property
    def first(self) -> str:
        """Where the records are, for messages."""
        return f"{self.artifacts.uri}/journal"

    def append(self, kind: str, **facts: Any) -> Record:
        """Write the next record, in both places, and return it.

        Errors: `HeldElsewhere` when that number exists already: another driver wrote it.
        `Unwritable` when the disk refuses; what is written so far is whole. `Transient` when a
        store does not answer: whether the record is there is then not known, and the next driver
        reads it if it is.
        """
        record: Record = {
            "v": VERSION,
            "seq": self.seq + 1,
            "epoch": self.epoch,
            "time": self.clock.now(),
            "driver": {"host": socket.gethostname(), "pid": os.getpid()},
            "kind": kind,
            **facts,
        }
        text = json.dumps(record, default=_plain) + "\n"
        name = _name(self.seq + 1)
        if kind in _NOTES:  # should we die before the copy is written, it is known as ours
            write(self.copy.parent / _NOTES[kind], text, sync=False)
        if not self.artifacts.create_once(f"journal/{name}", text):
            there = self.artifacts.read(f"journal/{name}")
            if there != text.encode():  # equal: a file system that repeated our request
                raise self._lost_to(_parse(there, self.seq + 1, self.first))
        self.seq += 1
        write(self.copy / name, text, sync=False)
        plain: Record = json.loads(text)
        return plain

    def fence(self) -> None:
        """Before what cannot be undone: one request. Errors: `HeldElsewhere` when another driver
        has written since we did, `Transient`."""
        name = f"journal/{_name(self.seq + 1)}"
        if self.artifacts.exists(name):
            raise self._lost_to(_parse(self.artifacts.read(name), self.seq + 1, self.first))

    def read(
        self,
        heal: bool = False,
        known: bool = False,
        allowed: Optional[Callable[[list[Record]], None]] = None,
    ) -> list[Record]:
        """All records, in order. With `heal` (drivers only) damaged or missing ones are replaced
        by their whole copy, and a last record damaged in both places is set aside: the engine asks
        the backends again. Each repair leaves a line in `warnings`. A record that does not fold is
        damaged, however whole its JSON. `known`: of a store, only what the last refresh brought.
        `allowed` is shown the records before anything is healed, and may raise.

        Errors: `JournalDamaged` for a record that has no whole copy, with both paths.
        """
        self.warnings, self._repairs = [], []
        there = self._numbers(known)
        listed = sorted(there | _numbers(_listing(self.copy)))
        reading = _Reading()
        records = reading.records
        for number in listed:
            record = None
            if number == len(records) + 1:
                record = self._one(number, heal, reading, known)
            if record is None and number == listed[-1] and number == len(records) + 1 > 1:
                self._set_aside(number, heal)
                break
            if record is not None and number not in there and self.artifacts.remote and not known:
                self._restore(number, heal)
            if record is None:
                missing = _name(len(records) + 1)
                raise JournalDamaged(
                    f"record {missing} cannot be read in {self.first} nor in {self.copy}",
                    "put a whole copy of it in one of the two folders; "
                    f"`launch teardown {self.name}` still finds what this run holds",
                )
        if allowed is not None:
            allowed(records)
        for repair in self._repairs:
            repair()
        self.seq = len(records)
        self.epoch = records[-1]["epoch"] if records else 0
        return records

    def beginning(self) -> Optional[Run]:
        """The run as its first record tells of it, whatever became of the others; None: not even
        that one can be read."""
        reading = _Reading()
        record = self._one(1, False, reading, known=True)
        return fold([record]) if record is not None and record["kind"] == "created" else None

    def _numbers(self, known: bool) -> set[int]:
        """The numbers of the records under the artifact root."""
        if not self.artifacts.remote:
            return _numbers(_listing(self.artifacts.folder / "journal"))
        if known:
            return _numbers(_listing(self.artifacts.folder / "journal"))
        return _numbers(name.rpartition("/")[2] for name in self.artifacts.names("journal/"))

    def _lost_to(self, winner: Optional[Record]) -> HeldElsewhere:
        who = {**winner["driver"], "since": winner["time"]} if winner else None
        return held_elsewhere(who, self.name)

    def _one(
        self, number: int, heal: bool, reading: _Reading, known: bool = False
    ) -> Optional[Record]:
        """Read the record `number` from whichever place has it whole; None: from neither."""
        if self.artifacts.remote:
            return self._one_of_store(number, heal, reading, known)
        name = _name(number)
        first, copy = self.artifacts.folder / "journal" / name, self.copy / name
        for source, other in ((first, copy), (copy, first)):
            record = _parse(_bytes(source), number, source)
            if record is None or not reading.take(record):
                continue
            if source is copy:
                state = "damaged" if first.exists() else "missing"
                self.warnings.append(f"{first} is {state}: read from {copy}")
            mine = source is copy or self._copied(record)
            if heal and mine and _parse(_bytes(other), number, other) != record:
                self._repairs.append(partial(write, other, source.read_text()))
            return record
        return None

    def _one_of_store(
        self, number: int, heal: bool, reading: _Reading, known: bool
    ) -> Optional[Record]:
        """The same, and no request for what is here: records never change, and a copy is written
        after its record. What others wrote is kept beside the copies of what this home wrote."""
        name = _name(number)
        copy, cached = self.copy / name, self.artifacts.folder / "journal" / name
        for source in (copy, cached):
            record = _parse(_bytes(source), number, source)
            if record is not None and reading.take(record):
                if heal and source is cached and ours(self.copy.parent, record):
                    self._repairs.append(partial(write, copy, cached.read_text(), sync=False))
                return record
        data = None if known else self.artifacts.read(f"journal/{name}")
        record = _parse(data, number, f"{self.first}/{name}")
        if record is None or data is None or not reading.take(record):
            return None
        if heal:
            kept = copy if ours(self.copy.parent, record) else cached
            self._repairs.append(partial(write, kept, data.decode(), sync=False))
        return record

    def _copied(self, record: Record) -> bool:
        """Whether a record of a shared disk may be copied here, where the copy says that this home
        wrote it: of claims only the newest is ever asked about, an intent is sent as it is, and a
        change counts only where it was asked for."""
        place = self.copy.parent
        if record["kind"] == "driver":
            newest = parsed(_bytes(place / _NOTES["driver"])).get("seq")
            return (isinstance(newest, int) and newest > record["seq"]) or ours(place, record)
        return record["kind"] not in ("intent", "changed") or ours(place, record)

    def _restore(self, number: int, heal: bool) -> None:
        """A record that only its copy still holds: somebody has removed it from the store."""
        name = _name(number)
        self.warnings.append(f"{self.first}/{name} is missing: read from {self.copy / name}")
        if heal:
            text = (self.copy / name).read_text()
            self._repairs.append(partial(self.artifacts.create_once, f"journal/{name}", text))

    def _set_aside(self, number: int, heal: bool) -> None:
        name = _name(number)
        self.warnings.append(
            f"the last record, {name}, is damaged in {self.first} and in {self.copy}: set aside"
        )
        if heal:
            aside = f"{number:08d}.{secrets.token_hex(3)}.damaged"
            self._repairs.append(partial(self._move, name, aside))

    def _move(self, name: str, aside: str) -> None:
        self.artifacts.move(f"journal/{name}", f"journal/{aside}")
        for file in (self.copy / name, self.artifacts.folder / "journal" / name):
            with suppress(FileNotFoundError):
                file.replace(file.with_name(aside))


def ours(place: Path, record: Record) -> bool:
    """Whether a record came from this $LAUNCH_HOME, where the run's folder is `place`."""
    if (place / "journal" / _name(record["seq"])).exists():
        return True
    note = _NOTES.get(record["kind"])
    return note is not None and _parse(_bytes(place / note), record["seq"], note) == record


def newest_claim(records: Iterable[Record]) -> Optional[Record]:
    """The record that says who drives, or is about to: who opens a run again claims it too."""
    return next((r for r in reversed([*records]) if r["kind"] in _NOTES), None)


def refuse_swapped(run: Run, facts: Mapping[str, Any]) -> None:
    """Raise `JournalDamaged` for a journal that is not of the run that this home knows there:
    who may write to a store may also put another run's records in their place."""
    if (run.id, run.name, run.root) != (facts["id"], facts["name"], facts["root"]):
        raise JournalDamaged(
            f"the journal at {facts['root']} is not the one of {facts['name']}: somebody has "
            "replaced its first record",
            f"`launch teardown {facts['name']}` still finds what the run holds",
        )


class _Reading:
    """The records read so far, and the run that they make."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._fold = Fold(())

    def take(self, record: Record) -> bool:
        """Add the next record; False: it makes no sense after those before it."""
        if (self.records or [record])[0]["kind"] == "created":  # else `fold` says what is missing
            try:
                self._fold.apply(record)
            except JournalDamaged:
                self._fold = Fold(self.records)
                return False
        self.records.append(record)
        return True


def held_elsewhere(who: Optional[Mapping[str, Any]], name: str) -> HeldElsewhere:
    """The error for a run that another driver holds: {"host", "pid", "since"} as far as known."""
    hint = f"`launch attach {name}` follows it; --take-over drives it from here"
    if not who:
        return HeldElsewhere(f"another driver holds {name}", hint)
    since = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(who["since"]))
    return HeldElsewhere(
        f"{name} is driven by {who['host']} (process {who['pid']}) since {since}", hint
    )


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (status lists many of these)
    except FileNotFoundError:
        return []


def _numbers(names: Iterable[str]) -> set[int]:
    return {int(n[:8]) for n in names if len(n) == 13 and n.endswith(".json") and n[:8].isdigit()}


def _bytes(file: Path) -> Optional[bytes]:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _parse(data: Optional[bytes], number: int, where: Union[Path, str]) -> Optional[Record]:
    """The record in `data`, or None when it is absent, cut, incomplete, or not that record."""
    try:
        record = json.loads(data or b"")
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("seq") != number:
        return None
    if isinstance(record.get("v"), int) and record["v"] > VERSION:
        raise UsageError(f"{where}: written by a newer version of launch", "upgrade launch-llm")
    whole = all(isinstance(record.get(key), kind) for key, kind in _ENVELOPE.items())
    return record if whole and {"host", "pid"} <= record["driver"].keys() else None


def _plain(value: Any) -> Any:
    """Refs and intents as JSON objects (`json.dumps` asks here for what it does not know)."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if hasattr(value, "items"):
        return dict(value.items())
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot stand in a journal")
