"""The chunked losses give the numbers of the textbook computed in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.loss_cases import assert_close, distance, exact, gradients, kd, make_case, sparse
from trainer.losses import reference, sparse_target
from trainer.losses.heads import BLOCK


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sparse_target_in_float64_equals_the_textbook(temperature: float) -> None:
    case = make_case()
    ours = sparse(case, temperature=temperature, chunk_rows=5)
    textbook = sparse(case, reference.sparse_target, temperature=temperature)
    counts = (case["w"] != 0).any(dim=1)
    assert_close([ours.loss, *gradients(ours, case)], [textbook.loss, *gradients(textbook, case)],
                 1e-12)  # fmt: skip
    assert_close([ours.lse[counts]], [textbook.lse[counts]], 1e-12)
    assert_close([ours.logprobs[counts]], [textbook.logprobs[counts]], 1e-12)
    assert not ours.logprobs[~counts].any() and not ours.lse[~counts].any()
    assert ours.loss.dtype == ours.lse.dtype == torch.float64
    assert not ours.logprobs.requires_grad and not ours.lse.requires_grad


@pytest.mark.parametrize("vt", [211, 150, 300])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_dense_kl_in_float64_equals_the_textbook(temperature: float, vt: int) -> None:
    case = make_case(vt=vt)
    ours = kd(case, temperature=temperature, chunk_rows=5, diagnostics=True)
    textbook = kd(case, reference.dense_kl, temperature=temperature, diagnostics=True)
    assert_close(list(ours), list(textbook), 1e-12)
    assert_close(gradients(ours, case), gradients(textbook, case), 1e-12)


@pytest.mark.parametrize(
    ("temperature", "ce_weight", "kl_weight", "tolerance"),
    [(2.0, 0.3, 0.7, 2e-6), (1.0, 1.0, 0.0, 2e-6), (1.0, 0.0, 1.0, 1e-5), (4.0, 0.0, 1.0, 1e-5)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_kl_keeps_fp32_precision(
    dtype: torch.dtype, temperature: float, ce_weight: float, kl_weight: float, tolerance: float
) -> None:
    case = make_case(96, BLOCK + 123, 64, dtype=dtype)  # more than one block of the head
    terms = {"temperature": temperature, "ce_weight": ce_weight, "kl_weight": kl_weight}
    ours, truth = kd(case, chunk_rows=32, **terms), exact(case)
    expected = kd(truth, reference.dense_kl, **terms)
    assert_close([ours.loss, ours.ce, ours.kl], [expected.loss, expected.ce, expected.kl], 2e-6)
    found = gradients(ours, case)
    assert [t.dtype for t in found] == [dtype, dtype]
    assert ours.loss.dtype == torch.float32
    tolerance = tolerance if dtype == torch.float32 else 5e-3
    assert_close(found, gradients(expected, truth), tolerance)


def test_pure_kl_of_a_teacher_near_the_student_keeps_its_small_gradient() -> None:
    # The gradient is a difference of two nearly equal softmaxes: rounding is what is left of it.
    terms = {"temperature": 1.0, "ce_weight": 0.0, "kl_weight": 1.0}
    for distance_to_teacher, tolerance in ((0.2, 1e-5), (0.02, 1e-4)):
        case = make_case(64, 4096, 64, dtype=torch.float32)
        noise = torch.randn(case["hidden"].shape, generator=torch.Generator().manual_seed(1))
        case["teacher_weight"] = case["weight"].detach().clone()
        case["teacher_hidden"] = case["hidden"].detach() + distance_to_teacher * noise
        truth = exact(case)
        expected = gradients(kd(truth, reference.dense_kl, **terms), truth)
        ours = gradients(kd(case, **terms), case)
        textbook = gradients(kd(case, reference.dense_kl, **terms), case)
        for mine, theirs, want in zip(ours, textbook, expected, strict=True):
            assert distance(mine, want) <= min(tolerance, 1.5 * distance(theirs, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_target_keeps_fp32_precision(dtype: torch.dtype) -> None:
    case = make_case(96, BLOCK + 123, 64, k=5, dtype=dtype)
    case["w"] = case["w"].abs()
    truth = exact(case)
    ours = sparse(case, temperature=2.0)
    expected = sparse(truth, reference.sparse_target, temperature=2.0)
    assert distance(ours.loss, expected.loss) <= 2e-6
    found = gradients(ours, case)
    assert [t.dtype for t in found] == [dtype, dtype]
    tolerance = 2e-6 if dtype == torch.float32 else 5e-3
    assert_close(found, gradients(expected, truth), tolerance)


def test_float16_gradients_survive_a_small_norm_under_a_loss_scale() -> None:
    case = make_case(dtype=torch.float16)
    case["w"] = torch.full_like(case["w"], 1e-3)
    small = case | {"w": case["w"].float() * 1e-7}
    found = gradients(sparse(small), case, scale=1e7)
    assert_close(found, gradients(sparse(case), case), 2e-3)


def test_float32_head_with_bfloat16_hidden_states_as_under_autocast() -> None:
    case = make_case(dtype=torch.float32)
    case["hidden"] = case["hidden"].detach().bfloat16().requires_grad_()
    truth = exact(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = kd(case)
    expected = kd(truth, reference.dense_kl)
    assert distance(ours.loss, expected.loss) <= 2e-6
    dh, dw = gradients(ours, case)
    assert (dh.dtype, dw.dtype) == (torch.bfloat16, torch.float32)
    expected_dh, expected_dw = gradients(expected, truth)
    assert distance(dw, expected_dw) <= 2e-6
    assert distance(dh, expected_dh) <= 5e-3


def test_autocast_does_not_touch_the_logits() -> None:
    case = make_case(dtype=torch.float32)
    for op in (sparse, kd):
        plain = op(case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = op(case)
        assert torch.equal(plain.loss, inside.loss)
        assert all(map(torch.equal, gradients(plain, case), gradients(inside, case)))


def test_one_certain_target_is_cross_entropy() -> None:
    case = make_case(k=1)
    labels = case["labels"]
    w = torch.ones(len(labels), 1)
    ours = sparse_target(case["hidden"], case["weight"], labels.unsqueeze(1), w)
    logits = F.linear(case["hidden"], case["weight"])
    expected = F.cross_entropy(logits, labels, reduction="sum")
    assert distance(ours.loss, expected) <= 1e-12
    wanted = torch.autograd.grad(expected, [case["hidden"], case["weight"]])
    assert_close(gradients(ours, case), list(wanted), 1e-12)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_cross_entropy_agrees_with_the_one_of_torch() -> None:
    case = make_case(k=1, dtype=torch.float32)
    labels = case["labels"]
    w = torch.ones(len(labels), 1)
    ours = sparse_target(case["hidden"], case["weight"], labels.unsqueeze(1), w)
    theirs = F.linear_cross_entropy(
        case["hidden"], case["weight"], labels, reduction="sum", ignore_index=-100
    )
    assert distance(ours.loss, theirs) <= 2e-6
    wanted = torch.autograd.grad(theirs, [case["hidden"], case["weight"]])
    assert_close(gradients(ours, case), list(wanted), 2e-6)


def test_distillation_without_kl_is_cross_entropy_and_t_squared_is_in_the_gradient() -> None:
    case = make_case()
    alone = kd(case, ce_weight=1.0, kl_weight=0.0, temperature=3.0)
    labels, w = case["labels"].unsqueeze(1), torch.ones(len(case["labels"]), 1)
    ce = sparse_target(case["hidden"], case["weight"], labels, w)
    assert_close(gradients(alone, case), gradients(ce, case), 1e-12)
    # Hinton et al.: with large T the gradient tends to the one of matching centred logits.
    logits, teacher = (
        F.linear(case[f"{who}hidden"], case[f"{who}weight"]) for who in ("", "teacher_")
    )
    gap = (logits - logits.mean(1, True)) - (teacher - teacher.mean(1, True))
    gap[case["labels"] == -100] = 0
    wanted = gap.detach() @ case["weight"].detach() / logits.shape[1]
    hot = kd(case, ce_weight=0.0, kl_weight=1.0, temperature=1e4)
    assert distance(gradients(hot, case)[0], wanted) < 1e-3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 20),
    v=st.integers(1, 70),
    vt=st.integers(1, 70),
    h=st.integers(1, 9),
    k=st.integers(1, 4),
    chunk=st.integers(1, 25),
    temperature=st.floats(0.25, 8.0),
    alpha=st.floats(0.0, 1.0),
    seed=st.integers(0, 10**6),
)
def test_any_shape_temperature_and_mixture_equals_the_textbook(
    n: int, v: int, vt: int, h: int, k: int, chunk: int, temperature: float, alpha: float, seed: int
) -> None:
    case = make_case(n, v, h, k, vt=vt, seed=seed)
    terms = {"temperature": temperature, "ce_weight": alpha, "kl_weight": 1 - alpha}
    pairs = (
        (sparse(case, temperature=temperature, chunk_rows=chunk),
         sparse(case, reference.sparse_target, temperature=temperature)),
        (kd(case, chunk_rows=chunk, diagnostics=True, **terms),
         kd(case, reference.dense_kl, diagnostics=True, **terms)),
    )  # fmt: skip
    for ours, textbook in pairs:
        torch.testing.assert_close(ours.loss, textbook.loss, rtol=1e-11, atol=1e-11)
        for value, want in zip(gradients(ours, case), gradients(textbook, case), strict=True):
            torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(pairs[1][0], pairs[1][1], rtol=1e-11, atol=1e-11)


def test_weights_may_be_tensors_and_are_constants() -> None:
    case = make_case()
    norm = torch.tensor(3.0, requires_grad=True)
    tensors = kd(case, ce_weight=0.3 / norm, kl_weight=0.7 / norm)
    numbers = kd(case, ce_weight=0.1, kl_weight=0.7 / 3)
    found = torch.autograd.grad(
        tensors.loss, [case["hidden"], case["weight"], norm], allow_unused=True
    )
    assert found[2] is None
    assert_close(list(found[:2]), gradients(numbers, case), 1e-7)
    assert tensors.loss.dtype == torch.float64


def test_the_gradient_of_the_loss_scales_the_stored_gradients() -> None:
    case = make_case()
    for op in (sparse, kd):
        once, tripled = gradients(op(case), case), gradients(op(case), case, scale=3.0)
        assert_close(tripled, [3 * gradient for gradient in once], 1e-15)


def test_a_teacher_gets_no_gradient_and_may_come_from_inference_mode() -> None:
    case = make_case()
    expected = gradients(kd(case), case)
    with torch.inference_mode():
        case["teacher_hidden"] = case["teacher_hidden"] * 1.0
    case["teacher_weight"].requires_grad_()
    kd(case).loss.backward()
    assert case["teacher_weight"].grad is None
    assert_close([case["hidden"].grad, case["weight"].grad], expected, 1e-15)


@pytest.mark.parametrize("op", [sparse, kd])
def test_an_overflow_reaches_the_loss(op) -> None:
    case = make_case()
    with torch.no_grad():
        case["hidden"][case["labels"] != -100] = float("inf")
    result = op(case)
    assert not bool(result.loss.isfinite())
    assert not bool(gradients(result, case)[1].isfinite().all())


def test_large_logits_and_a_cut_vocabulary_do_not_overflow() -> None:
    case = make_case(vt=100, dtype=torch.float32)
    with torch.no_grad():
        case["hidden"].mul_(200)
        case["weight"][150].mul_(20)  # the largest logit often lies outside the teacher's part
    truth = exact(case)
    ours, expected = kd(case), kd(truth, reference.dense_kl)
    assert distance(ours.loss, expected.loss) <= 1e-5
    assert_close(gradients(ours, case), gradients(expected, truth), 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", [sparse, kd])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)]
)
def test_a_cuda_device_agrees_with_float64(op, dtype: torch.dtype, tolerance: float) -> None:
    case = make_case(96, BLOCK + 123, 64, dtype=dtype)
    device_case = {
        name: t.detach().cuda().requires_grad_(t.requires_grad) for name, t in case.items()
    }
    found = gradients(op(device_case, chunk_rows=32), device_case)
    truth = exact(case)
    textbook = reference.sparse_target if op is sparse else reference.dense_kl
    expected = gradients(op(truth, textbook), truth)
    assert_close([gradient.cpu() for gradient in found], expected, tolerance)
