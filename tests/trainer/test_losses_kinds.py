"""Reverse KL and mixtures, ghost mass, and differentiable log-probabilities: the numbers of their
definitions in float64, and what they promise beside them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.loss_cases import (
    Case,
    Operations,
    assert_close,
    distance,
    exact,
    gradients,
    kd,
    make_case,
    sparse,
)
from trainer.losses import reference, sparse_target, token_logprobs
from trainer.losses.heads import BLOCK

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
PURE = {"ce_weight": 0.0, "kl_weight": 1.0}


def ghost_case(n: int = 37, v: int = 211, k: int = 3, **options) -> tuple[Case, Tensor]:
    """Distinct ids in every row, some of them not counting, and weights of the ghost."""
    case = make_case(n, v, k=k, **options)
    g = torch.Generator().manual_seed(5)
    case["ids"] = torch.rand((n, v), generator=g).argsort(dim=1)[:, :k]
    case["ids"][::4, 0] = -100
    case["w"] = case["w"].abs().masked_fill(case["ids"] < 0, 0)
    ghost = torch.rand(n, generator=g, dtype=torch.float64).to(case["w"].dtype)
    return case, ghost.masked_fill(case["labels"] < 0, 0)


def logprobs(case: Case, op=token_logprobs, **options) -> Tensor:
    return op(case["hidden"], case["weight"], case["labels"], **options)


def preference_gradients(case: Case, values: Tensor) -> list[Tensor]:
    """Of a loss whose weights depend on the log-probabilities, as DPO's do."""
    half = len(values) // 2
    margin = values[:half].sum() - values[half:].sum()
    loss = -F.logsigmoid(0.05 * margin) + 0.01 * (values[::3].exp() * values[::3]).sum()
    return list(torch.autograd.grad(loss, [case["hidden"], case["weight"]]))


@pytest.mark.parametrize("beta", BETAS)
def test_divergences_have_the_numbers_of_their_definition(beta: float) -> None:
    p, q = [0.7, 0.2, 0.1], [0.25, 0.25, 0.5]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    ends = {0.0: kl(p, q), 1.0: kl(q, p)}
    expected = ends.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    one = torch.ones(1, 1, dtype=torch.float64)
    student, teacher = (torch.tensor([x], dtype=torch.float64).log().t() for x in (q, p))
    case = {"hidden": one.clone().requires_grad_(), "weight": student, "teacher_hidden": one,
            "teacher_weight": teacher, "labels": torch.zeros(1, dtype=torch.long)}  # fmt: skip
    assert float(kd(case, temperature=1.0, beta=beta, **PURE).kl) == pytest.approx(expected, 1e-12)
    # At T = 2 the logits that give these probabilities are twice as large; T^2 makes it 4 times.
    for name in ("weight", "teacher_weight"):
        case[name] = case[name] * 2
    assert float(kd(case, temperature=2.0, beta=beta, **PURE).kl) == pytest.approx(4 * expected)


