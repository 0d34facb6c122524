"""The divergence from a teacher's stored answers: of each row some probabilities are known."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from trainer.losses.linear import sparse_target


def divergence(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    p: Tensor,
    others: Optional[Tensor],
    *,
    temperature: float,
    chunk_rows: Optional[int] = None,
) -> Tensor:
    """The sum over rows of KL(p || q) of the answers p [N, K] at `ids` [N, K] (negative: no entry)
    and q = softmax(hidden @ head.T / T), in nats, without T^2. In the rows `others` [N], whose ids
    are distinct, what p leaves of 1 belongs to "any other token", one more outcome. Elsewhere p is
    to be all: shares of samples. Their entropy, a constant, is subtracted, so that what is left
    where q is the teacher is the noise of sampling. 0-dim; differentiable, once."""
    p = p.to(torch.promote_types(hidden.dtype, torch.float32)).masked_fill(ids < 0, 0)
    ghost = None
    if others is not None:
        # What rounding leaves of a whole vocabulary is not a token.
        others = others & ((ids >= 0).sum(dim=1) < len(head))
        ghost = (1 - p.sum(dim=1)).clamp_min(0).masked_fill(~others, 0)
    found = sparse_target(
        hidden, head, ids, p, ghost=ghost, temperature=temperature, chunk_rows=chunk_rows
    ).loss
    found = found + torch.xlogy(p, p).sum()
    return found if ghost is None else found + ghost.xlogy(ghost).sum()
