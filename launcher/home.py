"""$LAUNCH_HOME: where runs live on this machine, how they are found, and who holds a driver's lock.

Knows folders, names and locks; what is inside a journal is `launcher.journal`'s business.
"""

from __future__ import annotations

import difflib
import fcntl
import getpass
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from launcher.clock import Clock
from launcher.errors import Exit, LaunchError, UsageError

_ID = re.compile(r"^[0-9a-f]{16}$")


def path(environ: Mapping[str, str]) -> Path:
    """$LAUNCH_HOME, or ~/.launch; absolute."""
    return Path(environ.get("LAUNCH_HOME") or Path("~/.launch")).expanduser().absolute()


def owner(environ: Mapping[str, str]) -> str:
    """$LAUNCH_OWNER or the user's name, as a label value: lowercase letters, digits, `-`. Letters
    that a label cannot hold end in a few digits of the name's hash, so that two such names differ.
    """
    name = environ.get("LAUNCH_OWNER") or _user()
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    if plain and name.isascii():
        return plain[:40].rstrip("-")
    import hashlib  # rare, and not worth the start of every command
    import unicodedata

    mark = hashlib.sha256(unicodedata.normalize("NFC", name).encode()).hexdigest()[:6]
    return f"{plain[:33].rstrip('-') or 'user'}-{mark}"


def new_id(clock: Clock) -> str:
    """16 hexadecimal digits: 10 of hundredths of a second since the epoch (milliseconds do not fit
    in ten digits), then 6 random ones. They sort by time until the year 2318."""
    return f"{int(clock.now() * 100):010x}{secrets.token_hex(3)}"


def run_name(recipe: str, run_id: str) -> str:
    return f"{recipe}-{run_id[-6:]}"


def folder(home: Path, run_id: str) -> Path:
    return home / "runs" / run_id


def local_root(root: str) -> Path:
    """The artifact root as a folder of this machine. Errors: `UsageError` for other stores."""
    scheme, mark, rest = root.partition("://")
    if not mark:
        return Path(root).expanduser().absolute()
    if scheme == "file":
        return Path(rest)
    raise UsageError(
        f"artifacts: {root}: there is no store for {scheme}://",
        "give gs://BUCKET/FOLDER, s3://BUCKET/FOLDER, a folder, or leave `artifacts` out",
    )


def ids(home: Path) -> list[str]:
    """The ids of all runs, newest first."""
    try:
        names = os.listdir(home / "runs")  # noqa: PTH208 (a tenth of the time of iterdir)
    except FileNotFoundError:
        return []
    return sorted((name for name in names if _ID.match(name)), reverse=True)


def identity(home: Path, run_id: str) -> Optional[dict[str, Any]]:
    """`run.json` of a run, or the same facts from its first record; None: it was never created
    (a crash in `up` before anything was started leaves such a folder)."""
    place = folder(home, run_id)
    for file in (place / "run.json", place / "journal" / "00000001.json"):
        try:
            facts = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(facts, dict) and {"id", "name", "root"} <= facts.keys():
            return facts
    return None


def find(home: Path, text: str) -> dict[str, Any]:
    """The identity of the run called `text`: its name, its id, or a prefix of one of them that no
    other run shares. Errors: `UsageError` with near names, or with those that share the prefix."""
    known = ids(home)
    if text in known and (facts := identity(home, text)):
        return facts
    suffix = text.rpartition("-")[2]
    for run_id in known:  # a name ends as its id ends: one file to read instead of all
        if run_id.endswith(suffix) and (facts := identity(home, run_id)) and facts["name"] == text:
            return facts
    everything = [facts for run_id in known if (facts := identity(home, run_id))]
    near = [
        f for f in everything if text and (f["id"].startswith(text) or f["name"].startswith(text))
    ]
    if len(near) == 1:
        return near[0]
    if near:
        names = ", ".join(f["name"] for f in near[:5]) + (", ..." if len(near) > 5 else "")
        raise UsageError(f"'{text}' could be any of {len(near)} runs: {names}", "give more of it")
    close = difflib.get_close_matches(text, [f["name"] for f in everything], n=1, cutoff=0.6)
    meant = f"; did you mean '{close[0]}'?" if close else ""
    raise UsageError(f"no run '{text}'{meant}", f"`launch status` lists the runs in {home}")


