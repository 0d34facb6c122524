"""The means of a logged line."""

from __future__ import annotations

import math

import pytest
import torch

from tests.trainer import gradients
from trainer.step import Accumulated, backward, normalisers, prepare
from trainer.window import Window

FINE, NOT_FINITE = torch.zeros(()), torch.ones(())


def step(**terms: tuple[float, bool]) -> Accumulated:
    """Of each metric the mean of a step, and whether there was anything to measure."""
    sums = {name: torch.tensor(value) for name, (value, _) in terms.items()}
    counts = {name: torch.tensor(there) for name, (_, there) in terms.items()}
    return Accumulated(torch.tensor(1.0), sums, counts, torch.tensor(10.0))


def test_a_mean_is_over_the_steps_that_had_something_to_measure() -> None:
    window = Window(0.0)
    window.add(step(ce=(2.0, True), kd=(3.0, True), never=(0.0, False)), 4, FINE)
    window.add(step(ce=(4.0, True), kd=(0.0, False), never=(0.0, False)), 4, FINE)
    window.add(step(ce=(math.nan, True), kd=(math.nan, True)), 4, NOT_FINITE)
    facts, tokens = window.close(gradients.CPU, 1.0)
    assert facts["ce"] == pytest.approx(3.0)
    assert facts["kd"] == pytest.approx(3.0)  # not half of it
    assert "never" not in facts
    assert facts["train_loss"] == pytest.approx(1.0) and tokens == 30


def test_a_window_of_skipped_steps_has_a_loss_that_is_no_number() -> None:
    window = Window(0.0)
    window.add(step(ce=(math.nan, True)), 4, NOT_FINITE)
    facts, _ = window.close(gradients.CPU, 1.0)
    assert math.isnan(facts["train_loss"]) and "ce" not in facts


def test_a_term_without_weight_is_not_counted(tokenizer: str, texts: str) -> None:
    """The stored answers of a teacher, for a step in which none is there."""
    data = gradients.rows(tokenizer, texts, packing=True)
    objective = gradients.stored(tokenizer, data, torch.float32, sampler="top_k", top_k=4)
    student = gradients.model(tokenizer, torch.float32, seed=1)
    counts = []
    for there in (True, False):
        (batch,) = prepare(objective, [data.batch([0, 1])], gradients.CPU, 0)
        if not there:
            batch.extra["teacher_status"].zero_()
            batch.extra["p"].zero_()
            batch.weights["kd"].zero_()
        norm = normalisers([batch], gradients.CPU)
        counts.append(backward(student, objective, [batch], norm, gradients.CPU).counts)
    assert [bool(count["kd_loss"]) for count in counts] == [True, False]
    assert all(bool(count["ce_loss"]) for count in counts)
