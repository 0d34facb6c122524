"""Bringing a run into being, and opening one again: everything before its driver starts."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import yaml

from launcher import changes, code, forecast, home
from launcher.artifacts import Artifacts, below, open_artifacts, parsed
from launcher.backends.base import Env, Phase
from launcher.bundle import Bundle
from launcher.claim import newest_checkpoint, recipe_of
from launcher.errors import BudgetSpent, UsageError
from launcher.fold import Fold, spent
from launcher.journal import Journal
from launcher.money import budget_text, limits, worth
from launcher.plan import (
    RunPlan,
    artifact_root,
    cloud_project,
    jobs,
    make,
    remainder,
    stage_configs,
)
from launcher.recipe import Loaded, load
from launcher.run import Run, StageState
from launcher.spec import Recipe
from launcher.wheels import resolved
from trainer.config import dotted, to_dict

#: stage id -> its run_meta.json
Metas = Mapping[str, Mapping[str, Any]]


def fingerprint(loaded: Loaded, bundle: Bundle, env: Env) -> str:
    """What makes two `up` the same: the resolved recipe, the trainer, the owner, and the project of
    what runs in a cloud."""
    clouds = projects(loaded.recipe, env)
    text = "\n".join((loaded.fingerprint, bundle.sha256, env.owner, *clouds))
    return hashlib.sha256(text.encode()).hexdigest()


def projects(recipe: Recipe, env: Env) -> list[str]:
    """The cloud projects of a recipe's stages, each once; empty text: none is named."""
    places = [stage.hardware for stage in recipe.stages]
    clouds = [cloud_project(asked, env) or "" for asked in places if asked.backend != "local"]
    return [*dict.fromkeys(clouds)]


def create(loaded: Loaded, bundle: Bundle, env: Env) -> dict[str, Any]:
    """Create the journal of a new run and return its identity. `run.json` comes last: a folder
    without it is no run, and nothing was started for it. A store that does not take the first
    record leaves nothing behind. Errors: `UsageError`, `Denied`, `Transient`, `Unwritable`."""
    recipe = loaded.recipe
    run_id = home.new_id(env.clock)
    name = home.run_name(recipe.name, run_id)
    root = artifact_root(recipe, run_id, name, env.home)
    place = home.folder(env.home, run_id)
    artifacts = open_artifacts(root, place, env.environ, env.clock)
    facts = {
        "id": run_id,
        "name": name,
        "fingerprint": fingerprint(loaded, bundle, env),
        "owner": env.owner,
        "root": root,
        "created": env.clock.now(),
    }
    journal = Journal(place, artifacts, env.clock)
    journal.name = name
    journal.append(
        "created",
        **facts,
        recipe=loaded.canonical,
        stages=_stages(recipe, root),
        jobs=_jobs(recipe, name),
        bundle={"path": str(bundle.path), "sha256": bundle.sha256, "bytes": bundle.bytes},
        commit=commit_of(loaded.path),
        projects=projects(recipe, env),
    )
    artifacts.write("recipe.yaml", as_yaml(recipe))
    identity = {"v": 1, **facts, "recipe": recipe.name}
    home.write(place / "run.json", json.dumps(identity) + "\n")
    return identity


