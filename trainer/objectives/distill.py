"""Knowledge distillation with an online teacher: it reads the same packed rows, and only its last
hidden states are kept; logits exist one chunk at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.config import Distill
from trainer.losses.linear import dense_kl
from trainer.models import head_weight, hidden_states
from trainer.objective import Loss, share
from trainer.runtime import Runtime


class DistillOnline:
    """loss = alpha * CE / tokens + (1 - alpha) * T^2 * KL(teacher || student) / tokens."""

    def __init__(self, config: Distill, teacher: nn.Module, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.teacher = teacher.eval().requires_grad_(False)

    def prepare(self, batch: Batch, step: int) -> Batch:
        with torch.no_grad(), self.runtime.autocast():
            batch.extra["teacher"] = hidden_states(self.teacher, batch)
        tokens = torch.tensor(float(len(batch.labels)), dtype=torch.float64)
        batch.weights.update(ce=tokens, kd=tokens)
        return batch

    def loss(self, model: nn.Module, batch: Batch, norm: dict[str, Tensor], log: bool) -> Loss:
        hidden, teacher = hidden_states(model, batch), batch.extra["teacher"]
        result = dense_kl(
            hidden,
            head_weight(model),
            teacher,
            head_weight(self.teacher),
            batch.labels,
            temperature=self.config.temperature,
            ce_weight=share(self.config.alpha, norm["ce"]).to(hidden.device),
            kl_weight=share(1 - self.config.alpha, norm["kd"]).to(hidden.device),
            diagnostics=log,
        )
        sums = {"ce_loss": (result.ce, "ce"), "kd_loss": (result.kl, "kd")}
        if result.l2 is not None:
            sums["logit_l2"] = (result.l2, "kd")
        return Loss(result.loss, sums)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state
