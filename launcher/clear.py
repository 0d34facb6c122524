"""Nothing is left: deleting what an attempt holds, with a confirmation for each resource."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, Optional, TypeVar

from launcher import backends, retry
from launcher.backends.base import (
    Backend,
    CanFind,
    CanSayHow,
    CanTellApart,
    Env,
    Held,
    Phase,
    Ref,
)
from launcher.claim import NAP, Claim, Load, say
from launcher.errors import BadRequest, HeldElsewhere, LaunchError, Leaked, Signal, Transient
from launcher.fold import Fold
from launcher.run import Attempt, JobState, Run
from launcher.waiting import LATE, Waiting

Answer = TypeVar("Answer")


def clear(claim: Claim, job: JobState, attempt: Attempt) -> None:
    """Delete what the attempt holds, newest first, until each is confirmed gone. Errors:
    `Leaked`, after everything has been tried: to go on would be to pay twice."""
    leaks: list[Leaked] = []
    at = {"job": job.index, "attempt": attempt.number}
    try:
        write_down(claim, job, attempt)
    except Leaked as leak:
        leaks.append(leak)
    for ref in reversed(attempt.holding):
        try:
            # What was looked for in vain, and for long, need not be looked for again.
            _delete(claim, ref, settled=attempt.phase is Phase.LOST)
            claim.record("gone", **at, ref=ref)
        except Leaked as leak:
            leaks.append(leak)
    if leaks or not claim.fold.closed(job.index, attempt):
        claim.record(
            "phase", **at, phase=attempt.phase, held=Held.LEAKED if leaks else Held.GONE,
            why=attempt.why, exit_code=attempt.exit_code, cause=attempt.cause,
        )  # fmt: skip
    if leaks:
        commands = [command for leak in leaks for command in leak.commands]
        everything = Leaked([r for leak in leaks for r in leak.refs], [*dict.fromkeys(commands)])
        odd = all(isinstance(leak.__cause__, BadRequest) for leak in leaks)
        raise everything from (leaks[0].__cause__ if odd else None)


@contextmanager
def past_odd_refs() -> Iterator[None]:
    """Of a teardown, what it can do without: the journal may name what makes no sense. The label
    may still find what is meant, and `sweep`, which looks for it, says so again if not."""
    try:
        yield
    except Leaked as leak:
        if not isinstance(leak.__cause__, BadRequest):
            raise


def sweep(claim: Claim, everywhere: bool) -> None:
    """Before a run ends: what carries its label and should not be there (a request that was applied
    after all, a read that was wrong) is recorded, deleted and confirmed. `everywhere`: also where
    no job of the run is known to have been. Errors: `Leaked`."""
    for name in dict.fromkeys(job.backend for job in claim.run.jobs):
        found = _swept(claim, name, [claim.run.name]) if everywhere else _found(claim, name)
        for ref in found:
            job, attempt = _owner(claim, ref)
            if attempt is None or ref in _known(attempt, [ref]):
                _delete(claim, ref)
            else:
                _record(claim, job, attempt, [ref])
    for job in claim.run.jobs:
        for attempt in list(job.attempts):
            if not claim.fold.closed(job.index, attempt):
                clear(claim, job, attempt)


def first(claim: Claim, job: JobState, attempt: Attempt) -> bool:
    """Whether the attempt is another job of the service than the one that is followed, by the
    record of its boot: it was created twice, and the second has left. The first is then written
    down, and followed from now on. Errors: signals."""
    backend, told = claim.backend(job.backend), claim.begun_as(job, attempt)
    if not told or not isinstance(backend, CanTellApart):
        return False
    ref = backend.other(claim.handle(job, attempt), told, claim.env)
    if ref is None:
        return False
    claim.say(f"{job.name} attempt {attempt.number}: was created twice; following job {told}")
    known = [r for r in attempt.refs if _identity(r) == _identity(ref)]
    if not known:
        _record(claim, job, attempt, [ref])
    else:  # the newest record is what is followed
        claim.record("ref", job=job.index, attempt=attempt.number, ref=known[0])
    return True


def write_down(claim: Claim, job: JobState, attempt: Attempt) -> None:
    """Record what the requests without an answer have made, perhaps long ago, of an attempt that
    sends no more: it has had a price, and an end of its own. That is waited for once. Errors:
    `Leaked`."""
    if (job.index, attempt.number) not in claim.sought:
        _record(claim, job, attempt, _strays(claim, job, attempt))
        claim.sought.add((job.index, attempt.number))


def keep(claim: Claim, job: JobState, attempt: Attempt, ref: Ref) -> None:
    """Record what a request has just made. Errors: `HeldElsewhere` when the run was lost meanwhile
    (this machine slept, say): who drives it finds the resource by its label; of a run that is over
    nobody would look, so it is deleted here first."""
    try:
        claim.record("ref", job=job.index, attempt=attempt.number, ref=ref)
    except HeldElsewhere:
        try:
            if ref.billable and Fold(claim.journal.read()).run.ended is not None:
                claim.say(f"{ref.name} was made after {claim.run.name} was over: deleting it")
                remove(claim.backend(ref.backend), ref, claim.env)
        except LaunchError as error:
            claim.say(f"{ref.name} may be left: {error}; `launch sweep` finds it")
        raise


def made(claim: Claim, job: JobState, attempt: Attempt, waiting: Mapping[str, Any]) -> list[Ref]:
    """What the requests `waiting` for an answer have made. They may be applied late, and what they
    made may show later still: it is looked for until it would be there. Errors: `Leaked`."""
    backend, handle = claim.backend(job.backend), claim.handle(job, attempt)
    settle = backend.can.settle if any(raw["billable"] for raw in waiting.values()) else 0.0
    pauses, wait = retry.settling(settle), claim.waits.begin()
    while True:
        seen = insist(claim, lambda: backend.observe(handle, claim.env), [*waiting])
        found = [
            ref for ref, held in seen.held
            if held not in (Held.NONE, Held.GONE) or (settle and ref.name in waiting)
        ]  # fmt: skip
        pause = next(pauses, None)
        if found or pause is None:
            return found
        if not wait.look_again(pause, f"{', '.join(waiting)}: {LATE}"):
            raise _leaked(claim, [*waiting])


def remove(
    backend: Backend,
    ref: Ref,
    env: Env,
    waiting: Optional[Waiting] = None,
    again: str = "launch teardown --all",
) -> None:
    """Delete one resource that belongs to no run we can read, and wait until it is gone. A backend
    that does not answer is asked again while `waiting` lasts, or not at all. Errors: `Leaked` with
    the backend's own command and `again`."""
    rules = waiting or Waiting(env.clock, partial(say, env.clock))

    def delete() -> Held:
        return backend.delete(ref, env)

    try:
        ask = delete if waiting is None else partial(patiently, delete, waiting)
        if not _until_away(ask, ref, rules, 0.0):
            raise Leaked([ref])
    except (Signal, OSError) as signal:
        commands = signal.commands if isinstance(signal, Leaked) else []
        own = _by_hand([ref], lambda name: backend)
        raise Leaked([ref], [*(commands or own), again]) from signal


