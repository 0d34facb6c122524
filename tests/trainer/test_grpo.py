"""What stage `grpo` computes from answers: advantages, answers that serve steps, the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.trainer import gradients, grpo_cases
from tests.trainer.grpo_cases import Fixed
from trainer.batch import Batch
from trainer.config import ConfigError
from trainer.data.stream import Stream
from trainer.evaluate import held_out
from trainer.groups import advantages
from trainer.objectives.grpo import Reinforce
from trainer.step import backward, normalisers, prepare

CPU = gradients.CPU


def stream(rows: Any, micro_batch: int = 4) -> Stream:
    return Stream(rows, micro_batch=micro_batch, accumulate=1, rank=0, world_size=1, seed=0)


def gradient(model: Any, objective: Reinforce, group: list[Batch]) -> torch.Tensor:
    batches = prepare(objective, group, CPU, 0)
    backward(model, objective, batches, normalisers(batches, CPU), CPU)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_advantages_compare_an_answer_with_the_others_of_its_group() -> None:
    deviation = math.sqrt(2 / 3)  # of 0, 1, 2, 1, with n - 1 = 3 below
    scaled = [value / (deviation + 1e-4) for value in (-1, 0, 1, 0)]
    assert advantages([0.0, 1.0, 2.0, 1.0], scale=True) == pytest.approx(scaled)
    assert advantages([0.0, 1.0, 2.0, 1.0], scale=False) == [-1.0, 0.0, 1.0, 0.0]
    # One without a reward counts for nothing.
    assert advantages([0.0, None, 2.0], scale=False) == [-1.0, 0.0, 1.0]
    for alike in ([0.1] * 3, [None, 5.0], [None, None]):
        assert advantages(alike, scale=True) == [0.0] * len(alike)


def test_groups_of_equal_rewards_give_exactly_no_gradient(tokenizer: str, texts: str) -> None:
    def alike(completions: Sequence[str], **_: Any) -> list[float]:
        return [0.1] * len(completions)

    rows = grpo_cases.prompts(tokenizer, texts)
    for reward, moves in ((alike, False), (grpo_cases.sums, True)):
        model = gradients.model(tokenizer, torch.float32, seed=1)
        objective = Reinforce(grpo_cases.groups(model, CPU, rewards=(reward,)))
        found = gradient(model, objective, stream(rows).next_group())
        assert bool(found.abs().max() > 0) == moves
        assert torch.isfinite(found).all()


def test_an_answers_probability_moves_with_its_advantage(tokenizer: str, texts: str) -> None:
    """A small step along the gradient: the log-prob of the better answers rises, that of the worse
    ones falls."""
    rows = grpo_cases.prompts(tokenizer, texts)
    model = gradients.model(tokenizer, torch.float64, seed=1)
    objective = Reinforce(grpo_cases.groups(model, CPU))
    group = stream(rows).next_group()
    batches = prepare(objective, group, CPU, 0)
    backward(model, objective, batches, normalisers(batches, CPU), CPU)
    with torch.no_grad():
        before = objective.groups.logprobs(model, batches[0])
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
        change = objective.groups.logprobs(model, batches[0]) - before
    assert float((change * batches[0].extra["advantage"]).sum()) > 0


def test_answers_serve_their_steps_and_every_new_try_of_one(tokenizer: str, texts: str) -> None:
    rows, drawn = grpo_cases.prompts(tokenizer, texts, repeats=2), Fixed()
    judged: list[int] = []

    def counting(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        judged.append(len(completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    model = gradients.model(tokenizer, torch.float32, seed=1)
    objective = Reinforce(
        grpo_cases.groups(model, CPU, rollouts=drawn, rewards=(counting,), iterations=2)
    )
    data = stream(rows)
    first = data.next_group()
    whole = prepare(objective, first, CPU, 0)
    # Out of memory: the same rows again, in halves.
    halves = prepare(objective, list(first[0].split()), CPU, 0)
    assert len(drawn.calls) == 1 and judged == [16]
    tokens = sum(float(part.weights["tokens"]) for part in halves)
    assert tokens == float(whole[0].weights["tokens"])
    # The second step on the same answers.
    second = data.next_group()
    assert list(second[0].places) == list(first[0].places)
    again = prepare(objective, second, CPU, 1)
    assert len(drawn.calls) == 1
    assert torch.equal(again[0].extra["old"], whole[0].extra["old"])
    # A checkpoint between the two holds them.
    fresh = Reinforce(
        grpo_cases.groups(model, CPU, rollouts=drawn, rewards=(counting,), iterations=2)
    )
    fresh.load_state_dict(objective.state_dict())
    resumed = prepare(fresh, second, CPU, 1)
    assert len(drawn.calls) == 1
    assert torch.equal(resumed[0].targets, again[0].targets)
    assert torch.equal(resumed[0].extra["old"], again[0].extra["old"])
    third = data.next_group()
    assert third[0].places[0] == 4
    prepare(objective, third, CPU, 2)
    assert [call[0] for call in drawn.calls] == [4, 4] and judged == [16, 16]
    assert drawn.calls[0][1] != drawn.calls[1][1]
    assert sorted(objective.groups.kept) == [4, 5, 6, 7]  # the old ones are forgotten


def test_a_trial_of_memory_takes_the_longest_answers_and_asks_no_reward(
    tokenizer: str, texts: str
) -> None:
    def never(completions: Sequence[str], **_: Any) -> list[float]:
        raise AssertionError("asked")

    rows, drawn = grpo_cases.prompts(tokenizer, texts), Fixed()
    model = gradients.model(tokenizer, torch.float32, seed=1)
    objective = Reinforce(grpo_cases.groups(model, CPU, rollouts=drawn, rewards=(never,)))
    (batch,) = prepare(objective, [rows.batch([0, 1])], CPU, 0)
    assert float(batch.weights["tokens"]) == 2 * 4 * 12 and not drawn.calls
    assert not objective.groups.kept


def test_ratios_beyond_the_clip_are_counted_and_give_no_gradient(
    tokenizer: str, texts: str
) -> None:
    """Probabilities of an old policy far away: where the advantage would drive the ratio further
    out, its token must not matter."""
    rows = grpo_cases.prompts(tokenizer, texts)
    model = gradients.model(tokenizer, torch.float64, seed=1)
    objective = Reinforce(grpo_cases.groups(model, CPU))
    (batch,) = prepare(objective, stream(rows).next_group(), CPU, 0)
    # Every ratio is e for the better answers and 1/e for the worse ones.
    batch.extra["old"] = batch.extra["old"] - batch.extra["advantage"].sign()
    result = objective.loss(model, batch, batch.weights, True)
    result.total.backward()
    judged = int((batch.extra["advantage"] != 0).sum())
    assert float(result.sums["clipped"][0]) == judged > 0
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters())


def test_metrics_are_means_over_what_they_count(tokenizer: str, texts: str) -> None:
    def length(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[Any]:
        return [None if len(ids) == 12 else float(len(ids)) for ids in completion_ids]

    rows = grpo_cases.prompts(tokenizer, texts)
    model = gradients.model(tokenizer, torch.float32, seed=1)
    objective = Reinforce(
        grpo_cases.groups(
            model, CPU, rewards=(length, grpo_cases.sums), reward_weights=(1.0, 0.0),
            rewards_named=("a:length", "a:sums"),
        )
    )  # fmt: skip
    batches = prepare(objective, stream(rows, 8).next_group(), CPU, 0)
    norm = normalisers(batches, CPU)
    done = backward(model, objective, batches, norm, CPU)
    lengths = [len(a) for g in objective.groups.kept.values() for a in g.answers]
    short = [n for n in lengths if n < 12]
    assert 0 < len(short) < len(lengths)
    assert float(done.sums["length"]) == pytest.approx(sum(lengths) / len(lengths))
    assert float(done.sums["truncated"]) == pytest.approx(1 - len(short) / len(lengths))
    assert float(done.sums["reward_length"]) == pytest.approx(sum(short) / len(short))
    assert float(done.tokens) == sum(lengths)


def test_an_answer_that_no_function_judges_counts_for_nothing(tokenizer: str, texts: str) -> None:
    def some(completion_ids: list[list[int]], **columns: Any) -> list[Any]:
        return [None if i % 2 else 1.0 + i for i in range(len(completion_ids))]

    model = gradients.model(tokenizer, torch.float64, seed=1)
    held = grpo_cases.groups(model, gradients.CPU, rewards=(some,))
    batch = grpo_cases.prompts(tokenizer, texts).batch([0])
    batch.places = [0]
    (group,) = held.of(batch, 0)
    assert group.facts["judged"] == 2 and group.facts["reward"] == 1.0 + 3.0
    assert group.advantages[1] == group.advantages[3] == 0.0
    assert group.advantages[0] == -group.advantages[2] != 0.0


@pytest.mark.parametrize("normalise", ["tokens", "answers", "constant"])
def test_the_answers_to_a_prompt_may_be_learned_from_in_parts(
    normalise: str, tokenizer: str, texts: str
) -> None:
    """Of one prompt, three answers and one: the loss, its gradient and all metrics are those of
    the group."""
    rows = grpo_cases.prompts(tokenizer, texts)
    model, old, start = (gradients.model(tokenizer, torch.float64, seed=i) for i in (1, 2, 3))

    def learned(objective: Reinforce) -> tuple[torch.Tensor, dict[str, float], int]:
        model.zero_grad(set_to_none=True)
        batches = prepare(objective, stream(rows, 1).next_group(), CPU, 0)
        done = backward(model, objective, batches, normalisers(batches, CPU), CPU)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        return (
            found,
            {name: float(value) for name, value in done.sums.items()},
            len(batches[0].parts),
        )

    whole, in_parts = (
        Reinforce(grpo_cases.groups(old, CPU, start, beta=0.1, normalise=normalise))
        for _ in range(2)
    )
    gradient, metrics, parts = learned(whole)
    assert parts == 0 and metrics["clipped"] > 0 and metrics["kl"] > 0
    for count in (2, 4):
        assert in_parts.divide() == f"its 4 answers in {count} parts from now on"
        found, sums, parts = learned(in_parts)
        assert parts == count and sums == pytest.approx(metrics)
        assert torch.allclose(found, gradient, rtol=1e-9, atol=1e-12)
    assert in_parts.divide() is None  # each is one answer
    fresh = Reinforce(grpo_cases.groups(old, CPU, start, beta=0.1, normalise=normalise))
    fresh.load_state_dict(in_parts.state_dict())
    assert learned(fresh)[2] == 4


def test_out_of_memory_in_the_reference_keeps_answers_and_rewards(
    tokenizer: str, texts: str
) -> None:
    judged: list[int] = []

    def counting(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        judged.append(len(completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    rows, drawn = grpo_cases.prompts(tokenizer, texts), Fixed()
    model, start = (gradients.model(tokenizer, torch.float32, seed=i) for i in (1, 2))
    held = grpo_cases.groups(
        model, CPU, start, rollouts=drawn, rewards=(counting,), beta=0.1, iterations=1
    )
    (batch,) = stream(rows).next_group()

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    handle = start.get_input_embeddings().register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        held.of(batch, 0)
    handle.remove()
    groups = [group for half in batch.split() for group in held.of(half, 0)]
    assert len(drawn.calls) == 1 and judged == [16]
    assert all(len(group.reference) == 4 for group in groups)


def test_parts_are_not_tried_where_not_even_one_answer_can_be_drawn(
    tokenizer: str, texts: str
) -> None:
    class Full(Fixed):
        def draw(self, *_: Any) -> Any:
            raise torch.OutOfMemoryError("no memory for one answer")

    model = gradients.model(tokenizer, torch.float32, seed=1)
    objective = Reinforce(grpo_cases.groups(model, CPU, rollouts=Full()))
    (batch,) = stream(grpo_cases.prompts(tokenizer, texts)).next_group()
    with pytest.raises(torch.OutOfMemoryError):
        objective.groups.of(batch, 0)
    with pytest.raises(ConfigError, match=r"no memory to draw .* lower grpo\.max_new_tokens"):
        objective.divide()
    objective.groups.rollouts = Fixed()
    assert objective.groups.of(batch, 0) and objective.divide() is not None


def test_held_out_means_are_over_the_answers_that_were_judged(tokenizer: str, texts: str) -> None:
    def some(completion_ids: list[list[int]], **_: Any) -> list[Any]:
        return [None if i % 2 else 3.0 for i in range(len(completion_ids))]

    model = gradients.model(tokenizer, torch.float32, seed=1)
    objective = Reinforce(grpo_cases.groups(model, CPU, rewards=(some,)))
    batch = grpo_cases.prompts(tokenizer, texts).batch([0, 1, 2, 3])
    count, sums = objective.judge(model, batch.to(CPU.device))
    lengths = [len(group.answers[0]) for group in objective.groups.greedy(batch.records)]
    assert count == 2 and len(set(lengths)) > 1
    assert sums.tolist()[:3] == [-6.0, 6.0, lengths[0] + lengths[2]]


def test_held_out_answers_that_nobody_judged_have_no_reward(tokenizer: str, texts: str) -> None:
    """Not one of 0, which a gate might let pass and which would be the best so far."""

    def silent(completions: Sequence[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    model = gradients.model(tokenizer, torch.float32, seed=1)
    objective = Reinforce(grpo_cases.groups(model, CPU, rewards=(silent,)))
    rows = grpo_cases.prompts(tokenizer, texts)
    found = held_out(model, rows, CPU, objective, micro_batch=4, limit=4)
    assert found["val_count"] == 0
    assert math.isnan(found["val_reward"]) and math.isnan(found["val_loss"])
