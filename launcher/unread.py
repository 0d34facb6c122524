"""The teardown of a run whose journal cannot be read, or takes no records: what carries its label
is found and deleted.

A journal says in which places its run has been. Without it, that nothing is left is certain only of
a run that this home alone has driven: a home remembers where it has created anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Optional

from launcher import backends, home, retry
from launcher.artifacts import Artifacts, open_artifacts
from launcher.backends.base import Backend, CanFind, Env, Held, Ref
from launcher.claim import refuse_processes, write_marker
from launcher.clear import patiently, remove, unanswered
from launcher.errors import JournalDamaged, LaunchError, Leaked, Signal, Transient
from launcher.journal import Journal
from launcher.run import Run
from launcher.view import unread
from launcher.waiting import LATE, Waiting

_RECORD = re.compile(r"journal/(\d{8}\.json)")


def teardown(facts: dict[str, Any], damage: JournalDamaged, env: Env, waiting: Waiting) -> Run:
    """Delete what carries the label of the run `facts` (its identity in this home), wait until it
    is gone, and return what is known of the run, with `damage` as its warning. The caller holds its
    lock. Errors: `Leaked` with what is left, and where nobody can tell whether that was all;
    `NotFromHere`."""
    place = home.folder(env.home, facts["id"])
    artifacts = open_artifacts(facts["root"], place, env.environ, env.clock)
    artifacts.patience = waiting.at_most(artifacts.patience)
    begun = _beginning(facts, env, artifacts)
    if begun is not None:
        refuse_processes(begun, facts)
    with suppress(LaunchError):  # should we die here, the job still ends
        write_marker(artifacts, env.clock.now(), env.owner, "teardown")
    again = f"launch teardown {facts['name']}"
    leaks: dict[tuple[str, str, str], Leaked] = {}
    doubts = []
    for name in _backends(begun):
        theirs = replace(env, owner=facts["owner"])
        try:
            _clear(backends.load(name), facts["id"], theirs, waiting, again, leaks)
        except (Signal, OSError) as error:
            doubts.append(f"{name}: {error}")
    artifacts.patience = waiting.at_most(artifacts.patience)
    doubts += _others(facts, env, artifacts)
    if doubts or leaks:
        refs = [ref for leak in leaks.values() for ref in leak.refs] or [facts["name"]]
        commands = [command for leak in leaks.values() for command in leak.commands]
        left = Leaked(refs, [*dict.fromkeys([*commands, again])])
        why = [f"its journal cannot be read ({damage})", *doubts]
        left.args = (f"{left}; {'; '.join(why)}",)
        raise left
    known = unread(env, facts, damage)
    known.held, known.ended = Held.GONE, env.clock.now()
    return known


def clear_unrecorded(run: Run, env: Env, waiting: Waiting) -> None:
    """Delete what the run's backends find under its label, where this machine has created jobs and
    where the run is known to have some. Errors: `Leaked`, also where a backend cannot be asked
    although the journal, as far as it is known, says that the run holds something, and where there
    is no time until what the run has asked for last would show."""
    theirs, again = replace(env, owner=run.owner), f"launch teardown {run.name}"
    sure = True
    for name in dict.fromkeys(job.backend for job in run.jobs):
        backend = backends.load(name)
        attempts = [a for job in run.jobs if job.backend == name for a in job.attempts]
        known = [ref for attempt in attempts for ref in attempt.refs]
        if any(attempt.held is Held.CREATING for attempt in attempts):
            text = f"{run.name}: what it has asked for last is {LATE}"
            sure &= waiting.begin().look_again(backend.can.settle, text)
        try:
            found = list(backend.sweep(theirs))
            if known and isinstance(backend, CanFind):
                found += [r for r in backend.of_run(run.id, known, theirs) if r not in found]
        except (Signal, OSError) as error:
            raise unanswered([run], error) or error from error
        for ref in found:
            if ref.run == run.id:
                remove(backend, ref, theirs, waiting, again)
    if not sure:
        raise Leaked([run.name], [again])


def _clear(
    backend: Backend,
    run: str,
    env: Env,
    waiting: Waiting,
    again: str,
    leaks: dict[tuple[str, str, str], Leaked],
) -> None:
    """Delete what the backend finds of the run, until what was asked for last would show. `leaks`
    takes what could not be deleted. Errors: those of a backend that cannot be asked; `Transient`
    where there is no time for all that."""
    pauses, wait = retry.settling(backend.can.settle), waiting.begin()

    def listed() -> list[Ref]:
        return [ref for ref in backend.sweep(env) if ref.run == run]

    while True:
        for ref in patiently(listed, waiting):
            at = (ref.kind, ref.place, ref.name)
            if at in leaks:
                continue
            try:
                remove(backend, ref, env, waiting, again)
                waiting.say(f"deleted {ref.kind} {ref.name}, {ref.place}")
            except Leaked as leak:
                leaks[at] = leak
        pause = next(pauses, None)
        if pause is None:
            return
        text = f"what the run has asked for last is {LATE}"
        if not wait.look_again(pause, text):
            raise Transient(text)


def _beginning(facts: Mapping[str, Any], env: Env, artifacts: Artifacts) -> Optional[Run]:
    """The run as its first record tells of it, where that is whole and its own."""
    try:
        begun = Journal(home.folder(env.home, facts["id"]), artifacts, env.clock).beginning()
    except LaunchError:
        return None
    return begun if begun is not None and begun.id == facts["id"] else None


def _backends(begun: Optional[Run]) -> list[str]:
    """Where the run's jobs may be: a resumed run keeps its backends."""
    if begun is not None and begun.jobs:
        return [*dict.fromkeys(job.backend for job in begun.jobs)]
    return [name for name in backends.names() if backends.load(name).can.create]


def _others(facts: Mapping[str, Any], env: Env, artifacts: Artifacts) -> list[str]:
    """Why the run may have been where this home has not."""
    if "adopted" in facts:
        why = "another machine has started it"
    else:
        try:
            names = artifacts.names("journal/")
        except LaunchError as error:
            return [f"whether another machine has driven it, nobody can tell: {error}"]
        copies = home.folder(env.home, facts["id"]) / "journal"
        records = (match[1] for name in names if (match := _RECORD.fullmatch(name)))
        foreign = next((name for name in records if not (copies / name).exists()), None)
        if foreign is None:
            return []
        why = f"this home has not written {foreign}"
    return [f"{why}: it may hold something in a place where nothing was created from here"]
