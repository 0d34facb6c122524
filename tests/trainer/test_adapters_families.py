"""Adapters on small models of the families in use: counts, files and merges, by arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.conftest import in_folder
from trainer import adapters
from trainer.config import Adapter, ConfigError, Model, StageConfig
from trainer.merge import logits
from trainer.models import load_pretrained, load_tokenizer

HIDDEN, WIDE, LAYERS, QUERY, KEY = 32, 64, 2, 4 * 8, 2 * 8
SIZE = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
#: (inputs + outputs) of the projections of one layer: the adapter's parameters for each rank.
SEPARATE = 2 * (HIDDEN + QUERY) + 2 * (HIDDEN + KEY)
MLP = 3 * (HIDDEN + WIDE)
FUSED = (HIDDEN + QUERY + 2 * KEY) + (QUERY + HIDDEN) + (HIDDEN + 2 * WIDE) + (WIDE + HIDDEN)


def tiny(kind: str, **extra: Any) -> Any:
    """A small model of a family, with the same random weights every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZE, **extra})
    return AutoModelForCausalLM.from_config(config).eval()


def attached(model: Any, adapter: Adapter) -> Any:
    """`model` with an adapter that does something: B begins as zeros."""
    wrapped = adapters.attach(model, adapter, "base")
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped.eval()


#: Four experts, gate and up in one matrix, and down; of Qwen's, 16 wide.
WIDE_EXPERTS = 4 * ((HIDDEN + 2 * WIDE) + (WIDE + HIDDEN))
NARROW_EXPERTS = 4 * ((HIDDEN + 2 * 16) + (16 + HIDDEN))
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = [
    ("llama", {}, Adapter(), SEPARATE + MLP),
    ("mistral", {}, Adapter(), SEPARATE + MLP),
    ("qwen3", {}, Adapter(), SEPARATE + MLP),
    ("gemma3_text", {}, Adapter(), SEPARATE + MLP),
    ("phi3", {}, Adapter(), FUSED),
    ("gpt_oss", EXPERTS, Adapter(), SEPARATE),
    ("gpt_oss", EXPERTS, Adapter(experts=True), SEPARATE + WIDE_EXPERTS),
    ("mixtral", EXPERTS, Adapter(experts=True, targets=("q_proj",)), HIDDEN + QUERY + WIDE_EXPERTS),
    ("qwen3_moe", QWEN, Adapter(targets=ATTENTION), SEPARATE),
    ("qwen3_moe", QWEN, Adapter(experts=True), SEPARATE + NARROW_EXPERTS),
]


@pytest.mark.parametrize(
    ("kind", "extra", "asked", "per_rank"),
    FAMILIES,
    ids=[f"{row[0]}{'-experts' * row[2].experts}" for row in FAMILIES],
)
def test_the_count_the_files_and_the_merge_of_a_family(
    kind: str, extra: dict[str, int], asked: Adapter, per_rank: int, tmp_path: Path
) -> None:
    adapter = replace(asked, rank=3, alpha=6)
    model = attached(tiny(kind, **extra), adapter)
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learns == 3 * per_rank * LAYERS

    prompts = [torch.arange(2, 34).view(1, -1), torch.full((1, 5), 7)]
    wanted = logits(model, prompts)
    plain = logits(tiny(kind, **extra), prompts)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(wanted, plain))

    adapters.save(model, tmp_path)
    again = adapters.load(tiny(kind, **extra), tmp_path).eval()
    assert all(torch.equal(a, b) for a, b in zip(logits(again, prompts), wanted))
    merged = logits(again.merge_and_unload(safe_merge=True), prompts)
    for a, b in zip(merged, wanted):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
def test_experts_that_stay_frozen_are_said_with_their_number(kind: str) -> None:
    model = tiny(kind, **EXPERTS)
    ends = {name.rpartition(".")[2] for name in adapters.target_layers(model, Adapter())}
    assert ends == set(ATTENTION)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    (line,) = adapters.left_out(adapters.attach(model, Adapter(), "base"))
    assert f"the experts stay frozen, {experts:,} parameters" in line and experts > 10_000
    assert line.endswith("; model.adapter.experts: true adapts them")
    assert adapters.left_out(adapters.attach(tiny("llama"), Adapter(), "base")) == []


def test_the_stage_says_that_experts_stay_frozen(
    stage: StageConfig, tokenizer: str, run_stage: Any, tmp_path: Path
) -> None:
    base = tmp_path / "experts"
    tiny("mixtral", **{**EXPERTS, "vocab_size": 258}).save_pretrained(base)
    load_tokenizer(tokenizer).save_pretrained(base)
    model = Model(name=str(base), adapter=Adapter(rank=2, targets=ATTENTION))
    config = in_folder(stage, tmp_path / "out", steps=1, warmup=0)
    outcome = run_stage(replace(config, model=model))
    assert any("the experts stay frozen" in line for line in outcome.lines)


def test_targets_that_go_only_together_are_one_line() -> None:
    size = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    groups = {"n_group": 1, "topk_group": 1, "v_head_dim": 8, "first_k_dense_replace": 1}
    model = tiny("deepseek_v3", **size, **ranks, **groups)
    with pytest.raises(ConfigError, match=r"model\.adapter\.targets: [^\n]*gate_proj[^\n]*up_proj"):
        adapters.attach(model, Adapter(targets=("gate_proj",)), "base")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (("llama", {"hidden_size": 64}), r"q_proj\S+ is \[2, 32\] in the adapter, \[2, 64\] here"),
        (("llama", {"num_hidden_layers": 1}), r"layers\.1\.\S+ has no place here \(14 such"),
        (("llama", {"num_hidden_layers": 3}), r"layers\.2\.\S+ is not in it \(14 such"),
        (("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}), "q_proj.* not found in the base"),
    ],
)
def test_an_adapter_of_another_base_is_one_line_that_says_so(
    base: Any, said: str, tmp_path: Path
) -> None:
    adapters.save(adapters.attach(tiny("llama"), Adapter(rank=2), "base"), tmp_path)
    kind, extra = base
    about = rf"^cannot load the adapter '[^\n]*': it was made for another base model: [^\n]*{said}"
    with pytest.raises(ConfigError, match=about):
        adapters.load(tiny(kind, **extra), tmp_path)


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot load the model '.*': the folder is empty$"):
        load_pretrained(str(tmp_path), torch.float32, "sdpa")
    with pytest.raises(ConfigError, match=r"^no tokenizer at '.*': the folder is empty$"):
        load_tokenizer(str(tmp_path))


def test_an_error_does_not_end_at_a_colon() -> None:
    long = "; ".join(f"part {number}" for number in range(90))
    assert adapters.one_line(ValueError("One of:\n  (a) this:\n  (b) that\nmore")) == (
        "One of: (a) this: (b) that"
    )
    text = adapters.one_line(ValueError(f"One of:\n{long}"))
    assert text.startswith("One of: part 0;") and text.endswith(" ...") and 150 < len(text) <= 200
    assert adapters.one_line(ValueError("Whole.\nMore")) == "Whole."
    assert adapters.one_line(ValueError()) == "ValueError"
