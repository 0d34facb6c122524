"""How a model's attention is chosen: by what its class has."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import in_folder
from tests.trainer.test_trial import LEAKY, tiny
from trainer import attention_kernels
from trainer.attention import FAST, OWN, attention_implementations, pick_attention, status
from trainer.config import (
    Adapter,
    Architecture,
    ConfigError,
    Evaluate,
    Export,
    Job,
    Merge,
    Model,
    StageConfig,
)
from trainer.loading import build, to_dict
from trainer.models import PLAIN_ATTENTION, load_pretrained, load_tokenizer
from trainer.runtime import Runtime

EVERY = ("flash_attention_2", *PLAIN_ATTENTION)
WITHOUT_FLASH = ("varlen", "flex", *PLAIN_ATTENTION)
FLASH = "flash_attention_2"
CONVOLVES = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "on_a_gpu", "elsewhere"),
    [
        ("llama", FLASH, "sdpa"),
        ("gemma3", FLASH, "sdpa"),
        ("gpt_oss", "eager", "eager"),
        ("granite_swa", "eager", "eager"),
        ("bloom", "eager", "eager"),
    ],
)
def test_auto_takes_the_best_that_a_class_has(kind: str, on_a_gpu: str, elsewhere: str) -> None:
    from transformers import AutoConfig

    configuration = AutoConfig.for_model(kind)
    assert pick_attention(configuration, EVERY) == on_a_gpu
    assert pick_attention(configuration, PLAIN_ATTENTION) == elsewhere


@pytest.mark.parametrize(
    ("kind", "settings", "takes"),
    [
        ("llama", {}, "varlen"),
        ("llama", {"attention_dropout": 0.1}, "sdpa"),
        ("llama", {"head_dim": 512}, "flex"),
        ("llama", {"head_dim": 8}, "varlen"),
        ("gpt_oss", {}, "flex"),  # sinks
        ("vaultgemma", {"attn_logit_softcapping": 50.0}, "flex"),
        ("lfm2", CONVOLVES, "flex"),  # convolutions, which see one flat row as one text
        ("qwen3_next", {}, "sdpa"),
        ("deepseek_v3", {}, "flex"),  # values narrower than queries
        ("bloom", {}, "eager"),
    ],
)
def test_auto_without_flash_attn_takes_what_is_right(
    kind: str, settings: dict[str, Any], takes: str
) -> None:
    from transformers import AutoConfig

    configuration = AutoConfig.for_model(kind, **settings)
    assert pick_attention(configuration, WITHOUT_FLASH) == OWN.get(takes, takes)


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next", "jamba", "falcon_h1", "granitemoehybrid"])
def test_models_with_state_never_get_a_flat_row(kind: str) -> None:
    from transformers import AutoConfig

    configuration = AutoConfig.for_model(kind, **(CONVOLVES if kind == "lfm2" else {}))
    assert pick_attention(configuration, EVERY) == "sdpa"
    for wanted in ("flash_attention_2", "flash_attention_3", "varlen"):
        with pytest.raises(
            ConfigError, match=r"\(its recurrent or conv.* row\); use auto or eager$"
        ):
            pick_attention(configuration, wanted)


@pytest.mark.parametrize(
    ("wanted", "kind", "settings", "words"),
    [
        ("varlen", "gpt_oss", {}, "its attention sinks would be left out"),
        ("flash_attention_3", "gpt_oss", {}, "its attention sinks would be left out"),
        ("varlen", "vaultgemma", {"attn_logit_softcapping": 50.0}, "its scores are capped"),
        ("varlen", "llama", {"attention_dropout": 0.1}, "its attention dropout would be left out"),
        ("flex", "gpt2", {"attn_pdrop": 0.1}, ""),
        ("flash_attention_3", "llama", {"attention_dropout": 0.1}, "its attention dropout would"),
        ("varlen", "llama", {"head_dim": 512}, "its heads of 512 are wider than 256"),
        ("flex", "llama", {"head_dim": 8}, "its heads of 8 are narrower than 16"),
    ],
)
def test_what_would_be_wrong_is_refused_with_its_reason(
    wanted: str, kind: str, settings: dict[str, Any], words: str
) -> None:
    from transformers import AutoConfig

    with pytest.raises(ConfigError) as error:
        pick_attention(AutoConfig.for_model(kind, **settings), wanted)
    assert f"does not run on {wanted}" in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_can_run_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what torch says of it, and which packages there are, is given here."""
    card = Runtime(torch.device("cuda"), "bf16")
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    there, find = {"triton"}, importlib.util.find_spec
    assert attention_kernels.has_varlen()

    def found(name: str, package: str | None = None) -> Any:
        return object() if name in there else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert attention_implementations(None, card) == WITHOUT_FLASH
    there |= {"flash_attn", "flash_attn_interface"}
    assert attention_implementations(None, card) == (*FAST, *PLAIN_ATTENTION)
    fp32 = replace(card, precision="fp32")
    assert attention_implementations(None, fp32) == ("flex", *PLAIN_ATTENTION)
    capability = (8, 9)
    assert attention_implementations(None, card) == (*FAST[1:], *PLAIN_ATTENTION)
    assert status("flash_attention_3", card) == "not usable (needs a Hopper GPU, this GPU has 8.9)"
    capability = (7, 5)
    assert attention_implementations(None, replace(card, precision="fp16")) == PLAIN_ATTENTION


