"""Answers as rows that can be learned from: each after its prompt, apart from all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from trainer.batch import IGNORE, Batch
from trainer.data.pack import one_per_row, pack


@dataclass
class Group:
    """The answers to one prompt: token ids, an advantage each, and what there is to report as
    name -> sum. `old`, `reference`: log-probs [tokens] of each answer, where they are needed."""

    prompt: list[int]
    answers: list[list[int]]
    advantages: list[float]
    facts: dict[str, float]
    old: list[Tensor] = field(default_factory=list)
    reference: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Laid:
    """`batch`: rows of the host, in which the answers' tokens alone are targets. `order`: the
    (group, answer) of each answer as the supervised tokens come; `lengths`: how many each has."""

    batch: Batch
    order: list[tuple[int, int]]
    lengths: list[int]

    def column(self, values: Sequence[float]) -> Tensor:
        """A value of each answer, in `order`, for each of its tokens: [supervised], float64."""
        column = torch.tensor(values, dtype=torch.float64)
        return column.repeat_interleave(torch.tensor(self.lengths))


def lay_out(groups: Sequence[Group], length: Optional[int]) -> Laid:
    """Rows of at most `length` tokens, several answers in one; None: a row for each. What a row
    does not use is a segment of its own, as in `Rows.batch`. The last token of an answer is a
    target alone: nothing comes after it."""
    places = [(g, a) for g, group in enumerate(groups) for a in range(len(group.answers))]
    parts = [(groups[g].prompt, groups[g].answers[a]) for g, a in places]
    sizes = np.array([len(prompt) + len(answer) - 1 for prompt, answer in parts])
    packing = one_per_row(len(parts)) if length is None else pack(sizes, length)
    width = max(int(sizes[row].sum()) for row in packing)
    ids = torch.full((len(packing), width), parts[0][1][-1])
    positions, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for i, row in enumerate(packing):
        at = 0
        for part in row.tolist():
            prompt, answer = parts[part]
            end = at + int(sizes[part])
            ids[i, at:end] = torch.tensor([*prompt, *answer[:-1]])
            positions[i, at:end] = torch.arange(end - at)
            targets[i, end - len(answer) : end] = torch.tensor(answer)
            at = end
        positions[i, at:] = torch.arange(width - at)
    order = [places[part] for part in packing.items.tolist()]
    lengths = [len(groups[g].answers[a]) for g, a in order]
    return Laid(Batch(ids, positions, targets), order, lengths)
