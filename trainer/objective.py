"""The seam between the loop and what is learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trainer.batch import Batch


@dataclass
class Loss:
    """`total` is differentiable: the sum over terms of coefficient * sum / norm[term], so adding
    the totals of all micro-batches on all ranks gives the loss of the global batch. `sums` holds,
    per metric name, the detached (sum, weight term) pair: the loop adds and divides them."""

    total: Tensor
    sums: dict[str, tuple[Tensor, str]] = field(default_factory=dict)


class Objective(Protocol):
    def prepare(self, batch: Batch, step: int) -> Batch:
        """Teacher pass, rollouts, ...: fills `batch.weights` (term -> 0-dim tensor)."""
        ...

    def loss(self, model: nn.Module, batch: Batch, norm: dict[str, Tensor], log: bool) -> Loss:
        """`norm[term]` is the weight of the global batch; a term whose norm is 0 is absent.
        `log`: this step is logged, costly diagnostics may be computed."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Divisible(Protocol):
    """An objective whose rows can be cut."""

    def divide(self) -> Optional[str]:
        """After an out-of-memory with one row: into smaller parts from now on, on all ranks alike.
        What is done, in words; None: there are none smaller. Errors: `ConfigError`, on all ranks,
        where that would not help."""
        ...


def divided(objective: Objective) -> Optional[str]:
    """What `objective` does so that a row takes less memory; None: nothing."""
    return objective.divide() if isinstance(objective, Divisible) else None


def share(coefficient: float, norm: Tensor) -> Tensor:
    """coefficient / norm as a 0-dim tensor; 0 where norm is 0 (the term is absent)."""
    return torch.where(norm > 0, coefficient / norm.clamp(min=1e-30), torch.zeros_like(norm))
