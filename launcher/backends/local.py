"""Jobs on this machine: detached processes that outlive the terminal, started through boot from the
unpacked bundle, exactly as a cloud would.

A job's folder is `$LAUNCH_HOME/local/<job name>-a<attempt>/`; boot writes there what happened
(docs/contracts.md), so nothing is remembered here. Its lock, held without a gap from `create` to
boot's end, tells that boot lives and that the pid in process.json is boot's. What boot started may
outlive it: `LAUNCH_WORK=<folder>` in the environment marks it, and no reused pid carries that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from launcher import hardware, retry
from launcher.artifacts import is_remote
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
from launcher.spec import OWN_PRICE
from trainer import boot

if TYPE_CHECKING:
    from launcher.spec import Hardware

PLACE = "this machine"
KIND = "process"
_MARK = "LAUNCH_WORK"
#: Seconds between asking a job to leave, in `delete`, and killing it.
_PATIENCE = 60.0
_MEANING = {
    6: "smoke test",
    64: "configuration",
    65: "data",
    75: "ended before its last step",
    78: "environment",
}


class LocalBackend:
    """The backend `local`. It has the capacity of this machine, and costs nothing but what the
    recipe says that it does."""

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
        """One offer. `cpu:N` is N workers; other accelerators must be in this machine."""
        if spec.nodes > 1:
            raise BadRequest("hardware.nodes", "the local backend has one machine")
        try:
            asked = hardware.parse(spec.accelerator)
        except ValueError as error:
            raise BadRequest("hardware.accelerator", str(error)) from error
        if asked.kind.vendor != "cpu":
            here = _gpus()
            if sum(_is(asked.kind.name, gpu) for gpu in here) < asked.count:
                have = ", ".join(here) or "no GPU"
                raise NoCapacity(PLACE, f"it has {have}; the recipe asks for {spec.accelerator}")
        rate = spec.own_rate
        source = "" if rate is None else OWN_PRICE
        yield Offer(self.name, PLACE, spec.accelerator, usd_per_hour=rate or 0.0,
                    price_source=source)  # fmt: skip

    def plan(self, spec: JobSpec, offer: Offer) -> Plan:
        request = {
            "argv": [spec.boot["python"], "boot.py", "run", "boot.json"],
            "boot": spec.boot,
            "labels": spec.labels,
        }
        intent = Intent(KIND, f"{spec.name}-a${{attempt}}", offer.place, request, billable=False)
        return Plan(offer, (intent,))

    def create(self, intent: Intent, env: Env) -> Ref:
        """Start boot once: a job that lives, or has begun, is adopted. Errors: `BadRequest`."""
        spec = intent.request["boot"]
        work = Path(spec["work"])
        argv = intent.request["argv"]
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = boot.take_lock(work)
            if lock is not None:
                try:
                    if not (work / "process.json").exists():
                        _start(argv, spec, intent.request["labels"], lock, env)
                finally:
                    os.close(lock)  # boot has its own
        except OSError as error:
            what = f"cannot start {argv[0]} in {work}: {error.filename}: {error.strerror}"
            raise BadRequest("hardware.local", what) from error
        return _ref(intent.name, spec["run"], work)

    def observe(self, job: JobHandle, env: Env) -> Seen:
        if not job.refs:
            return Seen(Phase.LOST, why="no process was started")
        work = Path(job.refs[-1].data["work"])
        boot_lives = _locked(work)
        state = Held.LIVE if boot_lives or _processes(work) else Held.GONE
        held = tuple((ref, state) for ref in job.refs)
        result = _read(work / "result.json")
        if result is not None:
            return replace(_ended(result, work, held), ended=_number(result.get("ended")))
        process = _read(work / "process.json")
        if boot_lives:
            running = process is not None and process.get("state") == "running"
            return Seen(Phase.RUNNING if running else Phase.STARTING, held)
        if process is not None:
            why = "boot was killed before it could say how the job ended"
            return Seen(Phase.LOST, held, why, ended=_last_beat(work))
        said = _last_line(work / "boot.out")
        if said:
            return Seen(Phase.FAILED, held, f"boot could not start: {said}", boot.ENVIRONMENT)
        return Seen(Phase.LOST, held, "boot was killed before the job began")

    def logs(self, job: JobHandle, query: LogQuery, env: Env) -> Iterator[Line]:
        if not is_remote(job.root):
            return read_parts(boot.local_path(job.root) / "logs", job, query)
        # Boot works in a folder of its own, which it mirrors to the store.
        works = [Path(ref.data["work"]) for ref in job.refs[-1:]]
        return chain.from_iterable(read_parts(w / "artifacts" / "logs", job, query) for w in works)

    def stop(self, job: JobHandle, env: Env, grace: float) -> None:
        """Hurry: boot also polls the marker, which the engine has written."""
        for ref in job.refs:
            pid = _boot_pid(Path(ref.data["work"]))
            if pid is not None:
                _signal(pid, signal.SIGTERM)

    def delete(self, ref: Ref, env: Env) -> Held:
        """Ask boot to leave, so that the trainer can save; a minute later, kill what is left."""
        work = Path(ref.data["work"])
        if not _lives(work):
            return Held.GONE
        boot_pid, asked = _boot_pid(work), work / "deleting"
        now = env.clock.now()
        try:
            since: Optional[float] = float(asked.read_text())
        except (OSError, ValueError):
            since = None
        if since is None and boot_pid is not None and _signal(boot_pid, signal.SIGTERM):
            with contextlib.suppress(OSError):  # a full disk: then it is asked again
                asked.write_text(str(now))
        elif since is None or boot_pid is None or now - since > _PATIENCE:
            for pid in _processes(work):  # nobody listens (any more), or long enough
                _signal(pid, signal.SIGKILL)
        return Held.DELETING

    def sweep(self, env: Env) -> Iterator[Ref]:
        """The owner's jobs under $LAUNCH_HOME/local that live, also those whose folder is gone."""
        home = (env.home / "local").absolute()
        alive = {work: labels for labels in _marked().values() if (work := _within(home, labels))}
        for work in sorted({*home.glob("*"), *alive}):
            spec, labels = _read(work / "boot.json") or {}, alive.get(work, {})
            owner = spec.get("owner", labels.get("LAUNCH_OWNER"))
            run = spec.get("run", labels.get("LAUNCH_RUN"))
            if owner == env.owner and run and (work in alive or _locked(work)):
                yield _ref(work.name, run, work)

    def exec(self, job: JobHandle, worker: int, argv: Sequence[str], env: Env) -> int:
        """Run a command in the trainer's folder and environment; its exit code."""
        if worker != 0:
            raise BadRequest("--worker", "a local job has one machine, worker 0")
        if not job.refs:
            raise BadRequest(job.name, "was not started: there is nothing to run a command in")
        work = Path(job.refs[-1].data["work"])
        try:
            spec = boot.Spec(str(work / "boot.json"))
            given = boot.environment(spec, env.environ)
            return subprocess.run(list(argv), cwd=spec.code, env=given, check=False).returncode
        except boot.BootError as error:
            raise BadRequest(job.name, str(error)) from error
        except OSError as error:
            raise BadRequest("command", f"{error.filename}: {error.strerror}") from error


