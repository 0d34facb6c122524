"""Golden plans: `launch plan RECIPE` and its whole output, for every shipped recipe.

A plan that changes shows up here, line by line, as a diff to be read. When the change is meant:

    LAUNCH_GOLDEN=write python -m pytest -q tests/test_golden_plans.py

writes tests/golden/plans/ anew, without those that have no recipe any more; commit them with it.
Every plan is made in an empty home, without an account, a cloud's variables or a network. Only what
a machine or the trainer's sources decide is replaced by a name in angle brackets.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "plans"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
WRITE = os.environ.get("LAUNCH_GOLDEN") == "write"
#: option -> the suffix of the file that holds the output
FORMS = {"": ".txt", "--json": ".json"}


@pytest.mark.parametrize("option", FORMS, ids=["text", "json"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_plan_of_a_recipe_is_the_golden_one(recipe: Path, option: str, tmp_path: Path) -> None:
    file = GOLDEN / (recipe.stem + FORMS[option])
    made = planned(recipe, option, tmp_path)
    if WRITE:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(made)
    golden = file.read_text() if file.exists() else ""
    assert golden == made, differing(golden, made, file.relative_to(ROOT).as_posix())


def test_every_golden_plan_has_a_recipe() -> None:
    wanted = {recipe.stem + suffix for recipe in RECIPES for suffix in FORMS.values()}
    for file in GOLDEN.iterdir():
        if WRITE and file.name not in wanted:
            file.unlink()
    assert {file.name for file in GOLDEN.iterdir()} == wanted


def test_nothing_of_this_machine_is_left_in_a_golden_plan() -> None:
    said = "".join(file.read_text() for file in GOLDEN.iterdir())
    assert str(ROOT) not in said and sys.executable not in said and "/tmp/" not in said
    assert not re.search(r"\b[0-9a-f]{64}\.tar\.gz", said)


def test_no_line_of_a_golden_plan_is_wider_than_a_terminal() -> None:
    for file in GOLDEN.glob("*.txt"):
        for line in file.read_text().splitlines():
            assert len(line) <= 100 or line.startswith("stderr: "), f"{file.name}: {line}"


def planned(recipe: Path, option: str, folder: Path) -> str:
    """The whole output of `launch plan`, and its exit code, as on any machine."""
    home = folder / "home"
    command = ["plan", f"recipes/{recipe.name}", *([option] if option else [])]
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "LAUNCH_HOME": str(home),
        "LAUNCH_OWNER": "somebody",
        "GIT_DIR": str(folder / "none"),  # the commit of the tree would be another one each time
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "NO_COLOR": "1",
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *command],
        capture_output=True, text=True, env=environ, cwd=ROOT, timeout=120,
    )  # fmt: skip
    (bundle,) = (home / "bundles").iterdir()
    digest = bundle.name.partition(".")[0]
    text = done.stdout
    names = {str(home): "<home>", str(folder): "<user>", sys.executable: "<python>",
             str(ROOT): "<repository>", digest: "<bundle>", digest[:12]: "<bundle>"}  # fmt: skip
    for found, name in names.items():
        text = text.replace(found, name)
    text = re.sub(r'("sha256": "<bundle>",\s+"bytes": )\d+', r'\1"<bytes>"', text)
    said = "".join(f"stderr: {line}\n" for line in done.stderr.splitlines())
    code = "" if option else f"exit code: {done.returncode}\n"
    shown = "" if option else f"$ launch {' '.join(command)}\n"
    return f"{shown}{text}{said}{code}"


def differing(golden: str, made: str, name: str) -> str:
    lines: Iterator[str] = difflib.unified_diff(
        golden.splitlines(), made.splitlines(), name, "launch plan", lineterm="", n=1
    )
    return "\n".join([*lines, "", "meant? LAUNCH_GOLDEN=write python -m pytest -q " + __name__])
