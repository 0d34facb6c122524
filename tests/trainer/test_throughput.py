"""MFU by the published formula, and a GPU's readings where NVML gives them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import throughput
from trainer.config import Source
from trainer.data.stream import Rows, build_rows
from trainer.models import load_tokenizer
from trainer.runtime import Runtime


def model(tie: bool, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tie}
    return LlamaForCausalLM(LlamaConfig(**{**size, **heads, **changes}))


def rows_of(tokenizer: str, texts: str, packing: bool = True) -> Rows:
    tokens = load_tokenizer(tokenizer)
    return build_rows((Source(path=texts),), tokens, sequence_length=128, packing=packing)


@pytest.mark.parametrize("tie", [True, False])
def test_flops_follow_the_formula_of_palm(tie: bool) -> None:
    """By hand: the head counts once, whether it is tied or not; a look-up does not."""
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # q and o, k and v, the feed-forward part
    products = 2 * layer + 100 * 32
    expected = 6 * products + 12 * 2 * 4 * 8 * 50
    assert throughput.flops_per_token(model(tie), 50) == expected


def test_they_agree_with_the_counter_of_torch() -> None:
    """One document of 64 tokens: torch counts the same products, forward and backward, but for the
    first layer's input, which needs no gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    network = model(False, attn_implementation="eager")
    ids = torch.randint(100, (1, 64))
    with FlopCounterMode(display=False) as counter:
        network(ids, use_cache=False).logits.sum().backward()
    counted = counter.get_total_flops() / 64
    predicted = throughput.flops_per_token(network, 64)
    assert predicted is not None and math.isclose(counted, predicted, rel_tol=0.02)


def test_a_frozen_weight_counts_four_instead_of_six() -> None:
    network = model(False)
    whole = throughput.flops_per_token(network, 1)
    frozen = network.model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)
    part = throughput.flops_per_token(network, 1)
    assert whole is not None and part == whole - 2 * frozen.numel()


def test_what_is_not_known_is_left_out(tokenizer: str, texts: str) -> None:
    network, rows = model(True), rows_of(tokenizer, texts)
    cpu = Runtime(torch.device("cpu"), "fp32")
    assert throughput.Meter(network, rows, cpu, 121.0).facts(10.0) == {}
    network.config.num_experts = 8
    assert throughput.flops_per_token(network, 1) is None


def test_the_context_is_that_of_documents_and_not_of_rows(tokenizer: str, texts: str) -> None:
    packed, loose = (rows_of(tokenizer, texts, packing=p) for p in (True, False))
    lengths = [len(text) + 1 for text in _texts(texts)]  # bytes, and the end of text
    expected = sum(n * n for n in lengths) / sum(lengths)
    for rows in (packed, loose):
        assert math.isclose(throughput.mean_context(rows), expected, rel_tol=0.05)


def test_mfu_is_the_share_of_the_peak_of_all_workers(
    tokenizer: str, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, rows = model(True), rows_of(tokenizer, texts)
    gpus = Runtime(torch.device("cuda"), "bf16", world_size=2)
    monkeypatch.setattr(throughput, "gpu_reader", lambda device: dict)  # there is none here
    facts = throughput.Meter(network, rows, gpus, peak_tflops=1e-3).facts(examples_per_sec=7.0)
    per_token = throughput.flops_per_token(network, throughput.mean_context(rows))
    assert per_token is not None
    tokens_per_sec = 7.0 * rows.summary["tokens"] / len(rows)
    assert math.isclose(facts["mfu"], tokens_per_sec * per_token / 2e9, rel_tol=1e-12)
    assert throughput.Meter(network, rows, gpus, peak_tflops=None).facts(7.0) == {}


def test_readings_that_a_gpu_does_not_give_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pynvml.py").write_text(_NVML)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    assert throughput.nvml_reader("GPU-1")() == {"gpu_util": 93.0, "gpu_power_W": 71.5}
    assert throughput.nvml_reader("GPU-2")() == {}
    monkeypatch.delitem(sys.modules, "pynvml")


_NVML = """
class Rates: gpu, memory = 93, 20
NVML_TEMPERATURE_GPU = 0
def nvmlInit(): pass
def nvmlDeviceGetHandleByUUID(uuid):
    if uuid != "GPU-1": raise ValueError("Not Found")
    return uuid
def nvmlDeviceGetUtilizationRates(handle): return Rates
def nvmlDeviceGetPowerUsage(handle): return 71500
def nvmlDeviceGetTemperature(handle, sensor): raise RuntimeError("Not Supported")
"""


def _texts(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
