"""Two workers train as one does, and what goes wrong on one is known to both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tokenizer: str, texts: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank_runs.py found."""
    out = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.rank_runs", str(out), tokenizer, texts],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=240,  # a worker that hangs fails here
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_parameter_without_a_gradient_on_any_rank_is_left_alone(runs: dict[str, Any]) -> None:
    """Neither moved nor decayed, as by one process; one that a single rank uses moves on both."""
    found = runs["gradients"]
    one = found["one"]
    for two in found["two"]:
        assert two["norms"] == pytest.approx(one["norms"], rel=1e-6)
        for name, value in one["values"].items():
            assert two["values"][name] == pytest.approx(value, rel=1e-5), name
            assert (two["values"][name] == found["start"][name]) == name.startswith("none.")


def test_no_room_for_the_sum_of_gradients_is_said_on_all_ranks_before_it(
    runs: dict[str, Any],
) -> None:
    first, second = runs["room"]
    for found in (first, second):
        assert found["done"] == [False, True]
        assert found["untouched"] and found["in place"]
        assert found["sizes"] == [64, 64]  # never a copy of a matrix, which has 128 bytes
        assert found["total"] == pytest.approx(first["before"] + second["before"], rel=1e-6)


def test_no_room_for_the_sum_of_gradients_halves_the_micro_batch(runs: dict[str, Any]) -> None:
    found = runs["loop room"]
    assert any("out of memory with 4 rows: going on with 2" in x for x in found["split"]["said"])
    assert not any("out of memory" in line for line in found["calm"]["said"])
    assert len(found["calm"]["losses"]) == 3
    assert found["split"]["losses"] == pytest.approx(found["calm"]["losses"], rel=1e-5)