def commit_of(path: Path) -> Optional[str]:
    """The git commit of the tree that holds the recipe, when there is one."""
    try:
        asked = subprocess.run(
            ["git", "-C", str(path.absolute().parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip() or None if asked.returncode == 0 else None


def reopen(fold: Fold, journal: Journal, place: Path, overrides: Iterable[str], env: Env) -> None:
    """Open a run that is over: its recipe with `overrides`, no request to stop, a `resumed`
    record. Errors: `RecipeErrors`, `UsageError`, `BudgetSpent`; the run is then as it was."""
    given = tuple(overrides)
    recipe = _revised(fold, place, given, env)
    _refuse_spent(recipe, fold.run, env.clock.now())
    artifacts = journal.artifacts
    # A change that no driver took up in time was of the run as it was before.
    left = changes.last(place)
    told = {"overrides": list(given), "recipe": to_dict(recipe), "taken": left}
    fold.apply(journal.append("resumed", **told))
    # Only now: where another machine was first, the marker asks the run that goes on there.
    taken = len(artifacts.names("control/stop-"))
    artifacts.move("control/stop.json", f"control/stop-{taken + 1}.json")
    (place / "summary.json").unlink(missing_ok=True)
    artifacts.remove("summary.json")
    artifacts.write("recipe.yaml", as_yaml(recipe))


def what_resuming_creates(fold: Fold, place: Path, overrides: Iterable[str], env: Env) -> RunPlan:
    """The plan of a run that is over, should it go on with `overrides`, with the forecast of what
    is left to do. Errors: as `reopen`."""
    recipe, now = _revised(fold, place, tuple(overrides), env), env.clock.now()
    _refuse_spent(recipe, fold.run, now)
    raw, run = fold.bundle, fold.run
    bundle = Bundle(Path(raw["path"]), raw["sha256"], raw["bytes"])
    planned = make(recipe, env, bundle, run.id, fold.created.get("commit"))
    planned = remainder(planned, recipe.budget, run, now)
    return forecast.added(planned, recipe, env.home, _reached(fold, place, recipe, planned, env))


def _reached(
    fold: Fold, place: Path, recipe: Recipe, planned: RunPlan, env: Env
) -> forecast.Reached:
    """How far the stages of the jobs that are left to do got."""
    run = fold.run
    artifacts = open_artifacts(run.root, place, env.environ, env.clock)
    left = {name for job in planned.jobs for name in job.stages}
    steps, completed = {}, set()
    for stage in (stage for stage in run.stages if stage.id in left):
        if _meta(run, stage, artifacts).get("completed") is True:
            completed.add(stage.id)
        else:
            steps[stage.id] = newest_checkpoint(artifacts, run.root, stage.folder)
    usd = recipe.budget.usd
    if usd is not None:
        usd = round(max(0.0, usd - (spent(run, env.clock.now()) or 0.0)), 2)
    hours = None if planned.hours is None else round(planned.hours, 2)
    return forecast.Reached(steps, completed, replace(recipe.budget, hours=hours, usd=usd))


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe in the words of a recipe file: loading it gives `recipe` again."""
    whole = _given(to_dict(recipe))
    stages = whole.pop("stages")
    top = {key: whole.pop(key) for key in ("launch", "name", "description") if key in whole}
    if recipe.pipeline:
        body: dict[str, Any] = {"pipeline": [_entry(stage) for stage in stages]}
    else:
        body = {k: v for k, v in _entry(stages[0]).items() if k not in ("id", "needs")}
    return yaml.dump(
        {**top, **body, **whole}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 reads as a number although YAML 1.1 (this dumper) does not: 1e-4."""


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if text[:1] in "0123456789.+-" else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _string)


def _stages(recipe: Recipe, root: str) -> list[dict[str, Any]]:
    return [
        {"id": config.id, "stage": config.stage, "job": index, "folder": config.output}
        for index, stages in enumerate(jobs(recipe))
        for config in stage_configs(recipe, stages, root)
    ]


def _jobs(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "name": f"{name}-j{index}",
            "backend": stages[0].hardware.backend,
            "stages": [stage.id for stage in stages],
        }
        for index, stages in enumerate(jobs(recipe))
    ]


def _meta(run: Run, stage: StageState, artifacts: Artifacts) -> dict[str, Any]:
    at = below(run.root, stage.folder)
    return parsed(artifacts.read(f"{at}/run_meta.json" if at else "run_meta.json"))


def _revised(fold: Fold, place: Path, overrides: tuple[str, ...], env: Env) -> Recipe:
    """The recipe in force, without a `train.until` that was reached, with `overrides`."""
    raw = json.loads(json.dumps(fold.recipe))
    artifacts = open_artifacts(fold.run.root, place, env.environ, env.clock)
    metas = {stage.id: _meta(fold.run, stage, artifacts) for stage in fold.run.stages}
    for stage in raw["stages"]:
        meta = metas[stage["id"]]
        train = stage.get("train") or {}
        if train.get("until") is not None and meta.get("global_step", 0) >= train["until"]:
            train["until"] = None
    before = recipe_of(raw, f"run {fold.run.name}")
    if not overrides:
        return before
    draft = place / "resume.yaml"
    home.write(draft, as_yaml(before))
    try:
        loaded = resolved(load(draft, overrides, None, env.environ))
        after = code.resolved(loaded, env.home).recipe
    finally:
        draft.unlink(missing_ok=True)
    fixed = {"name": (before.name, after.name),
             "artifacts": (before.artifacts, after.artifacts),
             "code": (before.code, after.code),
             "stages": (_stages(before, ""), _stages(after, "")),
             "hardware.backend": (_jobs(before, ""), _jobs(after, ""))}  # fmt: skip
    for what, (old, new) in fixed.items():
        if old != new:
            raise UsageError(
                f"{dotted((what,))} of a run cannot change", "`launch up` starts another run"
            )
    _refuse_idle(before, after, fold, metas)
    return after


def _refuse_spent(recipe: Recipe, run: Run, now: float) -> None:
    """Raise `BudgetSpent` where a job is left to do and its next attempt would not be worth it."""
    undone = (j for j in run.jobs if not j.attempts or j.attempts[-1].phase is not Phase.SUCCEEDED)
    job = next(undone, None)
    if job is None:
        return
    newest = [attempt for one in run.jobs for attempt in one.attempts][-1:]
    price = newest[0].usd_per_hour if newest else None
    first = next(iter(limits(run, recipe.budget, now, price)), None)
    if first is not None and first.left <= worth(first.left, newest[0] if newest else None, now):
        raise BudgetSpent(
            f"{run.name}: {budget_text(recipe.budget)}: {first} are used, and what is left is too "
            "little for another attempt",
            f"`launch resume {run.name} --set {first.key}=MORE`, all attempts together",
        )


def _refuse_idle(before: Recipe, after: Recipe, fold: Fold, metas: Metas) -> None:
    """Raise `UsageError` for a change of a stage that will not run again. What still counts of a
    completed stage: its hardware while its job is not done, its gate until it has passed."""
    states = {state.id: state for state in fold.run.stages}
    done = {i for i, meta in metas.items() if meta.get("completed") is True}
    busy = {state.job for i, state in states.items() if i not in done}
    for old, new in zip(before.stages, after.stages, strict=True):
        state = states[new.id]
        used = replace(
            old,
            hardware=new.hardware if state.job in busy else old.hardware,
            gate=old.gate if state.gate == "passed" else new.gate,
        )
        if new.id in done and used != new:
            raise UsageError(
                f"stage '{new.id}' is completed: a change of it would have no effect",
                "leave it out of --set, or start another run with `launch up`",
            )


def _entry(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is empty; but empty `needs` are not the default ones."""
    return {key: value for key, value in stage.items() if value not in ({}, []) or key == "needs"}


def _given(value: Any) -> Any:
    """Without what is None; `$` doubled where a recipe would read a variable."""
    if isinstance(value, Mapping):
        return {key: _given(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_given(item) for item in value]
    if isinstance(value, str):
        return value.replace("${", "$${").replace("$${stage:", "${stage:")
    return value
