"""What a loss does with a chunk of logits, in torch: each row gives its statistics, and its
gradient is written over it. No products with the head here (`heads`), and no sums over rows.

`linear_triton` has the same operations in two passes over memory instead of ten."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

#: Below this weight of the teacher in a mixture, its logarithm is taken another way.
_SMALL = 1e-3


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


#: Bytes of logits that a core of a CPU works on at a time: about its second-level cache.
CACHE = 2**20


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
        own = Own.take(z, ids, temperature, ghost is not None)
        top, total = self.exponentials(z, temperature)
        shares = own.shares(top, total, ghost is not None)
        dz = None
        if wanted:
            level, mine = shares.gradient(w, ghost, total, temperature)
            dz = self.gradient(z, top, temperature, level, own.picked, mine, dtype)
        return SparseRows(shares.logprobs, shares.lse, shares.ghost, dz)

    def exponentials(self, z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """`top` [n, 1], and `total` [n, 1], the sum of exp(z / temperature - top) over a row: 0
        where all of it is -inf. Here z is overwritten by these exponentials."""
        if temperature != 1:
            z.mul_(1 / temperature)
        top = z.amax(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)
        return top, z.sub_(top).exp_().sum(dim=1, keepdim=True)

    def gradient(
        self,
        z: Tensor,
        top: Tensor,
        temperature: float,
        level: Tensor,
        picked: Tensor,
        mine: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """level [n, 1] * exp(z / temperature - top), of the z that `exponentials` left, with `mine`
        [n, K] added at the tokens `picked`."""
        return z.mul_(level).scatter_add_(1, picked, mine)

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


class CachedRows(TorchRows):
    """The operations on a CPU, a few rows at a time: their logits stay in its caches from the first
    pass to the last, where each of ten passes would read a whole chunk from memory."""

    def sparse(self, *arguments: Any) -> SparseRows:
        return SparseRows(*_in_slices(super().sparse, *arguments))

    def dense(self, *arguments: Any, **options: Any) -> DenseRows:
        return DenseRows(*_in_slices(super().dense, *arguments, **options))


def rows_for(device: torch.device, dtype: torch.dtype) -> TorchRows:
    """The operations for logits of `dtype` on `device`: on CUDA the fused ones, where Triton is
    installed and they have given the right numbers once in this process."""
    if device.type == "cuda" and dtype == torch.float32 and _fused(device):
        from trainer.losses.linear_triton import TritonRows

        return TritonRows()
    return CachedRows() if device.type == "cpu" else TorchRows()


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


def _in_slices(operation: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """`operation` on slices of rows of its tensors, the first of which is z; its results, joined,
    and last among them the gradient, which was written over z."""
    z = arguments[0]
    size = max(1, CACHE // (z.element_size() * z.shape[1])) * torch.get_num_threads()
    parts = []
    for start in range(0, len(z), size):
        at = slice(start, start + size)
        rows = (x[at] if isinstance(x, Tensor) else x for x in arguments)
        parts.append(operation(*rows, **options))
    *columns, gradients = zip(*parts)
    joined = [None if column[0] is None else torch.cat(column) for column in columns]
    return [*joined, None if gradients[0] is None else z]


class Own(NamedTuple):
    """The logits [n, K], divided by the temperature, of the tokens that a row names; negative ids
    stand for none."""

    logits: Tensor
    picked: Tensor
    missing: Tensor

    @classmethod
    def take(cls, z: Tensor, ids: Tensor, temperature: float, alone: bool) -> Own:
        """With `alone` -inf is left in z where a token was taken, so that the probability of the
        others is a sum of theirs, never one minus something close to one."""
        picked, missing = ids.clamp_min(0), ids < 0
        logits = z.gather(1, picked)
        if alone:
            # Added, since a negative id must leave token 0 as it is.
            gone = torch.full_like(logits, -torch.inf).masked_fill_(missing, 0)
            z.scatter_add_(1, picked, gone)
        return cls(logits.mul_(1 / temperature), picked, missing)

    def shares(self, top: Tensor, total: Tensor, alone: bool) -> Shares:
        """`top` and `total` [n, 1]: the exponentials of what is left in z, as sums of rows."""
        if not alone:
            logprobs = (self.logits - top).sub_(total.log())
            return Shares(logprobs, (top + total.log()).squeeze(1), None, self.missing)
        rest = top + total.log()
        mine = self.logits.masked_fill(self.missing, -torch.inf).logsumexp(1, keepdim=True)
        gap, zero = mine - rest, torch.zeros_like(rest)
        logprobs = (self.logits - mine) - torch.logaddexp(zero, -gap)
        lse = torch.logaddexp(rest, mine).squeeze(1)
        return Shares(logprobs, lse, -torch.logaddexp(zero, gap).squeeze(1), self.missing)


class Shares(NamedTuple):
    logprobs: Tensor  # [n, K]
    lse: Tensor  # [n]
    ghost: Optional[Tensor]  # [n]
    missing: Tensor  # [n, K]

    def gradient(
        self, w: Tensor, ghost: Optional[Tensor], total: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """With W = the sum of w, and of the ghost's weight: the gradient by z is (W * softmax -
        target) / T. As a factor [n, 1] of the exponentials of z, and what is added [n, K] at the
        row's own tokens, whose exponentials are gone where there is a ghost."""
        whole = w.sum(dim=1, keepdim=True)
        if ghost is None or self.ghost is None:
            return whole / temperature / total, w / -temperature
        whole += ghost.unsqueeze(1)
        others = whole * self.ghost.exp().unsqueeze(1) - ghost.unsqueeze(1)
        mine = (whole * self.logprobs.exp() - w).masked_fill(self.missing, 0)
        return others / temperature / total.clamp_min(1), mine / temperature


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
    if (
        beta < _SMALL
    ):  # 1 - beta and expm1 may both round to one, where the sum of two logs does not
        first = torch.full_like(ratio, math.log(beta))
        both = torch.logaddexp(first, math.log1p(-beta) - ratio)
        mixed.copy_(torch.where(ratio > 1, both, mixed))
    mixed.add_(torch.clamp_min(ratio, 0, out=z_teacher))
    p = torch.add(ratio, log_q, out=z_teacher).exp_()
    of_teacher = ratio.sub_(mixed).mul_(p).sum(dim=1, keepdim=True)
    q = log_q.exp_()
    of_student = -torch.mul(q, mixed, out=ratio).sum(dim=1, keepdim=True)
    gradient = mixed.neg_().sub_(of_student).mul_(q)
    rows = beta * of_teacher + (1 - beta) * of_student
    return rows, [(gradient, torch.full_like(rows, 1 - beta))]
