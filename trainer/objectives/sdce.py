"""Surrogate-guided cross-entropy: beside the token of the text, what another model holds likely."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.config import Sdce
from trainer.losses.linear import dense_kl, sparse_target
from trainer.models import head_weight, hidden_states
from trainer.objective import Loss, share
from trainer.surrogate import Surrogate


class SurrogateGuided:
    """loss = CE / tokens + lambda * S / targets; q is the model's whole softmax in both.

    `soft`: S = sum over tokens of sum_j w_j * -log q_j, j being the token itself and the
    surrogate's `k` most probable others of p >= threshold, w_j = p_j / sum of p over these;
    targets: the tokens that have such a row. `parity`: the others alone, w = softmax(-1 / p) over
    them; targets: the entries of all rows, as the published code has it. `kl`: S = sum of
    KL(p || q) over the whole vocabulary; targets: all tokens. lambda: see `weight_at`."""

    def __init__(self, config: Sdce, surrogate: Surrogate) -> None:
        self.config, self.surrogate = config, surrogate

    def prepare(self, batch: Batch, step: int) -> Batch:
        tokens = batch.labels.new_full((), len(batch.labels), dtype=torch.float64)
        if self.config.loss == "kl":
            batch.extra["hidden"] = self.surrogate.hidden(batch)
            batch.weights.update(ce=tokens, surrogate=tokens, covered=tokens)
            return batch
        found = batch.extra["opinion"] = self.surrogate.opinion(batch, self.config)
        covered = tokens.new_full((), found.covered)
        batch.weights.update(ce=tokens, surrogate=found.targets.double(), covered=covered)
        return batch

    def loss(self, model: nn.Module, batch: Batch, norm: dict[str, Tensor], log: bool) -> Loss:
        hidden, head, labels = hidden_states(model, batch), head_weight(model), batch.labels
        weight = weight_at(self.config, batch.progress)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        ce = share(1.0, norm["ce"]).to(hidden.device, dtype)
        factor = share(weight, norm["surrogate"]).to(hidden.device, dtype)
        sums: dict[str, tuple[Tensor, str]] = {
            "surrogate_weight": (weight * batch.weights["ce"], "ce"),
            "surrogate_coverage": (batch.weights["covered"], "ce"),
        }
        if self.config.loss == "kl":
            given, other = batch.extra["hidden"], head_weight(self.surrogate.model)
            both = dense_kl(
                hidden, head, given, other, labels, temperature=1.0, ce_weight=ce, kl_weight=factor
            )
            sums.update(ce_loss=(both.ce, "ce"), surrogate_loss=(both.kl, "surrogate"))
            return Loss(both.loss, sums)
        opinion = batch.extra["opinion"]
        w = opinion.weights * factor
        w[:, 0] += ce
        result = sparse_target(hidden, head, opinion.ids, w)
        sums["ce_loss"] = (-result.logprobs[:, 0].sum(), "ce")
        sums["surrogate_loss"] = (-(opinion.weights * result.logprobs).sum(), "surrogate")
        sums["surrogate_kept"] = (opinion.kept, "covered")
        sums["surrogate_agreement"] = (opinion.agreed, "covered")
        return Loss(result.loss, sums)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def weight_at(config: Sdce, progress: float) -> float:
    """lambda at `progress` of the horizon: from `weight` to `weight_final` along half a cosine."""
    done = 0.5 * (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return config.weight + (config.weight_final - config.weight) * done
