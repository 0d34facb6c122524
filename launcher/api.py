"""The verbs, typed: what the command line and notebooks call. Heavy modules load on use.

`run` is a name, an id, a prefix that no other run shares, where a run's artifacts lie (gs://, s3://,
a folder: one that this machine does not know is adopted), or a `Run`. Every function raises
`launcher.errors.LaunchError` and nothing else on bad input; its `code` is the exit code.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from launcher import home
from launcher.backends.base import Env, Held, Line, Ref
from launcher.clock import SystemClock
from launcher.errors import Exit, JournalDamaged, LaunchError, Leaked, Signal, UsageError
from launcher.run import Run

if TYPE_CHECKING:
    from launcher.artifacts import Artifacts
    from launcher.difference import Difference
    from launcher.plan import RunPlan
    from launcher.recipe import Loaded
    from launcher.waiting import Waiting

Which = Union[str, Run]
#: Seconds that a driver may still hold a run that is over: it writes a summary to the store.
_WAY_OUT = 15.0


def env() -> Env:
    """What backends may know about this machine and this user."""
    environ = dict(os.environ)
    return Env(home.path(environ), environ, SystemClock(), home.owner(environ), sys.executable)


def validate(path: str | Path, overrides: Iterable[str] = (), on: Optional[str] = None) -> Loaded:
    """Read a recipe. Errors: `RecipeErrors` with every problem and its position."""
    from launcher import recipe

    return recipe.load(path, overrides, on)


class Prepared:
    """A recipe as it was read once, wheels and code settled, and the trainer that would go with it:
    what is shown of it is what is started, whatever becomes of its file meanwhile."""

    def __init__(
        self, path: str | Path, overrides: Iterable[str] = (), on: Optional[str] = None
    ) -> None:
        """Errors: those of `validate`, of wheels and of code."""
        from launcher import bundle, code, wheels

        self._env = env()
        loaded = wheels.resolved(validate(path, overrides, on))
        self.loaded = code.resolved(loaded, self._env.home)
        self.bundle = bundle.build(self._env.home)

    @cached_property
    def plan(self) -> RunPlan:
        """What `up` would create, whether it fits, how long it takes and what it costs."""
        from launcher import forecast
        from launcher.artifacts import missing_client
        from launcher.plan import make
        from launcher.start import commit_of

        here, loaded = self._env, self.loaded
        made = make(loaded.recipe, here, self.bundle, commit=commit_of(loaded.path))
        made = forecast.added(made, loaded.recipe, here.home)
        missing = missing_client(made.root)
        needed = f"artifacts: {made.root} cannot be reached from here: {missing}"
        notes = (*made.notes, *loaded.notes(), *untold(loaded, here))
        return replace(made, notes=(*notes, needed) if missing else notes)


def plan(path: str | Path, overrides: Iterable[str] = (), on: Optional[str] = None) -> RunPlan:
    """What `up` would create, whether it fits, how long it takes and what it costs. Creates nothing
    outside $LAUNCH_HOME/bundles."""
    return Prepared(path, overrides, on).plan


def untold(loaded: Loaded, here: Env) -> list[str]:
    """Entries of the recipe's `notify` that can tell nobody from this machine, where the driver
    will run, each with why."""
    if not loaded.recipe.notify:
        return []
    from launcher import notify

    told = ((notify.label(to), notify.unready(to, here)) for to in loaded.recipe.notify)
    return [f"notify: {to} would tell nobody: {why}" for to, why in told if why]


def difference(
    recipe: str | Path | Prepared,
    overrides: Iterable[str] = (),
    on: Optional[str] = None,
    against: Optional[Which] = None,
) -> Optional[Difference]:
    """How a recipe differs from the newest live run of its name, owner and cloud project, or from
    the run `against`; None: there is none. Errors: those of a journal or store that cannot be
    read."""
    from launcher import amend

    here, ready = env(), _prepared(recipe, overrides, on)
    if against is not None:
        return amend.differ(here, status(against), ready.loaded, ready.bundle)
    return amend.find(here, ready.loaded, ready.bundle)


def up(
    recipe: str | Path | Prepared,
    *,
    overrides: Iterable[str] = (),
    on: Optional[str] = None,
    new: bool = False,
) -> Run:
    """Start a run, in a driver process of its own, and return it. A live run of the same recipe,
    trainer and owner is returned instead (with a driver, if it had lost its own), unless `new`; so
    is one that differs only in what a live run takes up in place (`difference`), and it does so.
    Errors: `UsageError` where such a change would end it at once; those of the plan too, before
    anything is created: no place, a backend that only plans.
    """
    from launcher import amend, driver, start
    from launcher.plan import refuse

    here, ready = env(), _prepared(recipe, overrides, on)
    with home.up_lock(here.home):
        found = None if new else amend.find(here, ready.loaded, ready.bundle, requests=False)
        if found is not None and found.stops:
            raise found.refusal()
        if found is not None and found.in_place and found.blocks():
            amend.leave(here, found, ready.loaded.canonical)
        if found is not None and (found.same or found.in_place):
            return attach(found.run)
        refuse(ready.plan)
        run_id = start.create(ready.loaded, ready.bundle, here)["id"]
        driver.spawn(run_id, here, driver.relieve(run_id, here))
    return status(run_id)


def attach(run: Which, take_over: bool = False) -> Run:
    """See to it that a run which is not over has a driver. `take_over` replaces the one it has,
    also one on another host (whose next write then fails)."""
    from launcher import driver
    from launcher.claim import refuse_foreign, refuse_processes
    from launcher.errors import HeldElsewhere
    from launcher.journal import Journal

    here, facts = env(), _find(run)
    seen = status(facts["id"])
    if not seen.live:
        return seen
    if take_over:
        refuse_processes(seen, facts)
    place = home.folder(here.home, seen.id)
    journal = Journal(place, _artifacts(seen), here.clock)
    journal.name = seen.name
    lock = driver.relieve(seen.id, here) if take_over else home.DriverLock.acquire(place, wait=0.2)
    if lock is None:
        return seen
    try:
        journal.read(take_over, allowed=partial(refuse_foreign, journal, take_over=take_over))
        if take_over:
            journal.epoch += 1
            journal.append("driver")
    except HeldElsewhere:
        lock.close()
        return seen
    except BaseException:
        lock.close()
        raise
    driver.spawn(seen.id, here, lock)
    return status(seen.id)


def status(run: Which) -> Run:
    """A run as it is now: phases, money, driver, progress, warnings."""
    from launcher import view

    return view.look(env(), _find(run))


def list_runs(limit: int = 20, all: bool = False) -> list[Run]:
    """Runs, newest first: every live one, and the `limit` newest of those that are over."""
    from launcher import view

    return view.listed(env(), None if all else limit)


def wait(run: Which, timeout: Optional[float] = None) -> Run:
    """Wait until a run is over, has lost its driver, or `timeout` seconds have passed; returns it
    as it is then."""
    started, interval = time.monotonic(), 0.1
    run_id = _find(run)["id"]
    while True:
        seen = status(run_id)
        lost = seen.driver is None or seen.driver.alive is False
        late = timeout is not None and time.monotonic() - started >= timeout
        if seen.ended is not None or lost or late:
            return seen
        time.sleep(interval)
        interval = min(interval * 1.5, 2.0)


def logs(
    run: Which,
    *,
    worker: Optional[int] = None,
    since: Optional[float] = None,
) -> Iterator[Line]:
    """What a run has logged so far; `launcher.logs` follows."""
    from launcher.logs import Reader

    return Reader(env(), worker, since).new(status(run))


def stop(run: Which, reason: str = "") -> Run:
    """Ask a run to save and end. It can be resumed. Returns at once; `wait` waits. A run that is
    over is returned as it is."""
    from launcher.claim import write_marker

    here, seen = env(), status(run)
    if seen.ended is not None:
        return seen
    write_marker(_artifacts(seen), here.clock.now(), here.owner, reason)
    return attach(seen.id)


def resume(run: Which, overrides: Iterable[str] = ()) -> Run:
    """Go on with a run: one without a driver gets a driver; one that was stopped, paused or has
    failed is opened again, with `overrides` (`a.b=c`); one that nobody drives, and whose job has
    ended, is first brought to its end. Errors: `UsageError` when it is complete; those of its plan,
    and it is then as it was."""
    from launcher import driver, start
    from launcher.claim import refuse_processes
    from launcher.fold import Fold
    from launcher.journal import Journal, held_elsewhere
    from launcher.plan import refuse

    here, facts = env(), _find(run)
    seen, given = status(facts["id"]), tuple(overrides)
    if seen.ended is None:
        if seen.driver is not None and seen.driver.alive is None:
            raise held_elsewhere(vars(seen.driver), seen.name)
        if given and _left_alone(seen):
            if (planned := resume_plan(seen, given)) is not None:
                refuse(planned)  # before anything of the run is touched
            seen = wait(stop(seen, "to be resumed"))
        elif not given:
            return attach(seen.id)
        if seen.ended is None:
            text = f"{seen.name} is not over: its recipe cannot change now"
            hint = f"`launch stop {seen.name}`, then resume it with --set"
            raise UsageError(text, f"{hint}; `launch up RECIPE` changes a budget without a stop")
    if seen.exit_code == Exit.OK and seen.phase.value == "succeeded":
        raise UsageError(f"{seen.name} is complete", "`launch up RECIPE --new` starts another run")
    refuse_processes(seen, facts)
    place = home.folder(here.home, seen.id)
    # The last record is not a driver's last act: one that is on its way out gets the time for it.
    lock = home.DriverLock.acquire(place, wait=_WAY_OUT)
    if lock is None:
        raise held_elsewhere(home.claimed(place), seen.name)
    try:
        journal = Journal(place, _artifacts(seen), here.clock)
        journal.name = seen.name
        fold = Fold(journal.read(heal=True))
        if fold.run.ended is None:  # another machine has opened it again since we looked
            (place / "summary.json").unlink(missing_ok=True)
            raise held_elsewhere(None, seen.name)
        refuse(start.what_resuming_creates(fold, place, given, here))
        start.reopen(fold, journal, place, given, here)
    except BaseException:
        lock.close()
        raise
    driver.spawn(seen.id, here, lock)
    return status(seen.id)


def resume_plan(run: Which, overrides: Iterable[str] = ()) -> Optional[RunPlan]:
    """What `resume` would create and cost, of the jobs that are not done. None when it creates
    nothing by itself: the run is not over and only needs a driver, or it is complete. Errors: those
    of `resume`."""
    from launcher import start, view
    from launcher.fold import Fold
    from launcher.journal import Journal

    here, facts = env(), _find(run)
    seen = status(facts["id"])
    given = tuple(overrides)
    if seen.ended is None and not (given and _left_alone(seen)):
        return None
    if seen.phase.value == "succeeded":
        return None
    place = home.folder(here.home, seen.id)
    journal = Journal(place, _artifacts(seen), here.clock)
    fold = Fold(journal.read())
    if seen.ended is None:
        fold.run.folder = seen.folder
        view.note_end(fold.run, here.clock.now())
    return start.what_resuming_creates(fold, place, given, here)


def teardown(run: Which, timeout: Optional[float] = None) -> Run:
    """Delete everything a run holds and wait until each resource is confirmed absent; takes the
    run over from its driver. Of a run whose journal cannot be read, what carries its label.
    `timeout`: seconds after which it waits no longer for what does not go or does not answer; None:
    15 minutes for each. Errors: `Leaked` with the commands that finish by hand; those of a store,
    or a disk, that does not take records, after everything was deleted all the same."""
    from launcher import driver, unread

    here, facts = env(), _find(run)
    waiting = _waiting(here, timeout)
    try:
        return _teardown(facts, here, waiting)
    except JournalDamaged as damage:
        waiting.say(f"{facts['name']}: {damage}; looking for what carries its label")
        with driver.relieved(facts["id"], here) as refused:
            known = unread.teardown(facts, damage, here, waiting)
        if refused is None:
            return known
        text = f"{known.name} holds nothing any more, but it may have a driver: {refused}"
        refused.args = (text,)
        raise refused from damage


def _teardown(facts: dict[str, Any], here: Env, waiting: Waiting) -> Run:
    from launcher import driver, engine, unread
    from launcher.artifacts import is_remote
    from launcher.claim import refuse_processes, write_marker

    seen = status(facts["id"])
    refuse_processes(seen, facts)
    try:
        if seen.ended is None:  # should we die here, the job still ends
            artifacts = _artifacts(seen)
            artifacts.patience = waiting.at_most(artifacts.patience)
            write_marker(artifacts, here.clock.now(), here.owner, "teardown")
        lock = driver.relieve(seen.id, here)
        engine.teardown(seen.id, here, lock=lock, until=waiting.until)
    except Leaked:
        raise
    except (Signal, UsageError, home.Unwritable) as error:
        if not (is_remote(seen.root) or isinstance(error, home.Unwritable)):
            raise
        with driver.relieved(seen.id, here):  # one that goes on would start it again
            unread.clear_unrecorded(seen, here, waiting)
        error.args = (f"{seen.name} holds nothing any more, but its journal does not say so: "
                      f"{error}",)  # fmt: skip
        raise
    return status(seen.id)


def teardown_all(timeout: Optional[float] = None) -> list[Run]:
    """`teardown` of every live run of this home, then of whatever else on this machine's backends
    carries our label and belongs to no run that goes on elsewhere; `timeout` is for all of it. A
    run of another home that was only looked at from here is left alone and returned with a warning.
    Errors: `Leaked` with all that is left; everything has been tried by then."""
    from launcher import backends
    from launcher.sweeping import clear_backend

    here = env()
    waiting = _waiting(here, timeout)
    done: list[Run] = []
    leaks: list[Leaked] = []
    refused: list[Exception] = []
    names = {"local"}
    for run in list_runs(0):
        adopted = "adopted" in (home.identity(here.home, run.id) or {})
        if adopted and run.driver is not None and run.driver.alive is None:
            text = f"left alone: `launch teardown {run.name}` deletes what it holds"
            run.warnings.append(text)
            done.append(run)
            continue
        # Without one readable record nobody knows where the run was: look everywhere.
        names |= {job.backend for job in run.jobs} or {*backends.names()}
        if adopted and run.driver is None:  # it may go on elsewhere: the sweep below says so
            done.append(run)
            continue
        try:
            left = None if waiting.until is None else waiting.until - here.clock.now()
            done.append(teardown(run.id, left))
        except Leaked as leak:
            leaks.append(leak)
        except LaunchError as error:  # e.g. a journal of a newer version: the sweep still finds it
            run.warnings.append(str(error))
            done.append(run)
    for name in sorted(names):
        try:
            leaks += clear_backend(here, name, waiting)
        except Leaked as leak:  # it cannot be asked
            leaks.append(leak)
        except (Signal, OSError) as error:  # nor is anything known to be there
            refused.append(error)
    if leaks:
        commands = [command for leak in leaks for command in leak.commands]
        raise Leaked([ref for leak in leaks for ref in leak.refs], [*dict.fromkeys(commands)])
    if refused:
        raise refused[0]
    return done


def pull(run: Which, to: Optional[str | Path] = None) -> Path:
    """Copy a run's artifacts to a folder (default: ./NAME) and return it."""
    from launcher.pulling import pull as copy

    seen = status(run)
    return copy(seen, Path(to) if to is not None else Path(seen.name), _artifacts(seen))


