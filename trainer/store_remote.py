"""What the stores of object services share: names, create-once, verification, damage on the way.

A service's module says how to send, receive, list and remove one object and what its errors mean;
it imports its client when it first needs it. Every object carries its sha256 as metadata, so that
`checksum` of what we wrote costs no download.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import io
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from trainer.store import (
    BUCKET_NAME,
    BUCKET_SPELLING,
    NotFound,
    StoreError,
    Transient,
    check_key,
    replacing,
)

#: Names of an object's metadata. They are part of what we leave behind.
SHA256 = "launch-sha256"
WRITER = "launch-writer"
#: How often a value that was damaged on the way is sent or fetched again.
_TRIES = 3
_PIECE = 1 << 20
_Keys = list[str]  # inside a class that has a method `list`
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a service that does not answer is asked again, in seconds: the first wait, the
    longest, and all of it together. The library's own retries follow it."""

    first: float = 1.0
    longest: float = 32.0
    total: float = 120.0

    def told(self) -> str:
        return f", asked for {self.total:g} s" if self.total else ""


#: For callers that own the waiting.
ONCE = Patience(total=0.0)


@dataclass(frozen=True)
class Content:
    """What is to be sent: `open` gives its bytes from the start, as often as asked."""

    open: Callable[[], BinaryIO]
    size: int
    sha256: str
    source: str = ""  # the local file, if it is one


@dataclass(frozen=True)
class Entry:
    """An object as a listing shows it: its size in bytes as it is stored, and a `mark` that changes
    when the object is replaced. `packed`: it is unpacked when it is read, and has another size."""

    key: str
    size: int
    mark: str
    packed: bool = False


_Entries = list[Entry]  # as `_Keys`


class Exists(Exception):
    """There is an object already: `create_once` was refused."""


class Damaged(Exception):
    """What arrived is not what was sent; said by either side."""


