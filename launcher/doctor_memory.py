"""Rows of `launch doctor`: whether each stage fits the memory of its accelerator, as the forecast
of `launch plan` has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher import forecast, plan_lines
from launcher.backends.base import Check
from launcher.spec import Recipe


def rows(recipe: Recipe, launch_home: Path) -> Iterator[Check]:
    """One row for each stage that the forecast has memory for, or a reason why not."""
    for stage in recipe.stages:
        name = f"memory of {stage.id}" if len(recipe.stages) > 1 else "memory"
        found = forecast.of_stage(recipe, stage, (), launch_home)
        memory = found.memory
        if memory is None or memory.limit is None:
            here = f"not known: how much memory {stage.hardware.accelerator} has"
            said = [why.removeprefix("memory: ") for why in found.unknown
                    if why.startswith("memory: ")]  # fmt: skip
            yield Check(name, "skip", f"not known: {said[0]}" if said else here)
            continue
        detail = plan_lines.memory_texts(found)[0]
        if memory.fits:
            yield Check(name, "pass", detail)
            continue
        # As `launch up`: a forecast is a warning, weights that exceed the device are the end.
        hopeless = forecast.hopeless(found) is not None
        yield Check(name, "fail" if hopeless else "warn", detail, _fix(found))


def _fix(found: forecast.Forecast) -> str:
    if not found.changes:
        return "take a larger accelerator; `launch offers RECIPE --any` compares them"
    first = found.changes[0]
    made = f"makes it {forecast.gib(first.memory.bytes)} GiB"
    return f"{forecast.settings(first)} {made}; `launch plan RECIPE --explain` names more"
