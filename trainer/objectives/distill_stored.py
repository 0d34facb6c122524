"""Knowledge distillation from answers that a teacher gave before (`kd.mode: precompute`)."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.config import Distill
from trainer.losses.answers import divergence
from trainer.losses.linear import sparse_target
from trainer.models import head_weight, hidden_states
from trainer.objective import Loss, share
from trainer.objectives.distill import alpha_at
from trainer.objectives.keep_logits import StayNear
from trainer.runtime import Runtime
from trainer.teacher import Answers, gather


class DistillStored:
    """loss = alpha * CE / tokens + (1 - alpha) * T^2 * KL / tokens that have an answer.

    KL of top-k targets counts all other tokens as one. Sampled targets (arXiv 2503.16870) give that
    of the samples' shares, whose gradient has the dense one as its mean; `kd_loss` then holds the
    noise of sampling too."""

    def __init__(
        self, config: Distill, answers: Answers, runtime: Runtime, keep: Optional[StayNear] = None
    ) -> None:
        self.config, self.answers, self.runtime, self.keep = config, answers, runtime, keep

    def prepare(self, batch: Batch, step: int) -> Batch:
        assert batch.host is not None, "call `to` first"
        found = gather(self.answers, batch.host)
        device = batch.input_ids.device
        parts = {"ids": found.ids, "p": found.p, "teacher_status": found.status}
        batch.extra.update({k: part.to(device, non_blocking=True) for k, part in parts.items()})
        batch.weights["ce"] = torch.tensor(float(len(batch.labels)), dtype=torch.float64)
        batch.weights["kd"] = found.status.sum().double()
        if self.keep is not None:
            self.keep.prepare(batch)
        return batch

    def loss(self, model: nn.Module, batch: Batch, norm: dict[str, Tensor], log: bool) -> Loss:
        hidden, temperature = hidden_states(model, batch), self.config.temperature
        head, status = head_weight(model), batch.extra["teacher_status"]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        alpha = alpha_at(self.config, batch.progress)
        ce_weight = share(alpha, norm["ce"]).to(hidden.device, dtype)
        # T^2: softened gradients keep their size when T changes.
        kd_weight = share((1 - alpha) * temperature**2, norm["kd"]).to(hidden.device, dtype)
        labels = batch.labels.unsqueeze(1)
        ce = sparse_target(hidden, head, labels, ce_weight.expand(len(labels), 1))
        ids, p = batch.extra["ids"], batch.extra["p"]
        others = None if self.answers.sampled else status
        kd = divergence(hidden, head, ids, p, others, temperature=temperature)
        sums = {
            "ce_loss": (-ce.logprobs.sum(), "ce"),
            "kd_loss": (kd.detach() * temperature**2, "kd"),
            "teacher_missing": ((~status).sum(), "ce"),
        }
        if self.config.alpha_schedule != "constant":
            sums["kd_alpha"] = (alpha * batch.weights["ce"].to(hidden.device), "ce")
        loss = Loss(ce.loss + kd_weight * kd, sums)
        return loss if self.keep is None else self.keep.add(loss, model, hidden, batch, norm)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state
