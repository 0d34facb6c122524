"""The head of a language model and its loss as one operation, over chunks of rows.

Neither operation holds the [N, V] logits of a batch: a chunk of rows is projected, its gradient
with respect to the logits is written over them, and two products add it to the gradients of the
hidden states and of the head, all in the forward pass. The backward pass only multiplies those by
the gradient of the loss. So a call costs three products with the head and a few buffers of
`chunk_rows` x V, and can be differentiated once.

Logits are fp32 (float64 for float64 inputs) whatever the inputs are: logits rounded to bf16 change
the gradient by several percent. Nothing here waits for the device, except that on a CPU, where
there is nothing to wait for, rows that do not count are dropped before the head. Elsewhere they are
computed with weight zero, unless the caller names the rows that count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.heads import Head, head_for

#: Bytes of one fp32 buffer of logits. A CPU gains nothing from more; an accelerator reads the whole
#: head and its gradient for every chunk, so that few rows leave it waiting for memory.
CPU_BUFFER = 64 * 2**20
DEVICE_BUFFER = 512 * 2**20


class SparseTarget(NamedTuple):
    loss: Tensor  # 0-dim, differentiable
    logprobs: Tensor  # [N, K]
    lse: Tensor  # [N]


class DenseKL(NamedTuple):
    loss: Tensor  # 0-dim, differentiable
    ce: Tensor  # 0-dim
    kl: Tensor  # 0-dim
    l2: Optional[Tensor]  # 0-dim


def sparse_target(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    w: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: Optional[int] = None,
    rows: Optional[Tensor] = None,
) -> SparseTarget:
    """Cross-entropy with a sparse target: loss = sum over n, k of w[n, k] * -logprobs[n, k].

    `logprobs[n, k]` is log softmax(z_n / temperature) at `ids[n, k]`, with z = hidden @ weight.T,
    and `lse[n]` (nats) is the logsumexp of z_n / temperature; both are detached, fp32 or float64.
    With K = 1 and w = 1 this is the summed cross-entropy; there is no T^2 factor. The target need
    not sum to one: d loss / d z_n = (sum_k w[n, k] * softmax(z_n / T) - target_n) / T.

    hidden [N, H] and weight [V, H]: floating point; the loss is differentiable in both, once.
    ids [N, K]: long, below V; a negative id is an entry that does not count (its logprob is 0).
    w [N, K]: any sign; fold coefficients and norms in here, as tensors, without leaving the device.
    rows [M]: the distinct rows that count. Without it these are the rows with a weight other than
    zero. Every other row gets logprobs and lse 0 and gradient 0, whatever its hidden state holds.
    chunk_rows: rows of logits held at once. Raises ValueError for shapes that do not fit."""
    _check_head("sparse_target", hidden, weight, temperature, chunk_rows)
    if ids.dim() != 2 or ids.shape != w.shape or len(ids) != len(hidden):
        raise ValueError(
            f"sparse_target: ids {list(ids.shape)} and w {list(w.shape)} must both be [N, K] "
            f"with N = {len(hidden)}, the rows of hidden"
        )
    _check_ids("sparse_target", ids, weight)
    w = w.detach().to(_accumulator(hidden, weight)).masked_fill(ids < 0, 0)
    counts = (w != 0).any(dim=1) if rows is None else torch.ones_like(ids[:, 0], dtype=torch.bool)
    plan = _Plan(counts, rows, weight, chunk_rows)
    with _no_autocast(hidden.device):
        return SparseTarget(
            *_SparseTarget.apply(
                hidden, weight, ids, w, float(temperature), plan, torch.is_grad_enabled()
            )
        )


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
    chunk_rows: Optional[int] = None,
    diagnostics: bool = False,
    rows: Optional[Tensor] = None,
) -> DenseKL:
    """Knowledge distillation from a teacher's last hidden state (Hinton et al. 2015, arXiv
    1503.02531): loss = ce_weight * ce + kl_weight * kl, summed over the rows that count.

    ce = sum of -log softmax(z)[label]; kl = T^2 * sum of KL(softmax(z_teacher / T) ||
    softmax(z / T)), so that its gradient keeps its size when T changes; l2 (with `diagnostics`,
    else None) = sum over rows of the mean over the vocabulary of (z - z_teacher)^2. All three are
    detached, in nats, fp32 or float64.

    hidden [N, H], weight [V, H]: the student; the loss is differentiable in both, once.
    teacher_hidden [N, Ht], teacher_weight [Vt, Ht]: never get a gradient.
    labels [N]: long, below V; a negative one (-100): the row does not count, its gradient is 0.
    ce_weight, kl_weight: numbers or 0-dim tensors (coefficient / norm), taken as constants.
    rows [M]: distinct indices that contain all rows that count; saves the others' computation.

    Where V and Vt differ, kl and l2 use the first min(V, Vt) entries of both, with both softmaxes
    normalised over these alone, while ce uses the student's whole vocabulary: a vocabulary padded
    to a round size then teaches nothing wrong. Raises ValueError for shapes that do not fit."""
    _check_head("dense_kl", hidden, weight, temperature, chunk_rows)
    _check_head("dense_kl: teacher", teacher_hidden, teacher_weight, temperature, chunk_rows)
    if labels.shape != hidden.shape[:1] or len(teacher_hidden) != len(hidden):
        raise ValueError(
            f"dense_kl: labels {list(labels.shape)} must be [N] and teacher_hidden "
            f"{list(teacher_hidden.shape)} [N, Ht] with N = {len(hidden)}, the rows of hidden"
        )
    _check_ids("dense_kl", labels, weight)
    plan = _Plan(labels >= 0, rows, weight, chunk_rows)
    with _no_autocast(hidden.device):
        return DenseKL(
            *_DenseKL.apply(
                hidden,
                weight,
                teacher_hidden.detach(),
                teacher_weight.detach(),
                labels,
                float(temperature),
                ce_weight.detach() if isinstance(ce_weight, Tensor) else ce_weight,
                kl_weight.detach() if isinstance(kl_weight, Tensor) else kl_weight,
                diagnostics,
                plan,
                torch.is_grad_enabled(),
            )
        )


class _SparseTarget(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        w: Tensor,
        temperature: float,
        plan: _Plan,
        recording: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = head_for(hidden, weight, w.dtype, plan.chunk_rows)
        gradients = _Gradients(ctx, hidden, weight, w.dtype, recording)
        logprobs = torch.zeros_like(w)
        lse = w.new_zeros(len(hidden))
        for at in plan.chunks():
            counts = plan.counts[at].unsqueeze(1)
            h = head.operand(hidden[at], counts)
            z = head.logits(h)
            if temperature != 1:
                z.mul_(1 / temperature)
            top = z.amax(dim=1, keepdim=True)
            picked = ids[at].clamp_min(0)
            logprob = z.sub_(top).gather(1, picked)
            total = z.exp_().sum(dim=1, keepdim=True)
            logprob.sub_(total.log()).masked_fill_((ids[at] < 0) | ~counts, 0)
            logprobs[at] = logprob
            lse[at] = (top + total.log()).masked_fill_(~counts, 0).squeeze(1)
            if gradients.wanted:
                target = w[at] / temperature
                z.mul_(target.sum(dim=1, keepdim=True) / total).scatter_add_(1, picked, -target)
                gradients.add(at, head, z, h)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(logprobs, lse)
        return -(w * logprobs).sum(), logprobs, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Optional[Tensor], ...]:
        return (*_Gradients.spend(ctx, scale), *[None] * 5)


class _DenseKL(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        temperature: float,
        ce_weight: Union[float, Tensor],
        kl_weight: Union[float, Tensor],
        diagnostics: bool,
        plan: _Plan,
        recording: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
        dtype = _accumulator(hidden, weight, teacher_hidden, teacher_weight)
        student = head_for(hidden, weight, dtype, plan.chunk_rows)
        teacher = head_for(teacher_hidden, teacher_weight, dtype, plan.chunk_rows)
        gradients = _Gradients(ctx, hidden, weight, dtype, recording)
        common = min(len(weight), len(teacher_weight))
        scratch = hidden.new_empty((plan.chunk_rows, common), dtype=dtype)
        ce, kl, l2 = hidden.new_zeros((3, len(hidden)), dtype=dtype)
        for at in plan.chunks():
            counts = plan.counts[at].unsqueeze(1)
            h = student.operand(hidden[at], counts)
            z = student.logits(h)
            z_teacher = teacher.logits(teacher.operand(teacher_hidden[at], counts))[:, :common]
            buffer = scratch[: len(z)]
            if diagnostics:  # rows that do not count are zero in both, and add nothing
                difference = torch.sub(z[:, :common], z_teacher, out=buffer)
                l2[at] = difference.mul_(difference).mean(dim=1)
            z.sub_(z.amax(dim=1, keepdim=True))
            rows_kl, p, p_total, q, q_total = _divergence(
                z[:, :common], z_teacher, buffer, temperature
            )
            kl[at] = rows_kl.masked_fill_(~counts, 0).squeeze(1)
            label = labels[at].clamp_min(0).unsqueeze(1)
            gold = z.gather(1, label)
            total = z.exp_().sum(dim=1, keepdim=True)
            ce[at] = (total.log() - gold).masked_fill_(~counts, 0).squeeze(1)
            if gradients.wanted:
                # T^2 of the loss, and 1 / T of the logits inside the softmax, leave T.
                counted = counts.to(dtype)
                pull, push = counted * ce_weight, counted * (kl_weight * temperature)
                z.mul_(pull / total).scatter_add_(1, label, -pull)
                z[:, :common].addcmul_(q, push / q_total).addcmul_(p, -push / p_total)
                gradients.add(at, student, z, h)
        ctx.gradients = gradients
        sums = ce.sum(), kl.sum() * temperature**2, l2.sum()
        ctx.mark_non_differentiable(*sums)
        loss = (ce_weight * sums[0] + kl_weight * sums[1]).to(dtype)
        return loss, sums[0], sums[1], sums[2] if diagnostics else None

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Optional[Tensor], ...]:
        return (*_Gradients.spend(ctx, scale), *[None] * 9)


def _divergence(
    z: Tensor, z_teacher: Tensor, buffer: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KL(teacher || student) of rows [n, 1] at `temperature`, without T^2, then for the teacher and
    for the student exp((z - max) / T) [n, V] and its sum [n, 1]. The teacher's exponentials lie in
    `buffer`, the student's over `z_teacher`; `z` is only read."""
    # Its own maximum: where the vocabulary is cut, the student's largest logit may be gone.
    shift = z.amax(dim=1, keepdim=True)
    log_p = z_teacher.sub_(z_teacher.amax(dim=1, keepdim=True)).mul_(1 / temperature)
    p = torch.exp(log_p, out=buffer)
    p_total = p.sum(dim=1, keepdim=True)
    gap = log_p.add_(z, alpha=-1 / temperature).add_(shift / temperature)
    cross = gap.mul_(p).sum(dim=1, keepdim=True)
    q = torch.sub(z, shift, out=z_teacher).mul_(1 / temperature).exp_()
    q_total = q.sum(dim=1, keepdim=True)
    return cross / p_total + q_total.log() - p_total.log(), p, p_total, q, q_total


