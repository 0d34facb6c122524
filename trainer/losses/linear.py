"""The head of a language model and its loss as one operation, over chunks of rows.

No operation here holds the [N, V] logits of a batch: a chunk of rows is projected, its gradient
with respect to the logits is written over them, and two products add it to the gradients of the
hidden states and of the head, all in the forward pass. The backward pass only multiplies those by
the gradient of the loss. So a call costs three products with the head and a few buffers of
`chunk_rows` x V, and can be differentiated once. `token_logprobs`, whose gradient the caller
chooses only after seeing them, computes the logits again in the backward pass: a fourth product.

Logits are fp32 (float64 for float64 inputs) whatever the inputs are: logits rounded to bf16 change
the gradient by several percent. Nothing here waits for the device, except that on a CPU, where
there is nothing to wait for, rows that do not count are dropped before the head. Elsewhere they are
computed with weight zero, unless the caller names the rows that count.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.chunks import Gradients, Plan, accumulator, no_autocast, spend, wanted
from trainer.losses.heads import head_for
from trainer.losses.rows import rows_for


class SparseTarget(NamedTuple):
    loss: Tensor  # 0-dim, differentiable
    logprobs: Tensor  # [N, K]
    lse: Tensor  # [N]
    ghost: Optional[Tensor] = None  # [N]


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
    ghost: Optional[Tensor] = None,
    temperature: float = 1.0,
    chunk_rows: Optional[int] = None,
    rows: Optional[Tensor] = None,
) -> SparseTarget:
    """Cross-entropy with a sparse target: loss = sum over n, k of w[n, k] * -logprobs[n, k],
    with `ghost` plus the sum over n of ghost[n] * -ghost_logprobs[n].

    `logprobs[n, k]` is log softmax(z_n / temperature) at `ids[n, k]`, with z = hidden @ weight.T,
    and `lse[n]` (nats) is the logsumexp of z_n / temperature; both are detached, fp32 or float64.
    With K = 1 and w = 1 this is the summed cross-entropy; there is no T^2 factor. The target need
    not sum to one: d loss / d z_n = (sum_k w[n, k] * softmax(z_n / T) - target_n) / T.

    hidden [N, H] and weight [V, H]: floating point; the loss is differentiable in both, once.
    ids [N, K]: long, below V; a negative id is an entry that does not count (its logprob is 0).
    w [N, K]: any sign; fold coefficients and norms in here, as tensors, without leaving the device.
    ghost [N]: the weight of one more entry, all tokens that are not among the row's ids, whose
    probability is 1 - sum_k softmax_k. For a target that is a teacher's top k this is 1 - sum_k w:
    without it the student is asked to give the k tokens all of its probability. `ghost` of the
    result is that entry's log-probability [N], detached (-inf where no token is left). The ids of a
    row must then be distinct.
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
    w = w.detach().to(accumulator(hidden, weight)).masked_fill(ids < 0, 0)
    counts = (w != 0).any(dim=1)
    if ghost is not None:
        _check_ghost(ghost, ids)
        ghost = ghost.detach().to(w.dtype)
        counts = counts | (ghost != 0)
    if rows is not None:
        counts = torch.ones_like(counts)
    plan = Plan(counts, rows, weight, chunk_rows)
    with no_autocast(hidden.device):
        return SparseTarget(
            *_SparseTarget.apply(
                hidden, weight, ids, w, ghost, float(temperature), plan, torch.is_grad_enabled()
            )
        )


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: Optional[int] = None,
    rows: Optional[Tensor] = None,
) -> Tensor:
    """log softmax(hidden @ weight.T / temperature) at `ids` [N], differentiable in hidden [N, H]
    and weight [V, H]: for objectives whose weights depend on the log-probabilities themselves (DPO,
    IPO, GRPO). Returns [N] (nats; fp32 or float64), 0 where ids are negative: those rows do not
    count, and get no gradient whatever they hold. `rows` [M]: distinct indices that contain all
    rows that count.

    The backward pass computes the logits again, from the hidden states and the head that autograd
    keeps anyway, instead of storing the gradients of all N log-probabilities. It may run more than
    once; on a CPU it leaves out rows whose gradient is zero. Where the weights are known before,
    `sparse_target` spares a product. Raises ValueError for shapes that do not fit."""
    _check_head("token_logprobs", hidden, weight, temperature, chunk_rows)
    if ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_logprobs: ids {list(ids.shape)} must be [N] with N = {len(hidden)}, the rows "
            "of hidden"
        )
    _check_ids("token_logprobs", ids, weight)
    logprobs: Tensor = _TokenLogprobs.apply(
        hidden, weight, ids, float(temperature), chunk_rows, rows
    )
    return logprobs


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
    chunk_rows: Optional[int] = None,
    diagnostics: bool = False,
    rows: Optional[Tensor] = None,
) -> DenseKL:
    """Knowledge distillation from a teacher's last hidden state (Hinton et al. 2015, arXiv
    1503.02531): loss = ce_weight * ce + kl_weight * kl, summed over the rows that count.

    ce = sum of -log softmax(z)[label]; kl = T^2 * sum of D(p, q), with p = softmax(z_teacher / T)
    and q = softmax(z / T): the T^2 keeps the size of the gradient when T changes. l2 (with
    `diagnostics`, else None) = sum over rows of the mean over the vocabulary of (z - z_teacher)^2.
    All three are detached, in nats, fp32 or float64.

    D by `beta` (Agarwal et al. 2023, arXiv 2306.13649): 0: KL(p || q), the forward one; 1:
    KL(q || p), the reverse one; between: the generalised Jensen-Shannon divergence
    beta * KL(p || m) + (1 - beta) * KL(q || m) with m = beta * p + (1 - beta) * q. Towards its ends
    that one becomes beta * KL(p || q) and (1 - beta) * KL(q || p), and so zero: beta = 0 and
    beta = 1 are their own definitions, not its limits.

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
    if not 0 <= beta <= 1:
        raise ValueError(f"dense_kl: beta is {beta}; it must be in [0, 1]")
    if labels.shape != hidden.shape[:1] or len(teacher_hidden) != len(hidden):
        raise ValueError(
            f"dense_kl: labels {list(labels.shape)} must be [N] and teacher_hidden "
            f"{list(teacher_hidden.shape)} [N, Ht] with N = {len(hidden)}, the rows of hidden"
        )
    _check_ids("dense_kl", labels, weight)
    plan = Plan(labels >= 0, rows, weight, chunk_rows)
    with no_autocast(hidden.device):
        return DenseKL(
            *_DenseKL.apply(
                hidden,
                weight,
                teacher_hidden.detach(),
                teacher_weight.detach(),
                labels,
                float(temperature),
                float(beta),
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
        ghost: Optional[Tensor],
        temperature: float,
        plan: Plan,
        recording: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
        gradients = Gradients(hidden, weight, w.dtype, wanted(ctx, recording))
        result = _sparse_rows(hidden, weight, ids, w, ghost, temperature, plan, gradients)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*(tensor for tensor in result if tensor is not None))
        logprobs, lse, ghost_logprobs = result
        loss = -(w * logprobs).sum()
        if ghost is not None and ghost_logprobs is not None:
            # Without weight it adds nothing, though no token may be left and its logarithm -inf.
            loss = loss - (ghost * ghost_logprobs).masked_fill_(ghost == 0, 0).sum()
        return loss, logprobs, lse, ghost_logprobs

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Optional[Tensor], ...]:
        return (*spend(ctx, scale), *[None] * 6)


class _TokenLogprobs(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        temperature: float,
        chunk_rows: Optional[int],
        rows: Optional[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids, rows)
        ctx.options = temperature, chunk_rows
        dtype = accumulator(hidden, weight)
        plan = Plan(ids >= 0, rows, weight, chunk_rows)
        w = torch.zeros_like(ids, dtype=dtype).unsqueeze(1)
        nothing = Gradients(hidden, weight, dtype, (False, False))
        with no_autocast(hidden.device):
            result = _sparse_rows(
                hidden, weight, ids.unsqueeze(1), w, None, temperature, plan, nothing
            )
        return result[0].squeeze(1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        hidden, weight, ids, rows = ctx.saved_tensors
        temperature, chunk_rows = ctx.options
        w = -gradient.masked_fill(ids < 0, 0)  # of the sum of w * -logprob
        plan = Plan((ids >= 0) & (w != 0), rows, weight, chunk_rows)
        gradients = Gradients(hidden, weight, w.dtype, wanted(ctx, True))
        with no_autocast(hidden.device):
            _sparse_rows(
                hidden, weight, ids.unsqueeze(1), w.unsqueeze(1), None, temperature, plan, gradients
            )
        return (*gradients.release(), *[None] * 4)


def _sparse_rows(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    w: Tensor,
    ghost: Optional[Tensor],
    temperature: float,
    plan: Plan,
    gradients: Gradients,
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """logprobs [N, K], lse [N] and the ghost's logprobs [N], chunk by chunk; fills `gradients`."""
    head = head_for(hidden, weight, w.dtype, plan.chunk_rows)
    operations = rows_for(hidden.device, w.dtype)
    logprobs, lse = torch.zeros_like(w), w.new_zeros(len(hidden))
    ghost_logprobs = None if ghost is None else torch.zeros_like(lse)
    for at in plan.chunks():
        ignored = ~plan.counts[at]
        h = head.operand(hidden[at], ~ignored.unsqueeze(1))
        of_ghost = None if ghost is None else ghost[at]
        found = operations.sparse(
            head.logits(h), ids[at], w[at], of_ghost, temperature, gradients.wanted, head.factors
        )
        logprobs[at] = found.logprobs.masked_fill_((ids[at] < 0) | ignored.unsqueeze(1), 0)
        lse[at] = found.lse.masked_fill_(ignored, 0)
        if ghost_logprobs is not None and found.ghost is not None:
            ghost_logprobs[at] = found.ghost.masked_fill_(ignored, 0)
        if found.dz is not None:
            gradients.add(at, head, found.dz, h)
    return logprobs, lse, ghost_logprobs


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
        beta: float,
        ce_weight: Union[float, Tensor],
        kl_weight: Union[float, Tensor],
        diagnostics: bool,
        plan: Plan,
        recording: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
        dtype = accumulator(hidden, weight, teacher_hidden, teacher_weight)
        student = head_for(hidden, weight, dtype, plan.chunk_rows)
        teacher = head_for(teacher_hidden, teacher_weight, dtype, plan.chunk_rows)
        operations = rows_for(hidden.device, dtype)
        gradients = Gradients(hidden, weight, dtype, wanted(ctx, recording))
        common = min(len(weight), len(teacher_weight))
        ce, kl, l2 = hidden.new_zeros((3, len(hidden)), dtype=dtype)
        for at in plan.chunks():
            counts = plan.counts[at].unsqueeze(1)
            ignored, counted = ~plan.counts[at], counts.to(dtype)
            h = student.operand(hidden[at], counts)
            found = operations.dense(
                student.logits(h),
                teacher.logits(teacher.operand(teacher_hidden[at], counts))[:, :common],
                labels[at].clamp_min(0),
                counted * ce_weight,
                # T^2 of the loss, and 1 / T of the logits inside the softmax, leave T.
                counted * (kl_weight * temperature),
                temperature=temperature,
                beta=beta,
                diagnostics=diagnostics,
                wanted=gradients.wanted,
                dtype=student.factors,
            )
            ce[at], kl[at] = found.ce.masked_fill_(ignored, 0), found.kl.masked_fill_(ignored, 0)
            if found.l2 is not None:  # rows that do not count are zero in both, and add nothing
                l2[at] = found.l2
            if found.dz is not None:
                gradients.add(at, student, found.dz, h)
        ctx.gradients = gradients
        sums = ce.sum(), kl.sum() * temperature**2, l2.sum()
        ctx.mark_non_differentiable(*sums)
        loss = (ce_weight * sums[0] + kl_weight * sums[1]).to(dtype)
        return loss, sums[0], sums[1], sums[2] if diagnostics else None

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Optional[Tensor], ...]:
        return (*spend(ctx, scale), *[None] * 10)


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


def _check_ghost(ghost: Tensor, ids: Tensor) -> None:
    if ghost.shape != ids.shape[:1]:
        raise ValueError(
            f"sparse_target: ghost {list(ghost.shape)} must be [N] with N = {len(ids)}, the rows "
            "of ids"
        )
    if ids.device.type == "cpu" and ids.shape[1] > 1:
        ordered = ids.sort(dim=1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise ValueError(
                "sparse_target: a row names a token id twice; with ghost its ids must be distinct"
            )
