"""Bad lines of data, from the shell: one clear line, or left out and counted when asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_recipes import launch

RECIPE = """\
launch: 1
name: bad-lines
stage: tokenizer
tokenizer: {{vocab_size: 300}}
data: {{train: [{{path: "{path}"}}]}}
hardware: {{backend: local, accelerator: "cpu:1"}}
"""
LINES = '{"text": "a fine line of text"}\n{bad\n{"text": "and another one"}\n{"text": 3}\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    data, recipe = tmp_path / "lines.jsonl", tmp_path / "bad-lines.yaml"
    data.write_text(LINES)
    recipe.write_text(RECIPE.format(path=data))
    return recipe


def test_a_bad_line_ends_the_run_and_is_named_with_its_number(recipe: Path, tmp_path: Path) -> None:
    done = launch(tmp_path / "home", "up", str(recipe), "--yes")
    assert done.returncode == 6
    said = f"{tmp_path}/lines.jsonl:2: not JSON at column 2"
    assert said in done.stdout + done.stderr
    assert "not tried again: exit code 65 blames the data" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_skip_bad_leaves_such_lines_out_and_counts_them(recipe: Path, tmp_path: Path) -> None:
    done = launch(tmp_path / "home", "up", str(recipe), "--yes", "--skip-bad")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 bad lines skipped" in done.stdout and "lines.jsonl:2: not JSON" in done.stdout
