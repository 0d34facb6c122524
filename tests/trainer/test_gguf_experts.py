"""GGUF files of mixtures of experts: of gpt-oss as it is published (MXFP4) and merged, Qwen3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.test_gguf import (
    EXPERTS,
    YARN,
    Settings,
    export,
    fields,
    make_model,
    make_tokenizer,
    tensors,
)
from trainer import gguf_export, gguf_vocab
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError
from trainer.data.corpus import python_reference
from trainer.gguf_model import Source
from trainer.models import load_pretrained, load_tokenizer

gguf = pytest.importorskip("gguf")
OSS = {**EXPERTS, "rope_parameters": YARN}
QWEN = {**EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True}
#: Words with combining marks, in a script that has no others.
KHMER = "កាន់តែពិសេសអាច"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for _, text in python_reference("train")][:10]


@pytest.fixture(scope="module")
def words(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("words"), texts, "gpt-4o")


def values(path: Path) -> dict[str, numpy.ndarray]:
    return {n: gguf.dequantize(t.data, t.tensor_type) for n, t in tensors(path).items()}


def assert_experts(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Each projection is that of the model, [experts, out, in], gate and up apart."""
    found = values(path)
    for block in range(2):
        at = f"model.layers.{block}.mlp.experts"
        both = state[f"{at}.gate_up_proj"].float().transpose(1, 2).numpy()
        bias = state[f"{at}.gate_up_proj_bias"].float().numpy()
        down = state[f"{at}.down_proj"].float().transpose(1, 2).numpy()
        wanted = {
            "ffn_gate_exps.weight": both[:, ::2], "ffn_up_exps.weight": both[:, 1::2],
            "ffn_gate_exps.bias": bias[:, ::2], "ffn_up_exps.bias": bias[:, 1::2],
            "ffn_down_exps.weight": down,
            "ffn_down_exps.bias": state[f"{at}.down_proj_bias"].float().numpy(),
            "attn_sinks.weight": state[f"model.layers.{block}.self_attn.sinks"].float().numpy(),
        }  # fmt: skip
        for name, value in wanted.items():
            numpy.testing.assert_array_equal(found[f"blk.{block}.{name}"], value, err_msg=name)


def packed(folder: Path, words: str) -> str:
    """A gpt-oss in bf16 with experts in MXFP4, under the names of openai/gpt-oss-20b."""
    make_model(folder, "GptOss", words, dtype=torch.bfloat16, **OSS)
    stored: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32, 16)
        stored[f"{name}_blocks"] = torch.randint(
            0, 256, shape, generator=generator, dtype=torch.uint8
        )
        stored[f"{name}_scales"] = torch.randint(
            118, 122, shape[:3], generator=generator, dtype=torch.uint8
        )
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head"]  # fmt: skip
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    del config["dtype"]  # what is stored counts
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_experts_in_mxfp4_keep_every_number(words: str, tmp_path: Path) -> None:
    model = packed(tmp_path / "small-oss", words)
    path, facts, lines = export(model, tmp_path / "out", "auto")
    assert path.name == "small-oss-MXFP4.gguf" and facts["max_difference"] == 0
    assert any("6 tensors of experts stay in MXFP4" in line for line in lines)
    assert_experts(path, load_pretrained(model, torch.float32, "eager").state_dict())
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(path).items()}
    assert kinds["blk.1.ffn_up_exps.weight"] == "MXFP4" and kinds["output.weight"] == "BF16"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.ffn_up_exps.bias"] == "F32"
    assert fields(path)["general.file_type"] == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    whole = bytearray(path.read_bytes())
    whole[tensors(path)["blk.1.ffn_up_exps.weight"].data_offset + 3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up_exps.weight does not read back"):
        gguf_export._check_tensors(gguf, path, Source(model), kinds)


def test_merged_experts_are_written_as_they_are_used(words: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "oss", "GptOss", words, dtype=torch.bfloat16, **OSS)
    path, facts, _ = export(model, tmp_path / "out", "auto")
    assert path.name == "oss-BF16.gguf" and facts["max_difference"] == 0
    state = load_pretrained(model, torch.float32, "eager").state_dict()
    assert_experts(path, state)
    assert facts["parameters"] == sum(tensor.numel() for tensor in state.values())
    found = fields(path)
    assert found["gpt-oss.attention.sliding_window"] == 128
    assert found["gpt-oss.rope.scaling.type"] == "yarn" and found["gpt-oss.expert_count"] == 4
    assert found["tokenizer.ggml.pre"] == "gpt-4o"
    smaller, facts, _ = export(model, tmp_path / "small", "q4_0")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(smaller).items()}
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q4_0" and facts["max_difference"] < 1 / 7


