"""`launch up RECIPE --rehearse`: the way of a cloud run, against servers on this machine."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Optional

from launcher import api, console, home, shipped
from launcher.backends.base import Phase, Ref
from launcher.commands import follow
from launcher.errors import Exit, LaunchError, Leaked, UsageError
from launcher.rehearse import Rehearsal, refuse

if TYPE_CHECKING:
    from launcher.run import Run

_BUNDLES = r"/launch/bundles/"
_HINT = "Ctrl-C ends the rehearsal and everything that it started"
_REFUSAL = "a rehearsal asks as the run would, and there is no terminal to ask on"
_LOOK = 0.1
_LONGEST_LOOK = 120.0


def rehearse(
    recipe: str,
    overrides: Sequence[str],
    on: Optional[str],
    *,
    detach: bool,
    dry_run: bool,
    yes: bool,
    keep: bool,
    as_json: bool,
) -> int:
    """Rehearse; returns the run's exit code. Nothing of it outlives the call, but the folder where
    `keep` or a failure asks for it."""
    for option, given in (("--detach", detach), ("--dry-run", dry_run)):
        if given:
            what = f"{option} does not go with --rehearse"
            raise UsageError(what, "a rehearsal ends with its command, and starts real jobs here")
    loaded = api.validate(shipped.find(recipe), overrides, on)
    refuse(loaded.recipe)
    if not yes and not console.can_ask():  # before anything is started
        raise UsageError(_REFUSAL, "add --yes to go on without being asked")
    began = time.monotonic()
    console.notice(f"a rehearsal of {loaded.recipe.name}: no account, no cloud, nothing is billed")
    console.notice("starting the servers and making stand-ins for models and data")
    with _interruptible(), _told_when_left(), Rehearsal(loaded, api.env().home, keep) as world:
        console.notice(f"servers on this machine, instead of Google's: {world.url}")
        for note in world.notes:
            console.notice(f"rehearsal: {note}")
        with world.environment():
            try:
                code = _through(world, yes, as_json, began)
            except LaunchError:
                _keep(world, any(home.ids(world.home)))
                raise
            finally:
                _relieve()
        _keep(world, code != Exit.OK)
    return code


@contextmanager
def _told_when_left() -> Iterator[None]:
    """Outside of the rehearsal's own context: what is said is true by then."""
    try:
        yield
    except KeyboardInterrupt:
        console.notice("\ninterrupted: servers, jobs and drivers of the rehearsal have been ended; "
                       "its folder is gone, but for what was said to be kept")  # fmt: skip
        raise


def _keep(world: Rehearsal, failed: bool) -> None:
    """A run that failed is there to be looked at."""
    world.keep = world.keep or failed
    if world.keep:
        console.notice(f"kept: {world.folder} (LAUNCH_HOME={world.home} shows its runs)")


def _through(world: Rehearsal, yes: bool, as_json: bool, began: float) -> int:
    """Plan, ask, start, follow to the end, start once more, tear down, look for leftovers."""
    from launcher import plan

    planned = api.plan(world.recipe)
    plan.refuse(planned)
    for line in planned.lines() if not as_json else ():
        if not line.startswith("artifacts:"):
            console.notice(line)
    if not yes and not console.confirm("Start the rehearsal?", _REFUSAL):
        console.notice("nothing was started")
        return Exit.OK
    since = api.env().clock.now()
    run = api.up(world.recipe)
    console.notice(f"started {run.name}")
    ended = follow.watch(run, api.env(), since=since, as_json=as_json, hint=_HINT)
    if ended.ended is None:
        raise LaunchError(f"{ended.name} lost its driver", f"{world.home} has its driver.log")
    told = _facts(world, ended)
    if ended.phase is Phase.SUCCEEDED:
        told["second_up"] = _again(world)
    left = _leftovers()
    told["leftovers"] = [ref.name for ref in left]
    told["seconds"] = round(time.monotonic() - began, 1)
    written = follow.reported(ended)
    if as_json:
        console.document({**follow.facts(ended, written), "rehearsal": told})
    else:
        for line in (*follow.ending(ended, None), "", *_summary(ended, told)):
            console.say(line)
    if left:
        raise Leaked(left)
    return int(ended.exit_code or 0)


