"""What a recipe's `grpo.rewards` names is looked for before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RecipeErrors
from launcher.recipe import load

RECIPE = """
launch: 1
name: thing
stage: grpo
model: {name: org/model}
data: {train: [{builtin: digits}]}
grpo: {rewards: ["REWARD"]}
train: {steps: 1}
CODE
"""
SENT = "code: {path: mine, include: [rewards/**, words.py]}"
MINE = """
from math import floor as down

def right(completions, **columns):
    return [1.0 for _ in completions]

def make(number):
    return lambda completions: [number for _ in completions]

always = make(1)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine/rewards").mkdir(parents=True)
    (tmp_path / "mine/rewards/good.py").write_text(MINE)
    (tmp_path / "mine/rewards/bad.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "mine/rewards/all.py").write_text("from rewards.good import *\n")
    (tmp_path / "mine/words.py").write_text("x = 1\n")
    (tmp_path / "mine/left_out.py").write_text(MINE)
    return tmp_path


def read(folder: Path, reward: str, code: str = SENT) -> None:
    path = folder / "thing.yaml"
    path.write_text(RECIPE.replace("REWARD", reward).replace("CODE", code))
    load(path)


@pytest.mark.parametrize(
    ("reward", "code"),
    [
        ("rewards/good.py:right", SENT),
        ("./rewards/good.py:right", SENT),
        ("rewards.good:right", SENT),
        ("rewards.good:always", SENT),
        ("rewards.good:down", SENT),
        ("rewards.all:right", SENT),
        ("trainer.rewards:exact", SENT),
        ("installed.there:f", SENT),
        ("installed.there:f", ""),
    ],
)
def test_what_is_there_or_may_be_is_accepted(folder: Path, reward: str, code: str) -> None:
    read(folder, reward, code)


@pytest.mark.parametrize(
    ("reward", "code", "what"),
    [
        (
            "my.py:f",
            "",
            r"'my\.py' does not travel with the run; name its folder: code: \{path: \.\}",
        ),
        ("trainer.rewards:exct", "", r"rewards\.py has no `exct`; did you mean 'exact'\?"),
        ("trainer.rewards:none", SENT, r"rewards\.py has no `none`; allowed: exact, short"),
        ("rewards/god.py:right", SENT, r"sends from .*mine; did you mean 'rewards/good\.py'\?"),
        ("rewards.god:right", SENT, r"sends from .*mine; did you mean 'rewards/good\.py'\?"),
        ("left_out:right", SENT, r"'left_out\.py' is not among the files that `code` sends"),
        ("rewards.good:wright", SENT, r"good\.py has no `wright`; did you mean 'right'\?"),
        ("words:f", SENT, r"words\.py has no `f`; it defines no function"),
        ("rewards.bad:f", SENT, r"rewards/bad\.py:2: is no Python: "),
        ("/no/such.py:f", SENT, r"no such file: /no/such\.py"),
        ("trainer.rewards:exakt", "", r"rewards\.py has no `exakt`; did you mean 'exact'\?"),
        ("trainer.reward:exact", SENT, r"the trainer has no module `trainer\.reward`"),
    ],
)
def test_what_cannot_be_there_is_refused_at_its_place(
    folder: Path, reward: str, code: str, what: str
) -> None:
    with pytest.raises(RecipeErrors, match=rf"thing\.yaml:7:\d+: grpo\.rewards\[0\]: .*{what}"):
        read(folder, reward, code)


def test_code_that_is_wrong_itself_is_told_once(folder: Path) -> None:
    with pytest.raises(RecipeErrors) as raised:
        read(folder, "rewards/good.py:right", "code: {path: nowhere}")
    assert "no such folder" in str(raised.value) and "grpo" not in str(raised.value)
