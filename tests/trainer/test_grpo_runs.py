"""Stage `grpo` as a whole: what it learns, and that it goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.conftest import in_folder
from tests.trainer.test_loop import lines
from trainer import stand_ins
from trainer.checkpoint import resolve
from trainer.config import (
    Adapter,
    Architecture,
    ConfigError,
    Data,
    Grpo,
    Hub,
    Job,
    Model,
    Source,
    StageConfig,
    Train,
    load_job,
)
from trainer.data.chat import view_of
from trainer.data.prompts import read_prompts
from trainer.models import load_tokenizer
from trainer.shrink import shrink

Run = Callable[..., Any]
DATA = Data(
    train=(Source(builtin="digits"),),
    validation=(Source(builtin="digits", split="heldout"),),
    sequence_length=32,
)


@pytest.fixture(scope="module")
def form(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small model that knows the form of an answer, and not which one is right."""
    from trainer import runtime, stages

    folder = tmp_path_factory.mktemp("form")
    architecture = Architecture(hidden_size=64, layers=2, heads=4)
    config = StageConfig(
        "form", "sft", str(folder),
        Model(init="random", tokenizer=tokenizer, architecture=architecture), DATA,
        Train(steps=70, micro_batch=8, lr=3e-3, schedule="constant", warmup=5, weight_decay=0.0),
    )  # fmt: skip
    with runtime.start() as process:
        stages.run_stage(config, Job("r", (config,)), process, lambda line: None, lambda: False)
    return str(folder)


@pytest.fixture
def config(form: str, tmp_path: Path) -> StageConfig:
    return StageConfig(
        "rl", "grpo", str(tmp_path / "rl"), Model(name=form), DATA,
        Train(steps=6, micro_batch=4, lr=2e-3, schedule="constant", warmup=5, weight_decay=0.0,
              log_every=1),
        grpo=Grpo(rewards=("trainer.rewards:exact",), group=8, max_new_tokens=4),
    )  # fmt: skip


def with_grpo(config: StageConfig, **changes: Any) -> StageConfig:
    assert config.grpo is not None
    return replace(config, grpo=replace(config.grpo, **changes))


def weights(folder: Path) -> bytes:
    found = Path(resolve(str(folder)))
    name = "adapter_model" if (found / "adapter_model.safetensors").exists() else "model"
    return (found / f"{name}.safetensors").read_bytes()


