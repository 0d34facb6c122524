"""The parts of a step: prepare a group of micro-batches, weigh it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.objective import Objective
from trainer.runtime import Runtime

_Result = TypeVar("_Result")


@dataclass
class Accumulated:
    """One group's forward and backward: `total` is this rank's part of the loss; `sums` its parts
    of the metrics, already divided by the global batch's weights, and `counts` which of those are
    not 0: a metric of nothing is none; `tokens` of all ranks."""

    total: Tensor
    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    tokens: Tensor


def prepare(
    objective: Objective, group: list[Batch], runtime: Runtime, step: int, progress: float = 0.0
) -> list[Batch]:
    """The whole group on the device, with its weights. `progress`: that of the horizon, 0 to 1."""
    batches = [replace(batch.to(runtime.device), progress=progress) for batch in group]
    return [objective.prepare(batch, step) for batch in batches]


def normalisers(batches: list[Batch], runtime: Runtime) -> dict[str, Tensor]:
    """Per term, the weight of the global batch: one collective for all terms."""
    terms = batches[0].weights
    return runtime.all_sum({t: torch.stack([b.weights[t] for b in batches]).sum() for t in terms})


def backward(
    model: nn.Module,
    objective: Objective,
    batches: list[Batch],
    norm: dict[str, Tensor],
    runtime: Runtime,
    log: bool = False,
    scale: float = 1.0,
) -> Accumulated:
    """Add this rank's gradients of the global batch's loss, times `scale`, to `.grad`; what is
    returned knows no scale. No communication here, so that one rank's out-of-memory cannot leave
    the others waiting in a collective."""
    # The losses compute their gradient in the forward pass and round it to the precision of the
    # hidden states: only weights that are scaled already keep small ones from becoming zero there.
    scaled = norm if scale == 1.0 else {term: weight / scale for term, weight in norm.items()}
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for batch in (part for whole in batches for part in whole.parts or (whole,)):
        with runtime.autocast():
            loss = objective.loss(model, batch, scaled, log)
        loss.total.backward()
        total += loss.total.detach()
        for name, (value, term) in loss.sums.items():
            weight = norm[term].to(runtime.device)
            share = value.detach() / weight.clamp(min=1.0)
            sums[name] = sums.get(name, torch.zeros_like(total)) + share
            counts[name] = weight > 0
    return Accumulated(total / scale, sums, counts, norm[next(iter(norm))].to(runtime.device))


def unless_out_of_memory(work: Callable[..., _Result], *arguments: Any) -> Optional[_Result]:
    """The result of `work`, or None after an out-of-memory. Nothing of the failed try survives the
    return: its traceback would keep the tensors alive."""
    try:
        return work(*arguments)
    except torch.OutOfMemoryError:
        return None


def cut(group: list[Batch], largest: int) -> list[Batch]:
    """The same rows in micro-batches of at most `largest` rows, by halving."""
    while max(batch.rows for batch in group) > largest:
        group = [
            part for batch in group for part in (batch.split() if batch.rows > largest else [batch])
        ]
    return group