class RemoteStore(abc.ABC):
    """A store under `scheme://bucket/prefix`; nothing is asked before the first method."""

    scheme: str

    def __init__(self, uri: str, patience: Patience | None = None) -> None:
        rest = uri.partition("://")[2].strip("/")
        self.bucket, _, self.prefix = rest.partition("/")
        if not self.bucket or uri.partition("://")[2].startswith("/"):
            wanted = f"{self.scheme}://BUCKET/FOLDER"
            raise StoreError(f"{uri}: names no bucket; write {wanted}")
        if not re.fullmatch(BUCKET_NAME, self.bucket):
            raise StoreError(f"{uri}: '{self.bucket}' cannot name a bucket: {BUCKET_SPELLING}")
        if self.prefix:
            check_key(self.prefix)
            self.prefix += "/"
        self.uri = f"{self.scheme}://{rest}"
        self.patience = patience or Patience()
        self._client_lock = threading.Lock()
        self._made: Any = None
        # Creations whose outcome is not known: a second call with the same record may find its own.
        self._unsure: dict[tuple[str, str], str] = {}

    def put_bytes(self, key: str, data: bytes) -> None:
        self._put(key, _of_bytes(data))

    def put_file(self, key: str, source: Path) -> None:
        """Errors: `StoreError` too for a file that changes meanwhile; what was sent is then not
        to be trusted."""
        with _reading(source):
            before = source.stat()
            size, digest = _measure(source)
            content = Content(lambda: source.open("rb"), size, digest, str(source))
            self._put(key, content)
            after = source.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise changed(content)

    def get_bytes(self, key: str) -> bytes:
        into = io.BytesIO()
        self._get(key, into)
        return into.getvalue()

    def get_file(self, key: str, target: Path) -> None:
        size, _ = self._stat(key)
        with replacing(target, size) as temporary, temporary.open("w+b") as file:
            self._get(key, file)
            file.flush()

    def create_once(self, key: str, data: bytes) -> bool:
        content = _of_bytes(data)
        asked = (key, content.sha256)
        writer = self._unsure.pop(asked, None) or secrets.token_hex(16)
        try:
            self._put(key, content, writer)
            return True
        except Exists:
            pass
        except Transient:
            self._unsure[asked] = writer
            raise
        try:
            # The reply to our own first request may have been lost, and the library repeated it.
            return self._stat(key)[1].get(WRITER) == writer
        except NotFound:
            return False
        except Transient:
            self._unsure[asked] = writer
            raise

    def list(self, prefix: str = "") -> _Keys:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str = "") -> _Entries:
        """What `list` finds, with sizes and marks, sorted by key."""
        if folder := prefix.rpartition("/")[0]:
            check_key(folder)
        with self._told(f"cannot list {self.uri}", "", writing=False):
            found = [self._keyed(entry) for entry in self._listed(self.prefix + prefix)]
        return sorted((e for e in found if _is_key(e.key)), key=lambda entry: entry.key)

    def entry(self, key: str) -> Entry | None:
        """The object under this key; None where there is none."""
        name = self._name(key)
        with self._told(f"cannot read {key} in {self.uri}", name, writing=False):
            # Listings are sorted: of all names that begin so, the name itself is the first.
            first = next(iter(self._listed(name)), None)
        return self._keyed(first) if first is not None and first.key == name else None

    def versions(self, prefix: str = "") -> dict[str, str]:
        return {entry.key: entry.mark for entry in self.entries(prefix)}

    def exists(self, key: str) -> bool:
        try:
            self._stat(key)
        except NotFound:
            return False
        return True

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFound):
            name = self._name(key)
            with self._told(f"cannot delete {key} in {self.uri}", name, writing=True):
                self._remove(name)

    def checksum(self, key: str) -> str:
        known = self._stat(key)[1].get(SHA256)
        if known:
            return known
        hashing: Any = _Hashing()
        self._get(key, hashing)
        return str(hashing.digest.hexdigest())

    def local_path(self, key: str) -> Path | None:
        self._name(key)
        return None

    @property
    def client(self) -> Any:
        """The service's client, made at the first need."""
        with self._client_lock:
            if self._made is None:
                self._made = self._connect()
            return self._made

    @abc.abstractmethod
    def _connect(self) -> Any:
        """Errors: `StoreError`, `Denied`."""

    @abc.abstractmethod
    def _send(self, name: str, content: Content, writer: str | None) -> None:
        """Write an object whole, with its sha256 as metadata; with a `writer`, only if there is
        none. Errors: `Exists`, `Damaged`, the client's."""

    @abc.abstractmethod
    def _receive(self, name: str, into: BinaryIO) -> None:
        """Read an object from its start, verified. Errors: `Damaged`, the client's."""

    @abc.abstractmethod
    def _look(self, name: str) -> tuple[int, Mapping[str, str]]:
        """Size in bytes and metadata. Errors: the client's."""

    @abc.abstractmethod
    def _listed(self, prefix: str) -> Iterable[Entry]:
        """The objects whose names begin so, by name; `key` is the whole name."""

    @abc.abstractmethod
    def _remove(self, name: str) -> None: ...

    @abc.abstractmethod
    def _meaning(
        self, error: Exception, failed: str, name: str, writing: bool
    ) -> StoreError | None:
        """One line for an error of the client: `failed` says what could not be done. None: it is
        none of the client's errors."""

    def _put(self, key: str, content: Content, writer: str | None = None) -> None:
        name = self._name(key)

        def send() -> None:
            self._send(name, content, writer)

        with self._told(f"cannot write {self.uri}/{key}", name, writing=True):
            _undamaged(send, f"cannot write {self.uri}/{key}")

    def _get(self, key: str, into: BinaryIO) -> None:
        name = self._name(key)

        def receive() -> None:
            into.seek(0)
            into.truncate()
            self._receive(name, into)

        failed = f"cannot read {key} in {self.uri}"
        with self._told(failed, name, writing=False):
            _undamaged(receive, failed)

    def _stat(self, key: str) -> tuple[int, Mapping[str, str]]:
        name = self._name(key)
        with self._told(f"cannot read {key} in {self.uri}", name, writing=False):
            return self._look(name)

    def _keyed(self, entry: Entry) -> Entry:
        return replace(entry, key=entry.key[len(self.prefix) :])

    def _name(self, key: str) -> str:
        check_key(key)
        name = self.prefix + key
        if "\n" in key or "\r" in key:
            raise StoreError(f"key {key!r}: {self.scheme}:// takes no line break in a name")
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            raise StoreError(f"key {key!r}: is not text that UTF-8 can hold") from None
        if size > 1024:
            raise StoreError(f"key {key[:40]!r}...: {size} bytes with its folder, at most 1024")
        return name

    @contextlib.contextmanager
    def _told(self, failed: str, name: str, *, writing: bool) -> Iterator[None]:
        try:
            yield
        except (StoreError, Exists):
            raise
        except Exception as error:
            meaning = self._meaning(error, failed, name, writing)
            if meaning is None and isinstance(error, OSError):  # the local file's
                meaning = StoreError(f"{failed}: {error.strerror or first_line(error)}")
            if meaning is None:
                raise
            raise meaning from error


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's text, shortened."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line[:most] or type(error).__name__


def changed(content: Content) -> StoreError:
    """The error of a file that is not what was measured any more."""
    return StoreError(f"{content.source}: changed while it was being uploaded; upload it again")


def _undamaged(act: Callable[[], None], failed: str) -> None:
    for left in reversed(range(_TRIES)):
        try:
            return act()
        except Damaged as error:
            if not left:
                why = f"it was damaged on the way {_TRIES} times ({first_line(error)})"
                raise Transient(f"{failed}: {why}; try again later") from error
    return None


def _of_bytes(data: bytes) -> Content:
    return Content(lambda: io.BytesIO(data), len(data), hashlib.sha256(data).hexdigest())


def _measure(path: Path) -> tuple[int, str]:
    """Size and sha256 of what a file holds now."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"cannot read {path}: it does not exist") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error


def _is_key(key: str) -> bool:
    # Consoles and other tools leave objects such as "folder/" that no store could have written.
    try:
        check_key(key)
    except StoreError:
        return False
    return True


class _Hashing(io.RawIOBase):
    """A file that keeps the sha256 of what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def truncate(self, size: int | None = None) -> int:
        self.digest = hashlib.sha256()
        return 0
