"""What a resumed run takes from its checkpoint, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import in_folder
from tests.trainer.disk import file_size_limit
from tests.trainer.test_loop import Faulty, lines
from trainer import stages
from trainer.checkpoint import CheckpointError, load_state
from trainer.config import StageConfig, Train
from trainer.loop import NonFiniteError
from trainer.optimizer import make_optimizer
from trainer.sharded import PARAMETERS
from trainer.shards import optimizer_state

Run = Callable[..., Any]


def use(monkeypatch: pytest.MonkeyPatch, objective: Any) -> None:
    """Make stage `pretrain` use another objective: a row of the table, as a plugin would."""
    monkeypatch.setitem(stages.STAGES, "pretrain", stages.train(lambda *_: objective))


def with_freeze(stage: StageConfig, *patterns: str) -> StageConfig:
    assert stage.model is not None
    return replace(stage, model=replace(stage.model, freeze=patterns))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((), ("model.layers.0.*",)),  # fewer learn
        (("model.layers.0.*",), ("model.layers.1.*",)),  # as many, of the same shapes
    ],
)
def test_other_parameters_that_learn_are_refused(
    before: tuple[str, ...],
    after: tuple[str, ...],
    stage: StageConfig,
    run_stage: Run,
    tmp_path: Path,
) -> None:
    """Moments have numbers, no names: they would go to other parameters without a word."""
    begun = in_folder(stage, tmp_path / "out", until=2)
    run_stage(with_freeze(begun, *before))
    with pytest.raises(CheckpointError, match=r"its optimizer holds \d+ parameters") as raised:
        run_stage(with_freeze(in_folder(stage, tmp_path / "out"), *after), attempt=2)
    line = str(raised.value)
    assert ".self_attn.q_proj.weight" in line and "model.freeze" in line
    assert "\n" not in line
    resumed = run_stage(with_freeze(in_folder(stage, tmp_path / "out", until=3), *before))
    assert resumed.step == 3


def stored(model: torch.nn.Module) -> dict[str, Any]:
    """The state of an optimizer after a step, as checkpoints without names have it."""
    optimizer = make_optimizer(model, Train(steps=1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"optimizer": optimizer.state_dict()}


def test_a_checkpoint_without_names_loads_where_it_fits(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model, Train(steps=1))
    state = stored(model)
    optimizer.load_state_dict(optimizer_state(tmp_path, state, model, optimizer))
    assert len(optimizer.state) == 2
    smaller = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(CheckpointError, match="holds 2 parameters, now 1 learn"):
        optimizer_state(tmp_path, state, smaller, make_optimizer(smaller, Train(steps=1)))
    with pytest.raises(CheckpointError, match=r"the first one: weight"):
        state[PARAMETERS] = [["weight", [3, 3]], ["bias", [2]]]
        optimizer_state(tmp_path, state, model, optimizer)


def test_a_last_pointer_that_a_kill_prevented_is_written_on_resume(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    config = in_folder(stage, tmp_path / "out", until=10, evaluate_every=5)
    run_stage(config)
    pointer = tmp_path / "out" / "checkpoints" / "last.json"
    whole = pointer.read_bytes()
    assert json.loads(whole)["val_loss"] is not None
    pointer.write_text(json.dumps({"v": 1, "step": 5, "path": "step-5", "val_loss": 9.0}))
    run_stage(config, attempt=2)
    assert pointer.read_bytes() == whole


@pytest.mark.parametrize("way", ["until", "saved"])
def test_a_step_that_is_not_finite_counts_across_a_resume(
    way: str,
    stage: StageConfig,
    run_stage: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last one before and the first one after are two in a row; also where the checkpoint was
    written before the flag of its step was due to be read."""
    use(monkeypatch, Faulty(nan=(3,)))
    run_stage(in_folder(stage, tmp_path / "out", until=4 if way == "until" else 5, save_every=4))
    if way == "saved":
        for path in (tmp_path / "out" / "checkpoints" / "step-5").iterdir():
            path.unlink()
    use(monkeypatch, Faulty(nan=(4,)))
    with pytest.raises(NonFiniteError, match="two steps in a row"):
        run_stage(in_folder(stage, tmp_path / "out", steps=6), attempt=2)


def test_a_crash_dump_without_room_does_not_hide_why_there_is_one(
    stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Faulty(nan=(0, 1)))
    said = "not finite in two steps in a row; .*crash dump was not written: disk full"
    with file_size_limit(30_000), pytest.raises(NonFiniteError, match=said):
        run_stage(in_folder(stage, tmp_path / "out"))


def test_the_clean_steps_of_the_loss_scale_go_on_counting(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    assert stage.model is not None
    stage = replace(stage, model=replace(stage.model, precision="fp16"))
    run_stage(in_folder(stage, tmp_path / "out", until=2, steps=5))
    run_stage(in_folder(stage, tmp_path / "out", steps=5), attempt=2)
    assert load_state(tmp_path / "out" / "checkpoints" / "step-5")["scaler"]["clean"] == 5


def test_a_worse_loss_after_a_resume_is_not_the_best(
    stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import evaluate

    losses = iter([4.0, 4.5, 4.6])
    monkeypatch.setattr(evaluate, "cross_entropy", lambda *a, **k: (next(losses), 10))
    stage = in_folder(stage, tmp_path / "out", steps=6, evaluate_every=2)
    run_stage(in_folder(stage, tmp_path / "out", until=2))
    run_stage(stage, attempt=2)
    best = json.loads((tmp_path / "out" / "checkpoints" / "best.json").read_text())
    assert (best["step"], best["val_loss"]) == (2, 4.0)
    assert [line["val_loss"] for line in lines(tmp_path / "out", "eval")] == [4.0, 4.5, 4.6]
