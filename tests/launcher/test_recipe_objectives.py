"""What the trainer would refuse on the machine is said of the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.test_recipe import at, load, problems

assert at  # a fixture: tests name it

RECIPE = """\
launch: 1
name: one
stage: %s
model: {name: org/model%s}
data: {train: [{builtin: %s}], sequence_length: 64}
train: {steps: 5%s}
hardware: {accelerator: "%s"}
"""
VLLM = (
    "grpo: {rewards: ['trainer.rewards:short'], max_new_tokens: 8, rollouts: vllm,"
    " vllm_server: 'http://server:8000'}\n"
)
NF4 = ", adapter: {quantization: nf4}"
PREFERENCES, QUESTIONS = "python-preferences", "python-questions"


@pytest.mark.parametrize(
    ("parts", "block", "what"),
    [
        (("grpo", "", "digits", "", "cpu:2"), VLLM,
         "r.yaml:8:73: grpo.rollouts: vllm serves one worker, here there are 2"),
        (("grpo", NF4, "digits", "", "cpu:1"), VLLM,
         "r.yaml:8:73: grpo.rollouts: vllm cannot be sent a base of 4 bits"),
        (("sft", NF4, QUESTIONS, ", parallel: fsdp", "cpu:2"), "",
         "r.yaml:6:29: train.parallel: fsdp cannot share quantised weights"),
        (("dpo", "", QUESTIONS, "", "cpu:1"), "",
         "r.yaml:5:26: data.train[0].builtin: 'python-questions' holds nothing for stage 'dpo'"),
        (("grpo", "", PREFERENCES, "", "cpu:1"), VLLM,
         "builtin: 'python-preferences' holds nothing for stage 'grpo'; take python-questions or"),
    ],
)  # fmt: skip
def test_what_the_trainer_would_refuse_is_said_where_it_is_written(
    at: Path, parts: tuple[str, ...], block: str, what: str
) -> None:
    (problem,) = problems(RECIPE % parts + block)
    assert what in problem


@pytest.mark.parametrize(
    ("parts", "block"),
    [
        (("grpo", "", "digits", "", "cpu:1"), VLLM),
        (("sft", NF4, QUESTIONS, "", "cpu:2"), ""),
        (("ipo", "", PREFERENCES, ", parallel: fsdp", "cpu:2"), ""),
    ],
)
def test_what_it_takes_is_no_problem(at: Path, parts: tuple[str, ...], block: str) -> None:
    (stage,) = load(RECIPE % parts + block).stages
    assert stage.stage == parts[0]
