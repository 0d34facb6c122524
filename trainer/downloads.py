"""Objects of stores as files of one folder: what is wanted, fetched once, whole and verified.

The folder holds `SCHEME/BUCKET/NAME` for every object, and `.index.jsonl`: which object each file
was when it was written. A file that is still that object is not fetched again.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from trainer.config import ConfigError
from trainer.store import (
    DiskFull,
    NotFound,
    Store,
    StoreError,
    Transient,
    check_key,
    free_bytes,
    make_folder,
    open_store,
    remove_unfinished,
    sha256_file,
)
from trainer.store_remote import Entry, RemoteStore

#: Downloads at once. The network is shared out long before the stores mind.
AT_ONCE = 8
#: Seconds between two lines about files that are still on their way.
EVERY = 30.0
INDEX = ".index.jsonl"
_URI = re.compile(r"(gs|s3)://([A-Za-z0-9][A-Za-z0-9._-]*)(?:/(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """A name in a bucket: an object, or what objects begin with. Empty `key`: the whole bucket."""

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def below(self, name: str) -> Place:
        return Place(self.scheme, self.bucket, f"{self.key}/{name}" if self.key else name)


def parse(uri: str) -> Place:
    """Errors: `ConfigError` for what names no object and no folder of a bucket."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise ConfigError(f"{uri}: write gs://BUCKET/NAME or s3://BUCKET/NAME")
    key = (match.group(3) or "").rstrip("/")
    try:
        check_key(key or "x")
    except StoreError as error:
        raise ConfigError(f"{uri}: {error}") from error
    return Place(match.group(1), match.group(2), key)


@dataclass(frozen=True)
class _Wanted:
    place: Place
    entry: Entry
    field: str
    sha256: str
    group: str


class Shelf:
    """Collects what is wanted (`want`), then `fetch`es it. `opened` opens a bucket by its URI."""

    def __init__(self, folder: Path, opened: Callable[[str], Store] = open_store) -> None:
        self.folder = folder.absolute()
        self._opened = opened
        self._stores: dict[tuple[str, str], RemoteStore] = {}
        self._wanted: dict[Path, _Wanted] = {}
        self._index = _read_index(self.folder / INDEX)
        self._lock = threading.Lock()

    def path(self, place: Place) -> Path:
        """Where the copy of an object or a folder is, or will be."""
        return self.folder / place.scheme / place.bucket / place.key

    def entry(self, place: Place) -> Entry | None:
        """The object of exactly this name. Errors: `StoreError`."""
        return self._store(place).entry(place.key) if place.key else None

    def below(self, place: Place, prefix: str = "") -> dict[str, Entry]:
        """Name inside the folder `place` -> object, of those names that begin with `prefix`.
        Errors: `StoreError`."""
        start = f"{place.key}/" if place.key else ""
        return {e.key[len(start) :]: e for e in self._store(place).entries(start + prefix)}

    def read(self, place: Place) -> bytes:
        """Errors: `StoreError`; `NotFound`."""
        return self._store(place).get_bytes(place.key)

    def want(
        self, place: Place, entry: Entry, field: str, sha256: str = "", group: str = ""
    ) -> None:
        """Have this object fetched. `field` is what an error names. With `sha256`, a file that is
        not that is no error: `fetch` says that `group` is broken."""
        path = self.path(place)
        known = self._wanted.get(path)
        if known is None or not known.sha256:
            self._wanted[path] = _Wanted(place, entry, field, sha256, group)

    def forget(self) -> None:
        """Begin again with nothing wanted."""
        self._wanted.clear()

    def fetch(self, say: Callable[[str], None]) -> set[str]:
        """Bring everything that is wanted and not here. Returns the groups that are broken.
        Errors: `DiskFull` before the first byte; `StoreError` with the name of the field."""
        missing = {p: wanted for p, wanted in self._wanted.items() if not self._whole(p, wanted)}
        size = sum(wanted.entry.size for wanted in missing.values())
        if not missing:
            return set()
        free = free_bytes(self.folder)
        if size > free:
            raise DiskFull(
                f"disk full: the inputs need {size:,} bytes, {free:,} are free in {self.folder};"
                " take a machine with a larger disk, or name less"
            )
        say(f"inputs: {len(missing):,} files, {size / 1e6:,.1f} MB")
        for folder in {path.parent for path in missing}:
            make_folder(folder)
            remove_unfinished(folder)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                return self._all(pool, missing, say)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _all(
        self, pool: ThreadPoolExecutor, missing: dict[Path, _Wanted], say: Callable[[str], None]
    ) -> set[str]:
        # The largest first: the last one to end should not be the longest.
        order = sorted(missing.items(), key=lambda item: -item[1].entry.size)
        futures: dict[Future[bool], _Wanted] = {
            pool.submit(self._one, path, wanted): wanted for path, wanted in order
        }
        while True:
            done, pending = wait(futures, EVERY, return_when=FIRST_EXCEPTION)
            broken = {futures[future].group for future in done if not future.result()}
            if not pending:
                return broken
            here = sum(futures[future].entry.size for future in done)
            rest = max((futures[future] for future in pending), key=lambda one: one.entry.size)
            say(
                f"inputs: {len(done):,} of {len(futures):,} files, {here / 1e6:,.1f} MB; on the way"
                f" {rest.place} ({rest.entry.size / 1e6:,.1f} MB)"
            )

    def _one(self, path: Path, wanted: _Wanted) -> bool:
        """Whether what came is what its manifest says."""
        try:
            self._store(wanted.place).get_file(wanted.place.key, path)
        except NotFound as error:  # a run that goes on there removes its older checkpoints
            raise Transient(
                f"{wanted.field}: {wanted.place} was removed while it was fetched; try again"
            ) from error
        except StoreError as error:
            raise type(error)(f"{wanted.field}: {error}") from error
        found = path.stat()
        if found.st_size != wanted.entry.size and not wanted.entry.packed:
            raise Transient(
                f"{wanted.field}: {wanted.place} was replaced while it was fetched"
                f" ({found.st_size} bytes instead of {wanted.entry.size}); try again"
            )
        if wanted.sha256 and sha256_file(path) != wanted.sha256:
            path.unlink()
            return False
        mark = [wanted.entry.mark, found.st_size, found.st_mtime_ns, wanted.sha256]
        name = path.relative_to(self.folder).as_posix()
        with self._lock, (self.folder / INDEX).open("a") as file:
            file.write(json.dumps({"file": name, "mark": mark}) + "\n")
            self._index[name] = mark
        return True

    def _whole(self, path: Path, wanted: _Wanted) -> bool:
        """Whether the file is what was fetched, and the object is still the same."""
        known = self._index.get(path.relative_to(self.folder).as_posix())
        try:
            found = path.stat()
        except OSError:
            return False
        if known is None or known[:3] != [wanted.entry.mark, found.st_size, found.st_mtime_ns]:
            return False
        return not wanted.sha256 or known[3] == wanted.sha256

    def _store(self, place: Place) -> RemoteStore:
        name = (place.scheme, place.bucket)
        with self._lock:
            if name not in self._stores:
                store = self._opened(f"{place.scheme}://{place.bucket}")
                assert isinstance(store, RemoteStore)
                self._stores[name] = store
            return self._stores[name]


def _read_index(path: Path) -> dict[str, list[object]]:
    """What the last line about each file says; a line that a kill cut short says nothing."""
    found: dict[str, list[object]] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return found
    except OSError as error:
        raise StoreError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
    for line in lines:
        try:
            record = json.loads(line)
            found[str(record["file"])] = list(record["mark"])
        except (ValueError, KeyError, TypeError):
            continue
    return found
