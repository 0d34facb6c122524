"""A job from its unpacked bundle to its exit code: the part of boot that comes with the bundle.

The attempt is taken, the artifact root brought here, secrets, wheels and inputs made ready, the
workers watched, and what they left sent away. docs/contracts.md: what is written, and the codes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Optional, TypeVar

from trainer import attempts, secret_manager, smaller, workers
from trainer.boot import (
    AGAIN,
    CONFIG,
    DATA,
    DEADLINE,
    ENVIRONMENT,
    ERROR,
    OK,
    OUTAGE,
    STOPPED,
    BootError,
    Spec,
    environment,
    leave,
    local_path,
    note_process,
    reserve,
    say,
    unpack_verified,
    write_json,
)
from trainer.cluster import ClusterError, Node, vertex_node
from trainer.environment import Unfit, asked, ensure
from trainer.store import Store, StoreError, Transient, open_store

#: Seconds, at least, for what is left when the workers have taken the whole grace to leave.
_LAST = 60.0
#: Seconds for boot's own last records.
_RECORDS = 30.0
_CLIENTS = {"gs": "google.cloud.storage", "s3": "boto3"}
T = TypeVar("T")
Ranks = dict[str, dict[str, Any]]


class _Asked(Exception):
    """The job was asked to leave before its workers began."""


def supervise(spec: Spec, asked: Sequence[str], started: float) -> int:
    """Run the job and leave `result.json`; boot's exit code. `asked` gets a word by a signal;
    `started`: when boot began, seconds since the epoch."""
    job = _Job(spec, asked, started)
    ranks: Ranks = {}
    outage = False  # before the workers began
    try:
        code, why, ranks = job.run()
        outage = job.alone
    except _Asked:
        reason = job.watch.reason
        code, why = (OK if reason == STOPPED else AGAIN), reason
    except BootError as error:
        code, why, outage = error.code, str(error), True
    except StoreError as error:
        code, why = (AGAIN if isinstance(error, Transient) else ENVIRONMENT), str(error)
        outage = True
    except OSError as error:
        code, why = ENVIRONMENT, f"{error.filename or spec.work}: {error.strerror}"
    except Exception as error:  # a bug of ours must not cost what the trainer has saved
        traceback.print_exception(error)
        code, why = ERROR, f"{type(error).__name__}: {error}"
    cause = OUTAGE if outage else DEADLINE if job.watch.reason == DEADLINE else ""
    return job.end(code, why, ranks, cause if code == AGAIN else "")


class _Watch:
    """Why the trainer should leave: the marker, the deadline or a signal, whichever came first."""

    def __init__(self, spec: Spec, asked: Sequence[str]) -> None:
        self.spec, self.asked = spec, asked
        self.reason, self.since, self.ends_at = "", 0.0, math.inf

    def look(self) -> str:
        """The reason, empty while there is none; shows that boot lives."""
        with contextlib.suppress(OSError):  # a full disk must not end the job
            (self.spec.work / "heartbeat").touch()
        if not self.reason:
            self.reason, self.since = self._reason(), time.monotonic()
        return self.reason

    @property
    def grace(self) -> float:
        """Seconds to save and leave in. At the deadline they are those that were kept for it, so
        that the job is gone when its time is up; of a short one a minute all the same."""
        kept = reserve(self.spec.given) if self.reason == DEADLINE else math.inf
        return min(self.spec.grace, max(kept, _LAST))

    def _reason(self) -> str:
        if (self.spec.folder / "control" / "stop.json").exists():
            return STOPPED
        if time.monotonic() > self.ends_at:
            return DEADLINE
        return self.asked[0] if self.asked else ""


class _Job:
    """One start of a job on this node."""

    def __init__(self, spec: Spec, asked: Sequence[str], started: float) -> None:
        self.spec, self.started = spec, started
        self.watch = _Watch(spec, asked)
        self.store: Store
        self.start: Optional[attempts.Start] = None
        self.root: Any = None  # RemoteRoot, once it is open
        self.paths: Optional[list[str]] = None  # of what was installed for this job
        self.alone = False  # the other nodes did not come

    def run(self) -> tuple[int, str, Ranks]:
        """Errors: `BootError`, `StoreError`, `OSError`, `_Asked`."""
        spec, watch = self.spec, self.watch
        node = _node(spec)
        if spec.remote and not _has_client(spec):
            self._install()  # what reaches the store may be what the image lacks
        self.store = _store(spec)
        self.start = start = self._unless_asked(
            lambda: attempts.begin(self.store, spec, self.started)
        )
        spec.part += start.suffix
        watch.ends_at = time.monotonic() + spec.deadline - (time.time() - start.first)
        if (code := start.before.get("exit_code")) in (CONFIG, DATA, ENVIRONMENT):
            # A service starts again whatever failed; this would only fail again, at a price.
            raise BootError(code, str(start.before.get("why")))
        _refuse(spec)
        if spec.remote:
            self._bring()
        if start.restart:
            say(spec, f"restart {start.restart} of attempt {spec.raw['attempt']}")
        if spec.nodes > 1 and spec.remote:
            _refuse_chain(spec)
        self._install()
        given = self._unless_asked(lambda: environment(spec, os.environ, secret_manager.read))
        self._unless_asked(self._own_code)
        given["PYTHONPATH"] = os.pathsep.join([*(self.paths or ()), given["PYTHONPATH"]])
        facts: dict[str, Any] = {"restart": start.restart} if start.restart else {}
        if spec.remote:  # what a stage keeps of the others' places must hold on the next machine
            facts["copies"] = {spec.root: str(spec.folder)}
        write_json(spec.work / "job.json", {**spec.job, **facts})
        self._fetch_inputs(given)
        if watch.look():
            raise _Asked
        while True:
            before = _micro_batches(spec)
            code, why, ranks = self._work(given, node)
            fewer = [f"{stage}: {rows}" for stage, rows in _micro_batches(spec).items()
                     if rows < before.get(stage, math.inf)]  # fmt: skip
            # Each time fewer rows, so that this ends; whatever else ended the peers of a worker
            # without memory, that is why.
            if not fewer or code in (OK, CONFIG, DATA, ENVIRONMENT) or watch.look():
                return code, why, ranks
            say(spec, f"{why}; again, rows at a time for stage {', '.join(fewer)}")

    def end(self, code: int, why: str, ranks: Ranks, cause: str) -> int:
        """Send what is left, say how it ended, and where. The exit code: a success that the store
        does not hold is none."""
        spec = self.spec
        missing = self._close(code) if self.root is not None else []
        for line in missing:
            say(spec, line)
        if missing and code == OK and not spec.node:  # node 0 keeps the record of the job
            code, why = AGAIN, f"{why}, but {spec.root} lacks {missing[0].partition(':')[0]}"
        say(spec, f"exit code {code}: {why}")
        if self.start is not None:
            start = self.start
            facts = {"exit_code": code, "why": why,
                     "ranks": {rank: end["code"] for rank, end in ranks.items()},
                     **({"cause": cause} if cause else {})}  # fmt: skip
            self._in_time(lambda: attempts.end(self.store, start, facts), "the attempt's end")
        if self.root is not None and not missing:
            self._in_time(lambda: self.root.close(_RECORDS), "the last lines")
        leave(spec, code, why, cause)
        return code

    def _bring(self) -> None:
        from trainer.remote_root import RemoteRoot, localized

        spec = self.spec
        root = RemoteRoot(spec, self.store, lambda line: say(spec, line))
        spec.job = localized(spec.job, spec.root, spec.folder)
        self._unless_asked(root.open)
        self.root = root

    def _install(self) -> None:
        """The environment that the specification asks for, once. Errors: `BootError` 78."""
        raw, folder = self.spec.raw, self.spec.work / "environment"
        packages, wheels = bool(raw.get("environment")), raw.get("wheels") or []
        if self.paths is not None or not (packages or wheels):
            return
        try:
            beside = asked(self.spec.job)
            self.paths = self._unless_asked(
                lambda: ensure(folder, wheels, lambda line: say(self.spec, line), packages, beside)
            )
        except Unfit as error:
            raise BootError(error.code, str(error)) from error

    def _own_code(self) -> None:
        """The user's code, verified, in its folder. Errors: `BootError`, `StoreError`."""
        spec, code = self.spec, self.spec.raw.get("code")
        if not code:
            return
        path, url = spec.work / "code.tar", str(code["url"])
        if url.partition("://")[0] in _CLIENTS:
            parent, _, key = url.rpartition("/")
            open_store(parent).get_file(key, path)
        else:
            path = local_path(url)
        unpack_verified(path, code, spec.own, "code")
        say(spec, f"code: {str(code['sha256'])[:12]} in {spec.own}")

    def _fetch_inputs(self, given: dict[str, str]) -> None:
        """What the job reads from object stores comes to this machine first."""
        spec = self.spec
        job, folder = spec.work / "job.json", spec.work / "inputs"
        code, said = self._run(spec.trainer("inputs", str(job), str(folder)), given, math.inf)
        if code:
            raise BootError(
                code if code in (CONFIG, DATA, AGAIN, ENVIRONMENT) else ERROR, f"inputs: {said}"
            )

    def _run(
        self, command: Sequence[str], given: dict[str, str], seconds: float
    ) -> tuple[int, str]:
        """A command of the preparation: its exit code and what it said. Errors: `_Asked`."""
        process = workers.Pump(self.spec, command, given, "boot")
        ended = self._attend(process, time.monotonic() + seconds)
        code = process.finish()
        if self.watch.reason:
            raise _Asked
        return code, f"not done within {seconds:g} s" if ended == "late" else process.said

    def _work(self, given: dict[str, str], node: Optional[Node]) -> tuple[int, str, Ranks]:
        """Start the workers and see them to their end: code, why, and each rank's end."""
        spec, watch = self.spec, self.watch
        for old in [*spec.work.glob("exit-*.json"), *spec.work.glob("worker-*.json")]:
            old.unlink()
        workers.note_place(spec)
        single = spec.workers == 1 and node is None
        if single:
            group = workers.Pump(spec, workers.trainer_command(spec), given, "worker-0")
        else:
            group = workers.Torchrun(spec, given, node)
        with contextlib.suppress(OSError):
            note_process(spec, "running")
        # Once the nodes have found each other, torchrun starts the workers.
        join = math.inf if node is None else time.monotonic() + spec.join
        ended = self._attend(group, join, lambda: not [*spec.work.glob("worker-*.json")])
        code = group.finish()
        if single:
            workers.note_exit(spec, 0, code, group.said)
        ranks = workers.ends(spec)
        if node is not None and ended == "late":
            self.alone, where = True, f"{node.address}:{node.port}"
            why = f"the {node.nodes} nodes did not meet at {where} within {spec.join:g} s"
            return AGAIN, why, ranks
        code, why = workers.verdict(ranks, spec.workers, watch.reason, ended == "killed")
        if not ranks and code == ERROR:  # torchrun itself could not
            code = ENVIRONMENT if "No module named" in group.said else ERROR
            why = f"torchrun: {group.said}"
        return code, why, ranks

    def _attend(
        self, group: workers.Pump, until: float, waits: Callable[[], bool] = lambda: True
    ) -> str:
        """Watch a process to its end, and end it when something asks: gently first. After `until`,
        if it still `waits`, at once. Returns `killed`, `late`, or nothing."""
        spec, watch, told, ended = self.spec, self.watch, False, ""
        while group.child.poll() is None:
            reason, now = watch.look(), time.monotonic()
            if reason and not told:
                told = True
                say(spec, f"{reason}: the trainer is asked to save and leave")
            if reason and not ended:
                group.terminate()  # again: workers may only just have come to life
                if now - watch.since > watch.grace:
                    ended = "killed"
                    say(spec, f"still running {watch.grace:g} s later: killed")
                    group.kill()
            elif now > until and not ended and waits():
                ended = "late"
                group.kill()
            time.sleep(workers.POLL)
        return ended

    def _unless_asked(self, act: Callable[[], T]) -> T:
        """What `act` returns, or raises; `_Asked` when something asks before it is done: a slow
        store keeps nobody here."""
        task = _Task(act)
        while not task.done.wait(workers.POLL):
            if self.watch.look():
                raise _Asked
        return task.result()

    def _in_time(self, act: Callable[[], object], what: str) -> None:
        """`act`, for as long as boot's last records may take; a line when it fails."""
        task, bound = _Task(act), min(_RECORDS, self.spec.grace)
        try:
            if not task.done.wait(bound):
                raise StoreError(f"the store does not answer within {bound:g} s")
            task.result()
        except (StoreError, OSError) as error:
            say(self.spec, f"warning: {what}: {error}")

    def _close(self, code: int) -> list[str]:
        grace = self.watch.grace
        left = grace - (time.monotonic() - self.watch.since) if self.watch.reason else grace
        missing: list[str] = self.root.close(max(left, min(grace, _LAST)))
        if not missing and code == OK and not self.spec.node:
            task: _Task[list[str]] = _Task(lambda: self.root.unproven(self.spec.job))
            if not task.done.wait(_RECORDS):
                return [f"run_meta.json: {self.spec.root} does not answer"]
            missing = task.result()
        return missing