def event_files(run: Which) -> tuple[str, Path]:
    """Where TensorBoard's event files of a run lie, and the folder of this machine that has them:
    from a store they are copied there now, as far as they have changed."""
    from launcher.artifacts import ANYTHING, EVENTS, journals, open_artifacts, parsed
    from launcher.plan import of_run

    here, seen = env(), status(run)
    first = (folder / "00000001.json" for folder in journals(seen))
    created = next((parsed(file.read_bytes()) for file in first if file.exists()), {})
    board = (created.get("recipe") or {}).get("tensorboard")
    if board is None:
        artifacts = _artifacts(seen)
        artifacts.refresh(EVENTS, anew=True)
        return seen.root, artifacts.folder
    place, uri = home.folder(here.home, seen.id), of_run(board, seen.name)
    apart = open_artifacts(uri, place / "events", here.environ, here.clock)
    apart.refresh(ANYTHING, anew=True)
    return uri, apart.folder


def _prepared(
    recipe: str | Path | Prepared, overrides: Iterable[str], on: Optional[str]
) -> Prepared:
    if not isinstance(recipe, Prepared):
        return Prepared(recipe, overrides, on)
    if on is not None or [*overrides]:
        text = "a recipe that was read already takes no `overrides` and no `on`"
        raise UsageError(text, "give them to Prepared")
    return recipe


