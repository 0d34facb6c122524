"""The recipe as typed data: what `recipe.load` returns and the engine reads.

Blocks that the trainer understands (`model`, `data`, `train`, ...) are the trainer's own classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Optional

from launcher.clock import seconds
from trainer.config import (
    Data,
    Distill,
    Evaluate,
    Export,
    Grpo,
    Merge,
    Model,
    Preference,
    Sdce,
    Smoke,
    StageName,
    Strict,
    Targets,
    Tokenizer,
    Train,
    require,
)

NAME = re.compile(r"^[a-z][a-z0-9-]{0,39}$")
_ACCELERATOR = re.compile(r"^[A-Za-z0-9][A-Za-z0-9.-]*(:[1-9][0-9]*)?\Z")
_VERSION = re.compile(r"^[0-9]{1,3}(\.[0-9]{1,3}){1,2}\Z")
_MAJOR = re.compile(r"^[0-9]{1,3}(\.[0-9]{1,3}){0,2}\Z")
_SHA256 = re.compile(r"^[0-9a-fA-F]{64}\Z")
_MEMBER = re.compile(r"^(user|group|serviceAccount|domain):[^\s:]+\Z|^principal(Set)?://\S+\Z")
_WEBHOOK = re.compile(
    r"(env://[A-Za-z_][A-Za-z0-9_]*|secret-manager://[a-z][a-z0-9:.-]*/[A-Za-z0-9_-]+"
    r"(/[A-Za-z0-9_-]+)?)\Z"
)
EventName = Literal["ended", "failed", "budget", "preempted", "leaked", "gate"]
#: What a price is called that the recipe itself gives (`hardware.usd_per_hour`).
OWN_PRICE = "the recipe"
CapacityName = Literal["spot", "standard", "flex", "reserved"]
StorageClass = Literal["STANDARD", "NEARLINE", "COLDLINE", "ARCHIVE"]


@dataclass(frozen=True)
class Local(Strict):
    """Jobs on this machine. `python`: the interpreter (default: the one that runs `launch`)."""

    python: Optional[str] = None


@dataclass(frozen=True)
class Vertex(Strict):
    """Vertex AI custom jobs. Unset fields: `project` from the environment, `machine` from the
    hardware table, `image` from the backend's dated default, `disk_gb` (of the boot disk, which
    holds the work folder) from the service. `network`: projects/NUMBER/global/networks/NAME, for a
    peered VPC."""

    project: Optional[str] = None
    image: Optional[str] = None
    machine: Optional[str] = None
    service_account: Optional[str] = None
    network: Optional[str] = None
    disk_gb: Optional[int] = None

    def __post_init__(self) -> None:
        fits = self.disk_gb is None or 100 <= self.disk_gb <= 64000
        require(self, disk_gb=(fits, "must be 100 to 64000"))


@dataclass(frozen=True)
class Wheel(Strict):
    """A built package that the job installs. `source`: a `.whl`, or a folder of them to choose from
    when the run is planned. `version`: that one (default: the newest that fits). `sha256`: of the
    file; without it `SHA256SUMS` or `FILE.whl.sha256` beside the file has to tell."""

    name: str
    source: str
    version: Optional[str] = None
    sha256: Optional[str] = None

    def __post_init__(self) -> None:
        require(
            self,
            name=(bool(self.name), "is empty"),
            source=(bool(self.source), "is empty"),
            sha256=(self.sha256 is None or bool(_SHA256.match(self.sha256)),
                    "must be 64 hexadecimal digits"),
        )  # fmt: skip


@dataclass(frozen=True)
class Environment(Strict):
    """What the image has, as far as wheels depend on it: versions of Python, torch, the CUDA that
    torch was built for, its C++ ABI, and the C library."""

    python: Optional[str] = None
    torch: Optional[str] = None
    cuda: Optional[str] = None
    cxx11_abi: bool = True
    glibc: str = "2.28"
    wheels: tuple[Wheel, ...] = ()

    def __post_init__(self) -> None:
        given = {"python": self.python, "torch": self.torch, "cuda": self.cuda, "glibc": self.glibc}
        require(self, **{
            name: (value is None or bool((_MAJOR if name == "cuda" else _VERSION).match(value)),
                   f"must be a version such as {example}")
            for (name, value), example in zip(given.items(), ("3.11", "2.9", "12.8", "2.28"))
        })  # fmt: skip


@dataclass(frozen=True)
class Hardware(Strict):
    """Where a stage runs. `accelerator` is `TYPE:COUNT` per node; `cpu:2` is two workers.
    `usd_per_hour`: what an hour of one machine costs, where no table knows or another price was
    agreed; it counts instead of every table, in all places and capacities."""

    backend: str = "local"
    accelerator: str = "cpu:1"
    nodes: int = 1
    capacity: tuple[CapacityName, ...] = ("standard",)
    places: tuple[str, ...] = ()
    usd_per_hour: Optional[float] = None
    environment: Optional[Environment] = None
    local: Optional[Local] = None
    vertex: Optional[Vertex] = None

    def __post_init__(self) -> None:
        require(
            self,
            nodes=(self.nodes >= 1, "must be at least 1"),
            capacity=(bool(self.capacity), "must name at least one"),
            usd_per_hour=(self.usd_per_hour is None or self.usd_per_hour > 0,
                          "must be greater than 0"),
            accelerator=(bool(_ACCELERATOR.match(self.accelerator)),
                         "must look like L4:1, H100:8, v4-32 or cpu:2"),
        )  # fmt: skip

    @property
    def own_rate(self) -> Optional[float]:
        """USD an hour of all nodes by the recipe's own word; None: it gives none."""
        return None if self.usd_per_hour is None else self.usd_per_hour * self.nodes


