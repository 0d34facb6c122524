"""Adapters on a base in NF4, on the CPU: bitsandbytes does the same there as on a GPU, slower."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import in_folder, torchrun
from tests.trainer.test_adapters_families import EXPERTS, tiny
from trainer import adapters, quantized
from trainer.__main__ import main
from trainer.checkpoint import resolve
from trainer.config import (
    Adapter,
    ConfigError,
    Evaluate,
    Job,
    Merge,
    Model,
    StageConfig,
    to_dict,
)
from trainer.merge import logits
from trainer.models import load_model, load_pretrained, load_tokenizer, parameter_count
from trainer.runtime import Runtime

Run = Callable[..., Any]
CPU = Runtime(torch.device("cpu"), "fp32")
NF4 = Adapter(rank=3, alpha=6, dropout=0.2, quantization="nf4")
#: Of the base: q, o [64, 64], k, v [32, 64], MLP 128 wide; two layers; 258 bytes of vocabulary.
BLOCK = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
SIZE = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture
def base(tokenizer: str, tmp_path: Path) -> str:
    folder = tmp_path / "base"
    tiny("llama", **SIZE).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def qlora(stage: StageConfig, base: str, tmp_path: Path) -> StageConfig:
    """8 steps that train an adapter with dropout on a base in NF4."""
    made = replace(stage, model=Model(name=base, adapter=NF4))
    return in_folder(made, tmp_path / "qlora", steps=8, lr=1e-2)


def weights(folder: object) -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = load_file(Path(resolve(str(folder))) / adapters.WEIGHTS)
    return stored


def loaded(base: str, tokenizer: str, **model: Any) -> Any:
    plan = Model(name=base, adapter=NF4, **model)
    return load_model(plan, load_tokenizer(tokenizer), CPU, 0)


def test_the_layers_that_an_adapter_reaches_are_4_bits_and_nothing_else(
    base: str, tokenizer: str
) -> None:
    model = loaded(base, tokenizer)
    packed = {n for n, p in model.named_parameters() if quantized.is_nf4(p)}
    assert {name.split(".")[-3] for name in packed} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert len(packed) == 2 * 7
    assert sum(quantized.elements(p) for n, p in model.named_parameters() if n in packed) == (
        2 * BLOCK
    )
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in learns) and len(learns) == 2 * len(packed)
    assert {p.dtype for n, p in model.named_parameters() if n not in packed} == {torch.float32}
    full = load_pretrained(base, torch.float32, "sdpa")
    assert parameter_count(model) == parameter_count(full) + sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_an_evaluation_computes_what_training_does(base: str, tokenizer: str) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would round an evaluated layer's scales, for good."""
    model = load_model(
        Model(name=base, adapter=replace(NF4, dropout=0.0)), load_tokenizer(tokenizer), CPU, 0
    )
    prompts = [torch.arange(2, 34).view(1, -1)]
    (trained,), (evaluated,) = logits(model.train(), prompts), logits(model.eval(), prompts)
    assert torch.equal(trained, evaluated)


