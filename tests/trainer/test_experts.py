"""Adapters of experts: a tiny gpt-oss from training to the exported folder, and exact counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.conftest import in_folder
from tests.trainer.test_adapters_families import attached, tiny
from trainer import adapters, quantized
from trainer.checkpoint import CheckpointError, resolve
from trainer.config import Adapter, ConfigError, Export, Merge, Model, Sdce, StageConfig
from trainer.loading import FieldErrors
from trainer.merge import _merged, encode_prompts, logits, stored_dtype
from trainer.models import load_pretrained, load_tokenizer

Run = Callable[..., Any]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 258}
#: openai/gpt-oss-20b; GptOssConfig's own defaults are those of the model with 128 experts.
TWENTY_B = {"num_hidden_layers": 24, "num_local_experts": 32}
BOTH = Adapter(rank=3, alpha=6, experts=True)


def save_base(folder: Path, tokenizer: str, kind: str = "gpt_oss") -> str:
    tiny(kind, **EXPERTS).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def trained(
    stage: StageConfig, tokenizer: str, run_stage: Run, tmp_path: Path
) -> tuple[StageConfig, Any]:
    """A stage that trained attention and experts of a tiny gpt-oss, and its outcome."""
    model = Model(name=save_base(tmp_path / "base", tokenizer), adapter=BOTH)
    data = replace(stage.data, packing=False)  # the trial refuses it for gpt-oss: see docs
    config = in_folder(replace(stage, model=model, data=data), tmp_path / "lora", steps=6, lr=3e-2)
    return config, run_stage(config)


def test_counts_of_gpt_oss_20b_are_exact() -> None:
    """Attention alone, and with experts: 64 x (24 x 20,736) and 24 x 32 x 64 x (8,640 + 5,760)
    more."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    for adapter, wanted in ((Adapter(rank=64), 31_850_496), (Adapter(rank=64, experts=True), None)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(GptOssConfig(**TWENTY_B))
            assert sum(p.numel() for p in model.parameters()) == 20_914_757_184
            wrapped = adapters.attach(model, adapter, "base")
        learns = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        assert learns == (wanted or 31_850_496 + 24 * 32 * 64 * (8640 + 5760)) > 31_000_000
    assert learns == 739_639_296


def test_every_expert_that_got_tokens_has_a_gradient(tokenizer: str) -> None:
    model = attached(tiny("gpt_oss", **EXPERTS), BOTH).train()
    met: dict[int, set[int]] = {}
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.router.register_forward_hook(
            lambda _, __, out, n=number: met.update({n: set(out[-1].flatten().tolist())})
        )
    model(input_ids=torch.tensor([[2]]), use_cache=False).logits.square().sum().backward()
    assert [len(experts) for experts in met.values()] == [2, 2]  # of four
    for number, experts in met.items():
        around = model.get_base_model().model.layers[number].mlp.experts
        for module in (around, around.base_layer):  # down_proj, and within it gate_up_proj
            gradient = module.lora_A["default"].weight.grad.view(4, 3, -1)
            assert {e for e in range(4) if gradient[e].any()} == experts
            gradient = module.lora_B["default"].weight.grad.view(-1, 3, 4)
            assert {e for e in range(4) if gradient[..., e].any()} == experts
        router = model.get_base_model().model.layers[number].mlp.router
        assert not any(p.requires_grad for p in router.parameters())


def test_a_tiny_gpt_oss_learns_on_eager_attention(trained: Any, tmp_path: Path) -> None:
    config, outcome = trained
    shown = [line for line in outcome.lines if "train_loss" in line]
    losses = [float(line.split("train_loss ")[1].split()[0]) for line in shown]
    assert losses[-1] < losses[0] - 0.1
    assert any("attention eager" in line for line in outcome.lines)
    assert not any("stay frozen" in line for line in outcome.lines)
    learns = json.loads((tmp_path / "lora" / "frozen_mask.json").read_text())["trainable"]["names"]
    assert "model.layers.1.mlp.experts.gate_up_proj.lora_A.weight" in learns
    assert "model.layers.1.mlp.experts.down_proj.lora_B.weight" in learns
    assert len(learns) == len(set(learns)) == 2 * 2 * (4 + 2)

    stored = load_file(Path(resolve(config.output)) / adapters.WEIGHTS)
    assert all(t.any() for name, t in stored.items() if ".experts." in name)
    again = load_pretrained(config.output, torch.float32, "eager")
    read = {name: t for name, t in adapters.tensors(again).items()}
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], t) for name, t in stored.items())
    assert sum(".experts." in name for name in stored) == 2 * 2 * 2