@pytest.mark.parametrize("wanted", FAST)
def test_on_a_cpu_what_needs_a_gpu_is_one_line(wanted: Any) -> None:
    cpu = Runtime(torch.device("cpu"), "fp32")
    assert attention_implementations(None, cpu) == PLAIN_ATTENTION
    line = rf"^model\.attention: {wanted} is not usable \(no CUDA device\); use auto or sdpa$"
    with pytest.raises(ConfigError, match=line):
        attention_implementations(Model(name="m", attention=wanted), cpu)


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({"attention": "varlen", "precision": "fp32"}, "precision"),
        ({"attention": "flash_attention_2", "precision": "fp32"}, "precision"),
        ({"attention": "flex", "architecture": Architecture(dropout=0.1)}, "attention"),
        ({"float8": "torchao", "precision": "fp16"}, "float8"),
    ],
)
def test_settings_that_cannot_stand_together_are_refused(model: dict[str, Any], key: str) -> None:
    problems: list[Any] = []
    plain = {"init": "random", "tokenizer": "t", "architecture": Architecture(), **model}
    build(Job, {"run": "r", "schema": 1, "stages": [
        {"id": "s", "stage": "sft", "output": "/o", "model": to_dict(plain),
         "data": {"train": [{"path": "/d"}]}, "train": {"steps": 1}}]}, (), problems)  # fmt: skip
    assert [path[-1] for path, _ in problems] == [key]


def test_what_a_class_lacks_is_refused_when_it_is_asked_for() -> None:
    from transformers import AutoConfig

    with pytest.raises(
        ConfigError, match=r"^model\.attention: GptOss.* sinks .*use auto or eager$"
    ):
        pick_attention(AutoConfig.for_model("gpt_oss"), (FLASH,))
    for kind, wanted in (("gpt_oss", "sdpa"), ("bloom", FLASH)):
        with pytest.raises(ConfigError, match=rf"does not run on {wanted}; use auto or eager$"):
            pick_attention(AutoConfig.for_model(kind), (wanted,))


def test_what_is_no_language_model_is_one_line(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("clip").save_pretrained(tmp_path)
    about = rf"^cannot load the model '{tmp_path}': Transformers has no causal .* clip; choose"
    with pytest.raises(ConfigError, match=about):
        load_pretrained(str(tmp_path), torch.float32, PLAIN_ATTENTION)


def test_a_model_without_sdpa_goes_through_the_stages(
    stage: StageConfig, tokenizer: str, run_stage: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "oss"
    tiny("gpt_oss", **{**LEAKY["gpt_oss"], "vocab_size": 258}).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    made = replace(stage, data=replace(stage.data, packing=False))
    train = replace(in_folder(made, tmp_path / "out", steps=1, warmup=0), model=Model(str(folder)))
    score = replace(made, stage="evaluate", evaluate=Evaluate(models={"m": str(folder)}))
    out = replace(made, stage="export", export=Export(model=str(folder)))
    model = Model(str(folder), adapter=Adapter(rank=2, targets=("q_proj", "v_proj")))
    lora = replace(in_folder(made, tmp_path / "lora", steps=1, warmup=0), model=model)
    merged = replace(made, stage="merge", merge=Merge(adapter=str(tmp_path / "lora")))
    lines = run_stage(train).lines
    assert any(line.startswith("attention eager") for line in lines)
    run_stage(lora)
    for config in (score, out, merged):
        run_stage(replace(config, model=None, output=str(tmp_path / config.stage)))
    for name in ("export", "merge"):
        again = load_pretrained(str(tmp_path / name), torch.float32, PLAIN_ATTENTION)
        assert again.config.model_type == "gpt_oss"
