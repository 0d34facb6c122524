"""Torch's flash-attention kernels for the CPU, which has none: written out in fp32. With them
`varlen_attn` runs here as it is, with its own checks and its own gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor


@contextlib.contextmanager
def registered() -> Iterator[list[tuple[int, ...]]]:
    """Yields the borders of documents, one entry for each call of the forward kernel."""
    calls: list[tuple[int, ...]] = []

    def forward(
        query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int,
        max_k: int, dropout: float, causal: bool, debug: bool, *, scale: Optional[float] = None,
        window_size_left: Optional[int] = None, window_size_right: Optional[int] = None,
        **others: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert dropout == 0 and torch.equal(cum_q, cum_k) and cum_q.dtype == torch.int32
        assert max_q == max_k == int(cum_q.diff().max())
        calls.append(tuple(cum_q.tolist()))
        seen = _seen(cum_q, causal, window_size_left, window_size_right)
        output, lse = _attend(query, key, value, seen, scale)
        none = torch.zeros(2, dtype=torch.uint64)
        return torch.empty_like(query).copy_(output), lse, none, none.clone(), torch.empty(0)

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
        cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
        rng: Tensor, unused: Tensor, *, scale: Optional[float] = None,
        window_size_left: Optional[int] = None, window_size_right: Optional[int] = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        seen = _seen(cum_q, causal, window_size_left, window_size_right)
        q, k, v, scores = _scores(query, key, value, seen, scale)
        g, o = (t.float().transpose(0, 1) for t in (grad, out))
        share = (scores - lse.unsqueeze(-1)).exp()
        change = share * (g @ v.transpose(1, 2) - (g * o).sum(-1, keepdim=True))
        change = change * (scale or query.shape[-1] ** -0.5)
        found = [change @ k, change.transpose(1, 2) @ q, share.transpose(1, 2) @ g]
        heads = (query.shape[1], key.shape[1], key.shape[1])
        return tuple(
            torch.empty_like(like).copy_(t.unflatten(0, (count, -1)).sum(1).transpose(0, 1))
            for t, count, like in zip(found, heads, (query, key, value))
        )

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield calls
    finally:
        library._destroy()


def _seen(cum: Tensor, causal: bool, left: Optional[int], right: Optional[int]) -> Tensor:
    """[tokens, tokens]: whether a query (row) sees a key. -1 is a window without end."""
    document = torch.repeat_interleave(torch.arange(len(cum) - 1), cum.diff().long())
    at = torch.arange(len(document))
    back = at[:, None] - at[None, :]
    seen = document[:, None] == document[None, :]
    if causal:
        seen &= back >= 0
    if left is not None and left >= 0:
        seen &= back <= left
    if right is not None and right >= 0:
        seen &= -back <= right
    return seen


def _attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: Optional[float]
) -> tuple[Tensor, Tensor]:
    """Of [tokens, heads, width]; the logsumexp is [heads, tokens]."""
    _, _, v, scores = _scores(query, key, value, seen, scale)
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)


def _scores(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: Optional[float]
) -> tuple[Tensor, ...]:
    """The factors [heads, tokens, width], keys and values once for each query, and the scores."""
    times = query.shape[1] // key.shape[1]
    q, k, v = (t.float().transpose(0, 1) for t in (query, key, value))
    k, v = k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)
    scores = q @ k.transpose(1, 2) * (scale or query.shape[-1] ** -0.5)
    return q, k, v, scores.masked_fill(~seen, -torch.inf)