class _Plan:
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


class _Gradients:
    """The gradients of hidden states and head as they are summed in the forward pass."""

    def __init__(
        self, ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype, recording: bool
    ) -> None:
        # Without `recording` (no_grad) needs_input_grad still tells of the inputs alone.
        wants_hidden, wants_weight = (recording and needed for needed in ctx.needs_input_grad[:2])
        self.wanted = wants_hidden or wants_weight
        self.dtypes = hidden.dtype, weight.dtype
        # float16 has no room for gradients that the loss scale has not yet multiplied.
        narrow = hidden.dtype if hidden.dtype != torch.float16 else dtype
        self.hidden = torch.zeros_like(hidden, dtype=narrow) if wants_hidden else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None

    def add(self, at: Union[slice, Tensor], head: Head, dz: Tensor, h: Tensor) -> None:
        dh = head.backward(dz, h, self.hidden is not None, self.weight)
        if self.hidden is not None and dh is not None:
            self.hidden[at] = dh.to(self.hidden.dtype)

    @staticmethod
    def spend(ctx: Any, scale: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """The gradients times `scale`, in the dtypes of the inputs. They are scaled in place and
        handed over, to spare a copy of the head's, so this works once."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "this loss can be differentiated once: its gradients were computed with it and "
                "handed over by the first backward; compute the loss again"
            )
        hidden, weight = (
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip((gradients.hidden, gradients.weight), gradients.dtypes)
        )
        return hidden, weight


def _accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits and sums: float64 where an input has it, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    # Autocast would turn the products, and with them the logits, into bf16.
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)  # type: ignore[no-any-return]


def _check_head(
    name: str, hidden: Tensor, weight: Tensor, temperature: float, chunk_rows: Optional[int]
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden {list(hidden.shape)} must be [N, H] and weight {list(weight.shape)} "
            "[V, H], with the same H"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature is {temperature}; it must be greater than 0")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{name}: chunk_rows is {chunk_rows}; it must be at least 1")


def _check_ids(name: str, ids: Tensor, weight: Tensor) -> None:
    # Only on a CPU: elsewhere looking at a value waits for the device.
    if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= len(weight):
        raise ValueError(
            f"{name}: token id {int(ids.max())} is outside the vocabulary of {len(weight)} "
            "entries; do tokenizer and model belong together?"
        )
