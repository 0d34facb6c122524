"""`fold`: the records of a journal as a `Run`. Pure: no clock, no disk, no decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Optional

from launcher.backends.base import Held, Phase, Ref
from launcher.errors import JournalDamaged
from launcher.run import Attempt, Driver, JobState, Run, StageState

Record = dict[str, Any]
#: An attempt that waits for its machines.
NOT_STARTED = (Phase.PLANNED, Phase.QUEUED, Phase.PROVISIONING)
#: The largest figure of an attempt: UTC seconds of a year with four digits.
_MOST = 1e11
#: What comes of reading a record that is whole JSON and yet not what its kind holds.
_INCOMPLETE = (KeyError, TypeError, ValueError, StopIteration, IndexError, AttributeError)


def fold(records: Iterable[Record]) -> Run:
    """The run that these records tell of; any beginning of a journal folds. Errors:
    `JournalDamaged` when there is no `created` record."""
    return Fold(records).run


class Fold:
    """`fold`, one record at a time, and what the engine needs beside the `Run`."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.created: Record = {}
        self.bundle: Record = {}
        self.recipe: Record = {}  # in force: of `created`, the newest `resumed` or `changed`
        self.chosen: list[Record] = []  # the records that decided what the recipe is
        self.taken = 0  # the number of the newest change that a driver has taken up
        self.changed = -math.inf  # when the recipe of the live run was last changed
        self.intended: dict[tuple[int, int, str], Record] = {}  # the records of intents
        self.open: dict[tuple[int, int], dict[str, Record]] = {}  # intents without a ref
        self.intents: dict[tuple[int, int], list[Record]] = {}
        self.offers: dict[tuple[int, int], Record] = {}  # where each attempt was placed
        #: Attempts that were given up although a request of theirs may have been applied.
        self.unanswered: set[tuple[int, int]] = set()
        self.before: dict[int, int] = {}  # job -> attempts made before the newest `resumed`
        self.stopping: Optional[float] = None  # when the driver saw the stop marker
        self.resumed = 0  # how often the run was opened again
        self.notified: set[str] = set()  # events that were told, or are being told
        self._run: Optional[Run] = None
        for record in records:
            self.apply(record)

    @property
    def run(self) -> Run:
        if self._run is None:
            raise JournalDamaged("a journal without its first record", "see `launch status`")
        return self._run

    def apply(self, record: Record) -> None:
        """Take one more record in. Kinds that this version does not know are passed over. Errors:
        `JournalDamaged` for one that lacks what its kind has; this fold is then of no more use."""
        try:
            self._take(record)
        except _INCOMPLETE as error:
            raise JournalDamaged(
                f"record {record.get('seq')} of the journal, '{record.get('kind')}', cannot be "
                f"used: {type(error).__name__}: {error}",
                "`launch teardown --all` still finds what this run holds",
            ) from error

    def _take(self, record: Record) -> None:
        if record["kind"] == "created":
            self._on_created(record)
            return
        handler = getattr(self, f"_on_{record['kind']}", None)
        if handler is not None:
            handler(record)
        self._sum_up()

    def attempt(self, job: int, number: int) -> Attempt:
        return next(a for a in self.run.jobs[job].attempts if a.number == number)

    def closed(self, job: int, attempt: Attempt) -> bool:
        """Over, and confirmed to hold nothing."""
        return (
            attempt.phase.over
            and not attempt.holding
            and not self.open.get((job, attempt.number))
            and attempt.held in (Held.NONE, Held.GONE)
        )

    def _on_created(self, record: Record) -> None:
        self.created, self.recipe, self.chosen = record, record["recipe"], [record]
        self.bundle = {key: record["bundle"][key] for key in ("path", "sha256", "bytes")}
        run = Run(
            id=record["id"],
            name=record["name"],
            recipe=record["recipe"]["name"],
            fingerprint=record["fingerprint"],
            owner=record["owner"],
            root=record["root"],
            created=record["created"],
            budget=_given(record["recipe"].get("budget")),
        )
        run.stages = [
            StageState(id=s["id"], stage=s["stage"], job=s["job"], folder=s["folder"])
            for s in record["stages"]
        ]
        run.jobs = [
            JobState(j["index"], j["name"], j["backend"], list(j["stages"])) for j in record["jobs"]
        ]
        self._run = run

    def _on_driver(self, record: Record) -> None:
        who = record["driver"]
        self.run.driver = Driver(who["host"], who["pid"], record["time"], record["epoch"])

    def _on_intent(self, record: Record) -> None:
        key = (record["job"], record["attempt"])
        attempts = self.run.jobs[record["job"]].attempts
        if not attempts or attempts[-1].number != record["attempt"]:
            offer = self.offers[key] = record["offer"]
            attempts.append(
                Attempt(
                    record["attempt"],
                    place=offer["place"],
                    started=record["time"],
                    capacity=offer["capacity"],
                    accelerator=offer.get("accelerator", ""),
                    usd_per_hour=offer["usd_per_hour"],
                    from_step=(record.get("from") or {}).get("step"),
                )
            )
        self.intents.setdefault(key, []).append(record["intent"])
        self.intended[key[0], key[1], record["intent"]["name"]] = record
        self.open.setdefault(key, {})[record["intent"]["name"]] = record["intent"]
        attempts[-1].phase, attempts[-1].held = Phase.PROVISIONING, Held.CREATING

    def _on_ref(self, record: Record) -> None:
        attempt = self.attempt(record["job"], record["attempt"])
        ref = ref_of(record["ref"])
        if ref.run != self.run.id:  # what is written down here is deleted one day
            raise ValueError(f"{ref.name} belongs to another run")
        waiting = self.open.get((record["job"], record["attempt"]), {})
        waiting.pop(ref.name, None)
        attempt.refs = [r for r in attempt.refs if r.name != ref.name] + [ref]
        attempt.held = Held.CREATING if waiting else Held.LIVE

    def _on_phase(self, record: Record) -> None:
        attempt = self.attempt(record["job"], record["attempt"])
        waited = attempt.phase in NOT_STARTED
        attempt.phase, attempt.held = Phase(record["phase"]), Held(record["held"])
        attempt.why, attempt.exit_code = record["why"], record["exit_code"]
        attempt.cause = record.get("cause", "")
        if attempt.phase.over and attempt.ended is None:
            attempt.ended = record.get("ended", record["time"])
        if "began" in record:
            attempt.began = record["began"]
        elif attempt.began is None and waited:
            _note_begin(attempt, record["time"])
        key = (record["job"], record["attempt"])
        waiting = self.open.get(key, {}).values()
        if attempt.held is not Held.NONE and any(raw["billable"] for raw in waiting):
            self.unanswered |= {key} if attempt.phase.over else set()
        if attempt.held in (Held.NONE, Held.GONE):
            self.open.pop(key, None)

    def _on_gone(self, record: Record) -> None:
        attempt = self.attempt(record["job"], record["attempt"])
        attempt.gone.append(record["ref"]["name"])
        if not attempt.holding and not self.open.get((record["job"], record["attempt"])):
            attempt.held = Held.GONE

    def _on_stage(self, record: Record) -> None:
        self._stage(record["id"]).phase = Phase(record["phase"])

    def _on_gate(self, record: Record) -> None:
        self._stage(record["id"]).gate = (
            "passed" if record["passed"] else "; ".join(record["lines"])
        )

    def _on_stop(self, record: Record) -> None:
        self.stopping = record["time"]

    def _on_resumed(self, record: Record) -> None:
        run = self.run
        if run.ended is not None:
            run.idle += max(0.0, record["time"] - run.ended)
        run.ended, run.exit_code, run.why, run.phase = None, None, "", Phase.PLANNED
        self.recipe = record.get("recipe", self.recipe)
        self.chosen.append(record)
        self.taken = max(self.taken, record.get("taken", 0))
        run.budget, run.warnings = _given(self.recipe.get("budget")), []
        if run.driver is not None:  # who opens a run again is about to drive it
            who = record["driver"]
            run.driver = Driver(who["host"], who["pid"], record["time"], run.driver.epoch)
        self.before = {job.index: len(job.attempts) for job in run.jobs}
        self.stopping = None
        self.resumed += 1
        for stage in run.stages:
            if stage.gate != "passed":
                stage.gate = None
            if stage.phase is not Phase.SUCCEEDED:
                stage.phase = Phase.PLANNED

    def _on_changed(self, record: Record) -> None:
        self.taken = record["number"]
        if "recipe" in record:
            self.recipe = record["recipe"]
            self.chosen.append(record)
            self.changed = record["time"]
            self.run.budget = _given(self.recipe.get("budget"))

    def _on_end(self, record: Record) -> None:
        run = self.run
        run.ended, run.phase = record["time"], Phase(record["phase"])
        run.why, run.exit_code = record["why"], record["exit_code"]
        run.spent_usd, run.unpriced = spent(run, record["time"]), unpriced(run, record["time"])

    def _on_notified(self, record: Record) -> None:
        self.notified.add(record["id"])

    def _on_undelivered(self, record: Record) -> None:
        text = f"'{record['event']}' could not be told to {record['to']}: {record['why']}"
        self.run.warnings.append(text)

    def _stage(self, stage_id: str) -> StageState:
        return next(stage for stage in self.run.stages if stage.id == stage_id)

    def _sum_up(self) -> None:
        """The axes of the run, from those of its attempts."""
        run = self.run
        attempts = [attempt for job in run.jobs for attempt in job.attempts]
        run.held = worst(attempt.held for attempt in attempts)
        fresh = [a for job in run.jobs for a in job.attempts[self.before.get(job.index, 0) :]]
        if run.ended is not None or not fresh:
            return
        newest = fresh[-1]
        run.phase, run.why, run.usd_per_hour = newest.phase, newest.why, newest.usd_per_hour
        if self.stopping is not None:
            run.phase = Phase.STOPPING
        elif newest.cause == "deadline":
            run.phase = Phase.STOPPING  # unless its budget was raised since: then it goes on
        elif newest.phase.over and newest.phase is not Phase.PREEMPTED:
            run.phase = Phase.STARTING  # between two attempts, or two jobs


