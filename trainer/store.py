"""Where bytes are kept: atomic writes, create-once records, checksums. Standard library only.

A store holds values under keys (relative, with `/`). What a value means is not known here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import os
import re
import secrets
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

#: Unfinished writes carry this prefix; listings never show them.
TEMPORARY = ".tmp-"
_UNFINISHED = re.compile(re.escape(TEMPORARY) + r"(\d+)-[0-9a-f]{8}")
_FULL = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk full (quota)",
    errno.EFBIG: "disk full (file size limit)",
}
#: How a bucket may be named. (The services are stricter still, and say so.)
BUCKET_NAME = r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?"
BUCKET_SPELLING = "lower-case letters, digits, '-', '_', '.'; a letter or digit at both ends"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_Keys = list[str]  # inside a class that has a method `list`


class StoreError(Exception):
    """One clear line: what could not be stored or read, where, and why."""


class NotFound(StoreError):
    """There is no value under this key."""


class DiskFull(StoreError):
    """No room for the bytes that were to be written. Nothing half-written is left."""


class Denied(StoreError):
    """No credentials, or not the right to do this. Trying again changes nothing."""


class Transient(StoreError):
    """A service that was asked for a while and did not answer. Whether a write was applied is not
    known; the same call may be made again later."""


#: What the texts of the clients' connection errors have in common -> in our words.
_AWAY = (
    (re.compile(r"refused", re.I), "connection refused"),
    (re.compile(r"name or service not known|name resolution|NameResolution|getaddrinfo|nodename"),
     "its name is not known here"),
    (re.compile(r"timed? ?out", re.I), "no answer in time"),
    (re.compile(r"certificate|SSL"), "its certificate is not accepted"),
    (re.compile(r"unreachable|no route", re.I), "the network does not reach it"),
    (re.compile(r"reset|aborted|closed|disconnected|broken|incomplete", re.I), "connection cut"),
)  # fmt: skip
_HOST = re.compile(r"host='([^']+)', port=(\d+)|https?://([^/\s\"'?]+)")


def no_answer(error: BaseException) -> str:
    """`HOST does not answer (connection refused)`, for what a client raised about a connection;
    empty when its text tells of none."""
    text, seen = str(error), error.__cause__ or error.__context__
    if seen is not None:
        text += f" {seen}"
    why = next((words for pattern, words in _AWAY if pattern.search(text)), "")
    found = _HOST.search(text)
    request = getattr(error, "request", None)
    if found is None and request is not None:
        found = _HOST.search(str(getattr(request, "url", "")))
    if not why:
        return ""
    host = "the service"
    if found is not None:
        host = found[3] or found[1] + ("" if found[2] in ("80", "443") else f":{found[2]}")
    return f"{host} does not answer ({why})"


class Store(Protocol):
    """Keys are relative and use `/`. Every method raises `StoreError`, one line, when it fails."""

    uri: str

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write or replace a value; a reader sees the old one or the new one, whole."""
        ...

    def put_file(self, key: str, source: Path) -> None:
        """The same, with the content of a local file."""
        ...

    def get_bytes(self, key: str) -> bytes:
        """The value. Errors: `NotFound`."""
        ...

    def get_file(self, key: str, target: Path) -> None:
        """Write the value to a local file, whole or not at all; missing folders are made.
        Errors: `NotFound`, `DiskFull`."""
        ...

    def create_once(self, key: str, data: bytes) -> bool:
        """Write a value unless there is one: True if it was written, by exactly one of all who try.
        The record is whole or absent."""
        ...

    def list(self, prefix: str = "") -> _Keys:
        """All keys that start with `prefix` (a prefix of characters, not of folders), sorted."""
        ...

    def versions(self, prefix: str = "") -> dict[str, str]:
        """The keys that `list` gives, each with a text that is another one when the value is."""
        ...

    def exists(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Remove a value; an absent one is fine."""
        ...

    def checksum(self, key: str) -> str:
        """sha256 of the value, in hexadecimal digits. Errors: `NotFound`."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The path of a value that lies on a local disk; None elsewhere."""
        ...


def open_store(uri: str | Path, *, again: bool = True) -> Store:
    """The store at a path or URI. Without `again` a service that does not answer is asked once, for
    callers that own the waiting. Errors: `StoreError` for a scheme that is not known."""
    text = os.fspath(uri)
    match = _SCHEME.match(text)
    scheme = match.group(1).lower() if match else "file"
    if scheme not in FACTORIES:
        known = ", ".join(f"{name}://" for name in sorted(FACTORIES))
        raise StoreError(f"{text}: no store for {scheme}://; allowed: a local path, {known}")
    return FACTORIES[scheme](text, again)


class FileStore:
    """A folder on a local disk. It is made by the first write."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.uri = str(self.folder)

    def put_bytes(self, key: str, data: bytes) -> None:
        atomic_write(self._path(key), data)

    def put_file(self, key: str, source: Path) -> None:
        path = self._path(key)
        with _one_line(f"cannot read {source}"):
            size = source.stat().st_size
        with replacing(path, size) as temporary:
            shutil.copyfile(source, temporary)

    def get_bytes(self, key: str) -> bytes:
        with _one_line(f"cannot read {key} in {self.uri}"):
            return self._path(key).read_bytes()

    def get_file(self, key: str, target: Path) -> None:
        with _one_line(f"cannot read {key} in {self.uri}"):
            source = self._path(key)
            size = source.stat().st_size
        with replacing(target, size) as temporary:
            shutil.copyfile(source, temporary)

    def create_once(self, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        path = self._path(key)
        with _temporary(path, len(data)) as temporary:
            _write(temporary, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                # A network file system that lost its answer repeats the request: the file that
                # exists may be ours.
                return temporary.samefile(path)
            fsync(path.parent)
        return True

    def list(self, prefix: str = "") -> _Keys:
        folder_part = prefix.rpartition("/")[0]
        start = self._path(folder_part) if "/" in prefix else self.folder
        found = []
        with _one_line(f"cannot list {start}"):
            for folder, folders, names in os.walk(start, onerror=_raise):
                folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]
                names = [name for name in names if not name.startswith(TEMPORARY)]
                at = Path(folder).relative_to(self.folder)
                found += [(at / name).as_posix() for name in names]
        return sorted(key for key in found if key.startswith(prefix))

    def versions(self, prefix: str = "") -> dict[str, str]:
        found = {}
        for key in self.list(prefix):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                facts = (self.folder / key).stat()
                found[key] = f"{facts.st_ino} {facts.st_size} {facts.st_mtime_ns}"
        return found

    def exists(self, key: str) -> bool:
        with _one_line(f"cannot look for {key} in {self.uri}"):
            return self._path(key).is_file()

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _one_line(f"cannot delete {path}"), contextlib.suppress(FileNotFoundError):
            path.unlink()
            fsync(path.parent)

    def checksum(self, key: str) -> str:
        with _one_line(f"cannot read {key} in {self.uri}"):
            return sha256_file(self._path(key))

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.folder / key


def check_key(key: str) -> None:
    """What every store asks of a key. Errors: `StoreError`."""
    parts = key.split("/")
    if "\0" in key or not all(part not in ("", ".", "..") for part in parts):
        raise StoreError(f"key {key!r}: must be relative, with no empty part, '.' or '..'")
    if any(part.startswith(TEMPORARY) for part in parts):
        raise StoreError(f"key {key!r}: names that start with '{TEMPORARY}' are reserved")


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write or replace a file so that it is, after a crash at any instant, the old or the new one,
    whole; missing parent folders are made. Errors: `DiskFull`, `StoreError`."""
    target = Path(path).absolute()
    content = data.encode() if isinstance(data, str) else data
    with _temporary(target, len(content)) as temporary:
        _write(temporary, content)
        temporary.replace(target)
        fsync(target.parent)


@contextlib.contextmanager
def replacing(target: str | Path, size: int) -> Iterator[Path]:
    """A file to write about `size` bytes to; when the block ends well it is made durable and takes
    the name `target`, else it is removed. Errors: `DiskFull`, `StoreError`."""
    path = Path(target).absolute()
    with _temporary(path, size) as temporary:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)


