"""Inputs for the losses, and how two results are compared."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.losses import DenseKL, SparseTarget, dense_kl, sparse_target

Case = dict[str, Tensor]


def make_case(
    n: int = 37,
    v: int = 211,
    h: int = 16,
    k: int = 3,
    *,
    vt: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """Inputs of both operations; a fifth of the rows does not count."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    ht, vt = h + 8, vt or v
    case = {
        "hidden": normal(n, h),
        "weight": normal(v, h) * 2 / h**0.5,
        "teacher_hidden": normal(n, ht),
        "teacher_weight": normal(vt, ht) * 2 / ht**0.5,
        "w": normal(n, k),
    }
    case = {name: tensor.to(dtype) for name, tensor in case.items()}
    case["ids"] = torch.randint(v, (n, k), generator=g)
    case["labels"] = torch.randint(v, (n,), generator=g)
    masked = torch.rand(n, generator=g) < 0.2
    case["w"][masked] = 0
    case["labels"][masked] = -100
    for name in ("hidden", "weight"):
        case[name].requires_grad_()
    return case


def exact(case: Case) -> Case:
    """The same values in float64."""
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in case.items()
    }


def sparse(case: Case, op=sparse_target, **options) -> SparseTarget:
    return op(case["hidden"], case["weight"], case["ids"], case["w"], **options)


def kd(case: Case, op=dense_kl, **options) -> DenseKL:
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "labels")
    options = {"temperature": 2.0, "ce_weight": 0.3, "kl_weight": 0.7, **options}
    return op(*(case[name] for name in names), **options)


def gradients(result: SparseTarget | DenseKL, case: Case, scale: float = 1.0) -> list[Tensor]:
    return list(torch.autograd.grad(result.loss * scale, [case["hidden"], case["weight"]]))


def distance(value: Tensor, expected: Tensor) -> float:
    """The L2 norm of the difference, relative to the norm of `expected`."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_close(values: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for value, want in zip(values, expected, strict=True):
        assert value.shape == want.shape
        assert distance(value, want) <= tolerance


class Operations(TorchDispatchMode):
    """Records the operations that run, their dtypes, and the elements of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.calls.append((func._schema.name, tensor.dtype))
                self.largest = max(self.largest, tensor.numel())
        return result

    def count(self, *names: str) -> int:
        return sum(name in names for name, _ in self.calls)

    def dtypes_of(self, *names: str) -> set[torch.dtype]:
        return {dtype for name, dtype in self.calls if name in names}