def _start(
    argv: Sequence[str], spec: Mapping[str, Any], labels: Mapping[str, str], lock: int, env: Env
) -> None:
    """Detach boot. It inherits the lock, so that there is no moment without one."""
    work = Path(spec["work"])
    boot.write_json(work / "boot.json", spec)
    # An earlier boot that was killed here may have workers that still read it: replace it whole.
    shutil.copyfile(boot.__file__, work / ".boot.py")
    (work / ".boot.py").replace(work / "boot.py")
    marks = {key.upper().replace("-", "_"): str(value) for key, value in labels.items()}
    given = {**env.environ, **marks, _MARK: str(work), boot.LOCK_VARIABLE: str(lock)}
    with (work / "boot.out").open("ab") as out:
        subprocess.Popen(
            argv, cwd=work, env=given, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True, pass_fds=(lock,),
        )  # fmt: skip


def _ref(name: str, run: str, work: Path) -> Ref:
    return Ref(LocalBackend.name, KIND, name, PLACE, run, False, {"work": str(work)})


def _ended(result: Mapping[str, Any], work: Path, held: tuple[tuple[Ref, Held], ...]) -> Seen:
    """boot's result as a phase: success is exit 0 and every stage completed."""
    code, why = int(result["exit_code"]), str(result["why"])
    if code == boot.OK:
        unfinished = _unfinished(_read(work / "job.json") or {})
        if unfinished is None:
            return Seen(Phase.SUCCEEDED, held, exit_code=code)
        stage, meta = unfinished
        at = f" at step {meta['global_step']}" if "global_step" in meta else ""
        if meta.get("stopped") == "until":
            return Seen(Phase.CANCELLED, held, f"{stage}: paused{at} (train.until)", code)
        if why == boot.STOPPED or meta.get("stopped") == "stop":
            return Seen(Phase.CANCELLED, held, f"{stage}: stopped{at}", code)
        return Seen(Phase.FAILED, held, f"exit code 0, but {stage} is not completed{at}", code)
    if code == boot.AGAIN and result.get("cause") == boot.OUTAGE:
        return Seen(Phase.FAILED, held, why, code, cause=retry.INFRASTRUCTURE)
    if code == boot.AGAIN:
        cause = retry.DEADLINE if result.get("cause") == boot.DEADLINE else ""
        return Seen(Phase.PREEMPTED, held, why, code, cause=cause)
    meaning = _MEANING.get(code)
    return Seen(Phase.FAILED, held, why + (f" ({meaning})" if meaning else ""), code)


