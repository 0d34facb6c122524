"""Groups of answers that are the same whoever asks: for comparing losses and gradients."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Optional

from torch import nn

from trainer.config import Data, Grpo, Source
from trainer.data.prompts import Prompts, read_prompts
from trainer.groups import Groups, Reference
from trainer.models import load_tokenizer
from trainer.objectives.grpo import Reinforce
from trainer.reward_functions import Reward
from trainer.rollouts import Answer
from trainer.runtime import Runtime

LENGTH = 128
#: Names of cases -> what their loss is a mean over.
NORMALISE = {"grpo": "tokens", "grpo answers": "answers", "grpo constant": "constant"}


class Fixed:
    """Answers of unequal length that depend on the prompt alone; `calls` of `draw`."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Optional[str], int]] = []

    def draw(
        self, prompts: Sequence[Sequence[int]], count: int, seed: Optional[str], version: int
    ) -> list[list[Answer]]:
        self.calls.append((len(prompts), seed, version))
        found = []
        for prompt in prompts:
            dice = random.Random(str(list(prompt)))
            sizes = [dice.randint(1, 12) for _ in range(count)]
            answers = [[dice.randint(40, 120) for _ in range(size)] for size in sizes]
            found.append([Answer(ids, len(ids) < 12) for ids in answers])
        return found


def sums(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A reward that tells answers apart."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def plan(**settings: Any) -> Grpo:
    chosen = {"rewards": ("x:y",), "group": 4, "max_new_tokens": 12, "iterations": 2, "clip": 0.1}
    return Grpo(**{**chosen, **settings})


def prompts(tokenizer: str, texts: str, repeats: int = 2) -> Prompts:
    """The beginnings of documents."""
    lines = [json.loads(line)["text"] for line in Path(texts).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        records = ({"prompt": text[: 5 + i % 20], "answer": i} for i, text in enumerate(lines[:16]))
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        sources, data = (Source(path=str(path)),), Data(sequence_length=LENGTH)
        return read_prompts(sources, load_tokenizer(tokenizer), data, answer=12, repeats=repeats)


def groups(
    model: nn.Module,
    runtime: Runtime,
    reference: Optional[nn.Module] = None,
    packing: bool = True,
    rollouts: Any = None,
    rewards: Sequence[Any] = (sums,),
    rewards_named: Sequence[str] = ("x:y",),
    **settings: Any,
) -> Groups:
    return Groups(
        plan(rewards=tuple(rewards_named), **settings), model, rollouts or Fixed(),
        [Reward(f"tests:{reward.__name__}", reward) for reward in rewards], runtime,
        lambda ids: bytes(ids).decode("latin-1"), columns=("answer",), length=LENGTH,
        packing=packing, seed=0,
        reference=None if reference is None else Reference(reference, nullcontext),
    )  # fmt: skip


def objective(
    old: nn.Module, reference: nn.Module, runtime: Runtime, packing: bool, **settings: Any
) -> Reinforce:
    """With old log-probs of another model than the one that is trained, so that ratios are clipped,
    and a KL to a third."""
    return Reinforce(groups(old, runtime, reference, packing, beta=0.1, **settings))
