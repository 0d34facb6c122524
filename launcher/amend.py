"""The run that a recipe is compared with, and what of the difference a live one is to take up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from launcher import backends, changes, home, money, records, view
from launcher.artifacts import here, open_artifacts
from launcher.backends.base import Env, Intent, Phase
from launcher.bundle import Bundle
from launcher.claim import recipe_of
from launcher.difference import Change, Difference, compare
from launcher.errors import JournalDamaged, LaunchError
from launcher.fold import Fold
from launcher.journal import Journal, held_elsewhere
from launcher.plan import affordable, jobs, make
from launcher.recipe import Loaded
from launcher.run import Run
from launcher.spec import Budget, Recipe
from launcher.start import commit_of, fingerprint, projects
from trainer.config import to_dict


def differ(env: Env, run: Run, loaded: Loaded, bundle: Bundle, requests: bool = True) -> Difference:
    """How `loaded` (its wheels resolved) and the trainer `bundle` differ from a run. `requests`:
    those of both too, which asks the backends for their offers. Errors: those of the journal."""
    return _differ(env, run, _fold(env, run), loaded, bundle, requests)


def find(env: Env, loaded: Loaded, bundle: Bundle, requests: bool = True) -> Optional[Difference]:
    """`differ` from the run that `up` attaches to, or would start another one beside: that of the
    same fingerprint, else the newest of this recipe's name, owner and cloud project which goes on
    and was not asked to stop; None: there is none."""
    for run_id in view.live_like(env, fingerprint(loaded, bundle, env)):
        run = view.look(env, home.find(env.home, run_id))
        return replace(differ(env, run, loaded, bundle, requests), same=True)
    wanted = projects(loaded.recipe, env)
    for run in view.live_named(env, loaded.recipe.name):
        fold = _fold(env, run)
        existing = fold.created.get("projects")
        if existing is None:  # a version that did not record them
            existing = projects(recipe_of(fold.recipe, f"run {run.name}"), env)
        if existing == wanted:
            return _differ(env, run, fold, loaded, bundle, requests)
    return None


def leave(env: Env, difference: Difference, recipe: Mapping[str, Any]) -> None:
    """Ask the driver of a live run for what differs in place. Errors: `HeldElsewhere` for a run
    that another machine drives, `Unwritable`."""
    run = difference.run
    if run.driver is not None and run.driver.alive is None:
        raise held_elsewhere(vars(run.driver), run.name)
    blocks = {name: recipe[name] for name in difference.blocks()}
    place, taken = home.folder(env.home, run.id), _fold(env, run).taken
    changes.leave(place, env.clock.now(), env.owner, blocks, taken)


def _differ(
    env: Env, run: Run, fold: Fold, loaded: Loaded, bundle: Bundle, requests: bool
) -> Difference:
    existing = recipe_of(fold.recipe, f"run {run.name}")
    found, unchanged = compare(
        fold, loaded.canonical, loaded.recipe, existing, bundle.sha256, _fresh(run)
    )
    if run.ended is None and any(change.path.startswith("budget.") for change in found):
        found = tuple(_judged(env, run, existing, loaded.recipe.budget, found))
    if not requests:
        return Difference(run, found, unchanged)
    own = Bundle(Path(fold.bundle["path"]), fold.bundle["sha256"], fold.bundle["bytes"])
    return Difference(
        run, found, unchanged,
        _requests(existing, env, own, run, fold.created.get("commit")),
        _requests(loaded.recipe, env, bundle, run, commit_of(loaded.path)),
        [*_sent(fold)],
    )  # fmt: skip


def _judged(
    env: Env, run: Run, existing: Recipe, budget: Budget, found: tuple[Change, ...]
) -> Iterator[Change]:
    """The changes, those of the budget by what this live run has spent and by its offers."""
    begun = [(job, attempt) for job in run.jobs for attempt in job.attempts][-1:]
    works = bool(begun) and begun[0][1].ended is None
    timeout = works and backends.load(begun[0][0].backend).can.timeout
    ends = money.too_little(run, budget, env.clock.now(), timeout)
    for change in found:
        if change.path == "budget.usd_per_hour" and (cheapest := _dear(env, run, existing, budget)):
            why = f"the cheapest offer costs {cheapest:.2f} USD an hour"
            if works:
                why += ", so the next attempt would find no place; the one that runs goes on"
            yield replace(change, effect=change.effect if works else "stop", why=why)
        elif change.path in ends:
            yield replace(change, effect="stop", why=ends[change.path])
        else:
            yield change


def _dear(env: Env, run: Run, existing: Recipe, budget: Budget) -> Optional[float]:
    """USD an hour of the cheapest offer of the first job that is not done, where the budget allows
    none of them; None: it allows one, or there is none, or nobody can tell."""
    undone = (j for j in run.jobs if not j.attempts or j.attempts[-1].phase is not Phase.SUCCEEDED)
    job = next(undone, None)
    if job is None:
        return None
    asked = jobs(existing)[job.index][0].hardware
    try:
        offers = list(backends.load(job.backend).offers(asked, env))
    except LaunchError:
        return None
    if not offers or affordable(offers, budget):
        return None
    return min(offer.usd_per_hour or 0.0 for offer in offers)


def _fold(env: Env, run: Run) -> Fold:
    """The journal of a run that was looked at just now. Its recipe has the changes too that wait
    for its driver: the next one replaces whole blocks, and would take them back unseen."""
    place = home.folder(env.home, run.id)
    journal = Journal(place, open_artifacts(run.root, place, env.environ, env.clock), env.clock)
    journal.name = run.name
    fold = Fold(journal.read(known=True))
    if fold.run.ended is None:
        fold.recipe = _awaited(fold, place)
    return fold


def _awaited(fold: Fold, place: Path) -> dict[str, Any]:
    """The recipe as it will be when its driver has looked for changes."""
    recipe, number = fold.recipe, fold.taken
    while (left := changes.waiting(place, number)) is not None:
        number, blocks = left
        with suppress(JournalDamaged):  # of one that makes no recipe, as the driver does
            recipe = to_dict(recipe_of({**recipe, **blocks}, f"change {number}"))
    return recipe


def _fresh(run: Run) -> set[str]:
    """Stages without a checkpoint, and not about to write one."""
    fresh = set()
    for stage in run.stages:
        begun = stage.phase is not Phase.PLANNED and run.ended is None
        if not begun and not records.has_checkpoint(here(run, stage.folder)):
            fresh.add(stage.id)
    return fresh


def _requests(
    recipe: Recipe, env: Env, bundle: Bundle, run: Run, commit: Optional[str]
) -> dict[str, tuple[Intent, ...]]:
    """The requests of a recipe as if it were this run; {} where nobody can tell."""
    try:
        planned = make(recipe, env, bundle, run.id, commit)
    except LaunchError:
        return {}
    return {job.name: job.intents for job in planned.jobs}


def _sent(fold: Fold) -> Iterator[Mapping[str, Any]]:
    for job in fold.run.jobs:
        if job.attempts:
            yield from fold.intents.get((job.index, job.attempts[-1].number), ())
