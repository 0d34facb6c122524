"""The launcher's forecast of memory against what torch counts for this trainer's own step, on
models of full size made of fake tensors. benchmarks/memory.py does the same for every case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.memory import CASES, LIMIT, RESULTS, Case, compare, stage_of
from launcher import fit, hardware, shapes

#: Full training, an adapter, distillation with checkpointing, and eight workers that share the
#: model: the others are recorded.
RUN = (
    "1b-full-2048", "8b-lora-1024", "1b-kd8b-2048-checkpointing", "1b-fsdp8-1024",
)  # fmt: skip
#: What is recorded may not get worse: no case is off by more than 0.7%.
CLOSE = 0.01


@pytest.mark.parametrize("case", [c for c in CASES if c.name in RUN], ids=lambda c: c.name)
def test_the_forecast_is_what_torch_counts_for_a_step(case: Case) -> None:
    found = compare(case)
    assert abs(found["error"]) <= LIMIT, found


def test_the_forecast_still_agrees_with_all_that_was_counted() -> None:
    recorded = {row["case"]: row for row in json.loads(RESULTS.read_text())["cases"]}
    assert recorded.keys() == {case.name for case in CASES}
    for case in CASES:
        stage = stage_of(case)
        known = shapes.of_stage(stage, (stage,), Path())
        found = fit.memory(stage, hardware.parse(f"H100:{case.workers}"), 1, known)
        assert found is not None
        assert abs(found.allocated / recorded[case.name]["counted"] - 1) <= CLOSE, case.name
