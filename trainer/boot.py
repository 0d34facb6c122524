"""The one bootstrap, carried by every backend: fetch, verify, run, watch, report, leave.

`python boot.py run SPEC.json` runs a job; `python boot.py worker SPEC.json` is one of its workers
under torchrun; `python boot.py trainer ...` is `python -m trainer ...`, from the bundle alone.
Standard library only, one file, run alone. docs/contracts.md: the specification, what is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
import zlib
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Optional

OK, ERROR, CONFIG, DATA, AGAIN, ENVIRONMENT = 0, 1, 64, 65, 75, 78
#: The worst first: what should not be retried tells more than the peers it took down with it.
_WORST = (DATA, CONFIG, ENVIRONMENT)
_TERMINATED, _KILLED = 128 + signal.SIGTERM, 128 + signal.SIGKILL
STOPPED = "stopped"
#: The descriptor that a starter hands over: it holds the lock already.
LOCK_VARIABLE = "LAUNCH_BOOT_LOCK"
_POLL = 0.2
_STAMP = "%Y-%m-%dT%H:%M:%S.%fZ"
_LONGEST_LINE = 1 << 20
_NUMBER = int | float | None
_KINDS: dict[str, Any] = {
    "schema": int, "run": str, "job": dict, "bundle": dict, "bundle.url": str,
    "bundle.sha256": str, "bundle.bytes": int, "root": str, "work": str, "job_index": int,
    "attempt": int, "workers": int, "nodes": int, "python": str | None, "env": dict | None,
    "secrets": dict | None, "deadline_seconds": _NUMBER, "grace_seconds": _NUMBER,
}  # fmt: skip


class BootError(Exception):
    """One clear line, and the exit code that says whether to try again."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["trainer"]:
        return trainer(arguments[1:])
    if len(arguments) != 2 or arguments[0] not in ("run", "worker"):
        print("error: usage: boot.py run|worker SPEC.json", file=sys.stderr)
        return CONFIG
    try:
        spec = Spec(arguments[1])
        return run(spec) if arguments[0] == "run" else worker(spec)
    except BootError as error:
        code, line = error.code, str(error)
    except OSError as error:  # a work folder that cannot be written
        code, line = ENVIRONMENT, f"{error.filename or arguments[1]}: {error.strerror}"
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code


class Spec:
    """The boot specification, read once. Errors: `BootError` 64, one line."""

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
        self.job, self.bundle, self.root = raw["job"], raw["bundle"], local_path(raw["root"])
        self.work, self.workers = Path(raw["work"]).absolute(), int(raw["workers"])
        self.part = f"{raw['job_index']:02d}-{raw['attempt']:04d}"
        self.python = raw.get("python") or sys.executable
        self.code = self.work / "bundle"
        self.boot = str(Path(__file__).resolve())
        self.command = [self.python, self.boot, "trainer", "run", str(self.work / "job.json")]
        grace, deadline = raw.get("grace_seconds"), raw.get("deadline_seconds")
        self.grace = 600.0 if grace is None else float(grace)
        self.deadline = math.inf if deadline is None else float(deadline)

    def log(self, name: str) -> Path:
        return self.root / "logs" / name / f"{self.part}.log"


def run(spec: Spec) -> int:
    """Run the job once. A second boot of the same work folder leaves at once: the lock or the
    result of the first is there. Returns the worst worker's code."""
    spec.work.mkdir(parents=True, exist_ok=True)
    if take_lock(spec.work) is None:
        return OK
    result = spec.work / "result.json"
    if result.exists():
        return int(json.loads(result.read_text())["exit_code"])
    started = time.time()
    ranks: dict[str, Any] = {}
    try:
        asked = _listen()
        _process(spec, "starting")
        fetch(spec)
        given = environment(spec, os.environ)
        write_json(spec.work / "job.json", spec.job)
        code, why, ranks = _supervise(spec, given, asked)
    except BootError as error:
        code, why = error.code, str(error)
    except OSError as error:
        code, why = ENVIRONMENT, f"{error.filename or spec.work}: {error.strerror}"
    _say(spec, f"exit code {code}: {why}")
    facts = {"exit_code": code, "why": why, "ended": time.time()}
    record = {"v": 1, "job": spec.raw["job_index"], "attempt": spec.raw["attempt"], **facts}
    record.update(started=started, ranks={rank: end["code"] for rank, end in ranks.items()})
    with contextlib.suppress(OSError):
        write_json(spec.root / "attempts" / f"{spec.part}.json", record)
    try:
        write_json(result, facts)
    except OSError:  # a full disk: the bundle has done its work and makes room
        shutil.rmtree(spec.code, ignore_errors=True)
        write_json(result, facts)
    return code


