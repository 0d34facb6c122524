"""Stage `sft`: gradients however rows are cut, and the stage from its file to its checkpoint."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import gradients
from tests.trainer.chats import talk
from tests.trainer.test_dry_run import trainer
from trainer import models
from trainer.config import Data, Evaluate, Hub, Job, Source, StageConfig, Tokenizer
from trainer.data.chat import CHATML, view_of
from trainer.data.stream import Rows, Stream, build_rows
from trainer.models import load_tokenizer
from trainer.objectives.next_token import NextToken
from trainer.shrink import shrink
from trainer.step import backward, normalisers, prepare

LIMIT = {torch.float64: 1e-12, torch.float32: 5e-6}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 conversations of unequal length, all shorter than a row of 256 bytes, and two pairs."""
    from pydoc_data.topics import topics

    words = " ".join(topics["typesmapping"].split())
    records: list[Any] = []
    for number in range(24):
        cuts = [number * 40 + i * (3 + number % 5) for i in range(3 + 2 * (number % 2))]
        records.append(talk(*(words[a:b] for a, b in pairwise(cuts))))
    records += [{"messages": talk("q", "a")["messages"]}, talk("ping", "pong")]
    path = tmp_path_factory.mktemp("chats") / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def rows(tokenizer: str, chats: str, packing: bool) -> Rows:
    tokens = load_tokenizer(tokenizer)
    data = Data(train=(Source(path=chats),), sequence_length=256, chat_template="chatml")
    view = view_of(data, "sft", tokens)
    return build_rows(data.train, tokens, sequence_length=256, packing=packing, view=view)


def gradient(
    tokenizer: str, data: Rows, dtype: torch.dtype, micro_batch: int, accumulate: int = 1
) -> torch.Tensor:
    """The flat gradient of one step of `micro_batch * accumulate` rows."""
    stream = Stream(
        data, micro_batch=micro_batch, accumulate=accumulate, rank=0, world_size=1, seed=0
    )
    student, objective = gradients.model(tokenizer, dtype, seed=1), NextToken()
    batches = prepare(objective, stream.next_group(), gradients.CPU, 0)
    backward(student, objective, batches, normalisers(batches, gradients.CPU), gradients.CPU)
    return torch.cat([p.grad.flatten().double() for p in student.parameters()])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", list(LIMIT), ids=str)
def test_packed_and_padded_conversations_give_the_same_gradient(
    dtype: torch.dtype, tokenizer: str, chats: str
) -> None:
    packed, padded = rows(tokenizer, chats, True), rows(tokenizer, chats, False)
    assert len(packed) < len(padded) == 26
    assert packed.summary["supervised_tokens"] == padded.summary["supervised_tokens"]
    assert 0 < packed.summary["supervised_tokens"] < 0.5 * packed.summary["tokens"]
    a = gradient(tokenizer, packed, dtype, len(packed))
    b = gradient(tokenizer, padded, dtype, len(padded))
    assert distance(a, b) < LIMIT[dtype]
    everything = build_rows(
        (Source(path=chats, field="nothing", format="messages"),),
        load_tokenizer(tokenizer), sequence_length=256, packing=False,
    )  # fmt: skip
    assert distance(gradient(tokenizer, everything, dtype, len(everything)), b) > 0.05


@pytest.mark.parametrize("dtype", list(LIMIT), ids=str)
def test_micro_batches_of_unequal_answers_give_the_gradient_of_the_whole(
    dtype: torch.dtype, tokenizer: str, chats: str
) -> None:
    data = rows(tokenizer, chats, False)
    whole = gradient(tokenizer, data, dtype, 8)
    parts = gradient(tokenizer, data, dtype, 1, accumulate=8)
    assert distance(parts, whole) < LIMIT[dtype]


@pytest.fixture
def sft(stage: StageConfig, chats: str) -> StageConfig:
    source = (Source(path=chats),)
    data = replace(
        stage.data, train=source, validation=source, sequence_length=256, chat_template="chatml"
    )
    return replace(stage, stage="sft", data=data)


def test_the_stage_learns_answers_and_saves_the_template_with_the_model(
    sft: StageConfig, run_stage: Callable[..., Any]
) -> None:
    outcome = run_stage(sft)
    # Untrained, a byte-level model is at the logarithm of its vocabulary.
    assert outcome.evaluation["val_loss"] < math.log(258) - 0.5
    checkpoint = Path(sft.output) / "checkpoints" / "step-20"
    assert load_tokenizer(str(checkpoint)).chat_template == CHATML
    assert any("train data" in line and "supervised" in line for line in outcome.lines)


