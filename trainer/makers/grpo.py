"""The objective of stage `grpo`: its rewards, what draws answers, and the reference."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Optional

from trainer import models, reward_functions
from trainer.config import ConfigError, Source
from trainer.config_objectives import packed_for_server
from trainer.context import Context
from trainer.data import chat
from trainer.data.prompts import Prompts, read_prompts
from trainer.data.stream import Rows
from trainer.groups import Groups, Reference
from trainer.objective import Objective
from trainer.objectives.grpo import Reinforce
from trainer.rollouts import Generate, Rollouts, ends_of
from trainer.rollouts_vllm import Server


def make(context: Context, tokens: Any) -> Objective:
    """Errors: `ConfigError` for rewards that cannot be had, or a server that does not answer."""
    config, model, rows = context.config, context.model, context.rows
    plan, settings = config.grpo, config.train
    assert plan is not None and settings is not None and model is not None
    assert isinstance(rows, Prompts)
    ends = ends_of(model, tokens)
    rollouts: Rollouts = (
        Server(model, plan, context.runtime, ends)
        if plan.rollouts == "vllm"
        else Generate(model, plan, context.runtime, ends)
    )
    groups = Groups(
        plan,
        model,
        rollouts,
        reward_functions.load(plan.rewards),
        context.runtime,
        lambda ids: str(tokens.decode(ids, skip_special_tokens=True)),
        columns=rows.columns,
        length=config.data.sequence_length,
        packing=config.data.packing,
        seed=settings.seed,
        reference=_reference(context, tokens) if plan.beta > 0 else None,
    )
    return Reinforce(groups)


def lay_out(
    context: Context, tokens: Any, sources: tuple[Source, ...], limit: Optional[int]
) -> Rows:
    """One prompt a row. The rewards are looked at here already: before a large model is loaded.
    Errors: `DataError`, `ConfigError`."""
    data, plan = context.config.data, context.config.grpo
    assert plan is not None
    if plan.max_new_tokens >= data.sequence_length:
        raise ConfigError(
            f"grpo.max_new_tokens: {plan.max_new_tokens} leave no room for a prompt in"
            f" data.sequence_length {data.sequence_length}"
        )
    if (what := packed_for_server(plan, context.config.model)) is not None:
        raise ConfigError(f"grpo.rollouts: {what}")
    rewards = reward_functions.load(plan.rewards)
    chat.view_of(data, context.config.stage, tokens)  # gives the tokenizer `data.chat_template`
    rows = read_prompts(
        sources, tokens, data, answer=plan.max_new_tokens, repeats=plan.iterations, limit=limit
    )
    for reward in rewards:
        reward.check(rows.columns)
    return rows


def _reference(context: Context, tokens: Any) -> Reference:
    """The model as the stage first found it: the adapter switched off, or a frozen copy."""
    config, runtime, model = context.config, context.runtime, context.model
    assert config.model is not None and config.train is not None and model is not None
    if config.model.adapter is not None:
        return Reference(model, model.disable_adapter)
    plan = replace(config.model, gradient_checkpointing=False)
    start = models.load_model(plan, tokens, runtime, config.train.seed).to(runtime.dtype)
    start.eval().requires_grad_(False)
    size = models.parameter_count(start) * runtime.dtype.itemsize
    context.say(f"grpo.beta: a frozen copy of the starting model, {size / 1e6:,.0f} MB")
    return Reference(start, nullcontext)
