"""The one bootstrap, carried by every backend: fetch, verify, run, watch, report, leave.

`python boot.py run SPEC.json` runs a job; `python boot.py worker SPEC.json` is one of its workers
under torchrun. Standard library only, one file, run alone: it imports nothing of the project.
docs/contracts.md holds the specification and what is written where.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Optional

OK, ERROR, CONFIG, DATA, AGAIN, ENVIRONMENT = 0, 1, 64, 65, 75, 78
#: The worst first: what should not be retried tells more than the peers it took down with it.
_WORST = (DATA, CONFIG, ENVIRONMENT)
_TERMINATED = 128 + signal.SIGTERM
_POLL, _HEARTBEAT = 0.2, 5.0
_PR_SET_PDEATHSIG = 1


class BootError(Exception):
    """One clear line, and the exit code that says whether to try again."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("run", "worker"):
        print("usage: boot.py run|worker SPEC.json", file=sys.stderr)
        return CONFIG
    try:
        spec = Spec(arguments[1])
        return run(spec) if arguments[0] == "run" else worker(spec)
    except BootError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.code


class Spec:
    """The boot specification, read once."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).resolve()
        try:
            raw = json.loads(self.path.read_text())
            self.job, self.bundle, self.root = raw["job"], raw["bundle"], local_path(raw["root"])
            self.work = Path(raw["work"])
            self.part = f"{raw['job_index']:02d}-{raw['attempt']:04d}"
            self.workers, self.nodes = int(raw["workers"]), int(raw["nodes"])
        except OSError as error:
            raise BootError(CONFIG, f"{path}: {error.strerror}") from error
        except KeyError as error:
            raise BootError(CONFIG, f"{path}: missing key {error}") from error
        except (ValueError, TypeError) as error:
            raise BootError(CONFIG, f"{path}: {error}") from error
        if self.nodes != 1:
            raise BootError(CONFIG, f"{path}: nodes is {self.nodes}; this boot starts one node")
        self.raw: dict[str, Any] = raw
        self.python = raw.get("python") or sys.executable
        self.code = self.work / "bundle"
        self.grace = float(raw.get("grace_seconds") or 600)

    @property
    def command(self) -> list[str]:
        """The trainer; `command` replaces what comes after the interpreter."""
        default = ["-m", "trainer", "run", str(self.work / "job.json")]
        return [self.python, *self.raw.get("command", default)]

    def log(self, name: str) -> Path:
        return self.root / "logs" / name / f"{self.part}.log"


def run(spec: Spec) -> int:
    """Run the job once. A second boot of the same work folder leaves at once: the lock or the
    result of the first is there. Returns the worst worker's code."""
    spec.work.mkdir(parents=True, exist_ok=True)
    lock = (spec.work / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return OK
    result = spec.work / "result.json"
    if result.exists():
        return int(json.loads(result.read_text())["exit_code"])
    started = time.time()
    _process(spec, "starting")
    asked: list[str] = []
    ranks: dict[str, Any] = {}
    with _signals(asked):
        try:
            fetch(spec)
            environment = _environment(spec)
            write_json(spec.work / "job.json", spec.job)
            code, why, ranks = _supervise(spec, environment, asked)
        except BootError as error:
            code, why = error.code, str(error)
        except OSError as error:
            code, why = ENVIRONMENT, f"{error.filename or spec.work}: {error.strerror}"
    _say(spec, f"exit code {code}: {why}")
    facts = {"exit_code": code, "why": why, "ended": time.time()}
    record = {"v": 1, "job": spec.raw["job_index"], "attempt": spec.raw["attempt"], **facts}
    with contextlib.suppress(OSError):  # a full disk must not hide the result
        write_json(
            spec.root / "attempts" / f"{spec.part}.json",
            {**record, "started": started, "ranks": {r: v["code"] for r, v in ranks.items()}},
        )
    write_json(result, facts)
    return code


def worker(spec: Spec) -> int:
    """One worker under torchrun: starts the trainer, writes its log and `exit-<rank>.json`."""
    _die_with_parent()
    rank = int(os.environ["RANK"])
    asked: list[str] = []
    with _signals(asked):
        write_json(spec.work / f"worker-{rank}.json", {"pid": os.getpid()})
        pumped = Pumped(spec, rank, dict(os.environ))
        sent = 0
        while pumped.poll() is None:
            if len(asked) > sent:
                sent = len(asked)
                pumped.terminate()
            time.sleep(_POLL)
    return int(pumped.finish()["code"])


class Pumped:
    """A trainer process whose output goes line by line, with the time, into its log part."""

    def __init__(self, spec: Spec, rank: int, environment: dict[str, str]) -> None:
        self.spec, self.rank = spec, rank
        self.error = self.last = ""
        path = spec.log(f"worker-{rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab")
        try:
            self.child = subprocess.Popen(
                spec.command, env=environment, cwd=spec.code, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent,
            )  # fmt: skip
        except OSError as error:
            raise BootError(
                ENVIRONMENT, f"cannot start {spec.command[0]}: {error.strerror}"
            ) from error
        assert self.child.stdout is not None
        self.thread = threading.Thread(target=self._pump, args=(self.child.stdout,), daemon=True)
        self.thread.start()

    def poll(self) -> Optional[int]:
        return self.child.poll()

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(signal.SIGTERM)

    def finish(self) -> dict[str, Any]:
        """Drain the output and record how it ended; a signal s is code 128 + s."""
        code = self.child.wait()
        self.thread.join(timeout=10)  # a grandchild may still hold the pipe
        facts = {
            "rank": self.rank,
            "code": code if code >= 0 else 128 - code,
            "error": self.error or self.last if code else "",
        }
        write_json(self.spec.work / f"exit-{self.rank}.json", facts)
        return facts

    def _pump(self, pipe: Any) -> None:
        descriptor, rest = pipe.fileno(), b""
        while chunk := os.read(descriptor, 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            self._write(lines)
        if rest:
            self._write([rest])

    def _write(self, lines: list[bytes]) -> None:
        stamp = _now()
        out = []
        for line in lines:
            # A progress bar redraws its line: the last state is the line.
            text = line.decode("utf-8", "replace").rstrip("\r").rsplit("\r", 1)[-1]
            out.append(f"{stamp} {text}\n")
            self.last = text or self.last
            if text.startswith("error: "):
                self.error = text[7:]
        with contextlib.suppress(OSError):  # a full disk must not stop the trainer's pipe
            self.file.write("".join(out).encode())
            self.file.flush()


def fetch(spec: Spec) -> None:
    """Put the verified bundle into `<work>/bundle`. Its name is the sha256 of the tar inside the
    gzip. Errors: `BootError`; nothing outside the folder is ever written."""
    url = str(spec.bundle["url"])
    try:
        data = gzip.decompress(local_path(url).read_bytes())
    except OSError as error:
        raise BootError(ENVIRONMENT, f"bundle {url}: {error.strerror or error}") from error
    except EOFError as error:
        raise BootError(ENVIRONMENT, f"bundle {url}: cut short") from error
    found = hashlib.sha256(data).hexdigest()
    if found != spec.bundle["sha256"] or len(data) != spec.bundle["bytes"]:
        raise BootError(
            ENVIRONMENT,
            f"bundle {url}: is {found[:12]} of {len(data)} bytes,"
            f" wanted {spec.bundle['sha256'][:12]} of {spec.bundle['bytes']}",
        )
    shutil.rmtree(spec.code, ignore_errors=True)
    unpack(io.BytesIO(data), spec.code)


def unpack(archive: BinaryIO, folder: Path) -> None:
    """Unpack regular files and folders below `folder`. Errors: `BootError` for anything else."""
    with tarfile.open(fileobj=archive) as tar:
        members = tar.getmembers()
        for member in members:
            path = Path(member.name)
            if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise BootError(ENVIRONMENT, f"bundle: refused entry {member.name!r}")
        for member in members:
            target = folder / member.name
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None
            target.write_bytes(source.read())


def local_path(uri: str) -> Path:
    """A path or `file://` URI as a path. Errors: `BootError` for other schemes."""
    if "://" not in uri:
        return Path(uri)
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme != "file":
        raise BootError(CONFIG, f"{uri}: this boot reads paths and file:// only")
    return Path(urllib.parse.unquote(parts.path))


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def start_ticks(pid: int) -> Optional[int]:
    """When a process started, in clock ticks since boot: pids come back, this does not. None when
    it is gone, or dead and only not yet reaped by its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _supervise(
    spec: Spec, environment: dict[str, str], asked: list[str]
) -> tuple[int, str, dict[str, Any]]:
    """Start the workers, wait for them, and end them when the marker, the deadline or a signal
    asks. Returns the code, why, and each rank's end."""
    for old in [*spec.work.glob("exit-*.json"), *spec.work.glob("worker-*.json")]:
        old.unlink()
    group = Pumped(spec, 0, environment) if spec.workers == 1 else _Torchrun(spec, environment)
    _process(spec, "running")
    deadline = spec.raw.get("deadline_seconds")
    ends_at = None if deadline is None else time.monotonic() + float(deadline)
    reason, killed_at, beat = "", None, 0.0
    while group.poll() is None:
        now = time.monotonic()
        if now - beat >= _HEARTBEAT:
            beat = now
            (spec.work / "heartbeat").touch()
        if not reason:
            reason = _asked(spec, asked, ends_at)
            if reason:
                _say(spec, f"{reason}: the trainer is asked to save and leave")
                group.terminate()
                killed_at = now + spec.grace
        elif killed_at is not None and now > killed_at:
            _say(spec, f"still running {spec.grace:g} s later: killed")
            _kill_descendants()
            killed_at = None
        time.sleep(_POLL)
    group.finish()
    ranks = _ranks(spec)
    code = worst([end["code"] for end in ranks.values()] or [ERROR])
    if reason and code in (OK, AGAIN, _TERMINATED):
        # Terminated: it was asked before it could listen, and had nothing to save.
        return (OK if reason == "stopped" else AGAIN if code else OK), reason, ranks
    if len(ranks) < spec.workers:
        return max(code, ERROR), "a worker left without a word; see its log", ranks
    if code == OK:
        return OK, "ended", ranks
    rank, end = next((rank, end) for rank, end in ranks.items() if end["code"] == code)
    return code, f"worker {rank}: {end['error'] or 'exit code ' + str(code)}", ranks


class _Torchrun:
    """Several workers: torchrun starts this file once for each, as `worker`."""

    def __init__(self, spec: Spec, environment: dict[str, str]) -> None:
        self.spec = spec
        path = spec.log("boot")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without it torchrun kills its workers 30 s after the first of them leaves.
        environment = {**environment, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(spec.grace))}
        self.child = subprocess.Popen(
            [spec.python, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "0",
             "--nproc-per-node", str(spec.workers), str(Path(__file__).resolve()), "worker",
             str(spec.path)],
            env=environment, cwd=spec.code, stdin=subprocess.DEVNULL, stdout=path.open("ab"),
            stderr=subprocess.STDOUT, preexec_fn=_die_with_parent,
        )  # fmt: skip

    def poll(self) -> Optional[int]:
        return self.child.poll()

    def terminate(self) -> None:
        """Ask the workers themselves: torchrun would turn their codes into its own."""
        found = list(self.spec.work.glob("worker-*.json"))
        for path in found:
            with contextlib.suppress(OSError, ValueError):
                os.kill(json.loads(path.read_text())["pid"], signal.SIGTERM)
        if not found:
            self.child.send_signal(signal.SIGTERM)

    def finish(self) -> None:
        self.child.wait()


def worst(codes: list[int]) -> int:
    """The code that says most: 65, 64, 78, then any failure, then 75, then 0."""
    for code in _WORST:
        if code in codes:
            return code
    failures = [code for code in codes if code not in (OK, AGAIN)]
    return min(failures) if failures else max(codes)


def _asked(spec: Spec, asked: list[str], ends_at: Optional[float]) -> str:
    if (spec.root / "control" / "stop.json").exists():
        return "stopped"
    if ends_at is not None and time.monotonic() > ends_at:
        return "deadline"
    return asked[0] if asked else ""


def _ranks(spec: Spec) -> dict[str, Any]:
    found = {}
    for path in spec.work.glob("exit-*.json"):
        facts = json.loads(path.read_text())
        found[str(facts["rank"])] = facts
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def _environment(spec: Spec) -> dict[str, str]:
    """The trainer's environment. Errors: `BootError` for a secret that is not there."""
    given = dict(spec.raw.get("env") or {})
    for name, reference in (spec.raw.get("secrets") or {}).items():
        scheme, _, source = str(reference).partition("://")
        if scheme != "env":
            raise BootError(ENVIRONMENT, f"secret {name}: {scheme}:// is not read here, use env://")
        if source not in os.environ:
            raise BootError(ENVIRONMENT, f"secret {name}: the variable {source} is not set")
        given[name] = os.environ[source]
    paths = [str(spec.code), os.environ.get("PYTHONPATH", "")]
    fixed = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LAUNCH_RUN": str(spec.raw.get("run", "")),
        "LAUNCH_ATTEMPT": str(spec.raw["attempt"]),
    }
    return {**os.environ, **given, **fixed}


def _process(spec: Spec, state: str) -> None:
    pid = os.getpid()
    write_json(
        spec.work / "process.json",
        {"pid": pid, "pgid": os.getpgid(pid), "started": time.time(), "state": state,
         "start_ticks": start_ticks(pid), "boot_id": boot_id()},
    )  # fmt: skip


@contextlib.contextmanager
def _signals(asked: list[str]) -> Iterator[None]:
    def note(number: int, frame: object) -> None:
        asked.append("signal")

    previous = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Linux: when the parent is killed, so is this process; nobody would watch it any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_descendants() -> None:
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Pids of the processes below `pid`, also in other sessions (torchrun makes new ones)."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found: list[int] = []
    queue = list(children.get(pid, []))
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return found


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _say(spec: Spec, line: str) -> None:
    path = spec.log("boot")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{_now()} {line}\n")
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
