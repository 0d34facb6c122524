"""The only loops: place, watch, clear, decide. Backends answer once, at once; the waiting, the
trying again and the giving up are here.

Every decision is read off the journal and every act is written there first, so that a driver can
be killed between any two lines of this file and the next one ends at the same place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from types import MappingProxyType
from typing import Any, Optional

from launcher import backends, gates, home, retry
from launcher.backends.base import Env, Held, Intent, Offer, Phase, Ref, Seen
from launcher.claim import FIRST_LOOK, Claim, Load, claimed
from launcher.clear import clear, first, insist, keep, made, past_odd_refs, sweep, write_down
from launcher.errors import Again, BudgetSpent, Exit, Leaked, NoCapacity, Signal, Transient
from launcher.fold import NOT_STARTED, worst
from launcher.money import LEAST, worth
from launcher.notify import Herald
from launcher.plan import affordable, fill
from launcher.retry import Outcome
from launcher.run import Attempt, JobState, Run
from launcher.spec import Recipe
from launcher.view import write_summary
from launcher.waiting import LATE
from trainer.boot import AGAIN, CONFIG, OUTAGE

#: Seconds between two looks, at most: on this machine, elsewhere.
LOOK_LOCAL, LOOK_REMOTE = 2.0, 15.0
#: How long a teardown waits for a store that does not answer.
DEAF = 60.0
#: The longest that a job may save after its budget has been reached.
BEYOND = 60.0
#: What a stopping job gets on top of its own grace before it is deleted.
STOP_MARGIN = 30.0
#: None, or 128 + SIGINT, SIGKILL, SIGTERM: how a job that was asked to stop may die.
_SIGNALS = (None, 130, 137, 143)


def drive(
    run_id: str,
    env: Env,
    load: Load = backends.load,
    lock: Optional[home.DriverLock] = None,
    take_over: bool = False,
) -> Run:
    """Drive a run to its end and return it; `run.exit_code` is the exit code. A run that is over
    is returned as it is, once nothing of it is left. `lock`: the run's lock, when the caller holds
    it already. Errors: `HeldElsewhere`, `JournalDamaged`, `Unwritable`; signals of `observe`
    (e.g. `Denied`): the job goes on without a driver."""
    with claimed(run_id, env, load, lock, take_over) as claim:
        if claim.run.ended is None:
            return Engine(claim).drive()
        return Engine(claim).teardown() if claim.run.live else claim.run


def teardown(
    run_id: str,
    env: Env,
    load: Load = backends.load,
    lock: Optional[home.DriverLock] = None,
    until: Optional[float] = None,
) -> Run:
    """Delete everything the run holds, wait until it is gone, and end the run. Takes the run over
    from a driver on another host. `until`: when all waiting is over, UTC seconds. Errors: `Leaked`
    with what could not be confirmed absent."""
    patience = DEAF if until is None else min(DEAF, max(0.0, until - env.clock.now()))
    with claimed(run_id, env, load, lock, take_over=True, patience=patience) as claim:
        claim.waits = replace(claim.waits, until=until)
        return Engine(claim).teardown()


class Engine:
    """One claimed run: `drive` or `teardown`."""

    def __init__(self, claim: Claim) -> None:
        self.claim, self.clock = claim, claim.clock
        self.herald = Herald(claim)
        self._told = False  # this process has asked the backend to hurry the job
        self._unsent: set[str] = set()  # intents of which no request has been applied unseen
        self._stopping = 0.0  # seconds that this process has waited for a job to stop

    @property
    def recipe(self) -> Recipe:
        return self.claim.recipe

    def drive(self) -> Run:
        try:
            outcome = self._every_job()
            if outcome.exit_code != Exit.ACCESS:  # else there is no asking
                sweep(self.claim, everywhere=False)
        except Leaked as leak:
            outcome = Outcome(Phase.FAILED, str(leak), Exit.LEAKED)
        return self._end(outcome)

    def teardown(self) -> Run:
        """Errors: `Leaked`; the run is then marked so, and asking again goes on."""
        run = self.claim.run
        try:
            for job in run.jobs:
                for attempt in list(job.attempts):
                    if not attempt.phase.over:
                        self._last_look(job, attempt)
                    if not self.claim.fold.closed(job.index, attempt):
                        with past_odd_refs():
                            clear(self.claim, job, attempt)
            sweep(self.claim, everywhere=True)
        except Leaked as leak:
            self._end(Outcome(Phase.FAILED, str(leak), Exit.LEAKED))
            raise
        if run.ended is None or run.exit_code == Exit.LEAKED:
            why = "torn down" if run.ended is None else "torn down: nothing is left"
            outcome = self._whole() or self._failed() or Outcome(Phase.CANCELLED, why, Exit.OK)
            return self._end(outcome)
        return run

    # The run, job by job.

    def _every_job(self) -> Outcome:
        for job in self.claim.run.jobs:
            outcome = self._job(job) or self._gates(job)
            if outcome is not None:
                return outcome
        return Outcome(Phase.SUCCEEDED, "", Exit.OK)

    def _job(self, job: JobState) -> Optional[Outcome]:
        """Attempts until one succeeds (None), or until another one makes no sense."""
        while True:
            newest = job.attempts[-1] if job.attempts else None
            if newest is not None and not newest.phase.over:
                self._attempt(job, newest)
            if newest is not None and not self.claim.fold.closed(job.index, newest):
                clear(self.claim, job, newest)
            if newest is not None and newest.phase is Phase.SUCCEEDED:
                return None
            outcome = self._open(job)
            if outcome is not None:
                return outcome

    def _open(self, job: JobState) -> Optional[Outcome]:
        """Begin the next attempt with its first intent, or say why there is none."""
        claim, fresh = self.claim, self.claim.fresh(job)
        claim.look_anew()
        claim.take_up()
        last = fresh[-1] if fresh else None
        outcome = self._stopped(last) or self._spent(last)
        if outcome is None and last is not None:
            outcome = retry.give_up(fresh, self.recipe.retry, claim.fold.changed)
        if outcome is not None:
            return outcome
        try:
            offer, wait = retry.choose(self._offers(job), fresh, self.clock.now())
        except (Signal, BudgetSpent) as error:
            return Outcome(Phase.FAILED, str(error), error.code)
        if last is not None and wait:
            patience, decided = claim.patience(job), claim.fold.taken
            claim.say(f"{job.name}: {last.why}; trying again in {wait:.0f} s")
            claim.pause(wait if patience is None else min(wait, patience))
            claim.take_up()
            if claim.fold.taken != decided:
                return None  # by another budget: whether, and where, is to be decided anew
        if last is not None and claim.patience(job) == 0:
            why = f"no capacity within budget.wait ({self.recipe.budget.wait}): {last.why}"
            return Outcome(Phase.FAILED, why, Exit.CAPACITY)
        if claim.marker() is not None:
            return self._stopped(None)
        number = len(job.attempts) + 1
        self._intend(job, number, next(self._intents(job, number, offer)), offer)
        self.herald.tell()
        return None

    def _stopped(self, last: Optional[Attempt]) -> Optional[Outcome]:
        """The end of a run that was asked to stop, or whose job paused by itself; else None."""
        marker = self.claim.marker()
        if last is not None and last.phase is Phase.FAILED and last.cause == retry.JOB and marker:
            return Outcome(Phase.FAILED, last.why, Exit.JOB)
        if marker is not None and marker.get("by") == "budget":
            return Outcome(Phase.CANCELLED, self.claim.over_budget(), Exit.BUDGET)
        ended = last is not None and last.phase is Phase.CANCELLED and last.cause != retry.DEADLINE
        paused = last.why if last is not None and ended else ""
        if marker is not None:
            reason = marker.get("reason")
            why = f"{paused or 'stopped'}: {reason}" if reason else paused or "stopped"
            return Outcome(Phase.CANCELLED, why, Exit.OK)
        return Outcome(Phase.CANCELLED, paused, Exit.OK) if ended else None

    def _spent(self, last: Optional[Attempt]) -> Optional[Outcome]:
        """The end of a run whose budget is spent, or too little of it left for an attempt."""
        newest = [attempt for job in self.claim.run.jobs for attempt in job.attempts][-1:]
        left = self.claim.budget_left(newest[0].usd_per_hour if newest else None)
        least = worth(left, last, self.clock.now()) if last else LEAST if newest else 0.0
        own_fault = last is not None and last.cause in (retry.JOB, retry.ACCESS, retry.REQUEST)
        if left is None or left > least or own_fault:
            return None
        return Outcome(Phase.CANCELLED, self.claim.over_budget(), Exit.BUDGET)

    def _offers(self, job: JobState) -> list[Offer]:
        """What `budget.usd_per_hour` allows; an unknown price is not taken for a high one."""
        hardware, cap = self.claim.hardware(job), self.recipe.budget.usd_per_hour
        offers = list(self.claim.backend(job.backend).offers(hardware, self.claim.env))
        if not offers:
            raise NoCapacity(hardware.backend, f"it has no offer for {hardware.accelerator}")
        allowed = affordable(offers, self.recipe.budget)
        if not allowed:
            cheapest = min(o.usd_per_hour or 0.0 for o in offers)
            raise BudgetSpent(
                f"the cheapest offer costs {cheapest:.2f} USD an hour; budget.usd_per_hour: {cap:g}"
            )
        return allowed

    # One attempt: place, watch.

    def _attempt(self, job: JobState, attempt: Attempt) -> None:
        """Place what is not placed yet, then watch until the attempt is over."""
        if self.claim.marker() is None:
            try:
                self._place(job, attempt)
            except Leaked:
                raise
            except (Signal, OSError) as signal:
                cause = retry.cause_of_signal(signal)
                held = self._held_after(job, attempt, signal)
                self._phase(job, attempt, Phase.FAILED, held, str(signal), cause=cause)
                return
        elif self.claim.waiting(job, attempt):
            with suppress(Leaked):  # `clear` asks again, and says so
                write_down(self.claim, job, attempt)
            if self.claim.waiting(job, attempt):
                self._phase(job, attempt, Phase.CANCELLED, attempt.held, "stopped before it began")
                return
        self._watch(job, attempt)

    def _place(self, job: JobState, attempt: Attempt) -> None:
        """Create, in order, what has no ref yet. An intent that this home recorded is sent again
        as it was recorded, one of another home as this plan has it; the backend adopts what that
        request has already made."""
        key, offer = (job.index, attempt.number), self.claim.offer(job, attempt)
        recorded = {raw["name"] for raw in self.claim.fold.intents[key]}
        if not self.claim.waiting(job, attempt) and attempt.phase is not Phase.PROVISIONING:
            return  # it has been seen: everything was placed
        for intent in self._intents(job, attempt.number, offer):
            if intent.name not in recorded:
                self._intend(job, attempt.number, intent, offer)
            if intent.name in self.claim.waiting(job, attempt):
                own = self.claim.recorded(job, attempt, intent.name)
                ref = self._create(job, attempt, own or intent)
                if ref is None:
                    held = Held.NONE if intent.name in self._unsent else attempt.held
                    held = attempt.held if any(r.billable for r in attempt.holding) else held
                    self._phase(job, attempt, Phase.CANCELLED, held, "stopped before it began")
                    return
                keep(self.claim, job, attempt, ref)

    def _held_after(self, job: JobState, attempt: Attempt, signal: Exception) -> Held:
        """What an attempt holds that could not be placed. A request that was refused has made
        nothing, unless an earlier one like it was applied and its reply lost; then somebody looks
        (`clear`). Without this, an API that is off would count as a resource that may bill."""
        answered = isinstance(signal, Signal) and signal.again is not Again.HERE
        certain = answered and self._unsent.issuperset(self.claim.waiting(job, attempt))
        return (
            Held.NONE if certain and not any(r.billable for r in attempt.holding) else attempt.held
        )

    def _intents(self, job: JobState, number: int, offer: Offer) -> Iterator[Intent]:
        """The plan's intents, their holes filled with the refs known when each is taken."""
        holes: dict[str, Any] = {"attempt": number, "resume": number > 1}
        backend = self.claim.backend(job.backend)
        for template in backend.plan(self.claim.spec(job, offer), offer).intents:
            refs = job.attempts[number - 1].refs if number <= len(job.attempts) else []
            holes["deadline"] = self.claim.deadline(offer)
            holes.update({f"ref:{ref.kind}": ref.name for ref in refs})
            holes.update({f"ref:{ref.name}": ref.name for ref in refs})
            request = {"name": template.name, "place": template.place, "request": template.request}
            yield self.claim.guarded(replace(template, **fill(request, holes)))

    def _intend(self, job: JobState, number: int, intent: Intent, offer: Offer) -> None:
        at = {"job": job.index, "attempt": number, **self.claim.beginning(job, number)}
        self.claim.record("intent", **at, intent=intent, offer=offer)
        self._unsent.add(intent.name)
        self.claim.say(f"{job.name} attempt {number}: {intent.kind} {intent.name}, {intent.place}")

    def _create(self, job: JobState, attempt: Attempt, intent: Intent) -> Optional[Ref]:
        """Send the request until it is answered. None: the run was asked to stop before that."""
        for tries in count(1):
            applied = self._applied(job, attempt, intent)
            if applied is not None:
                return applied
            if intent.billable and not self.claim.may_send():
                return None
            try:
                return self.claim.backend(job.backend).create(intent, self.claim.env)
            except Transient as signal:
                if not signal.refused:
                    self._unsent.discard(intent.name)
                if tries == retry.REQUESTS or self.claim.marker() is not None:
                    raise
                self.claim.say(f"{job.name}: {signal}")
                self.claim.pause(max(signal.after, retry.backoff(tries)))
        raise AssertionError("unreachable")

    def _applied(self, job: JobState, attempt: Attempt, intent: Intent) -> Optional[Ref]:
        """What an earlier request like this one has made, by this process or another, when nobody
        saw its answer. None: it was not applied, or the backend adopts by itself."""
        settles = self.claim.backend(job.backend).can.settle > 0
        if not settles or not intent.billable or intent.name in self._unsent:
            return None
        found = made(self.claim, job, attempt, {intent.name: {"billable": True}})
        self._unsent.add(intent.name)
        return next((ref for ref in found if ref.name == intent.name), None)

    def _look(self, job: JobState, attempt: Attempt) -> Seen:
        """One look; but what is missing may not show yet, and is lost only when it stays away."""
        backend, handle = self.claim.backend(job.backend), self.claim.handle(job, attempt)
        seen = backend.observe(handle, self.claim.env)
        settle = backend.can.settle if self.claim.answered(job, attempt) else 0.0
        wait, text = self.claim.waits.begin(), f"{job.name} attempt {attempt.number}: {LATE}"
        for pause in retry.settling(settle):
            if seen.phase is not Phase.LOST:
                break
            if not wait.look_again(pause, text):
                raise Transient(text)
            seen = backend.observe(handle, self.claim.env)
        if seen.exit_code == CONFIG and first(self.claim, job, attempt):
            return self._look(job, attempt)
        return seen

    def _watch(self, job: JobState, attempt: Attempt) -> None:
        """Look until the attempt is over; a phase is recorded only when it changes."""
        slowest = LOOK_LOCAL if job.backend == "local" else LOOK_REMOTE
        interval, deaf = FIRST_LOOK, 0
        while not attempt.phase.over:
            self.claim.take_up()
            try:
                seen = self._look(job, attempt)
                deaf = 0
            except Transient as signal:  # the job does not care whether it is seen
                deaf += 1
                self.claim.say(f"{job.name}: {signal}")
                self.clock.sleep(max(signal.after, retry.backoff(deaf)))
                continue
            before = attempt.phase
            self._see(job, attempt, seen)
            if not attempt.phase.over:
                self._stop_when_asked(job, attempt)
                self.herald.tell()
            waits = attempt.phase in NOT_STARTED and attempt.began is None
            if waits and self.claim.patience(job) == 0:
                why = f"not started within budget.wait ({self.recipe.budget.wait})"
                self._phase(job, attempt, Phase.FAILED, attempt.held, why, cause=retry.CAPACITY)
            if not attempt.phase.over:
                changed = attempt.phase is not before
                interval = FIRST_LOOK if changed else min(interval * 1.5, slowest)
                if self._told:
                    self.claim.rest(interval)
                    self._stopping += interval
                else:
                    self.claim.rest(self.claim.before_it_is_spent(job, attempt, interval))

    def _see(self, job: JobState, attempt: Attempt, seen: Seen) -> None:
        """Record what a look shows, where it differs from what is known."""
        if seen.phase.over:
            self.claim.look_anew()
        phase, why = self._judged(job, seen)
        cause = seen.cause if phase is seen.phase else ""
        asked = phase is Phase.PREEMPTED and seen.exit_code == AGAIN and job.backend != "local"
        told = self.claim.boots_cause(job, attempt) if asked else cause
        if asked and told == OUTAGE:
            phase, cause = Phase.FAILED, retry.INFRASTRUCTURE
        if phase in (Phase.FAILED, Phase.PREEMPTED):  # a service knows the exit code, not the cause
            why = self.claim.boots_word(job, attempt, seen.exit_code) or why
        if phase is Phase.PREEMPTED and retry.DEADLINE in (told, cause):
            phase, cause = Phase.CANCELLED, retry.DEADLINE  # nobody has taken its machine
        held = worst(held for _, held in seen.held)
        if held in (Held.NONE, Held.GONE):
            held = attempt.held  # gone is for `clear` to say, with a confirmation for each ref
        known = (attempt.phase, attempt.held, attempt.exit_code)
        # A running job may say something new at every look; the journal is no log.
        news = why != attempt.why and phase is not Phase.RUNNING
        if news or (phase, held, seen.exit_code) != known:
            times = {"began": seen.began, "ended": seen.ended if phase.over else None}
            self._phase(job, attempt, phase, held, why, seen.exit_code, cause, times)
        self.claim.note_stages(job, phase)

    def _judged(self, job: JobState, seen: Seen) -> tuple[Phase, str]:
        """The phase of a look, in the light of the stages' own word and of a request to stop."""
        unfinished = self.claim.unfinished(job) if seen.phase is Phase.SUCCEEDED else None
        if unfinished is not None:
            stage_id, meta = unfinished
            step = f" at step {meta['global_step']}" if "global_step" in meta else ""
            if meta.get("stopped") in ("until", "stop"):
                return Phase.CANCELLED, f"stage '{stage_id}' paused{step}"
            if self.claim.marker() is not None:  # asked before the trainer could say anything
                return Phase.CANCELLED, f"stage '{stage_id}' stopped{step}"
            return Phase.FAILED, f"exit code 0, but stage '{stage_id}' is not complete{step}"
        ended_by_us = seen.phase in (Phase.PREEMPTED, Phase.LOST) or (
            seen.phase is Phase.FAILED and seen.exit_code in _SIGNALS
        )
        if ended_by_us and self.claim.marker() is not None:
            return Phase.CANCELLED, seen.why or "stopped"
        return seen.phase, seen.why

    def _stop_when_asked(self, job: JobState, attempt: Attempt) -> None:
        claim, marker = self.claim, self.claim.marker()
        if marker is None:
            left = claim.budget_left(attempt.usd_per_hour)
            if left is not None and left <= claim.kept(job, attempt):
                claim.ask_to_stop("budget", claim.over_budget())
                marker = claim.marker()
        if marker is None:
            return
        spec = claim.spec(job, claim.offer(job, attempt))
        grace = float(spec.boot.get("grace_seconds", 600))
        if marker.get("by") == "budget":
            # Boot keeps time to save within the budget and was to be gone by now; this is beyond.
            grace = min(grace, claim.kept(job, attempt) + BEYOND)
        if claim.fold.stopping is None:
            claim.record("stop", by=marker.get("by"), reason=marker.get("reason"))
        if not self._told:
            try:
                handle = claim.handle(job, attempt)
                claim.backend(job.backend).stop(handle, claim.env, grace)
                self._told = True
            except Transient as signal:
                claim.say(f"{job.name}: {signal}")
        since = self.clock.now() - (claim.fold.stopping or 0.0)
        if max(since, self._stopping) > grace + STOP_MARGIN:  # a clock may have been set back
            why = f"did not end within {grace:.0f} s of being asked: deleted"
            self._phase(job, attempt, Phase.CANCELLED, attempt.held, why)

    def _last_look(self, job: JobState, attempt: Attempt) -> None:
        """Before a teardown: a job that ended while nobody looked has its own outcome."""
        with past_odd_refs():
            write_down(self.claim, job, attempt)
            if not self.claim.waiting(job, attempt):
                look = insist(self.claim, lambda: self._look(job, attempt), [job.name])
                self._see(job, attempt, look)
        if not attempt.phase.over:
            self._phase(job, attempt, Phase.CANCELLED, attempt.held, "torn down")
            self.claim.note_stages(job, Phase.CANCELLED)

    # Stages, gates, the end.

    def _gates(self, job: JobState) -> Optional[Outcome]:
        """Ask the gates after this job's stages; the first that does not pass ends the run."""
        why = gates.refused(self.claim, job)
        return Outcome(Phase.FAILED, why, Exit.JOB) if why else None

    def _whole(self) -> Optional[Outcome]:
        """The outcome of a run whose every job has succeeded; None: some have not."""
        jobs = self.claim.run.jobs
        if not all(job.attempts and job.attempts[-1].phase is Phase.SUCCEEDED for job in jobs):
            return None
        outcomes = (self._gates(job) for job in jobs)
        return next(filter(None, outcomes), Outcome(Phase.SUCCEEDED, "", Exit.OK))

    def _failed(self) -> Optional[Outcome]:
        """The outcome of a run whose newest attempt failed for good; None: it did not."""
        jobs = [job for job in self.claim.run.jobs if job.attempts]
        fresh = self.claim.fresh(jobs[-1]) if jobs else []
        if not fresh or fresh[-1].phase is not Phase.FAILED:
            return None
        return retry.give_up(fresh, self.recipe.retry)

    def _end(self, outcome: Outcome) -> Run:
        claim = self.claim
        claim.record("end", phase=outcome.phase, why=outcome.why, exit_code=int(outcome.exit_code))
        claim.say(f"{claim.run.name} {outcome.phase.value}: {outcome.why or 'done'}")
        self.herald.finish()
        write_summary(claim.place, claim.run, claim.artifacts)
        return claim.run

    def _phase(
        self,
        job: JobState,
        attempt: Attempt,
        phase: Phase,
        held: Held,
        why: str,
        exit_code: Optional[int] = None,
        cause: str = "",
        times: Mapping[str, Optional[float]] = MappingProxyType({}),
    ) -> None:
        told = {name: time for name, time in times.items() if time is not None}
        self.claim.record(
            "phase", job=job.index, attempt=attempt.number, phase=phase, held=held, why=why,
            exit_code=exit_code, cause=cause or retry.cause_of_phase(phase), **told,
        )  # fmt: skip
        said = f"{phase.value}: {why}" if why else phase.value
        self.claim.say(f"{job.name} attempt {attempt.number}: {said}")
