"""Two workers train as one does, and what goes wrong on one is known to both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule

ROOT = Path(__file__).resolve().parents[2]
#: From torch 2.13 on.
SUMS_UNUSED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")


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


@pytest.mark.skipif(not SUMS_UNUSED, reason="this torch cannot sum what one rank alone uses")
def test_workers_that_share_a_model_leave_alone_what_none_of_them_uses(
    runs: dict[str, Any],
) -> None:
    found = runs["shared gradients"]
    one, (two, _) = found["one"], found["two"]
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)
    for name, value in one["values"].items():
        assert two["values"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert (two["values"][name] == found["start"][name]) == (".none." in name), name


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


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("before, 0", "rank 0: RuntimeError: injected"),
        ("before, 1", "rank 1: RuntimeError: injected"),
        ("digest, 1", "rank 1 could not write its part of the state: MemoryError"),
        ("model, 0", "ValueError: injected"),
        ("plain, 0", "ValueError: injected"),
    ],
)
def test_an_unexpected_error_in_one_save_ends_all_ranks_with_one_line(
    runs: dict[str, Any], way: str, why: str
) -> None:
    """None of them is left waiting, and all say which step was not saved."""
    found = runs["saves"][way]
    first, second = found["results"]
    assert first == second
    assert first.startswith("error: CheckpointError: step 4 not saved: ") and why in first
    assert "earlier checkpoints are whole" in first and found["newest"] == "step-2"


def test_a_signal_in_an_evaluation_ends_it_on_all_ranks(runs: dict[str, Any]) -> None:
    found = runs["left"]
    said, _ = found["results"][0]
    assert [batches for _, batches in found["results"]] == [1, 1]
    assert "step 2: the evaluation was left, the job was asked to leave" in said
    assert len(found["losses"]) == 2
    assert not any("val_loss" in line for line in said)


def resumed(said: list[str]) -> list[str]:
    return [line.split(" from ")[0] for line in said if line.startswith("resumed at step")]


def test_nodes_with_disks_of_their_own_go_on_from_their_own_copies(runs: dict[str, Any]) -> None:
    found = runs["disks"]["same"]
    said = found["results"][0]
    assert resumed(said) == ["resumed at step 4"], said
    assert not any("WARNING: the nodes" in line for line in said)
    assert len(found["losses"]) == 5


@pytest.mark.parametrize(
    ("way", "newest"),
    [
        ("lacks", "rank 0 step 4, rank 1 step 2"),
        ("damaged", "rank 0 step 2, rank 1 step 4"),
        ("another", "rank 0 step 4, rank 1 step 4"),
    ],
)
def test_nodes_agree_on_the_newest_checkpoint_that_all_have_whole(
    runs: dict[str, Any], way: str, newest: str
) -> None:
    found, calm = runs["disks"][way], runs["disks"]["same"]["losses"]
    said = found["results"][0]
    assert any(
        f"newest checkpoints differ ({newest}): going on from step 2, which all have" in line
        for line in said
    ), said
    assert resumed(said) == ["resumed at step 2"]
    assert found["losses"] == [*calm[:4], *calm[2:]], "steps 3 and 4 again, as before"


def test_nodes_of_which_one_has_nothing_begin_anew(runs: dict[str, Any]) -> None:
    found, calm = runs["disks"]["empty"], runs["disks"]["same"]["losses"]
    assert any("rank 1 none): beginning anew" in line for line in found["results"][0])
    assert found["losses"] == [*calm[:4], *calm]


def test_a_checkpoint_of_another_run_is_adopted_on_every_node(runs: dict[str, Any]) -> None:
    found, calm = runs["disks"]["adopted"], runs["disks"]["same"]["losses"]
    assert resumed(found["results"][0]) == ["resumed at step 4"], found["results"]
    assert found["has"] == [True, True]
    assert found["losses"] == calm[4:]


def test_a_node_that_cannot_adopt_ends_all_with_its_line(runs: dict[str, Any]) -> None:
    first, second = runs["disks"]["not adopted"]["results"]
    assert first == second
    assert first.startswith("error: CheckpointError: train.resume: ")
    assert first.endswith("not adopted-1/checkpoints/step-4: MANIFEST.json is missing")


def test_each_worker_goes_on_with_its_own_answers(runs: dict[str, Any]) -> None:
    found = runs["reinforced"]
    assert resumed(found["said"][2]) == ["resumed at step 3"], found["said"]
    assert found["losses"]["parts"] == found["losses"]["whole"]
    assert len(found["losses"]["whole"]) == 4 and any(found["losses"]["whole"])
    assert found["weights"][0] == found["weights"][1]
