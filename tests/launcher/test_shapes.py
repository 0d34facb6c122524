"""The shapes of models: exact numbers of parameters, from whatever this machine knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import shapes, speed
from launcher.spec import Stage
from trainer.config import Architecture, Distill, Evaluate, Export, Merge, Model, Sdce, Tokenizer

#: What the makers' own pages and files say.
PARAMETERS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "openai/gpt-oss-20b": 20_914_757_184,
}
TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
}  # fmt: skip
MIXED = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_the_table_gives_exact_numbers_of_parameters(name: str, parameters: int) -> None:
    shape = shapes.of_reference(name, Path())
    assert shape is not None
    assert shape.parameters == parameters
    assert "as of 2026" in shape.source


def test_a_token_passes_through_few_experts() -> None:
    shape = shapes.of_reference("Qwen/Qwen3-30B-A3B", Path())
    assert shape is not None
    met = speed.forward_flops(shape, context=0) / 2
    looked_up = shape.vocabulary * shape.hidden  # what is published counts the embedding too
    assert met + looked_up == pytest.approx(3.35e9, rel=0.01)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
        ("mixtral", MIXED),
        ("gpt_oss", MIXED),
    ],
)
def test_tensors_are_those_that_transformers_makes(
    family: str, more: dict[str, Any], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **TINY, **more)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shapes.of_reference(str(tmp_path), Path())
    assert shape is not None
    assert shape.tensors() == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_an_unknown_model_has_no_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "mamba"}))
    assert shapes.of_reference(str(tmp_path), Path()) is None
    assert shapes.of_reference("someone/unheard-of", Path()) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    assert shapes.of_reference(str(tmp_path), Path()) is None


def test_the_hubs_cache_comes_before_the_table(no_cache: Path) -> None:
    root = no_cache / "models--Qwen--Qwen3-8B"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    (root / "snapshots" / "abc").mkdir(parents=True)
    config = {**TINY, "model_type": "qwen3", "tie_word_embeddings": True}
    (root / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    shape = shapes.of_reference("Qwen/Qwen3-8B", Path())
    assert shape is not None
    assert (shape.hidden, shape.tied) == (32, True)
    assert "cache" in shape.source


def test_a_stages_folder_is_its_newest_or_best_checkpoint(tmp_path: Path) -> None:
    for step, layers in ((10, 2), (20, 3)):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        config = {**TINY, "model_type": "llama", "num_hidden_layers": layers}
        (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints" / "last.json").write_text('{"step": 20}')
    (tmp_path / "checkpoints" / "best.json").write_text('{"step": 10}')
    found = [shapes.of_reference(f"{tmp_path}{end}", Path()) for end in ("", "@last", "@best")]
    assert [shape and shape.layers for shape in found] == [3, 3, 2]


def test_an_adapter_has_the_shape_of_its_base(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    shape = shapes.of_reference(str(tmp_path), Path())
    assert shape is not None and shape.parameters == PARAMETERS["Qwen/Qwen3-0.6B"]


def test_an_architecture_takes_its_vocabulary_from_the_tokenizers_file(tmp_path: Path) -> None:
    content = {
        "model": {"vocab": {"a": 0, "b": 1, "<s>": 2}},
        "added_tokens": [{"content": "<s>"}, {"content": "<pad>"}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    model = Model(init="random", architecture=Architecture(), tokenizer=str(tmp_path))
    shape = shapes.of_model(model, Path())
    assert shape is not None
    assert (shape.vocabulary, shape.intermediate) == (4, 704)
    nowhere = Model(init="random", architecture=Architecture(), tokenizer="someone/unheard-of")
    assert shapes.of_model(nowhere, Path()) is None


def test_stages_of_a_recipe_know_the_shapes_of_each_other() -> None:
    small = Model(init="random", architecture=Architecture(layers=2), tokenizer="${stage:tok}")
    student = Model(name="${stage:teacher}@best")
    stages = (
        Stage("tok", "tokenizer", tokenizer=Tokenizer(vocab_size=2048)),
        Stage("teacher", "pretrain", model=small),
        Stage("kd", "kd", model=student, kd=Distill(teacher="${stage:teacher}")),
        Stage("guided", "sdce", model=small, sdce=Sdce("${stage:kd}@best")),
        Stage("merged", "merge", merge=Merge(adapter="${stage:kd}")),
        Stage("out", "export", export=Export(model="${stage:merged}")),
        Stage("compare", "evaluate", evaluate=Evaluate(models={"a": "${stage:out}", "b": "x/y"})),
    )
    found = {stage.id: shapes.of_stage(stage, stages, Path()) for stage in stages}
    assert found["kd"]["teacher"] == found["kd"]["model"] == found["teacher"]["model"]
    assert found["kd"]["model"].vocabulary == 2048
    assert found["guided"]["teacher"] == found["kd"]["model"]
    assert found["compare"] == {"evaluate.a": found["teacher"]["model"]}
    circle = (Stage("a", "sft", model=Model(name="${stage:b}")),
              Stage("b", "sft", model=Model(name="${stage:a}")))  # fmt: skip
    assert shapes.of_stage(circle[0], circle, Path()) == {}
