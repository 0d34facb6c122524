"""The squared distance between the logits of two heads, in chunks of rows."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.heads import head_for

#: Bytes of one buffer of logits, of which a chunk needs two.
BUFFER = 64 * 2**20


def logit_distance(
    hidden: Tensor,
    weight: Tensor,
    start_hidden: Tensor,
    start_weight: Tensor,
    *,
    chunk_rows: Optional[int] = None,
) -> Tensor:
    """Sum over rows of the mean over the vocabulary of (z - z_start)^2, with z = hidden @ weight.T
    and z_start = start_hidden @ start_weight.T; 0-dim, fp32 or float64.

    hidden [N, H], weight [V, H]: differentiable, once; the gradient is computed in the forward
    pass, as in `linear`. start_hidden [N, Hs], start_weight [V, Hs]: never get a gradient."""
    if len(weight) != len(start_weight) or len(hidden) != len(start_hidden):
        raise ValueError(
            f"logit_distance: {len(hidden)} rows of {len(weight)} logits and {len(start_hidden)}"
            f" rows of {len(start_weight)} cannot be compared"
        )
    chunk_rows = chunk_rows or max(16, BUFFER // (4 * len(weight)))
    with torch.autocast(hidden.device.type, enabled=False):
        distance: Tensor = _LogitDistance.apply(
            hidden,
            weight,
            start_hidden.detach(),
            start_weight.detach(),
            min(chunk_rows, max(len(hidden), 1)),
        )
    return distance


class _LogitDistance(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        start_hidden: Tensor,
        start_weight: Tensor,
        chunk_rows: int,
    ) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        now = head_for(hidden, weight, dtype, chunk_rows)
        start = head_for(start_hidden, start_weight, dtype, chunk_rows)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # float16 has no room for a gradient that the caller's factor has not yet multiplied.
        narrow = hidden.dtype if hidden.dtype != torch.float16 else dtype
        d_hidden = torch.zeros_like(hidden, dtype=narrow) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        for first in range(0, len(hidden), chunk_rows):
            at = slice(first, first + chunk_rows)
            counts = torch.ones_like(hidden[at, :1], dtype=torch.bool)
            h = now.operand(hidden[at], counts)
            gap = now.logits(h).sub_(start.logits(start.operand(start_hidden[at], counts)))
            total += torch.linalg.vector_norm(gap) ** 2 / len(weight)
            d_rows = now.backward(gap.mul_(2 / len(weight)), h, wants_hidden, d_weight)
            if d_hidden is not None and d_rows is not None:
                d_hidden[at] = d_rows.to(narrow)
        ctx.gradients = d_hidden, d_weight
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, scale: Tensor) -> tuple[Optional[Tensor], ...]:
        d_hidden, d_weight = ctx.gradients
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(scale).to(ctx.dtypes[0])
        if d_weight is not None:
            d_weight = d_weight.mul_(scale).to(ctx.dtypes[1])
        return d_hidden, d_weight, None, None, None
