"""What carries our label and belongs to no live run: found, and deleted with a confirmation each.

A run that has lost its driver still owns what it holds: its job goes on, and `launch resume` drives
it. So a resource is nobody's only when no run of this home, and no journal in the run's bucket,
says that its run is still going.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional, TypeVar

from launcher import backends, home, view
from launcher.backends.base import Backend, CanTell, Env, Labelled
from launcher.clear import remove, unanswered
from launcher.errors import LaunchError, Leaked, Signal
from launcher.run import Run
from launcher.waiting import Waiting
from trainer.store import Store, StoreError, open_store

Found = TypeVar("Found")
#: Records that say nothing about whether their run is over.
_SILENT = ("driver", "ref", "gone", "notified", "undelivered")


@dataclass(frozen=True)
class Stray:
    """A resource without a live run. `doubt`: why that is not certain; such a one is left alone."""

    found: Labelled
    doubt: str = ""

    @property
    def command(self) -> str:
        """What deletes it by hand."""
        return str(self.found.ref.data.get("delete_command", "launch sweep"))

    def to_json(self) -> dict[str, Any]:
        ref, found = self.found.ref, self.found
        return {
            "backend": ref.backend, "kind": ref.kind, "name": ref.name, "place": ref.place,
            "run": ref.run, "owner": found.owner, "created": found.created,
            "bills_since": found.bills_since, "doubt": self.doubt, "command": self.command,
        }  # fmt: skip


def find(env: Env, everyone: bool = False) -> list[Stray]:
    """All strays on the backends that this machine used or the environment names, oldest first.
    `everyone`: also what carries the label of another owner. Errors: signals of the backends;
    `Leaked` where one cannot be asked while a run of this home holds something there."""
    strays = []
    runs: dict[str, tuple[bool, str]] = {}
    for name in backends.names():
        backend = backends.load(name)
        if not backend.can.create:
            continue
        for found in _answered(env, name, partial(_labelled, backend, env, everyone)):
            if found.ref.run not in runs:
                runs[found.ref.run] = _goes_on(env, found)
            live, doubt = runs[found.ref.run]
            if not live:
                strays.append(Stray(found, doubt))
    return sorted(strays, key=lambda stray: stray.found.created or 0.0)


def delete(env: Env, strays: Iterable[Stray]) -> None:
    """Delete strays and wait until each is gone. Errors: `Leaked` with those that are left, after
    all have been tried."""
    left: list[Stray] = []
    for stray in strays:
        if stray.doubt:
            left.append(stray)
            continue
        try:
            remove(backends.load(stray.found.ref.backend), stray.found.ref, env)
        except Leaked:
            left.append(stray)
    if left:
        raise leaked(left)


def leaked(strays: Iterable[Stray]) -> Leaked:
    """The error that says what is left, and how to finish by hand."""
    left = list(strays)
    return Leaked(
        [stray.found.ref for stray in left], [*dict.fromkeys(stray.command for stray in left)]
    )


def clear_backend(env: Env, name: str, waiting: Optional[Waiting] = None) -> list[Leaked]:
    """Delete all that the backend `name` finds under the owner's label, but what belongs to a run
    that goes on elsewhere: equal user names of two machines are one label. `waiting`: for what does
    not answer (default: not at all). What could not be deleted, and what is in doubt."""
    backend, leaks = backends.load(name), []
    for found in _answered(env, name, lambda: _labelled(backend, env, everyone=False)):
        live, doubt = (False, "") if _of_this_home(env, found) else _goes_on(env, found)
        try:
            if doubt:
                raise leaked([Stray(found, doubt)])
            if not live:
                remove(backend, found.ref, env, waiting)
        except Leaked as leak:
            leaks.append(leak)
    return leaks


def _answered(env: Env, name: str, ask: Callable[[], Iterable[Found]]) -> list[Found]:
    """What a backend answers. Errors: `Leaked` where it cannot be asked, and a run of this home
    holds something there; its own signals where none does."""
    try:
        return list(ask())
    except (Signal, OSError) as error:
        runs = view.listed(env, 0)
        theirs = (run for run in runs if any(job.backend == name for job in run.jobs))
        raise unanswered(theirs, error) or error from error


def _labelled(backend: Backend, env: Env, everyone: bool) -> Iterator[Labelled]:
    """A backend that cannot tell more has only its owner's resources to name."""
    if isinstance(backend, CanTell):
        yield from backend.labelled(env, everyone)
    else:
        yield from (Labelled(ref, env.owner) for ref in backend.sweep(env))


def _of_this_home(env: Env, found: Labelled) -> bool:
    """Whether this home has started the run of a resource: then it may also end it."""
    facts = home.identity(env.home, found.ref.run)
    if facts is None or "adopted" in facts:
        return False
    try:
        return not _driven_elsewhere(view.look(env, facts))
    except LaunchError:
        return True  # a damaged journal: what it holds is ours all the same


def _driven_elsewhere(run: Run) -> bool:
    """Whether it goes on, and another home was the last to claim it."""
    return run.ended is None and run.driver is not None and run.driver.alive is None


def _goes_on(env: Env, found: Labelled) -> tuple[bool, str]:
    """Whether the run of a resource is still going; and what speaks against believing a no."""
    facts = home.identity(env.home, found.ref.run)
    if facts is not None:
        try:
            run = view.look(env, facts)
            deaf = next((text for text in run.warnings if text.startswith(view.DEAF)), "")
            return run.ended is None, "" if run.ended is None else deaf
        except LaunchError as error:  # it may be going: `launch teardown RUN` is what ends it
            return False, str(error)
    if not found.root:
        return False, ""
    try:
        return _written_live(open_store(found.root)), ""
    except StoreError as error:
        return False, f"its journal in {found.root} cannot be read: {error}"


def _written_live(store: Store) -> bool:
    """Whether the journal that another machine writes is one of a run that goes on. There is no
    journal: there is no run."""
    for key in sorted(store.list("journal/"), reverse=True):
        kind = _kind(store.get_bytes(key))
        if kind not in _SILENT:
            return kind != "end"
    return False


def _kind(data: bytes) -> Optional[str]:
    """The kind of a record; one that is cut tells that somebody was writing."""
    try:
        return str(json.loads(data)["kind"])
    except (ValueError, KeyError, TypeError):
        return None