def _find(run: Which) -> dict[str, Any]:
    from launcher.adopt import adopt, is_root

    if isinstance(run, str) and is_root(run):
        return adopt(run, env())
    return home.find(env().home, run.id if isinstance(run, Run) else run)


def _left_alone(run: Run) -> bool:
    """Whether a run that is not over has neither a driver nor a job that still works."""
    attempts = [attempt for job in run.jobs for attempt in job.attempts]
    driven = run.driver is not None and run.driver.alive is not False
    return not driven and bool(attempts) and attempts[-1].ended is not None


def _artifacts(run: Run) -> Artifacts:
    from launcher.artifacts import open_artifacts

    here = env()
    return open_artifacts(run.root, home.folder(here.home, run.id), here.environ, here.clock)


def _waiting(here: Env, timeout: Optional[float]) -> Waiting:
    from launcher.claim import say
    from launcher.waiting import Waiting

    until = None if timeout is None else here.clock.now() + timeout
    return Waiting(here.clock, partial(say, here.clock), until)


__all__ = [
    "Held", "Prepared", "Ref", "Run", "attach", "difference", "env", "event_files", "list_runs",
    "logs", "plan", "pull", "resume", "resume_plan", "status", "stop", "teardown", "teardown_all",
    "untold", "up", "validate", "wait",
]  # fmt: skip
