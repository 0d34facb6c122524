"""What a loss does with a chunk of logits, in torch: each row gives its statistics, and its
gradient is written over it. No products with the head here (`heads`), and no sums over rows.

`linear_triton` has the same operations in two passes over memory instead of ten."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple, Optional

import torch
from torch import Tensor


class SparseRows(NamedTuple):
    logprobs: Tensor  # [n, K]; of negative ids: not defined
    lse: Tensor  # [n]
    ghost: Optional[Tensor]  # [n], log of the probability of all other tokens
    dz: Optional[Tensor]  # [n, V]


class DenseRows(NamedTuple):
    ce: Tensor  # [n]
    kl: Tensor  # [n], without T^2
    l2: Optional[Tensor]  # [n]
    dz: Optional[Tensor]  # [n, V]


class TorchRows:
    """The operations on any device. `dtype` [of both] is what the gradient may be rounded to; this
    class keeps the one of the logits."""

    def sparse(
        self,
        z: Tensor,
        ids: Tensor,
        w: Tensor,
        ghost: Optional[Tensor],
        temperature: float,
        wanted: bool,
        dtype: torch.dtype,
    ) -> SparseRows:
        """Logits z [n, V] (overwritten), ids and w [n, K] (w is 0 where ids are negative), ghost
        [n]: the arguments of `linear.sparse_target`, of one chunk."""
        if temperature != 1:
            z.mul_(1 / temperature)
        if ghost is not None:
            return _with_ghost(z, ids, w, ghost.unsqueeze(1), temperature, wanted)
        picked = ids.clamp_min(0)
        top = z.amax(dim=1, keepdim=True)
        logprobs = z.sub_(top).gather(1, picked)
        total = z.exp_().sum(dim=1, keepdim=True)
        logprobs.sub_(total.log())
        lse = (top + total.log()).squeeze(1)
        if not wanted:
            return SparseRows(logprobs, lse, None, None)
        target = w / temperature
        z.mul_(target.sum(dim=1, keepdim=True) / total).scatter_add_(1, picked, -target)
        return SparseRows(logprobs, lse, None, z)

    def dense(
        self,
        z: Tensor,
        z_teacher: Tensor,
        labels: Tensor,
        pull: Tensor,
        push: Tensor,
        *,
        temperature: float,
        beta: float,
        diagnostics: bool,
        wanted: bool,
        dtype: torch.dtype,
    ) -> DenseRows:
        """Logits z [n, V] and z_teacher [n, common] (both overwritten), labels [n] from 0. The
        gradient is that of pull * ce + push * T * kl, with pull and push [n, 1]."""
        common = z_teacher.shape[1]
        scratch = self._scratch(z_teacher)
        l2 = None
        if diagnostics:
            difference = torch.sub(z[:, :common], z_teacher, out=scratch)
            l2 = difference.mul_(difference).mean(dim=1)
        z.sub_(z.amax(dim=1, keepdim=True))
        divergence = _forward if beta == 0 else _skewed
        kl, terms = divergence(z[:, :common], z_teacher, scratch, temperature, beta)
        label = labels.unsqueeze(1)
        gold = z.gather(1, label)
        total = z.exp_().sum(dim=1, keepdim=True)
        ce = (total.log() - gold).squeeze(1)
        if not wanted:
            return DenseRows(ce, kl.squeeze(1), l2, None)
        z.mul_(pull / total).scatter_add_(1, label, -pull)
        for term, factor in terms:
            z[:, :common].addcmul_(term, push * factor)
        return DenseRows(ce, kl.squeeze(1), l2, z)

    _buffer: Optional[Tensor] = None

    def _scratch(self, like: Tensor) -> Tensor:
        """A buffer like the first chunk, which is the largest; kept for the next chunks."""
        if self._buffer is None or len(self._buffer) < len(like):
            self._buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
        return self._buffer[: len(like)]


def rows_for(device: torch.device, dtype: torch.dtype) -> TorchRows:
    """The operations for logits of `dtype` on `device`: on CUDA the fused ones, where Triton is
    installed and they have given the right numbers once in this process."""
    if device.type == "cuda" and dtype == torch.float32 and _fused(device):
        from trainer.losses.linear_triton import TritonRows

        return TritonRows()
    return TorchRows()


@functools.cache
def _fused(device: torch.device) -> bool:
    try:
        from trainer.losses import linear_triton
    except ImportError:
        return False
    try:
        linear_triton.check(device)
    except Exception as error:  # a missing compiler or an old driver: each has its own class
        line = str(error).strip().partition("\n")[0]
        warnings.warn(f"losses run without Triton on {device}: {line}", stacklevel=2)
        return False
    return True


def _with_ghost(
    z: Tensor, ids: Tensor, w: Tensor, ghost: Tensor, temperature: float, wanted: bool
) -> SparseRows:
    """The row's own tokens are taken out of z, so that the probability of the others is a sum of
    theirs, never one minus something close to one."""
    own = Own.take(z, ids)
    top = z.amax(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)  # -inf: no token is left
    rest = z.sub_(top).exp_().sum(dim=1, keepdim=True)
    shares = own.shares(top + rest.log())
    if wanted:
        others, mine = shares.gradient(w, ghost, temperature)
        z.mul_(others / rest.clamp_min(1)).scatter_add_(1, own.picked, mine)
    return SparseRows(shares.logprobs, shares.lse, shares.ghost.squeeze(1), z if wanted else None)


class Own(NamedTuple):
    """The logits [n, K] of a row's own, distinct tokens; negative ids stand for none."""

    logits: Tensor
    picked: Tensor
    missing: Tensor

    @classmethod
    def take(cls, z: Tensor, ids: Tensor) -> Own:
        """Leaves -inf in z where a token was taken."""
        picked, missing = ids.clamp_min(0), ids < 0
        own = cls(z.gather(1, picked), picked, missing)
        # Added, since a negative id must leave token 0 as it is.
        z.scatter_add_(1, picked, torch.full_like(own.logits, -torch.inf).masked_fill_(missing, 0))
        return own

    def shares(self, rest_lse: Tensor) -> Shares:
        """`rest_lse` [n, 1]: logsumexp of the tokens that are left."""
        own_lse = self.logits.masked_fill(self.missing, -torch.inf).logsumexp(1, keepdim=True)
        gap, zero = own_lse - rest_lse, torch.zeros_like(rest_lse)
        logprobs = (self.logits - own_lse) - torch.logaddexp(zero, -gap)
        lse = torch.logaddexp(rest_lse, own_lse).squeeze(1)
        return Shares(logprobs, lse, -torch.logaddexp(zero, gap), self.missing)