def test_the_mean_reward_rises_from_a_tenth_to_above_four_fifths(
    config: StageConfig, run_stage: Run
) -> None:
    folder = Path(config.output)
    outcome = run_stage(in_folder(config, folder, steps=60, micro_batch=32, log_every=5))
    steps = lines(folder, "step")
    assert 0.03 < steps[0]["reward"] < 0.2
    assert max(step["reward"] for step in steps[-3:]) > 0.8
    assert outcome.evaluation["val_reward"] >= 0.9
    assert outcome.evaluation["val_loss"] == -outcome.evaluation["val_reward"]
    assert outcome.evaluation["val_count"] == 10.0
    assert steps[-1]["entropy"] < steps[0]["entropy"]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_that_was_paused_between_two_steps_on_the_same_answers_ends_the_same(
    adapter: bool, config: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    """With a KL to the reference, which a resumed run must not take from its checkpoint."""
    config = with_grpo(config, iterations=2, beta=0.05)
    if adapter:
        assert config.model is not None
        config = replace(config, model=replace(config.model, adapter=Adapter(rank=4)))
    run_stage(in_folder(config, tmp_path / "whole"))
    run_stage(in_folder(config, tmp_path / "parts", until=3))
    run_stage(in_folder(config, tmp_path / "parts"), attempt=2)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    whole, parts = (lines(tmp_path / name, "step") for name in ("whole", "parts"))
    rewards = [step["reward"] for step in whole]
    assert rewards == [step["reward"] for step in parts]
    assert rewards[0::2] == rewards[1::2] and len(set(rewards)) > 1
    assert whole[0]["kl"] == pytest.approx(0, abs=1e-6)
    # Of new answers, too: the reference is not what drew them.
    assert min(whole[4]["kl"], whole[5]["kl"]) > 1e-6


def test_out_of_memory_keeps_the_answers_and_the_training(
    config: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    """Memory that is short in the backward pass of one step: the micro-batch is split, and the
    answers that were drawn and judged for it stay."""
    run_stage(in_folder(config, tmp_path / "calm"))
    calls: list[int] = []

    def full(module: Any, inputs: Any) -> None:
        if isinstance(module, nn.Embedding) and torch.is_grad_enabled() and inputs[0].numel() > 4:
            calls.append(inputs[0].numel())
            if len(calls) == 3:  # after the trial before the first step
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    handle = nn.modules.module.register_module_forward_pre_hook(full)
    try:
        run_stage(in_folder(config, tmp_path / "split"))
    finally:
        handle.remove()
    calm, split = (lines(tmp_path / name, "step") for name in ("calm", "split"))
    events = [e for e in lines(tmp_path / "split", "event") if e["event"] == "oom_split"]
    assert [event["micro_batch"] for event in events] == [2]
    for name in ("reward", "tokens", "train_loss", "grad_norm"):
        at_the_split = [step[name] for step in split[:2]]
        assert at_the_split == pytest.approx([step[name] for step in calm[:2]], rel=1e-4, abs=1e-7)


def test_a_prompt_whose_answers_do_not_fit_together_is_learned_from_in_parts(
    config: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    """Memory for three rows of 32 tokens: found before the first step, said, and remembered."""
    config = with_grpo(config, group=16)
    config = in_folder(config, tmp_path / "calm", steps=2, micro_batch=1, accumulate=2)
    run_stage(config)

    def full(module: Any, inputs: Any) -> None:
        learning = isinstance(module, nn.Embedding) and torch.is_grad_enabled()
        if learning and inputs[0].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    handle, most = nn.modules.module.register_module_forward_pre_hook(full), 96
    try:
        run_stage(in_folder(config, tmp_path / "parts", until=1))
        run_stage(in_folder(config, tmp_path / "parts"), attempt=2)
        auto: dict[str, Any] = {"micro_batch": "auto", "accumulate": 1, "global_batch": 2}
        run_stage(in_folder(config, tmp_path / "auto", **auto))
        most = 8
        with pytest.raises(ConfigError, match="one row does not fit"):
            run_stage(in_folder(config, tmp_path / "none"))
    finally:
        handle.remove()
    calm, parts, whole = (lines(tmp_path / n, "step") for n in ("calm", "parts", "auto"))
    assert [step["global_step"] for step in whole] == [1, 2]
    events = [e for e in lines(tmp_path / "parts", "event") if e["event"] == "oom_split"]
    assert events and {(event["tried"], event["micro_batch"]) for event in events} == {(1, 1)}
    for name in ("reward", "reward_std", "tokens", "train_loss", "grad_norm"):
        found = [step[name] for step in parts]
        assert found == pytest.approx([step[name] for step in calm], rel=1e-4, abs=1e-7)


def test_what_cannot_be_trained_is_one_line_before_the_model_is_loaded(
    config: StageConfig, run_stage: Run
) -> None:
    assert config.model is not None
    nowhere = replace(config, model=Model(name="no/such/model", tokenizer=config.model.name))
    with pytest.raises(ConfigError, match=r"trainer\.rewards has no `right`"):
        run_stage(with_grpo(nowhere, rewards=("trainer.rewards:right",)))
    with pytest.raises(ConfigError, match="32 leave no room for a prompt"):
        run_stage(with_grpo(nowhere, max_new_tokens=32))
    data = replace(DATA, train=(_bare(Path(config.output)),))
    with pytest.raises(ConfigError, match="exact asks for `answer`") as error:
        run_stage(replace(nowhere, data=data))
    assert "columns of the data: none" in str(error.value)


def test_a_dry_run_without_the_data_is_judged_by_a_reward_that_needs_none(
    config: StageConfig, run_stage: Run
) -> None:
    far = replace(config, data=replace(DATA, train=(Source(hf=Hub("org/riddles")),)))
    far = with_grpo(far, rewards=("not.here:right",), rollouts="vllm", vllm_server="http://far:1")
    small, notes = shrink(far, {config.output})
    assert any("grpo.rewards: trainer.rewards:short instead" in note for note in notes)
    run_stage(small)
    assert lines(Path(config.output), "step")[0]["reward"] > 0
    # Where the data is here, the recipe's own rewards are what is tried.
    near, _ = shrink(with_grpo(config, rewards=("not.here:right",)), {config.output})
    with pytest.raises(ConfigError, match=r"cannot import not\.here:right"):
        run_stage(near)


def test_a_rehearsal_asks_questions_about_python(config: StageConfig, tmp_path: Path) -> None:
    there = Source(path="gs://bucket/riddles.jsonl")
    far = with_grpo(replace(config, data=Data(train=(there,))), rewards=("not.here:right",))
    job = Job("r", (replace(far, model=Model(name="org/model")),))
    notes = stand_ins.write(job, tmp_path / "stand-ins", "gs://bucket/stand-ins")
    assert "grpo.rewards: trainer.rewards:short instead of not.here:right" in notes
    made = load_job(tmp_path / "stand-ins" / "job.json").stages[0]
    assert made.grpo is not None and made.grpo.rewards == ("trainer.rewards:short",)
    objects = tmp_path / "stand-ins" / "objects" / "bucket"
    tokens = load_tokenizer(str(objects / "stand-ins" / "models" / "org-model"))
    view_of(made.data, "grpo", tokens)
    here = (Source(path=str(objects / "riddles.jsonl")),)
    rows = read_prompts(here, tokens, made.data, answer=made.grpo.max_new_tokens)
    assert len(rows) > 100


def _bare(folder: Path) -> Source:
    path = folder.with_suffix(".jsonl")
    path.write_text('{"prompt": "count 3"}\n')
    return Source(path=str(path))
