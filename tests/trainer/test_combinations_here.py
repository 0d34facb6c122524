"""Where parts of the trainer meet, in one process: compiled blocks and float8 under a shared model
and in drawn answers, batches that are looked for, and what checkpoints hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.trainer import gradients
from tests.trainer.conftest import in_folder
from tests.trainer.test_adapters_families import tiny
from tests.trainer.test_blocks import as_it_is as as_it_is
from tests.trainer.test_blocks import fresh as fresh
from tests.trainer.test_loop import lines
from trainer import blocks, float8, parallel, trial
from trainer.checkpoint import load_state
from trainer.config import (
    Adapter,
    Architecture,
    ConfigError,
    Data,
    Grpo,
    Model,
    Preference,
    Source,
    StageConfig,
    Train,
)
from trainer.config_data import Phase
from trainer.data import DataError
from trainer.data.chat import view_of
from trainer.data.stream import Rows, Stream, build_rows
from trainer.manifest import MANIFEST, STATE, seal
from trainer.models import load_model, load_tokenizer
from trainer.objectives.next_token import NextToken
from trainer.rollouts import Generate
from trainer.step import backward, normalisers, prepare

Run = Callable[..., Any]
SHAPE = Architecture(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64)


@pytest.fixture
def alone() -> Iterator[None]:
    """What sharding in one process starts is ended."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def quick(tokenizer: str, texts: str, share: parallel.Parallel) -> Any:
    """A model with float8 products and compiled blocks, tried and trained as a stage does it; its
    gradients."""
    plan = Model(
        init="random", tokenizer=tokenizer, architecture=SHAPE, float8="torchao", compile=True,
        gradient_checkpointing="selective",
    )  # fmt: skip

    def quicken(model: Any) -> None:
        float8.convert(
            model, plan, gradients.CPU, tokens=256, steady=True, compiled=True, emulate=True
        )
        blocks.compile_blocks(model, packing=True)

    tokens, objective = load_tokenizer(tokenizer), NextToken()
    model = load_model(plan, tokens, gradients.CPU, 1, share=share, before_placing=quicken)
    trial.check(model, gradients.CPU, "it", packing=True)
    batch = gradients.rows(tokenizer, texts, True).batch([0, 1])
    made = prepare(objective, [batch], gradients.CPU, 0)
    backward(model, objective, made, normalisers(made, gradients.CPU), gradients.CPU)
    assert parallel.is_sharded(model) == (share == "fsdp")
    return {name: parallel.local(p.grad) for name, p in model.named_parameters()}


def test_blocks_in_float8_are_compiled_and_then_shared(
    tokenizer: str, texts: str, as_it_is: None, alone: None
) -> None:
    """The trial's bounds are those of plain products; training has the rounding of float8."""
    whole = quick(tokenizer, texts, "ddp")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch._dynamo.reset()
    shared = quick(tokenizer, texts, "fsdp")
    assert whole.keys() == shared.keys()
    for name, value in whole.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_answers_are_drawn_plainly_by_a_model_in_float8_with_compiled_blocks(
    as_it_is: None,
) -> None:
    plan = Grpo(rewards=("x:y",), group=2, max_new_tokens=6)
    model = tiny("llama").eval()
    wanted = Generate(model, plan, gradients.CPU, [0]).draw([[5, 6, 7], [8]], 2, "a", 0)
    float8.convert(
        model, Model(name="x", float8="torchao"), gradients.CPU, tokens=16, steady=True,
        emulate=True,
    )  # fmt: skip
    blocks.compile_blocks(model, packing=True)
    torch._dynamo.utils.counters.clear()
    assert Generate(model, plan, gradients.CPU, [0]).draw([[5, 6, 7], [8]], 2, "a", 0) == wanted
    assert not torch._dynamo.utils.counters["stats"]


@pytest.fixture
def digits(tokenizer: str, tmp_path: Path, run_stage: Run) -> StageConfig:
    """Three steps of reinforcement on ten prompts, with two draws of answers."""
    data = Data(train=(Source(builtin="digits"),), sequence_length=32)
    return StageConfig(
        "rl", "grpo", str(tmp_path / "rl"),
        Model(init="random", tokenizer=tokenizer, architecture=SHAPE), data,
        Train(steps=3, micro_batch=4, lr=1e-3, warmup=1, log_every=1, report_to=()),
        grpo=Grpo(("tests.trainer.grpo_cases:sums",), group=2, max_new_tokens=4),
    )  # fmt: skip


def trained(config: StageConfig, folder: Path, run_stage: Run, **train: Any) -> list[Any]:
    run_stage(in_folder(config, folder, **train))
    names = ("train_loss", "grad_norm", "reward")
    return [[line[name] for name in names if name in line] for line in lines(folder, "step")]