class DriverLock:
    """`driver.lock` of a run: an flock that lives as long as its driver, whatever kills it."""

    def __init__(self, descriptor: int, place: Path) -> None:
        self.descriptor, self._place = descriptor, place

    @classmethod
    def acquire(cls, place: Path, wait: float = 1.0) -> Optional[DriverLock]:
        """The lock, or None when another process keeps it for `wait` seconds. (`holder` takes it
        for an instant; that is why a driver asks more than once.) Errors: `Unwritable`."""
        try:
            place.mkdir(parents=True, exist_ok=True)
            file = place / "driver.lock"
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritable(place, error) from error
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return cls(descriptor, place)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    return None
                time.sleep(0.02)

    @classmethod
    def inherited(cls, place: Path, descriptor: int) -> Optional[DriverLock]:
        """The lock that the process which started this one handed over, if it is this run's."""
        try:
            ours, there = os.fstat(descriptor), (place / "driver.lock").stat()
        except OSError:
            return None
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            return None
        os.set_inheritable(descriptor, False)
        return cls(descriptor, place)

    def claim(self, pid: int, since: float) -> None:
        """Write who holds it. Errors: `Unwritable`."""
        facts = json.dumps({"host": socket.gethostname(), "pid": pid, "since": since})
        try:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, facts.encode(), 0)
        except OSError as error:
            raise unwritable(self._place, error) from error

    def close(self) -> None:
        """Let go of it here; a process that inherited the descriptor keeps the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def claimed(place: Path) -> Optional[dict[str, Any]]:
    """What `driver.lock` says, whether its driver still lives or not."""
    try:
        facts = json.loads((place / "driver.lock").read_text())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "pid" in facts else None


def holder(place: Path) -> Optional[dict[str, Any]]:
    """The living driver of this host, as `driver.lock` names it, or None."""
    try:
        descriptor = os.open(place / "driver.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return claimed(place) or {"host": socket.gethostname(), "pid": 0, "since": 0.0}
    else:
        return None
    finally:
        os.close(descriptor)


def holds(place: Path, pid: int) -> bool:
    """Whether this process has the run's lock open. Who takes the lock names itself a little later:
    until then the file names the driver before, whose number may be another program's by now.
    Where /proc does not tell, the file is believed."""
    try:
        lock = (place / "driver.lock").stat()
        opened = list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return not Path("/proc/self/fd").exists()
    except OSError:
        return True
    for descriptor in opened:
        try:
            found = descriptor.stat()
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (lock.st_dev, lock.st_ino):
            return True
    return False


@contextmanager
def up_lock(home: Path) -> Iterator[None]:
    """Held while `up` looks for a live run and creates one, so that two at once make one run."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(home / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise unwritable(home, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Unwritable(LaunchError):
    """The disk refused: full, read-only, or not ours."""

    code = Exit.ACCESS


def unwritable(place: Path, error: OSError) -> Unwritable:
    return Unwritable(
        f"cannot write {error.filename or place}: {error.strerror or error}",
        f"free space on or make writable {place}; LAUNCH_HOME names another folder",
    )


def write(file: Path, text: str, sync: bool = True) -> None:
    """Write a whole file or nothing: temporary file, fsync (unless it is only a copy), rename.
    Errors: `Unwritable`."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as handle:
            handle.write(text)
            if sync:
                handle.flush()
                os.fsync(handle.fileno())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(file.parent, error) from error


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"uid{os.getuid()}"
