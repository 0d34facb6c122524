"""Rows of `launch doctor`: whether the disk of each job holds what it will write and download."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

from launcher import fit, plan, shapes
from launcher.backends.base import Check, Env
from launcher.spec import Recipe, Stage

_GB = 1e9
#: The boot disk of a Vertex AI job where the recipe says nothing, in GB: the service's default; and
#: what system and image take of it (an image with torch and CUDA is 10 to 15 GB unpacked).
VERTEX_GB, IMAGE_GB = 100, 20
#: Bytes of a parameter in the files of a downloaded model, which are mostly bf16.
_FILE_BYTES = 2
#: A need above this share of what is there is worth a word.
_NEAR = 0.8


def rows(recipe: Recipe, base: Path, env: Env) -> Iterator[Check]:
    """One row for each job that writes checkpoints. `base`: the folder of the recipe."""
    found = plan.jobs(recipe)
    for index, stages in enumerate(found):
        if any(stage.train for stage in stages):
            name = "checkpoints" if len(found) == 1 else f"checkpoints of job {index}"
            yield _job(name, stages, recipe, base, env)


def kept(stage: Stage) -> int:
    """How many checkpoints of a stage lie on the disk at once at the most: the newest `keep`, the
    best one, and the one that is being written."""
    train = stage.train
    if train is None:
        return 0
    saves = 1
    if train.save_every:
        saves = train.keep + 2 if train.steps is None else train.steps // train.save_every + 1
    return min(train.keep + 2, saves)


def enough_gb(need: float) -> int:
    """The boot disk, in GB, that holds `need` bytes and the image, with the share left free below
    which `rows` warns; in whole tens."""
    return 10 * math.ceil((need / _NEAR / _GB + IMAGE_GB) / 10)


def _job(name: str, stages: Sequence[Stage], recipe: Recipe, base: Path, env: Env) -> Check:
    hardware = stages[0].hardware
    room, where, fix = _room(recipe, stages[0], env)
    if room is None:
        return Check(name, "skip", f"the disk of a {hardware.backend} job is not known here")
    parts, total, unknown = [], 0.0, []
    for stage in stages:
        if stage.train is None:
            continue
        of_stage = shapes.of_stage(stage, recipe.stages, base)
        one = fit.checkpoint_bytes(stage, of_stage)
        if one is None:
            unknown.append(stage.id)
            continue
        parts.append(f"{stage.id}: {kept(stage)} x {_size(one)}")
        total += one * kept(stage)
        downloaded = _downloaded(stage, of_stage)
        total += downloaded
        parts += [f"models of {stage.id}: {_size(downloaded)}"] if downloaded else []
    if unknown:
        at_least = f"; at least {_size(total)} for the rest" if total else ""
        return Check(name, "skip", f"how large a checkpoint of {', '.join(unknown)} is, is not "
                     f"known: the model is not here, nor in the table{at_least}")  # fmt: skip
    if hardware.backend == "vertex":
        fix = f"set hardware.vertex.disk_gb to {enough_gb(total)} or more, or train.keep lower"
    detail = f"{_size(total)} ({', '.join(parts)}) of {_size(room)} {where}"
    if total > room:
        return Check(name, "fail", f"{detail}: too little", fix)
    return Check(name, "warn" if total > _NEAR * room else "pass", detail, fix)


def _room(recipe: Recipe, stage: Stage, env: Env) -> tuple[Optional[float], str, str]:
    """Bytes that a job may fill, where, and how to get more."""
    hardware = stage.hardware
    if hardware.backend == "vertex":
        size = (hardware.vertex and hardware.vertex.disk_gb) or VERTEX_GB
        where = f"on a boot disk of {size} GB, less {IMAGE_GB} for the image"
        return (size - IMAGE_GB) * _GB, where, ""
    if hardware.backend != "local":
        return None, "", ""
    place = env.home
    if recipe.artifacts and "://" not in recipe.artifacts:
        place = Path(recipe.artifacts.partition("{")[0])
    existing = place
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    fix = "free space, set LAUNCH_HOME or artifacts to a larger disk, or train.keep lower"
    return float(shutil.disk_usage(existing).free), f"free on the disk of {place}", fix


def _downloaded(stage: Stage, of_stage: shapes.Shapes) -> float:
    """Bytes of the models that a job fetches: those that are made, or lie here, cost nothing."""
    names = {"model": stage.model.name if stage.model else None,
             "teacher": stage.kd.teacher if stage.kd else None}  # fmt: skip
    fetched = {
        name: part for part, name in names.items()
        if name and "${stage:" not in name and not name.startswith(("/", "."))
    }  # fmt: skip
    if stage.hardware.backend == "local":
        fetched = {}  # the hub's cache is on a disk of its own choosing
    return float(sum(of_stage[part].parameters * _FILE_BYTES
                     for part in fetched.values() if part in of_stage))  # fmt: skip


def _size(size: float) -> str:
    return f"{size / _GB:.1f} GB" if size >= 0.1 * _GB else f"{size / 1e6:.0f} MB"
