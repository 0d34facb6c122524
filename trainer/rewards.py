"""Rewards that come with the trainer, as `grpo.rewards` names them: `trainer.rewards:exact`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def exact(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the answer, without the space around it, is what the column `answer` says; else 0."""
    del columns
    said = (_words(completion).strip() for completion in completions)
    return [float(words == str(right).strip()) for words, right in zip(said, answer)]


def short(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 / (1 + characters of the answer): a reward that needs nothing of the data."""
    del columns
    return [1 / (1 + len(_words(completion))) for completion in completions]


def _words(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
