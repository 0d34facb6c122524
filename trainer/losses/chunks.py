"""Which rows of a loss are computed, in what chunks, and the gradients summed over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional, Union

import torch
from torch import Tensor

from trainer.losses.heads import Head

#: Bytes of one fp32 buffer of logits. A CPU gains little from more; an accelerator reads the whole
#: head and its gradient for every chunk, so that few rows leave it waiting for memory.
CPU_BUFFER = 128 * 2**20
DEVICE_BUFFER = 512 * 2**20


class Plan:
    """Which rows are computed, and how many at a time. `counts` [N]: which rows have a weight."""

    def __init__(
        self, counts: Tensor, rows: Optional[Tensor], weight: Tensor, chunk_rows: Optional[int]
    ) -> None:
        on_cpu = counts.device.type == "cpu"
        if rows is None and on_cpu and not bool(counts.all()):
            rows = counts.nonzero().squeeze(1)
        self.counts, self.rows = counts, rows
        self.size = len(counts) if rows is None else len(rows)
        budget = CPU_BUFFER if on_cpu else DEVICE_BUFFER
        chunk_rows = chunk_rows or max(16, budget // (4 * len(weight)))
        self.chunk_rows = min(chunk_rows, max(self.size, 1))

    def chunks(self) -> Iterator[Union[slice, Tensor]]:
        """What selects the rows of one chunk from a tensor [N, ...]."""
        for start in range(0, self.size, self.chunk_rows):
            at = slice(start, start + self.chunk_rows)
            yield at if self.rows is None else self.rows[at]


class Gradients:
    """The gradients of hidden states and head as they are summed over the chunks. `wanted` [2]:
    whether each of them is."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, dtype: torch.dtype, wanted: tuple[bool, bool]
    ) -> None:
        self.wanted = any(wanted)
        self.dtypes = hidden.dtype, weight.dtype
        # float16 has no room for gradients that the loss scale has not yet multiplied.
        narrow = hidden.dtype if hidden.dtype != torch.float16 else dtype
        self.hidden = torch.zeros_like(hidden, dtype=narrow) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None

    def add(self, at: Union[slice, Tensor], head: Head, dz: Tensor, h: Tensor) -> None:
        dh = head.backward(dz, h, self.hidden is not None, self.weight)
        if self.hidden is not None and dh is not None:
            self.hidden[at] = dh.to(self.hidden.dtype)

    def release(self, scale: Optional[Tensor] = None) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """The gradients, times `scale`, in the dtypes of the inputs. They are scaled in place and
        handed over, to spare a copy of the head's, so this works once."""
        hidden, weight = (
            None
            if gradient is None
            else (gradient if scale is None else gradient.mul_(scale)).to(dtype)
            for gradient, dtype in zip((self.hidden, self.weight), self.dtypes)
        )
        self.hidden = self.weight = None
        return hidden, weight


def spend(ctx: Any, scale: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Hands over `ctx.gradients`, which the forward pass summed, times `scale`."""
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError(
            "this loss can be differentiated once: its gradients were computed with it and "
            "handed over by the first backward; compute the loss again"
        )
    released: tuple[Optional[Tensor], Optional[Tensor]] = gradients.release(scale)
    return released


def wanted(ctx: Any, recording: bool) -> tuple[bool, bool]:
    """Whether hidden states and head, the first two inputs, need a gradient. Without `recording`
    (no_grad) needs_input_grad still tells of the inputs alone."""
    hidden, weight = ctx.needs_input_grad[:2]
    return recording and hidden, recording and weight


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits and sums: float64 where an input has it, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would turn the products, and with them the logits, into bf16."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)  # type: ignore[no-any-return]