def fsync_dir(folder: str | Path) -> None:
    """Make the names in a folder (new, renamed, removed files) survive a power cut."""
    fsync(Path(folder))


def fsync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems keep no folders to be made durable.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        fsync(new.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that dead processes left in a folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        match = _UNFINISHED.fullmatch(path.name)
        if match and not other_lives(int(match.group(1))):
            with contextlib.suppress(OSError):
                path.unlink()


def other_lives(pid: int) -> bool:
    """Whether a process of that number runs on this machine and is not this one."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def disk_full(error: BaseException) -> str | None:
    """The words for it when `error`, or what it was raised from, says that the disk is full.
    Libraries in other languages leave only the number in their message."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return _FULL[seen.errno]
        number = re.search(r"\(os error (\d+)\)", str(seen))
        if number and int(number.group(1)) in _FULL:
            return _FULL[int(number.group(1))]
        if re.fullmatch(r"\d+ requested and \d+ written", str(seen)):  # numpy, without a number
            return _FULL[errno.ENOSPC]
        seen = seen.__cause__ or seen.__context__
    return None


def free_bytes(path: Path) -> int:
    """Free bytes of the file system on which `path` lies, or will lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def _temporary(path: Path, size: int) -> Iterator[Path]:
    """A name beside `path` to write `size` bytes to. What has that name at the end is removed."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _one_line(f"cannot write {path}"):
            make_folder(path.parent)
            yield temporary
    except StoreError as error:
        if (full := disk_full(error)) is None:
            raise
        room = f"needs {size} bytes, {free_bytes(path.parent)} are free"
        raise DiskFull(f"{full}: {path} {room}; free space, or write elsewhere") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write(path: Path, data: bytes) -> None:
    with path.open("xb", buffering=0) as file:
        view = memoryview(data)
        while len(view):  # a nearly full disk takes a part first
            view = view[file.write(view) :]
        os.fsync(file.fileno())


@contextlib.contextmanager
def _one_line(failed: str) -> Iterator[None]:
    """Turn operating system errors into `StoreError`: `failed` says what could not be done."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{failed}: it does not exist") from error
    except OSError as error:
        raise StoreError(f"{failed}: {error.strerror}") from error


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # nothing there is an empty list
        raise error


def _open_file(uri: str, again: bool) -> Store:
    if not _SCHEME.match(uri):
        return FileStore(uri)
    parts = urllib.parse.urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise StoreError(f"{uri}: not a local file; write file:///absolute/path")
    return FileStore(urllib.parse.unquote(parts.path))


def _open_in(module: str) -> Callable[[str, bool], Store]:
    def factory(uri: str, again: bool) -> Store:
        store: Store = importlib.import_module(module).open_uri(uri, again)
        return store

    return factory


#: scheme -> what opens a URI of it. A store imports its client when it first needs it.
FACTORIES: dict[str, Callable[[str, bool], Store]] = {
    "file": _open_file,
    "gs": _open_in("trainer.store_gcs"),
    "s3": _open_in("trainer.store_s3"),
}
