"""The contract with the user's rewards, and the prompts that they are given for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.chats import marked
from trainer import rewards
from trainer.config import ConfigError, Data, FieldErrors, Grpo, Source
from trainer.data import DataError
from trainer.data.prompts import Prompts, read_prompts
from trainer.models import load_tokenizer
from trainer.reward_functions import Reward, load

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


def written(path: Path, *records: dict[str, Any]) -> tuple[Source, ...]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (Source(path=str(path)),)


def read(sources: Any, tokenizer: Any, length: int = 64, **data: Any) -> Prompts:
    return read_prompts(sources, tokenizer, Data(sequence_length=length, **data), answer=8)


def test_functions_are_found_in_modules_of_the_working_folder_and_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def right(completions, **_):\n    return [1] * len(completions)\n"
    (tmp_path / "my_own_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    found = load(["my_own_rewards:right", "./my_own_rewards.py:right", "trainer.rewards:exact"])
    assert [r(completions=["a", "b"], answer=["a", "c"]) for r in found] == [[1, 1], [1, 1], [1, 0]]
    labels = [reward.label for reward in found]
    assert labels == ["my_own_rewards.right", "..my_own_rewards.py.right", "exact"]


def test_a_file_is_a_module_that_runs_once_for_all_its_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dataclasses look for the module of their annotations; `json` stays what it is."""
    (tmp_path / "json.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Case:\n    seen: list[str]\n\nCASE = Case([])\n"
        "def keep(completions):\n    CASE.seen.extend(completions)\n    return [0, 0]\n"
        "def kept(completions):\n    return [len(CASE.seen)] * 2\n"
    )
    monkeypatch.chdir(tmp_path)
    first, second = load(["json.py:keep", "json.py:kept"])
    assert first(completions=["a", "b"]) == [0, 0]
    assert second(completions=["a", "b"]) == [2, 2]
    assert load(["json.py:kept"])[0](completions=["a", "b"]) == [2, 2]
    assert sys.modules["json"] is json


def test_a_file_is_found_on_the_path_where_code_of_the_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code" / "rewards").mkdir(parents=True)
    (tmp_path / "code/rewards/mine.py").write_text("def one(completions):\n    return [1]\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (found,) = load(["rewards/mine.py:one"])
    assert found(completions=["a"]) == [1]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1 / 0\n", r"ZeroDivisionError: division by zero \(.*broken_rewards\.py:1\)$"),
        ("import sys\nsys.exit(0)\n", r"SystemExit: 0 \(.*broken_rewards\.py:2\)$"),
        ("def f(:\n", r"SyntaxError: .*broken_rewards\.py, line 1\)$"),
        ("import no_such_module\n", "No module named 'no_such_module'; send files of your own"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line_with_its_place(
    text: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rewards.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=what) as error:
        load(["broken_rewards.py:f"])
    assert "\n" not in str(error.value)


def test_rewards_are_looked_for_before_the_stages_ahead_of_theirs(tmp_path: Path) -> None:
    stages = [
        {"id": "words", "stage": "tokenizer", "tokenizer": {"vocab_size": 260},
         "data": {"train": [{"builtin": "digits"}]}, "output": str(tmp_path / "words")},
        {"id": "learn", "stage": "grpo", "model": {"name": str(tmp_path / "words")},
         "data": {"train": [{"builtin": "digits"}]}, "train": {"steps": 1},
         "grpo": {"rewards": ["no_such_rewards:f"]}, "output": str(tmp_path / "learn")},
    ]  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps({"schema": 1, "run": "x", "stages": stages}))
    command = [sys.executable, "-m", "trainer", "run", str(tmp_path / "job.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 64, ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert "cannot import no_such_rewards:f" in line
    assert not (tmp_path / "words").exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("no_such_module:f", "cannot import no_such_module:f: ModuleNotFoundError"),
        ("trainer.rewards:exactly", "trainer.rewards has no `exactly`"),
        ("trainer.rewards:__doc__", "is no plain function"),
        ("no/such/file.py:f", "cannot import no/such/file.py:f: ModuleNotFoundError: no such"),
    ],
)
def test_a_function_that_is_not_there_is_one_line(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=r"^grpo\.rewards: ") as error:
        load([name])
    assert what in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gives", "what"),
    [
        ([1.0], "gave 1 rewards for 2 answers"),
        ([1.0, float("nan")], "gave nan; a reward is a finite number"),
        ([1.0, float("inf")], "gave inf; a reward is a finite number"),
        ([1.0, "0"], "gave '0'; a reward is a finite number"),
        ([1.0, 10**400], "gave 1000"),
        (1.0, "gave float; it must give a list"),
        (torch.tensor(1.0), "gave Tensor; it must give a list"),
        ({1.0, 0.0}, "gave set; it must give a list"),  # whose order is not that of the answers
    ],
)
def test_what_is_no_list_of_numbers_names_the_function(gives: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=r"^grpo\.rewards: mine:f gave") as error:
        Reward("mine:f", lambda completions: gives)(completions=["a", "b"])
    assert what in str(error.value)


