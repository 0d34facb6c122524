"""Two workers whose answers do not fit in the memory of one: what goes through the model in parts
there does so on both, and the end is that of a run with memory enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest

from tests.trainer.faults import Faults
from tests.trainer.test_loop import lines
from trainer.checkpoint import load_state, resolve
from trainer.config import (
    Architecture,
    Data,
    Grpo,
    Job,
    Model,
    Source,
    StageConfig,
    Train,
    to_dict,
)

#: Rows of 32 tokens, several answers in each, that fit: a prompt's 16 answers have more.
FITS: dict[str, Any] = {"kind": "oom", "hidden": 32, "learning": True, "calls": [], "rows": 3}


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    process = Faults()
    yield process
    process.close()


def begin(
    faults: Faults, out: Path, tokenizer: str, fault: Optional[dict[str, Any]], **train: Any
) -> str:
    """Two steps of `grpo` on two workers; the fault is on the second one. What they said."""
    architecture = Architecture(hidden_size=32, layers=1, heads=2, intermediate_size=64)
    settings: dict[str, Any] = {"micro_batch": 1, "accumulate": 2, **train}
    config = StageConfig(
        id="rl",
        stage="grpo",
        output=str(out),
        model=Model(init="random", tokenizer=tokenizer, architecture=architecture),
        data=Data(
            train=(Source(builtin="digits"),),
            validation=(Source(builtin="digits", split="heldout"),),
            sequence_length=32,
        ),
        train=Train(steps=3, lr=3e-3, log_every=1, report_to=(), **settings),
        grpo=Grpo(
            rewards=("trainer.rewards:short",), group=16, max_new_tokens=4, beta=0.1, iterations=2
        ),
    )
    job = out.with_suffix(".json")
    job.write_text(json.dumps(to_dict(Job(run="r", stages=(config,)))))
    log = out.with_suffix(".log")
    codes = faults.run(job, 2, fault, log)
    assert codes == [0, 0], log.read_text()
    return log.read_text()


def test_answers_that_one_worker_has_no_memory_for_go_in_parts_on_all(
    faults: Faults, tokenizer: str, tmp_path: Path
) -> None:
    begin(faults, tmp_path / "calm", tokenizer, None)
    begin(faults, tmp_path / "parts", tokenizer, FITS, until=2)
    assert [held["parts"] for held in state(tmp_path / "parts")] == [2, 2]
    said = begin(faults, tmp_path / "parts", tokenizer, FITS)
    assert "resumed at step 2" in said
    begin(faults, tmp_path / "auto", tokenizer, FITS, micro_batch="auto", accumulate=1,
          global_batch=4)  # fmt: skip
    calm, *others = (lines(tmp_path / name, "step") for name in ("calm", "parts", "auto"))
    for found in others:
        assert [step["global_step"] for step in found] == [1, 2, 3]
    for name in ("reward", "tokens", "kl", "entropy", "train_loss", "grad_norm"):
        values = [step[name] for step in others[0]]
        assert values == pytest.approx([step[name] for step in calm], rel=1e-4, abs=1e-7), name


def state(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load_state(Path(resolve(str(folder))))["objective"]
    return found
