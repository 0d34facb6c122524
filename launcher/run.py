"""A run as everybody sees it: plain dataclasses, folded from the journal by `journal.fold`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Optional

from launcher.backends.base import Held, Phase, Ref

#: Version of every `--json` document.
JSON_VERSION = 1


@dataclass
class Driver:
    """Who drives: the newest claim in the journal. `alive` None: on another host, unknown."""

    host: str
    pid: int
    since: float
    epoch: int
    alive: Optional[bool] = None


@dataclass
class StageState:
    id: str
    stage: str
    job: int  # index of the job that runs it
    folder: str  # its artifact folder
    phase: Phase = Phase.PLANNED
    gate: Optional[str] = None  # "passed", or why not


@dataclass
class Attempt:
    number: int
    phase: Phase = Phase.PLANNED
    held: Held = Held.NONE
    refs: list[Ref] = field(default_factory=list)
    place: str = ""
    started: Optional[float] = None  # when it was asked for
    ended: Optional[float] = None
    why: str = ""
    exit_code: Optional[int] = None
    cause: str = ""  # what the engine decides by: capacity, preempted, infrastructure, job, ...
    capacity: str = ""  # of the offer: spot, standard, ...
    accelerator: str = ""  # of the offer: L4:1, ...
    usd_per_hour: Optional[float] = None
    gone: list[str] = field(default_factory=list)  # names of refs confirmed absent
    from_step: Optional[int] = None  # of the newest whole checkpoint when it began; 0: of none
    restarts: int = 0  # by the service itself, within the attempt
    began: Optional[float] = None  # when its machines began to work: from then on it costs

    @property
    def holding(self) -> list[Ref]:
        """Resources not confirmed absent."""
        return [ref for ref in self.refs if ref.name not in self.gone]

    @property
    def unconfirmed(self) -> bool:
        """Ended by its boot's own word while nobody drove: no driver has looked since."""
        return self.ended is not None and not self.phase.over


@dataclass
class JobState:
    """Contiguous stages on the same hardware; a gate ends a job."""

    index: int
    name: str  # <run name>-j<index>
    backend: str
    stages: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)


@dataclass
class Run:
    id: str
    name: str
    recipe: str
    fingerprint: str
    owner: str
    root: str  # artifact root
    created: float
    stages: list[StageState] = field(default_factory=list)
    jobs: list[JobState] = field(default_factory=list)
    phase: Phase = Phase.PLANNED
    held: Held = Held.NONE
    why: str = ""
    driver: Optional[Driver] = None
    ended: Optional[float] = None
    exit_code: Optional[int] = None
    usd_per_hour: Optional[float] = None
    spent_usd: Optional[float] = None  # as far as prices are known; None: none is
    unpriced: bool = False  # it has cost more than `spent_usd`: some prices are not known
    idle: float = 0.0  # seconds between its ends and its resumptions
    budget: dict[str, Any] = field(default_factory=dict)  # the limits that the recipe sets
    money: dict[str, Any] = field(default_factory=dict)  # of a live one: `money.outlook`
    progress: dict[str, Any] = field(default_factory=dict)  # last metrics line, and eta_seconds
    warnings: list[str] = field(default_factory=list)
    #: Where its artifacts can be read on this machine, empty: at the root. Of no use to others.
    folder: str = field(default="", compare=False, repr=False)

    @property
    def live(self) -> bool:
        """Not over, or over while something may still bill."""
        return self.ended is None or self.held not in (Held.NONE, Held.GONE)

    def lasted(self, now: float) -> float:
        """Seconds from its creation to its end (or `now`), without those in which it was over."""
        return max(0.0, (self.ended if self.ended is not None else now) - self.created - self.idle)

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        del facts["folder"]
        return {"v": JSON_VERSION, **facts}