@dataclass(frozen=True)
class Budget(Strict):
    """Limits of a run. `wait`: how long to queue for capacity (`30m`, `2h`)."""

    usd: Optional[float] = None
    usd_per_hour: Optional[float] = None
    hours: Optional[float] = None
    wait: Optional[str] = None

    def __post_init__(self) -> None:
        positive = "must be greater than 0"
        require(
            self,
            usd=(self.usd is None or self.usd > 0, positive),
            usd_per_hour=(self.usd_per_hour is None or self.usd_per_hour > 0, positive),
            hours=(self.hours is None or self.hours > 0, positive),
            wait=(self.wait is None or _is_duration(self.wait),
                  "must be a number and a unit: 90s, 30m, 2h, 1d"),
        )  # fmt: skip


@dataclass(frozen=True)
class Retry(Strict):
    """How often the engine tries again, by cause."""

    preempted: int = 10
    capacity: int = 20
    infrastructure: int = 2
    job: int = 0

    def __post_init__(self) -> None:
        names = ("preempted", "capacity", "infrastructure", "job")
        require(self, **{n: (getattr(self, n) >= 0, "must not be negative") for n in names})


@dataclass(frozen=True)
class Infra(Strict):
    """How `launch infra` makes what outlives a run; `launch up` reads none of it. `state`: where
    it keeps what it made (default: this machine). `delete_after_days`: of objects of the bucket, by
    the beginning of their name, or with `*` before it by its end."""

    state: Optional[str] = None
    bucket_location: Optional[str] = None  # None: the region of the first place
    storage_class: StorageClass = "STANDARD"
    delete_after_days: Mapping[str, int] = field(default_factory=dict)
    retain_bucket: bool = True
    operators: tuple[str, ...] = ()
    viewers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named = all(key.strip("*/") and "*" not in key[1:] for key in self.delete_after_days)
        late = all(days >= 1 for days in self.delete_after_days.values())
        member = (
            "must be user:EMAIL, group:EMAIL, serviceAccount:EMAIL, domain:NAME or principal://"
        )
        require(
            self,
            state=(self.state is None or bool(re.match(r"gs://[^/]+", self.state)),
                   "must be gs://BUCKET or gs://BUCKET/FOLDER; leave it out to keep it here"),
            delete_after_days=(named and late, "must be NAME/: DAYS or '*NAME': DAYS; DAYS from 1"),
            operators=(all(map(_MEMBER.match, self.operators)), member),
            viewers=(all(map(_MEMBER.match, self.viewers)), member),
        )  # fmt: skip


@dataclass(frozen=True)
class Notify(Strict):
    """Whom the driver tells, and of what (`notify.py`). `webhook` is a reference to an address,
    which is a secret; `command` is a program with its arguments, on PATH or with an absolute
    path."""

    webhook: Optional[str] = None
    command: tuple[str, ...] = ()
    on: tuple[EventName, ...] = ("ended", "failed", "budget", "leaked")

    def __post_init__(self) -> None:
        program = self.command[0] if self.command and self.command[0] else ""
        one = bool(self.webhook) != bool(self.command)
        require(
            self,
            webhook=(
                one and (self.webhook is None or bool(_WEBHOOK.match(self.webhook))),
                "must be a reference, because the address is a secret: env://NAME or "
                "secret-manager://PROJECT/NAME" if one else "give either this or `command`",
            ),
            command=(not self.command
                     or (bool(program) and (program.startswith("/") or "/" not in program)),
                     "must begin with a program on PATH or an absolute path"),
            on=(bool(self.on), "must name at least one event"),
        )  # fmt: skip