class Shares(NamedTuple):
    logprobs: Tensor  # [n, K]
    lse: Tensor  # [n]
    ghost: Tensor  # [n, 1]
    missing: Tensor  # [n, K]

    def gradient(self, w: Tensor, ghost: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """With W = ghost + sum of w: the gradient of an own token, (W * softmax - w) / T [n, K],
        and the factor [n, 1] of the softmax over the others alone, (W * their share - ghost) / T,
        that gives theirs."""
        whole = w.sum(dim=1, keepdim=True) + ghost
        mine = (whole * self.logprobs.exp() - w).masked_fill(self.missing, 0)
        return (whole * self.ghost.exp() - ghost) / temperature, mine / temperature


#: Tensors [n, V] and factors [n, 1]: the gradient of a divergence by z / T is the sum of products.
Terms = list[tuple[Tensor, Tensor]]


def _forward(
    z: Tensor, z_teacher: Tensor, scratch: Tensor, temperature: float, beta: float
) -> tuple[Tensor, Terms]:
    """KL(teacher || student) of rows [n, 1] at `temperature`, without T^2, and its gradient, the
    difference of the softmaxes. Overwrites `z_teacher` and `scratch`; `z` is only read."""
    # Its own maximum: where the vocabulary is cut, the student's largest logit may be gone.
    shift = z.amax(dim=1, keepdim=True)
    log_p = z_teacher.sub_(z_teacher.amax(dim=1, keepdim=True)).mul_(1 / temperature)
    p = torch.exp(log_p, out=scratch)
    p_total = p.sum(dim=1, keepdim=True)
    gap = log_p.add_(z, alpha=-1 / temperature).add_(shift / temperature)
    cross = gap.mul_(p).sum(dim=1, keepdim=True)
    q = torch.sub(z, shift, out=z_teacher).mul_(1 / temperature).exp_()
    q_total = q.sum(dim=1, keepdim=True)
    kl = cross / p_total + q_total.log() - p_total.log()
    return kl, [(q, 1 / q_total), (p, -1 / p_total)]


def _skewed(
    z: Tensor, z_teacher: Tensor, scratch: Tensor, temperature: float, beta: float
) -> tuple[Tensor, Terms]:
    """The same for beta in (0, 1]. With p of the teacher, q of the student, m = beta p + (1 - beta)
    q, and a factor (1 - beta) that is left out for beta = 1, where m = p, the gradient is
    q (log q/m - KL(q || m))."""
    log_q = torch.log_softmax(torch.mul(z, 1 / temperature, out=scratch), dim=1)
    ratio = torch.log_softmax(z_teacher.mul_(1 / temperature), dim=1).sub_(log_q)  # log p/q
    if beta == 1:
        q = torch.exp(log_q, out=log_q)
        reverse = -torch.mul(q, ratio, out=scratch).sum(dim=1, keepdim=True)
        gradient = ratio.neg_().sub_(reverse).mul_(q)
        return reverse, [(gradient, torch.ones_like(reverse))]
    # log m/q = log(1 + beta (p/q - 1)), from the smaller of p/q and q/p, which cannot overflow.
    share = torch.full_like(ratio, beta).masked_fill_(ratio > 0, 1 - beta)
    mixed = torch.abs(ratio, out=scratch).neg_().expm1_().mul_(share).log1p_()
    mixed.add_(torch.clamp_min(ratio, 0, out=z_teacher))
    p = torch.add(ratio, log_q, out=z_teacher).exp_()
    of_teacher = ratio.sub_(mixed).mul_(p).sum(dim=1, keepdim=True)
    q = log_q.exp_()
    of_student = -torch.mul(q, mixed, out=ratio).sum(dim=1, keepdim=True)
    gradient = mixed.neg_().sub_(of_student).mul_(q)
    rows = beta * of_teacher + (1 - beta) * of_student
    return rows, [(gradient, torch.full_like(rows, 1 - beta))]
