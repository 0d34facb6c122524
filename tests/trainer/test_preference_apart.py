"""Preference on models in which the documents of a row see each other, such as gpt-oss: each answer
is read in a row of its own, and a pair is still one row to all that count, cut and share rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer import gradients
from tests.trainer.conftest import in_folder
from tests.trainer.test_experts import BOTH, save_base
from tests.trainer.test_preference import alone, logprobs, steps_of
from trainer import reference
from trainer.batch import IGNORE, Batch
from trainer.checkpoint import resolve
from trainer.config import (
    ConfigError,
    Data,
    Grpo,
    Model,
    Preference,
    Source,
    StageConfig,
    Train,
)
from trainer.data.stream import Rows
from trainer.probe import longest

Run = Callable[..., Any]
SAID = "pairs: each answer is read in a row of its own; in one they would see each other"


@pytest.fixture
def unpacked(tokenizer: str, texts: str) -> Rows:
    rows = gradients.pairs(tokenizer, texts, packing=False)
    rows.apart = True
    return rows


@pytest.fixture
def prefers(tokenizer: str, tmp_path: Path) -> StageConfig:
    """A stage `ipo` of a tiny gpt-oss that learns adapters of attention and experts."""
    for name, count in (("train", 24), ("heldout", 7)):
        pairs = (
            {"prompt": "say it", "chosen": "A" * (3 + i % 9), "rejected": "B" * (3 + 2 * i % 25)}
            for i in range(count)
        )
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    train, held_out = (
        Source(path=str(tmp_path / f"{name}.jsonl")) for name in ("train", "heldout")
    )
    return StageConfig(
        id="prefer",
        stage="ipo",
        output=str(tmp_path / "out"),
        model=Model(name=save_base(tmp_path / "base", tokenizer), adapter=BOTH),
        data=Data(train=(train,), validation=(held_out,), sequence_length=64, packing=False),
        train=Train(steps=8, micro_batch=4, lr=2e-2, log_every=1, report_to=()),
        preference=Preference(beta=0.5),
    )


@contextmanager
def memory_for(rows: int, learning: bool = True) -> Iterator[list[int]]:
    """Out of memory where a pass reads more than so many rows, those of the trial not among them;
    the rows of the passes that were tried."""
    tried: list[int] = []

    def before(module: Any, inputs: Any) -> None:
        if isinstance(module, nn.Embedding) and inputs[0].shape[1] > 8:
            if torch.is_grad_enabled() != learning:
                return
            tried.append(len(inputs[0]))
            if tried[-1] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield tried
    finally:
        handle.remove()


def test_the_documents_of_a_batch_become_rows_and_a_pair_is_never_parted(unpacked: Rows) -> None:
    folded = unpacked.batch([3, 4, 5])
    apart = folded.to(torch.device("cpu"))
    chunks = [2 * row + side for row in (3, 4, 5) for side in (0, 1)]
    lengths = unpacked.chunks.lengths[chunks].tolist()
    assert apart.input_ids.shape == (6, max(lengths)) and folded.input_ids.shape[0] == 3
    for row, (chunk, length) in enumerate(zip(chunks, lengths)):
        wanted = alone(unpacked, chunk)
        for name in ("input_ids", "position_ids", "targets"):
            assert torch.equal(getattr(apart, name)[row, :length], getattr(wanted, name)[0])
        assert (apart.targets[row, length:] == IGNORE).all()
        assert not apart.position_ids[row, length:].any(), "padding is no part of the answer"
    assert apart.host is not None and not apart.host.apart
    one, two = folded.split()
    assert (one.rows, two.rows) == (1, 2)
    assert [part.to(torch.device("cpu")).rows for part in (one, two)] == [2, 4]
    assert unpacked.first(2).batch([0]).to(torch.device("cpu")).rows == 2


def test_an_answer_of_gpt_oss_has_the_log_probability_that_it_has_alone(unpacked: Rows) -> None:
    model = gradients.gpt_oss(torch.float64, seed=1).eval()
    found = logprobs(model, unpacked.batch(range(6)))
    wanted = torch.cat([logprobs(model, alone(unpacked, chunk)) for chunk in range(12)])
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    unpacked.apart = False
    together = logprobs(model, unpacked.batch(range(6)))
    assert not torch.allclose(together[1::2], wanted[1::2], rtol=1e-6), "the rows were shared"


def test_the_longest_rows_are_those_whose_answers_are_longest(unpacked: Rows) -> None:
    of_answers = unpacked.chunks.lengths.reshape(-1, 2)
    (row,) = longest(unpacked, 1)
    assert of_answers[row].max() == of_answers.max()
    unpacked.apart = False
    (row,) = longest(unpacked, 1)
    assert of_answers[row].sum() == of_answers.sum(axis=1).max()


def test_ipo_teaches_an_adapter_of_gpt_oss_with_experts(
    prefers: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    outcome = run_stage(prefers)
    assert SAID in outcome.lines
    steps = [line for line in steps_of(prefers.output) if line["kind"] == "step"]
    first, last = steps[0], steps[-1]
    assert first["margin"] == pytest.approx(0.0, abs=1e-5)
    assert first["train_loss"] == pytest.approx(1.0, abs=1e-4)  # (1 / (2 beta))^2
    assert last["margin"] > 0.3 and last["train_loss"] < 0.7
    assert outcome.evaluation["val_count"] == 7 and outcome.evaluation["val_accuracy"] > 0.9
    # As many rows at a time as before, or fewer, or with the adapter switched off: all the same.
    for name, change in (
        ("parts", {"train": replace(prefers.train, micro_batch=1, accumulate=4)}),
        ("switched", {"preference": Preference(beta=0.5, reference="adapter")}),
    ):
        other = replace(prefers, output=str(tmp_path / name), **change)
        assert run_stage(other).evaluation["val_loss"] == pytest.approx(
            outcome.evaluation["val_loss"], rel=1e-4
        )
        for one, two in zip(steps_of(prefers.output), steps_of(other.output)):
            if one["kind"] == "step":
                assert one["margin"] == pytest.approx(two["margin"], rel=1e-3, abs=1e-5)


def test_with_packing_it_is_refused_with_the_setting_to_change(
    prefers: StageConfig, run_stage: Run
) -> None:
    packed = replace(prefers, data=replace(prefers.data, packing=True))
    with pytest.raises(ConfigError, match=r"in packed rows .* set data\.packing: false$"):
        run_stage(packed)


def test_such_a_run_that_is_resumed_ends_bit_for_bit_alike(
    prefers: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    calm, paused = (in_folder(prefers, tmp_path / name, steps=4) for name in "ab")
    run_stage(calm)
    run_stage(in_folder(paused, tmp_path / "b", until=2))
    said = run_stage(paused).lines
    assert SAID in said and any(line.endswith(f"from {reference.NAME}") for line in said)
    one, two = (Path(resolve(config.output)) / "adapter_model.safetensors"
                for config in (calm, paused))  # fmt: skip
    assert one.read_bytes() == two.read_bytes()


def test_out_of_memory_there_goes_on_with_single_pairs(
    prefers: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    calm = run_stage(in_folder(prefers, tmp_path / "calm", steps=2))
    tight = in_folder(prefers, tmp_path / "tight", steps=2)
    with memory_for(2) as tried:
        found = run_stage(tight)
    assert max(tried) == 8 and tried[-1] == 2
    assert "out of memory with 2 rows: going on with 1" in found.lines
    wanted = calm.evaluation["val_loss"]
    assert found.evaluation["val_loss"] == pytest.approx(wanted, rel=1e-5)
    with memory_for(2, learning=False):
        found = run_stage(in_folder(prefers, tmp_path / "reads", steps=2))
    assert found.evaluation["val_loss"] == pytest.approx(wanted, rel=1e-5)
    with memory_for(1), pytest.raises(ConfigError, match="one row does not fit"):
        run_stage(in_folder(prefers, tmp_path / "no", steps=2))


def test_grpo_teaches_gpt_oss_with_a_row_for_each_answer(
    prefers: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    sources = tuple((Source(builtin="digits", split=s),) for s in ("train", "heldout"))
    config = replace(
        prefers,
        stage="grpo",
        preference=None,
        data=replace(prefers.data, train=sources[0], validation=sources[1]),
        grpo=Grpo(
            rewards=("trainer.rewards:short",), group=4, max_new_tokens=6, beta=0.1, iterations=2
        ),
    )
    run_stage(in_folder(config, tmp_path / "rl", steps=2, micro_batch=2))
    first, second = (line for line in steps_of(str(tmp_path / "rl")) if line["kind"] == "step")
    # The weights that drew the answers give them the probabilities that they were drawn with.
    assert first["kl"] == pytest.approx(0.0, abs=1e-6) and first["clipped"] == 0
    assert second["kl"] > 0


def test_a_batch_of_no_documents_apart_is_as_before(unpacked: Rows) -> None:
    unpacked.apart = False
    folded: Batch = unpacked.batch([0, 1])
    assert folded.to(torch.device("cpu")).rows == 2
