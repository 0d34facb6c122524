"""The one bootstrap, carried by every backend: fetch, verify, unpack, hand over.

`python boot.py run SPEC.json [BUNDLE.tar.bz2]` runs a job; `python boot.py worker SPEC.json` is one
of its workers under torchrun; `python boot.py trainer ...` is `python -m trainer ...`, from the
bundle alone. Standard library only, one file, run alone: what a job does beyond this is in the
bundle (supervise.py). docs/contracts.md: the specification, what is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import pkgutil
import runpy
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import urllib.parse
import zlib
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO, Any, Optional, cast

OK, ERROR, CONFIG, DATA, AGAIN, ENVIRONMENT = 0, 1, 64, 65, 75, 78
STOPPED = "stopped"
#: What boot notes as `cause` where it leaves with 75: for an outage before its workers began, or
#: because its time was up.
OUTAGE, DEADLINE = "infrastructure", "deadline"
#: The descriptor that a starter hands over: it holds the lock already.
LOCK_VARIABLE = "LAUNCH_BOOT_LOCK"
#: Where the artifact root may be, besides a local folder.
STORES = ("gs", "s3")
STAMP = "%Y-%m-%dT%H:%M:%S.%fZ"
_NUMBER = int | float | None
_KINDS: dict[str, Any] = {
    "schema": int, "run": str, "job": dict, "bundle": dict, "bundle.url": str,
    "bundle.sha256": str, "bundle.bytes": int, "root": str, "work": str, "job_index": int,
    "attempt": int, "workers": int, "nodes": int, "python": str | None, "env": dict | None,
    "secrets": dict | None, "wheels": list | None, "code": dict | None, "deadline_seconds": _NUMBER,
    "grace_seconds": _NUMBER, "join_seconds": _NUMBER,
}  # fmt: skip


class BootError(Exception):
    """One clear line, and the exit code that says whether to try again."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["trainer"]:
        return trainer(arguments[1:])
    mode, *paths = arguments or [""]
    if (mode, len(paths)) not in (("run", 1), ("run", 2), ("worker", 1)):
        usage = "boot.py run SPEC.json [BUNDLE.tar.bz2] | worker SPEC.json"
        print(f"error: usage: {usage}", file=sys.stderr)
        return CONFIG
    try:
        spec = Spec(paths[0])
        if mode == "run":
            return run(spec, *paths[1:])
        return int(_from_bundle(spec, "trainer.workers:worker")(spec))
    except BootError as error:
        code, line = error.code, str(error)
    except OSError as error:  # a work folder that cannot be written
        code, line = ENVIRONMENT, f"{error.filename or paths[0]}: {error.strerror}"
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code


