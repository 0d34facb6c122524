"""The optimizer, and what happens to gradients before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer import parallel
from trainer.config import Train


def make_optimizer(model: nn.Module, config: Train) -> torch.optim.Optimizer:
    """Fused AdamW; matrices decay, vectors (norms, biases) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def unscale(model: nn.Module, scale: float) -> Tensor:
    """Take the loss scale out of the gradients; their norm [0-dim], all of them as one vector. All
    ranks must call it."""
    grads = _gradients(model)
    if scale != 1.0:
        torch._foreach_mul_(grads, 1 / scale)
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    return parallel.total_norm(norm) if parallel.is_sharded(model) else norm


def clip(model: nn.Module, norm: Tensor, largest: float) -> None:
    """Shorten the gradients, whose norm is given, to one of at most `largest`; 0: leave them."""
    if largest > 0:
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(_gradients(model), factor)


def _gradients(model: nn.Module) -> list[Tensor]:
    """Of a sharded model, this rank's parts."""
    return [parallel.local(p.grad) for p in model.parameters() if p.grad is not None]
