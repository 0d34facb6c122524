"""Groups of answers to a prompt: drawn, judged, kept as long as they are needed, and laid out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer.answer_rows import Group, Laid, lay_out
from trainer.batch import Batch
from trainer.config import ConfigError, Grpo
from trainer.data.prompts import Prompt
from trainer.losses.linear import token_logprobs
from trainer.models import head_weight, hidden_states, reading
from trainer.reward_functions import Reward
from trainer.rollouts import Answer, Rollouts
from trainer.runtime import Runtime

#: Added to the standard deviation that advantages are divided by, as TRL does.
EPSILON = 1e-4


@dataclass(frozen=True)
class Reference:
    """The model as the stage found it: `model` within `switch` (for an adapter: switched off)."""

    model: nn.Module
    switch: Callable[[], AbstractContextManager[Any]]


class Groups:
    """Where an objective has its groups from. The answers drawn for a place in the stream serve all
    its micro-batches' tries and all steps that the stream gives it to; then they are forgotten."""

    def __init__(
        self,
        plan: Grpo,
        model: nn.Module,
        rollouts: Rollouts,
        rewards: Sequence[Reward],
        runtime: Runtime,
        decode: Callable[[list[int]], str],
        *,
        columns: Sequence[str],
        length: int,
        packing: bool,
        seed: int,
        reference: Optional[Reference] = None,
    ) -> None:
        self.plan, self.model, self.rollouts, self.rewards = plan, model, rollouts, list(rewards)
        self.runtime, self.decode, self.columns, self.seed = runtime, decode, columns, seed
        self.length, self.packing, self.reference = length, packing, reference
        self.kept: dict[int, Group] = {}
        self.step: Optional[int] = None
        self.parts = 1  # in which the answers of a micro-batch go through the model
        self.drawing = False  # also after a draw that failed

    @property
    def reported(self) -> dict[str, str]:
        """Names of the facts of groups -> the weight that each is a mean over."""
        found = {"reward": "judged", "reward_std": "groups", "zero_variance": "groups"}
        found.update(length="answers", truncated="answers")
        if len(self.rewards) > 1:
            names = [reward.label for reward in self.rewards]
            found.update({f"reward_{name}": f"judged_{name}" for name in names})
        return found

    def of(self, batch: Batch, step: int) -> list[Group]:
        """The groups of the rows of `batch` (the host's). Rows that are not of the stream try how
        much memory a step takes: they get the longest answers there may be, judged by nobody."""
        prompts: Sequence[Prompt] = batch.records
        if not batch.places:
            return self._completed([self._longest(prompt) for prompt in prompts])
        if step != self.step:
            self.step = step
            if batch.places[0] not in self.kept:
                self.kept.clear()
        new = [i for i, place in enumerate(batch.places) if place not in self.kept]
        if new:
            seed = f"{self.seed}/{batch.places[new[0]]}"
            asked = [prompts[i] for i in new]
            ids = [prompt.ids for prompt in asked]
            self.drawing = True
            drawn = self.rollouts.draw(ids, self.plan.group, seed, step)
            self.drawing = False
            made = self._judged(asked, drawn)  # kept whatever happens to the passes below
            self.kept.update((batch.places[i], group) for i, group in zip(new, made))
        return self._completed([self.kept[place] for place in batch.places])

    def greedy(self, prompts: Sequence[Prompt]) -> list[Group]:
        """One answer to each prompt, the most probable token every time."""
        version = 0 if self.step is None else self.step + 1
        drawn = self.rollouts.draw([prompt.ids for prompt in prompts], 1, None, version)
        return self._judged(prompts, drawn)

    def laid_out(self, groups: Sequence[Group]) -> Laid:
        """The groups as rows of the configured length, packed or not."""
        return lay_out(groups, self.length if self.packing else None)

    def batches(self, groups: Sequence[Group], device: torch.device) -> list[Batch]:
        """The groups on `device`, in the parts that memory allows, with an `extra` value for each
        supervised token: `weight`, `advantage`, `old` and `reference` (None: there is none)."""
        plan, found = self.plan, []
        each = {"tokens": 1.0, "constant": 1 / plan.max_new_tokens}.get(plan.normalise)
        for part in divided(groups, self.parts):
            laid = self.laid_out(part)
            made = laid.batch.to(device)
            made.extra["weight"] = laid.column([each or 1 / n for n in laid.lengths]).to(device)
            made.extra["advantage"] = laid.column([part[g].advantages[a] for g, a in laid.order])
            for name in ("old", "reference"):
                held = [one for g, a in laid.order for one in getattr(part[g], name)[a : a + 1]]
                made.extra[name] = torch.cat(held).to(device) if held else None
            found.append(made)
        return found

    def divide(self) -> Optional[str]:
        """Twice as many parts from now on, in words; None: each is but an answer of a prompt. All
        ranks must call it. Errors: `ConfigError` where memory was too little to draw an answer,
        which is done before there are parts."""
        if self.runtime.any(self.drawing)[0]:
            raise ConfigError(
                "grpo: no memory to draw a single answer: lower grpo.max_new_tokens, or take a"
                " larger accelerator"
            )
        if self.parts >= self.plan.group:
            return None
        self.parts = min(2 * self.parts, self.plan.group)
        return f"its {self.plan.group} answers in {self.parts} parts from now on"

    def logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the supervised tokens [n] of `batch`, at the temperature of the draws."""
        return token_logprobs(
            hidden_states(model, batch),
            head_weight(model),
            batch.labels,
            temperature=self.plan.temperature,
        )

    def _longest(self, prompt: Prompt) -> Group:
        tokens, count = self.plan.max_new_tokens, self.plan.group
        answer = [prompt.ids[i % len(prompt.ids)] for i in range(tokens)]
        signs = [1.0 if i % 2 else -1.0 for i in range(count)]  # every row is to have a gradient
        return Group(list(prompt.ids), [answer] * count, signs, {})

    def _judged(self, prompts: Sequence[Prompt], drawn: Sequence[Sequence[Answer]]) -> list[Group]:
        """Groups with their rewards, of one call of each function for all answers."""
        owners = [prompt for prompt, answers in zip(prompts, drawn) for _ in answers]
        ids = [answer.ids for answers in drawn for answer in answers]
        lists: dict[str, list[Any]] = {
            "prompts": [owner.given for owner in owners],
            "completions": [self._said(owner, answer) for owner, answer in zip(owners, ids)],
            "completion_ids": ids,
        }
        for name in self.columns:
            lists[name] = [owner.columns.get(name) for owner in owners]
        scores = [reward(**lists) for reward in self.rewards] if owners else []
        groups, at = [], 0
        for prompt, answers in zip(prompts, drawn):
            here = slice(at, at + len(answers))
            at += len(answers)
            groups.append(self._group(prompt, answers, [column[here] for column in scores]))
        return groups

    def _said(self, prompt: Prompt, ids: list[int]) -> Any:
        words = self.decode(ids)
        if isinstance(prompt.given, str):
            return words
        return [{"role": "assistant", "content": words}]

    def _group(
        self, prompt: Prompt, answers: Sequence[Answer], scores: list[list[Optional[float]]]
    ) -> Group:
        weights = self.plan.reward_weights or (1.0,) * len(self.rewards)
        totals: list[Optional[float]] = []
        for each in zip(*scores):
            known = [weight * value for weight, value in zip(weights, each) if value is not None]
            totals.append(sum(known) if known else None)
        judged = [total for total in totals if total is not None]
        facts = {
            "reward": sum(judged),
            "judged": float(len(judged)),
            "reward_std": statistics.stdev(judged) if len(judged) > 1 else 0.0,
            "zero_variance": float(len(set(judged)) < 2),
            "length": float(sum(len(answer.ids) for answer in answers)),
            "truncated": float(sum(not answer.ended for answer in answers)),
        }
        for reward, column in zip(self.rewards, scores):
            values = [value for value in column if value is not None]
            facts[f"reward_{reward.label}"] = sum(values)
            facts[f"judged_{reward.label}"] = float(len(values))
        ids = [answer.ids for answer in answers]
        return Group(list(prompt.ids), ids, advantages(totals, self.plan.scale_rewards), facts)

    def _completed(self, groups: list[Group]) -> list[Group]:
        """With the log-probs of the weights as they are now, where other weights will be compared
        with them, and with those of the reference; those that have them keep them."""
        wanted: list[tuple[str, nn.Module, Callable[[], AbstractContextManager[Any]]]] = []
        if self.plan.iterations > 1:
            wanted.append(("old", self.model, torch.no_grad))
        if self.reference is not None:
            wanted.append(("reference", self.reference.model, self.reference.switch))
        for name, model, switch in wanted:
            lacking = [group for group in groups if not getattr(group, name)]
            if not lacking:
                continue
            found: list[list[Tensor]] = [[] for _ in lacking]
            for part in divided(lacking, self.parts):
                laid = self.laid_out(part)
                batch = laid.batch.to(self.runtime.device)
                with reading(model), switch(), self.runtime.autocast():
                    logprobs = self.logprobs(model, batch).cpu()
                of = dict(zip(laid.order, logprobs.split(laid.lengths)))
                for g, group in enumerate(part):
                    # Copies: a piece would keep, and save, all of `logprobs`.
                    found[g] += [of[g, a].clone() for a in range(len(group.answers))]
            for group, whole in zip(lacking, found):
                setattr(group, name, whole)
        return groups

    def state_dict(self) -> dict[str, Any]:
        """The answers that further steps will ask for, none where each serves one; and what an
        out-of-memory taught."""
        kept = self.kept if self.plan.iterations > 1 else {}
        state: dict[str, Any] = {
            "kept": {place: dict(vars(group)) for place, group in kept.items()}
        }
        if self.parts > 1:
            state["parts"] = self.parts
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = {place: Group(**held) for place, held in state.get("kept", {}).items()}
        self.parts = min(max(self.parts, state.get("parts", 1)), self.plan.group)
        self.step = None


def divided(groups: Sequence[Group], parts: int) -> list[list[Group]]:
    """The groups as `parts` lists, at most as many as a group has answers, in each a part of those
    of every group. Advantages are numbers by now, so answers may be apart; what there is to report
    is with the first."""
    parts = min(parts, *(len(group.answers) for group in groups))
    return [[_some(group, part, parts) for group in groups] for part in range(parts)]


def advantages(rewards: Sequence[Optional[float]], scale: bool) -> list[float]:
    """r - mean, with `scale` over (standard deviation + 1e-4) (Shao et al. 2024, arXiv 2402.03300;
    the deviation has n - 1 below, as TRL's). Exactly 0 where all rewards are equal, where there is
    but one, and for an answer without a reward, which counts for nothing."""
    known = [reward for reward in rewards if reward is not None]
    if len(set(known)) < 2:
        return [0.0] * len(rewards)
    mean = statistics.fmean(known)
    by = statistics.stdev(known) + EPSILON if scale else 1.0
    return [0.0 if reward is None else (reward - mean) / by for reward in rewards]


def _some(group: Group, part: int, parts: int) -> Group:
    count = len(group.answers)
    at = slice(part * count // parts, (part + 1) * count // parts)
    facts = group.facts if part == 0 else {}
    return Group(
        group.prompt, group.answers[at], group.advantages[at], facts,
        group.old[at], group.reference[at],
    )  # fmt: skip