def _unfinished(job: Mapping[str, Any]) -> Optional[tuple[str, dict[str, Any]]]:
    """The first stage that is not completed, and its run_meta.json; None: all are."""
    for stage in job.get("stages", []):
        meta = _read(boot.local_path(stage["output"]) / "run_meta.json") or {}
        if meta.get("completed") is not True:
            return stage["id"], meta
    return None


def _number(value: Any) -> Optional[float]:
    return float(value) if isinstance(value, (int, float)) else None


def _last_beat(work: Path) -> Optional[float]:
    """When boot last showed that it lived, UTC seconds; None: it never did."""
    with contextlib.suppress(OSError):
        return (work / "heartbeat").stat().st_mtime
    return None


def _lives(work: Path) -> bool:
    return _locked(work) or bool(_processes(work))


def _locked(work: Path) -> bool:
    try:
        with (work / "lock").open() as lock:
            return boot.is_locked(lock.fileno())
    except OSError:
        return False


def _boot_pid(work: Path) -> Optional[int]:
    """Boot's pid; None when it is not there (any more), or not yet known by its pid."""
    pid = (_read(work / "process.json") or {}).get("pid")
    marked = pid in _processes(work)  # also when the folder was moved away
    return int(pid) if pid is not None and (marked or _locked(work)) else None


def _signal(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
        return True
    return False


def _processes(work: Path) -> list[int]:
    """Pids of everything that carries this folder's mark; not of zombies, which have nothing."""
    return [pid for pid, labels in _marked().items() if labels[_MARK] == str(work)]


def _marked() -> dict[int, dict[str, str]]:
    """The LAUNCH_ variables of every process of a local job, by pid (Linux; elsewhere none)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended, or it is somebody else's
            raw = path.read_bytes()
            if _MARK.encode() in raw:
                pairs = (item.partition("=") for item in raw.decode(errors="replace").split("\0"))
                labels = {key: value for key, _, value in pairs if key.startswith("LAUNCH_")}
                if labels.get(_MARK):
                    found[int(path.parent.name)] = labels
    return found


def _within(folder: Path, labels: Mapping[str, str]) -> Optional[Path]:
    work = Path(labels[_MARK])
    return work if work.parent == folder else None


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


def _is(kind: str, gpu: str) -> bool:
    """Whether `A100-80GB` is `NVIDIA A100-SXM4-80GB`: the parts of one are words of the other, two
    of which may be written as one (`RTX4090`). `L4` is no `L40S`."""
    words = re.split("[^a-z0-9]+", gpu.lower())
    words += [first + second for first, second in pairwise(words)]
    return set(kind.lower().split("-")) - {"mega"} <= set(words)


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
