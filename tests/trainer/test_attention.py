"""How a model's attention is chosen: by what its class has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import in_folder
from tests.trainer.test_trial import LEAKY, tiny
from trainer.config import Adapter, ConfigError, Evaluate, Export, Merge, Model, StageConfig
from trainer.models import PLAIN_ATTENTION, load_pretrained, load_tokenizer, pick_attention

EVERY = ("flash_attention_2", *PLAIN_ATTENTION)
FLASH = "flash_attention_2"


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