def test_experts_merge_export_and_reload(trained: Any, run_stage: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, _ = trained
    merge = StageConfig("m", "merge", str(tmp_path / "m"), merge=Merge(adapter=config.output))
    facts = run_stage(merge).evaluation
    assert facts["max_difference"] < 1e-6 < facts["adapter_effect"]
    assert facts["merged_tensors"] == 2 * (4 + 2)  # attention, gate_up and down of two layers
    target = tmp_path / "given"
    run_stage(StageConfig("e", "export", str(tmp_path / "e"),
                          export=Export(merge.output, str(target))))  # fmt: skip
    prompts = encode_prompts(AutoTokenizer.from_pretrained(target), ("a class has bases", "x"))
    with_adapter = load_pretrained(config.output, torch.float32, "eager").eval()
    given = AutoModelForCausalLM.from_pretrained(target).eval()
    for a, b in zip(logits(given, prompts), logits(with_adapter, prompts)):
        assert float((a - b).abs().max()) < 1e-6


def test_experts_learn_in_fp32_on_a_bf16_base(trained: Any, run_stage: Run, tmp_path: Path) -> None:
    config, _ = trained
    half = replace(config, model=replace(config.model, precision="bf16"))
    run_stage(in_folder(half, tmp_path / "half", steps=2))
    stored = load_file(Path(resolve(str(tmp_path / "half"))) / adapters.WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert all(t.any() for name, t in stored.items() if ".experts." in name)


def test_a_merge_that_misses_a_tensor_is_seen() -> None:
    before = {"a.weight": (1.0, 2.0), "b.weight": (1.0, 2.0)}
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False)})
    with pytest.raises(CheckpointError, match="changes 2 tensors, the merge has changed 1"):
        _merged(before, model, {"a.weight", "b.weight"})


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing_of_experts_changes_nothing(
    kind: str, stage: StageConfig, tokenizer: str, run_stage: Run, tmp_path: Path
) -> None:
    model = Model(name=save_base(tmp_path / "base", tokenizer, kind), adapter=BOTH)
    data = replace(stage.data, packing=False)
    plain = in_folder(replace(stage, model=model, data=data), tmp_path / "a", steps=2)
    run_stage(plain)
    thrifty = replace(plain, model=replace(model, gradient_checkpointing=True))
    run_stage(in_folder(thrifty, tmp_path / "b"))
    ours, theirs = (
        load_file(Path(resolve(str(tmp_path / name))) / adapters.WEIGHTS) for name in "ab"
    )
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_experts_are_refused_where_they_cannot_be_adapted() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.experts: this model has no experts that are"):
        adapters.attach(tiny("llama"), BOTH, "base")
    with pytest.raises(FieldErrors, match="experts: needs `dropout: 0`"):
        Adapter(experts=True, dropout=0.1)
    with pytest.raises(FieldErrors, match="quantization: nf4 does not reach experts"):
        Adapter(experts=True, quantization="nf4")


@pytest.fixture
def packed(tokenizer: str, tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """A tiny gpt-oss with experts in MXFP4, as openai/gpt-oss-20b is stored, and their values by
    the format's own definition (OCP Microscaling Formats 1.0, E2M1 with a scale of E8M0)."""
    folder = tmp_path / "mxfp4"
    save_base(folder, tokenizer)
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor([*positive, *(-value for value in positive)])
    torch.manual_seed(3)
    stored, wanted = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32))
        scales = torch.randint(118, 122, (experts, outputs, inputs // 32))
        stored[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        stored[f"{name}_scales"] = scales.to(torch.uint8)
        wide = values[codes] * 2.0 ** (scales.unsqueeze(-1) - 127)
        wanted[name] = wide.flatten(2).transpose(1, 2)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    said = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return str(folder), wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp4_experts_are_widened_exactly_and_saved_under_their_names(
    packed: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    name, wanted = packed
    model = load_pretrained(name, dtype, "eager")
    state = model.state_dict()
    assert len(wanted) == 4
    assert all(torch.equal(state[key].float(), value) for key, value in wanted.items())
    model.save_pretrained(tmp_path / "wide")
    assert quantized.method(model.config) is None
    again = load_pretrained(str(tmp_path / "wide"), dtype, "eager").state_dict()
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_an_adapter_on_mxfp4_experts_is_merged_into_widened_ones(
    packed: Any, stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    name, wanted = packed
    data = replace(stage.data, packing=False)
    config = replace(stage, model=Model(name=name, adapter=BOTH), data=data)
    outcome = run_stage(in_folder(config, tmp_path / "lora", steps=2))
    assert any("mxfp4" in line and "widened" in line for line in outcome.lines)
    merge = StageConfig(
        "m", "merge", str(tmp_path / "m"), merge=Merge(str(tmp_path / "lora"), precision="fp32")
    )
    assert run_stage(merge).evaluation["max_difference"] < 1e-6
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert all(merged[key].shape == value.shape for key, value in wanted.items())
    assert not any(torch.equal(merged[key], value) for key, value in wanted.items())
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())

    gguf = pytest.importorskip("gguf")
    export = Export(merge.output, format="gguf")
    run_stage(StageConfig("g", "export", str(tmp_path / "g"), export=export))
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "g" / "m-F32.gguf").tensors}
    both = merged["model.layers.1.mlp.experts.gate_up_proj"].transpose(1, 2).numpy()
    assert (tensors["blk.1.ffn_up_exps.weight"] == both[:, 1::2]).all()


def test_what_mxfp4_files_give_no_dtype_for_is_bf16(packed: Any) -> None:
    """In fp32 a merge would be twice as large as it need be."""
    name, _ = packed
    assert stored_dtype(name) == torch.float32  # what the configuration says counts
    path = Path(name) / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    assert stored_dtype(name) == torch.bfloat16


def test_mxfp4_serves_as_a_surrogate(packed: Any, stage: StageConfig, run_stage: Run) -> None:
    """Widened as it is loaded, it holds likely what it did."""
    guided = replace(stage, stage="sdce", sdce=Sdce(surrogate=packed[0]),
                     data=replace(stage.data, packing=False))  # fmt: skip
    outcome = run_stage(in_folder(guided, Path(stage.output), steps=2))
    assert any(line.startswith(f"surrogate: {packed[0]}, ") for line in outcome.lines)