def _facts(world: Rehearsal, run: Run) -> dict[str, Any]:
    """What happened, from the journal and from the bucket."""
    attempts = [attempt for job in run.jobs for attempt in job.attempts]
    events = _events(run)
    return {
        "endpoint": world.url,
        "changes": world.notes,
        "attempts": [{"phase": a.phase.value, "why": a.why, "place": a.place} for a in attempts],
        "preempted": sum(a.phase is Phase.PREEMPTED for a in attempts),
        "checkpoints": [e["global_step"] for e in events if e.get("event") == "checkpoint"],
        "resumed_at": [e["global_step"] for e in events if e.get("event") == "resumed"],
        "created": [ref.name for a in attempts for ref in a.refs],
        "gone": [r.name for a in attempts for r in a.refs if r.billable and r.name in a.gone],
        "bundle_bytes": sum(world.writes(_BUNDLES)),
        "bundle_uploads": len(world.writes(_BUNDLES)),
        "folder": str(world.folder) if world.keep else None,
    }


def _events(run: Run) -> list[dict[str, Any]]:
    """The events among the metrics that the jobs left in the bucket, in the order of attempts."""
    from trainer.store import open_store

    store, found = open_store(run.root), []
    for key in sorted(key for key in store.list() if "metrics/" in key and key.endswith(".jsonl")):
        for line in store.get_bytes(key).splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return [line for line in found if line.get("kind") == "event"]


def _again(world: Rehearsal) -> dict[str, Any]:
    """A second run of the same recipe, torn down as soon as its job is there."""
    console.notice("once more, to see what is not sent again; it is torn down at once")
    before = len(world.writes(_BUNDLES))
    run = api.up(world.recipe, new=True)
    deadline = time.monotonic() + _LONGEST_LOOK
    while run.ended is None and not any(
        ref.billable for job in run.jobs for attempt in job.attempts for ref in attempt.refs
    ):
        if time.monotonic() > deadline:
            raise LaunchError(f"{run.name}: no job within {_LONGEST_LOOK:.0f} s", run.why)
        time.sleep(_LOOK)
        run = api.status(run.id)
    gone = api.teardown(run.id)
    return {
        "name": run.name,
        "phase": gone.phase.value,
        "held": gone.held.value,
        "bundle_bytes": sum(world.writes(_BUNDLES)[before:]),
    }


def _leftovers() -> list[Ref]:
    """What still carries our label."""
    from launcher import backends

    return list(backends.load("vertex").sweep(api.env()))


def _relieve() -> None:
    """No driver outlives the rehearsal."""
    from launcher import driver

    here = api.env()
    for run_id in home.ids(here.home):
        driver.relieve(run_id, here).close()


def _summary(run: Run, told: dict[str, Any]) -> list[str]:
    attempts, second = told["attempts"], told.get("second_up")
    way = ["plan", "bundle and specification uploaded", "job queued and run"]
    if told["preempted"]:
        way += [f"machine taken {told['preempted']} times" if told["preempted"] > 1
                else "machine taken after the first whole checkpoint", "started again"]  # fmt: skip
        way += [f"resumed at step {step}" for step in told["resumed_at"]]
    way += [run.phase.value, *(["torn down"] if second else [])]
    lines = [
        f"rehearsal of {run.recipe}: {run.phase.value} in {console.duration(told['seconds'])}",
        f"  the way     {', '.join(way)}",
        f"  created     {len(attempts)} custom jobs, and all of them gone again: "
        f"{', '.join(told['gone']) or 'none'}",
        f"  bundle      {told['bundle_bytes']:,} bytes, uploaded "
        + ("once" if told["bundle_uploads"] == 1 else f"{told['bundle_uploads']} times"),
    ]
    if second:
        lines.append(
            f"  second up   {second['bundle_bytes']} bytes of bundle; {second['name']} was torn "
            f"down ({second['phase']}, holds {second['held']})"
        )
    left = ", ".join(told["leftovers"])
    lines.append(f"  sweep       {'found ' + left if left else 'finds nothing'}")
    lines.append(
        f"  Google      not asked: every client was pointed at {told['endpoint']}, and for other "
        "hosts at a proxy that leads nowhere"
    )
    if not told["preempted"]:
        lines.append("  note: no machine was taken: the job was over before its first checkpoint "
                     "had arrived in the bucket")  # fmt: skip
    return lines


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does; a second one must not stop the cleaning up."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGINT, signal.SIGTERM)

    def leave(number: int, frame: object) -> None:
        for name in names:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(name, leave) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, before):
            signal.signal(name, handler)
