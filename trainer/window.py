"""What a logged step says: sums over the steps since the last one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.runtime import Runtime
from trainer.step import Accumulated


class Window:
    """Sums since the last logged step; they stay on the device until `close`."""

    def __init__(self, training_seconds: float) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.rows = 0
        self.tokens = torch.zeros(())
        self.started = training_seconds

    def add(self, done: Accumulated, rows: int, found_inf: Tensor) -> None:
        finite = found_inf == 0
        for name, value in {"train_loss": done.total, **done.sums}.items():
            zero = torch.zeros_like(value)
            counts = finite & done.counts[name] if name in done.counts else finite
            self.sums[name] = self.sums.get(name, zero) + torch.where(counts, value, zero)
            self.counts[name] = self.counts.get(name, zero) + counts
        self.rows += rows
        self.tokens = self.tokens.to(done.tokens) + done.tokens

    def close(self, runtime: Runtime, training_seconds: float) -> tuple[dict[str, float], float]:
        """The means, the speeds (tokens: supervised ones, of all ranks), and the tokens. A mean is
        over the steps that had something to measure; without such a step there is none, but for
        the loss, which then is no number."""
        sums = runtime.all_sum(self.sums)
        counts = {name: float(count) for name, count in self.counts.items()}
        facts = {
            name: float(value) / counts[name] if counts[name] else math.nan
            for name, value in sums.items()
            if counts[name] or name == "train_loss"
        }
        tokens = float(self.tokens)
        seconds = max(training_seconds - self.started, 1e-9)
        facts["tokens_per_sec"] = tokens / seconds
        facts["examples_per_sec"] = self.rows * runtime.world_size / seconds
        return facts, tokens
