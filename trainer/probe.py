"""How many of the longest rows fit in memory, found before the first step: all that may come with
`micro_batch: auto`, or whether as many as the recipe says.

Nothing of training changes: no weight, no optimizer state, no random number, no data position.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from trainer import parallel, smaller
from trainer.checkpoint import rng_state, set_rng_state
from trainer.config import ConfigError, Train
from trainer.data.stream import Rows
from trainer.guard import Abort, Guard
from trainer.objective import Objective, divided
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


def noted(folder: Path, runtime: Runtime) -> Optional[int]:
    """The smallest micro-batch that any rank's `folder` asks for, since more ran out of memory in
    an earlier start; None where none does. All ranks must call it."""
    found = smaller.noted(folder)
    fewest = -runtime.largest(-math.inf if found is None else -float(found))
    return None if math.isinf(fewest) else int(fewest)


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
    fitting = 0
    with _trial(model, objective, rows, runtime) as fits:
        for count in _doubling(limit):
            if not fits(count) and not (count == 1 and _fits_in_parts(fits, objective)):
                break
            fitting = count
    if fitting == 0:
        decision = Guard().out_of_memory(1)
        assert isinstance(decision, Abort)
        raise ConfigError(decision.reason)
    what = "the whole batch of a worker" if fitting == limit else "the next size does not fit"
    say(f"micro_batch auto: {fitting} rows ({what})")
    return fitting


def make_room(
    model: nn.Module,
    objective: Objective,
    rows: Rows,
    runtime: Runtime,
    optimizer: torch.optim.Optimizer,
    *,
    micro_batch: int,
    smaller: Callable[[int], int],
) -> None:
    """Try `micro_batch` of the longest rows, and where they do not fit on every rank, what
    `smaller` answers to the number that was tried; its errors end the search. All ranks must call
    it. `optimizer`: of its state, what there is counts as it lies in memory."""
    with _trial(model, objective, rows, runtime, optimizer) as fits:
        while not fits(micro_batch):
            micro_batch = smaller(micro_batch)


def ballast(
    model: nn.Module, runtime: Runtime, optimizer: Optional[torch.optim.Optimizer]
) -> list[Tensor]:
    """As much memory as AdamW's two moments take, which it makes in the first step. All ranks must
    call it. Errors: `ConfigError` when there is not even that."""
    taken = unless_out_of_memory(_moments, model, optimizer)
    if runtime.any(taken is None)[0] or taken is None:
        raise ConfigError(
            "the optimizer's state does not fit in the device's memory beside the model: train an"
            " adapter (model.adapter), or take a larger accelerator"
        )
    return taken


def longest(rows: Rows, count: int) -> list[int]:
    """The indices of the `count` longest rows (`apart`: of those with the longest documents); of
    fewer rows, some come again."""
    lengths = rows.chunks.lengths[rows.packing.items]
    of_row = np.maximum if rows.apart else np.add
    per_row = of_row.reduceat(lengths, rows.packing.starts[:-1])
    order = np.argsort(-per_row, kind="stable")
    return [int(index) for index in np.resize(order, count)]


def _fits_in_parts(fits: Callable[[int], bool], objective: Objective) -> bool:
    """Whether one row does, that did not fit as a whole."""
    while divided(objective):
        if fits(1):
            return True
    return False


def _doubling(limit: int) -> list[int]:
    """1, 2, 4, ... below `limit`, then `limit`."""
    return [*(2**k for k in range((limit - 1).bit_length())), limit]


@contextmanager
def _trial(
    model: nn.Module,
    objective: Objective,
    rows: Rows,
    runtime: Runtime,
    optimizer: Optional[torch.optim.Optimizer] = None,
) -> Iterator[Callable[[int], bool]]:
    """The question whether so many of the longest rows fit on every rank, beside the optimizer's
    moments. When it has been asked, everything is as it was before. All ranks must ask it."""
    random, state = rng_state(), copy.deepcopy(objective.state_dict())
    room = ballast(model, runtime, optimizer)

    def fits(count: int) -> bool:
        found = _fits(model, objective, rows, count, runtime)
        model.zero_grad(set_to_none=True)
        runtime.release_memory()
        return found

    try:
        yield fits
    finally:
        del room
        runtime.release_memory()
        set_rng_state(random)
        objective.load_state_dict(state)


def _moments(model: nn.Module, optimizer: Optional[torch.optim.Optimizer]) -> list[Tensor]:
    there = optimizer.state if optimizer is not None else {}
    missing = [p for p in model.parameters() if p.requires_grad and p not in there]
    return [torch.empty_like(p) for p in missing for _ in range(2)]


def _fits(model: nn.Module, objective: Objective, rows: Rows, count: int, runtime: Runtime) -> bool:
    """One group of one micro-batch, as a step has it, up to the sum of its gradients; whether no
    rank ran out of memory. The exchanges keep one that did from leaving the others waiting. Errors:
    `Leave` where the model is sharded: one that did can tell them no more."""
    group = [rows.batch(longest(rows, count))]
    batches = parallel.attempt(model, count, prepare, objective, group, runtime, 0)
    if runtime.any(batches is None)[0] or batches is None:
        return False
    norm = normalisers(batches, runtime)
    done = parallel.attempt(model, count, backward, model, objective, batches, norm, runtime)
    return parallel.reduce_gradients(model, runtime, done is not None)
