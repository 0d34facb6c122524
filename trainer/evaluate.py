"""Held-out cross-entropy, in the loop and as the stage `evaluate`."""

from __future__ import annotations

import torch
from torch import nn

from trainer.data.stream import Rows, validation_batches
from trainer.losses.linear import sparse_target
from trainer.models import head_weight, hidden_states
from trainer.runtime import Runtime


@torch.no_grad()  # type: ignore[untyped-decorator]
def cross_entropy(
    model: nn.Module, rows: Rows, runtime: Runtime, *, micro_batch: int, limit: int = 0
) -> tuple[float, int]:
    """Mean cross-entropy in nats per supervised token over `rows` (at most `limit` micro-batches a
    rank; 0: all), and the number of those tokens, over all ranks. The model's mode is restored."""
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    tokens = torch.zeros((), dtype=torch.float64)
    for cpu_batch in validation_batches(rows, micro_batch, runtime.rank, runtime.world_size, limit):
        batch = cpu_batch.to(runtime.device)
        labels = batch.labels
        with runtime.autocast():
            hidden = hidden_states(model, batch)
        weight = head_weight(model).detach()
        ones = torch.ones_like(labels, dtype=torch.float32).unsqueeze(1)
        total += sparse_target(hidden, weight, labels.unsqueeze(1), ones).loss
        tokens += len(labels)
    model.train(training)
    sums = runtime.all_sum({"loss": total, "tokens": tokens})
    count = int(sums["tokens"])
    return float(sums["loss"]) / max(count, 1), count
