"""Commands that start, steer and end runs: up, attach, resume, stop, teardown, drive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from launcher import api, console, shipped
from launcher.backends.base import Phase
from launcher.clock import seconds
from launcher.commands.recipes import called
from launcher.errors import Exit, JournalDamaged, Signal, UsageError
from launcher.logs import NoDriver

if TYPE_CHECKING:
    from launcher.difference import Difference
    from launcher.plan import RunPlan
    from launcher.run import Run


def up(
    recipe: str,
    overrides: Sequence[str],
    on: Optional[str],
    *,
    detach: bool,
    yes: bool,
    new: bool,
    as_json: bool,
) -> int:
    """Plan, ask when it costs money, start or attach, follow."""
    from launcher.plan import refuse

    ready = api.Prepared(shipped.find(recipe), overrides, on)
    planned = ready.plan
    differs = None if new else api.difference(ready)
    if differs is not None and differs.stops:
        raise differs.refusal()
    if differs is not None and differs.in_place and differs.blocks():
        return _change(differs, ready, called(recipe, overrides, on), detach, yes, as_json)
    refuse(planned)
    misfits = _misfits(planned)
    question = "Start it?"
    if differs is not None and not differs.in_place and not differs.same:
        for line in differs.lines(called(recipe, overrides, on)):
            console.notice(line)
        console.notice(f"{differs.run.name} goes on: this starts a second run beside it")
        question = f"Start it beside {differs.run.name}, which goes on?"
    if not _agreed(planned, f"{misfits}{question}", yes=yes, as_json=as_json):
        return Exit.OK
    if misfits and yes:
        console.notice(f"warning: {misfits.strip()} It is started all the same")
    started = api.env().clock.now()
    in_cloud = any(job.backend != "local" for job in planned.jobs)
    try:
        run = api.up(ready, new=new)
    except Signal as signal:
        if in_cloud:
            signal.hint = "\n".join(filter(None, (signal.hint, _see_doctor(recipe))))
        raise
    if run.created < started:
        console.notice(
            f"{run.name} is live already, since {console.duration(started - run.created)}; "
            "attached to it (--new starts another)"
        )
    else:
        console.notice(f"started {run.name}")
    code = _go_on(run, started, detach=detach, as_json=as_json)
    if in_cloud and code in (Exit.ACCESS, Exit.CAPACITY):
        console.notice(_see_doctor(recipe))
    return code


def _see_doctor(recipe: str) -> str:
    return f"`launch doctor {recipe}` looks at everything that this recipe needs"


def _change(
    differs: Difference,
    ready: api.Prepared,
    command: str,
    detach: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Change a live run in place; where it costs money, after a question. Then follow it."""
    name = differs.run.name
    for line in differs.lines(command):
        console.notice(line)
    if not yes and ready.plan.usd_per_hour != 0:
        refusal = f"{name} costs money, and there is no terminal to ask on"
        if not console.confirm(f"Change {name}?", refusal):
            console.notice("nothing was changed")
            return Exit.OK
    now = api.env().clock.now()
    run = api.up(ready)
    console.notice(f"{run.name}: its driver takes up {', '.join(differs.blocks())}; attached to it")
    return _go_on(run, now, detach=detach, as_json=as_json)


def dry_run(
    recipe: str, overrides: Sequence[str], on: Optional[str], *, detach: bool, as_json: bool
) -> int:
    if detach or as_json:
        option = "--detach" if detach else "--json"
        raise UsageError(f"{option} does not go with --dry-run", "a dry run is over in seconds")
    from launcher import dry_run as trial

    return trial.dry_run(shipped.find(recipe), overrides, on)


def attach(run: str, *, take_over: bool, as_json: bool) -> int:
    now = api.env().clock.now()
    before = api.status(run).driver if take_over else None
    attached = api.attach(run, take_over=take_over)
    if take_over and attached.ended is None:
        whom = f" from {before.host}, process {before.pid}" if before is not None else ""
        console.notice(f"{attached.name}: taken over{whom}; it is driven from here now")
    _say_who_drives(attached)
    return _go_on(attached, now, detach=False, as_json=as_json)


def resume(run: str, overrides: Sequence[str], *, detach: bool, yes: bool, as_json: bool) -> int:
    """Go on; where that costs money, as `up` does: show what will be created, and ask."""
    from launcher.plan import refuse

    now = api.env().clock.now()
    planned = api.resume_plan(run, overrides)
    if planned is not None:
        refuse(planned)
        misfits = _misfits(planned)
        costs, question = planned.usd_per_hour != 0, f"{misfits}Go on with it?"
        if costs and not _agreed(planned, question, yes=yes, as_json=as_json):
            return Exit.OK
        if misfits and (yes or not costs):
            console.notice(f"warning: {misfits.strip()} It goes on all the same")
    resumed = api.resume(run, overrides)
    _say_who_drives(resumed)
    return _go_on(resumed, now, detach=detach, as_json=as_json)