def worker(spec: Spec) -> int:
    """One worker under torchrun: starts the trainer, writes its log and `exit-<rank>.json`."""
    _die_with_parent()
    rank, asked = int(os.environ.get("RANK", 0)), _listen()
    write_json(spec.work / f"worker-{rank}.json", {"pid": os.getpid()})
    process = Pump(spec, spec.command, dict(os.environ), f"worker-{rank}")
    while process.child.poll() is None:
        if asked:
            process.terminate()
        time.sleep(_POLL)
    code = process.finish()
    _note_exit(spec, rank, code, process.said)
    # Whatever its options, torchrun kills the others 30 s after the first has left with a code:
    # where all were asked to leave, each stays until the last has saved.
    while asked and len([*spec.work.glob("exit-*")]) < len([*spec.work.glob("worker-*")]):
        time.sleep(_POLL)
    return code


def trainer(arguments: list[str]) -> int:
    """Run the package `trainer` of the bundle, the first on PYTHONPATH, as the main program."""
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, _BundleOnly)
    sys.argv[1:] = arguments
    runpy.run_module("trainer", run_name="__main__", alter_sys=True)
    return OK


class _BundleOnly:
    """After `PathFinder`: what the bundle lacks, an editable installation must not fill in."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.startswith("trainer."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class Pump:
    """A process in the bundle's folder whose output goes line by line, with the time and without
    secrets, into `logs/<name>/`. Errors: `BootError` 78 when it cannot be started."""

    def __init__(self, spec: Spec, command: list[str], given: dict[str, str], name: str) -> None:
        self.said, self._explained = "", False  # its last `error:` line, else its last line
        self._told: set[int] = set()
        values = "\n".join(given.get(key, "") for key in spec.raw.get("secrets") or {})
        self._secrets = sorted(filter(str.strip, values.splitlines()), key=len, reverse=True)
        path = spec.log(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab")
            self.child = subprocess.Popen(
                command, env=given, cwd=spec.code, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            what = f"cannot start {name}: {error.filename or command[0]}: {error.strerror}"
            raise BootError(ENVIRONMENT, what) from error
        self.thread = threading.Thread(target=self._pump, args=(self.child.stdout,), daemon=True)
        self.thread.start()

    def pids(self) -> set[int]:
        return {self.child.pid}

    def terminate(self) -> None:
        """SIGTERM, once each, to those who can save."""
        for pid in self.pids() - self._told:
            self._told.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def finish(self) -> int:
        """Drain the output; the exit code, 128 + s when signal s ended it."""
        code = self.child.wait()
        self.thread.join(timeout=10)  # a grandchild may still hold the pipe
        return code if code >= 0 else 128 - code

    def _pump(self, pipe: Any) -> None:
        descriptor, rest = pipe.fileno(), b""
        while chunk := os.read(descriptor, 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            self._write(lines)
        if rest:
            self._write([rest])

    def _write(self, lines: list[bytes]) -> None:
        stamp = datetime.now(timezone.utc).strftime(_STAMP)
        out = []
        for line in lines:
            # A progress bar redraws its line: the last state is the line.
            text = line.decode("utf-8", "replace").rstrip("\r").rsplit("\r", 1)[-1]
            for secret in self._secrets:
                text = text.replace(secret, "***")
            out.append(f"{stamp} {text}\n")
            if text.startswith("error: "):
                self.said, self._explained = text[7:], True
            elif text.strip() and not self._explained:
                self.said = text
        with contextlib.suppress(OSError):  # a full disk must not stop the trainer's pipe
            self.file.write("".join(out).encode())
            self.file.flush()


class _Torchrun(Pump):
    """Several workers: torchrun starts this file once for each, as `worker`."""

    def __init__(self, spec: Spec, given: dict[str, str]) -> None:
        self.work = spec.work
        command = [
            spec.python, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "0",
            "--nproc-per-node", str(spec.workers), spec.boot, "worker", str(spec.path),
        ]  # fmt: skip
        super().__init__(spec, command, given, "boot")

    def pids(self) -> set[int]:
        """The workers; before they live, torchrun is all there is to tell."""
        found = {json.loads(path.read_text())["pid"] for path in self.work.glob("worker-*.json")}
        return found or super().pids()


def fetch(spec: Spec) -> None:
    """Put the verified bundle into `<work>/bundle`. `sha256` and `bytes` are those of the tar
    inside the gzip. Errors: `BootError` 78; nothing outside the folder is ever written."""
    url, size, digest = spec.bundle["url"], spec.bundle["bytes"], spec.bundle["sha256"]
    try:
        with gzip.open(local_path(url)) as file:
            data = file.read(size + 1)
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise EOFError(f"not the {size} bytes with sha256 {digest[:12]}")
    except (OSError, EOFError, zlib.error) as error:
        what = getattr(error, "strerror", None) or f"damaged: {error}"
        raise BootError(ENVIRONMENT, f"bundle {url}: {what}") from error
    shutil.rmtree(spec.code, ignore_errors=True)
    unpack(data, spec.code)


def unpack(data: bytes, folder: Path) -> None:
    """Unpack regular files below `folder`. Errors: `BootError` 78 for anything else,
    before the first of them is written."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = tar.getmembers()
            for member in members:
                parts = Path(member.name).parts
                inside = parts and parts[0] != "/" and ".." not in parts
                if not inside or not member.isfile():
                    raise BootError(ENVIRONMENT, f"bundle: refused entry {member.name!r}")
            for member in members:
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) or io.BytesIO() as source:
                    target.write_bytes(source.read())
    except (tarfile.TarError, ValueError) as error:
        raise BootError(ENVIRONMENT, f"bundle: not an archive: {error}") from error


