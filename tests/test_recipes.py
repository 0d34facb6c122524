"""Every shipped recipe validates, plans and passes its dry run, offline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.recipe import load
from trainer.config import STAGES

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def stages(recipe: Path) -> list[str]:
    """What the stages of a recipe do, in order."""
    return [stage.stage for stage in load(recipe).recipe.stages]


def launch(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "LAUNCH_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=240)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_validates_plans_and_passes_the_dry_run(recipe: Path, tmp_path: Path) -> None:
    assert launch(tmp_path, "validate", str(recipe)).returncode == 0
    planned = launch(tmp_path, "plan", str(recipe))
    assert planned.returncode == 0 and "creates" in planned.stdout
    done = launch(tmp_path, "up", str(recipe), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "dry run: " in done.stdout and "Traceback" not in done.stderr
    count = len(stages(recipe))
    assert f"passed: {count} stage{'s' if count > 1 else ''} in" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_every_stage_has_a_recipe_whose_dry_run_reaches_it() -> None:
    assert {stage for recipe in RECIPES for stage in stages(recipe)} == set(STAGES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_its_header_says_what_it_does_needs_and_costs(recipe: Path) -> None:
    head = recipe.read_text().split("launch: 1")[0]
    for word in ("What it does:", "Needs:", "Costs:"):
        assert word in head
