"""Two workers that share the parts of a model, and the answers that its reference is asked about:
they need each other for every pass, and have not as many."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from tests.trainer import gradients
from tests.trainer.faults import Faults
from tests.trainer.test_loop import lines
from trainer.config import (
    Architecture,
    Data,
    Job,
    Model,
    Preference,
    Source,
    StageConfig,
    Train,
    to_dict,
)
from trainer.models import load_tokenizer

Begin = Callable[..., tuple[list[int], Path, str]]


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    process = Faults()
    yield process
    process.close()


@pytest.fixture(scope="module")
def begin(faults: Faults, tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Begin:
    """Three steps of `dpo` in the folder `name`: exit codes, the folder, and what was said. 13 and
    5 rows: of two workers, the first has a row more of the ones and the others."""
    out = tmp_path_factory.mktemp("ranks")
    for name, count in (("train", 13), ("held-out", 5)):
        pairs = (
            {"prompt": "say something", "chosen": "A" * (1 + i), "rejected": "B" * (1 + 2 * i % 7)}
            for i in range(count)
        )
        (out / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train, held_out = (Source(path=str(out / f"{name}.jsonl")) for name in ("train", "held-out"))
    shape = Architecture(hidden_size=32, layers=1, heads=2, intermediate_size=64, kv_heads=2)

    def run(
        name: str,
        ranks: int,
        fault: Optional[dict[str, Any]] = None,
        model: Optional[Model] = None,
        **settings: Any,
    ) -> tuple[list[int], Path, str]:
        config = StageConfig(
            id="prefer",
            stage="dpo",
            output=str(out / name),
            model=model or Model(init="random", tokenizer=tokenizer, architecture=shape),
            data=Data(train=(train,), validation=(held_out,), sequence_length=64, packing=False),
            train=Train(
                steps=3, micro_batch=4 // ranks, lr=3e-3, log_every=1, report_to=(), **settings
            ),
            preference=Preference(beta=0.5),
        )
        job, log = out / f"{name}.json", out / f"{name}.log"
        job.write_text(json.dumps(to_dict(Job(run="r", stages=(config,)))))
        codes = faults.run(job, ranks, fault, log)
        return codes, out / name, log.read_text()

    return run


def trained(folder: Path) -> list[float]:
    found = [line["train_loss"] for line in lines(folder, "step")]
    return [*found, *(line["val_loss"] for line in lines(folder, "eval"))]


@pytest.fixture(scope="module")
def one(begin: Begin) -> list[float]:
    codes, folder, said = begin("one", 1)
    assert codes == [0], said
    return trained(folder)


def test_workers_that_share_a_model_ask_its_reference_together(
    begin: Begin, one: list[float]
) -> None:
    codes, folder, said = begin("shared", 2, parallel="fsdp")
    assert codes == [0, 0], said
    assert trained(folder) == pytest.approx(one, rel=1e-5)


def test_out_of_memory_there_ends_all_workers_and_the_next_start_reads_fewer_rows(
    begin: Begin, one: list[float]
) -> None:
    fault = {"kind": "oom", "hidden": 32, "learning": False, "calls": [2], "rows": 1}
    codes, folder, said = begin("again", 2, fault, parallel="fsdp")
    assert codes == [75, 75], said
    assert not trained(folder)
    assert "goes on from the last checkpoint with 1" in said
    codes, folder, said = begin("again", 2, {**fault, "calls": []}, parallel="fsdp")
    assert codes == [0, 0], said
    assert trained(folder) == pytest.approx(one, rel=1e-5)


def test_out_of_memory_with_a_row_for_each_answer_is_said_in_pairs(
    begin: Begin, tokenizer: str, tmp_path: Path
) -> None:
    """A micro-batch of 2 pairs is 4 rows of answers there: half of it is 1 pair."""
    gradients.gpt_oss(torch.float32, seed=1).save_pretrained(tmp_path)
    load_tokenizer(tokenizer).save_pretrained(tmp_path)
    model = Model(name=str(tmp_path))
    fault = {"kind": "oom", "hidden": 32, "learning": True, "calls": [1], "rows": 3}
    codes, _, said = begin("apart", 2, fault, model, parallel="fsdp")
    assert codes == [75, 75], said
    assert "pairs: each answer is read in a row of its own" in said
    assert "out of memory with 2 rows" in said
    assert "goes on from the last checkpoint with 1" in said
