"""Decisions of the loop when a step goes wrong. Pure: no tensors, no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union


@dataclass(frozen=True)
class Ok:
    pass


@dataclass(frozen=True)
class SkipStep:
    """The device already left weights and optimizer as they were; say so and go on."""


@dataclass(frozen=True)
class Retry:
    """Run the same group again in micro-batches of at most `micro_batch` rows."""

    micro_batch: int


@dataclass(frozen=True)
class Abort:
    reason: str


Decision = Union[Ok, SkipStep, Retry, Abort]


class Guard:
    """Counts consecutive non-finite steps; one is skipped, the second in a row ends the run."""

    def __init__(self) -> None:
        self.consecutive = 0

    def finite(self, is_finite: bool) -> Decision:
        if is_finite:
            self.consecutive = 0
            return Ok()
        self.consecutive += 1
        if self.consecutive >= 2:
            return Abort("the loss or a gradient was not finite in two steps in a row")
        return SkipStep()

    def out_of_memory(self, micro_batch: int) -> Decision:
        """`micro_batch`: rows of the largest micro-batch that was tried."""
        if micro_batch > 1:
            return Retry((micro_batch + 1) // 2)
        return Abort(
            "one row does not fit in the device's memory: lower data.sequence_length, "
            "set model.gradient_checkpointing: true, or take a larger accelerator"
        )
