"""Jobs on this machine: detached processes that outlive the terminal, started through boot from the
unpacked bundle, exactly as a cloud would.

A job's folder is `$LAUNCH_HOME/local/<job name>-a<attempt>/`; boot holds its lock and writes what
happened (docs/contracts.md), so nothing is remembered here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from launcher.backends.base import (
    Capabilities,
    Check,
    Env,
    Held,
    Intent,
    JobHandle,
    JobSpec,
    Line,
    LogQuery,
    Offer,
    Phase,
    Plan,
    Ref,
    Seen,
)
from launcher.backends.local_logs import read_parts
from launcher.errors import BadRequest, NoCapacity
from trainer import boot

if TYPE_CHECKING:
    from launcher.spec import Hardware

PLACE = "this machine"
KIND = "process"
_MEANING = {64: "configuration", 65: "data", 75: "ended before its last step", 78: "environment"}


class LocalBackend:
    """The backend `local`. It costs nothing and has the capacity of this machine."""

    name = "local"
    can = Capabilities(follow=True, exec=True, idempotent_create=True)

    def check(self, env: Env) -> Iterable[Check]:
        yield _python(env)
        free = shutil.disk_usage(_existing(env.home)).free / 1e9
        if free > 5:
            yield Check("local disk", "pass", f"{free:.0f} GB free")
        else:
            fix = f"free some space under {env.home}, or set LAUNCH_HOME"
            yield Check("local disk", "warn", f"{free:.1f} GB free", fix)
        found = _gpus()
        yield Check("local gpu", "pass" if found else "skip", ", ".join(found) or "none")

    def offers(self, spec: Hardware, env: Env) -> Iterable[Offer]:
        """One free offer. `cpu:N` is N workers; other accelerators must be in this machine."""
        if spec.nodes > 1:
            raise BadRequest("hardware.nodes", "the local backend has one machine")
        kind, _, count = spec.accelerator.partition(":")
        if kind.lower() != "cpu":
            found = [gpu for gpu in _gpus() if kind.lower().split("-")[0] in gpu.lower()]
            if len(found) < int(count or 1):
                have = ", ".join(_gpus()) or "no GPU"
                raise NoCapacity(PLACE, f"it has {have}; the recipe asks for {spec.accelerator}")
        yield Offer(self.name, PLACE, spec.accelerator, usd_per_hour=0.0)

    def plan(self, spec: JobSpec, offer: Offer) -> Plan:
        request = {
            "argv": [spec.boot["python"], "boot.py", "run", "boot.json"],
            "boot": spec.boot,
            "labels": spec.labels,
        }
        intent = Intent(KIND, f"{spec.name}-a${{attempt}}", offer.place, request, billable=False)
        return Plan(offer, (intent,))

    def create(self, intent: Intent, env: Env) -> Ref:
        """Start boot. Starting it twice is harmless: the second finds the lock or the result."""
        spec = intent.request["boot"]
        work = Path(spec["work"])
        ref = Ref(self.name, KIND, intent.name, intent.place, spec["run"], intent.billable,
                  {"work": str(work)})  # fmt: skip
        if _lives(work) or (work / "result.json").exists():
            return ref
        try:
            work.mkdir(parents=True, exist_ok=True)
            boot.write_json(work / "boot.json", spec)
            shutil.copyfile(Path(boot.__file__), work / "boot.py")
            labels = intent.request["labels"]
            marks = {key.upper().replace("-", "_"): str(value) for key, value in labels.items()}
            with (work / "boot.out").open("ab") as out:
                subprocess.Popen(
                    intent.request["argv"], cwd=work, env={**env.environ, **marks},
                    stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            what = f"cannot start {intent.request['argv'][0]} in {work}: {error.strerror}"
            raise BadRequest("hardware.local", what) from error
        return ref

    def observe(self, job: JobHandle, env: Env) -> Seen:
        if not job.refs:
            return Seen(Phase.LOST, why="no process was started")
        work = Path(job.refs[-1].data["work"])
        alive = _lives(work) or bool(_processes(work))
        held = tuple((ref, Held.LIVE if alive else Held.GONE) for ref in job.refs)
        result = _read(work / "result.json")
        if result is not None:
            return _ended(result, work, held)
        process = _read(work / "process.json")
        if alive:
            running = process is not None and process.get("state") == "running"
            return Seen(Phase.RUNNING if running else Phase.STARTING, held, raw="alive")
        if process is not None:
            return Seen(Phase.LOST, held, "boot was killed before it could say how the job ended")
        said = _last_line(work / "boot.out")
        if said:
            return Seen(Phase.FAILED, held, f"boot could not start: {said}", boot.ENVIRONMENT)
        return _not_yet(work, held, env)

    def logs(self, job: JobHandle, query: LogQuery, env: Env) -> Iterator[Line]:
        return read_parts(Path(job.root) / "logs", job, query)

    def stop(self, job: JobHandle, env: Env, grace: float) -> None:
        """Hurry: boot also polls the marker, which the engine has written."""
        for ref in job.refs:
            pid = _boot_pid(Path(ref.data["work"]))
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def delete(self, ref: Ref, env: Env) -> Held:
        """First call: SIGTERM to boot, which lets the trainer save. Later calls, a minute on:
        SIGKILL to all that is left."""
        work = Path(ref.data["work"])
        asked = work / "deleting"
        left = _processes(work)
        if not left and not _lives(work):
            return Held.GONE
        now = env.clock.now()
        if not asked.exists():
            asked.write_text(str(now))
            self._signal(left, signal.SIGTERM)
        elif now - float(asked.read_text() or 0) > 60:
            self._signal(left, signal.SIGKILL)
        return Held.DELETING

    def sweep(self, env: Env) -> Iterator[Ref]:
        """Jobs under $LAUNCH_HOME/local with a process that lives."""
        for work in sorted((env.home / "local").glob("*")):
            spec = _read(work / "boot.json")
            if spec is None or spec.get("owner") != env.owner:
                continue
            if _lives(work) or _processes(work):
                yield Ref(self.name, KIND, work.name, PLACE, spec["run"], False,
                          {"work": str(work)})  # fmt: skip

    def exec(self, job: JobHandle, worker: int, argv: Sequence[str], env: Env) -> int:
        """Run a command in the job's folder and environment; its exit code."""
        if worker != 0:
            raise BadRequest("--worker", "a local job has one machine, worker 0")
        spec = _read(Path(job.refs[-1].data["work"]) / "boot.json") or {}
        folder = Path(job.refs[-1].data["work"])
        return subprocess.run(
            list(argv), cwd=folder, env={**env.environ, **spec.get("env", {})}, check=False
        ).returncode

    def _signal(self, pids: list[int], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _ended(result: Mapping[str, Any], work: Path, held: tuple[tuple[Ref, Held], ...]) -> Seen:
    """boot's result as a phase: success is exit 0 and every stage completed."""
    code, why = int(result["exit_code"]), str(result["why"])
    if code == boot.OK:
        at = _unfinished(_read(work / "job.json") or {})
        if at is None:
            return Seen(Phase.SUCCEEDED, held, exit_code=code)
        return Seen(Phase.CANCELLED, held, at, code)
    if code == boot.AGAIN:
        return Seen(Phase.PREEMPTED, held, why, code)
    meaning = _MEANING.get(code)
    return Seen(Phase.FAILED, held, why + (f" ({meaning})" if meaning else ""), code)


def _unfinished(job: Mapping[str, Any]) -> Optional[str]:
    """Where the first stage that is not completed stands; None: all are."""
    for stage in job.get("stages", []):
        meta = _read(Path(stage["output"]) / "run_meta.json") or {}
        if meta.get("completed"):
            continue
        if meta.get("stopped") == "until":
            return f"{stage['id']}: paused at step {meta.get('global_step')} (train.until)"
        at = meta.get("global_step")
        return f"{stage['id']}: stopped" + (f" at step {at}" if at is not None else "")
    return None


def _not_yet(work: Path, held: tuple[tuple[Ref, Held], ...], env: Env) -> Seen:
    """Started, but it has not taken its lock yet; after half a minute it never will."""
    try:
        age = env.clock.now() - (work / "boot.json").stat().st_mtime
    except OSError:
        return Seen(Phase.LOST, held, "its folder is gone")
    if age < 30:
        return Seen(Phase.STARTING, tuple((ref, Held.CREATING) for ref, _ in held))
    return Seen(Phase.LOST, held, "boot never started")


def _lives(work: Path) -> bool:
    """Whether boot holds its lock."""
    try:
        with (work / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _boot_pid(work: Path) -> Optional[int]:
    """boot's pid, if that process is still the one that wrote it."""
    process = _read(work / "process.json")
    if process is None or process.get("boot_id") != boot.boot_id():
        return None
    pid = int(process["pid"])
    ticks = boot.start_ticks(pid)
    return pid if ticks is not None and ticks == process.get("start_ticks") else None


def _processes(work: Path) -> list[int]:
    """boot, its descendants, and what carries this folder in its command line after boot died."""
    pid = _boot_pid(work)
    if pid is not None:
        return [pid, *boot.descendants(pid)]
    found = []
    needle = str(work).encode() + b"/"
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or it is somebody else's
            ours = b"LAUNCH_RUN=" in (path / "environ").read_bytes()
            if ours and needle in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def _python(env: Env) -> Check:
    """Whether the interpreter of local jobs has the trainer's packages; asks it, imports none."""
    script = (
        "import importlib.util as u, sys;"
        "sys.exit(', '.join(n for n in ('torch','transformers','tokenizers','safetensors')"
        " if u.find_spec(n) is None) or 0)"
    )
    try:
        done = subprocess.run(
            [env.python, "-c", script], capture_output=True, text=True, check=False, timeout=60
        )
    except OSError as error:
        return Check("local python", "fail", f"{env.python}: {error.strerror}")
    if done.returncode == 0:
        return Check("local python", "pass", env.python)
    missing = done.stderr.strip().splitlines()[-1:] or ["?"]
    return Check(
        "local python", "fail", f"{env.python} lacks {missing[0]}",
        "pip install 'launch-llm[train]'",
    )  # fmt: skip


def _gpus() -> list[str]:
    """Names of this machine's GPUs, from the driver's own tool."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [line.partition(": ")[2].partition(" (")[0] for line in lines if line.startswith("GPU")]


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _last_line(path: Path) -> str:
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].removeprefix("error: ") if lines else ""


def _read(path: Path) -> Optional[dict[str, Any]]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
