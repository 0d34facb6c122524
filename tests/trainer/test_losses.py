"""The chunked losses against the textbook computed in float64, and what they promise beside the
numbers: nothing of size N x V, no wait for a device, one backward."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.losses import DenseKL, SparseTarget, dense_kl, reference, sparse_target
from trainer.losses.heads import BLOCK, MixedHead

REPOSITORY = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("op", [sparse, kd])
def test_the_size_of_chunks_does_not_matter(op) -> None:
    case = make_case()
    whole = op(case)
    for chunk in (1, 7, 1000):
        part = op(case, chunk_rows=chunk)
        assert_close(
            [part.loss, *gradients(part, case)], [whole.loss, *gradients(op(case), case)], 1e-13
        )


@pytest.mark.parametrize("op", [sparse, kd])
def test_no_rows_and_no_rows_that_count_give_zero(op) -> None:
    nothing_counts = make_case()
    nothing_counts["w"].zero_()
    nothing_counts["labels"].fill_(-100)
    for case in (make_case(n=0), nothing_counts):
        result = op(case)
        assert float(result.loss.detach()) == 0
        for gradient, name in zip(gradients(result, case), ("hidden", "weight"), strict=True):
            assert gradient.shape == case[name].shape and not gradient.any()


@pytest.mark.parametrize("op", [sparse, kd])
def test_named_rows_give_the_same_result_as_masked_ones(op) -> None:
    case = make_case()
    counts = (case["labels"] != -100).nonzero().squeeze(1)
    shuffled = counts[torch.randperm(len(counts), generator=torch.Generator().manual_seed(3))]
    masked, named = op(case), op(case, rows=shuffled, chunk_rows=4)
    everything = op(case, rows=torch.arange(len(case["labels"])))
    expected = [masked.loss, *gradients(masked, case)]
    assert_close([named.loss, *gradients(named, case)], expected, 1e-13)
    assert_close([everything.loss, *gradients(everything, case)], expected, 1e-13)


def test_rows_that_are_not_named_do_not_count() -> None:
    case = make_case()
    some = torch.tensor([1, 5, 8])
    picked = {
        name: t.detach()[some].requires_grad_(t.requires_grad) if len(t) == 37 else t
        for name, t in case.items()
    }
    for op in (sparse, kd):
        named, alone = op(case, rows=some), op(picked)
        assert distance(named.loss, alone.loss) <= 1e-13
        (dh, dw), (dh_alone, dw_alone) = gradients(named, case), gradients(alone, picked)
        assert_close([dh[some], dw], [dh_alone, dw_alone], 1e-13)
        assert int(dh.any(dim=1).sum()) == int(dh_alone.any(dim=1).sum())


def test_named_rows_report_logprobs_even_with_weight_zero() -> None:
    case = make_case()
    case["w"].zero_()
    result = sparse(case, rows=torch.arange(10))
    textbook = sparse(case, reference.sparse_target)
    assert_close([result.logprobs[:10]], [textbook.logprobs[:10]], 1e-12)
    assert not result.logprobs[10:].any() and not gradients(result, case)[1].any()


@pytest.mark.parametrize("op", [sparse, kd])
def test_what_masked_rows_hold_cannot_spread(op) -> None:
    case = make_case()
    masked = case["labels"] == -100
    expected = gradients(op(case), case)
    with torch.no_grad():
        case["hidden"][masked] = float("nan")
        case["teacher_hidden"][masked] = float("inf")
    assert all(map(torch.equal, gradients(op(case), case), expected))
    if op is kd:  # as on a device, where rows cannot be dropped: every row goes through the head
        result = kd(case, rows=torch.arange(len(masked)), diagnostics=True)
        assert_close(gradients(result, case), expected, 1e-13)
        assert result.l2 is not None and bool(result.l2.isfinite())


def test_a_negative_id_is_an_entry_that_does_not_count() -> None:
    case = make_case()
    masked = case["ids"].clone()
    masked[::2, 1] = -100
    without = case | {"w": case["w"].masked_fill(masked < 0, 0)}
    found, expected = sparse(case | {"ids": masked}), sparse(without)
    assert torch.equal(found.loss, expected.loss)
    assert all(map(torch.equal, gradients(found, case), gradients(expected, case)))
    assert not found.logprobs[masked < 0].any()


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
def test_only_the_gradients_that_are_wanted_are_computed(op) -> None:
    case = make_case()
    expected = gradients(op(case), case)
    for wanted, other, value in (
        ("hidden", "weight", expected[0]),
        ("weight", "hidden", expected[1]),
    ):
        frozen = case | {other: case[other].detach()}
        with Operations() as operations:
            op(frozen).loss.backward()
        products = 2 if op is sparse else 3  # logits (and the teacher's), and one gradient
        assert operations.count("aten::mm", "aten::addmm_") == products
        assert_close([case[wanted].grad], [value], 1e-15)
    with torch.no_grad(), Operations() as operations:
        assert not op(case).loss.requires_grad
    assert operations.count("aten::mm", "aten::addmm_") == (1 if op is sparse else 2)


@pytest.mark.parametrize("op", [sparse, kd])
def test_a_second_backward_says_that_there_is_only_one(op) -> None:
    case = make_case()
    loss = op(case).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated once.*compute the loss again"):
        loss.backward()


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


@pytest.mark.parametrize("op", [sparse, kd])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_a_device(op, dtype: torch.dtype) -> None:
    # A meta tensor has no values: reading one (item, nonzero, a branch on it) raises.
    case = {
        name: t.detach().to("meta").requires_grad_(t.requires_grad)
        for name, t in make_case(dtype=dtype).items()
    }
    for options in ({}, {"rows": torch.arange(9, device="meta")}):
        found = gradients(op(case, chunk_rows=8, **options), case)
        assert [(t.shape, t.dtype) for t in found] == [
            (case[name].shape, dtype) for name in ("hidden", "weight")
        ]


def test_products_of_bfloat16_factors_on_a_device_have_float32_results() -> None:
    # Shapes and dtypes alone: no CPU computes these products. The numbers: the test on CUDA below.
    weight = torch.empty((BLOCK + 5, 8), dtype=torch.bfloat16, device="meta")
    weight_gradient = torch.zeros((BLOCK + 5, 8), device="meta")
    head = MixedHead(weight, torch.float32, 6)
    with Operations() as operations:
        h = head.operand(torch.empty(6, 8, device="meta"), torch.empty(6, 1, device="meta") > 0)
        z = head.logits(h)
        dh = head.backward(z, h, True, weight_gradient)
    assert h.dtype == torch.bfloat16
    assert (z.shape, z.dtype) == ((6, BLOCK + 5), torch.float32)
    assert dh is not None and (dh.shape, dh.dtype) == ((6, 8), torch.float32)
    assert operations.dtypes_of("aten::mm") == {torch.float32}


@pytest.mark.parametrize("op", [sparse, kd])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_more_logits_than_a_chunk(op, dtype: torch.dtype) -> None:
    case = make_case(64, BLOCK + 1000, 8, dtype=dtype)
    with Operations() as operations:
        gradients(op(case, chunk_rows=32), case)
    assert operations.largest == 32 * (BLOCK + 1000)
    if dtype == torch.bfloat16:
        assert operations.dtypes_of("aten::mm", "aten::addmm_") == {torch.float32}


@pytest.mark.parametrize("op", [sparse, kd])
def test_a_cpu_drops_masked_rows_before_the_head(op) -> None:
    case = make_case(40, 100, 1, k=1)  # the teacher's head has 9 columns
    case["w"].zero_()[3:15] = 1
    case["labels"].fill_(-100)[3:15] = 1
    with Operations() as operations:
        gradients(op(case), case)
    assert operations.largest == 12 * 100


def test_chunks_are_as_large_as_the_buffer_allows_and_no_larger_than_the_batch() -> None:
    for n, v, expected in ((3000, 32, 3000), (40, 2**20, 16), (600, 2**15, 512)):
        hidden, weight, ids = torch.zeros(n, 1), torch.zeros(v, 1), torch.zeros(n, 1).long()
        with Operations() as operations:
            sparse_target(hidden, weight, ids, torch.ones(n, 1))
        assert operations.largest == expected * v


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(36, 3, dtype=torch.long)}, r"ids \[36, 3\].*N = 37"),
        ({"ids": torch.full((37, 3), 211)}, "token id 211 is outside the vocabulary of 211"),
        ({"hidden": torch.zeros(37, 15)}, r"hidden \[37, 15\].*same H"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be greater than 0"),
        ({"chunk_rows": 0}, "chunk_rows is 0; it must be at least 1"),
    ],
)
def test_input_that_does_not_fit_is_named(changes: dict, message: str) -> None:
    case = make_case()
    options = {k: v for k, v in changes.items() if k not in case}
    with pytest.raises(ValueError, match=message):
        sparse(case | {k: v for k, v in changes.items() if k in case}, **options)


def test_a_teacher_of_other_rows_and_labels_of_another_vocabulary_are_named() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"teacher_hidden \[3, 24\].*N = 37"):
        kd(case | {"teacher_hidden": case["teacher_hidden"][:3]})
    with pytest.raises(ValueError, match=r"dense_kl: teacher: hidden .*same H"):
        kd(case | {"teacher_hidden": case["teacher_hidden"][:, :3]})
    with pytest.raises(ValueError, match="do tokenizer and model belong together"):
        kd(case | {"labels": case["labels"] + 211})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_distillation_takes_less_than_a_third_of_the_textbook_memory() -> None:
    command = "benchmarks/losses.py --tokens 2048 --vocab 32768 --student 32 --teacher 32"
    done = subprocess.run(
        [sys.executable, *command.split(), "--rounds", "1", "--ops", "kd", "--json"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][0]
    assert row["textbook"]["peak_mib"] > 1000  # at least four times 2048 x 32768 numbers
    assert row["memory_ratio"] < 1 / 3


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
