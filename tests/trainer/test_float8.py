"""Products in float8: which layers, when it pays, and torchao's own emulation of them on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests.trainer.conftest import in_folder
from tests.trainer.test_attention_kernels import gradients, rows
from tests.trainer.test_trial import CPU, tiny
from trainer import adapters, float8
from trainer.config import Adapter, ConfigError, Data, Model, Source, StageConfig, Train
from trainer.model_files import ModelFiles
from trainer.models import PLAIN_ATTENTION, load_pretrained, load_tokenizer
from trainer.runtime import Runtime

FP32 = Runtime(CPU, "fp32")
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TORCHAO = Model(name="m", float8="torchao")
#: (inputs, outputs) of the layers of one block.
LLAMA_8B = [(4096, 4096), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
SMALL = [(768, 768), (768, 768), (768, 3072), (3072, 768)]


def emulated(model: Any, plan: Model = TORCHAO) -> list[str]:
    return float8.convert(model, plan, FP32, tokens=36, steady=False, emulate=True)


def test_linear_layers_of_the_blocks_are_converted_and_nothing_else() -> None:
    model = tiny("qwen3_moe", **MOE)
    plain = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"]
    found = float8.convertible(model)
    assert set(plain) <= set(found)
    assert not [name for name in found if name.endswith((".gate", "lm_head"))]
    odd = tiny("llama", intermediate_size=40)  # 40 is no multiple of 16
    assert {name.rpartition(".")[2] for name in float8.convertible(odd)} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    wrapped = adapters.attach(tiny("llama"), Adapter(rank=16), "base")
    names = float8.convertible(wrapped)
    assert len(names) == 14 and all(name.endswith(".base_layer") for name in names)


def test_gradients_are_those_of_float32_up_to_the_rounding_of_float8() -> None:
    batch = rows()
    hidden, wanted = gradients(tiny("llama", std=0.1), batch)
    model = tiny("llama", std=0.1)
    lines = emulated(model)
    assert lines == ["float8: 14 linear layers multiply in it, by torchao"]
    close, found = gradients(model, batch)
    assert found.keys() == wanted.keys()
    assert 1e-3 < float((close - hidden).norm() / hidden.norm()) < 0.2
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.float32
        assert cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.97, name


def test_what_it_learns_is_what_float32_learns() -> None:
    batch = rows()
    losses = []
    for narrow in (False, True):
        model = tiny("llama", std=0.1)
        if narrow:
            emulated(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(20):
            logits = model(batch.input_ids, position_ids=batch.position_ids).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss))
    assert losses[0] < 2.0  # from 4.2
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_checkpoints_are_the_same_with_and_without(tmp_path: Path, tokenizer: str) -> None:
    tokens = load_tokenizer(tokenizer)
    model = tiny("llama", vocab_size=len(tokens))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    emulated(model)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    files = ModelFiles(model, tokens, False)
    files.write(tmp_path, files.tensors())
    again = load_pretrained(str(tmp_path), torch.float32, PLAIN_ATTENTION)
    assert again.state_dict().keys() == before.keys()
    for name, value in again.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name]), name
    assert len(emulated(again)) == 1  # and on from there


def test_adapters_learn_beside_a_base_in_float8() -> None:
    model = adapters.attach(tiny("llama"), Adapter(rank=4), "base")
    names = set(adapters.tensors(model))
    emulated(model, replace(TORCHAO, adapter=Adapter(rank=4)))
    assert set(adapters.tensors(model)) == names
    _, found = gradients(model, rows())
    assert found and all(".lora_" in name for name in found)
    assert all(float(found[name].abs().max()) > 0 for name in found if ".lora_B." in name)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "published"),
    [(1024, 2048, 1024, 0.80), (4096, 8192, 16384, 1.39)],
)
def test_the_gain_is_near_what_torchao_measured(
    tokens: int, inputs: int, outputs: int, published: float
) -> None:
    assert float8.gain([(inputs, outputs)], tokens) == pytest.approx(published, rel=0.12)


def test_auto_is_on_for_large_layers_and_many_tokens_only() -> None:
    assert float8.gain(LLAMA_8B, 8192) > float8.LEAST_GAIN
    assert float8.gain(LLAMA_8B, 256) < float8.LEAST_GAIN
    assert float8.gain(SMALL, 65536) < float8.LEAST_GAIN
    assert float8.slow(4096, 1024) and not float8.slow(4096, 4096)
    assert float8.gain([], 8192) == 0


def test_auto_says_why_it_is_off() -> None:
    plan = Model(name="m", float8="auto")
    card = Runtime(torch.device("cuda"), "bf16")
    model = tiny("llama")

    def said(plan: Model, compiled: bool, capability: tuple[int, int] = (9, 0)) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
            (line,) = float8.convert(model, plan, card, tokens=4096, steady=True, compiled=compiled)
        return line

    assert said(plan, True, (8, 0)) == (
        "float8 off: this GPU has compute capability 8.0, float8 needs 8.9"
    )
    assert "without model.compile" in said(plan, False)
    assert "learns nothing" in said(replace(plan, adapter=Adapter()), True)
    assert "it pays from 1.3x" in said(plan, True)
    assert {type(module) for module in model.modules() if hasattr(module, "in_features")} == {
        torch.nn.Linear
    }


def test_what_was_asked_for_and_cannot_run_is_one_line() -> None:
    model = tiny("llama")

    def refused(plan: Model, **options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            float8.convert(model, plan, FP32, tokens=16, steady=True, **options)
        return str(error.value)

    line = "model.float8: torchao cannot run here: there is no GPU; set it to off or auto"
    assert refused(TORCHAO) == line
    engine = replace(TORCHAO, float8="transformer_engine")
    assert refused(engine) == line.replace("torchao", "transformer_engine")
    assert refused(engine, emulate=True).startswith(
        'model.float8: transformer_engine is not installed; pip install "transformer-engine'
    )
    odd = tiny("llama", hidden_size=40, head_dim=10, intermediate_size=40)
    with pytest.raises(ConfigError, match=r"no linear layer .* multiples of 16; set it to off$"):
        float8.convert(odd, TORCHAO, FP32, tokens=16, steady=True, emulate=True)


def test_the_tokens_of_a_micro_batch() -> None:
    data = Data(train=(Source(path="x"),), sequence_length=1000)
    train = Train(steps=1, micro_batch=4)
    assert float8.micro_batch_tokens(train, data) == (4000, False)
    packed = replace(data, sequence_length=1024)
    auto = Train(steps=1, micro_batch="auto", global_batch=8)
    assert float8.micro_batch_tokens(auto, packed) == (1024, True)
    assert float8.micro_batch_tokens(train, replace(packed, packing=False)) == (4096, False)


def test_a_stage_says_so_and_trains_as_without(
    stage: StageConfig, run_stage: Any, tmp_path: Path
) -> None:
    assert stage.model is not None
    short = in_folder(stage, tmp_path / "off", steps=2, warmup=0)
    auto = replace(in_folder(short, tmp_path / "auto"), model=replace(stage.model, float8="auto"))
    off, on = run_stage(short), run_stage(auto)
    assert "float8 off: there is no GPU" in on.lines
    assert not [line for line in off.lines if "float8" in line]
    assert on.evaluation == off.evaluation
    asked = replace(auto, model=replace(stage.model, float8="torchao"), output=str(tmp_path / "x"))
    with pytest.raises(ConfigError, match=r"^model\.float8: torchao cannot run here: there is no"):
        run_stage(asked)
