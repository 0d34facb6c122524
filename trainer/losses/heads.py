"""The three products of a loss with the head of a language model, in the precision that the loss
needs: logits, and the gradients of hidden states and head from the gradient of the logits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

#: Rows of the head that are cast to fp32, or whose gradient is added, at a time.
BLOCK = 8192


def head_for(hidden: Tensor, weight: Tensor, dtype: torch.dtype, chunk_rows: int) -> Head:
    """How the products with the head `weight` [V, H] are computed on its device, for factors like
    `hidden`, at most `chunk_rows` rows at a time, with results in `dtype`."""
    narrow = dtype == torch.float32 and torch.bfloat16 in (hidden.dtype, weight.dtype)
    if narrow and _mixed_output(weight.device):
        return MixedHead(weight.to(torch.bfloat16), dtype, chunk_rows)
    if weight.dtype == dtype:
        return Head(weight, dtype, chunk_rows)
    return UpcastHead(weight, dtype, chunk_rows)


class Head:
    """The three products with a head [V, H] that already has the dtype of the results."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, chunk_rows: int) -> None:
        self.weight, self.dtype, self.chunk_rows = weight, dtype, chunk_rows

    @property
    def factors(self) -> torch.dtype:
        """The dtype of the factors of the products of `backward`."""
        return self.dtype

    @functools.cached_property
    def buffer(self) -> Tensor:
        return self.weight.new_empty((self.chunk_rows, len(self.weight)), dtype=self.dtype)

    def operand(self, hidden: Tensor, counts: Tensor) -> Tensor:
        """Rows of hidden states as a factor. Rows that do not count become zero: what they hold,
        NaN perhaps, must not reach the others through 0 * NaN in the head's gradient."""
        return hidden.to(self.dtype).masked_fill(~counts, 0)

    def logits(self, h: Tensor) -> Tensor:
        """h @ weight.T, [n, V], in a buffer that the next call uses again."""
        return torch.mm(h, self.weight.t(), out=self.buffer[: len(h)])

    def backward(
        self, dz: Tensor, h: Tensor, wants_hidden: bool, weight_gradient: Optional[Tensor]
    ) -> Optional[Tensor]:
        """Adds dz.T @ h to `weight_gradient`, where there is one; returns dz @ weight, [n, H]."""
        if weight_gradient is not None:
            weight_gradient.addmm_(dz.t(), h)
        return torch.mm(dz, self.weight) if wants_hidden else None


class UpcastHead(Head):
    """A narrower head, cast block by block: a GEMM of a CPU in bf16 is emulated, slowly, and its
    result would be rounded to bf16."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        size = len(self.weight)
        scratch = self.weight.new_empty((min(BLOCK, size), self.weight.shape[1]), dtype=self.dtype)
        for start in range(0, size, BLOCK):
            at = slice(start, min(start + BLOCK, size))
            yield at, scratch[: at.stop - start].copy_(self.weight[at])

    def logits(self, h: Tensor) -> Tensor:
        z = self.buffer[: len(h)]
        for at, block in self.blocks():
            torch.mm(h, block.t(), out=z[:, at])
        return z

    def backward(
        self, dz: Tensor, h: Tensor, wants_hidden: bool, weight_gradient: Optional[Tensor]
    ) -> Optional[Tensor]:
        if weight_gradient is not None:
            weight_gradient.addmm_(dz.t(), h)
        if not wants_hidden:
            return None
        dh = torch.zeros_like(h)
        for at, block in self.blocks():
            dh.addmm_(dz[:, at], block)
        return dh


class MixedHead(Head):
    """bf16 factors and fp32 results in one product (CUDA). With factors of two dtypes both become
    bf16, as under autocast."""

    @property
    def factors(self) -> torch.dtype:
        return torch.bfloat16

    def operand(self, hidden: Tensor, counts: Tensor) -> Tensor:
        return hidden.to(torch.bfloat16).masked_fill(~counts, 0)

    def logits(self, h: Tensor) -> Tensor:
        return torch.mm(h, self.weight.t(), out_dtype=self.dtype)

    def backward(
        self, dz: Tensor, h: Tensor, wants_hidden: bool, weight_gradient: Optional[Tensor]
    ) -> Optional[Tensor]:
        dz = dz.to(torch.bfloat16)
        if weight_gradient is not None and _mixed_accumulation(weight_gradient.device):
            torch.addmm(weight_gradient, dz.t(), h, out_dtype=self.dtype, out=weight_gradient)
        elif weight_gradient is not None:
            for start in range(0, len(self.weight), BLOCK):
                at = slice(start, start + BLOCK)
                weight_gradient[at] += torch.mm(dz[:, at].t(), h, out_dtype=self.dtype)
        return torch.mm(dz, self.weight, out_dtype=self.dtype) if wants_hidden else None


@functools.cache
def _mixed_output(device: torch.device) -> bool:
    """Whether torch.mm takes bf16 factors and writes fp32 there (CUDA, with recent hardware)."""
    if device.type != "cuda":
        return False
    probe = torch.zeros((16, 16), dtype=torch.bfloat16, device=device)
    try:
        torch.mm(probe, probe, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


@functools.cache
def _mixed_accumulation(device: torch.device) -> bool:
    """Whether torch.addmm adds a product of bf16 factors to an fp32 tensor in place there, and gets
    it right: this spares a pass over the head's gradient for every chunk. Waits for the device,
    once in a process."""
    if device.type != "cuda":
        return False
    a = torch.linspace(-1, 1, 64 * 16, device=device).bfloat16().view(64, 16)
    b = a.flip(0) + 1
    total = torch.ones((16, 16), device=device)
    expected = total + a.float().t() @ b.float()
    try:
        torch.addmm(total, a.t(), b, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool(torch.allclose(total, expected, rtol=1e-3, atol=1e-3))
