"""Knowledge distillation with an online teacher: it reads the same packed rows, and only its last
hidden states are kept; logits exist one chunk at a time."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.config import Distill
from trainer.losses.linear import dense_kl
from trainer.models import head_weight, hidden_states
from trainer.objective import Loss, share
from trainer.objectives.keep_logits import StayNear
from trainer.runtime import Runtime


class DistillOnline:
    """loss = alpha * CE / tokens + (1 - alpha) * T^2 * KL(teacher || student) / tokens."""

    def __init__(
        self, config: Distill, teacher: nn.Module, runtime: Runtime, keep: Optional[StayNear] = None
    ) -> None:
        self.config, self.runtime, self.keep = config, runtime, keep
        self.teacher = teacher.eval().requires_grad_(False)

    def prepare(self, batch: Batch, step: int) -> Batch:
        with torch.no_grad(), self.runtime.autocast():
            batch.extra["teacher"] = hidden_states(self.teacher, batch)
        tokens = torch.tensor(float(len(batch.labels)), dtype=torch.float64)
        batch.weights.update(ce=tokens, kd=tokens)
        if self.keep is not None:
            self.keep.prepare(batch)
        return batch

    def loss(self, model: nn.Module, batch: Batch, norm: dict[str, Tensor], log: bool) -> Loss:
        hidden, teacher = hidden_states(model, batch), batch.extra["teacher"]
        alpha = alpha_at(self.config, batch.progress)
        result = dense_kl(
            hidden,
            head_weight(model),
            teacher,
            head_weight(self.teacher),
            batch.labels,
            temperature=self.config.temperature,
            ce_weight=share(alpha, norm["ce"]).to(hidden.device),
            kl_weight=share(1 - alpha, norm["kd"]).to(hidden.device),
            diagnostics=log,
        )
        sums = {"ce_loss": (result.ce, "ce"), "kd_loss": (result.kl, "kd")}
        if result.l2 is not None:
            sums["logit_l2"] = (result.l2, "kd")
        if self.config.alpha_schedule != "constant":
            sums["kd_alpha"] = (alpha * batch.weights["ce"].to(hidden.device), "ce")
        loss = Loss(result.loss, sums)
        return loss if self.keep is None else self.keep.add(loss, model, hidden, batch, norm)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def alpha_at(config: Distill, progress: float) -> float:
    """The weight of the cross-entropy at `progress` of the horizon, from `alpha` to `alpha_final`
    in a straight line or along half a cosine."""
    if config.alpha_schedule == "constant" or config.alpha_final is None:
        return config.alpha
    x = min(max(progress, 0.0), 1.0)
    done = x if config.alpha_schedule == "linear" else 0.5 * (1 - math.cos(math.pi * x))
    return config.alpha + (config.alpha_final - config.alpha) * done
