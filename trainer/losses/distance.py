"""The squared distance between the logits of two heads, in chunks of rows."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.chunks import Gradients, Plan, accumulator, no_autocast, spend, wanted
from trainer.losses.heads import head_for


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
    pass, as in `linear`. start_hidden [N, Hs], start_weight [V, Hs]: never get a gradient. Raises
    ValueError for shapes that do not fit."""
    if len(weight) != len(start_weight) or len(hidden) != len(start_hidden):
        raise ValueError(
            f"logit_distance: {len(hidden)} rows of {len(weight)} logits and {len(start_hidden)}"
            f" rows of {len(start_weight)} cannot be compared"
        )
    every = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    with no_autocast(hidden.device):
        distance: Tensor = _LogitDistance.apply(
            hidden,
            weight,
            start_hidden.detach(),
            start_weight.detach(),
            Plan(every, None, weight, chunk_rows),
            torch.is_grad_enabled(),
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
        plan: Plan,
        recording: bool,
    ) -> Tensor:
        dtype = accumulator(hidden, weight, start_hidden, start_weight)
        now = head_for(hidden, weight, dtype, plan.chunk_rows)
        start = head_for(start_hidden, start_weight, dtype, plan.chunk_rows)
        gradients = Gradients(hidden, weight, dtype, wanted(ctx, recording))
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        for at in plan.chunks():
            counts = plan.counts[at].unsqueeze(1)
            h = now.operand(hidden[at], counts)
            gap = now.logits(h).sub_(start.logits(start.operand(start_hidden[at], counts)))
            # Row by row: one fp32 norm of a whole chunk is off by a thousandth.
            total += (torch.linalg.vector_norm(gap, dim=1) ** 2).sum() / len(weight)
            if gradients.wanted:
                gradients.add(at, now, gap.mul_(2 / len(weight)), h)
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, scale: Tensor) -> tuple[Optional[Tensor], ...]:
        return (*spend(ctx, scale), *[None] * 4)
