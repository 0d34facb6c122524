"""The divergence from a teacher of whom only some probabilities are known, as one operation."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from trainer.losses.linear import sparse_target


class GhostTarget(NamedTuple):
    loss: Tensor  # 0-dim, differentiable
    kl: Tensor  # 0-dim


def ghost_target(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    p: Tensor,
    row_weight: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: Optional[int] = None,
) -> GhostTarget:
    """loss = sum over rows of row_weight * KL(p || q) over K + 1 outcomes: the K tokens `ids`, and
    "any other token", which has what is left of both distributions. `kl` is the sum without the
    weights, over rows whose weight is not 0. Nats; there is no T^2 factor.

    hidden [N, H], weight [V, H]: as in `sparse_target`; q = softmax(hidden @ weight.T / T).
    ids [N, K]: distinct in a row; a negative one does not count. p [N, K]: the teacher's
    probabilities at T, of sum at most 1. row_weight [N]: 0 where a row has no teacher.

    With r = (1 - sum p) / (1 - sum q), d loss / d (z_v / T) is q_v - p_v inside the K tokens and
    q_v * (1 - r) outside: the gradient of `sparse_target` with the weights p - r * q. So the head
    is multiplied once more than there, to know q."""
    counts = row_weight != 0
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    known = (ids >= 0) & counts.unsqueeze(1)
    p = p.to(dtype).masked_fill(~known, 0)
    with torch.no_grad():
        logq = sparse_target(
            hidden, weight, ids, p, temperature=temperature, chunk_rows=chunk_rows
        ).logprobs
        q = logq.exp().masked_fill(~known, 0)
        # What rounding leaves of a whole vocabulary is not a token.
        others = counts & (known.sum(dim=1) < len(weight))
        p_rest = (1 - p.sum(dim=1)).clamp_min(0).masked_fill(~others, 0)
        # 1 - sum q is only known to the rounding of its terms.
        q_rest = (1 - q.sum(dim=1)).clamp_min(8 * torch.finfo(dtype).eps)
        kl = (torch.xlogy(p, p) - p * logq).sum(dim=1)
        kl += torch.xlogy(p_rest, p_rest) - torch.xlogy(p_rest, q_rest)
        target = p - q * (p_rest / q_rest).unsqueeze(1)
        rows = row_weight.to(dtype)
    result = sparse_target(
        hidden,
        weight,
        ids,
        target * rows.unsqueeze(1),
        temperature=temperature,
        chunk_rows=chunk_rows,
    )
    value = (kl * rows).sum()
    return GhostTarget(result.loss - result.loss.detach() + value, kl.sum())