def _say_who_drives(run: Run) -> None:
    """Of a run that another machine drives: it is followed from here, not driven."""
    if run.driver is not None and run.driver.alive is None:
        for warning in run.warnings:
            console.notice(f"{run.name}: {warning}")


def drive(run: str) -> int:
    from launcher import driver

    return driver.drive(run)


def stop(run: str, *, as_json: bool) -> int:
    """Ask, then wait until the run is over: what comes next is often `resume` or `pull`."""
    asked = api.stop(run)
    if asked.ended is None:
        console.notice(f"asked {asked.name} to stop; it saves first (Ctrl-C: do not wait for it)")
        try:
            asked = api.wait(asked)
        except KeyboardInterrupt:
            console.notice(f"it goes on stopping; `launch status {asked.name}` says how it is")
            return Exit.OK
    if asked.ended is None:
        raise NoDriver(
            f"{asked.name} lost its driver while stopping; the job itself has been asked to end",
            f"`launch resume {asked.name}` drives on, `launch teardown {asked.name}` ends it now",
        )
    if as_json:
        console.document(asked.to_json())
    else:
        console.say(f"{asked.name}: {asked.phase.value}" + (f", {asked.why}" if asked.why else ""))
    return Exit.OK


def teardown(
    run: Optional[str], *, everything: bool, timeout: Optional[str], yes: bool, as_json: bool
) -> int:
    if (run is None) != everything:
        raise UsageError(
            "teardown takes a RUN, or --all", "`launch status` lists the runs; --all ends them all"
        )
    bound = None if timeout is None else _seconds("--timeout", timeout)
    if not yes and not _certain(run):
        console.notice("nothing was torn down")
        return Exit.OK
    gone = api.teardown_all(bound) if run is None else [api.teardown(run, bound)]
    if as_json:
        console.document({"runs": [one.to_json() for one in gone]})
        return Exit.OK
    for one in gone:
        if one.live:
            console.say(f"{one.name}: {one.phase.value}; {'; '.join(one.warnings)}")
            continue
        console.say(f"{one.name}: {one.phase.value}, nothing is left of it that could bill")
        if one.phase is Phase.LOST:
            for warning in one.warnings:
                console.notice(f"{one.name}: {one.why}: {warning}")
    if not gone:
        console.say("nothing to tear down")
    return Exit.OK


def _seconds(option: str, text: str) -> float:
    """A duration of the command line in seconds. Errors: `UsageError`."""
    try:
        return seconds(text)
    except ValueError:
        raise UsageError(f"{option} '{text}': not a duration", "give 90s, 10m, 2h") from None


def _agreed(planned: RunPlan, question: str, *, yes: bool, as_json: bool) -> bool:
    """Show the plan; where it costs money, ask. An unknown price is not a price of nothing."""
    if not as_json:
        for line in planned.lines():
            if not line.startswith("artifacts:"):  # a new run's own name is not known yet
                console.notice(line)
    if planned.usd_per_hour == 0 or yes:
        return True
    refusal = f"{planned.recipe} costs money, and there is no terminal to ask on"
    if console.confirm(question, refusal):
        return True
    console.notice("nothing was started")
    return False


def _misfits(planned: RunPlan) -> str:
    """The stages that do not fit, by their forecast: what the question begins with."""
    forecasts = [forecast for job in planned.jobs for forecast in job.forecasts]
    names = [forecast.stage for forecast in forecasts if forecast.fits is False]
    verb = "does" if len(names) == 1 else "do"
    return f"{', '.join(names)} {verb} not fit, by the forecast. " if names else ""


def _certain(run: Optional[str]) -> bool:
    """`--all` always asks; of one run, only while it is still going."""
    if run is None:
        refusal = "teardown --all ends every run of yours, and there is no terminal to ask on"
        return console.confirm("End all of your runs now?", refusal)
    try:
        found = api.status(run)
    except JournalDamaged as damage:
        console.notice(str(damage))
        refusal = f"whether {run} goes on cannot be read, and there is no terminal to ask on"
        return console.confirm(f"Delete what carries the label of {run} now?", refusal)
    if found.ended is not None:
        return True
    refusal = f"{found.name} is {found.phase.value}, and there is no terminal to ask on"
    return console.confirm(f"End {found.name} ({found.phase.value}) now, without saving?", refusal)


def _go_on(run: Run, since: float, *, detach: bool, as_json: bool) -> int:
    from launcher.commands.follow import follow

    if not detach:
        return follow(run, api.env(), since=since, as_json=as_json)
    if as_json:
        console.document(run.to_json())
        return Exit.OK
    console.say(run.name)
    console.notice(f"`launch attach {run.name}` follows it, `launch stop {run.name}` stops it")
    return Exit.OK
