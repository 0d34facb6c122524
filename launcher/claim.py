"""A claimed run: this host's lock, an epoch in the journal, and what every part of the engine asks
of it. No loops over backends here."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from launcher import changes, home, money, retry
from launcher.artifacts import Artifacts, below, open_artifacts, parsed
from launcher.backends.base import Backend, Env, Intent, JobHandle, JobSpec, Offer, Phase
from launcher.bundle import Bundle
from launcher.bundle import build as build_bundle
from launcher.bundle import place as bundle_place
from launcher.clock import Clock, seconds
from launcher.errors import JournalDamaged, NotFromHere, Transient
from launcher.fold import NOT_STARTED, Fold, Record
from launcher.journal import Journal, held_elsewhere, newest_claim, ours, refuse_swapped
from launcher.plan import job_spec, jobs, placed
from launcher.run import Attempt, JobState, Run, StageState
from launcher.spec import Hardware, Recipe, Stage
from launcher.waiting import Waiting
from trainer.boot import OUTAGE
from trainer.config import Problem, build, dotted, to_dict

Load = Callable[[str], Backend]
#: Seconds to the first look at a job, and the least between two.
FIRST_LOOK = 0.25
#: The longest single wait, so that a request to stop is seen soon.
NAP = 2.0
#: Seconds between two looks for the marker in a store.
POLL = 5.0
#: A whole checkpoint: its manifest is written last.
_MANIFEST = re.compile(r"checkpoints/step-(\d+)/MANIFEST\.json$")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@contextmanager
def claimed(
    run_id: str,
    env: Env,
    load: Load,
    lock: Optional[home.DriverLock],
    take_over: bool,
    patience: float = math.inf,
) -> Iterator[Claim]:
    """The run, held by this process alone while the context lasts. A run that is over is not
    claimed unless `take_over`. `patience`: seconds to wait for a store that does not answer.
    Errors: `HeldElsewhere`, `JournalDamaged`, `UsageError`, `Transient` after `patience`."""
    facts = home.identity(env.home, run_id) or home.find(env.home, run_id)
    place = home.folder(env.home, run_id)
    lock = lock or home.DriverLock.acquire(place)
    if lock is None:
        raise held_elsewhere(home.claimed(place), facts["name"])
    try:
        artifacts = open_artifacts(facts["root"], place, env.environ, env.clock)
        artifacts.patience, artifacts.tell = patience, partial(say, env.clock)
        journal = Journal(place, artifacts, env.clock)
        journal.name = facts["name"]
        foreign = partial(refuse_foreign, journal, take_over=take_over)
        fold = Fold(journal.read(heal=True, allowed=foreign))
        refuse_swapped(fold.run, facts)
        if fold.run.live or take_over:
            refuse_processes(fold.run, facts)
        claim = Claim(env, load, journal, fold, place)
        claim.foreign |= "adopted" in facts
        if fold.run.live or take_over:
            lock.claim(os.getpid(), env.clock.now())
            journal.epoch += 1
            claim.record("driver")
        for warning in journal.warnings:
            claim.say(warning)
        yield claim
    finally:
        lock.close()


def refuse_foreign(journal: Journal, records: Sequence[Record], take_over: bool) -> None:
    """Raise `HeldElsewhere` when the newest claim came from another $LAUNCH_HOME. A driver copies
    its claim to its own; where the copy is missing, this host's lock says nothing about it."""
    newest = newest_claim(records)
    if newest is None or take_over or ours(journal.copy.parent, newest):
        return
    raise held_elsewhere({**newest["driver"], "since": newest["time"]}, journal.name)


def refuse_processes(run: Run, facts: Mapping[str, Any]) -> None:
    """Raise `NotFromHere` for a run that another home started as processes of its machine."""
    used = {job.backend for job in run.jobs}
    used |= {ref.backend for job in run.jobs for a in job.attempts for ref in a.refs}
    if "adopted" in facts and "local" in used:
        raise NotFromHere(
            f"{run.name} runs as processes of the machine that started it: it can be driven, "
            "stopped and torn down only there",
            "`launch status`, `logs` and `pull` work from here; `launch up` starts your own run",
        )


