"""Next-token cross-entropy: pretraining."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.losses.linear import sparse_target
from trainer.models import head_weight, hidden_states
from trainer.objective import Loss, share


class NextToken:
    """loss = sum over supervised tokens of -log p(target) / their number in the global batch."""

    def prepare(self, batch: Batch, step: int) -> Batch:
        batch.weights["ce"] = torch.tensor(float(len(batch.labels)), dtype=torch.float64)
        return batch

    def loss(self, model: nn.Module, batch: Batch, norm: dict[str, Tensor], log: bool) -> Loss:
        hidden, labels = hidden_states(model, batch), batch.labels
        weight = share(1.0, norm["ce"]).to(torch.promote_types(hidden.dtype, torch.float32))
        result = sparse_target(
            hidden,
            head_weight(model),
            labels.unsqueeze(1),
            weight.to(hidden.device).expand(len(labels), 1),
        )
        return Loss(result.loss, {"ce_loss": (-result.logprobs.sum(), "ce")})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state