def environment(spec: Spec, environ: Mapping[str, str]) -> dict[str, str]:
    """The trainer's environment. Errors: `BootError` 78 for a secret that is not there."""
    given = {key: str(value) for key, value in (spec.raw.get("env") or {}).items()}
    for name, reference in (spec.raw.get("secrets") or {}).items():
        scheme, _, source = str(reference).partition("://")
        if scheme != "env":
            raise BootError(ENVIRONMENT, f"secret {name}: {scheme}:// is not read here, use env://")
        if source not in environ:
            raise BootError(ENVIRONMENT, f"secret {name}: the variable {source} is not set")
        given[name] = environ[source]
    # First on sys.path: before an installed `trainer`, and without PYTHONSAFEPATH's leave.
    paths = [str(spec.code), {**environ, **given}.get("PYTHONPATH", "")]
    fixed = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LAUNCH_RUN": spec.raw["run"],
        "LAUNCH_ATTEMPT": str(spec.raw["attempt"]),
    }
    return {**environ, **given, **fixed}


def verdict(
    ranks: Mapping[str, Mapping[str, Any]], workers: int, reason: str, killed: bool
) -> tuple[int, str]:
    """boot's exit code and why, from how each rank ended (`code`, `error`). `reason`: why they
    were asked to leave, if they were; `killed`: they did not, within the grace."""
    codes = [int(end["code"]) for end in ranks.values()]
    if len(codes) < workers:  # a worker left without a word
        codes.append(_KILLED if killed else _TERMINATED if reason else ERROR)
    code = worst(codes)
    # Terminated: it was asked before it could listen, and had nothing to save; its peers may have
    # stumbled over that.
    gently = code in (OK, AGAIN) or (code not in _WORST and _TERMINATED in codes)
    if reason and gently and not killed:
        if reason == STOPPED:
            return OK, reason
        return (AGAIN, reason) if code else (OK, "ended")
    if code == OK:
        return OK, "ended"
    if killed and code not in _WORST:
        return code, f"{reason}, and killed because it had not left in time"
    for rank, end in ranks.items():
        if end["code"] == code:
            return code, f"worker {rank}: {end['error'] or f'exit code {code}'}"
    return code, "a worker left without a word"


