"""Adapters from training to the exported folder, on a tiny base model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.conftest import in_folder
from trainer import adapters
from trainer.checkpoint import CheckpointError, resolve
from trainer.config import (
    Adapter,
    ConfigError,
    Distill,
    Evaluate,
    Export,
    Job,
    Merge,
    Model,
    StageConfig,
    to_dict,
)
from trainer.merge import LIMITS, agree, encode_prompts, logits
from trainer.models import load_pretrained, load_tokenizer
from trainer.shrink import shrink

Run = Callable[..., Any]
#: Of the base: attention is q and o [32, 32], k and v [16, 32]; the MLP is 64 wide; two layers.
ATTENTION = 2 * ((32 + 32) * 2 + (32 + 16) * 2)
MLP = 2 * 3 * (32 + 64)
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def base(stage: StageConfig, run_stage: Run, tmp_path: Path) -> StageConfig:
    """A stage that was trained for four steps, from which adapters start."""
    made = in_folder(stage, tmp_path / "base", steps=4)
    run_stage(made)
    return made


@pytest.fixture
def lora(base: StageConfig, tmp_path: Path) -> StageConfig:
    """A stage of 8 steps that trains an adapter with dropout, so that random states matter."""
    model = Model(name=base.output, adapter=Adapter(rank=3, alpha=6, dropout=0.2))
    return in_folder(replace(base, model=model), tmp_path / "lora", steps=8)


def last(config: StageConfig) -> Path:
    return Path(resolve(config.output))


def digest(config: StageConfig, name: str) -> str:
    return hashlib.sha256((last(config) / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("targets", "per_rank"),
    [("auto", ATTENTION + MLP), (("q_proj", "v_proj"), 2 * ((32 + 32) + (32 + 16)))],
)
def test_as_many_parameters_learn_as_the_shapes_say(
    targets: Any, per_rank: int, lora: StageConfig, run_stage: Run
) -> None:
    assert lora.model is not None
    model = replace(lora.model, adapter=Adapter(rank=3, targets=targets))
    run_stage(in_folder(replace(lora, model=model), Path(lora.output), steps=1))
    mask = json.loads((Path(lora.output) / "frozen_mask.json").read_text())
    assert mask["trainable"]["parameters"] == 3 * per_rank
    stored = load_file(last(lora) / adapters.WEIGHTS)
    assert sum(tensor.numel() for tensor in stored.values()) == 3 * per_rank
    assert all(".lora_" in name for name in mask["trainable"]["names"])
    assert "model.embed_tokens.weight" in mask["frozen"]["names"]


def test_a_checkpoint_holds_the_adapter_and_names_its_base(
    base: StageConfig, lora: StageConfig, run_stage: Run
) -> None:
    before = digest(base, "model.safetensors")
    run_stage(lora)
    files = {path.name for path in last(lora).iterdir()}
    assert {adapters.CONFIG, adapters.WEIGHTS, "tokenizer.json", "trainer_state.pt"} <= files
    assert not {"model.safetensors", "config.json"} & files
    config = json.loads((last(lora) / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(last(base))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert digest(base, "model.safetensors") == before


def test_peft_itself_reads_a_checkpoint(base: Any, lora: StageConfig, run_stage: Run) -> None:
    from peft import AutoPeftModelForCausalLM

    run_stage(lora)
    prompts = encode_prompts(load_tokenizer(lora.output))
    ours = logits(load_pretrained(lora.output, torch.float32, "sdpa").eval(), prompts)
    theirs = logits(AutoPeftModelForCausalLM.from_pretrained(last(lora)).eval(), prompts)
    plain = logits(load_pretrained(base.output, torch.float32, "sdpa").eval(), prompts)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(ours, plain))


def test_resume_equals_the_undisturbed_run_bit_for_bit(
    lora: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    parts = in_folder(lora, tmp_path / "parts", until=4)
    run_stage(lora)
    assert run_stage(parts).stopped == "until"
    assert digest(parts, adapters.WEIGHTS) != digest(lora, adapters.WEIGHTS)
    assert run_stage(in_folder(lora, tmp_path / "parts"), attempt=2).step == 8
    assert digest(parts, adapters.WEIGHTS) == digest(lora, adapters.WEIGHTS)


def test_a_checkpoint_of_another_rank_is_not_resumed(lora: StageConfig, run_stage: Run) -> None:
    run_stage(in_folder(lora, Path(lora.output), until=2))
    assert lora.model is not None
    wider = replace(lora, model=replace(lora.model, adapter=Adapter(rank=5)))
    with pytest.raises(CheckpointError, match=r"is not that of model\.adapter .*\(3, \d+\)"):
        run_stage(wider, attempt=2)


def test_an_adapter_that_would_count_more_is_not_resumed(lora: StageConfig, run_stage: Run) -> None:
    """Nothing of it is in the tensors."""
    run_stage(in_folder(lora, Path(lora.output), until=1))
    assert lora.model is not None and lora.model.adapter is not None
    louder = replace(lora.model.adapter, alpha=lora.model.adapter.alpha * 2)
    with pytest.raises(CheckpointError, match=r"model\.adapter \(alpha is \d+ there, \d+ here\)"):
        run_stage(replace(lora, model=replace(lora.model, adapter=louder)))


@pytest.mark.parametrize("name", ["step-4", "other"])
def test_another_base_of_the_same_shape_is_warned_of(
    lora: StageConfig, run_stage: Run, tmp_path: Path, name: str
) -> None:
    """By its last name: a base that has moved is the same one."""
    run_stage(in_folder(lora, Path(lora.output), until=1))
    assert lora.model is not None
    found, before = resolve(str(lora.model.name)), last(lora)
    moved = shutil.copytree(found, tmp_path / "moved" / name)
    went = run_stage(replace(lora, model=replace(lora.model, name=str(moved))), attempt=2)
    line = f"WARNING: the adapter in {before} was made for {found}, and goes on on {moved}"
    assert [x for x in went.lines if "was made for" in x] == [line] * (name == "other")


def test_a_reference_to_an_adapter_is_the_base_with_it(
    base: StageConfig, lora: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    trained = run_stage(lora)
    evaluate = Evaluate(models={"base": base.output, "lora": f"{lora.output}@last"})
    compare = StageConfig(
        id="c", stage="evaluate", output=str(tmp_path / "c"), data=lora.data, evaluate=evaluate
    )
    table = run_stage(compare).evaluation
    assert table["lora.val_loss"] == pytest.approx(trained.evaluation["val_loss"], abs=1e-6)
    assert table["lora.val_loss"] < table["base.val_loss"]
    student = in_folder(
        replace(base, stage="kd", kd=Distill(lora.output)), tmp_path / "kd", steps=1
    )
    assert "kd_loss" in json.dumps(run_stage(student).lines)


def test_activation_checkpointing_changes_nothing(
    lora: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    assert lora.model is not None
    thrifty = replace(lora, model=replace(lora.model, gradient_checkpointing=True))
    run_stage(lora)
    run_stage(in_folder(thrifty, tmp_path / "thrifty"))
    ours = load_file(last(lora) / adapters.WEIGHTS)
    theirs = load_file(Path(resolve(str(tmp_path / "thrifty"))) / adapters.WEIGHTS)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_what_learns_in_fp32(
    precision: Any, lora: StageConfig, run_stage: Run
) -> None:
    assert lora.model is not None
    outcome = run_stage(replace(lora, model=replace(lora.model, precision=precision)))
    assert math.isfinite(outcome.evaluation["val_loss"])
    stored = load_file(last(lora) / adapters.WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_an_adapter_is_no_model_to_start_from(lora: StageConfig, run_stage: Run) -> None:
    run_stage(in_folder(lora, Path(lora.output), steps=1))
    again = in_folder(replace(lora, model=Model(name=lora.output)), Path(lora.output) / "x")
    with pytest.raises(ConfigError, match=r"is an adapter of .*merge it first"):
        run_stage(again)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("q_porj",), "no linear layer 'q_porj'; did you mean 'q_proj'"),
        (("q_proj", "lm_head"), "'lm_head' is the output head"),
    ],
)
def test_targets_that_are_none_are_refused(
    targets: Any, said: str, lora: StageConfig, run_stage: Run
) -> None:
    assert lora.model is not None
    model = replace(lora.model, adapter=Adapter(targets=targets))
    with pytest.raises(ConfigError, match=said):
        run_stage(replace(lora, model=model))


@pytest.mark.parametrize(
    ("kind", "leaves"),
    [
        ("qwen3", LLAMA),
        ("gemma2", LLAMA),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_auto_finds_the_projections_of_an_architecture(kind: str, leaves: set[str]) -> None:
    model = tiny(kind)
    found = adapters.target_layers(model, Adapter())
    assert {name.rpartition(".")[2] for name in found} == leaves
    wrapped = adapters.attach(model, Adapter(rank=2), "base")
    learns = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert learns == adapters.expected_count(found, 2) > 0


def test_auto_does_not_pass_over_experts_in_silence() -> None:
    model = tiny("qwen3_moe", num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
    named = adapters.target_layers(model, Adapter(targets=("q_proj",)))
    assert len(named) == 2
    (line,) = adapters.left_out(adapters.attach(model, Adapter(rank=2), "base"))
    assert "the experts stay frozen" in line and "model.adapter.experts: true" in line


def tiny(kind: str, **extra: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size, **extra))


@pytest.fixture
def merge(lora: StageConfig, run_stage: Run, tmp_path: Path) -> StageConfig:
    """A `merge` stage whose adapter has been trained."""
    run_stage(lora)
    settings = Merge(adapter=lora.output)
    return StageConfig(id="m", stage="merge", output=str(tmp_path / "merged"), merge=settings)


def test_a_merged_model_gives_the_logits_of_its_adapter(
    merge: StageConfig, lora: StageConfig, run_stage: Run
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = run_stage(merge)
    assert outcome.evaluation["max_difference"] < 1e-6 < outcome.evaluation["adapter_effect"]
    tokens = AutoTokenizer.from_pretrained(merge.output)
    prompts = encode_prompts(tokens, ("a class has bases", "x"))
    found = logits(AutoModelForCausalLM.from_pretrained(merge.output).eval(), prompts)
    wanted = logits(AutoPeftModelForCausalLM.from_pretrained(last(lora)).eval(), prompts)
    for a, b in zip(found, wanted):
        assert float((a - b).abs().max()) < 1e-6
    theirs = AutoPeftModelForCausalLM.from_pretrained(last(lora)).merge_and_unload()
    ours = load_file(Path(merge.output) / "model.safetensors")
    assert all(torch.equal(ours[n], t) for n, t in theirs.state_dict().items() if n in ours)
    # A model reference, with or without a suffix.
    assert resolve(merge.output) == resolve(f"{merge.output}@best") == merge.output


@pytest.mark.parametrize(("rest", "warned"), [(1.0, 0), (0.0, 1)])
def test_a_merge_says_what_an_adapter_of_zeros_leaves_alone(
    merge: StageConfig, run_stage: Run, tmp_path: Path, rest: float, warned: int
) -> None:
    assert merge.merge is not None
    made = shutil.copytree(resolve(merge.merge.adapter), tmp_path / "made")
    tensors = load_file(made / adapters.WEIGHTS)
    kept = {n: t if ".layers.0." in n else t * rest for n, t in tensors.items()}
    save_file(kept, made / adapters.WEIGHTS)
    told = run_stage(replace(merge, merge=replace(merge.merge, adapter=str(made)))).lines
    line = "warning: the adapter leaves 7 of its 14 tensors as they are"
    assert len([x for x in told if x.startswith(line)]) == warned
    assert len([x for x in told if "of its" in x]) == warned


def test_a_merge_in_bf16_is_compared_as_it_was_saved(merge: StageConfig, run_stage: Run) -> None:
    assert merge.merge is not None
    outcome = run_stage(replace(merge, merge=replace(merge.merge, precision="bf16")))
    stored = load_file(Path(merge.output) / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    saved = outcome.evaluation["max_difference_saved"]
    assert outcome.evaluation["max_difference"] < saved < LIMITS[torch.bfloat16]


def test_logits_that_differ_stop_a_merge() -> None:
    wanted = [torch.linspace(-10, 10, 64).view(1, 1, 64)]
    off = [wanted[0] + 0.05]
    assert agree(off, wanted, torch.bfloat16, "saved") == pytest.approx(5e-3, rel=1e-3)
    with pytest.raises(CheckpointError, match=r"differ by 5\.0e-03 .* more than 1e-04 \(fp32\)"):
        agree(off, wanted, torch.float32, "merged")
    with pytest.raises(CheckpointError, match="differ by nan"):
        agree([wanted[0] * float("nan")], wanted, torch.bfloat16, "merged")


def test_a_quantised_base_is_refused_by_its_configuration(
    base: StageConfig, merge: StageConfig, run_stage: Run
) -> None:
    path = last(base) / "config.json"
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    copied = Path(merge.output).parent / "quantised"
    copied.mkdir()
    config = {**json.loads(path.read_text()), "quantization_config": said}
    (copied / "config.json").write_text(json.dumps(config))
    assert merge.merge is not None
    asked = replace(merge, merge=replace(merge.merge, base=str(copied)))
    with pytest.raises(ConfigError, match=r"is quantised \(bitsandbytes\).*merge\.base"):
        run_stage(asked)
    assert not (Path(merge.output) / "config.json").exists()


def test_a_quantised_base_is_refused_by_its_weights(
    base: StageConfig, merge: StageConfig, run_stage: Run
) -> None:
    copied = Path(merge.output).parent / "eight"
    copied.mkdir()
    (copied / "config.json").write_text((last(base) / "config.json").read_text())
    weights = load_file(last(base) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = (weights[name] * 100).to(torch.int8)
    save_file(weights, copied / "model.safetensors")
    assert merge.merge is not None
    asked = replace(merge, merge=replace(merge.merge, base=str(copied)))
    with pytest.raises(ConfigError, match=rf"{name} in model\.safetensors is I8"):
        run_stage(asked)


def test_a_model_is_no_adapter_to_merge(merge: StageConfig, base: Any, run_stage: Run) -> None:
    with pytest.raises(ConfigError, match=r"is not an adapter: no adapter_config\.json"):
        run_stage(replace(merge, merge=Merge(adapter=base.output)))


def test_a_base_that_is_gone_is_named(
    merge: StageConfig, lora: StageConfig, run_stage: Run
) -> None:
    path = last(lora) / adapters.CONFIG
    config = json.loads(path.read_text())
    alone = Path(merge.output).parent / "alone"
    alone.mkdir()
    (alone / adapters.WEIGHTS).write_bytes((last(lora) / adapters.WEIGHTS).read_bytes())
    gone = {**config, "base_model_name_or_path": "/nowhere/model"}
    (alone / adapters.CONFIG).write_text(json.dumps(gone))
    with pytest.raises(ConfigError, match=r"the base model of the adapter .*/nowhere/model"):
        load_pretrained(str(alone), torch.float32, "sdpa")


@pytest.fixture
def export(base: StageConfig, tmp_path: Path) -> StageConfig:
    settings = Export(model=base.output, to=str(tmp_path / "given" / "model"))
    return StageConfig(id="e", stage="export", output=str(tmp_path / "export"), export=settings)


def test_an_exported_folder_is_the_model_and_nothing_else(
    export: StageConfig, base: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_stage(export)
    target = tmp_path / "given" / "model"
    files = {path.name for path in target.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not {"trainer_state.pt", "MANIFEST.json", "run_meta.json"} & files
    model = AutoModelForCausalLM.from_pretrained(target)
    wanted = load_file(last(base) / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], t) for name, t in wanted.items())
    assert AutoTokenizer.from_pretrained(target)("abc").input_ids
    # Again: a stage that was killed after the folder was in place goes on.
    run_stage(export, attempt=2)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is taken and holds something else"):
        run_stage(export, attempt=3)
    assert (target / "notes.txt").read_text() == "mine"


def test_an_export_in_bf16_and_to_the_stage_itself(
    export: StageConfig, base: StageConfig, run_stage: Run
) -> None:
    run_stage(replace(export, export=Export(model=base.output, precision="bf16")))
    stored = load_file(Path(export.output) / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert load_pretrained(export.output, torch.float32, "sdpa").config.vocab_size == 258


def test_an_adapter_is_merged_before_it_is_exported(
    export: StageConfig, lora: StageConfig, run_stage: Run
) -> None:
    run_stage(in_folder(lora, Path(lora.output), steps=1))
    with pytest.raises(ConfigError, match="is an adapter; merge it first"):
        run_stage(replace(export, export=Export(model=lora.output)))


@pytest.mark.parametrize(
    ("to", "said"),
    [("hub:me/model", "needs a token of the Hub"), ("hub:a/b/c", "is no name for the Hub")],
)
def test_the_hub_is_refused_in_one_line(
    to: str, said: str, export: StageConfig, base: StageConfig, tmp_path: Path
) -> None:
    asked = replace(export, export=Export(model=base.output, to=to))
    file = tmp_path / "job.json"
    file.write_text(json.dumps(to_dict(Job(run="r", stages=(asked,)))))
    hidden = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "run", str(file)],
        capture_output=True, text=True, timeout=120, env={**hidden, "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 64 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]


def test_a_dry_run_keeps_merge_and_export_here(tmp_path: Path, run_stage: Run) -> None:
    """Models that are not on this disk become tiny ones, and nothing leaves its folder."""
    asked = StageConfig(id="m", stage="merge", output=str(tmp_path / "m"), merge=Merge("a/lora"))
    config, notes = shrink(asked, set())
    assert any("a/lora" in note for note in notes)
    assert run_stage(config).evaluation["max_difference"] < 1e-6
    to = tmp_path / "elsewhere"
    asked = StageConfig(
        id="e", stage="export", output=str(tmp_path / "e"), export=Export(config.output, str(to))
    )
    config, notes = shrink(asked, {config.output})
    assert any(str(to) in note for note in notes)
    run_stage(config)
    assert (tmp_path / "e" / "config.json").exists() and not to.exists()
