"""The term that holds a student near the logits it started with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.config import KeepLogits
from trainer.losses.distance import logit_distance
from trainer.models import head_weight, hidden_states
from trainer.objective import Loss, share
from trainer.runtime import Runtime


class StayNear:
    """weight * fade * mean of (z - z_start)^2 / tokens, beside another objective. The frozen
    `start` costs its parameters in memory (2 bytes each in bf16, 4 in fp32) and, until the weight
    has faded, a forward pass."""

    def __init__(self, config: KeepLogits, start: nn.Module, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.start = start.eval().requires_grad_(False)

    def weight(self, progress: float) -> float:
        """What the term is multiplied with: from `weight` linearly to 0 at `fade`."""
        return self.config.weight * max(0.0, 1 - progress / self.config.fade)

    def prepare(self, batch: Batch) -> None:
        if self.weight(batch.progress) > 0:
            with torch.no_grad(), self.runtime.autocast():
                batch.extra["start"] = hidden_states(self.start, batch)
        # Always there: all ranks must agree on the terms, and clocks may not.
        batch.weights["keep"] = torch.tensor(float(len(batch.labels)), dtype=torch.float64)

    def add(
        self, loss: Loss, model: nn.Module, hidden: Tensor, batch: Batch, norm: dict[str, Tensor]
    ) -> Loss:
        """`loss` with the term, and its mean as `keep_l2`. `hidden` [n, H]: the student's."""
        start = batch.extra.get("start")
        if start is None:
            return loss
        distance = logit_distance(
            hidden,
            head_weight(model),
            start,
            head_weight(self.start),
        )
        factor = share(self.weight(batch.progress), norm["keep"]).to(distance)
        sums = {**loss.sums, "keep_l2": (distance.detach(), "keep")}
        return Loss(loss.total + factor * distance, sums)
