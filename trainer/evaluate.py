"""Held-out cross-entropy, in the loop and as the stage `evaluate`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.config import ConfigError
from trainer.data.stream import Rows, validation_batches
from trainer.losses.linear import sparse_target
from trainer.models import head_weight, hidden_states
from trainer.runtime import Runtime
from trainer.step import cut, unless_out_of_memory


@torch.no_grad()  # type: ignore[untyped-decorator]
def cross_entropy(
    model: nn.Module,
    rows: Rows,
    runtime: Runtime,
    *,
    micro_batch: int,
    limit: int = 0,
    smaller: Callable[[int], None] = lambda rows: None,
) -> tuple[float, int]:
    """Mean cross-entropy in nats per supervised token over `rows` (at most `limit` micro-batches a
    rank; 0: all), and the number of those tokens, over all ranks. The model's mode is restored.

    Out of memory, a rank goes on with halves of its micro-batch: sums over rows do not depend on
    the cut. `smaller` is then told the smallest that any rank came to. Errors: `ConfigError`, on
    all ranks, when one row does not fit."""
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    tokens = torch.zeros((), dtype=torch.float64)
    fitting = micro_batch  # 0: not even one row
    for batch in validation_batches(rows, micro_batch, runtime.rank, runtime.world_size, limit):
        waiting = cut([batch], fitting)
        while waiting and fitting:
            found = unless_out_of_memory(_summed, model, waiting[0], runtime)
            if found is None:
                runtime.release_memory()
                fitting = waiting[0].rows // 2
                waiting = cut(waiting, max(fitting, 1))
                continue
            total += found[0]
            tokens += found[1]
            del waiting[0]
        if not fitting:
            break
    model.train(training)
    smallest = -int(runtime.largest(-float(fitting)))
    if smallest == 0:
        raise ConfigError(
            "evaluation: one row does not fit in the device's memory: lower data.sequence_length, "
            "or take a larger accelerator"
        )
    if smallest < micro_batch:
        smaller(smallest)
    sums = runtime.all_sum({"loss": total, "tokens": tokens})
    count = int(sums["tokens"])
    return float(sums["loss"]) / max(count, 1), count


def _summed(model: nn.Module, host: Batch, runtime: Runtime) -> tuple[Tensor, int]:
    """The sum of the cross-entropy over a batch's supervised tokens, and their number."""
    batch = host.to(runtime.device)
    labels = batch.labels
    with runtime.autocast():
        hidden = hidden_states(model, batch)
    ones = torch.ones_like(labels, dtype=torch.float32).unsqueeze(1)
    loss = sparse_target(hidden, head_weight(model).detach(), labels.unsqueeze(1), ones).loss
    return loss, len(labels)
