"""Reinforcement from rewards relative to the other answers to the same prompt (Shao et al. 2024,
arXiv 2402.03300): what is drawn and judged comes from `trainer.groups`, the loss is here."""

from __future__ import annotations

from typing import Any

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
        groups, device = self.groups.of(batch.host, step), batch.input_ids.device
        laid = self.groups.laid_out(groups)
        made = laid.batch.to(device)
        each = {"tokens": 1.0, "constant": 1 / self.plan.max_new_tokens}.get(self.plan.normalise)
        made.extra["weight"] = laid.column([each or 1 / n for n in laid.lengths]).to(device)
        made.extra["advantage"] = laid.column([groups[g].advantages[a] for g, a in laid.order])
        for name in ("old", "reference"):
            held = [part for g, a in laid.order for part in getattr(groups[g], name)[a : a + 1]]
            made.extra[name] = torch.cat(held).to(device) if held else None
        reported = self.groups.reported
        names = {*reported, *reported.values()}
        facts = {name: sum(group.facts.get(name, 0.0) for group in groups) for name in names}
        made.extra["facts"] = facts.copy()
        facts.update(tokens=sum(laid.lengths), answers=len(laid.order), groups=len(groups))
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
        for name, term in self.groups.reported.items():
            sums[name] = (torch.tensor(extra["facts"][name], device=own.device), term)
        term = "tokens" if plan.normalise == "tokens" else "answers"
        weight = extra["weight"] * share(1.0, norm[term]).to(own.device)
        return Loss((each * weight.to(own)).sum(), sums)

    def judge(self, model: nn.Module, batch: Batch) -> tuple[int, Tensor]:
        assert batch.host is not None, "call `to` first"
        facts = [group.facts for group in self.groups.greedy(batch.host.records)]
        names = ("judged", "reward", "length", "truncated")
        judged, reward, *others = (sum(fact[name] for fact in facts) for name in names)
        sums = torch.tensor([-reward, reward, *others], dtype=torch.float64)
        return int(judged), sums.to(batch.targets.device)

    def state_dict(self) -> dict[str, Any]:
        return self.groups.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.groups.load_state_dict(state)