def test_a_block_of_64_shares_a_scale_that_is_quantised_again(base: str, tokenizer: str) -> None:
    """Bytes: half a one for each weight, one for the scale of 64, and 4 for 256 of these."""
    model = loaded(base, tokenizer)
    held, full = 0, load_pretrained(base, torch.float32, "sdpa").state_dict()
    for name, parameter in model.named_parameters():
        if not quantized.is_nf4(parameter):
            continue
        from bitsandbytes.functional import dequantize_4bit

        held += quantized._bytes(parameter)
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        off = (dequantize_4bit(parameter.data, parameter.quant_state) - full[plain]).abs()
        largest = full[plain].view(-1, 64).abs().amax(1)
        # Two levels of NF4 are at most 0.304 of the largest value of a block apart.
        assert float((off.view(-1, 64).amax(1) / largest).max()) < 0.304 / 2 + 0.02
    scales = 2 * BLOCK // 64
    assert held == BLOCK + scales + sum(
        4 * (-(-n // 64 // 256)) + 4 for n in [4096, 2048, 2048, 4096, 8192, 8192, 8192] * 2
    )


def test_it_learns_and_its_checkpoint_is_an_adapter_of_the_full_model(
    qlora: StageConfig, base: str, run_stage: Run, tmp_path: Path
) -> None:
    outcome = run_stage(qlora)
    said = next(line for line in outcome.lines if line.startswith("nf4: "))
    assert f"nf4: {2 * BLOCK:,} of " in said
    config = json.loads((Path(resolve(qlora.output)) / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == base
    assert outcome.evaluation["parameters"] == parameter_count(
        load_pretrained(base, torch.float32, "sdpa")
    ) + sum(tensor.numel() for tensor in weights(qlora.output).values())
    mask = json.loads((Path(qlora.output) / "frozen_mask.json").read_text())
    assert mask["parameters"] == outcome.evaluation["parameters"]

    compare = Evaluate(models={"base": base, "qlora": f"{qlora.output}@last"})
    table = run_stage(
        StageConfig("c", "evaluate", str(tmp_path / "c"), data=qlora.data, evaluate=compare)
    ).evaluation
    assert table["qlora.val_loss"] < table["base.val_loss"] - 0.05
    # The full-precision base is another model than the one trained on, by the rounding alone.
    assert 0 < abs(table["qlora.val_loss"] - outcome.evaluation["val_loss"]) < 0.02
    read = load_pretrained(qlora.output, torch.float32, "sdpa")
    assert not any(quantized.is_nf4(p) for p in read.parameters())


def test_resume_equals_the_undisturbed_run_bit_for_bit(
    qlora: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    parts = in_folder(qlora, tmp_path / "parts", until=4)
    run_stage(qlora)
    run_stage(parts)
    run_stage(in_folder(qlora, tmp_path / "parts"), attempt=2)
    ours, theirs = weights(qlora.output), weights(tmp_path / "parts")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["nf4", "experts"])
def test_a_step_does_not_depend_on_how_it_is_cut(
    kind: str, qlora: StageConfig, tokenizer: str, run_stage: Run, tmp_path: Path
) -> None:
    model = Model(name=str(qlora.model and qlora.model.name), adapter=replace(NF4, dropout=0.0))
    if kind == "experts":
        folder = tmp_path / "experts"
        tiny("mixtral", **{**EXPERTS, "vocab_size": 258}).save_pretrained(folder)
        load_tokenizer(tokenizer).save_pretrained(folder)
        model = Model(name=str(folder), adapter=Adapter(rank=3, experts=True))
    config = replace(qlora, model=model)
    for micro_batch in (8, 1):
        cut = in_folder(config, tmp_path / str(micro_batch), steps=2, micro_batch=micro_batch,
                        accumulate=8 // micro_batch)  # fmt: skip
        run_stage(cut)
    whole, parts = weights(tmp_path / "8"), weights(tmp_path / "1")
    assert all(torch.allclose(whole[name], parts[name], atol=2e-5) for name in whole)
    assert any(bool(tensor.any()) for name, tensor in whole.items() if "lora_B" in name)


def test_gradient_checkpointing_and_bf16(
    qlora: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    assert qlora.model is not None
    run_stage(qlora)
    thrifty = replace(qlora, model=replace(qlora.model, gradient_checkpointing=True))
    run_stage(in_folder(thrifty, tmp_path / "thrifty"))
    ours, theirs = weights(qlora.output), weights(tmp_path / "thrifty")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    half = replace(qlora, model=replace(qlora.model, precision="bf16"))
    outcome = run_stage(in_folder(half, tmp_path / "half"))
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.float32}
    assert math.isfinite(outcome.evaluation["val_loss"])


def test_an_adapter_of_nf4_is_merged_into_the_full_model(
    qlora: StageConfig, base: str, run_stage: Run, tmp_path: Path
) -> None:
    run_stage(qlora)
    merge = StageConfig("m", "merge", str(tmp_path / "m"), merge=Merge(adapter=qlora.output))
    facts = run_stage(merge).evaluation
    assert facts["max_difference"] < 1e-6 < facts["adapter_effect"]
    assert facts["merged_tensors"] == 14
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    # Its base in 4 bits, as other tools save it, is refused.
    saved = tmp_path / "saved"
    options = quantized.nf4_options(base, tiny("llama", **SIZE).config, CPU)
    load_pretrained(base, torch.float32, "sdpa", options).save_pretrained(saved)
    with pytest.raises(ConfigError, match=r"is quantised \(bitsandbytes\).*merge\.base"):
        run_stage(replace(merge, merge=Merge(adapter=qlora.output, base=str(saved))))
    with pytest.raises(ConfigError, match=r"is quantised already \(bitsandbytes\); name the full"):
        run_stage(replace(qlora, model=Model(name=str(saved), tokenizer=base, adapter=NF4)))


def test_experts_in_one_tensor_are_refused_with_their_number(
    tokenizer: str, tmp_path: Path
) -> None:
    model = tiny("gpt_oss", **{**EXPERTS, "vocab_size": 258})
    model.save_pretrained(tmp_path)
    load_tokenizer(tokenizer).save_pretrained(tmp_path)
    count = 2 * 4 * (32 * 128 + 64 * 32)
    with pytest.raises(ConfigError, match=rf"one tensor: {count:,} parameters \(\d\d%\)"):
        loaded(str(tmp_path), tokenizer)


def test_without_bitsandbytes_the_job_ends_before_its_first_stage(
    stage: StageConfig, qlora: StageConfig, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    job = tmp_path / "job.json"
    job.write_text(json.dumps(to_dict(Job(run="r", stages=(stage, qlora)))))
    assert main(["run", str(job)]) == 64
    said = (
        'stage tiny: model.adapter.quantization: nf4 needs bitsandbytes: pip install "launch-llm['
    )
    assert said in capsys.readouterr().err
    assert not Path(stage.output).exists()


def test_two_workers_train_as_one_does(qlora: StageConfig, run_stage: Run, tmp_path: Path) -> None:
    assert qlora.model is not None
    adapter = replace(NF4, dropout=0.0)
    plain = replace(qlora, model=replace(qlora.model, adapter=adapter))
    one = in_folder(plain, tmp_path / "one", steps=2, micro_batch=8)
    run_stage(one)
    two = in_folder(plain, tmp_path / "two", steps=2, micro_batch=4)
    job = tmp_path / "job.json"
    job.write_text(json.dumps(to_dict(Job(run="r", stages=(two,)))))
    done = torchrun("-m", "trainer", "run", str(job))
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = weights(one.output), weights(two.output)
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-5) for name in ours)