@pytest.mark.parametrize("vt", [211, 150, 300])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_every_beta_in_float64_equals_the_textbook(
    beta: float, temperature: float, vt: int
) -> None:
    case = make_case(vt=vt)
    terms = {"temperature": temperature, "beta": beta, "diagnostics": True}
    ours, textbook = kd(case, chunk_rows=5, **terms), kd(case, reference.dense_kl, **terms)
    assert_close(list(ours), list(textbook), 1e-12)
    assert_close(gradients(ours, case), gradients(textbook, case), 1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_beta_keeps_fp32_precision(dtype: torch.dtype, beta: float) -> None:
    case = make_case(96, BLOCK + 123, 64, dtype=dtype)
    truth = exact(case)
    ours = kd(case, chunk_rows=32, beta=beta, **PURE)
    expected = kd(truth, reference.dense_kl, beta=beta, **PURE)
    assert distance(ours.loss, expected.loss) <= 2e-6
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    assert_close(gradients(ours, case), gradients(expected, truth), tolerance)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_a_teacher_near_the_student_gives_the_small_gradient_of_its_beta(beta: float) -> None:
    case = make_case(64, 4096, 64, dtype=torch.float32)
    noise = torch.randn(case["hidden"].shape, generator=torch.Generator().manual_seed(1))
    case["teacher_weight"] = case["weight"].detach().clone()
    case["teacher_hidden"] = case["hidden"].detach() + 0.02 * noise
    truth = exact(case)
    terms = {"temperature": 1.0, "beta": beta, **PURE}
    expected = gradients(kd(truth, reference.dense_kl, **terms), truth)
    assert_close(gradients(kd(case, **terms), case), expected, 1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_distributions_that_hardly_overlap_do_not_overflow(beta: float) -> None:
    case = make_case(vt=100, dtype=torch.float32)
    with torch.no_grad():
        case["hidden"].mul_(200)
        case["teacher_hidden"].mul_(200)
        case["weight"][150].mul_(20)
    truth = exact(case)
    ours, expected = kd(case, beta=beta), kd(truth, reference.dense_kl, beta=beta)
    assert distance(ours.loss, expected.loss) <= 1e-5
    assert_close(gradients(ours, case), gradients(expected, truth), 1e-4)


def test_mixtures_tend_to_their_ends_times_beta() -> None:
    case = make_case()
    for small, end in ((1e-6, 0.0), (1 - 1e-6, 1.0)):
        near, limit = kd(case, beta=small, **PURE), kd(case, beta=end, **PURE)
        assert distance(near.kl / 1e-6, limit.kl) < 1e-4
        scaled = [gradient / 1e-6 for gradient in gradients(near, case)]
        assert_close(scaled, gradients(limit, case), 1e-4)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_ghost_mass_in_float64_equals_the_textbook(temperature: float, k: int) -> None:
    case, ghost = ghost_case(k=k)
    terms = {"ghost": ghost, "temperature": temperature}
    ours, textbook = (
        sparse(case, chunk_rows=5, **terms),
        sparse(case, reference.sparse_target, **terms),
    )
    counts = (case["w"] != 0).any(dim=1) | (ghost != 0)
    assert_close([ours.loss, *gradients(ours, case)], [textbook.loss, *gradients(textbook, case)],
                 1e-12)  # fmt: skip
    for mine, theirs in zip(ours[1:], textbook[1:], strict=True):
        assert_close([mine[counts]], [theirs[counts]], 1e-12)
        assert not mine[~counts].any() and not mine.requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
def test_ghost_mass_keeps_fp32_precision(dtype: torch.dtype, tolerance: float) -> None:
    case, ghost = ghost_case(96, BLOCK + 123, h=64, k=5, dtype=dtype)
    truth = exact(case)
    ours = sparse(case, ghost=ghost, temperature=2.0)
    expected = sparse(truth, reference.sparse_target, ghost=ghost.double(), temperature=2.0)
    assert distance(ours.loss, expected.loss) <= 2e-6
    assert_close(gradients(ours, case), gradients(expected, truth), tolerance)


def test_a_ghost_of_almost_no_probability_keeps_its_logarithm_and_gradient() -> None:
    # 1 - sum of softmax is 0 in fp32 (and truly below 1e-17), so its logarithm would be -inf.
    case, _ = ghost_case(8, 50, k=2, dtype=torch.float32)
    case["ids"].clamp_(min=0)[:, 1] = 0
    case["ids"][:, 0] = 7
    with torch.no_grad():
        case["hidden"].abs_()
        case["weight"].mul_(0.1)[[0, 7]] = torch.linspace(5, 6, 16)
    ghost = torch.full((8,), 0.25)
    case["w"] = torch.full((8, 2), 0.375)
    truth = exact(case)
    logits = truth["hidden"] @ truth["weight"].t()
    rest = logits[:, [i for i in range(50) if i not in (0, 7)]].logsumexp(1) - logits.logsumexp(1)
    assert float(rest.detach().max()) < -40
    own = logits.log_softmax(1)[:, [7, 0]]
    expected = -(0.25 * rest).sum() - 0.375 * own.sum()
    wanted = torch.autograd.grad(expected, [truth["hidden"], truth["weight"]])
    ours = sparse(case, ghost=ghost)
    assert ours.ghost is not None
    assert_close([ours.ghost, ours.loss], [rest, expected], 1e-6)
    # Logits near 100 have themselves been rounded at 4e-6.
    assert_close(gradients(ours, case), list(wanted), 1e-5)


def test_with_the_ghost_a_students_own_top_k_is_where_it_stays() -> None:
    # Without it the same target pulls the student towards the k tokens alone: the negative control.
    case = make_case()
    p, ids = F.linear(case["hidden"], case["weight"]).softmax(1).detach().topk(4)
    target = case | {"ids": ids, "w": p}
    biased = gradients(sparse(target), case)
    held = gradients(sparse(target, ghost=1 - p.sum(1)), case)
    for with_ghost, without in zip(held, biased, strict=True):
        assert float(with_ghost.norm()) < 1e-12 * float(without.norm().clamp_min(1e-3))
    renormalised = target | {"w": p / p.sum(1, keepdim=True)}
    assert float(gradients(sparse(renormalised), case)[1].norm()) > 1e-3


def test_a_ghost_without_weight_changes_nothing_even_where_no_token_is_left() -> None:
    case, _ = ghost_case()
    nothing = torch.zeros(37, dtype=torch.float64)
    assert_close(gradients(sparse(case, ghost=nothing), case), gradients(sparse(case), case), 1e-12)
    every = make_case(5, 3, k=3)
    every["ids"] = torch.arange(3).expand(5, 3).clone()
    every["w"] = every["w"].abs()
    ours, plain = sparse(every, ghost=nothing[:5]), sparse(every)
    assert_close([ours.loss], [plain.loss], 1e-12)
    assert_close(gradients(ours, every), gradients(plain, every), 1e-12)
    assert bool((sparse(every, ghost=nothing[:5], rows=torch.arange(5)).ghost == -math.inf).all())


def test_a_ghost_alone_counts() -> None:
    case, ghost = ghost_case(k=1)
    case["w"].zero_()
    expected = gradients(sparse(case, reference.sparse_target, ghost=ghost), case)
    assert_close(gradients(sparse(case, ghost=ghost), case), expected, 1e-12)
    assert float(expected[1].norm()) > 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_log_probabilities_are_differentiable_in_what_the_caller_makes_of_them(
    temperature: float,
) -> None:
    case = make_case()
    ours = logprobs(case, temperature=temperature, chunk_rows=5)
    textbook = logprobs(case, reference.token_logprobs, temperature=temperature)
    assert_close([ours], [textbook], 1e-12)
    assert_close(preference_gradients(case, ours), preference_gradients(case, textbook), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_keep_fp32_precision(dtype: torch.dtype) -> None:
    case = make_case(96, BLOCK + 123, 64, dtype=dtype)
    truth = exact(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = logprobs(case)
        found = torch.autograd.grad(ours.sum(), [case["hidden"], case["weight"]])
    expected = logprobs(truth, reference.token_logprobs)
    wanted = torch.autograd.grad(expected.sum(), [truth["hidden"], truth["weight"]])
    assert ours.dtype == torch.float32 and [t.dtype for t in found] == [dtype, dtype]
    assert distance(ours, expected) <= 2e-6
    assert_close(list(found), list(wanted), 2e-6 if dtype == torch.float32 else 5e-3)


def test_log_probabilities_can_be_differentiated_again_and_skip_what_does_not_count() -> None:
    case = make_case()
    masked = case["labels"] < 0
    with torch.no_grad():
        case["hidden"][masked] = float("nan")
    values = logprobs(case)
    assert not values[masked].any()
    inputs = [case["hidden"], case["weight"]]
    once = torch.autograd.grad(values.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(values.sum() * 2, inputs)
    assert_close(list(again), [2 * gradient for gradient in once], 1e-15)
    assert not once[0][masked].any() and bool(once[1].isfinite().all())
    named = logprobs(case, rows=(~masked).nonzero().squeeze(1).flip(0), chunk_rows=4)
    assert_close([named, *torch.autograd.grad(named.sum(), inputs)], [values, *once], 1e-13)


def test_log_probabilities_hold_no_batch_of_logits_and_drop_rows_without_gradient() -> None:
    case = make_case(64, 1000, 8)
    case["labels"].clamp_(min=0)
    with Operations() as forward:
        values = logprobs(case, chunk_rows=16)
    assert forward.largest == 16 * 1000 and forward.count("aten::mm") == 4
    with Operations() as backward:
        values[:10].sum().backward()
    assert backward.largest == max(10 * 1000, case["weight"].numel())
    with torch.no_grad():
        assert not logprobs(case).requires_grad


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 12),
    v=st.integers(4, 60),
    vt=st.integers(1, 60),
    k=st.integers(1, 3),
    chunk=st.integers(1, 15),
    temperature=st.floats(0.25, 8.0),
    beta=st.floats(0.0, 1.0),
    seed=st.integers(0, 10**6),
)
@example(n=4, v=12, vt=10, k=1, chunk=1, temperature=0.25, beta=3.8e-65, seed=351749)
@example(n=4, v=12, vt=10, k=1, chunk=1, temperature=0.25, beta=1e-17, seed=351749)
def test_any_shape_and_beta_equals_the_textbook(
    n: int, v: int, vt: int, k: int, chunk: int, temperature: float, beta: float, seed: int
) -> None:
    case, ghost = ghost_case(n, v, k, vt=vt, seed=seed)
    options = {"temperature": temperature, "ghost": ghost}
    pairs = (
        (sparse(case, chunk_rows=chunk, **options),
         sparse(case, reference.sparse_target, **options)),
        (kd(case, chunk_rows=chunk, temperature=temperature, beta=beta),
         kd(case, reference.dense_kl, temperature=temperature, beta=beta)),
    )  # fmt: skip
    for ours, textbook in pairs:
        torch.testing.assert_close(ours.loss, textbook.loss, rtol=1e-9, atol=1e-10)
        for value, want in zip(gradients(ours, case), gradients(textbook, case), strict=True):
            torch.testing.assert_close(value, want, rtol=1e-8, atol=1e-10)


def test_nothing_of_these_waits_for_a_device() -> None:
    case, ghost = ghost_case(dtype=torch.bfloat16)
    meta = {
        name: t.detach().to("meta").requires_grad_(t.requires_grad)
        for name, t in (case | {"ghost": ghost}).items()
    }
    inputs = [meta["hidden"], meta["weight"]]
    for rows in (None, torch.arange(9, device="meta")):
        options = {"rows": rows, "chunk_rows": 8}
        gradients(sparse(meta, ghost=meta["ghost"], **options), meta)
        for beta in (0.5, 1.0):
            gradients(kd(meta, beta=beta, **options), meta)
        found = torch.autograd.grad(logprobs(meta, **options).sum(), inputs)
        assert [t.dtype for t in found] == [torch.bfloat16] * 2


def test_input_of_these_that_does_not_fit_is_named() -> None:
    case, ghost = ghost_case()
    with pytest.raises(ValueError, match=r"ghost \[36\] must be \[N\] with N = 37"):
        sparse(case, ghost=ghost[:36])
    twice = case["ids"].clone()
    twice[5, 1] = twice[5, 2]
    with pytest.raises(ValueError, match="a row names a token id twice"):
        sparse(case | {"ids": twice}, ghost=ghost)
    with pytest.raises(ValueError, match=r"beta is 1.5; it must be in \[0, 1\]"):
        kd(case, beta=1.5)
    with pytest.raises(ValueError, match=r"ids \[37, 3\] must be \[N\] with N = 37"):
        token_logprobs(case["hidden"], case["weight"], case["ids"])
    with pytest.raises(ValueError, match="token id 211 is outside the vocabulary"):
        token_logprobs(case["hidden"], case["weight"], torch.full((37,), 211))
    none_counts = sparse_target(
        case["hidden"], case["weight"], torch.full((37, 2), -100), case["w"][:, :2]
    )
    assert float(none_counts.loss.detach()) == 0
