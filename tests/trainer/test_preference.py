"""Stages `dpo` and `ipo`: the losses by hand and by TRL, pairs that do not see each other, the
reference that is asked once, and what preference training does on a task that is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from tests.trainer import gradients
from trainer.batch import Batch
from trainer.config import (
    Data,
    Preference,
    Source,
)
from trainer.data.stream import Rows
from trainer.models import load_tokenizer
from trainer.objectives.preference import Prefer
from trainer.reference import Known, answer_logprobs, number_answers, precompute
from trainer.step import backward, normalisers, prepare

KINDS: list[tuple[Any, Preference]] = [
    ("dpo", Preference(beta=0.2)),
    ("dpo", Preference(beta=0.5, label_smoothing=0.2)),
    ("ipo", Preference(beta=0.3)),
    ("dpo", Preference(beta=0.2, sft_weight=0.7)),
]


def quiet(line: str) -> None:
    del line


def logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """Of the answers of one batch on the CPU."""
    copy = batch.to(torch.device("cpu"))
    number_answers(copy)
    with torch.no_grad():
        return answer_logprobs(model, copy)


def known_by(model: Any, rows: Rows, tmp_path: Path) -> Known:
    return precompute(
        tmp_path, [rows], lambda: model, gradients.CPU, about={}, micro_batch=4, say=quiet
    )


def alone(rows: Rows, chunk: int) -> Batch:
    """The row of one answer and nothing else."""
    start, length = int(rows.chunks.starts[chunk]), int(rows.chunks.lengths[chunk])
    tokens = torch.from_numpy(rows.chunks.tokens[start : start + length + 1]).long()
    assert rows.chunks.learned is not None
    learned = torch.from_numpy(rows.chunks.learned[start + 1 : start + length + 1])
    targets = tokens[1:].masked_fill(~learned, -100)
    positions = torch.arange(length)
    return Batch(*(t.unsqueeze(0) for t in (tokens[:-1], positions, targets)))


@pytest.fixture
def packed(tokenizer: str, texts: str) -> Rows:
    return gradients.pairs(tokenizer, texts, packing=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_answer_in_a_packed_row_has_the_log_probability_that_it_has_alone(
    attention: str, packed: Rows, tokenizer: str
) -> None:
    model = gradients.model(tokenizer, torch.float32, seed=1).eval()
    model.set_attn_implementation(attention)
    assert len(packed) < 48 / 2, "nothing was packed"
    for row in range(3):
        together = logprobs(model, packed.batch([row]))
        for nth, chunk in enumerate(packed.packing[row].tolist()):
            found = logprobs(model, alone(packed, chunk))
            assert torch.allclose(together[nth], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_loss_and_gradient_are_those_of_the_formula(
    kind: Any, settings: Preference, packed: Rows, tokenizer: str, tmp_path: Path
) -> None:
    """Written out in float64, one answer at a time."""
    policy, start = (gradients.model(tokenizer, torch.float64, seed=seed) for seed in (1, 2))
    pairs, nll, tokens = [], torch.zeros((), dtype=torch.float64), 0
    for pair in range(len(packed.chunks) // 2):
        sides = []
        for chunk in (2 * pair, 2 * pair + 1):
            batch = alone(packed, chunk)
            ids, at = batch.targets[0], batch.targets[0] >= 0
            both = []
            for model in (policy, start.requires_grad_(False)):
                table = log_softmax(model(input_ids=batch.input_ids).logits[0], dim=-1)
                both.append(table[at].gather(1, ids[at].unsqueeze(1)).sum())
            if chunk % 2 == 0:
                nll, tokens = nll - both[0], tokens + int(at.sum())
            ratio = both[0] - both[1]
            sides.append(ratio / at.sum() if kind == "ipo" else ratio)
        margin, beta, e = sides[0] - sides[1], settings.beta, settings.label_smoothing
        if kind == "ipo":
            pairs.append((margin - 1 / (2 * beta)) ** 2)
        else:
            pairs.append(-(1 - e) * logsigmoid(beta * margin) - e * logsigmoid(-beta * margin))
    wanted = torch.stack(pairs).mean() + settings.sft_weight * nll / tokens
    wanted.backward()
    by_hand = flat(policy)
    policy.zero_grad()
    known = known_by(start, packed, tmp_path)
    total = ours(Prefer(kind, settings, gradients.CPU, known), policy, packed)
    assert total == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert float((flat(policy) - by_hand).norm() / by_hand.norm()) < 1e-8


def ours(objective: Prefer, policy: Any, rows: Rows) -> float:
    """The loss of all rows as one step; the gradient is then the policy's."""
    group = [rows.batch(range(0, len(rows), 2)), rows.batch(range(1, len(rows), 2))]
    batches = prepare(objective, group, gradients.CPU, 0)
    done = backward(policy, objective, batches, normalisers(batches, gradients.CPU), gradients.CPU)
    return float(done.total)


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.mark.parametrize(("kind", "settings"), KINDS[:3])
def test_loss_and_gradient_are_those_of_trl(
    kind: Any, settings: Preference, tokenizer: str, tmp_path: Path
) -> None:
    """DPOTrainer's own loss on the same pairs, with reference log-probabilities from its own
    reference model. Its `ipo` divides by the number of an answer's tokens, as here."""
    pytest.importorskip("datasets")
    pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = "Preference is learned from pairs of answers, of which one was chosen. "
    records = [
        {"prompt": words[: 9 + i], "chosen": words[i : 2 * i + 5], "rejected": words[7 : 22 - i]}
        for i in range(1, 7)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    policy, start = (gradients.model(tokenizer, torch.float32, seed=seed) for seed in (1, 2))
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none",
        loss_type="ipo" if kind == "ipo" else ["sigmoid" if not settings.label_smoothing
                                              else "robust"],
        label_smoothing=settings.label_smoothing, beta=settings.beta, max_length=None,
        per_device_train_batch_size=6, gradient_checkpointing=False, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        policy, start, args=arguments, train_dataset=Dataset.from_list(records),
        processing_class=load_tokenizer(tokenizer),
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    theirs, wanted = flat(policy), float(loss.detach())
    policy.zero_grad()
    rows = pairs_in(path, tokenizer)
    total = ours(
        Prefer(kind, settings, gradients.CPU, known_by(start, rows, tmp_path)), policy, rows
    )
    if settings.label_smoothing:
        pass
    assert total == pytest.approx(wanted, rel=1e-4)
    assert float((flat(policy) - theirs).norm() / theirs.norm()) < 1e-3


def pairs_in(path: Path, tokenizer: str) -> Rows:
    from trainer.data.chat import view_of
    from trainer.data.pairs import build_pairs

    tokens = load_tokenizer(tokenizer)
    view = view_of(Data(), "dpo", tokens)
    sources = (Source(path=str(path)),)
    return build_pairs(sources, tokens, sequence_length=128, packing=True, view=view)