def newest_checkpoint(artifacts: Artifacts, root: str, folder: str) -> int:
    """The step of the newest whole checkpoint in a stage's folder, 0: it has none."""
    at = below(root, folder)
    names = artifacts.names(f"{at}/checkpoints/" if at else "checkpoints/")
    return max((int(m[1]) for name in names if (m := _MANIFEST.search(name))), default=0)


class Claim:
    """What the engine, and the clearing, know and write."""

    def __init__(self, env: Env, load: Load, journal: Journal, fold: Fold, place: Path) -> None:
        # Somebody else's run that was taken over keeps its owner, by whose label it is swept.
        self.env, self.clock = replace(env, owner=fold.run.owner), env.clock
        self.journal, self.fold, self.place = journal, fold, place
        self.artifacts = journal.artifacts
        self.recipe = recipe_of(fold.recipe, journal.first)
        #: Whether another home has had a say in the recipe: then no file of this machine that it
        #: names is sent anywhere, and nothing of it runs as a process here.
        self.foreign = not all(ours(place, record) for record in fold.chosen)
        self.jobs: list[list[Stage]] = [list(stages) for stages in jobs(self.recipe)]
        #: How long it is waited for what does not go, or does not answer.
        self.waits = Waiting(env.clock, self.say)
        #: Attempts whose requests were looked for, as long as what they made may show late.
        self.sought: set[tuple[int, int]] = set()
        self._load = load
        self._backends: dict[str, Backend] = {}
        self._asked: Optional[float] = None  # when the marker was last looked for
        self._marker: Optional[dict[str, Any]] = None

    @property
    def run(self) -> Run:
        return self.fold.run

    def record(self, kind: str, **facts: Any) -> None:
        self.fold.apply(self.journal.append(kind, **facts))

    def say(self, text: str) -> None:
        """A line for driver.log."""
        say(self.clock, text)

    def backend(self, name: str) -> Backend:
        if name not in self._backends:
            self._backends[name] = self._load(name)
        return self._backends[name]

    def hardware(self, job: JobState) -> Hardware:
        return self.jobs[job.index][0].hardware

    def handle(self, job: JobState, attempt: Attempt) -> JobHandle:
        run = self.run
        return JobHandle(run.id, job.name, attempt.number, run.root, tuple(attempt.refs))

    def spec(self, job: JobState, offer: Offer) -> JobSpec:
        """The job as the backend sees it, `${deadline}` still open. Errors: `NotFromHere`."""
        run = self.run
        if self.foreign and "local" in (job.backend, self.hardware(job).backend):
            raise NotFromHere(
                f"the recipe of {run.name} comes from another machine: it does not run as "
                "processes of this one",
                "`launch up` starts a run of your own",
            )
        spec = job_spec(
            self.recipe, run.id, run.name, job.index, run.root, self.env.home, self._bundle(),
            run.owner, self.env, self.fold.created.get("commit"),
        )  # fmt: skip
        return placed(spec, self.recipe.budget, offer)

    def guarded(self, intent: Intent) -> Intent:
        """The intent, without the file of this machine that it would send when another home named
        it. The bundles of this home are its own."""
        file = intent.request.get("file")
        own = file is None or Path(file).parent == self.env.home / "bundles"
        if own or not self.foreign:
            return intent
        return replace(intent, request={**intent.request, "file": None})

    def recorded(self, job: JobState, attempt: Attempt, name: str) -> Optional[Intent]:
        """The intent of that name as this home has recorded it; None: another home has."""
        record = self.fold.intended[job.index, attempt.number, name]
        return Intent(**record["intent"]) if ours(self.place, record) else None

    def deadline(self, offer: Offer) -> Optional[int]:
        """What `${deadline}` takes: the whole seconds that the budget has left, so that it holds
        without a driver; None: no limit."""
        left = self.budget_left(offer.usd_per_hour)
        return None if left is None else max(1, int(left))

    def offer(self, job: JobState, attempt: Attempt) -> Offer:
        """Where an attempt was placed, as its first intent recorded it."""
        return Offer(**self.fold.offers[job.index, attempt.number])

    def waiting(self, job: JobState, attempt: Attempt) -> Mapping[str, Any]:
        """Intents that were recorded and have no answer, by name."""
        return self.fold.open.get((job.index, attempt.number), {})

    def answered(self, job: JobState, attempt: Attempt) -> bool:
        """Whether a request of the attempt that costs money has had an answer."""
        intents = self.fold.intents.get((job.index, attempt.number), ())
        names = {ref.name for ref in attempt.refs}
        return any(raw["billable"] and raw["name"] in names for raw in intents)

    def fresh(self, job: JobState) -> list[Attempt]:
        """The attempts since the run was last resumed: those that count against `retry:`."""
        return job.attempts[self.fold.before.get(job.index, 0) :]

    def unfinished(self, job: JobState) -> Optional[tuple[str, dict[str, Any]]]:
        """The first stage of the job that did not reach its last step, and its run_meta.json."""
        for stage in self.run.stages:
            if stage.job == job.index:
                meta = self.meta(stage)
                if meta.get("completed") is not True:
                    return stage.id, meta
        return None

    def meta(self, stage: StageState) -> dict[str, Any]:
        """`run_meta.json` of a stage; {}: it has not begun."""
        return self._read(stage, "run_meta.json")

    def evaluation(self, stage: StageState) -> Optional[dict[str, Any]]:
        """`evaluation.json` of a stage; None: it has none."""
        return self._read(stage, "evaluation.json") or None

    def boots_word(self, job: JobState, attempt: Attempt, exit_code: Optional[int]) -> str:
        """Why the last boot of an attempt ended with that code, as it noted in a store. Empty: it
        did not come to that, or the service saw another end."""
        noted = self._noted(job, attempt) if exit_code is not None else None
        same = noted is not None and noted.get("exit_code") == exit_code
        return str(noted.get("why") or "") if noted is not None and same else ""

    def boots_cause(self, job: JobState, attempt: Attempt) -> str:
        """Why boot has left with 75, by its note in a store: an outage before its workers began
        (also where there is none, since it did not get as far as the store), or the deadline. Empty
        for all else."""
        noted = self._noted(job, attempt)
        return OUTAGE if noted == {} else str((noted or {}).get("cause") or "")

    def begun_as(self, job: JobState, attempt: Attempt) -> str:
        """Which job of the service took the attempt, as its boot noted in a store; else empty."""
        if not self.artifacts.remote:
            return ""
        name = f"attempts/{job.index:02d}-{attempt.number:04d}.json"
        return str(parsed(self.artifacts.read(name)).get("service_job") or "")

    def beginning(self, job: JobState, number: int) -> dict[str, Any]:
        """What the first intent of a further attempt says: `{"from": {"stage", "step"}}`, the first
        stage that is not done and the step of its newest whole checkpoint, 0: it has none."""
        if number == 1 or len(job.attempts) >= number:
            return {}
        unfinished = self.unfinished(job)
        if unfinished is None:
            return {}
        stage = next(s for s in self.run.stages if s.id == unfinished[0])
        step = newest_checkpoint(self.artifacts, self.run.root, stage.folder)
        where = f"newest checkpoint: step {step}" if step else "no checkpoint yet"
        self.say(f"{job.name} attempt {number}: stage {stage.id}, {where}")
        return {"from": {"stage": stage.id, "step": step}}

    def note_stages(self, job: JobState, phase: Phase) -> None:
        """Record the stages whose phase has changed: completed ones by their run_meta.json, the
        first other one as the job, those after it not yet. The last one is done when the job is:
        while it runs nobody has to be asked about it."""
        reached, stages = False, [s for s in self.run.stages if s.job == job.index]
        for stage in stages:
            wanted, done = stage.phase, stage.phase is Phase.SUCCEEDED
            asked = not reached and (phase.over or stage is not stages[-1])
            if done or (asked and self.meta(stage).get("completed") is True):
                wanted = Phase.SUCCEEDED
            elif not reached:
                reached = True
                wanted = wanted if phase in (*NOT_STARTED, Phase.STARTING) else phase
            if wanted is not stage.phase:
                self.record("stage", id=stage.id, phase=wanted)

    def marker(self) -> Optional[dict[str, Any]]:
        """`control/stop.json`; its presence asks, whatever it says. A store is looked into every
        few seconds; one that does not answer asks for nothing."""
        if not self.artifacts.remote:
            return self._look_for_marker()
        now = self.clock.now()
        due = self._asked is None or not 0 <= now - self._asked < POLL
        if self._marker is None and due:
            self._asked = now
            patience, self.artifacts.patience = self.artifacts.patience, 0.0
            try:
                self._marker = self._look_for_marker()
            except Transient as signal:
                self.say(str(signal))
            finally:
                self.artifacts.patience = patience
        return self._marker

    def take_up(self) -> None:
        """Record the changes of the recipe that were left for this driver. One that makes no
        recipe is recorded too, so that it is not read again."""
        from launcher.start import as_yaml  # which needs this module

        while (
            self.run.ended is None
            and (left := changes.waiting(self.place, self.fold.taken)) is not None
        ):
            number, blocks = left
            try:
                recipe = recipe_of({**self.fold.recipe, **blocks}, f"change {number}")
            except JournalDamaged as error:
                self.say(str(error))
                self.record("changed", number=number, refused=str(error))
                continue
            self.record("changed", number=number, recipe=to_dict(recipe), blocks=[*blocks])
            self.recipe = recipe
            self.artifacts.write("recipe.yaml", as_yaml(recipe))
            self.say(f"the recipe has changed: {', '.join(blocks) or 'nothing'}")

    def look_anew(self) -> None:
        """Before a decision: the next `marker` asks the store, however new its last answer is."""
        self._asked = None

    def may_send(self) -> bool:
        """Before a request that costs money: whether nobody has asked the run to stop. Errors:
        `HeldElsewhere` when another driver has taken the run over."""
        self.look_anew()
        if self.marker() is not None:
            return False
        self.journal.fence()
        return True

    def ask_to_stop(self, by: str, reason: str) -> None:
        """Write the marker."""
        write_marker(self.artifacts, self.clock.now(), by, reason)
        self.look_anew()

    def rest(self, wait: float) -> None:
        """Wait, but see a new request to stop soon."""
        if self.marker() is None:
            self.pause(wait)
        else:
            self.clock.sleep(wait)

    def pause(self, wait: float) -> None:
        """Wait, but not past a request to stop."""
        while wait > 0 and self.marker() is None:
            self.take_up()
            nap, before = min(NAP, wait), self.clock.now()
            self.clock.sleep(nap)
            wait -= max(nap, self.clock.now() - before)  # a clock may have been set back

    def patience(self, job: JobState) -> Optional[float]:
        """Seconds that `budget.wait` leaves for capacity; None: no limit, or nobody waits."""
        wait, fresh = self.recipe.budget.wait, self.fresh(job)
        placing = fresh[-1:] if fresh and not fresh[-1].phase.over else []
        streak = [*retry.starved(fresh[: len(fresh) - len(placing)]), *placing]
        if wait is None or not streak or streak[0].started is None:
            return None
        return max(0.0, seconds(wait) - (self.clock.now() - streak[0].started))

    def kept(self, job: JobState, attempt: Attempt) -> float:
        """How long before the end of the budget the job is asked to save. Boot asks by itself, but
        counts from its own start: a service counts from its machines', and waits for nobody."""
        left = self.budget_left(attempt.usd_per_hour)
        if left is None or not self.backend(job.backend).can.timeout:
            return 0.0
        return money.kept(left, attempt, self.clock.now())

    def before_it_is_spent(self, job: JobState, attempt: Attempt, interval: float) -> float:
        """`interval`, or less: no wait goes past the moment at which the job is asked to save."""
        left = self.budget_left(attempt.usd_per_hour)
        if left is None:
            return interval
        left -= self.kept(job, attempt)
        return max(left, FIRST_LOOK) if 0 < left < interval else interval

    def budget_left(self, usd_per_hour: Optional[float]) -> Optional[float]:
        """Seconds left, by `budget.hours` and by `budget.usd` at this price; None: no limit."""
        return money.budget_left(self.run, self.recipe.budget, self.clock.now(), usd_per_hour)

    def over_budget(self) -> str:
        """Why the run ends at its budget, with the figures of this moment. A budget that was raised
        while the job was leaving cannot call it back: then why it was asked to leave."""
        asked, fold = self.marker() or {}, self.fold
        if asked.get("by") == "budget" and fold.changed >= (fold.stopping or math.inf):
            why = str(asked.get("reason") or "the budget was spent").partition("; raise it")[0]
            return f"{why}; its budget was changed after that: launch resume {self.run.name}"
        at = [(job, attempt) for job in self.run.jobs for attempt in job.attempts][-1:]
        rate = at[0][1].usd_per_hour if at else None
        step = self._step(at[0][0]) if at else None
        return money.stopped(self.run, self.recipe.budget, self.clock.now(), rate, step)

    def _step(self, job: JobState) -> Optional[int]:
        """The last step of the stage that the job was in, by its own word; None: it gave none."""
        unfinished = self.unfinished(job)
        step = unfinished[1].get("global_step") if unfinished is not None else None
        return step if isinstance(step, int) else None

    def _noted(self, job: JobState, attempt: Attempt) -> Optional[dict[str, Any]]:
        """What the newest boot of an attempt noted in a store; {}: nothing; None: there is none."""
        if not self.artifacts.remote:
            return None
        names = self.artifacts.names(f"attempts/{job.index:02d}-{attempt.number:04d}")
        newest = max(names, key=lambda name: (len(name), name), default=None)
        return parsed(self.artifacts.read(newest)) if newest is not None else {}

    def _look_for_marker(self) -> Optional[dict[str, Any]]:
        name = "control/stop.json"
        return parsed(self.artifacts.read(name)) if self.artifacts.exists(name) else None

    def _read(self, stage: StageState, name: str) -> dict[str, Any]:
        at = below(self.run.root, stage.folder)
        return parsed(self.artifacts.read(f"{at}/{name}" if at else name))

    def _bundle(self) -> Bundle:
        """The trainer that the run began with. Where a job's objects include it, the file itself
        is not needed: it may lie on another machine. Of another home's run only the sha256 counts,
        never the path."""
        raw = dict(self.fold.bundle)
        if self.foreign:
            if not _SHA256.fullmatch(str(raw["sha256"])):
                raise JournalDamaged(f"{self.journal.first}: its bundle has no sha256")
            raw["path"] = str(bundle_place(self.env.home, raw["sha256"], str(raw["path"])))
        refs = (r for job in self.run.jobs for attempt in job.attempts for r in attempt.refs)
        if Path(raw["path"]).exists() or any(raw["sha256"] in ref.name for ref in refs):
            return Bundle(Path(raw["path"]), raw["sha256"], raw["bytes"])
        fresh = build_bundle(self.env.home)
        if fresh.sha256 != raw["sha256"]:
            self.say(f"{raw['path']} is gone; going on with the trainer that is installed now")
        return fresh


def say(clock: Clock, text: str) -> None:
    """A line for driver.log, or for who waits at a terminal."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock.now()))
    sys.stderr.write(f"{stamp} {text}\n")
    sys.stderr.flush()


def recipe_of(raw: Mapping[str, Any], where: str) -> Recipe:
    """The recipe as a record holds it. Errors: `JournalDamaged`."""
    problems: list[Problem] = []
    recipe: Recipe = build(Recipe, raw, (), problems)
    if problems:
        lines = "; ".join(f"{dotted(at)}: {what}" for at, what in problems)
        raise JournalDamaged(f"{where}: the recipe in the journal cannot be used: {lines}")
    return recipe


def write_marker(artifacts: Artifacts, now: float, by: str, reason: str) -> None:
    """Ask the job to end. The first request stands. Errors: `Unwritable`, those of a store."""
    text = json.dumps({"time": now, "by": by, "reason": reason}) + "\n"
    artifacts.create_once("control/stop.json", text)