def test_numbers_of_any_kind_and_none_are_rewards() -> None:
    assert Reward("m:f", lambda completions: (True, None, 2))(completions="abc") == [1.0, None, 2.0]


def test_a_function_that_fails_is_named_with_the_line_where_it_did() -> None:
    def broken(completions: list[str]) -> list[float]:
        return [1 / len(completion) for completion in completions]

    with pytest.raises(ConfigError, match=r"mine:f failed: ZeroDivisionError.*test_rewards.py:\d+"):
        Reward("mine:f", broken)(completions=[""])


def test_a_function_that_ends_the_process_or_says_much_is_one_line() -> None:
    def leaves(completions: list[str]) -> list[float]:
        sys.exit(0)

    def talks(completions: list[str]) -> list[float]:
        raise ValueError("first\n  second\n")

    with pytest.raises(ConfigError, match=r"mine:leaves failed: SystemExit: 0 \(.*\.py:\d+\)$"):
        Reward("mine:leaves", leaves)(completions=["a"])
    with pytest.raises(ConfigError, match=r"mine:talks failed: ValueError: first second \("):
        Reward("mine:talks", talks)(completions=["a"])
    with pytest.raises(ConfigError, match="builtins:max does not say what it takes"):
        load(["builtins:max"])


def test_what_a_function_changes_is_its_own() -> None:
    """Neither the answers that are learned from, nor the data, nor what the next function sees."""

    def spoils(prompts: Any, completions: Any, completion_ids: Any, tests: Any) -> list[float]:
        prompts[0].append("more")
        tests[1].clear()
        for ids in completion_ids:
            ids.pop()
        return [1.0 for _ in range(len(completions)) if completions.pop()]

    lists: dict[str, Any] = {
        "prompts": [["p"], ["q"]], "completions": ["a", "b"], "completion_ids": [[1, 2], [3, 4]],
        "tests": [["t"], ["u"]],
    }  # fmt: skip
    assert Reward("mine:spoils", spoils)(**lists) == [1.0, 1.0]
    assert lists["prompts"] == [["p"], ["q"]] and lists["tests"] == [["t"], ["u"]]
    assert lists["completions"] == ["a", "b"] and lists["completion_ids"] == [[1, 2], [3, 4]]


def test_a_function_gets_what_it_asks_for_and_columns_that_are_missing_are_said_before() -> None:
    def picky(completions: list[str], tests: list[str]) -> list[float]:
        return [float(t in c) for c, t in zip(completions, tests)]

    reward = Reward("mine:picky", picky)
    assert reward(prompts=["p"], completions=["abc"], tests=["b"], other=[1]) == [1.0]
    with pytest.raises(
        ConfigError, match="asks for `tests`, which no record holds; columns of the"
    ):
        reward.check(["answer"])
    Reward("mine:all", lambda completions, **columns: []).check([])


@pytest.mark.parametrize("names", [(), ("exact",), ("a:b:c",), ("a b:c",), (":f",)])
def test_names_that_can_be_no_function_are_refused_in_the_recipe(names: tuple[str, ...]) -> None:
    with pytest.raises(FieldErrors, match="module:function"):
        Grpo(rewards=names)


def test_rewards_that_come_with_the_trainer_read_strings_and_messages() -> None:
    said = [{"role": "assistant", "content": " 7 "}]
    assert rewards.exact(["7", said], answer=[7, "7"]) == [1.0, 1.0]
    assert rewards.short(["", said]) == [1.0, 0.25]