class _Task(Generic[T]):
    """A call in a thread of its own, which may be left behind."""

    def __init__(self, act: Callable[[], T]) -> None:
        self.done = threading.Event()
        self._value: list[T] = []
        self._error: Optional[BaseException] = None
        threading.Thread(target=self._work, args=(act,), daemon=True).start()

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value[0]

    def _work(self, act: Callable[[], T]) -> None:
        try:
            self._value.append(act())
        except BaseException as error:  # the caller's to judge
            self._error = error
        self.done.set()


def _node(spec: Spec) -> Optional[Node]:
    """This node among several; None where there is one. Errors: `BootError` 64."""
    if spec.nodes == 1:
        return None
    try:
        node = vertex_node(os.environ["CLUSTER_SPEC"])
    except ClusterError as error:
        raise BootError(CONFIG, str(error)) from error
    if node.nodes != spec.nodes:
        what = f"nodes: {spec.nodes}, but CLUSTER_SPEC has {node.nodes}"
        raise BootError(CONFIG, what)
    spec.node = node.rank
    return node


def _store(spec: Spec) -> Store:
    """The artifact root. Errors: `BootError` 64 for a URI that names none."""
    try:
        return open_store(spec.root if spec.remote else spec.folder)
    except StoreError as error:
        raise BootError(CONFIG, str(error)) from error