class Spec:
    """The boot specification, read once. `folder` stands for the artifact root on this machine: a
    local root itself, else `<work>/artifacts`. Errors: `BootError` 64, one line."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).resolve()
        try:
            raw = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            what = getattr(error, "strerror", None) or f"not JSON: {error}"
            raise BootError(CONFIG, f"{path}: {what}") from error
        if wrong := _wrong(raw):
            raise BootError(CONFIG, f"{path}: {wrong}")
        self.raw: dict[str, Any] = raw
        self.job, self.bundle, self.root = raw["job"], raw["bundle"], raw["root"].rstrip("/")
        self.work = Path(tempfile.gettempdir(), raw["work"]).absolute()  # an absolute one stays
        self.workers = int(raw["workers"])
        self.nodes, self.node = int(raw["nodes"]), 0
        if self.nodes > 1:  # they may share a disk, or be rehearsed on one machine
            self.work = self.work / _task(os.environ)
        self.remote = self.root.partition("://")[0] in STORES
        self.folder = self.work / "artifacts" if self.remote else local_path(raw["root"])
        self.logs = self.folder / "logs"
        self.part = f"{raw['job_index']:02d}-{raw['attempt']:04d}"
        self.python = raw.get("python") or sys.executable
        self.code = self.work / "bundle"
        self.own = self.work / "code"  # the user's own, where the run brings some
        self.boot = str(Path(__file__).resolve())
        grace, deadline = raw.get("grace_seconds"), raw.get("deadline_seconds")
        self.grace = 600.0 if grace is None else float(grace)
        self.given = math.inf if deadline is None else float(deadline)
        self.deadline = math.inf if deadline is None else deadline - reserve(deadline)
        join = raw.get("join_seconds")
        self.join = 900.0 if join is None else float(join)

    def log(self, name: str) -> Path:
        """This boot's part of a log: `worker-<n>`, or `boot`, which is each node's own."""
        if name == "boot" and self.node:
            name = f"boot-{self.node}"
        return self.logs / name / f"{self.part}.log"

    def trainer(self, *arguments: str) -> list[str]:
        """The command line of `python -m trainer ARGUMENTS`, from the bundle alone."""
        return [self.python, self.boot, "trainer", *arguments]


def reserve(seconds: float) -> float:
    """Of the seconds that a job may last, those that it keeps for saving and leaving: a tenth, ten
    minutes at most. A service ends the job at that time, by a clock that began before boot did."""
    return min(600.0, seconds / 10)


def run(spec: Spec, bundle: Optional[str] = None) -> int:
    """Run the job once. `bundle`: the file to read instead of `bundle.url`. A second boot of the
    same work folder leaves at once: the lock or the result of the first is there. Where the
    artifact root is remote only the lock counts: a service that starts a container again, on a disk
    that it kept, means the job to go on."""
    spec.work.mkdir(parents=True, exist_ok=True)
    if take_lock(spec.work) is None:
        return OK
    result = spec.work / "result.json"
    if result.exists() and not spec.remote:
        return int(json.loads(result.read_text())["exit_code"])
    started = time.time()
    try:
        asked = _listen()
        note_process(spec, "starting")
        fetch(spec, bundle)
        supervise = _from_bundle(spec, "trainer.supervise:supervise")
    except BootError as error:
        code, why = error.code, str(error)
    except OSError as error:
        code, why = ENVIRONMENT, f"{error.filename or spec.work}: {error.strerror}"
    else:
        return int(supervise(spec, asked, started))
    say(spec, f"exit code {code}: {why}")
    if not spec.remote:  # nothing of the bundle is there to create it once
        record = {"v": 1, "job": spec.raw["job_index"], "attempt": spec.raw["attempt"]}
        ended = {"started": started, "ended": time.time(), "exit_code": code, "why": why}
        path = spec.folder / "attempts" / f"{spec.part}.json"
        with contextlib.suppress(OSError):
            if not path.exists():
                write_json(path, {**record, "restart": 0, **ended, "ranks": {}})
    leave(spec, code, why)
    return code


def trainer(arguments: list[str]) -> int:
    """Run the package `trainer` of the bundle, the first on PYTHONPATH, as the main program."""
    _bundle_only()
    sys.argv[1:] = arguments
    runpy.run_module("trainer", run_name="__main__", alter_sys=True)
    return OK


def _from_bundle(spec: Spec, name: str) -> Callable[..., Any]:
    """A function of the unpacked bundle, by `module:name`: this file alone imports nothing of the
    package. Errors: `BootError` 78."""
    sys.path.insert(0, str(spec.code))
    _bundle_only()
    try:
        found: Callable[..., Any] = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, SyntaxError) as error:
        what = f"bundle {spec.bundle['url']}: {name} cannot be loaded: {error}"
        raise BootError(ENVIRONMENT, what) from error
    return found


def _bundle_only() -> None:
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, _BundleOnly)


class _BundleOnly:
    """After `PathFinder`: what the bundle lacks, an editable installation must not fill in."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.startswith("trainer."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def fetch(spec: Spec, bundle: Optional[str] = None) -> None:
    """Put the verified bundle into `<work>/bundle`, from the file `bundle` or else from its URL.
    `sha256` and `bytes` are those of the tar inside the archive. Errors: `BootError` 78; nothing
    outside the folder is ever written."""
    unpack_verified(local_path(bundle or spec.bundle["url"]), spec.bundle, spec.code)


