"""Equal gradients however a global batch is cut: the invariant that every objective must hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import gradients
from tests.trainer.grpo_cases import NORMALISE
from trainer.batch import IGNORE
from trainer.models import head_weight, hidden_states

LIMIT = {torch.float64: 1e-12, torch.float32: 5e-6}
ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float64, torch.float32]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "next_token", "distill", "kept", "top_k", "sample", "dpo", "ipo", "ipo gpt_oss", "soft",
        "parity", "kl", *NORMALISE,
    ],
)  # fmt: skip
def test_gradients_do_not_depend_on_micro_batch(
    name: str, dtype: torch.dtype, tokenizer: str, texts: str
) -> None:
    whole = gradients.of(name, tokenizer, texts, dtype, micro_batch=8, accumulate=1)
    parts = gradients.of(name, tokenizer, texts, dtype, micro_batch=1, accumulate=8)
    uneven = gradients.of(name, tokenizer, texts, dtype, micro_batch=8, accumulate=1, resized=3)
    assert distance(parts, whole) < LIMIT[dtype]
    assert distance(uneven, whole) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "next_token", "distill", "kept", "top_k", "dpo", "ipo", "soft", "parity", "kl", *NORMALISE,
    ],
)  # fmt: skip
def test_packed_and_padded_rows_give_the_same_gradient(
    name: str, dtype: torch.dtype, tokenizer: str, texts: str
) -> None:
    packed = gradients.of(name, tokenizer, texts, dtype, micro_batch=None)
    padded = gradients.of(name, tokenizer, texts, dtype, micro_batch=None, packing=False)
    assert distance(packed, padded) < LIMIT[dtype]


def test_answers_in_rows_of_their_own_give_the_gradient_of_packed_pairs(
    tokenizer: str, texts: str
) -> None:
    for dtype in DTYPES:
        packed = gradients.of("ipo", tokenizer, texts, dtype, micro_batch=None)
        apart = gradients.of("ipo apart", tokenizer, texts, dtype, micro_batch=None)
        assert distance(apart, packed) < LIMIT[dtype]


def test_two_ranks_give_the_gradient_of_one(tokenizer: str, texts: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["-m", "tests.trainer.gradients", tokenizer, texts, str(tmp_path)]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for dtype in DTYPES:
        for name in gradients.TWO_RANKS:
            one = gradients.of(name, tokenizer, texts, dtype, micro_batch=8, accumulate=1)
            two = [torch.load(tmp_path / f"{name}-{dtype}-{rank}.pt") for rank in (0, 1)]
            assert torch.equal(two[0], two[1])
            assert distance(two[0], one) < LIMIT[dtype]
    agreed = {"any": [True, False], "largest": 1.0}
    for rank in (0, 1):
        assert json.loads((tmp_path / f"flags-{rank}.json").read_text()) == agreed


def test_bf16_runs_the_head_in_bf16_and_keeps_its_gradient_in_fp32(
    tokenizer: str, texts: str
) -> None:
    """Under autocast the residual stream is fp32: left so, the head would run in fp32 too."""
    runtime = gradients.CPU.at("bf16")
    student = gradients.model(tokenizer, torch.float32, seed=1)
    batch = gradients.rows(tokenizer, texts, packing=True).batch([0, 1]).to(runtime.device)
    with runtime.autocast():
        hidden = hidden_states(student, batch)
    assert hidden.dtype == torch.bfloat16
    gradients.of("next_token", tokenizer, texts, torch.float32, micro_batch=2, runtime=runtime)
    assert head_weight(student).dtype == torch.float32


def test_mean_of_means_is_told_apart(tokenizer: str, texts: str) -> None:
    """The negative control: dividing by each micro-batch's own tokens must be seen."""
    whole = gradients.of("next_token", tokenizer, texts, torch.float64, micro_batch=8)
    wrong = gradients.of(
        "next_token", tokenizer, texts, torch.float64, micro_batch=1, accumulate=8, wrong=True
    )
    assert distance(wrong, whole) > 1e-2


def test_packed_documents_do_not_see_each_other(tokenizer: str, texts: str) -> None:
    """The logits of a document are the same alone and in the middle of a packed row."""
    model = gradients.model(tokenizer, torch.float64, seed=1).eval()
    rows = gradients.rows(tokenizer, texts, packing=True)
    batch = rows.batch([0])
    starts = (batch.position_ids[0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    start, end = starts[1], starts[2]
    cut: Any = slice(start, end)
    with torch.no_grad():
        packed = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits[0, cut]
        alone = model(input_ids=batch.input_ids[:, cut], use_cache=False).logits[0]
    assert torch.allclose(packed, alone, atol=1e-10)
    assert (batch.targets[0, [end - 1]] == IGNORE).all()