def test_experts_that_lie_apart_become_one_tensor(words: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "qwen", "Qwen3Moe", words, **QWEN)
    stored = load_file(tmp_path / "qwen" / "model.safetensors")
    found = values(export(model, tmp_path / "out")[0])
    for ours, theirs in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        names = [f"model.layers.1.mlp.experts.{i}.{theirs}.weight" for i in range(4)]
        wanted = torch.stack([stored[name] for name in names]).numpy()
        numpy.testing.assert_array_equal(found[f"blk.1.ffn_{ours}_exps.weight"], wanted)
    del stored["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(stored, tmp_path / "qwen" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 of its tensors, such as blk\.0\.ffn_up_exps"):
        Source(model)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [("GptOss", {**OSS, "layer_types": ["full_attention"] * 2}, "in turn"),
     ("GptOss", {**OSS, "swiglu_limit": 6.0}, "swiglu_limit than 1.702 and 7"),
     ("GptOss", {**OSS, "attention_bias": False}, "attention without biases"),
     ("Qwen3Moe", {**QWEN, "mlp_only_layers": [0]}, "layers without experts"),
     ("Qwen3Moe", {**QWEN, "norm_topk_prob": False}, "do not add up to 1")],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], said: str, words: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m", family, words, **changes)
    with pytest.raises(ConfigError, match=f"{said}.*convert_hf_to_gguf.py"):
        Source(model)


def test_files_are_those_that_the_model_is_loaded_from(words: str, tmp_path: Path) -> None:
    """Others beside them, such as weights in another precision, are not mixed in; and `auto` looks
    at what is stored, whatever the configuration says."""
    model = make_model(tmp_path / "m", "Llama", words)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    other = {name: torch.zeros_like(tensor) for name, tensor in stored.items()}
    save_file(other, tmp_path / "m" / "model.fp16.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    path, facts, _ = export(model, tmp_path / "out", "auto")
    assert path.name == "m-F32.gguf" and facts["max_difference"] == 0
    wanted = stored["model.embed_tokens.weight"].numpy()
    numpy.testing.assert_array_equal(values(path)["token_embd.weight"], wanted)


def test_what_is_fetched_is_what_the_model_is_loaded_from(
    words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """openai/gpt-oss-20b has its weights three times, in folders for other programs."""
    from huggingface_hub.utils import filter_repo_objects

    folder, asked = make_model(tmp_path / "m", "Llama", words), {}

    def fetch(name: str, **filters: Any) -> str:
        asked.update(filters)
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    Source("org/model")
    there = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json",
             "original/model.safetensors", "original/config.json", "metal/model.bin"]  # fmt: skip
    assert [*filter_repo_objects(there, **asked)] == there[:3]


@pytest.mark.parametrize("cut", ["gpt-4o", "tekken"])
def test_words_with_combining_marks_are_cut_by_llama_cpp_in_its_own_way(
    cut: str, texts: list[str], tmp_path: Path
) -> None:
    folder = make_tokenizer(tmp_path / "t", [*texts[:2], *[f"{KHMER} "] * 400], cut)
    tokens = load_tokenizer(folder)
    found = gguf_vocab.vocabulary(tokens, Settings(400), tmp_path)
    assert found.pre == cut and gguf_vocab.cuts_marks(found, tokens)
    assert not gguf_vocab.differences(found, tokens)
    assert gguf_vocab.encoder(found)(KHMER) != list(tokens.encode(KHMER))
    model = make_model(tmp_path / "m", "Llama", folder)
    _, _, lines = export(model, tmp_path / "out")
    assert any(f"warning: llama.cpp cuts words ({cut}) at combining marks" in x for x in lines)


def test_a_tokenizer_without_such_merges_has_no_warning(words: str) -> None:
    tokens = load_tokenizer(words)
    found = gguf_vocab.vocabulary(tokens, Settings(400), Path(words))
    assert found.pre == "gpt-4o" and not gguf_vocab.cuts_marks(found, tokens)


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_the_file_of_mxfp4_is_that_of_llama_cpps_own_converter(
    kind: str, words: str, tmp_path: Path
) -> None:
    if not (folder := os.environ.get("LLAMA_CPP")):
        pytest.skip("LLAMA_CPP names no folder with llama.cpp's convert_hf_to_gguf.py")
    model = packed(tmp_path / "m", words)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), folder],
        input="\t".join((model, str(tmp_path / "theirs.gguf"), kind, "gpt-4o")),
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path, _, _ = export(model, tmp_path / "out", kind)
    one, other = tensors(path), tensors(tmp_path / "theirs.gguf")
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.tensor_type == other[name].tensor_type, name
        assert tuple(tensor.shape) == tuple(other[name].shape), name
        assert numpy.array_equal(tensor.data, other[name].data), name
    mine, his = fields(path), fields(tmp_path / "theirs.gguf")
    assert {k for k in {*mine} & {*his} if mine[k] != his[k]} <= {"general.name"}
    assert {k for k in his if k.startswith("gpt-oss.")} == {
        k for k in mine if k.startswith("gpt-oss.")
    }
