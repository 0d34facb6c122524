"""Custom jobs of Vertex AI on 127.0.0.1: create, get, list, cancel, delete.

A job's states follow the clock. What happens to it is a `Stub` (a script of states, lines and an
end) or a real process of this machine (`processes.py`). Scheduling strategies, machine types and
images are accepted as they are: no catalogue is kept. Not served: persistent resources.
"""

from __future__ import annotations

import json
import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from launcher.clock import Clock
from launcher.google import library
from launcher.rehearsal.http import HttpError, Request, Response
from launcher.rehearsal.logging import Logging
from launcher.rehearsal.processes import Processes, spawn
from launcher.rehearsal.routes import Method, dispatch, parse, routes, to_json

_CLIENT = "google.cloud.aiplatform_v1"
types = library(f"{_CLIENT}.types")
_TRANSPORT = library(
    f"{_CLIENT}.services.job_service.transports.rest_base"
)._BaseJobServiceRestTransport
_operations = library("google.longrunning.operations_pb2")
_any, _empty = library("google.protobuf.any_pb2"), library("google.protobuf.empty_pb2")
_PARENT = re.compile(r"projects/([^/]+)/locations/([^/]+)")
_TERM = re.compile(
    r'(?:labels\.(?:"([\w-]+)"|([\w-]+))|(display_name|displayName|state))\s*=\s*("[^"]*"|\S+)$'
)
_LABEL = re.compile(r"[\w-]{0,63}")
_OVER = ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED", "PARTIALLY_SUCCEEDED")
#: Exit codes of a process that did not leave by itself.
_KILLED = (137, 143)
#: Seconds that a cancelled job needs to end.
_CANCELLING = 3.0


@dataclass(frozen=True)
class End:
    """How a job ends: a state, and the error's code (google.rpc.Code) and message."""

    state: str = "SUCCEEDED"
    code: int = 0
    message: str = ""


SUCCEEDED = End()
STOCK_OUT = End("FAILED", 8, "Resources are insufficient in region: {place}. Please try a "
                "different region or use a different accelerator.")  # fmt: skip
PREEMPTED = End("FAILED", 8, "STOCKOUT: the Spot VM of workerpool0-0 was taken back.")
QUOTA = End("FAILED", 8, "The following quota metrics exceed quota limits: "
            "aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus")  # fmt: skip
NO_IMAGE = End("FAILED", 3, "Image us-docker.pkg.dev/p/r/trainer:1 not found.")
DENIED = End("FAILED", 7, "Vertex AI Service Agent does not have permission to act as the "
             "service account.")  # fmt: skip
INTERNAL = End("FAILED", 13, "Internal error occurred for the current attempt.")


def exited(code: int) -> End:
    """The end of a job whose first worker left with `code`."""
    if code == 0:
        return SUCCEEDED
    message = f"The replica workerpool0-0 exited with a non-zero status of {code}. To find out more"
    return End("FAILED", 3, f"{message} about why your job exited please check the logs.")


@dataclass(frozen=True)
class Said:
    """A line that a job logs `after` seconds of running, readable `late` seconds later."""

    after: float
    text: str
    task: str = "workerpool0-0"
    late: float = 0.0
    times: int = 1


@dataclass(frozen=True)
class Stub:
    """What happens to one job, in seconds: `queued`, then `pending`, then `running` (None: until it
    is cancelled). `end` comes instead of running when `running` is 0."""

    queued: float = 2.0
    pending: float = 5.0
    running: Optional[float] = 60.0
    end: End = SUCCEEDED
    lines: tuple[Said, ...] = ()


@dataclass(frozen=True)
class Real:
    """The job's command runs as processes of this machine. After `preempted` seconds, or as soon as
    an object whose URI holds the regular expression `preempted_on` is written, they are told to
    leave, as on a machine that is taken back. When one fails, all are started again up to
    `restarts` times, as the service does by itself."""

    queued: float = 1.0
    pending: float = 1.0
    preempted: Optional[float] = None
    restarts: int = 0
    preempted_on: Optional[str] = None


@dataclass
class _Job:
    message: Any
    project: str
    place: str
    fate: Stub | Real
    created: float
    cancelled: Optional[float] = None
    end: Optional[End] = None
    said: int = 0
    processes: Optional[Processes] = None
    restarts: int = 0
    due: float = 0.0  # nothing about it changes by itself before
    taken: bool = False  # the machine was taken back

    @property
    def number(self) -> str:
        return str(self.message.name.rpartition("/")[2])

    @property
    def begins(self) -> float:
        return self.created + self.fate.queued + self.fate.pending


