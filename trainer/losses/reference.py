"""The textbook computation of `linear`: all logits at once, gradients by autograd, in the dtype of
the inputs. For tests (in float64) and benchmarks; the arguments mean what they mean there."""

from __future__ import annotations

import math
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.batch import IGNORE
from trainer.losses.linear import DenseKL, SparseTarget


def sparse_target(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    w: Tensor,
    *,
    ghost: Optional[Tensor] = None,
    temperature: float = 1.0,
) -> SparseTarget:
    """sum of w * -log softmax(hidden @ weight.T / T)[ids]; see `linear.sparse_target`."""
    logits = F.linear(hidden, weight) / temperature
    logprobs = F.log_softmax(logits, dim=-1).gather(1, ids.clamp_min(0)).masked_fill(ids < 0, 0)
    loss, lse = -(w * logprobs).sum(), torch.logsumexp(logits, dim=-1).detach()
    if ghost is None:
        return SparseTarget(loss, logprobs.detach(), lse)
    named = torch.zeros_like(logits).scatter_add_(1, ids.clamp_min(0), (ids >= 0).to(logits)) > 0
    rest = logits.softmax(dim=-1).masked_fill(named, 0).sum(dim=1).log()
    return SparseTarget(loss - (ghost * rest).sum(), logprobs.detach(), lse, rest.detach())


def token_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """log softmax(hidden @ weight.T / T) at ids [N]; see `linear.token_logprobs`."""
    logprobs = F.log_softmax(F.linear(hidden, weight) / temperature, dim=-1)
    return logprobs.gather(1, ids.clamp_min(0).unsqueeze(1)).squeeze(1).masked_fill(ids < 0, 0)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy summed over rows, 0-dim."""
    return F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORE, reduction="sum")


def dense_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    ce_weight: Union[float, Tensor],
    kl_weight: Union[float, Tensor],
    beta: float = 0.0,
    diagnostics: bool = False,
) -> DenseKL:
    """ce_weight * CE + kl_weight * T^2 * D(teacher, student); see `linear.dense_kl`."""
    logits = F.linear(hidden, weight)
    with torch.no_grad():
        teacher_logits = F.linear(teacher_hidden, teacher_weight)
    common = min(len(weight), len(teacher_weight))
    counts = labels != IGNORE
    ce = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    log_q = F.log_softmax(logits[:, :common] / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits[:, :common] / temperature, dim=-1)
    per_row = _divergence(log_p, log_q, beta)
    kl = temperature**2 * (per_row * counts).sum()
    loss = ce_weight * ce + kl_weight * kl
    if not diagnostics:
        return DenseKL(loss, ce.detach(), kl.detach(), None)
    with torch.no_grad():
        distance = (logits[:, :common] - teacher_logits[:, :common]).square().mean(dim=-1)
    return DenseKL(loss, ce.detach(), kl.detach(), (distance * counts).sum())


def _divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(dim=-1)
