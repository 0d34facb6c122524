"""How far the gradients may be from float64, for every operation: 2e-6 in fp32 (1e-5 for a
divergence alone, whose gradient is a difference of softmaxes), 5e-3 in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.trainer.loss_cases import Case, assert_close, exact, gradients, kd, make_case, sparse
from trainer.losses import reference, token_logprobs
from trainer.losses.answers import divergence
from trainer.losses.distance import logit_distance
from trainer.losses.heads import BLOCK

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 2.0])
PURE = {"ce_weight": 0.0, "kl_weight": 1.0}


def limit(dtype: torch.dtype, pure: bool = False) -> float:
    if dtype == torch.bfloat16:
        return 5e-3
    return 1e-5 if pure else 2e-6


def sparse_case(k: int, dtype: torch.dtype) -> tuple[Case, Tensor]:
    """Distinct ids in more than one block of the head, with positive weights and a ghost's."""
    case = make_case(96, BLOCK + 123, 64, k=k, dtype=dtype)
    case["ids"] = (torch.arange(96 * k).view(96, k) * 7919) % (BLOCK + 123)
    # In the dtype of the case, so that the truth has the same ones.
    case["w"] = (case["w"].float().abs() / k).to(dtype)
    return case, torch.rand(96, generator=torch.Generator().manual_seed(2)).to(dtype)


@DTYPES
@TEMPERATURES
@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize("with_ghost", [False, True], ids=["plain", "ghost"])
def test_sparse_targets(with_ghost: bool, k: int, temperature: float, dtype: torch.dtype) -> None:
    case, ghost = sparse_case(k, dtype)
    truth = exact(case)
    ours = sparse(case, ghost=ghost if with_ghost else None, temperature=temperature, chunk_rows=32)
    expected = sparse(
        truth,
        reference.sparse_target,
        ghost=ghost.double() if with_ghost else None,
        temperature=temperature,
    )
    assert_close([ours.loss], [expected.loss], 2e-6)
    assert_close(gradients(ours, case), gradients(expected, truth), limit(dtype))


@DTYPES
def test_label_smoothing(dtype: torch.dtype) -> None:
    case = make_case(64, 300, 64, dtype=dtype)
    case["ids"] = torch.arange(300).expand(64, 300)
    smooth = torch.full((64, 300), 0.1 / 300, dtype=torch.float64)
    smooth[torch.arange(64), case["labels"].clamp_min(0)] += 0.9
    case["w"] = smooth.masked_fill((case["labels"] < 0).unsqueeze(1), 0).float()
    truth = exact(case)
    logits = truth["hidden"] @ truth["weight"].t()
    expected = torch.nn.functional.cross_entropy(
        logits, case["labels"], reduction="sum", label_smoothing=0.1
    )
    wanted = torch.autograd.grad(expected, [truth["hidden"], truth["weight"]])
    ours = sparse(case, chunk_rows=16)
    assert_close([ours.loss], [expected], 2e-6)
    assert_close(gradients(ours, case), list(wanted), limit(dtype))


@DTYPES
@TEMPERATURES
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("pure", [False, True], ids=["with_ce", "alone"])
def test_divergences(pure: bool, beta: float, temperature: float, dtype: torch.dtype) -> None:
    case = make_case(96, BLOCK + 123, 64, dtype=dtype)
    truth = exact(case)
    terms = {"beta": beta, "temperature": temperature, **(PURE if pure else {})}
    ours, expected = kd(case, chunk_rows=32, **terms), kd(truth, reference.dense_kl, **terms)
    assert_close([ours.loss], [expected.loss], 2e-6)
    assert_close(gradients(ours, case), gradients(expected, truth), limit(dtype, pure))


@DTYPES
@TEMPERATURES
@pytest.mark.parametrize("k", [1, 20])
def test_stored_answers(k: int, temperature: float, dtype: torch.dtype) -> None:
    case, _ = sparse_case(k, dtype)
    p = case["w"].float()
    p = p / (p.sum(dim=1, keepdim=True) + 0.3)
    known = case["labels"] >= 0
    truth = exact(case)
    ids = case["ids"].masked_fill(~known.unsqueeze(1), -1)
    found, expected = (
        torch.autograd.grad(
            divergence(
                which["hidden"], which["weight"], ids, p.to(kind), known, temperature=temperature
            ),
            [which["hidden"], which["weight"]],
        )
        for which, kind in ((case, torch.float32), (truth, torch.float64))
    )
    assert_close(list(found), list(expected), limit(dtype, pure=True))


@DTYPES
@pytest.mark.parametrize("op", ["logprobs", "keep"])
def test_log_probabilities_and_the_distance_to_the_start(op: str, dtype: torch.dtype) -> None:
    case = make_case(96, BLOCK + 123, 64, dtype=dtype)
    truth = exact(case)

    def of(which: Case) -> Tensor:
        inputs = which["hidden"], which["weight"]
        if op == "logprobs":
            return token_logprobs(*inputs, which["labels"], temperature=2.0, chunk_rows=32).sum()
        start = (which[name].detach().roll(1, 0) for name in ("hidden", "weight"))
        return logit_distance(*inputs, *start, chunk_rows=32)

    found, expected = (
        torch.autograd.grad(of(which), [which["hidden"], which["weight"]])
        for which in (case, truth)
    )
    assert_close(list(found), list(expected), limit(dtype))
