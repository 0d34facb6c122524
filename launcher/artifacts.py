"""A run's artifact root as the launcher sees it: a folder of this machine, or a store.

Of a store a copy is kept in `$LAUNCH_HOME/runs/<id>/copy`: what `status`, `logs` and `report` read,
and never weights. A service that does not answer is asked again here, by the injected clock,
for as long as `patience` says. Errors of stores become those of `launcher.errors` here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Protocol, TypeVar

from launcher import home
from launcher.clock import Clock, SystemClock
from launcher.errors import Denied, LaunchError, Transient, UsageError

if TYPE_CHECKING:
    from launcher.run import Run
    from trainer.store import Store

Answer = TypeVar("Answer")
#: Seconds for which a refreshed copy is new enough.
FRESH = 3.0
#: Seconds that a command asks a store again and again; a driver waits as long as it takes.
PATIENCE = 15.0
#: What `refresh` brings; the others on demand, by their names.
SMALL = re.compile(
    r"(?:.+/)?(?:run_meta|args_snapshot|evaluation)\.json|(?:.+/)?metrics/[^/]+\.jsonl"
    r"|(?:.+/)?checkpoints/(?:last\.json|best\.json|step-\d+/MANIFEST\.json)"
    r"|attempts/[^/]+\.json|recipe\.yaml"
)
LOGS = re.compile(r"logs/.+\.log")
EVENTS = re.compile(r"(?:.+/)?tensorboard/.+")
ANYTHING = re.compile(r".+")
_JOURNAL = re.compile(r"journal/\d{8}\.json")
#: scheme -> the module of its client, and the extra that brings it.
_CLIENTS = {"gs": ("google.cloud.storage", "google"), "s3": ("boto3", "s3")}


class Artifacts(Protocol):
    """Names are relative to the root and use `/`. Errors: `LaunchError`s of one line: `Denied`,
    `Transient` (a store that does not answer), `UsageError` (no such bucket, no client)."""

    uri: str
    folder: Path  # where the files can be read here: the root itself, or the copy
    remote: bool
    patience: float  # seconds that a store is asked again
    tell: Callable[[str], None]  # is told when a store does not answer and is asked again

    def read(self, name: str) -> Optional[bytes]:
        """What there is now, None: nothing."""
        ...

    def exists(self, name: str) -> bool: ...

    def write(self, name: str, text: str) -> None: ...

    def create_once(self, name: str, text: str) -> bool:
        """Write unless there is something: True for exactly one of all who try."""
        ...

    def remove(self, name: str) -> None: ...

    def move(self, name: str, to: str) -> None: ...

    def names(self, prefix: str = "") -> list[str]:
        """All names that begin so, sorted: one list call for each thousand."""
        ...

    def known(self, prefix: str = "") -> list[str]:
        """The same as of the last `refresh`: no call."""
        ...

    def refresh(self, *more: re.Pattern[str], anew: bool = False) -> None:
        """Bring `SMALL`, and what `more` names, to `folder`: one list call and what has changed.
        Nothing is asked when that was done within the last seconds, unless `anew`. Errors: those
        of one try."""
        ...


def open_artifacts(
    root: str, place: Path, environ: Mapping[str, str], clock: Optional[Clock] = None
) -> Artifacts:
    """The artifacts at `root`, a path or URI; `place`: the run's folder in $LAUNCH_HOME. Nothing is
    asked yet. Errors: `UsageError` for a scheme that is not known."""
    if not is_remote(root):
        return Folder(home.local_root(root))
    return Bucket(root, place, clock or SystemClock())


def is_remote(root: str) -> bool:
    """Whether the root lies in a store and not on a disk of this machine."""
    return root.partition("://")[0] in _CLIENTS


def missing_client(root: str) -> Optional[str]:
    """What to install before anything at `root` can be reached; None: nothing."""
    if not is_remote(root):
        return None
    module, extra = _CLIENTS[root.partition("://")[0]]
    with suppress(ModuleNotFoundError):
        if util.find_spec(module) is not None:
            return None
    return f"pip install 'launch-llm[{extra}]'"


def below(root: str, uri: str) -> str:
    """The name of `uri`, which is `root` or lies below it; empty: the root itself."""
    return uri[len(root) :].strip("/") if uri.startswith(root) else uri


def here(run: Run, uri: Optional[str] = None) -> Path:
    """Where what lies at `uri` (default: the run's root), at or below its root, can be read on this
    machine."""
    where = run.root if uri is None else uri
    return Path(run.folder, below(run.root, where)) if run.folder else home.local_root(where)


def known_names(run: Run, prefix: str = "") -> list[str]:
    """The names under the root of a run in a store, as of its last refresh."""
    names = _Index.read(Path(run.folder)).names if run.folder else []
    return [name for name in names if name.startswith(prefix)]


def journals(run: Run) -> list[Path]:
    """The folders of this machine that together hold the run's journal, as far as it is known."""
    own = [Path(run.folder).parent / "journal"] if is_remote(run.root) and run.folder else []
    return [here(run) / "journal", *own]


def parsed(data: Optional[bytes]) -> dict[str, Any]:
    """A JSON object, or {} when there is none (yet)."""
    try:
        raw = json.loads(data or b"")
    except ValueError:
        return {}
    return raw if isinstance(raw, dict) else {}


class Folder:
    """A root on a disk of this machine."""

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, str(folder)
        self.patience = 0.0
        self.tell: Callable[[str], None] = _nobody

    def read(self, name: str) -> Optional[bytes]:
        try:
            return (self.folder / name).read_bytes()
        except OSError:
            return None

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def write(self, name: str, text: str) -> None:
        home.write(self.folder / name, text)

    def create_once(self, name: str, text: str) -> bool:
        file = self.folder / name
        try:
            return _create_once(file, text)
        except OSError as error:
            raise home.unwritable(file.parent, error) from error

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        with suppress(FileNotFoundError):
            (self.folder / name).replace(self.folder / to)

    def names(self, prefix: str = "") -> list[str]:
        start = self.folder / prefix.rpartition("/")[0]
        files = (file for file in start.rglob("*") if file.is_file())
        found = (file.relative_to(self.folder).as_posix() for file in files)
        return sorted(name for name in found if name.startswith(prefix))

    def known(self, prefix: str = "") -> list[str]:
        return self.names(prefix)

    def refresh(self, *more: re.Pattern[str], anew: bool = False) -> None:
        return None


class Bucket:
    """A root in a store, and its copy here."""

    remote = True

    def __init__(self, root: str, place: Path, clock: Clock) -> None:
        self.uri, self.clock = root.rstrip("/"), clock
        self.folder, self.place = place / "copy", place
        self.patience = PATIENCE
        self.tell: Callable[[str], None] = _nobody
        scheme, _, rest = self.uri.partition("://")
        self.bucket, _, prefix = rest.partition("/")
        self._base, self._prefix = f"{scheme}://{self.bucket}", f"{prefix}/" if prefix else ""

    def read(self, name: str) -> Optional[bytes]:
        from trainer.store import NotFound

        def ask(store: Store) -> Optional[bytes]:
            try:
                return store.get_bytes(self._prefix + name)
            except NotFound:
                return None

        return self._asked(ask)

    def exists(self, name: str) -> bool:
        return self._asked(lambda store: store.exists(self._prefix + name))

    def write(self, name: str, text: str) -> None:
        self._asked(lambda store: store.put_bytes(self._prefix + name, text.encode()))

    def create_once(self, name: str, text: str) -> bool:
        # One store and the same bytes in each try: what a lost reply hid is known as ours.
        return self._asked(lambda store: store.create_once(self._prefix + name, text.encode()))

    def remove(self, name: str) -> None:
        self._asked(lambda store: store.delete(self._prefix + name))

    def move(self, name: str, to: str) -> None:
        data = self.read(name)
        if data is not None:
            self._asked(lambda store: store.put_bytes(self._prefix + to, data))
            self.remove(name)

    def names(self, prefix: str = "") -> list[str]:
        return [*self.versions(prefix)]

    def versions(self, prefix: str = "") -> dict[str, str]:
        """`names`, each with a text that changes when the object does."""
        found = self._asked(lambda store: store.versions(self._prefix + prefix))
        return {name[len(self._prefix) :]: version for name, version in found.items()}

    def fetch(self, name: str, target: Path) -> bool:
        """Write an object of any size to a file, verified; False: it is not there."""
        from trainer.store import NotFound

        def ask(store: Store) -> bool:
            try:
                store.get_file(self._prefix + name, target)
            except NotFound:
                return False
            return True

        return self._asked(ask, again=True)

    def known(self, prefix: str = "") -> list[str]:
        return sorted(name for name in _Index.read(self.folder).names if name.startswith(prefix))

    def refresh(self, *more: re.Pattern[str], anew: bool = False) -> None:
        with _locked(self.folder):
            index = _Index.read(self.folder)
            asked = sorted(pattern.pattern for pattern in more)
            fresh = 0 <= self.clock.now() - index.time < FRESH
            if fresh and not anew and {*asked} <= {*index.more}:
                return
            patience, self.patience = self.patience, 0.0
            try:
                self._bring(index, (SMALL, _JOURNAL, *more))
                index.time, index.more = self.clock.now(), asked
            finally:
                self.patience = patience
                index.write(self.folder)

    def _bring(self, index: _Index, wanted: tuple[re.Pattern[str], ...]) -> None:
        found = self.versions()
        index.names = list(found)
        for name in [*index.have]:
            if name not in found:
                (self.folder / name).unlink(missing_ok=True)
                del index.have[name]
        for name, version in found.items():
            if not any(pattern.fullmatch(name) for pattern in wanted):
                continue
            if index.have.get(name) == version or self._ours(name):
                continue
            data = self.read(name)
            if data is not None:  # else it was pruned meanwhile
                _replace(self.folder / name, data)
                index.have[name] = version

    def _ours(self, name: str) -> bool:
        """A record of which this machine has its own copy."""
        return _JOURNAL.fullmatch(name) is not None and (self.place / name).exists()

    def _asked(self, ask: Callable[[Store], Answer], again: bool = False) -> Answer:
        """`ask`, again while the store does not answer and patience lasts. `again`: the client
        itself, too, goes on after what cuts a long transfer."""
        started, tries = self.clock.now(), 0
        while True:
            try:
                with _said():
                    return ask(_store(self._base, again, os.getpid(), _endpoint()))
            except Transient as signal:
                tries += 1
                wait = min(2.0 ** (tries - 1), 60.0)
                if self.clock.now() + wait > started + self.patience:
                    raise
                self.tell(str(signal))
                self.clock.sleep(wait)


class _Index:
    """What the copy is of: all names of the last listing, and the versions of what was brought."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.time = float(raw.get("time", 0.0))
        self.more: list[str] = list(raw.get("more", ()))
        self.names: list[str] = list(raw.get("names", ()))
        self.have: dict[str, str] = dict(raw.get("have", {}))

    @classmethod
    def read(cls, folder: Path) -> _Index:
        try:
            return cls(parsed((folder / ".index.json").read_bytes()))
        except (OSError, TypeError, ValueError):
            return cls({})

    def write(self, folder: Path) -> None:
        if not self.names:  # nothing was found or answered: nothing is left behind
            return
        home.write(folder / ".index.json", json.dumps({"v": 1, **vars(self)}), sync=False)


@lru_cache(maxsize=32)
def _store(base: str, again: bool, process: int, endpoint: tuple[Optional[str], ...]) -> Store:
    """One client for each bucket and process: no connection outlives a fork."""
    from trainer.store import open_store

    return open_store(base, again=again)


def _endpoint() -> tuple[Optional[str], ...]:
    names = ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
    return tuple(os.environ.get(name) for name in names)


@contextmanager
def _said() -> Iterator[None]:
    """Errors of stores in the words of the launcher."""
    from trainer import store

    try:
        yield
    except store.StoreError as error:
        raise _meaning(error) from error


def _meaning(error: Exception) -> LaunchError:
    from trainer import store

    if isinstance(error, store.Transient):
        return Transient(str(error))
    if isinstance(error, store.Denied):
        return Denied(str(error))
    if isinstance(error, store.DiskFull):
        return home.Unwritable(str(error))
    return UsageError(str(error))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time brings things here."""
    lock = folder.with_name("copy.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise home.unwritable(lock.parent, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(file: Path, data: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise home.unwritable(file.parent, error) from error


def _create_once(file: Path, text: str) -> bool:
    """Bring `file` into being, whole and on the disk; False when it is there already."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")
    try:
        with temporary.open("w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.link(temporary, file)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            return _exclusive(file, text)  # a file system without hard links
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return True


def _exclusive(file: Path, text: str) -> bool:
    try:
        with file.open("x") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
    except FileExistsError:
        return False
    return True


def _nobody(line: str) -> None:
    return None
