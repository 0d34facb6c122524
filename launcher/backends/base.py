"""The protocol of a backend, and the words it shares with the engine.

Backends are thin: they never sleep, never print, never keep state, never retry. They raise the
signals of `launcher.errors`. Numbered contracts:

1. `plan` is pure and returns the very requests that `create` will send, with `${attempt}`,
   `${resume}`, `${deadline}` and `${ref:name}` left as holes; `launcher.plan.fill` fills them.
2. `create` is called after the journal holds the intent. A resource that exists under the
   intent's deterministic name and our label is adopted, never doubled. A signal other than a
   `Transient` that is not `refused` says that this call has made nothing.
3. `observe` is one cheap read, no loop. It never raises for a resource that is not there. For
   `can.settle` seconds what was made may not show: the engine looks that long.
4. `delete` starts a deletion and returns at once: DELETING or GONE; absent is GONE.
5. `logs` yields what is there after `query.cursor` and ends; following is the caller's loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Protocol, runtime_checkable

from launcher.clock import Clock

if TYPE_CHECKING:
    from launcher.spec import Hardware, Recipe  # `status` needs these words, not the recipe's


class Phase(str, Enum):
    """The job."""

    PLANNED = "planned"
    QUEUED = "queued"
    PROVISIONING = "provisioning"
    STARTING = "starting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"  # asked to stop, or paused by train.until: resumable
    LOST = "lost"  # it is not there and nobody said why

    @property
    def over(self) -> bool:
        return self in _OVER


_OVER = {Phase.PREEMPTED, Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED, Phase.LOST}


class Held(str, Enum):
    """The money: "job ended" is not "billing stopped"."""

    NONE = "none"
    CREATING = "creating"
    LIVE = "live"
    DELETING = "deleting"
    GONE = "gone"
    LEAKED = "leaked"


@dataclass(frozen=True)
class Capabilities:
    spot: bool = False
    nodes: bool = False
    follow: bool = False
    exec: bool = False
    native_retry: bool = False
    timeout: bool = False  # the service itself ends a job when its time is up, saved or not
    idempotent_create: bool = False
    create: bool = True  # False: this version plans its jobs and does not send them
    drain: float = 1.0  # seconds after a job's end until its last log lines are there
    settle: float = 0.0  # seconds until a request that was applied shows in every answer


@dataclass(frozen=True)
class Env:
    """What a backend may know about this machine. `home` is $LAUNCH_HOME."""

    home: Path
    environ: Mapping[str, str]
    clock: Clock
    owner: str
    python: str  # the interpreter that local jobs run with


@dataclass(frozen=True)
class Ref:
    """One resource that may bill. `name` is deterministic; `data` is the backend's own."""

    backend: str
    kind: str
    name: str
    place: str
    run: str
    billable: bool = True
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Intent:
    """One request, before it is sent. A file of this machine that it sends is `request["file"]`;
    None: it may not be sent from here, and what is there already is taken."""

    kind: str
    name: str
    place: str
    request: Mapping[str, Any]
    billable: bool = True


@dataclass(frozen=True)
class Offer:
    """A priced place. `usd_per_hour` None: unknown, never guessed."""

    backend: str
    place: str
    accelerator: str
    capacity: Literal["spot", "standard", "flex", "reserved"] = "standard"
    usd_per_hour: Optional[float] = None
    price_source: str = ""
    machine: str = ""


@dataclass(frozen=True)
class JobSpec:
    """What a backend needs to place one job: filled by the engine, the same for every backend.
    `boot` is the boot specification (docs/contracts.md), with `${attempt}` and `${deadline}` where
    it varies."""

    run: str  # run id
    name: str  # deterministic: <run name>-j<index>
    hardware: Hardware
    boot: Mapping[str, Any]
    labels: Mapping[str, str]
    env: Mapping[str, str]
    secrets: Mapping[str, str]
    hours: Optional[float] = None  # the most that the budget allows; `${deadline}` is never more
    wait_hours: Optional[float] = None  # how long the job may queue for capacity


@dataclass(frozen=True)
class Plan:
    """Ordered intents, the billable one last, at one offer."""

    offer: Offer
    intents: tuple[Intent, ...]