@dataclass(frozen=True)
class Code(Strict):
    """The user's own files below the folder `path`, for jobs to import. `include`: patterns of
    paths below it. `sha256` and `bytes` are of the archive that is sent: launch fills them in."""

    path: str
    include: tuple[str, ...] = ("**/*.py",)
    sha256: Optional[str] = None
    bytes: Optional[int] = None

    def __post_init__(self) -> None:
        plain = all(p and not p.startswith("/") and ".." not in p.split("/") for p in self.include)
        both = (self.sha256 is None) == (self.bytes is None)
        require(
            self,
            path=(bool(self.path) and "://" not in self.path, "must be a folder of this machine"),
            include=(bool(self.include) and plain, "must be patterns below `path`: rewards/**"),
            sha256=(self.sha256 is None or bool(_SHA256.match(self.sha256)),
                    "must be 64 hexadecimal digits"),
            bytes=(both and (self.bytes is None or self.bytes > 0),
                   "is what launch writes beside `sha256`; leave both out"),
        )  # fmt: skip


@dataclass(frozen=True)
class Gate(Strict):
    """One condition on recorded evaluation. `metric` and `below`/`above` are names in this stage's
    evaluation.json, or `STAGE.NAME` for another stage. A missing or NaN value fails."""

    metric: str
    min: Optional[float] = None
    max: Optional[float] = None
    below: Optional[str] = None
    above: Optional[str] = None
    by: float = 0.0

    def __post_init__(self) -> None:
        given = [v for v in (self.min, self.max, self.below, self.above) if v is not None]
        require(self, metric=(bool(given), "needs `min`, `max`, `below` or `above` beside it"))


@dataclass(frozen=True)
class Expected(Strict):
    """What launch cannot know by itself and a forecast needs: how much there is to read, and how
    fast it went elsewhere ([lowest, highest] examples an hour, in place of a computed speed)."""

    examples: Optional[int] = None
    tokens_per_example: Optional[float] = None
    examples_per_hour: Optional[tuple[float, ...]] = None

    def __post_init__(self) -> None:
        rates = self.examples_per_hour
        in_order = rates is None or (len(rates) == 2 and 0 < rates[0] <= rates[1])
        require(
            self,
            examples=(self.examples is None or self.examples >= 1, "must be at least 1"),
            tokens_per_example=(self.tokens_per_example is None or self.tokens_per_example >= 1,
                                "must be at least 1"),
            examples_per_hour=(in_order, "must be two numbers, the lower first: [4800, 7200]"),
        )  # fmt: skip


@dataclass(frozen=True)
class Stage(Strict):
    """One stage with everything inherited from the recipe filled in."""

    id: str
    stage: StageName
    model: Optional[Model] = None
    data: Data = field(default_factory=Data)
    train: Optional[Train] = None
    kd: Optional[Distill] = None
    sdce: Optional[Sdce] = None
    preference: Optional[Preference] = None
    grpo: Optional[Grpo] = None
    targets: Optional[Targets] = None
    tokenizer: Optional[Tokenizer] = None
    evaluate: Optional[Evaluate] = None
    merge: Optional[Merge] = None
    export: Optional[Export] = None
    smoke: Optional[Smoke] = None
    hardware: Hardware = field(default_factory=Hardware)
    forecast: Optional[Expected] = None
    needs: tuple[str, ...] = ()
    gate: tuple[Gate, ...] = ()


@dataclass(frozen=True)
class Recipe(Strict):
    """A whole recipe, resolved: `extends`, variables, overrides and pipeline inheritance applied.
    A recipe without `pipeline:` has one stage. `artifacts` and `tensorboard` may hold
    `{run}`."""

    name: str
    stages: tuple[Stage, ...]
    description: str = ""
    budget: Budget = field(default_factory=Budget)
    retry: Retry = field(default_factory=Retry)
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    artifacts: Optional[str] = None  # None: $LAUNCH_HOME/runs/<id>/artifacts (local backend only)
    tensorboard: Optional[str] = None  # gs:// or s3://; None: below `artifacts`, as the rest
    infra: Optional[Infra] = None
    notify: tuple[Notify, ...] = ()
    code: Optional[Code] = None
    launch: int = 1

    @property
    def pipeline(self) -> bool:
        return len(self.stages) > 1


def _is_duration(text: str) -> bool:
    try:
        return seconds(text) >= 0
    except ValueError:
        return False
