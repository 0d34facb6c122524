"""A model with a vision tower: its language model is trained, the tower stays as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import in_folder
from tests.trainer.test_trial import SIZE
from trainer import adapters
from trainer.checkpoint import resolve
from trainer.config import Adapter, ConfigError, Merge, Model, StageConfig
from trainer.models import PLAIN_ATTENTION, load_pretrained, load_tokenizer

HIDDEN, WIDE, QUERY, KEY = 32, 48, 32, 16
#: (inputs + outputs) of the projections of one layer of the language model.
PER_RANK = 2 * (HIDDEN + QUERY) + 2 * (HIDDEN + KEY) + 3 * (HIDDEN + WIDE)


@pytest.fixture
def sighted(tmp_path: Path, tokenizer: str) -> str:
    """A Gemma 3 with as many layers in its vision tower as in its language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    text = {**SIZE, "vocab_size": 258, "sliding_window": 4, "query_pre_attn_scalar": 8}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma3")
    load_tokenizer(tokenizer).save_pretrained(tmp_path / "gemma3")
    return str(tmp_path / "gemma3")


@pytest.mark.parametrize("targets", ["auto", ("q_proj", "v_proj")])
def test_an_adapter_is_trained_read_and_merged(
    targets: Any, sighted: str, stage: StageConfig, run_stage: Any, tmp_path: Path
) -> None:
    model = Model(name=sighted, adapter=Adapter(rank=2, alpha=64, targets=targets))
    config = replace(in_folder(stage, tmp_path / "lora", steps=3, warmup=0), model=model)
    outcome = run_stage(config)
    assert any("model.vision_tower" in line and "frozen" in line for line in outcome.lines)
    folder = Path(resolve(config.output))
    written = load_file(folder / adapters.WEIGHTS)
    per_rank = PER_RANK if targets == "auto" else 2 * HIDDEN + QUERY + KEY
    assert sum(t.numel() for t in written.values()) == 2 * 2 * per_rank
    assert all("language_model" in name and "vision" not in name for name in written)

    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(sighted)
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        before = plain.eval()(input_ids=ids).logits
        plain.load_adapter(str(folder))  # as Transformers reads it
        wanted = plain.eval()(input_ids=ids).logits
    assert not torch.allclose(before, wanted, atol=1e-5)
    merged = replace(stage, stage="merge", model=None, output=str(tmp_path / "merged"))
    run_stage(replace(merged, merge=Merge(adapter=str(folder), base=sighted)))
    with torch.no_grad():
        for name in (str(folder), merged.output):
            found = load_pretrained(name, torch.float32, PLAIN_ATTENTION).eval()
            assert torch.allclose(found(input_ids=ids).logits, wanted, atol=1e-5)


def test_targets_in_the_vision_tower_alone_are_none(sighted: str) -> None:
    model = load_pretrained(sighted, torch.float32, PLAIN_ATTENTION)
    assert any(name.endswith("self_attn.out_proj") for name, _ in model.named_modules())
    with pytest.raises(ConfigError, match="no linear layer 'out_proj'; did you mean 'o_proj'"):
        adapters.target_layers(model, Adapter(targets=("out_proj",)))


def test_without_an_adapter_only_the_language_model_learns(
    sighted: str, stage: StageConfig, run_stage: Any, tmp_path: Path
) -> None:
    config = in_folder(stage, tmp_path / "full", steps=2, warmup=0)
    outcome = run_stage(replace(config, model=Model(name=sighted)))
    said = [line for line in outcome.lines if line.startswith("frozen: ")]
    (line,) = said
    assert "model.multi_modal_projector, model.vision_tower, " in line
    before, after = (load_pretrained(n, torch.float32, "sdpa") for n in (sighted, config.output))
    kept, changed = 0, 0
    for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters()):
        if "language_model" in name:
            changed += not torch.equal(one, other)
        else:
            kept += other.numel()
            assert torch.equal(one, other), name
    assert changed > 10 and f" {kept:,} parameters" in line