@dataclass(frozen=True)
class Seen:
    """One look at a job. `held` pairs each live resource with its state; `exit_code` is boot's.
    `cause`: why it is over, in the words of `launcher.retry`, where the phase alone does not
    tell. `began`, `ended`: when its machines began to work and when it was over, in UTC seconds, by
    the service's clock, where that tells."""

    phase: Phase
    held: tuple[tuple[Ref, Held], ...] = ()
    why: str = ""
    exit_code: Optional[int] = None
    raw: str = ""
    cause: str = ""
    began: Optional[float] = None
    ended: Optional[float] = None


@dataclass(frozen=True)
class Labelled:
    """A resource that carries our label, with what is known of it: whose it is, since when it is
    there and since when it bills (UTC seconds; None: unknown, or it does not), and the artifact
    root of its run."""

    ref: Ref
    owner: str
    created: Optional[float] = None
    bills_since: Optional[float] = None
    root: str = ""


@dataclass(frozen=True)
class JobHandle:
    """A job as the journal knows it: what observe, logs and stop are asked about."""

    run: str
    name: str
    attempt: int
    root: str  # artifact root of the run (URI or path)
    refs: tuple[Ref, ...]


@dataclass(frozen=True)
class LogQuery:
    worker: Optional[int] = None
    cursor: Mapping[str, Any] = field(default_factory=dict)  # opaque; from the last Line
    since: Optional[float] = None  # UTC seconds
    last: bool = False  # the run is over: what came late is looked for once more


@dataclass(frozen=True)
class Line:
    worker: int
    time: float  # UTC seconds
    text: str
    cursor: Mapping[str, Any]  # pass it back to go on after this line


@dataclass(frozen=True)
class Check:
    """One row of `launch doctor`."""

    name: str
    result: Literal["pass", "warn", "fail", "skip"]
    detail: str
    fix: str = ""


@runtime_checkable
class Backend(Protocol):
    name: str
    can: Capabilities

    def check(self, env: Env) -> Iterable[Check]: ...
    def offers(self, spec: Hardware, env: Env) -> Iterable[Offer]: ...
    def plan(self, spec: JobSpec, offer: Offer) -> Plan: ...
    def create(self, intent: Intent, env: Env) -> Ref: ...
    def observe(self, job: JobHandle, env: Env) -> Seen: ...
    def logs(self, job: JobHandle, query: LogQuery, env: Env) -> Iterator[Line]: ...
    def stop(self, job: JobHandle, env: Env, grace: float) -> None: ...
    def delete(self, ref: Ref, env: Env) -> Held: ...
    def sweep(self, env: Env) -> Iterator[Ref]: ...


@runtime_checkable
class CanExec(Protocol):
    def exec(self, job: JobHandle, worker: int, argv: Sequence[str], env: Env) -> int: ...


@runtime_checkable
class CanWarn(Protocol):
    """Optional: what a plan should say beside its requests, one line each. Reads nothing but
    its arguments."""

    def warnings(self, spec: Hardware, env: Env) -> Iterable[str]: ...


@runtime_checkable
class CanExamine(Protocol):
    """Optional: the rows of `check` for one recipe, in its place. Reads only."""

    def examine(self, recipe: Recipe, env: Env) -> Iterable[Check]: ...


@runtime_checkable
class CanFind(Protocol):
    """Optional: what carries the label of one run, in the places of `known`, which are the run's:
    fewer requests than `sweep`."""

    def of_run(self, run: str, known: Iterable[Ref], env: Env) -> Iterator[Ref]: ...


@runtime_checkable
class CanTellApart(Protocol):
    """Optional: the job of an attempt that its boot, in its record, calls `told`. None: it is the
    one that is followed, or it is not there, or not the run's."""

    def other(self, job: JobHandle, told: str, env: Env) -> Optional[Ref]: ...


@runtime_checkable
class CanTell(Protocol):
    """Optional: `sweep` with what is known of each resource; with `everyone`, of every owner."""

    def labelled(self, env: Env, everyone: bool) -> Iterator[Labelled]: ...


@runtime_checkable
class CanSayHow(Protocol):
    """Optional: the command that ends a resource by hand; None for a ref that makes no sense. It is
    made of checked parts: refs come from journals, and those may be a stranger's."""

    def by_hand(self, ref: Ref) -> Optional[str]: ...
