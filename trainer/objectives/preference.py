"""Learning from pairs of a chosen and a rejected answer: stages `dpo` and `ipo`."""

from __future__ import annotations

from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from trainer.batch import Batch
from trainer.config import Preference
from trainer.objective import Loss, share
from trainer.reference import Known, answer_logprobs, number_answers, without_adapter
from trainer.runtime import Runtime


class Prefer:
    """margin = (pi - ref of the chosen answer) - (pi - ref of the rejected one), of log-probs.
    dpo, of whole answers, with e = label_smoothing (Rafailov et al. 2023, arXiv 2305.18290):
    -(1 - e) * log sigmoid(beta * margin) - e * log sigmoid(-beta * margin). ipo, averaged over an
    answer's tokens (Azar et al. 2023, arXiv 2310.12036): (margin - 1 / (2 beta))^2. Both a mean
    over pairs; plus sft_weight * the mean of -log p over the tokens of chosen answers."""

    measures = ("loss", "accuracy", "margin")

    def __init__(
        self,
        kind: Literal["dpo", "ipo"],
        config: Preference,
        runtime: Runtime,
        known: Optional[Known],  # the reference's; None: ask it, with the adapter off
    ) -> None:
        self.kind, self.config, self.runtime, self.known = kind, config, runtime, known

    def prepare(self, batch: Batch, step: int) -> Batch:
        tokens = number_answers(batch)
        if self.known is not None and batch.host is not None:
            batch.extra["reference"] = self.known.of(batch.host).to(batch.input_ids.device)
        pairs = torch.tensor(len(tokens) / 2, dtype=torch.float64)
        batch.weights.update(tokens=tokens.sum(), pairs=pairs, chosen=tokens[0::2].sum())
        return batch

    def loss(self, model: nn.Module, batch: Batch, norm: dict[str, Tensor], log: bool) -> Loss:
        logps, each, facts = self._compare(model, batch)
        sums = {name: (value.detach().sum(), "pairs") for name, value in facts.items()}
        total = share(1.0, norm["pairs"]).to(logps.device) * each.sum()
        if self.config.sft_weight > 0:
            nll = -logps[0::2].sum()
            total = total + share(self.config.sft_weight, norm["chosen"]).to(nll.device) * nll
            sums["sft_loss"] = (nll.detach(), "chosen")
        return Loss(total, sums)

    def judge(self, model: nn.Module, batch: Batch) -> tuple[int, Tensor]:
        with self.runtime.autocast():
            _, each, facts = self._compare(model, self.prepare(batch, 0))
        return len(each), torch.stack([each, facts["accuracy"], facts["margin"]]).sum(dim=1)

    def _compare(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log-probs of answers [2 P], the loss of each pair [P], and what is measured of it [P]."""
        beta, smooth, extra = self.config.beta, self.config.label_smoothing, batch.extra
        reference = extra["reference"] if self.known else without_adapter(model, batch)
        logps = answer_logprobs(model, batch)
        ratio = logps - reference
        if self.kind == "ipo":
            ratio = ratio / extra["tokens"]
        margin = ratio[0::2] - ratio[1::2]
        each = (margin - 1 / (2 * beta)) ** 2
        if self.kind == "dpo":
            each = -(1 - smooth) * logsigmoid(beta * margin) - smooth * logsigmoid(-beta * margin)
        facts = {"preference_loss": each, "accuracy": (margin.sign() + 1) / 2, "margin": margin}
        for at, side in enumerate(("chosen", "rejected")):
            facts |= {f"rewards_{side}": beta * ratio[at::2], f"logps_{side}": logps[at::2]}
        return logps, each, facts

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state