def worst(codes: list[int]) -> int:
    """The code that says most: 65, 64, 78, then any failure (1 first), then 75, then 0."""
    for code in _WORST:
        if code in codes:
            return code
    return min((code for code in codes if code not in (OK, AGAIN)), default=max(codes))


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


def _supervise(spec: Spec, given: dict[str, str], asked: list[str]) -> tuple[int, str, Any]:
    """Start the workers; end them when something asks. Returns code, why, and each rank's end."""
    ends_at = time.monotonic() + spec.deadline
    if reason := _asked(spec, asked, ends_at):
        return (OK if reason == STOPPED else AGAIN), reason, {}
    for old in [*spec.work.glob("exit-*.json"), *spec.work.glob("worker-*.json")]:
        old.unlink()
    single = spec.workers == 1
    group = Pump(spec, spec.command, given, "worker-0") if single else _Torchrun(spec, given)
    with contextlib.suppress(OSError):
        _process(spec, "running")
    asked_at, killed = 0.0, False
    while group.child.poll() is None:
        with contextlib.suppress(OSError):  # a full disk must not end the job
            (spec.work / "heartbeat").touch()
        now = time.monotonic()
        if not reason:
            reason, asked_at = _asked(spec, asked, ends_at), now
            if reason:
                _say(spec, f"{reason}: the trainer is asked to save and leave")
        if reason and not killed:
            group.terminate()  # again: workers may only just have come to life
            killed = now - asked_at > spec.grace
            if killed:
                _say(spec, f"still running {spec.grace:g} s later: killed")
                os.killpg(group.child.pid, signal.SIGKILL)  # torchrun's workers die with it
        time.sleep(_POLL)
    code = group.finish()
    if single:
        _note_exit(spec, 0, code, group.said)
    ends = [json.loads(path.read_text()) for path in spec.work.glob("exit-*.json")]
    ranks = {str(end["rank"]): end for end in sorted(ends, key=lambda end: int(end["rank"]))}
    code, why = verdict(ranks, spec.workers, reason, killed)
    if not ranks and code == ERROR:  # torchrun itself could not
        code = ENVIRONMENT if "No module named" in group.said else ERROR
        why = f"torchrun: {group.said}"
    return code, why, ranks


def _asked(spec: Spec, asked: list[str], ends_at: float) -> str:
    """Why the trainer should leave: the marker, the deadline, a signal; empty: it should not."""
    if (spec.root / "control" / "stop.json").exists():
        return STOPPED
    if time.monotonic() > ends_at:
        return "deadline"
    return asked[0] if asked else ""


def _note_exit(spec: Spec, rank: int, code: int, error: str) -> None:
    write_json(spec.work / f"exit-{rank}.json", {"rank": rank, "code": code, "error": error})


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
    if raw["workers"] < 1 or raw["nodes"] != 1:
        return f"{raw['workers']} workers on {raw['nodes']} nodes; allowed: 1 or more on 1"
    return ""


def _process(spec: Spec, state: str) -> None:
    facts = {"pid": os.getpid(), "pgid": os.getpgrp(), "started": time.time(), "state": state}
    write_json(spec.work / "process.json", facts)


def _listen() -> list[str]:
    """The list to which SIGTERM and SIGINT add a word from now on."""
    asked: list[str] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append("signal"))
    return asked


def _die_with_parent() -> None:
    """Linux: when the parent is killed, so is this process; nobody would watch it any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _say(spec: Spec, line: str) -> None:
    path = spec.log("boot")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{datetime.now(timezone.utc).strftime(_STAMP)} {line}\n")
    with contextlib.suppress(OSError):  # unbuffered: nothing is left to fail at exit
        os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
