"""`micro_batch: auto`: the largest that fits, found without a trace in what is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.conftest import in_folder, torchrun
from tests.trainer.test_loop import lines, weights
from trainer import probe, stages
from trainer.batch import Batch
from trainer.config import ConfigError, FieldErrors, Problem, StageConfig, Train, build
from trainer.objective import Loss
from trainer.objectives.next_token import NextToken

Run = Callable[..., Any]


class Small(NextToken):
    """Runs out of memory with more than `tokens` tokens at once; counts what it prepared."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.tried, self.count = tokens, [], 0  # type: ignore[var-annotated]

    def prepare(self, batch: Batch, step: int) -> Batch:
        self.count += 1
        self.tried.append(tuple(batch.input_ids.shape))
        return super().prepare(batch, step)

    def loss(self, model: nn.Module, batch: Batch, norm: dict[str, Tensor], log: bool) -> Loss:
        if batch.input_ids.numel() > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return super().loss(model, batch, norm, log)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.fixture
def with_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Small]:
    def use(tokens: int) -> Small:
        objective = Small(tokens)
        row = stages.train(lambda context, tokenizer: objective)
        monkeypatch.setitem(stages.STAGES, "pretrain", row)
        return objective

    return use


AUTO: dict[str, Any] = {"micro_batch": "auto", "accumulate": 1, "global_batch": 6, "steps": 4}


def test_it_doubles_until_memory_runs_out(
    stage: StageConfig, run_stage: Run, with_memory: Any, tmp_path: Path
) -> None:
    objective = with_memory(5 * 128)
    run_stage(in_folder(stage, tmp_path / "auto", **AUTO))
    assert objective.tried[:4] == [(1, 128), (2, 128), (4, 128), (6, 128)]
    (event,) = [e for e in lines(tmp_path / "auto", "event") if e["event"] == "micro_batch"]
    assert event["micro_batch"] == 4
    assert objective.tried[4:6] == [(4, 128), (2, 128)]  # the global batch is that of the recipe


def test_it_ends_at_the_global_batch(
    stage: StageConfig, run_stage: Run, with_memory: Any, tmp_path: Path
) -> None:
    objective = with_memory(1 << 30)
    run_stage(in_folder(stage, tmp_path / "auto", **AUTO))
    assert objective.tried[:5] == [(1, 128), (2, 128), (4, 128), (6, 128), (6, 128)]


def test_nothing_of_the_probe_is_left_in_what_is_trained(
    stage: StageConfig, run_stage: Run, with_memory: Any, tmp_path: Path
) -> None:
    """With dropout, so that a random number too many would show; to the last bit."""
    probed = with_memory(3 * 128)
    run_stage(in_folder(stage, tmp_path / "auto", **AUTO))
    given = with_memory(3 * 128)
    run_stage(
        in_folder(stage, tmp_path / "two", **{**AUTO, "micro_batch": 2, "accumulate": 3,
                                              "global_batch": None})
    )  # fmt: skip
    assert weights(tmp_path / "auto") == weights(tmp_path / "two")
    assert probed.count == given.count == 12  # the objective's own state is as it was


def test_a_resumed_run_cuts_as_before_and_does_not_probe_again(
    stage: StageConfig, run_stage: Run, with_memory: Any, tmp_path: Path
) -> None:
    with_memory(3 * 128)
    run_stage(in_folder(stage, tmp_path / "whole", **AUTO))
    run_stage(in_folder(stage, tmp_path / "parts", **AUTO, until=2))
    more = with_memory(1 << 30)
    run_stage(in_folder(stage, tmp_path / "parts", **AUTO), attempt=2)
    assert set(more.tried) == {(2, 128)}
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_the_longest_rows_come_first(
    stage: StageConfig, run_stage: Run, with_memory: Any, tmp_path: Path
) -> None:
    """Without packing, rows differ in length: the first trial has the longest of all."""
    objective = with_memory(1 << 30)
    loose = replace(stage, data=replace(stage.data, packing=False))
    run_stage(in_folder(loose, tmp_path / "auto", **AUTO))
    assert objective.tried[0][1] == max(width for _, width in objective.tried)
    assert objective.tried[4][1] < objective.tried[0][1]


def test_one_row_that_does_not_fit_says_what_to_change(
    stage: StageConfig, run_stage: Run, with_memory: Any, tmp_path: Path
) -> None:
    with_memory(100)
    with pytest.raises(ConfigError, match=r"one row does not fit.*gradient_checkpointing"):
        run_stage(in_folder(stage, tmp_path / "auto", **AUTO))


def test_the_global_batch_is_shared_evenly() -> None:
    config = Train(steps=1, micro_batch="auto", global_batch=6)
    assert probe.first_cut(config, 2) == (3, 1)
    assert probe.first_cut(Train(steps=1, micro_batch=4, accumulate=2), 2) == (4, 2)
    with pytest.raises(ConfigError, match="6 rows cannot be shared evenly by 4 workers"):
        probe.first_cut(config, 4)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"micro_batch": "auto"}, "global_batch"),
        ({"micro_batch": "auto", "global_batch": 0}, "global_batch"),
        ({"micro_batch": "auto", "global_batch": 8, "accumulate": 2}, "accumulate"),
        ({"micro_batch": 4, "global_batch": 8}, "global_batch"),
        ({"micro_batch": 0}, "micro_batch"),
    ],
)
def test_what_cannot_stand_together_is_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldErrors) as caught:
        Train(steps=1, **given)
    assert [name for name, _ in caught.value.problems] == [field]


def test_a_job_file_has_a_number_or_the_word_auto() -> None:
    def read(value: Any) -> tuple[Any, list[Problem]]:
        problems: list[Problem] = []
        return build(Train, {"steps": 1, "micro_batch": value}, (), problems), problems

    train, problems = read(3)
    assert not problems and train.micro_batch == 3
    for wrong in ("all", 2.5, True, None):
        _, problems = read(wrong)
        assert [path for path, _ in problems] == [("micro_batch",)], wrong
    assert read("all")[1] == [(("micro_batch",), "expected 'auto' or a whole number, got 'all'")]


def test_on_two_processes_the_smaller_memory_decides_for_both(
    tokenizer: str, texts: str, tmp_path: Path
) -> None:
    """Only rank 1 runs out, at 4 rows; nobody hangs, and both go on with 2."""
    script = tmp_path / "uneven.py"
    script.write_text(_UNEVEN)
    done = torchrun(str(script), tokenizer, texts)
    assert sorted(done.stdout.split()) == ["fits=2", "fits=2"], done.stderr


_UNEVEN = """
import sys
from trainer import models, probe, runtime
from trainer.config import Architecture, Model, Source
from trainer.data.stream import build_rows
from trainer.objectives.next_token import NextToken
import torch

tokenizer, texts = sys.argv[1:]
with runtime.start() as process:
    class Uneven(NextToken):
        def loss(self, model, batch, norm, log):
            if process.rank == 1 and batch.rows > 2:
                raise torch.OutOfMemoryError("injected")
            return super().loss(model, batch, norm, log)

    tokens = models.load_tokenizer(tokenizer)
    rows = build_rows((Source(path=texts),), tokens, sequence_length=64, packing=True)
    small = Architecture(hidden_size=32, layers=1, heads=2)
    plan = Model(init="random", tokenizer=tokenizer, architecture=small)
    model = models.load_model(plan, tokens, process, 0)
    fits = probe.largest_micro_batch(
        model, Uneven(), rows, process, limit=8, say=lambda line: None
    )
    sys.stdout.write(f"fits={fits}\\n")
    process.barrier()
runtime.leave(0)
"""
