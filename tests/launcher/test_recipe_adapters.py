"""Adapters, freezing, merge and export as recipes say them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.schema import json_schema
from tests.launcher.test_recipe import SINGLE, at, load, problems

assert at  # a fixture: tests name it

ADAPTED = SINGLE.replace("{name: org/model}", "{name: org/model, adapter: {rank: 8}}")
EXPORT = "launch: 1\nname: one\nstage: export\nexport: {model: ./m, to: %s}\n"


@pytest.mark.parametrize(
    ("written", "read"), [("auto", "auto"), ("[q_proj, v_proj]", ("q_proj", "v_proj"))]
)
def test_targets_are_a_word_or_a_list(at: Path, written: str, read: object) -> None:
    (stage,) = load(ADAPTED.replace("rank: 8", f"rank: 8, targets: {written}")).stages
    assert stage.model is not None and stage.model.adapter is not None
    assert (stage.model.adapter.rank, stage.model.adapter.alpha) == (8, 32.0)
    assert stage.model.adapter.targets == read


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("rank: 8", "rank: 0", "model.adapter.rank: must be at least 1"),
        ("rank: 8", "targets: all", "model.adapter.targets: expected 'auto' or a list, got 'all'"),
        ("rank: 8", "targets: []", "model.adapter.targets: must name at least one layer"),
        ("rank: 8", "type: dora", "'dora' is not allowed; did you mean 'lora'"),
        ("name: org/model", "init: random, name: a/b", "model.adapter: needs `init: pretrained`"),
        ("rank: 8", "experts: true, dropout: 0.1", "model.adapter.experts: needs `dropout: 0`"),
        ("rank: 8", "experts: true, quantization: nf4", "quantization: nf4 does not reach experts"),
        ("rank: 8", "quantization: nf8", "'nf8' is not allowed; did you mean 'nf4'"),
        ("adapter: {rank: 8}", "freeze: lm_head", "model.freeze: expected a list, got 'lm_head'"),
    ],
)
def test_wrong_adapters_are_told_where_they_are(at: Path, old: str, new: str, what: str) -> None:
    (problem,) = problems(ADAPTED.replace(old, new))
    assert problem.startswith("r.yaml:4:") and what in problem


def test_weights_in_4_bits_cannot_be_shared(at: Path) -> None:
    quantised = ADAPTED.replace("rank: 8", "rank: 8, quantization: nf4")
    assert quantised != ADAPTED
    (problem,) = problems(quantised.replace("lr: 1e-4", "lr: 1e-4, parallel: fsdp"))
    assert "train.parallel: fsdp cannot share quantised weights" in problem
    assert "nf4" in problem and "use ddp or auto" in problem
    load(quantised)


def test_an_export_goes_to_a_folder_beside_its_recipe_or_to_the_hub(at: Path) -> None:
    (at / "m").mkdir()
    (stage,) = load(EXPORT % "out").stages
    assert stage.export is not None
    assert (stage.export.model, stage.export.to) == (str(at / "m"), str(at / "out"))
    (stage,) = load(EXPORT % "hub:me/model").stages
    assert stage.export is not None and stage.export.to == "hub:me/model"
    (stage,) = load(EXPORT % "gs://bucket/x").stages
    assert stage.export is not None and stage.export.to == "gs://bucket/x"
    (problem,) = problems(EXPORT % "ftp://host/x")
    assert "export.to: must be a folder" in problem


def test_a_gguf_file_is_no_model_for_another_stage(at: Path) -> None:
    (at / "m").mkdir()
    text = """launch: 1
name: two
pipeline:
  - {id: file, stage: export, export: {model: ./m, format: gguf, quantize: q8_0}}
  - {id: again, stage: export, export: {model: "${stage:file}"}}
"""
    (problem,) = problems(text)
    assert problem.startswith("r.yaml:5:") and "writes a GGUF file, which is not read" in problem
    (problem,) = problems((EXPORT % "out").replace("to:", "format: gguf, quantize: q4_k_m, to:"))
    assert problem.startswith("r.yaml:4:") and "llama-quantize NAME-F16.gguf NAME-Q4_K_M" in problem


def test_a_merge_may_say_its_base_as_a_path(at: Path) -> None:
    text = "launch: 1\nname: one\nstage: merge\nmerge: {adapter: a/lora, base: ./base}\n"
    (at / "base").mkdir()
    (stage,) = load(text).stages
    assert stage.merge is not None
    assert (stage.merge.adapter, stage.merge.base) == ("a/lora", str(at / "base"))
    (problem,) = problems(text.replace("adapter: a/lora, ", ""))
    assert "merge: missing key `adapter`" in problem


def test_the_schema_takes_both_forms_of_targets() -> None:
    targets = json_schema()["$defs"]["Adapter"]["properties"]["targets"]
    kinds = {option.get("type") for option in targets["anyOf"]}
    assert {"string", "array"} <= kinds
