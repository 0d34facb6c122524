"""What starting costs, by structure: which modules are loaded, and which files are opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.startup import make_home

_HEAVY = {"torch", "transformers", "google", "pulumi", "kubernetes", "sky", "requests", "numpy"}

#: Runs each command line in one process, then says what was loaded and opened.
_PROBE = """
import io, json, os, sys
at_start = set(sys.modules)  # Google's namespace packages are there with the interpreter
opened = []
home = os.environ["LAUNCH_HOME"]
sys.addaudithook(lambda event, args: opened.append(str(args[0]))
                 if event == "open" and str(args[0]).startswith(home) else None)
from launcher import cli
real, sys.stdout = sys.stdout, io.StringIO()
codes = [cli.run(words) for words in json.loads(sys.argv[1])]
loaded = sorted(set(sys.modules) - at_start)
real.write(json.dumps({"codes": codes, "modules": loaded, "opened": opened}))
"""


def _probe(home: Path, *command_lines: list[str]) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps(command_lines)],
        env={**os.environ, "LAUNCH_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    facts: dict[str, list[str]] = json.loads(done.stdout)
    assert set(facts["codes"]) == {0}, done.stderr
    return facts


def _packages(facts: dict[str, list[str]]) -> set[str]:
    return {name.partition(".")[0] for name in facts["modules"]}


def test_help_loads_the_parser_and_nothing_else(tmp_path: Path) -> None:
    facts = _probe(tmp_path, ["--help"], [])

    assert _packages(facts).isdisjoint(_HEAVY | {"pydantic", "yaml", "rich"})
    ours = {name for name in facts["modules"] if name.partition(".")[0] in ("launcher", "trainer")}
    parsing = {"launcher.arguments", "launcher.cli", "launcher.cli_infra", "launcher.cli_recipes"}
    assert ours == {"launcher", "launcher.errors", *parsing}


def test_help_of_every_command_loads_none_of_the_heavy_packages(tmp_path: Path) -> None:
    from launcher.cli import _SECTIONS

    names = [name for names in _SECTIONS.values() for name in names]

    within = [["infra", name, "--help"] for name in ("plan", "up", "destroy", "status", "export")]
    facts = _probe(tmp_path, *([name, "--help"] for name in names), *within, ["infra"])

    assert _packages(facts).isdisjoint(_HEAVY | {"yaml", "rich"})
    assert "launcher.api" not in facts["modules"]


def test_status_and_validate_load_none_of_the_heavy_packages(tmp_path: Path) -> None:
    make_home(tmp_path, runs=2, records=5)

    listed = _probe(tmp_path, ["status"], ["status", "--json"])
    checked = _probe(tmp_path, ["validate", "quickstart"], ["plan", "quickstart"])

    assert _packages(listed).isdisjoint(_HEAVY | {"yaml", "rich"})
    assert _packages(checked).isdisjoint(_HEAVY | {"rich"})


def test_status_opens_no_more_files_for_a_thousand_runs_than_for_those_it_shows(
    tmp_path: Path,
) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    make_home(few, runs=20, records=4)
    make_home(many, runs=300, records=4)

    shown_few, shown_many = _probe(few, ["status"]), _probe(many, ["status"])

    assert len(shown_many["opened"]) == len(shown_few["opened"])
    assert not [path for path in shown_many["opened"] if "/journal/" in path]
    everything = _probe(many, ["status", "--all"])
    assert len(everything["opened"]) > 300
