"""How long a stage trains, and the learning rate on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

from trainer.config import Train


@dataclass(frozen=True)
class Horizon:
    """Where the schedule ends: after `steps`, or after `seconds` of training time."""

    steps: Optional[int] = None
    seconds: Optional[float] = None

    def progress(self, step: int, training_seconds: float) -> float:
        """0 at the start, 1 at the end."""
        done = step / self.steps if self.steps else training_seconds / (self.seconds or 1.0)
        return min(done, 1.0)


def learning_rate(config: Train, progress: float, step: int, horizon: Horizon) -> float:
    """The rate of step `step` (counted from 0): linear warm-up, then the schedule from lr down to
    lr * min_lr_ratio. Cosine: Loshchilov and Hutter 2017, arXiv 1608.03983, one cycle."""
    warmup = config.warmup
    if warmup >= 1:
        ramp = min((step + 1) / warmup, 1.0)
        start = warmup / horizon.steps if horizon.steps else 0.0
    else:
        first = 1 / horizon.steps if horizon.steps else 1e-3
        ramp = min((progress + first) / warmup, 1.0) if warmup > 0 else 1.0
        start = warmup
    if ramp < 1.0:
        return config.lr * ramp
    x = min(max((progress - start) / max(1.0 - start, 1e-9), 0.0), 1.0)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * x)),
        "linear": 1 - x,
        "constant": 1.0,
    }[config.schedule]
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * shape)
