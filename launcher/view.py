"""Runs as `status` shows them: summaries of those that are over, folded journals of the others."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from launcher import home, money, records
from launcher.artifacts import Artifacts, here, is_remote, open_artifacts, parsed
from launcher.backends.base import Env, Held, Phase
from launcher.errors import Denied, HeldElsewhere, LaunchError, Signal, UsageError
from launcher.fold import run_of, spent, unpriced
from launcher.journal import Journal, fold, newest_claim, ours, refuse_swapped
from launcher.run import Driver, JobState, Run

#: How a warning begins that tells of a store which did not answer.
DEAF = "as last known"
REACHES = "`launch teardown --all` finds and deletes what it holds"
#: How many stores are asked at the same time.
_AT_ONCE = 8
#: What a restarted boot leaves: job, attempt, which restart.
_RESTART = re.compile(r"(\d+)-(\d+)r(\d+)\.json")
_STARTS = re.compile(r"\d+-\d+(?:r(\d+))?\.json")
_RECORD = re.compile(r"\d{8}\.json")


def listed(env: Env, limit: Optional[int]) -> list[Run]:
    """Runs, newest first: all live ones and the `limit` newest others (None: all). Of a finished
    run that is not shown, only the presence of its summary is looked at."""
    found: list[Run] = []
    finished = 0
    ids = home.ids(env.home)
    over = {i for i in ids if (home.folder(env.home, i) / "summary.json").exists()}
    asked = _side_by_side(env, [run_id for run_id in ids if run_id not in over])
    for run_id in ids:
        if run_id in over and limit is not None and finished >= limit:
            continue
        run = asked[run_id] if run_id in asked else _one(env, run_id)
        if run is None or (not run.live and limit is not None and finished >= limit):
            continue
        finished += not run.live
        found.append(run)
    return found


def look(env: Env, facts: dict[str, Any], believe: bool = False) -> Run:
    """One run. Of one in a store: what one list call brings, or, when the store does not answer,
    what is known here, with a warning that begins with `DEAF`. Of one that ended here, too, the
    store is asked whether another machine has gone on with it, unless `believe`. Errors:
    `JournalDamaged`, `UsageError`, `Denied`."""
    place = home.folder(env.home, facts["id"])
    artifacts = open_artifacts(facts["root"], place, env.environ, env.clock)
    summary = _summary(place / "summary.json")
    newer = False
    if summary is not None and not believe:
        try:
            newer = artifacts.remote and _newer(place, artifacts)
        except UsageError:
            pass  # its bucket is gone: nobody goes on there
        except LaunchError as error:
            summary.warnings.append(f"{DEAF}: {error}")
    if summary is not None and not newer:
        summary.folder = str(artifacts.folder)
        return summary
    if newer:
        (place / "summary.json").unlink(missing_ok=True)
    journal = Journal(place, artifacts, env.clock)
    journal.name = facts["name"]
    deaf: Optional[LaunchError] = None
    try:
        artifacts.refresh(anew=newer)
    except LaunchError as error:
        deaf = error
    written = journal.read(known=True)
    if deaf is not None and not written:
        raise deaf
    run = fold(written)
    refuse_swapped(run, facts)
    run.folder = str(artifacts.folder)
    run.warnings += journal.warnings
    if deaf is not None:
        run.warnings.append(f"{DEAF}: {deaf}")
    if not run.live:
        if home.holder(place) is None and deaf is None:
            # It was lost, its driver died just before, or another machine has it.
            shared = artifacts.remote and "summary.json" in artifacts.known("summary.json")
            write_summary(place, run, artifacts, share=not shared)
        return run
    run.driver = _driver(run, place, written)
    run.progress = records.run_progress(run)
    note_restarts(run)
    if run.ended is None:
        now = env.clock.now()
        if run.driver is None or run.driver.alive is False:
            note_end(run, now)
        run.spent_usd, run.unpriced = spent(run, now), unpriced(run, now)
        run.money = money.outlook(run, now)
    run.warnings += _warnings(env, run, place, written[-1]["time"])
    return run


def write_summary(place: Path, run: Run, artifacts: Artifacts, share: bool = True) -> None:
    """`summary.json` in both places once nothing can change, so that `status` stays instant; none
    while something still may. One that a store, or a full disk, does not take is left out there:
    the journal says it all. Without `share` it is written here only."""
    run.folder = str(artifacts.folder)
    with suppress(Signal, home.Unwritable):
        artifacts.refresh(anew=share)
    run.progress = records.run_progress(run)
    note_restarts(run)
    text = json.dumps(run.to_json()) + "\n"
    with suppress(Signal, home.Unwritable):
        if run.live:
            artifacts.remove("summary.json")
        elif share:
            artifacts.write("summary.json", text)
    if run.live:
        (place / "summary.json").unlink(missing_ok=True)
        return
    with suppress(home.Unwritable):
        home.write(place / "summary.json", text)


def note_restarts(run: Run) -> None:
    """How often the service itself has started a boot again, by what each boot has left."""
    folder = here(run) / "attempts"
    found = [match for file in folder.glob("*r*.json") if (match := _RESTART.fullmatch(file.name))]
    for job in run.jobs:
        for attempt in job.attempts:
            at = (job.index, attempt.number)
            own = (int(m[3]) for m in found if (int(m[1]), int(m[2])) == at)
            attempt.restarts = max(own, default=0)


def note_end(run: Run, now: float) -> None:
    """Of a job that ended while nobody drove: when, by what its boot has left. Whoever drives next
    says what it means; until then it is not billed, and a warning tells why it ended."""
    job = next((job for job in reversed(run.jobs) if job.attempts), None)
    attempt = job.attempts[-1] if job is not None else None
    if job is None or attempt is None or attempt.ended is not None:
        return
    files = (here(run) / "attempts").glob(f"{job.index:02d}-{attempt.number:04d}*.json")
    starts = {int(m[1] or 0): file for file in files if (m := _STARTS.fullmatch(file.name))}
    noted = parsed(starts[max(starts)].read_bytes()) if starts else {}
    ended = noted.get("ended")
    if not isinstance(ended, (int, float)):
        return
    attempt.ended = ended
    run.warnings.append(
        f"its job ended at {_clock(ended, now)}: {noted.get('why')} "
        f"(exit code {noted.get('exit_code')})"
    )


def live_like(env: Env, fingerprint: str) -> Iterator[str]:
    """Ids of our runs of that fingerprint which go on, newest first. One that was asked to stop
    does not. Errors: those of a store that cannot be asked about the marker; after all others,
    `HeldElsewhere` for a run whose journal cannot be read, or `Denied` where access is missing:
    nobody knows whether it goes on."""
    for run in _going_on(env, lambda facts: facts.get("fingerprint") == fingerprint):
        yield run.id


def live_named(env: Env, recipe: str) -> Iterator[Run]:
    """`live_like` by the name of the recipe: the runs. One that ended here is believed to be over:
    there may be hundreds of that name, each in a store that would have to be asked."""

    def of_recipe(facts: dict[str, Any]) -> bool:
        told = facts.get("recipe")
        return (told.get("name") if isinstance(told, dict) else told) == recipe

    yield from _going_on(env, of_recipe, believe=True)


def _going_on(
    env: Env, wanted: Callable[[dict[str, Any]], bool], believe: bool = False
) -> Iterator[Run]:
    unread: list[tuple[str, LaunchError]] = []
    for run_id in home.ids(env.home):
        facts = home.identity(env.home, run_id) or {}
        if facts.get("owner") != env.owner or not wanted(facts):
            continue
        try:
            run = look(env, facts, believe)  # another machine may have resumed it
        except LaunchError as error:
            unread.append((facts["name"], error))
            continue
        if run.ended is not None:
            continue
        place = home.folder(env.home, run_id)
        artifacts = open_artifacts(run.root, place, env.environ, env.clock)
        if not artifacts.exists("control/stop.json"):
            yield run
    for name, why in () if believe else unread:
        kind = Denied if isinstance(why, Signal) else HeldElsewhere
        raise kind(
            f"{name}, a run of the same recipe, may be live, and that cannot be read: {why}",
            f"`launch up --new` starts another beside it; {why.hint or REACHES}",
        ) from why


def _side_by_side(env: Env, ids: list[str]) -> dict[str, Optional[Run]]:
    """Those of the runs whose artifacts lie in a store: all are asked at the same time."""
    remote = [i for i in ids if is_remote((home.identity(env.home, i) or {}).get("root", ""))]
    if not remote:
        return {}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(_AT_ONCE, len(remote))) as pool:
        return dict(zip(remote, pool.map(lambda run_id: _one(env, run_id), remote)))


def _one(env: Env, run_id: str) -> Optional[Run]:
    """The run, also when its journal cannot be read: a listing shows all the others."""
    facts = home.identity(env.home, run_id)
    if facts is None:
        return None
    try:
        return look(env, facts, believe=True)
    except LaunchError as error:
        return unread(env, facts, error)


def unread(env: Env, facts: dict[str, Any], error: LaunchError) -> Run:
    """What is known of a run whose journal cannot be read."""
    recipe = facts["recipe"]["name"] if isinstance(facts["recipe"], dict) else facts["recipe"]
    return Run(
        id=facts["id"],
        name=facts["name"],
        recipe=recipe,
        fingerprint=facts["fingerprint"],
        owner=facts["owner"],
        root=facts["root"],
        created=facts["created"],
        jobs=_jobs(env, facts),
        phase=Phase.LOST,
        why="its journal cannot be read",
        warnings=[str(error)],
    )


def _jobs(env: Env, facts: dict[str, Any]) -> list[JobState]:
    """The jobs of a run whose journal is damaged, as far as its first record tells: where to look
    for what it holds."""
    place = home.folder(env.home, facts["id"])
    try:
        artifacts = open_artifacts(facts["root"], place, env.environ, env.clock)
        begun = Journal(place, artifacts, env.clock).beginning()
    except LaunchError:
        return []
    return begun.jobs if begun is not None else []


def _newer(place: Path, artifacts: Artifacts) -> bool:
    """Whether the store has a record that is not known here: one list call, one try."""
    artifacts.patience = 0.0
    known = {file.name for at in (place, artifacts.folder) for file in (at / "journal").glob("*")}
    names = (name.rpartition("/")[2] for name in artifacts.names("journal/"))
    return any(_RECORD.fullmatch(name) and name not in known for name in names)


def _summary(file: Path) -> Optional[Run]:
    try:
        return run_of(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent, cut, or no summary at all: it is made again


def _driver(run: Run, place: Path, written: list[dict[str, Any]]) -> Optional[Driver]:
    """The newest claim, and whether it lives: this host's lock tells, unless it came from another
    $LAUNCH_HOME. A driver that has just started holds the lock before it has claimed."""
    who = home.holder(place)
    if who is not None:
        epoch = run.driver.epoch if run.driver is not None else 0
        return Driver(who["host"], who["pid"], who["since"], epoch, alive=True)
    if run.driver is None:
        return None
    claim = newest_claim(written)
    run.driver.alive = False if claim is not None and ours(place, claim) else None
    return run.driver


def _warnings(env: Env, run: Run, place: Path, last: float) -> Iterator[str]:
    if "uncapped" in run.money:
        yield run.money["uncapped"]
    if run.held is Held.LEAKED:
        names = ", ".join(
            ref.name for job in run.jobs for attempt in job.attempts for ref in attempt.holding
        )
        yield f"may still bill: {names}: `launch teardown {run.name}`"
    elif run.driver is None or run.driver.alive is False:
        log = place / "driver.log"
        since = _clock(max(last, log.stat().st_mtime if log.exists() else 0.0), env.clock.now())
        yield f"no driver since {since}: `launch resume {run.name}` drives on"
    elif run.driver.alive is None:
        yield (
            f"driven by {run.driver.host} since {_clock(run.driver.since, env.clock.now())}: "
            f"`launch attach {run.name} --take-over` drives it from here"
        )


def _clock(when: float, now: float) -> str:
    """Local time, with the date when it is not of the last day."""
    form = "%H:%M" if now - when < 86400 else "%Y-%m-%d %H:%M"
    return time.strftime(form, time.localtime(when))