def test_reinforcement_goes_with_recomputed_and_with_compiled_blocks(
    digits: StageConfig, tmp_path: Path, run_stage: Run, as_it_is: None
) -> None:
    assert digits.model is not None
    plain = trained(digits, tmp_path / "plain", run_stage)
    for name, changes in (
        ("all", {"gradient_checkpointing": True}),
        ("some", {"gradient_checkpointing": "selective"}),
        ("compiled", {"compile": True}),
    ):
        config = replace(digits, model=replace(digits.model, **changes))
        found = trained(config, tmp_path / name, run_stage)
        for one, other in zip(plain, found):
            assert other == pytest.approx(one, rel=1e-4, abs=1e-6), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_the_rows_of_a_micro_batch_are_looked_for_whatever_is_learned(
    digits: StageConfig, texts: str, tokenizer: str, tmp_path: Path, run_stage: Run
) -> None:
    """Equal steps, however they are cut."""
    pairs = tmp_path / "pairs.jsonl"
    record = {"prompt": "a question, ", "chosen": "A", "rejected": "B"}
    pairs.write_text(
        "".join(json.dumps({**record, "chosen": "A" * i}) + "\n" for i in range(1, 13))
    )
    grows = replace(
        digits, stage="pretrain", grpo=None,
        data=Data(train=(Source(path=texts),), sequence_length=64, curriculum=(Phase(32, 1),)),
    )  # fmt: skip
    prefers = replace(
        digits, stage="dpo", grpo=None, preference=Preference(),
        data=Data(train=(Source(path=str(pairs)),), sequence_length=64),
    )  # fmt: skip
    for name, config in (("grpo", digits), ("curriculum", grows), ("dpo", prefers)):
        given = trained(config, tmp_path / name, run_stage)
        auto = {"micro_batch": "auto", "global_batch": 4}
        found = trained(config, tmp_path / f"{name}-auto", run_stage, **auto)
        assert len(given) == 3
        for one, other in zip(given, found):
            assert other == pytest.approx(one, rel=1e-4, abs=1e-6), name


def test_a_checkpoint_that_holds_one_objective_for_all_workers_is_resumed(
    digits: StageConfig, tmp_path: Path, run_stage: Run
) -> None:
    """As they were written before there was one for each; here with answers that serve again."""
    assert digits.grpo is not None
    config = replace(digits, grpo=replace(digits.grpo, iterations=2))
    whole = trained(config, tmp_path / "whole", run_stage)
    run_stage(in_folder(config, tmp_path / "parts", until=1))
    found = tmp_path / "parts" / "checkpoints" / "step-1"
    state = load_state(found)
    kept = {**state, "objective": state["objective"][0]}
    assert kept["objective"]["kept"], "the answers of the first step serve the second"
    for name in (MANIFEST, STATE):  # what was loaded is mapped, not copied
        (found / name).unlink()
    torch.save(kept, found / STATE)
    seal(found, 1)
    assert trained(config, tmp_path / "parts", run_stage) == whole


#: With and without the mark that an answer begins behind; what both write is the same.
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
MARKED = TEMPLATE + "{% if add_generation_prompt %}assistant:{% endif %}"


def chats(folder: Path, tokenizer: str, template: str) -> Rows:
    (folder / "t.jinja").write_text(template)
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    tokens, sources = load_tokenizer(tokenizer), (Source(path=str(folder / "chats.jsonl")),)
    view = view_of(Data(chat_template=str(folder / "t.jinja")), "sft", tokens)
    return build_rows(sources, tokens, sequence_length=32, packing=True, view=view)


def test_equal_tokens_of_which_others_are_learned_are_other_data(
    tokenizer: str, texts: str, tmp_path: Path
) -> None:
    marked, bare = (chats(tmp_path, tokenizer, text) for text in (MARKED, TEMPLATE))
    assert np.array_equal(marked.chunks.tokens, bare.chunks.tokens)
    settings = {"micro_batch": 1, "accumulate": 1, "rank": 0, "world_size": 1, "seed": 0}
    state = Stream(marked, **settings).state_dict()
    Stream(chats(tmp_path, tokenizer, MARKED), **settings).load_state_dict(state)
    with pytest.raises(DataError, match=r"^the data changed"):
        Stream(bare, **settings).load_state_dict(state)


def test_text_that_is_learned_as_a_whole_has_the_digest_that_it_had(
    tokenizer: str, texts: str
) -> None:
    """Checkpoints name it."""
    rows = gradients.rows(tokenizer, texts, True)
    digest = hashlib.sha256(str(len(rows.chunks.tokens)).encode())
    for array in (rows.chunks.tokens, rows.chunks.lengths[rows.packing.items], rows.packing.starts):
        digest.update(array.tobytes())
    assert rows.chunks.learned is None and rows.digest == digest.hexdigest()


def test_answers_of_a_pair_do_not_see_each_other_or_the_model_is_refused(
    digits: StageConfig, tokenizer: str, tmp_path: Path, run_stage: Run
) -> None:
    """A gpt-oss does not tell documents of a row apart by their positions."""
    tiny("gpt_oss", vocab_size=258).save_pretrained(tmp_path / "oss")
    load_tokenizer(tokenizer).save_pretrained(tmp_path / "oss")
    record = {"prompt": "a question, ", "chosen": "A", "rejected": "B"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    train = (Source(path=str(tmp_path / "pairs.jsonl")),)
    config = replace(digits, stage="dpo", grpo=None, model=Model(name=str(tmp_path / "oss")))
    packed = replace(config, data=Data(train=train, sequence_length=64, packing=True))
    with pytest.raises(
        ConfigError, match=r"see each other .*; set data\.packing: false$"
    ) as raised:
        run_stage(packed)
    assert "\n" not in str(raised.value)
    apart = Data(train=train, sequence_length=64, packing=False)
    assert run_stage(replace(config, data=apart)).stopped is None


def test_weights_in_4_bits_are_refused_before_the_model_is_read(
    digits: StageConfig, tokenizer: str, run_stage: Run
) -> None:
    model = Model(name=tokenizer, adapter=Adapter(quantization="nf4"))
    config = replace(digits, stage="sft", grpo=None, model=model)
    with pytest.raises(ConfigError, match=r"^stage rl: train\.parallel: fsdp cannot share quant"):
        run_stage(in_folder(config, Path(config.output), parallel="fsdp"))


def test_float8_is_told_of_every_length_of_a_curriculum() -> None:
    train = Train(steps=9, micro_batch=4)
    for length, steady in ((32, True), (16, True), (8, False)):
        data = Data(sequence_length=64, curriculum=(Phase(length, 3),))
        assert float8.micro_batch_tokens(train, data) == (256, steady)
