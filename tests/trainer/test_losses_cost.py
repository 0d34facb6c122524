"""What the chunked losses promise beside the numbers: which rows count, nothing of size N x V, no
wait for a device, one backward, and a clear line for input that does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import losses
from tests.trainer.loss_cases import (
    Operations,
    assert_close,
    distance,
    gradients,
    kd,
    make_case,
    sparse,
)
from trainer.losses import reference, sparse_target
from trainer.losses.heads import BLOCK, MixedHead

REPOSITORY = Path(__file__).resolve().parents[2]


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
    for n, v, expected in ((3000, 32, 3000), (40, 2**20, 32), (1100, 2**15, 1024)):
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


def measured(command: str) -> list[dict]:
    """The rows of the benchmark, in a process of its own with one thread."""
    done = subprocess.run(
        [sys.executable, "benchmarks/losses.py", "--device", "cpu", "--json", *command.split()],
        cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc"
)


@needs_proc
@pytest.mark.parametrize("size", ["--student 256 --teacher 256", "--student 1024 --teacher 1024"])
def test_the_losses_take_no_more_time_than_the_textbook(size: str) -> None:
    # Seconds of CPU, which other processes change little; what they do change may fail one try.
    for _ in range(2):
        rows = measured(f"--tokens 1024 --vocab 8192 {size} --rounds 3 --ops ce kd")
        slow = {row["op"]: row["cpu_ratio"] for row in rows if row["cpu_ratio"] > 1.0}
        if not slow:
            break
    assert not slow


@needs_proc
def test_the_losses_take_a_sixth_of_the_textbook_memory() -> None:
    sizes = "--vocab 32768 --student 32 --teacher 32 --rounds 1"
    rows = measured(f"--tokens 2048 {sizes} --ops kd")
    rows += measured(f"--tokens 3072 {sizes} --ops ce")
    for row in rows:
        assert row["ways"]["textbook"]["peak_mib"] > 1000
        assert row["memory_ratio"] <= 1 / 6, row


@needs_proc
def test_the_benchmark_runs_in_a_tiny_form_and_judges_by_its_limits() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/losses.py", "--tiny", "--device", "cpu"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of the time and 1/") == 3


def row(op: str, shape: tuple[int, ...], time: float, memory: float, against: str) -> dict:
    names = ("tokens", "vocab", "student", "teacher")
    return {"op": op, "shape": dict(zip(names, shape, strict=True)), "against": against,
            "time_ratio": time, "cpu_ratio": time, "memory_ratio": memory,
            "ways": {"chunked": {"seconds": time}}}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "op", "time", "memory", "broken"),
    [
        ((4096, 65536, 256, 256), "ce", 0.75, 1 / 8, 0),
        ((4096, 65536, 256, 256), "kd", 0.76, 0.13, 2),
        ((4096, 65536, 1024, 1024), "topk", 0.95, 1 / 6, 0),
        ((4096, 65536, 1024, 1024), "kd", 0.96, 0.17, 2),
        ((100, 4096, 64, 64), "ce", 1.0, 1 / 6, 0),
        ((100, 4096, 64, 64), "ce", 1.01, 0.17, 2),
    ],
)
def test_a_cpu_is_judged_by_the_limits_of_its_shape(
    shape: tuple[int, ...], op: str, time: float, memory: float, broken: int, capsys
) -> None:
    found = row(op, shape, time, memory, "textbook")
    assert losses.within_limits([found], "CPU", False) == (broken == 0)
    assert len(capsys.readouterr().err.splitlines()) == broken


@pytest.mark.parametrize(
    ("student", "against", "device", "time", "passes", "said"),
    [
        (2048, "liger", "NVIDIA H200", 0.7, True, ""),
        (2048, "liger", "NVIDIA H200", 0.71, False, "time ratio 0.710 to liger; the limit is 0.7"),
        (2048, "textbook", "NVIDIA H200", 9.0, True, "not checked: student 2048 against Liger"),
        (4096, "liger", "NVIDIA H200", 0.055, True, ""),
        (4096, "liger", "NVIDIA H200", 0.056, False, "56.0 ms; the limit is 55 ms"),
        (4096, "liger", "NVIDIA H100", 0.2, True, "not checked: 55 ms at student 4096"),
    ],
)
def test_a_device_is_judged_by_the_limits_it_can_show(
    student: int, against: str, device: str, time: float, passes: bool, said: str, capsys
) -> None:
    found = row("kd", (8192, 128256, student, 4096), time, 0.3, against)
    assert losses.within_limits([found], device, True) is passes
    error = capsys.readouterr().err
    assert said in error and bool(said) == bool(error)
