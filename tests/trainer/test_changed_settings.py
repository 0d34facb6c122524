"""What the trainer does with a stage that goes on under other settings: what docs/run.md says of
each key (`launcher.difference.RULES`) holds here, by a checkpoint at half way that goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import in_folder
from trainer.checkpoint import CheckpointError
from trainer.config import Adapter, ConfigError, Data, Model, Source, StageConfig
from trainer.data import DataError

HALF, STEPS = 4, 8


@dataclass
class Half:
    """A stage with a checkpoint at half way. `go` goes on from a copy of it."""

    stage: StageConfig
    folder: Path
    run: Callable[..., Any]
    known: list[list[dict[str, Any]]]

    def same(self) -> list[dict[str, Any]]:
        """The step lines of going on with nothing changed."""
        if not self.known:
            self.known.append(self.go()[1])
        return self.known[0]

    def go(self, **changed: Any) -> tuple[Any, list[dict[str, Any]]]:
        """The outcome, and the step lines of what was done since, with other settings of `train`,
        or other blocks whole."""
        to = self.folder.with_name(f"again-{len(list(self.folder.parent.iterdir()))}")
        shutil.copytree(self.folder, to)
        blocks = {name: changed.pop(name) for name in ("model", "data") if name in changed}
        config = replace(in_folder(self.stage, to, steps=STEPS), **blocks)
        assert config.train is not None
        config = replace(config, train=replace(config.train, **changed))
        outcome = self.run(config, attempt=2)
        parts = sorted((to / "metrics").glob("*.jsonl"))
        lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
        outcome.folder = to
        return outcome, [x for x in lines if x["kind"] == "step" and x["attempt"] == 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("half") / "stage"


@pytest.fixture(scope="module")
def known() -> list[list[dict[str, Any]]]:
    return []


@pytest.fixture
def half(made: Path, stage: StageConfig, run_stage: Callable[..., Any], known: list[Any]) -> Half:
    if not made.exists():
        run_stage(in_folder(stage, made, steps=STEPS, until=HALF))
    assert json.loads((made / "run_meta.json").read_text())["global_step"] == HALF
    return Half(stage, made, run_stage, known)


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["train_loss"] for line in lines]


def rates(lines: list[dict[str, Any]]) -> list[float]:
    return [line["lr"] for line in lines]


def test_a_rate_and_a_length_hold_from_the_checkpoint_on(half: Half) -> None:
    same = half.same()
    _, slower = half.go(lr=3e-4)
    assert rates(slower) == pytest.approx([rate / 10 for rate in rates(same)])
    longer, lines = half.go(steps=12)
    assert longer.step == 12 and [line["global_step"] for line in lines] == list(range(5, 13))
    assert rates(lines)[0] > rates(same)[0], "the schedule is that of the new length"
    shorter, lines = half.go(steps=HALF - 1)
    assert (shorter.step, shorter.stopped, lines) == (HALF, None, []), "it is complete at once"


def test_a_group_cut_otherwise_is_the_same_training_and_another_size_is_warned_of(
    half: Half,
) -> None:
    same = half.same()
    outcome, cut = half.go(micro_batch=2, accumulate=2)
    assert losses(cut) == pytest.approx(losses(same), rel=1e-2)
    assert not [line for line in outcome.lines if "a step now takes" in line]
    for change in ({"micro_batch": 2}, {"accumulate": 2}):
        outcome, lines = half.go(**change)
        assert outcome.step == STEPS and len(lines) == STEPS - HALF
        assert [line for line in outcome.lines if "a step now takes" in line]


def test_when_to_save_and_to_evaluate_changes_no_number(half: Half) -> None:
    same = half.same()
    often, lines = half.go(save_every=2, evaluate_every=2, log_every=1, keep=5)
    assert losses(lines) == losses(same)
    assert (often.folder / "checkpoints" / "step-6").exists()
    assert not (half.go()[0].folder / "checkpoints" / "step-6").exists()


@pytest.mark.parametrize(
    "settings", [{"weight_decay": 10.0}, {"beta1": 0.1}, {"beta2": 0.1}, {"epsilon": 0.1}], ids=str
)
def test_the_optimizer_keeps_what_its_checkpoint_says(half: Half, settings: Any) -> None:
    assert losses(half.go(**settings)[1]) == losses(half.same())


def test_another_seed_is_taken_and_gives_the_rest_of_the_epoch_other_rows(half: Half) -> None:
    outcome, lines = half.go(seed=3)
    assert outcome.step == STEPS and losses(lines) != losses(half.same())


def test_rows_that_are_others_are_refused_and_the_same_ones_elsewhere_are_not(
    half: Half, tmp_path: Path
) -> None:
    text = Path(str(half.stage.data.train[0].path)).read_text()
    moved, shorter = tmp_path / "moved.jsonl", tmp_path / "shorter.jsonl"
    moved.write_text(text)
    shorter.write_text("".join(text.splitlines(keepends=True)[:-1]))
    data: Data = half.stage.data
    for other in (
        replace(data, sequence_length=64),
        replace(data, packing=False),
        replace(data, train=(Source(path=str(shorter)),)),
    ):
        with pytest.raises(DataError, match="the data changed"):
            half.go(data=other)
    with pytest.raises(DataError, match="the data changed"):
        half.go(limit_batches=2)
    same = losses(half.same())
    for other in (
        replace(data, train=(Source(path=str(moved)),)),
        replace(data, skip_bad=True),
        replace(data, validation=()),
    ):
        assert losses(half.go(data=other)[1]) == same


def test_other_weights_that_learn_or_another_shape_are_refused(half: Half) -> None:
    model = half.stage.model
    assert model is not None and model.architecture is not None
    with pytest.raises(CheckpointError, match=r"others \(the first one: model.embed_tokens.weight"):
        half.go(model=replace(model, freeze=("model.embed_tokens.weight",)))
    fewer = replace(model.architecture, layers=1)
    with pytest.raises(ConfigError, match="num_hidden_layers is 2 there, 1 here"):
        half.go(model=replace(model, architecture=fewer))
    with pytest.raises(ConfigError, match="holds a model, model"):
        half.go(model=Model(name=str(half.folder), adapter=Adapter()))


def test_a_model_of_the_same_shape_is_not_read_the_checkpoint_is(half: Half) -> None:
    model = half.stage.model
    assert model is not None and model.architecture is not None
    other = replace(model.architecture, rope_theta=50.0, dropout=0.0)
    assert losses(half.go(model=replace(model, architecture=other))[1]) == losses(half.same())


@pytest.mark.parametrize(
    "change", [{"precision": "bf16"}, {"precision": "fp16"}, {"attention": "eager"},
               {"gradient_checkpointing": True}], ids=str,
)  # fmt: skip
def test_how_it_is_computed_may_change_on_the_way(half: Half, change: Any) -> None:
    model = half.stage.model
    assert model is not None
    outcome, lines = half.go(model=replace(model, **change))
    assert outcome.step == STEPS
    assert losses(lines) == pytest.approx(losses(half.same()), rel=1e-2)