@dataclass
class Refusal:
    """What creating a job answers in a place instead of creating it."""

    status: int
    message: str


@dataclass
class Vertex:
    """All jobs. `fates` is consumed by jobs in the order of their creation, then `fate` counts.
    `refusals`: by place, `*` for all; `off`: the projects in which the API is not enabled.
    `created` holds what was received, as JSON. `environ` is given to real processes."""

    clock: Clock
    logging: Logging
    folder: Optional[Path] = None
    fate: Stub | Real = field(default_factory=Stub)
    environ: dict[str, str] = field(default_factory=dict)
    fates: deque[Stub | Real] = field(default_factory=deque)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    off: set[str] = field(default_factory=set)
    created: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._news: deque[str] = deque()
        self._next = 4_606_000_000_000_000_001
        self._lock = threading.RLock()
        self.methods = [
            Method("CreateCustomJob", types.CreateCustomJobRequest, self._locked(self._create)),
            Method("GetCustomJob", types.GetCustomJobRequest, self._locked(self._get)),
            Method("ListCustomJobs", types.ListCustomJobsRequest, self._locked(self._list)),
            Method("CancelCustomJob", types.CancelCustomJobRequest, self._locked(self._cancel)),
            Method("DeleteCustomJob", types.DeleteCustomJobRequest, self._locked(self._delete)),
        ]
        self._routes = routes(_TRANSPORT, self.methods)
        for file in sorted((self.folder or Path("/nowhere")).glob("job-*.json")):
            self._load(json.loads(file.read_text()))

    def handle(self, request: Request) -> Optional[Response]:
        with self._lock:
            self.advance()
            return dispatch(self._routes, request)

    def _locked(self, act: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`act` on jobs that are where the clock says they are, by one caller at a time."""

        def alone(asked: Any) -> Any:
            with self._lock:
                self.advance()
                return act(asked)

        return alone

    def advance(self) -> None:
        """Let every job be where the clock says it is."""
        with self._lock:
            now = self.clock.now()
            news = [self._news.popleft() for _ in range(len(self._news))]
            for job in self._jobs.values():
                if job.end is None and (news or now >= job.due):
                    self._notice(job, news)
                    self._advance(job, now)
                    self._keep(job)

    def written(self, uri: str) -> None:
        """An object was written: jobs look at it when the clock moves on."""
        self._news.append(uri)  # no lock: the writer holds one of its own

    def remove(self, number: str) -> None:
        """A job is deleted behind everybody's back."""
        with self._lock:
            name = next(name for name in self._jobs if name.endswith(f"/{number}"))
            self._forget(self._jobs.pop(name))

    def states(self) -> dict[str, str]:
        """State by display name, for a look from outside."""
        with self._lock:
            self.advance()
            return {job.message.display_name: _state(job) for job in self._jobs.values()}

    def stop(self) -> None:
        """End the processes of all jobs."""
        for job in self._jobs.values():
            if job.processes is not None:
                job.processes.kill()

    def _create(self, asked: Any) -> Any:
        found = _PARENT.fullmatch(asked.parent)
        if found is None:
            raise HttpError(400, f"Invalid resource name: {asked.parent}")
        project, place = found.groups()
        self._allowed(project)
        refusal = self.refusals.get(place) or self.refusals.get("*")
        if refusal is not None:
            raise HttpError(refusal.status, refusal.message.format(place=place, project=project))
        wrong = next((v for v in asked.custom_job.labels.values() if not _LABEL.fullmatch(v)), None)
        if wrong is not None or not asked.custom_job.display_name:
            raise HttpError(400, f"Invalid value for label or display_name: {wrong!r}")
        self.created.append(to_json(asked.custom_job))
        job = types.CustomJob(asked.custom_job)
        job.name = f"projects/{project}/locations/{place}/customJobs/{self._next}"
        self._next += 1
        fate = self.fates.popleft() if self.fates else self.fate
        made = _Job(job, project, place, fate, self.clock.now())
        _set(job, "create_time", made.created)
        self._jobs[job.name] = made
        self._advance(made, made.created)
        self._keep(made)
        return job

    def _get(self, asked: Any) -> Any:
        return self._job(asked.name).message

    def _list(self, asked: Any) -> Any:
        found = _PARENT.fullmatch(asked.parent)
        self._allowed(found[1] if found else "")
        tests = [_test(term) for term in re.split(r"\s+AND\s+", asked.filter) if term.strip()]
        names = [name for name in self._jobs if name.startswith(f"{asked.parent}/")]
        jobs = [self._jobs[name].message for name in reversed(names)]
        jobs = [job for job in jobs if all(test(job) for test in tests)]
        start, size = int(asked.page_token or 0), asked.page_size or 100
        more = str(start + size) if start + size < len(jobs) else ""
        page = jobs[start : start + size]
        return types.ListCustomJobsResponse(custom_jobs=page, next_page_token=more)

    def _cancel(self, asked: Any) -> Any:
        job = self._job(asked.name)
        if _state(job) in _OVER:
            raise HttpError(400, f"The job is in state {_state(job)} and cannot be cancelled.")
        if job.cancelled is None:
            job.cancelled = self.clock.now()
        self._advance(job, self.clock.now())
        return _empty.Empty()

    def _delete(self, asked: Any) -> Any:
        job = self._job(asked.name)
        if _state(job) not in _OVER:
            raise HttpError(400, f"The job is in state {_state(job)}: cancel it before deleting.")
        del self._jobs[asked.name]
        self._forget(job)
        answer = _any.Any()
        answer.Pack(_empty.Empty())
        parent = asked.name.partition("/customJobs/")[0]
        name = f"{parent}/operations/{job.number}"
        return _operations.Operation(name=name, done=True, response=answer)

    def _job(self, name: str) -> _Job:
        self._allowed(name.split("/")[1])
        if name not in self._jobs:
            raise HttpError(404, f"The CustomJob does not exist: {name}")
        return self._jobs[name]

    def _allowed(self, project: str) -> None:
        if project in self.off:
            raise HttpError(
                403, f"Vertex AI API has not been used in project {project} before or it is "
                f"disabled. Enable it by visiting aiplatform.googleapis.com for {project}.",
                "SERVICE_DISABLED",
            )  # fmt: skip

    # The life of one job.

    def _advance(self, job: _Job, now: float) -> None:
        if isinstance(job.fate, Real) and job.cancelled is None and now >= job.begins:
            self._run(job, job.fate, now)
        end, at = self._ending(job, now)
        state = "QUEUED" if now < job.created + job.fate.queued else "PENDING"
        if now >= job.begins and _has_run(job):
            state = "RUNNING"
            _set(job.message, "start_time", job.begins)
            self._say(job, min(now, at))
        if job.cancelled is not None and now >= job.cancelled:
            state = "CANCELLING"
        if end is not None and now >= at:
            job.end, state = end, end.state
            if job.processes is not None:
                job.processes.kill()
            _set(job.message, "end_time", at)
            job.message.error.code = end.code
            job.message.error.message = end.message.format(place=job.place)
        job.message.state = types.JobState[f"JOB_STATE_{state}"]
        _set(job.message, "update_time", now)
        job.due = _due(job, at, now)

    def _ending(self, job: _Job, now: float) -> tuple[Optional[End], float]:
        """How and when it ends, as far as that is known now."""
        fate = job.fate
        at = float("inf")
        end: Optional[End] = None
        if isinstance(fate, Stub) and fate.running is not None:
            end, at = fate.end, job.begins + fate.running
        elif job.processes is not None and (code := job.processes.code()) is not None:
            end, at = self._exited(job, code), now
        timeout = job.message.job_spec.scheduling.timeout
        limit = timeout.total_seconds() if timeout else 0.0
        if limit and job.begins + limit < at:
            message = f"The job has run for longer than its timeout of {limit:.0f}s."
            end, at = End("FAILED", 4, message), job.begins + limit
        if job.cancelled is not None and job.cancelled < at:
            end, at = End("CANCELLED", 1, ""), job.cancelled + _CANCELLING
            if job.processes is not None and job.processes.code() is None:
                at = float("inf")  # not before its processes have left
        if job.processes is not None and (job.cancelled is not None or now >= at):
            job.processes.ask()
        return end, at

    def _exited(self, job: _Job, code: int) -> Optional[End]:
        """The end of a job whose processes have left, or None: they are to start again."""
        if job.taken and code in _KILLED:
            return PREEMPTED
        allowed = job.fate.restarts if isinstance(job.fate, Real) else 0
        if code == 0 or job.taken or job.cancelled is not None or job.restarts >= allowed:
            return exited(code)
        job.restarts += 1
        if job.processes is not None:
            job.processes.kill()
        job.processes = None
        return None

    def _run(self, job: _Job, fate: Real, now: float) -> None:
        if job.processes is None:
            job.processes = spawn(
                job.message, job.project, job.place, self.environ, self._writer(job)
            )
        if fate.preempted is not None and now >= job.begins + fate.preempted:
            self._take(job)

    def _notice(self, job: _Job, written: list[str]) -> None:
        on = job.fate.preempted_on if isinstance(job.fate, Real) else None
        if on and job.processes is not None and any(re.search(on, uri) for uri in written):
            self._take(job)

    def _take(self, job: _Job) -> None:
        job.taken = True
        if job.processes is not None:
            job.processes.ask()

    def _writer(self, job: _Job) -> Callable[[str, str], None]:
        return lambda task, text: self.logging.write(job.project, job.number, task, text)

    def _say(self, job: _Job, until: float) -> None:
        lines = job.fate.lines if isinstance(job.fate, Stub) else ()
        while job.said < len(lines) and job.begins + lines[job.said].after <= until:
            line = lines[job.said]
            time = job.begins + line.after
            self.logging.write(
                job.project, job.number, line.task, line.text, time, line.late, line.times
            )
            job.said += 1

    # On disk.

    def _keep(self, job: _Job) -> None:
        if self.folder is None:
            return
        kind = type(job.fate).__name__
        facts = {
            "job": to_json(job.message), "project": job.project, "place": job.place,
            "created": job.created, "cancelled": job.cancelled, "said": job.said,
            "fate": {"kind": kind, **asdict(job.fate)}, "end": job.end and asdict(job.end),
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"job-{job.number}.json").write_text(json.dumps(facts))

    def _load(self, facts: dict[str, Any]) -> None:
        """A job of a server before this one; the processes of a real one have ended with it."""
        fate = facts["fate"]
        kind = fate.pop("kind")
        lines = tuple(Said(**line) for line in fate.pop("lines", ()))
        end = End(**fate.pop("end")) if "end" in fate else SUCCEEDED
        made = (
            Stub(**fate, end=end, lines=lines) if kind == "Stub" else Stub(running=0, end=INTERNAL)
        )
        message = parse(types.CustomJob, facts["job"])
        job = _Job(message, facts["project"], facts["place"], made, facts["created"])
        job.cancelled, job.said = facts["cancelled"], facts["said"]
        job.end = End(**facts["end"]) if facts["end"] else None
        self._jobs[message.name] = job
        self._next = max(self._next, int(job.number) + 1)

    def _forget(self, job: _Job) -> None:
        if job.processes is not None:
            job.processes.kill()
        if self.folder is not None:
            (self.folder / f"job-{job.number}.json").unlink(missing_ok=True)


def _due(job: _Job, ends: float, now: float) -> float:
    """When a job changes next by itself. Of a real one nobody knows."""
    if isinstance(job.fate, Real):
        return now
    lines = [job.begins + line.after for line in job.fate.lines[job.said : job.said + 1]]
    moments = (job.created + job.fate.queued, job.begins, ends, *lines)
    return min((moment for moment in moments if moment > now), default=float("inf"))


def _has_run(job: _Job) -> bool:
    return isinstance(job.fate, Real) or job.fate.running != 0


def _state(job: _Job) -> str:
    return str(job.message.state.name).removeprefix("JOB_STATE_")


def _set(message: Any, name: str, seconds: float) -> None:
    stamp = getattr(type(message).pb(message), name)
    stamp.FromNanoseconds(round(seconds * 1e6) * 1000)


def _test(term: str) -> Callable[[Any], bool]:
    found = _TERM.fullmatch(term.strip())
    if found is None:
        raise HttpError(400, f"Invalid filter: {term!r}")
    key, name, value = found[1] or found[2], found[3], found[4].strip('"')
    if key:
        return lambda job: key in job.labels and job.labels[key] == value
    if name == "state":
        return lambda job: bool(job.state.name == value)
    return lambda job: bool(job.display_name == value)
