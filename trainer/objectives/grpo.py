"""Reinforcement from rewards relative to the other answers to the same prompt (Shao et al. 2024,
arXiv 2402.03300): what is drawn and judged comes from `trainer.groups`, the loss is here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.groups import Groups
from trainer.objective import Loss, share


class Reinforce:
    """Over the tokens of all answers, with r = p / p_old and the advantage A: loss = sum of
    w * (-min(r A, clamp(r, 1 - clip, 1 + clip_high) A) + beta * r * (e^d - d - 1)), where
    d = log p_reference - log p, and r makes the gradient that of the KL (arXiv 2512.02556);
    w is the weight of a token in the mean that `normalise` names, over the whole step."""

    measures = ("loss", "reward", "length", "truncated")

    def __init__(self, groups: Groups) -> None:
        self.groups, self.plan = groups, groups.plan

    def prepare(self, batch: Batch, step: int) -> Batch:
        assert batch.host is not None, "call `to` first"
        groups = self.groups.of(batch.host, step)
        parts = self.groups.batches(groups, batch.input_ids.device)
        made = replace(parts[0], parts=parts if len(parts) > 1 else ())
        reported = self.groups.reported
        names = {*reported, *reported.values()}
        facts = {name: sum(group.facts.get(name, 0.0) for group in groups) for name in names}
        made.extra["facts"] = facts.copy()  # once: the other parts have none
        answers = [answer for group in groups for answer in group.answers]
        facts.update(tokens=sum(map(len, answers)), answers=len(answers), groups=len(groups))
        terms = dict.fromkeys(("tokens", "answers", *reported.values()))
        made.weights = {k: torch.tensor(facts[k], dtype=torch.float64) for k in terms}
        return made

    def loss(self, model: nn.Module, batch: Batch, norm: dict[str, Tensor], log: bool) -> Loss:
        plan, extra, logprobs = self.plan, batch.extra, self.groups.logprobs(model, batch)
        own = logprobs.detach()
        advantage, old = extra["advantage"].to(own), extra["old"]
        ratio = (logprobs - (own if old is None else old.to(own))).exp()
        low, high = 1 - plan.clip, 1 + (plan.clip if plan.clip_high is None else plan.clip_high)
        each = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        outside = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
        # -log p of a drawn token has the entropy as its mean.
        sums = {"clipped": (outside.sum(), "tokens"), "entropy": (-own.sum(), "tokens")}
        if extra["reference"] is not None:
            apart = extra["reference"].to(own) - logprobs
            kl = apart.exp() - apart - 1
            each = each + plan.beta * ratio * kl
            sums["kl"] = (kl.detach().sum(), "tokens")
        facts = extra.get("facts", {})
        for name, term in self.groups.reported.items():
            sums[name] = (torch.tensor(facts.get(name, 0.0), device=own.device), term)
        term = "tokens" if plan.normalise == "tokens" else "answers"
        weight = extra["weight"] * share(1.0, norm[term]).to(own.device)
        return Loss((each * weight.to(own)).sum(), sums)

    def judge(self, model: nn.Module, batch: Batch) -> tuple[int, Tensor]:
        assert batch.host is not None, "call `to` first"
        facts = [group.facts for group in self.groups.greedy(batch.host.records)]
        facts = [fact for fact in facts if fact["judged"]]  # each is of one answer
        reward, *others = (sum(fact[name] for fact in facts) for name in self.measures[1:])
        sums = torch.tensor([-reward, reward, *others], dtype=torch.float64)
        return len(facts), sums.to(batch.targets.device)

    def divide(self) -> Optional[str]:
        return self.groups.divide()

    def state_dict(self) -> dict[str, Any]:
        return self.groups.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.groups.load_state_dict(state)