def unanswered(runs: Iterable[Run], error: Exception) -> Optional[Leaked]:
    """The `Leaked` of runs whose backend cannot be asked: what their journals say that they hold,
    with the commands that end it by hand. None when they say of nothing that it may bill."""
    held: list[Ref | str] = []
    commands: list[str] = []
    for run in runs:
        if run.held in (Held.NONE, Held.GONE):
            continue
        attempts = [attempt for job in run.jobs for attempt in job.attempts]
        refs = [ref for attempt in attempts for ref in attempt.holding if ref.billable]
        held += refs or [run.name]
        commands += [*_by_hand(refs, backends.load), f"launch teardown {run.name}"]
    if not held:
        return None
    leak = Leaked(held, [*dict.fromkeys(commands)])
    leak.args = (f"{leak} ({error})",)
    return leak


def insist(claim: Claim, ask: Callable[[], Answer], about: list[Ref] | list[str]) -> Answer:
    """`ask()`, again while the answer is `Transient`. Errors: `Leaked` with `about`."""
    try:
        return patiently(ask, claim.waits)
    except Transient as signal:
        raise _leaked(claim, about) from signal
    except Leaked as leak:
        raise _leaked(claim, about, leak.commands) from leak
    except (Signal, OSError) as signal:
        claim.say(f"cannot clear {about}: {signal}")
        raise _leaked(claim, about) from signal


def patiently(ask: Callable[[], Answer], waiting: Waiting) -> Answer:
    """`ask()`, again while the answer is `Transient` and the wait lasts. Errors: those of `ask`."""
    wait = waiting.begin()
    for tries in count(1):
        try:
            return ask()
        except Transient as signal:
            if wait.over:
                raise
            wait.sleep(max(signal.after, retry.backoff(tries)), str(signal), at_once=True)
    raise AssertionError("unreachable")


def _strays(claim: Claim, job: JobState, attempt: Attempt) -> list[Ref]:
    """What intents without an answer may have made: by the job's name, then by our label."""
    waiting = claim.waiting(job, attempt)
    if not waiting:
        return []
    return made(claim, job, attempt, waiting) + _swept(claim, job.backend, [*waiting])