def spent(run: Run, now: float) -> Optional[float]:
    """US dollars of all attempts until `now`, as far as prices are known (`unpriced`: not all of
    them are); None when none of what was paid for has a known price."""
    known = [
        attempt.usd_per_hour * duration(attempt, now) / 3600
        for job in run.jobs
        for attempt in job.attempts
        if attempt.usd_per_hour is not None
    ]
    return None if not any(known) and unpriced(run, now) else sum(known)


def unpriced(run: Run, now: float) -> bool:
    """Whether any attempt until `now` has cost what nobody knows: `spent` is then the least."""
    attempts = (attempt for job in run.jobs for attempt in job.attempts)
    return any(a.usd_per_hour is None and duration(a, now) > 0 for a in attempts)


def duration(attempt: Attempt, now: float) -> float:
    """Seconds that an attempt cost, or has cost until `now`: from when its machines began to work,
    where somebody said when that was; to wait for them costs nothing. Never negative."""
    since = attempt.began if attempt.began is not None else attempt.started
    if since is None or (attempt.began is None and attempt.phase in NOT_STARTED):
        return 0.0
    return max(0.0, (attempt.ended if attempt.ended is not None else now) - since)


def _note_begin(attempt: Attempt, seen: float) -> None:
    """When an attempt that waited for machines a look before began, if its backend does not tell:
    no earlier than that look. One that is over without having had any never did; of another that
    is over, nobody knows, and then all its time counts."""
    if not attempt.phase.over:
        attempt.began = None if attempt.phase in NOT_STARTED else seen
    elif attempt.cause == "capacity" or (
        attempt.phase is Phase.CANCELLED and attempt.cause != "deadline"
    ):
        attempt.began = attempt.ended