def test_evaluation_reads_the_same_conversations_with_the_template_of_each_model(
    sft: StageConfig, run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    trained = run_stage(sft)
    compare = StageConfig(
        id="compare",
        stage="evaluate",
        output=str(tmp_path / "compare"),
        data=replace(sft.data, chat_template=None),
        evaluate=Evaluate(models={"sft": sft.output}),
    )
    found = run_stage(compare).evaluation["sft.val_loss"]
    assert found == pytest.approx(trained.evaluation["val_loss"], rel=1e-5)


def test_of_the_models_that_an_evaluation_compares_one_at_a_time_is_in_memory(
    stage: StageConfig, tokenizer: str, run_stage: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gradients.model(tokenizer, torch.float32, seed=1).save_pretrained(tmp_path / "model")
    load_tokenizer(tokenizer).save_pretrained(tmp_path / "model")
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load = models.load_frozen

    def watched(*arguments: Any) -> Any:
        alive.append(sum(model() is not None for model in loaded))
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "load_frozen", watched)
    names = dict.fromkeys("abc", str(tmp_path / "model"))
    run_stage(replace(stage, stage="evaluate", evaluate=Evaluate(models=names)))
    assert alive == [0, 0, 0]


def test_bad_lines_are_counted_at_the_start_of_the_stage(
    sft: StageConfig, chats: str, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    path = tmp_path / "some-bad.jsonl"
    path.write_text("{\n" + Path(chats).read_text() + '{"messages": []}\n')
    source = (Source(path=str(path)),)
    data = replace(sft.data, train=source, validation=(), skip_bad=True)
    assert sft.train is not None
    outcome = run_stage(replace(sft, data=data, train=replace(sft.train, steps=1, warmup=0)))
    at = next(i for i, line in enumerate(outcome.lines) if "2 bad lines skipped" in line)
    assert "some-bad.jsonl:1: not JSON" in outcome.lines[at + 1]
    assert "some-bad.jsonl:28: 'messages' must be a list" in outcome.lines[at + 2]


@pytest.mark.parametrize(
    ("lines", "template", "code", "said"),
    [
        ('{"messages": [', "chatml", 65, "bad.jsonl:1: not JSON at column 15"),
        ('{"prompt": "p", "completion": ""}', "chatml", 65, "bad.jsonl:1: 'completion' is empty"),
        (json.dumps(talk("a", "b")), None, 64, "has no chat template"),
        (json.dumps(talk("a", "b")), "hides.jinja", 65, "leaves out what the assistant says"),
        (json.dumps(talk("q" * 900, "b")), "chatml", 65, "no token to learn"),
    ],
)
def test_bad_input_of_the_stage_is_one_line_and_its_exit_code(
    lines: str, template: str | None, code: int, said: str, sft: StageConfig, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text(lines + "\n")
    (tmp_path / "hides.jinja").write_text("{{ messages[0]['content'] }}")
    if template == "hides.jinja":
        template = str(tmp_path / template)
    source = (Source(path=str(tmp_path / "bad.jsonl")),)
    data = replace(sft.data, train=source, validation=(), chat_template=template)
    done = trainer(Job(run="r", stages=(replace(sft, data=data),)), tmp_path)
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert "Traceback" not in done.stderr


def test_a_dry_run_replaces_what_is_not_here_by_questions_with_answers(
    sft: StageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    manifest = tmp_path / "manifest.jsonl"
    here = tmp_path / "here.jsonl"
    here.write_text(json.dumps(talk("a", "b")) + "\n")
    manifest.write_text(f'{{"path": "gs://b/x.jsonl"}}\n{{"path": "{here}", "type": "messages"}}\n')
    train = (Source(hf=Hub("org/chats")), Source(manifest=str(manifest)))
    data = replace(sft.data, train=train, validation=(), chat_template=None)
    assert sft.model is not None
    model = replace(sft.model, name="org/model", init="pretrained", architecture=None,
                    tokenizer=None)  # fmt: skip
    config, notes = shrink(replace(sft, data=data, model=model), set())
    questions = Source(builtin="python-questions", split="train")
    assert config.data.train[:2] == (questions, questions)
    assert config.data.train[2].path == str(here)
    assert config.data.chat_template == "chatml"
    assert any("hf:org/chats:train: not on this machine" in note for note in notes)


@pytest.mark.parametrize(
    ("bad", "said"), [(1, "1 bad line skipped: "), (2, "2 bad lines skipped: ")]
)
def test_a_tokenizer_counts_bad_lines_in_words_that_fit(
    bad: int, said: str, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    path = tmp_path / "some-bad.jsonl"
    path.write_text('{"text": "some words to learn from"}\n' * 3 + "{\n" * bad)
    words = StageConfig(
        id="words", stage="tokenizer", output=str(tmp_path / "words"),
        data=Data(train=(Source(path=str(path)),), skip_bad=True),
        tokenizer=Tokenizer(vocab_size=260),
    )  # fmt: skip
    assert any(f"tokenizer: {said}" in line for line in run_stage(words).lines)