def _record(claim: Claim, job: JobState, attempt: Attempt, found: Iterable[Ref]) -> None:
    """Write down those of `found` that stand in no record, before anything is done to them: what
    bills is in the journal. Names of services need not be unique; those of refs are."""
    for ref in found:
        if ref in _known(attempt, found):
            continue
        names = {known.name for known in attempt.refs}
        name = next(n for n in _names(ref.name) if n not in names)
        claim.record("ref", job=job.index, attempt=attempt.number, ref=replace(ref, name=name))


def _known(attempt: Attempt, found: Iterable[Ref]) -> list[Ref]:
    """Those of `found` that the attempt's refs name."""
    known = {_identity(ref) for ref in attempt.refs}
    return [ref for ref in found if _identity(ref) in known]


def _identity(ref: Ref) -> tuple[str, str, str]:
    """Equal for one and the same resource: what the backend knows it by, else its name."""
    data = json.dumps(dict(ref.data), sort_keys=True) if ref.data else ref.name
    return ref.kind, ref.place, data


def _names(name: str) -> Iterable[str]:
    yield name
    yield from (f"{name}~{number}" for number in count(2))


def _owner(claim: Claim, ref: Ref) -> tuple[JobState, Optional[Attempt]]:
    """The attempt that a resource is called after; else the newest of the first job there."""
    jobs = [job for job in claim.run.jobs if job.backend == ref.backend]
    for job in jobs:
        for attempt in job.attempts:
            if ref.name.startswith(f"{job.name}-a{attempt.number}"):
                return job, attempt
    return jobs[0], jobs[0].attempts[-1] if jobs[0].attempts else None


def _found(claim: Claim, name: str) -> list[Ref]:
    """What carries the run's label where jobs of it have been, or may have been: one listing for
    each place."""
    jobs = [job for job in claim.run.jobs if job.backend == name]
    lost = claim.fold.unanswered
    refs = [r for job in jobs for a in job.attempts for r in a.refs
            if claim.answered(job, a) or (job.index, a.number) in lost]  # fmt: skip
    backend = claim.backend(name)
    if not refs or not isinstance(backend, CanFind):
        return []
    return insist(claim, lambda: [*backend.of_run(claim.run.id, refs, claim.env)], [claim.run.name])


def _swept(claim: Claim, name: str, about: list[str]) -> list[Ref]:
    backend = claim.backend(name)
    everything = insist(claim, lambda: [*backend.sweep(claim.env)], about)
    return [ref for ref in everything if ref.run == claim.run.id]


def _delete(claim: Claim, ref: Ref, settled: bool = False) -> None:
    """Delete one resource of the run and wait until it is gone. `settled`: its absence is old."""
    backend = claim.backend(ref.backend)
    if not _until_away(
        lambda: insist(claim, lambda: backend.delete(ref, claim.env), [ref]),
        ref,
        claim.waits,
        0.0 if settled else backend.can.settle,
    ):
        raise _leaked(claim, [ref])


def _until_away(delete: Callable[[], Held], ref: Ref, waiting: Waiting, settle: float) -> bool:
    """Ask until the answer is that `ref` is absent; False when the wait ends first. What has not
    been seen at all may not show yet: it is asked for until it would."""
    wait, interval, seen, pauses = waiting.begin(), 0.1, False, retry.settling(settle)
    while True:
        held = delete()
        if held in (Held.GONE, Held.NONE):
            pause = None if seen or held is Held.NONE else next(pauses, None)
            if pause is None:
                return True
            if not wait.look_again(pause, f"{ref.name}: {LATE}"):
                return False
            continue
        if wait.over:
            return False
        seen = True
        wait.sleep(interval, f"{ref.name} in {ref.place} is being deleted")
        interval = min(interval * 1.5, NAP)


def _leaked(
    claim: Claim, about: list[Ref] | list[str], commands: Optional[list[str]] = None
) -> Leaked:
    """The backend's own commands where a ref carries some, and ours."""
    own = _by_hand((item for item in about if isinstance(item, Ref)), claim.backend)
    return Leaked([*about], [*(commands or own), f"launch teardown {claim.run.name}"])


def _by_hand(refs: Iterable[Ref], load: Load) -> list[str]:
    """The commands that the backends name: a journal's own word is not shown as one to type."""
    found = ((load(ref.backend), ref) for ref in refs)
    told = (b.by_hand(ref) for b, ref in found if isinstance(b, CanSayHow))
    return [*filter(None, told)]