def unpack_verified(
    path: Path, facts: Mapping[str, Any], folder: Path, what: str = "bundle"
) -> None:
    """Put a packed tar with the `sha256` and `bytes` of `facts` into `folder`, in place of what is
    there. Errors: as `fetch`."""
    size, digest = facts["bytes"], facts["sha256"]
    try:
        with _opened(path) as file:
            data = file.read(size + 1)
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise EOFError(f"not the {size} bytes with sha256 {digest[:12]}")
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or f"damaged: {error}"
        raise BootError(ENVIRONMENT, f"{what} {facts['url']}: {why}") from error
    shutil.rmtree(folder, ignore_errors=True)
    unpack(data, folder, what)


def _opened(path: Path) -> IO[bytes]:
    """An archive, unpacked as it is read: bzip2, or gzip, as runs of before have it."""
    with path.open("rb") as file:
        old = file.read(2) == b"\x1f\x8b"
    if old:
        return cast("IO[bytes]", gzip.open(path))
    try:
        import bz2  # not everybody's Python has it
    except ImportError as error:
        why = f"{sys.executable} was built without bz2, which the bundle is packed with"
        raise BootError(ENVIRONMENT, f"{why}: use an image whose Python has it") from error
    return bz2.open(path)


def unpack(data: bytes, folder: Path, what: str = "bundle") -> None:
    """Unpack regular files below `folder`. Errors: `BootError` 78 for anything else,
    before the first of them is written."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = tar.getmembers()
            for member in members:
                parts = Path(member.name).parts
                inside = parts and parts[0] != "/" and ".." not in parts
                if not inside or not member.isfile():
                    raise BootError(ENVIRONMENT, f"{what}: refused entry {member.name!r}")
            for member in members:
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) or io.BytesIO() as source:
                    target.write_bytes(source.read())
    except (tarfile.TarError, ValueError) as error:
        raise BootError(ENVIRONMENT, f"{what}: not an archive: {error}") from error


def environment(
    spec: Spec, environ: Mapping[str, str], read: Optional[Callable[[str, str], str]] = None
) -> dict[str, str]:
    """The trainer's environment. `read(name, reference)` gives the value of a `secret-manager://`
    reference, which the job alone may read. Errors: `BootError` 78 for a secret that is not there,
    and what `read` raises."""
    given = {key: str(value) for key, value in (spec.raw.get("env") or {}).items()}
    for name, reference in (spec.raw.get("secrets") or {}).items():
        scheme, _, source = str(reference).partition("://")
        if scheme == "secret-manager" and read is not None:
            given[name] = read(name, source)
        elif scheme == "secret-manager":
            raise BootError(ENVIRONMENT, f"secret {name}: only the job itself reads {reference}")
        elif scheme != "env":
            allowed = "env://NAME, secret-manager://PROJECT/NAME[/VERSION]"
            what = f"secret {name}: {scheme}:// is not known; allowed: {allowed}"
            raise BootError(ENVIRONMENT, what)
        elif source not in environ:
            raise BootError(ENVIRONMENT, f"secret {name}: the variable {source} is not set")
        else:
            given[name] = environ[source]
    # First on sys.path: before an installed `trainer`, and without PYTHONSAFEPATH's leave.
    own = str(spec.own) if spec.raw.get("code") else ""
    paths = [str(spec.code), own, {**environ, **given}.get("PYTHONPATH", "")]
    fixed = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LAUNCH_RUN": spec.raw["run"],
        "LAUNCH_ATTEMPT": str(spec.raw["attempt"]),
        "LAUNCH_SECRETS": " ".join(spec.raw.get("secrets") or {}),  # names, for what is written
    }
    return {**environ, **given, **fixed}


def take_lock(work: Path) -> Optional[int]:
    """A descriptor that holds `flock(<work>/lock)` until it is closed; None: somebody else does.
    A starter may hold it already and hand it over, so that the job is never without."""
    inherited = os.environ.pop(LOCK_VARIABLE, "")
    if inherited:
        os.set_inheritable(int(inherited), False)
        return int(inherited)
    descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    while not is_locked(descriptor):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        time.sleep(0.001)  # somebody else is only looking
    os.close(descriptor)
    return None


def is_locked(descriptor: int) -> bool:
    """Whether somebody holds the lock of this open file; looking shares it for an instant."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    return False