def test_prompts_are_strings_or_messages_and_keep_their_columns(
    tokenizer: str, tmp_path: Path
) -> None:
    tokens = marked(tokenizer, CHATML)
    asked = [{"role": "user", "content": "2+2"}]
    rows = read(
        written(tmp_path / "a.jsonl",
                {"prompt": "1+1=", "answer": "2", "completion": "no column", "prompts": ["nor"]},
                {"prompt": asked, "tests": ["t"]}),
        tokens,
    )  # fmt: skip
    assert rows.columns == ["answer", "tests"]
    first, second = rows.prompts
    assert tokens.decode(first.ids) == "1+1=" and first.given == "1+1="
    assert tokens.decode(second.ids) == "<|im_start|>user:2+2<|im_end|><|im_start|>assistant:"
    assert second.given == asked and second.columns == {"tests": ["t"]}
    batch = rows.batch([1, 0])
    assert batch.records == [second, first] and (batch.targets < 0).all()


def test_an_exchange_is_asked_up_to_its_last_answer(tokenizer: str, tmp_path: Path) -> None:
    def turn(role: str, words: str) -> dict[str, str]:
        return {"role": role, "content": words}

    asked, answered = turn("user", "2+2"), turn("assistant", "4")
    rows = read(
        written(
            tmp_path / "a.jsonl",
            {"messages": [asked, answered]},
            {"messages": [asked, answered], "answer": "four"},  # the record's own
            {"messages": [turn("system", "s"), asked], "answer": "4"},  # a question alone
            {"messages": [asked, answered], "answer": None, "prompt": None},  # a row of a table
        ),
        marked(tokenizer, CHATML),
    )
    assert [prompt.given for prompt in rows.prompts] == [
        [asked], [asked], [turn("system", "s"), asked], [asked]
    ]  # fmt: skip
    assert [prompt.columns["answer"] for prompt in rows.prompts] == ["4", "four", "4", "4"]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"text": "x"}, "a.jsonl:2: no key 'prompt'; keys here: 'text'"),
        ({"prompt": ""}, "a.jsonl:2: 'prompt' is empty"),
        ({"prompt": 3}, "a.jsonl:2: 'prompt' must be a string, got a number"),
        ({"prompt": "x" * 57}, "a.jsonl:2: 'prompt' has 57 tokens; data.sequence_length leaves 56"),
        ({"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
         "a.jsonl:2: 'prompt' ends with the assistant"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_asked_is_named_or_left_out(
    record: dict[str, Any], what: str, tokenizer: str, tmp_path: Path
) -> None:
    tokens = marked(tokenizer, CHATML)
    sources = written(tmp_path / "a.jsonl", {"prompt": "x" * 56}, record)
    with pytest.raises(DataError) as error:
        read(sources, tokens)
    assert what in str(error.value)
    rows = read(sources, tokens, skip_bad=True)
    assert len(rows) == 1 and what in rows.summary["sources"][0]["skipped_lines"][0]


def test_other_answers_are_other_data(tokenizer: str, tmp_path: Path) -> None:
    tokens = load_tokenizer(tokenizer)
    of = [
        read(written(tmp_path / f"{i}.jsonl", {"prompt": "p", "answer": answer}), tokens).digest
        for i, answer in enumerate("aab")
    ]
    assert of[0] == of[1] != of[2]


def test_exchanges_become_prompts_and_a_limit_is_shared_among_sources(tokenizer: str) -> None:
    tokens = marked(tokenizer, CHATML)
    sources = (Source(builtin="digits"), Source(builtin="python-questions", split="heldout"))
    rows = read_prompts(sources, tokens, Data(sequence_length=512), answer=8, limit=4)
    assert [fact["documents"] for fact in rows.summary["sources"]] == [2, 2]
    assert rows.prompts[0].given == "count 0" and rows.prompts[0].columns == {"answer": "01"}
    question = rows.prompts[2]
    assert question.given[-1]["role"] == "user" and len(question.columns["answer"]) > 19
    with pytest.raises(DataError, match="is plain text; this stage reads records"):
        read((Source(builtin="python-reference", split="heldout"),), tokens)
