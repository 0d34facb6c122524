"""The exported project: readable, whole, and never over somebody's files."""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from infra import export, google
from tests.infra.registered import FULL

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def test_the_project_imports_pulumi_and_nothing_of_ours(tmp_path: Path) -> None:
    written = export.write(FULL, tmp_path / "new", project="ours", stack="team")

    assert {path.name for path in written} == {
        "Pulumi.yaml", "Pulumi.team.yaml", "__main__.py", "requirements.txt", "README.md",
    }  # fmt: skip
    tree = ast.parse((tmp_path / "new" / "__main__.py").read_text())
    imported = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    assert imported == {"pulumi", "pulumi_gcp"}
    project = yaml.safe_load((tmp_path / "new" / "Pulumi.yaml").read_text())
    assert (project["name"], project["runtime"]["name"]) == ("ours", "python")
    stack = yaml.safe_load((tmp_path / "new" / "Pulumi.team.yaml").read_text())
    assert stack == {"config": google.config(FULL)}


def test_the_program_is_formatted_as_a_person_would(tmp_path: Path) -> None:
    export.write(FULL, tmp_path)

    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--no-cache", "--isolated", "--check",
         "--line-length", "100", str(tmp_path / "__main__.py")],
        capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_project_wants_the_versions_that_launch_wants() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {
        Requirement(line).name: Requirement(line)
        for line in extras["optional-dependencies"]["infra"]
    }

    theirs = [Requirement(line) for line in export.REQUIREMENTS]

    assert {one.name for one in theirs} == set(ours)
    for one in theirs:
        assert set(ours[one.name].specifier) <= set(one.specifier), one.name


def test_nothing_is_written_over_a_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")

    with pytest.raises(FileExistsError, match=r"README\.md is there already; name an empty folder"):
        export.write(FULL, tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_readme_imports_every_resource_by_its_name_and_id(tmp_path: Path) -> None:
    odd = replace(FULL, operators=("user:o'brien@example.com",))
    export.write(odd, tmp_path)

    lines = (tmp_path / "README.md").read_text().splitlines()
    imported = [shlex.split(line)[3:] for line in lines if line.startswith("pulumi import")]

    assert imported == [[one.type_token, one.name, one.import_id] for one in google.resources(odd)]
    assert "* gs://other: has to be there" in lines
    assert sum(line.startswith("gcloud secrets versions add") for line in lines) == 2
