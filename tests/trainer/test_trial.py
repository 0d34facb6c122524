"""The trial of a loaded model, on small models of families that do and do not pass it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.conftest import in_folder
from trainer import adapters, trial
from trainer.config import Adapter, ConfigError, Distill, Evaluate, Model, StageConfig, Targets
from trainer.models import PLAIN_ATTENTION, load_frozen, load_tokenizer
from trainer.runtime import Runtime

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
CLEAN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
    "mlp_only_layers": [0, 1],
}
LEAKY: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "mamba": {"state_size": 8},
    "qwen3_next": LINEAR,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_oss": {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
}
CPU = torch.device("cpu")


def tiny(kind: str, std: float = 0.3, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A small model of a family whose layers all matter: fresh ones hardly do beside the
    embedding. Its library picks the attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZE, **extra})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if std and parameter.ndim >= 2:
            nn.init.normal_(parameter, std=std)
    return model.to(dtype)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", CLEAN)
def test_families_that_keep_documents_apart_pass(kind: str, precision: Any) -> None:
    runtime = Runtime(CPU, precision)
    for dtype in {torch.float32, runtime.dtype}:
        model = tiny(kind, dtype=dtype, **CLEAN[kind])
        trial.check(model, runtime, kind, packing=True)
        trial.check(model, runtime, kind, packing=False)


@pytest.mark.parametrize("kind", LEAKY)
def test_families_that_leak_between_packed_documents_are_refused(kind: str) -> None:
    model = tiny(kind, **LEAKY[kind])
    with pytest.raises(ConfigError, match=r"'m': in packed rows .* set data\.packing: false$"):
        trial.check(model, Runtime(CPU, "fp32"), "m", packing=True)
    with torch.no_grad():
        assert trial.leak(model, Runtime(CPU, "fp32"), packing=True) > 0.3
    trial.check(model, Runtime(CPU, "fp32"), "m", packing=False)  # padding does not matter
    with pytest.raises(ConfigError, match=r"set data\.packing: false$"):
        trial.check(model.bfloat16(), Runtime(CPU, "bf16"), "m", packing=True)


@pytest.mark.parametrize("kind", [*CLEAN, *LEAKY])
def test_which_models_may_read_two_answers_in_one_row(kind: str) -> None:
    model = tiny(kind, **{**CLEAN, **LEAKY}[kind]).train()
    assert trial.may_share_rows(model, Runtime(CPU, "fp32")) == (kind in CLEAN)
    assert model.training
    bf16 = Runtime(CPU, "bf16")
    assert trial.may_share_rows(model.bfloat16(), bf16) == (kind in CLEAN)


@pytest.mark.parametrize("kind", LEAKY)
def test_the_leak_of_a_fresh_model_is_seen_too(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"set data\.packing: false$"):
        model = tiny(kind, std=0.0, **LEAKY[kind])
        trial.check(model, Runtime(CPU, "bf16"), "m", packing=True)


@pytest.mark.parametrize("kind", ["llama", "qwen3_next"])
def test_nothing_of_the_model_or_the_random_states_changes(kind: str) -> None:
    model = tiny(kind, **{**CLEAN, **LEAKY}[kind], attention_dropout=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    trial.check(model, Runtime(CPU, "fp32"), kind, packing=False)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_the_trial_looks_through_checkpointing_and_adapters(kind: str) -> None:
    model = tiny(kind, **{**CLEAN, **LEAKY}[kind])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = adapters.attach(model, Adapter(rank=2, dropout=0.5), "base").train()
    runtime = Runtime(CPU, "fp32")
    trial.check(wrapped, runtime, kind, packing=False)
    if kind == "llama":
        trial.check(wrapped, runtime, kind, packing=True)
        return
    with pytest.raises(ConfigError, match="would see each other"):
        trial.check(wrapped, runtime, kind, packing=True)


FALCON = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "lm_head_multiplier": 0.5,
}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("falcon_h1", FALCON),
        ("gemma2", {**WINDOW, "final_logit_softcapping": 30.0}),
        ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 8}),
    ],
)
@pytest.mark.parametrize("std", [0.3, 0.0])
def test_logits_that_are_rescaled_are_seen_however_small_they_are(
    kind: str, extra: dict[str, Any], std: float
) -> None:
    model = tiny(kind, std, **extra)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        runtime = Runtime(CPU, precision)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"^'m' rescales its logits: they differ by "):
            trial.check(model.to(dtype), runtime, "m", packing=False)


@pytest.mark.parametrize(
    ("kind", "extra", "field"),
    [
        ("falcon_h1", FALCON, "lm_head_multiplier"),
        ("gemma4", {"final_logit_softcapping": 2.0}, "final_logit_softcapping"),
    ],
)
def test_known_rescalings_are_named_those_of_a_text_configuration_too(
    kind: str, extra: dict[str, Any], field: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {**SIZE, **extra}
    if kind == "gemma4":
        text = {**size, "num_global_key_value_heads": 2, "global_head_dim": 8, "sliding_window": 4}
        text |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        vision = {**small, "num_attention_heads": 4}
        size = {"text_config": text, "vision_config": vision, "audio_config": None}
    config = AutoConfig.for_model(kind, **size)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"rescales its logits \({field}\); not supported$"):
        load_frozen(str(tmp_path), Runtime(CPU, "fp32"), PLAIN_ATTENTION)


def test_the_stages_refuse_such_a_model_until_packing_is_off(
    stage: StageConfig, tokenizer: str, run_stage: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "lfm2"
    tiny("lfm2", **{**LEAKY["lfm2"], "vocab_size": 258}).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    name, checkpointing = str(folder), Model(name=str(folder), gradient_checkpointing=True)
    train = replace(in_folder(stage, tmp_path / "out", steps=1, warmup=0), model=checkpointing)
    kd = replace(train, stage="kd", model=stage.model, kd=Distill(teacher=name))
    score = replace(stage, stage="evaluate", evaluate=Evaluate(models={"m": name}))
    store = replace(stage, stage="targets", targets=Targets(teacher=name, top_k=4))
    for number, made in enumerate((train, kd, score, store)):
        config = replace(made, output=str(tmp_path / str(number)))
        with pytest.raises(ConfigError, match=r"lfm2': in packed rows .* data\.packing: false$"):
            run_stage(config)
        run_stage(replace(config, data=replace(config.data, packing=False)))
