"""Nothing is left: deleting what an attempt holds, with a confirmation for each resource."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import Optional, TypeVar

from launcher import retry
from launcher.backends.base import Backend, Env, Held, Ref
from launcher.claim import NAP, Claim
from launcher.clock import Clock
from launcher.errors import Leaked, Signal, Transient
from launcher.run import Attempt, JobState, Run

#: How long a resource may stay DELETING, or a backend deaf, before it counts as leaked.
PATIENCE = 900.0

Answer = TypeVar("Answer")


def clear(claim: Claim, job: JobState, attempt: Attempt) -> None:
    """Delete what the attempt holds, newest first, until each is confirmed gone. Errors:
    `Leaked`, after everything has been tried: to go on would be to pay twice."""
    leaks: list[Leaked] = []
    at = {"job": job.index, "attempt": attempt.number}
    try:
        for ref in _strays(claim, job, attempt):
            claim.record("ref", **at, ref=ref)
    except Leaked as leak:
        leaks.append(leak)
    for ref in reversed(attempt.holding):
        try:
            _delete(claim, ref)
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
        raise Leaked([ref for leak in leaks for ref in leak.refs], [*dict.fromkeys(commands)])


def sweep(claim: Claim) -> None:
    """Delete what carries the run's label and stands in no record. Errors: `Leaked`."""
    for name in dict.fromkeys(job.backend for job in claim.run.jobs):
        for ref in _swept(claim, name, [claim.run.name]):
            _delete(claim, ref)


def remove(backend: Backend, ref: Ref, env: Env) -> None:
    """Delete one resource that belongs to no run we know, and wait until it is gone. Errors:
    `Leaked`."""
    try:
        if not _until_away(lambda: backend.delete(ref, env), env.clock):
            raise Leaked([ref])
    except (Signal, OSError) as signal:
        commands = signal.commands if isinstance(signal, Leaked) else []
        raise Leaked([ref], [*commands, "launch teardown --all"]) from signal


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
        commands += [*_by_hand(refs), f"launch teardown {run.name}"]
    if not held:
        return None
    leak = Leaked(held, [*dict.fromkeys(commands)])
    leak.args = (f"{leak} ({error})",)
    return leak


def insist(claim: Claim, ask: Callable[[], Answer], about: list[Ref] | list[str]) -> Answer:
    """`ask()`, again while the answer is `Transient`. Errors: `Leaked` with `about`."""
    deadline = claim.clock.now() + PATIENCE
    for tries in count(1):
        try:
            return ask()
        except Transient as signal:
            if claim.clock.now() > deadline:
                raise _leaked(claim, about) from signal
            claim.say(str(signal))
            claim.clock.sleep(max(signal.after, retry.backoff(tries)))
        except Leaked as leak:
            raise _leaked(claim, about, leak.commands) from leak
        except (Signal, OSError) as signal:
            claim.say(f"cannot clear {about}: {signal}")
            raise _leaked(claim, about) from signal
    raise AssertionError("unreachable")


def _strays(claim: Claim, job: JobState, attempt: Attempt) -> list[Ref]:
    """What intents without an answer may have made: by the job's name, then by our label."""
    waiting = [*claim.waiting(job, attempt)]
    if not waiting:
        return []
    backend, handle = claim.backend(job.backend), claim.handle(job, attempt)
    seen = insist(claim, lambda: backend.observe(handle, claim.env), waiting)
    found = [ref for ref, held in seen.held if held not in (Held.NONE, Held.GONE)]
    found += _swept(claim, job.backend, waiting)
    known = {ref.name for ref in attempt.refs}
    return [*{ref.name: ref for ref in found if ref.name not in known}.values()]


def _swept(claim: Claim, name: str, about: list[str]) -> list[Ref]:
    backend = claim.backend(name)
    everything = insist(claim, lambda: [*backend.sweep(claim.env)], about)
    return [ref for ref in everything if ref.run == claim.run.id]


def _delete(claim: Claim, ref: Ref) -> None:
    """Delete one resource of the run and wait until it is gone."""
    backend = claim.backend(ref.backend)
    if not _until_away(
        lambda: insist(claim, lambda: backend.delete(ref, claim.env), [ref]), claim.clock
    ):
        raise _leaked(claim, [ref])


def _until_away(delete: Callable[[], Held], clock: Clock) -> bool:
    """Ask until the answer is that it is absent; False when `PATIENCE` ends first."""
    deadline, interval = clock.now() + PATIENCE, 0.1
    while delete() not in (Held.GONE, Held.NONE):
        if clock.now() > deadline:
            return False
        clock.sleep(interval)
        interval = min(interval * 1.5, NAP)
    return True


def _leaked(
    claim: Claim, about: list[Ref] | list[str], commands: Optional[list[str]] = None
) -> Leaked:
    """The backend's own commands where a ref carries some, and ours."""
    own = _by_hand(item for item in about if isinstance(item, Ref))
    return Leaked([*about], [*(commands or own), f"launch teardown {claim.run.name}"])


def _by_hand(refs: Iterable[Ref]) -> list[str]:
    return [str(ref.data["delete_command"]) for ref in refs if "delete_command" in ref.data]
