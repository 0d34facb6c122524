"""Freezing by name: what really stays, what is said about it, and bad patterns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import in_folder
from trainer.checkpoint import resolve
from trainer.config import Adapter, ConfigError, Model, StageConfig, Train
from trainer.freeze import freeze, frozen_mask
from trainer.optimizer import make_optimizer
from trainer.shrink import shrink

Run = Callable[..., Any]


def with_freeze(stage: StageConfig, *patterns: str) -> StageConfig:
    assert stage.model is not None
    return replace(stage, model=replace(stage.model, freeze=patterns))


def weights(config: StageConfig) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(Path(resolve(config.output)) / "model.safetensors")
    return found


def untied(stage: StageConfig) -> StageConfig:
    assert stage.model is not None and stage.model.architecture is not None
    architecture = replace(stage.model.architecture, tie_embeddings=False)
    return replace(stage, model=replace(stage.model, architecture=architecture))


def test_what_is_frozen_stays_and_the_rest_learns(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    config = with_freeze(untied(stage), "model.layers.0.*", "model.embed_tokens.weight")
    first = in_folder(config, tmp_path / "first", steps=1)
    later = in_folder(config, tmp_path / "later", steps=6)
    run_stage(first)
    outcome = run_stage(later)
    before, after = weights(first), weights(later)
    mask = json.loads((tmp_path / "later" / "frozen_mask.json").read_text())
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == set(mask["frozen"]["names"])
    assert {name for name in same if ".layers." in name} == {
        name for name in before if ".layers.0." in name
    }
    sizes = {name: tensor.numel() for name, tensor in after.items()}
    assert mask["frozen"]["parameters"] == sum(sizes[name] for name in same)
    assert mask["parameters"] == sum(sizes.values())
    assert mask["frozen"]["share"] + mask["trainable"]["share"] == pytest.approx(1)
    assert any(line.startswith("trainable: ") for line in outcome.lines)


def test_a_frozen_run_resumes_bit_for_bit(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    config = with_freeze(stage, "*mlp*")
    whole = in_folder(config, tmp_path / "whole", steps=6)
    run_stage(whole)
    run_stage(in_folder(config, tmp_path / "parts", steps=6, until=3))
    parts = in_folder(config, tmp_path / "parts", steps=6)
    run_stage(parts, attempt=2)
    ours, theirs = weights(whole), weights(parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_frozen_head_and_embedding_pass_gradients_on(
    stage: StageConfig, run_stage: Run
) -> None:
    outcome = run_stage(with_freeze(stage, "lm_head.weight"))
    mask = json.loads((Path(stage.output) / "frozen_mask.json").read_text())
    assert mask["tied"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert mask["frozen"]["names"] == ["model.embed_tokens.weight"]
    wanted = "freezing lm_head.weight freezes model.embed_tokens.weight: they are tied"
    assert wanted in outcome.lines
    assert outcome.evaluation["val_loss"] < 5.4  # of ln(258) = 5.55


def test_only_what_learns_is_in_the_optimizer() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(4, 2)})
    freeze(model, ["a.*"])
    groups = make_optimizer(model, Train(steps=1, weight_decay=0.5)).param_groups
    assert [(g["weight_decay"], [p.numel() for p in g["params"]]) for g in groups] == [
        (0.5, [8]),
        (0.0, [2]),
    ]
    assert frozen_mask(model)["trainable"]["names"] == ["b.weight", "b.bias"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("model.layer.0.mlp.*", "there is model.layers.*"),
        ("model.embed_token.weight", "there is model.embed_tokens.weight"),
        ("*", "nothing is left to train"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(
    pattern: str, said: str, stage: StageConfig, run_stage: Run
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_stage(with_freeze(stage, pattern))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_patterns_reach_the_adapter_of_a_layer(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    base = in_folder(stage, tmp_path / "base", steps=1)
    run_stage(base)
    model = Model(name=base.output, adapter=Adapter(rank=2), freeze=("model.layers.0.*",))
    run_stage(in_folder(replace(stage, model=model), tmp_path / "lora", steps=1))
    mask = json.loads((tmp_path / "lora" / "frozen_mask.json").read_text())
    assert mask["trainable"]["names"]
    assert all(name.startswith("model.layers.1.") for name in mask["trainable"]["names"])
    assert "model.layers.0.mlp.up_proj.lora_A.weight" in mask["frozen"]["names"]
    assert "model.layers.0.mlp.up_proj.weight" in mask["frozen"]["names"]


def test_a_dry_run_takes_patterns_that_count_the_layers_of_a_large_model(
    stage: StageConfig,
) -> None:
    config, _ = shrink(with_freeze(stage, "model.layers.1[0-9].*", "model.layers.27.mlp.*"), set())
    assert config.model is not None
    assert config.model.freeze == ("model.layers.0.*", "model.layers.0.mlp.*")


@pytest.mark.parametrize(
    ("pattern", "small"),
    [
        ("*layers.0*proj*", "*layers.0*proj*"),
        ("*.layers.17*norm*", "*.layers.0*norm*"),
        ("model.layers.[!0]*.weight", "model.layers.0*.weight"),
        ("model.layers.1?.*", "model.layers.0.*"),
        ("*.[qk]_proj.weight", "*.[qk]_proj.weight"),
        ("*.2_norm.weight", "*.2_norm.weight"),
        ("model.layers.12", "model.layers.0"),
    ],
)
def test_only_what_counts_layers_is_rewritten(pattern: str, small: str, stage: StageConfig) -> None:
    config, _ = shrink(with_freeze(stage, pattern), set())
    assert config.model is not None and config.model.freeze == (small,)


def test_a_dry_run_quotes_the_pattern_that_was_written(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    config, _ = shrink(with_freeze(stage, "model.layers.17.mpl.*"), set())
    with pytest.raises(ConfigError, match=r"'model\.layers\.17\.mpl\.\*' matches no parameter"):
        run_stage(config, dry_run=True)
    good = with_freeze(stage, "*layers.0*proj*", "*.[qk]_proj.weight")
    config, _ = shrink(replace(good, output=str(tmp_path / "good")), set())
    assert run_stage(config, dry_run=True).stopped is None
