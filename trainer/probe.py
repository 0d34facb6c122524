"""`micro_batch: auto`: how many of the longest rows fit in memory, found before the first step.

Nothing of training changes: no weight, no optimizer state, no random number, no data position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from trainer.checkpoint import rng_state, set_rng_state
from trainer.config import ConfigError, Train
from trainer.data.stream import Rows
from trainer.guard import Abort, Guard
from trainer.objective import Objective
from trainer.runtime import Runtime
from trainer.step import backward, normalisers, prepare, unless_out_of_memory


def first_cut(config: Train, world_size: int) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step) of one worker before anything is probed:
    with `auto` its whole part of the global batch. Errors: `ConfigError` if that is no number."""
    if not isinstance(config.micro_batch, str):
        return config.micro_batch, config.accumulate
    assert config.global_batch is not None
    if config.global_batch % world_size:
        raise ConfigError(
            f"train.global_batch: {config.global_batch} rows cannot be shared evenly by"
            f" {world_size} workers"
        )
    return config.global_batch // world_size, 1


def largest_micro_batch(
    model: nn.Module,
    objective: Objective,
    rows: Rows,
    runtime: Runtime,
    *,
    limit: int,
    say: Callable[[str], None],
) -> int:
    """The most rows, of 1, 2, 4, ... and `limit`, whose forward and backward fit on every rank,
    when the longest rows come together. All ranks must call it.
    Errors: `ConfigError` when one row does not fit."""
    random, state = rng_state(), copy.deepcopy(objective.state_dict())
    ballast = unless_out_of_memory(_moments, model)
    fits, fitting = not runtime.any(ballast is None)[0], 0
    for count in _doubling(limit):
        fits = fits and _fits(model, objective, rows, count, runtime)
        model.zero_grad(set_to_none=True)
        runtime.release_memory()
        if not fits:
            break
        fitting = count
    del ballast
    runtime.release_memory()
    set_rng_state(random)
    objective.load_state_dict(state)
    if fitting == 0:
        decision = Guard().out_of_memory(1)
        assert isinstance(decision, Abort)
        raise ConfigError(decision.reason)
    what = "the whole batch of a worker" if fitting == limit else "the next size does not fit"
    say(f"micro_batch auto: {fitting} rows ({what})")
    return fitting


def longest(rows: Rows, count: int) -> list[int]:
    """The indices of the `count` longest rows; of fewer rows, some come again."""
    lengths = rows.chunks.lengths[rows.packing.items]
    per_row = np.add.reduceat(lengths, rows.packing.starts[:-1])
    order = np.argsort(-per_row, kind="stable")
    return [int(index) for index in np.resize(order, count)]


def _doubling(limit: int) -> list[int]:
    """1, 2, 4, ... below `limit`, then `limit`."""
    return [*(2**k for k in range((limit - 1).bit_length())), limit]


def _moments(model: nn.Module) -> list[Tensor]:
    """As much memory as AdamW's two moments take, which it makes in the first step."""
    return [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]


def _fits(model: nn.Module, objective: Objective, rows: Rows, count: int, runtime: Runtime) -> bool:
    """One group of one micro-batch, as a step has it; whether no rank ran out of memory. The two
    exchanges keep a rank that ran out from leaving the others in a collective."""
    group = [rows.batch(longest(rows, count))]
    batches = unless_out_of_memory(prepare, objective, group, runtime, 0)
    if runtime.any(batches is None)[0] or batches is None:
        return False
    norm = normalisers(batches, runtime)
    done = unless_out_of_memory(backward, model, objective, batches, norm, runtime)
    return not runtime.any(done is None)[0]