def _has_client(spec: Spec) -> bool:
    """Whether the library that reaches the artifact root is installed."""
    parent, _, name = _CLIENTS[spec.root.partition("://")[0]].rpartition(".")
    try:
        return importlib.util.find_spec(f"{parent}.{name}" if parent else name) is not None
    except ModuleNotFoundError:
        return False


def _micro_batches(spec: Spec) -> dict[str, int]:
    """stage -> the micro-batch that a lack of memory left in its folder."""
    found = {stage["id"]: smaller.noted(spec.folder / stage["output"])
             for stage in spec.job.get("stages", []) if "output" in stage}  # fmt: skip
    return {stage: rows for stage, rows in found.items() if rows is not None}


def _refuse(spec: Spec) -> None:
    """What nodes without a shared disk cannot do. Errors: `BootError` 64."""
    for stage in spec.job.get("stages", []):
        train = stage.get("train") or {}
        fsdp = train.get("parallel") == "fsdp"
        if spec.nodes > 1 and spec.remote and (train.get("sharded") or fsdp):
            key = "train.parallel: fsdp" if fsdp else "train.sharded"
            what = f"stage {stage['id']}: {key} on {spec.nodes} nodes needs a disk that they"
            raise BootError(CONFIG, f"{what} share, and artifacts are in {spec.root}; use one node")


def _refuse_chain(spec: Spec) -> None:
    """A stage that reads what an earlier stage of the same job is still to write on node 0."""
    stages = spec.job.get("stages", [])
    for index, stage in enumerate(stages):
        for earlier in stages[:index]:
            output = earlier["output"]
            if (spec.folder / output / "run_meta.json").exists():
                continue
            if any(text == output or text.startswith((f"{output}/", f"{output}@"))
                   for key, value in stage.items() if key != "output"
                   for text in _texts(value)):  # fmt: skip
                what = f"stage {stage['id']} reads what {earlier['id']} writes in the same job"
                raise BootError(CONFIG, f"{what}: on several nodes run {earlier['id']} before it")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
