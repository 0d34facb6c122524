"""The Triton operations on rows of logits give the numbers of torch, and of float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.loss_cases import Case, assert_close, exact, gradients, kd, make_case, sparse
from trainer.losses import reference
from trainer.losses.heads import BLOCK
from trainer.losses.rows import CachedRows, TorchRows, rows_for

REPOSITORY = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton (it comes with torch for CUDA)"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_triton
def test_the_kernels_agree_with_torch_when_they_are_interpreted() -> None:
    code = (
        "import torch; from trainer.losses import linear_triton; "
        "linear_triton.check(torch.device('cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@needs_triton
def test_the_check_names_a_kernel_that_is_wrong() -> None:
    code = (
        "import torch; from trainer.losses import linear_triton as t; "
        "right = t.softmax; t.softmax = lambda *a: right(*a).mul_(1.001); "
        "t.check(torch.device('cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "sparse target, K = 1: Triton and torch differ by 1.0e-03" in done.stderr


def test_a_cpu_and_float64_use_torch() -> None:
    assert type(rows_for(torch.device("cpu"), torch.float32)) is CachedRows
    assert type(rows_for(torch.device("cuda"), torch.float64)) is TorchRows


def on_device(case: Case) -> Case:
    return {name: t.detach().cuda().requires_grad_(t.requires_grad) for name, t in case.items()}


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_the_check_passes_on_this_device_and_the_losses_use_the_kernels() -> None:
    from trainer.losses.linear_triton import TritonRows, check

    check(torch.device("cuda"))
    assert type(rows_for(torch.device("cuda"), torch.float32)) is TritonRows


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("vt", [BLOCK + 123, BLOCK - 5, BLOCK + 400])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation_on_a_device_agrees_with_float64(
    dtype: torch.dtype, tolerance: float, vt: int, beta: float
) -> None:
    case = make_case(96, BLOCK + 123, 64, vt=vt, dtype=dtype)
    device_case, truth = on_device(case), exact(case)
    ours = kd(device_case, chunk_rows=32, beta=beta, diagnostics=True)
    expected = kd(truth, reference.dense_kl, beta=beta, diagnostics=True)
    assert_close([t.cpu() for t in ours if t is not None], list(expected), 1e-5)
    found = gradients(ours, device_case)
    assert_close([t.cpu() for t in found], gradients(expected, truth), tolerance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("ghost", [False, True])
def test_sparse_targets_on_a_device_agree_with_float64(
    dtype: torch.dtype, tolerance: float, k: int, ghost: bool
) -> None:
    case = make_case(96, BLOCK + 123, 64, k=k, dtype=dtype)
    case["w"] = case["w"].abs()
    case["ids"] = torch.arange(96 * k).view(96, k) * 7
    case["ghost"] = torch.rand(96, generator=torch.Generator().manual_seed(2))
    device_case, truth = on_device(case), exact(case)

    def of(which: Case) -> dict[str, torch.Tensor]:
        return {"ghost": which["ghost"]} if ghost else {}

    ours = sparse(device_case, chunk_rows=32, temperature=2.0, **of(device_case))
    expected = sparse(truth, reference.sparse_target, temperature=2.0, **of(truth))
    found = gradients(ours, device_case)
    assert_close([ours.loss.cpu()], [expected.loss], 1e-5)
    assert_close([t.cpu() for t in found], gradients(expected, truth), tolerance)