def local_path(uri: str) -> Path:
    """A path or `file://` URI as a path. Errors: `BootError` 64 for other schemes."""
    scheme, _, path = uri.rpartition("://")
    if scheme not in ("", "file"):
        raise BootError(CONFIG, f"{uri}: this boot reads paths and file:// only")
    return Path(urllib.parse.unquote(path) if scheme else uri)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def note_process(spec: Spec, state: str) -> None:
    """`<work>/process.json`: who runs here, and how far it is."""
    facts = {"pid": os.getpid(), "pgid": os.getpgrp(), "started": time.time(), "state": state}
    write_json(spec.work / "process.json", facts)


def say(spec: Spec, line: str) -> None:
    """A line of boot's own: to its log, and to the standard output."""
    path = spec.log("boot")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{datetime.now(timezone.utc).strftime(STAMP)} {line}\n")
    with contextlib.suppress(OSError):  # unbuffered: nothing is left to fail at exit
        os.write(1, f"{line}\n".encode())


def leave(spec: Spec, code: int, why: str, cause: str = "") -> None:
    """`<work>/result.json`, the last thing that a boot writes."""
    facts, path = {"exit_code": code, "why": why, "ended": time.time()}, spec.work / "result.json"
    facts |= {"cause": cause} if cause else {}
    try:
        write_json(path, facts)
    except OSError:  # a full disk: the bundle has done its work and makes room
        shutil.rmtree(spec.code, ignore_errors=True)
        write_json(path, facts)


def _listen() -> list[str]:
    """The list to which SIGTERM and SIGINT add a word from now on."""
    asked: list[str] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append("signal"))
    return asked


def _task(environ: Mapping[str, str]) -> str:
    """This node's name among its peers, `workerpool1-0`. Errors: `BootError` 64."""
    try:
        task = json.loads(environ["CLUSTER_SPEC"])["task"]
        name = f"{task['type']}-{task['index']}"
    except (KeyError, ValueError, TypeError) as error:
        what = "nodes: several, but the variable CLUSTER_SPEC does not say which one this is"
        raise BootError(CONFIG, what) from error
    if "/" in name:
        raise BootError(CONFIG, f"CLUSTER_SPEC: task {name!r} is no name")
    return name


def _wrong(raw: Any) -> str:
    """What is wrong with a specification: the first thing; empty when nothing is."""
    if not isinstance(raw, dict) or not isinstance(raw.get("bundle"), dict):
        return "expected a mapping with a mapping `bundle`"
    flat = {**raw, **{f"bundle.{key}": value for key, value in raw["bundle"].items()}}
    for key, kind in _KINDS.items():
        if not isinstance(flat.get(key), kind) or isinstance(flat.get(key), bool):
            return f"{key}: expected {getattr(kind, '__name__', kind)}, got {flat.get(key)!r}"
    if raw["schema"] != 1:
        return f"schema: {raw['schema']}; this boot reads 1"
    if raw["workers"] < 1 or raw["nodes"] < 1:
        return f"{raw['workers']} workers on {raw['nodes']} nodes; allowed: 1 or more of each"
    scheme = raw["root"].rpartition("://")[0]
    if scheme not in ("", "file", *STORES):
        return f"root: {raw['root']}; allowed: a path, file://, gs://, s3://"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
