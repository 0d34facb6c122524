"""What a loss does with a chunk of logits, in Triton: `rows.TorchRows` with each row read twice and
its gradient written once, in bf16 where the products that follow take bf16.

Imported only where Triton is installed, and used only after `check` has passed in this process. The
reverse divergence and the mixtures (beta > 0) stay in torch. With TRITON_INTERPRET=1 in the
environment the kernels also run on a CPU, slowly: for tests."""

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.losses.rows import DenseRows, TorchRows

#: The vocabulary is a constant of the kernels: they are compiled once for each.
#: Columns that one program reads at a time: enough loads in flight for one row per multiprocessor.
BLOCK = 4096
WARPS = 8


class TritonRows(TorchRows):
    """The operations of `TorchRows` on fp32 logits."""

    def exponentials(self, z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        # z stays as it is: its own logsumexp is the top, which leaves a total of 1.
        lse, _ = logsumexp(z, z.shape[1], temperature)
        top = lse.unsqueeze(1).clamp_min(torch.finfo(z.dtype).min)
        return top, (lse != -torch.inf).to(z.dtype).unsqueeze(1)

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
        if picked.shape[1] == 1:
            return softmax(z, top, level, temperature, dtype, picked, mine)
        # In fp32 until all is added: an id may occur twice.
        return softmax(z, top, level, temperature, z.dtype).scatter_add_(1, picked, mine)

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
        if beta != 0:
            return super().dense(
                z, z_teacher, labels, pull, push, temperature=temperature, beta=beta,
                diagnostics=diagnostics, wanted=wanted, dtype=dtype,
            )  # fmt: skip
        rows, columns = z.shape
        common = z_teacher.shape[1]
        gold = z.gather(1, labels.unsqueeze(1)).squeeze(1)
        student, whole = logsumexp(z, common, temperature, both=True)
        teacher, _ = logsumexp(z_teacher, common, temperature)
        dz = _output(z, dtype)
        kl, l2 = torch.empty_like(gold), torch.empty_like(gold)
        _divergence_kernel[(rows,)](
            z, z_teacher, dz, z.stride(0), z_teacher.stride(0), dz.stride(0),
            whole, student, teacher, labels.contiguous(),
            pull.to(z.dtype).contiguous(), push.to(z.dtype).contiguous(), kl, l2,
            common, 1 / temperature, COLUMNS=columns, WANTED=wanted, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        return DenseRows(whole - gold, kl, l2 if diagnostics else None, dz if wanted else None)


def logsumexp(
    z: Tensor, columns: int, temperature: float, both: bool = False
) -> tuple[Tensor, Tensor]:
    """logsumexp [n] of the first `columns` columns of z [n, V] / temperature and, with `both`, of
    all of z at temperature 1, in one pass."""
    part, whole = z.new_empty((2, len(z)))
    _logsumexp_kernel[(len(z),)](
        z, z.stride(0), part, whole, columns, 1 / temperature,
        COLUMNS=z.shape[1] if both else columns, BOTH=both, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return part, whole


def softmax(
    z: Tensor,
    lse: Tensor,
    factor: Tensor,
    temperature: float,
    dtype: torch.dtype,
    ids: Optional[Tensor] = None,
    values: Optional[Tensor] = None,
) -> Tensor:
    """factor [n, 1] * exp(z / temperature - lse [n, 1]) in `dtype`, over z itself where it has that
    dtype; at ids [n, 1] values [n, 1] are added."""
    out = _output(z, dtype)
    one = ids is not None and values is not None
    _softmax_kernel[(len(z),)](
        z, out, z.stride(0), out.stride(0), lse.contiguous(), factor.contiguous(),
        ids.contiguous() if ids is not None else lse,
        values.contiguous() if values is not None else lse,
        1 / temperature, COLUMNS=z.shape[1], ONE=one, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out


def check(device: torch.device) -> None:
    """Compares both operations with those of torch on `device`, for logits of a small vocabulary.
    Raises RuntimeError that names the first difference; waits for the device."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (3 * torch.randn(shape, generator=g)).to(device)

    n, v, common = 6, BLOCK + 901, BLOCK + 77
    z, z_teacher = normal(n, v), normal(n, v)[:, :common]
    for dtype, tolerance in (
        (torch.float32, 1e-5),
        (torch.bfloat16, torch.finfo(torch.bfloat16).eps),
    ):
        for temperature in (1.0, 2.5):
            for k, with_ghost in ((1, False), (3, False), (1, True), (3, True)):
                ids = torch.randperm(v, generator=g)[: n * k].view(n, k).to(device)
                ids[1, 0] = -100
                if not with_ghost:
                    ids[2, -1] = ids[2, 0]  # an id may occur twice
                w = normal(n, k).abs().masked_fill(ids < 0, 0)
                ghost = normal(n).abs() if with_ghost else None
                ours, theirs = (
                    rows.sparse(z.clone(), ids, w, ghost, temperature, True, dtype)
                    for rows in (TritonRows(), TorchRows())
                )
                named = (ids >= 0, slice(None), slice(None), slice(None))
                _compare(f"sparse target, K = {k}", ours, theirs, tolerance, named)
            labels = torch.randint(v, (n,), generator=g).to(device)
            pull, push = normal(n, 1).abs(), normal(n, 1).abs()
            found, wanted = (
                rows.dense(
                    z.clone(), z_teacher.clone(), labels, pull, push, temperature=temperature,
                    beta=0.0, diagnostics=True, wanted=True, dtype=dtype,
                )
                for rows in (TritonRows(), TorchRows())
            )  # fmt: skip
            _compare("dense KL", found, wanted, tolerance, (slice(None),) * 4)


def _compare(
    name: str,
    found: tuple[Optional[Tensor], ...],
    wanted: tuple[Optional[Tensor], ...],
    tolerance: float,
    where: tuple[Any, ...],
) -> None:
    for value, expected, part in zip(found, wanted, where):
        if value is None or expected is None:
            continue
        difference = (value[part].float() - expected[part]).norm() / expected[part].norm()
        if not float(difference) <= tolerance:
            raise RuntimeError(
                f"{name}: Triton and torch differ by {float(difference):.1e}; "
                f"the limit is {tolerance:.0e}"
            )


def _output(z: Tensor, dtype: torch.dtype) -> Tensor:
    return z if z.dtype == dtype else torch.empty_like(z, dtype=dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _logsumexp_kernel(  # type: ignore[no-untyped-def]
    z, stride, part, whole, common, scale,
    COLUMNS: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    # One row: the sum of exponentials, rescaled whenever a block brings a larger maximum.
    row = tl.program_id(0).to(tl.int64)
    top, total = float("-inf"), 0.0
    top_all, total_all = float("-inf"), 0.0
    for start in range(0, COLUMNS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(z + row * stride + at, mask=at < COLUMNS, other=float("-inf"))
        if BOTH:
            highest = tl.maximum(top_all, tl.max(value, axis=0))
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            total_all = total_all * tl.exp(top_all - shift) + tl.sum(tl.exp(value - shift), axis=0)
            top_all = highest
            value = tl.where(at < common, value, float("-inf"))
        value = value * scale
        highest = tl.maximum(top, tl.max(value, axis=0))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(value - shift), axis=0)
        top = highest
    tl.store(part + row, top + tl.log(total))
    if BOTH:
        tl.store(whole + row, top_all + tl.log(total_all))


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_kernel(  # type: ignore[no-untyped-def]
    z, out, stride, stride_out, lse, factor, ids, values, scale,
    COLUMNS: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    level, size = tl.load(lse + row), tl.load(factor + row)
    if ONE:
        own, own_value = tl.load(ids + row), tl.load(values + row)
    for start in range(0, COLUMNS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(z + row * stride + at, mask=at < COLUMNS, other=float("-inf"))
        result = size * tl.exp(value * scale - level)
        if ONE:
            result += tl.where(at == own, own_value, 0.0)
        tl.store(out + row * stride_out + at, result.to(out.dtype.element_ty), mask=at < COLUMNS)


@triton.jit  # type: ignore[untyped-decorator]
def _divergence_kernel(  # type: ignore[no-untyped-def]
    z, z_teacher, dz, stride, stride_teacher, stride_out, whole, student, teacher, labels,
    pull, push, kl, l2, common, scale,
    COLUMNS: tl.constexpr, WANTED: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    # Two rows: the sums of KL(teacher || student) and of squared differences, and the gradient of
    # pull * CE + push * T * KL.
    row = tl.program_id(0).to(tl.int64)
    level, level_q, level_p = tl.load(whole + row), tl.load(student + row), tl.load(teacher + row)
    label, of_ce, of_kl = tl.load(labels + row), tl.load(pull + row), tl.load(push + row)
    divergence, squares = 0.0, 0.0
    for start in range(0, COLUMNS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        both = at < common  # outside, exp(log_q) may overflow
        s = tl.load(z + row * stride + at, mask=at < COLUMNS, other=0.0)
        t = tl.load(z_teacher + row * stride_teacher + at, mask=both, other=0.0)
        log_q, log_p = s * scale - level_q, t * scale - level_p
        p = tl.where(both, tl.exp(log_p), 0.0)
        divergence += tl.sum(tl.where(both, p * (log_p - log_q), 0.0), axis=0)
        squares += tl.sum(tl.where(both, (s - t) * (s - t), 0.0), axis=0)
        if WANTED:
            q = tl.where(both, tl.exp(log_q), 0.0)
            gold = tl.where(at == label, 1.0, 0.0)
            result = of_ce * (tl.exp(s - level) - gold) + of_kl * (q - p)
            tl.store(dz + row * stride_out + at, result.to(dz.dtype.element_ty), mask=at < COLUMNS)
    tl.store(kl + row, divergence)
    tl.store(l2 + row, squares / common)