def _given(raw: Any) -> dict[str, Any]:
    return {key: value for key, value in (raw or {}).items() if value is not None}


def run_of(raw: dict[str, Any]) -> Run:
    """A `Run` from its JSON (`summary.json`). Errors: KeyError, TypeError, ValueError,
    AttributeError."""
    raw = {key: value for key, value in raw.items() if key != "v"}
    raw["stages"] = [StageState(**{**s, "phase": Phase(s["phase"])}) for s in raw["stages"]]
    raw["jobs"] = [JobState(**{**j, "attempts": _attempts(j["attempts"])}) for j in raw["jobs"]]
    raw["driver"] = Driver(**raw["driver"]) if raw["driver"] else None
    raw["phase"], raw["held"] = Phase(raw["phase"]), Held(raw["held"])
    return Run(**raw)


def ref_of(raw: dict[str, Any]) -> Ref:
    ref = Ref(**raw)
    texts = (ref.backend, ref.kind, ref.name, ref.place, ref.run)
    if not all(isinstance(text, str) for text in texts) or not isinstance(ref.data, dict):
        raise TypeError(f"this is no ref: {ascii(raw)[:200]}")
    return ref


def worst(held: Iterable[Held]) -> Held:
    """What to say of several resources at once."""
    return max(held, key=_MONEY.index, default=Held.NONE)


#: From nothing to worry about to the worst.
_MONEY = (Held.NONE, Held.GONE, Held.DELETING, Held.CREATING, Held.LIVE, Held.LEAKED)


def _attempts(raw: list[dict[str, Any]]) -> list[Attempt]:
    for attempt in raw:  # sums and calendars are made of these
        for name in ("started", "began", "ended", "usd_per_hour"):
            if (figure := attempt.get(name)) is not None and not 0 <= figure <= _MOST:
                raise ValueError(f"{name} of an attempt is {figure}")
    return [
        Attempt(
            **{
                **attempt,
                "phase": Phase(attempt["phase"]),
                "held": Held(attempt["held"]),
                "refs": [ref_of(ref) for ref in attempt["refs"]],
            }
        )
        for attempt in raw
    ]
