"""What distillation is worth, in miniature: one seed of what benchmarks/distillation.py measures on
real text. The text is a Markov chain, so that the teacher can be a model that knows the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.distillation import claims, renormalise, table
from trainer.config import (
    Architecture,
    Data,
    Distill,
    Evaluate,
    Model,
    Source,
    StageConfig,
    Targets,
    Train,
)
from trainer.evaluate import calibration_gaps, predictions
from trainer.models import load_tokenizer

SYMBOLS = [chr(33 + i) for i in range(64)]
#: Tokens of a document, on average: each may be the last with the same probability.
LENGTH = 64
SEED = 0


def test_distillation_beats_cross_entropy_on_scarce_text_and_samples_beat_eight_largest(
    tokenizer: str, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    scores = experiment(tokenizer, tmp_path, run_stage, SEED)
    last = {name: scores[f"{name}@last.val_loss"] for name in STUDENTS}
    ece = {name: scores[f"{name}@last.ece"] for name in STUDENTS}
    assert scores["teacher.ece"] < 0.02
    for name in ("online", "sampled"):
        assert last[name] < scores["ce@best.val_loss"] - 0.3
    assert abs(last["sampled"] - last["online"]) < 0.05
    assert ece["sampled"] < ece["renormalised"] - 0.04
    assert ece["top8"] < ece["renormalised"] - 0.04
    assert last["sampled"] < last["renormalised"] - 0.05


STUDENTS = ("ce", "online", "sampled", "top8", "renormalised")


def experiment(
    tokenizer: str, folder: Path, run: Callable[..., Any], seed: int
) -> dict[str, float]:
    """Students of equal steps on the same few rows; what the stage `evaluate` says of them."""
    random = np.random.default_rng(seed)
    chain = random.dirichlet(np.full(64, 0.3), size=64)
    write_text(folder / "train.jsonl", chain, random, documents=24)
    write_text(folder / "heldout.jsonl", chain, random, documents=120)
    teacher = folder / "teacher"
    write_teacher(teacher, chain, tokenizer)
    data = Data(
        train=(Source(path=str(folder / "train.jsonl")),),
        validation=(Source(path=str(folder / "heldout.jsonl")),),
        sequence_length=128,
    )
    shape = Architecture(hidden_size=64, layers=1, heads=2, intermediate_size=128)
    student = StageConfig(
        id="student", stage="pretrain", output="", data=data,
        model=Model(init="random", tokenizer=tokenizer, architecture=shape),
        train=Train(steps=200, micro_batch=8, lr=3e-3, warmup=10, evaluate_every=25, keep=1,
                    seed=seed, report_to=()),
    )  # fmt: skip

    def learn(name: str, **fields: Any) -> None:
        run(replace(student, output=str(folder / name), **fields))

    def store(name: str, plan: Targets) -> str:
        output = str(folder / f"{name}-targets")
        run(StageConfig(id="targets", stage="targets", output=output, data=data, targets=plan))
        return output

    def kept(targets: str) -> Distill:
        return Distill(mode="precompute", targets=targets, temperature=1.0, alpha=0.1)

    learn("ce")
    learn("online", stage="kd", kd=Distill(str(teacher), temperature=1.0, alpha=0.1))
    draws = Targets(str(teacher), sampler="sample", samples=256, temperature=1.0, seed=seed)
    learn("sampled", stage="kd", kd=kept(store("sampled", draws)))
    top8 = store("top8", Targets(str(teacher), top_k=8, temperature=1.0))
    learn("top8", stage="kd", kd=kept(top8))
    renormalise(Path(top8) / "targets", folder / "renormalised-targets")
    learn("renormalised", stage="kd", kd=kept(str(folder / "renormalised-targets")))
    compared = {f"{name}@{which}": str(folder / f"{name}@{which}")
                for name in STUDENTS for which in ("last", "best")}  # fmt: skip
    compare = StageConfig(
        id="compare", stage="evaluate", output=str(folder / "compare"), data=data,
        evaluate=Evaluate(models={"teacher": str(teacher), **compared}),
    )  # fmt: skip
    found: dict[str, float] = run(compare).evaluation
    return found


def write_text(
    path: Path, chain: NDArray[np.float64], random: np.random.Generator, documents: int
) -> None:
    """Documents of the chain; each symbol is the last one with probability 1 / LENGTH."""
    steps = np.cumsum(chain, axis=1)
    lines = []
    for _ in range(documents):
        symbols = [int(random.integers(64))]
        while random.random() > 1 / LENGTH:
            symbols.append(min(int(np.searchsorted(steps[symbols[-1]], random.random())), 63))
        lines.append(json.dumps({"text": "".join(SYMBOLS[s] for s in symbols)}))
    path.write_text("\n".join(lines) + "\n")


def write_teacher(folder: Path, chain: NDArray[np.float64], tokenizer: str) -> None:
    """A model of the library's that knows the chain: each symbol is embedded as a direction of its
    own, attention and MLP add nothing, and the head turns a direction into the logarithms of the
    probabilities of what follows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = load_tokenizer(tokenizer)
    ids = torch.tensor(tokens.convert_tokens_to_ids(SYMBOLS))
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    follows = torch.full((64, len(tokens)), 1e-9)
    follows[:, ids] += torch.from_numpy(chain).float() * (1 - 1 / LENGTH)
    follows[:, tokens.eos_token_id] = 1 / LENGTH
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[ids] = torch.eye(64)
        # The norm before the head makes a direction sqrt(64) long.
        model.lm_head.weight.copy_(follows.log().t() / 8)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)


def test_the_page_shows_the_committed_results_and_they_hold() -> None:
    root = Path(__file__).resolve().parents[2]
    results = json.loads((root / "benchmarks" / "results" / "distillation.json").read_text())
    assert table(results["over_seeds"]) in (root / "docs" / "distillation.md").read_text()
    assert claims(results["runs"]) == []
    worse = json.loads(json.dumps(results["runs"]))
    for runs in worse.values():
        runs["online"]["ce_last"] = runs["ce"]["ce_best"]
    assert len(claims(worse)) == 3 * len(worse)


def test_the_calibration_error_is_the_textbook_one() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(400, 8, generator=generator)
    weight = torch.randn(50, 8, generator=generator)
    labels = torch.randint(0, 50, (400,), generator=generator)
    labels[:200] = (hidden @ weight.t())[:200].argmax(dim=1)
    logprobs, confidence, right = predictions(hidden, weight, labels)
    p = torch.softmax((hidden @ weight.t()).double(), dim=1)
    assert torch.allclose(logprobs.double(), p.log()[torch.arange(400), labels], atol=1e-5)
    expected, top = 0.0, p.max(dim=1)
    for m in range(15):
        inside = (top.values > m / 15) & (top.values <= (m + 1) / 15)
        if inside.any():
            correct = (top.indices == labels)[inside].double().mean()
            gap = abs(float(correct - top.values[inside].mean()))
            expected += gap * float(inside.double().mean())
    found = float(calibration_gaps(confidence, right).abs().sum()) / 400
    assert expected > 0.1 and found == pytest.approx(expected, abs=1e-6)


def test_the_upper_end_of_a_bin_belongs_to_it() -> None:
    confidence = torch.tensor([1 / 15, 1.5 / 15, 1.0, 1.0 + 1e-7], dtype=torch.float64)
    gaps = calibration_gaps(confidence, torch.tensor([True, True, False, True]))
    expected = torch.zeros(15, dtype=torch.float64)
    expected[0], expected[1], expected[14] = 14 / 15, 13.5 / 15, -1.0
    assert torch.allclose(gaps, expected, atol=1e-6)
