"""What this user's own runs say of speed: the finished runs under $LAUNCH_HOME."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from launcher import hardware, home, records, shapes
from launcher.artifacts import is_remote
from launcher.shapes import Shapes
from launcher.spec import Recipe, Stage
from trainer.config import build

#: Runs that are looked at, newest first, and steps that a run must have logged to count.
_RUNS, _STEPS = 50, 3


@dataclass(frozen=True)
class Measured:
    """Rows a second of all workers, the run that had them, and what of its steps they are."""

    rows_per_second: float
    run: str
    how: str = "median"


def like(stage: Stage, models: Shapes, launch_home: Path) -> Optional[Measured]:
    """The median speed of the newest finished run under `launch_home` whose stage did the same work
    on the same hardware; None: there is none. Its first logged step, which warms up, is left out.
    Where the answers of `grpo` serve several steps, only some of these draw any: then it is the
    speed of all of them together."""
    if stage.data.curriculum:  # its rows a second are of rows of several lengths
        return None
    for run_id in home.ids(launch_home)[:_RUNS]:
        place = home.folder(launch_home, run_id)
        if not (place / "summary.json").exists():
            continue
        for facts, recipe, journal in _recorded(launch_home, run_id, stage.stage):
            for other in recipe.stages:
                if _same(stage, models, other, recipe) and not _changed(journal):
                    rows = _speeds(place, str(facts["root"]), other.id if recipe.pipeline else "")
                    if len(rows) < _STEPS:
                        continue
                    name = str(facts["name"])
                    if stage.grpo is not None and stage.grpo.iterations > 1:
                        return Measured(statistics.harmonic_mean(rows[1:]), name, "mean")
                    return Measured(statistics.median(rows[1:]), name)
    return None


def _recorded(
    launch_home: Path, run_id: str, word: str
) -> Iterator[tuple[dict[str, Any], Recipe, Path]]:
    """The identity, the recipe and the journal of a run, where this version can read them and
    `word` occurs."""
    facts = home.identity(launch_home, run_id)
    if facts is None:
        return
    place, root = home.folder(launch_home, run_id), str(facts["root"])
    folders = [place / "journal"]
    if not is_remote(root):
        folders.append(home.local_root(root) / "journal")
    for folder in folders:
        try:
            text = (folder / "00000001.json").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        recipe = _recipe(text) if f'"{word}"' in text else None
        if recipe is not None:
            yield facts, recipe, folder
            return


def _changed(journal: Path) -> bool:
    """Whether a run was resumed with another recipe: then its steps are of both."""
    for file in journal.glob("*.json"):
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("kind") == "resumed" and record.get("overrides"):
            return True
    return False


@functools.lru_cache(maxsize=_RUNS)  # `offers` asks about the same runs for every accelerator
def _recipe(text: str) -> Optional[Recipe]:
    """The recipe in a run's first record; None: another version wrote it, or it is damaged."""
    problems: list[Any] = []
    try:
        recipe: Recipe = build(Recipe, json.loads(text).get("recipe"), (), problems)
    except ValueError:
        return None
    return None if problems else recipe


def _same(stage: Stage, models: Shapes, other: Stage, recipe: Recipe) -> bool:
    if _work(stage) != _work(other):
        return False
    theirs = shapes.of_stage(other, recipe.stages, Path.cwd())
    return _plain(models) == _plain(theirs) and bool(models)


def _work(stage: Stage) -> tuple[Any, ...]:
    """What decides the speed beside the shapes of the models."""
    asked, model, train, kd = stage.hardware, stage.model, stage.train, stage.kd
    return (
        stage.stage, str(hardware.parse(asked.accelerator)), asked.nodes, asked.backend == "local",
        # Rows that are not packed are as long as the texts are.
        stage.data.sequence_length, stage.data.curriculum, stage.data.packing or stage.data.train,
        model and (model.precision, model.attention, model.float8, model.gradient_checkpointing,
                   model.compile,
                   model.adapter, model.freeze),
        kd and (kd.mode, kd.top_k),
        stage.sdce and (stage.sdce.loss, stage.sdce.k), stage.grpo,
        stage.preference and stage.preference.reference,
        train and (train.micro_batch, train.accumulate, train.global_batch, train.parallel),
        stage.targets and (stage.targets.top_k, stage.targets.sampler, stage.targets.micro_batch),
    )  # fmt: skip


def _plain(models: Shapes) -> dict[str, shapes.Shape]:
    return {part: replace(shape, source="") for part, shape in models.items()}


def _speeds(place: Path, root: str, stage: str) -> list[float]:
    """Rows a second of the logged steps, in their order."""
    folder = place / "copy" if is_remote(root) else home.local_root(root)
    lines = records.metrics(folder / stage)
    found = (line.get("examples_per_sec") for line in lines if line["kind"] == "step")
    return [float(rows) for rows in found if isinstance(rows, (int, float)) and 0 < rows < math.inf]
