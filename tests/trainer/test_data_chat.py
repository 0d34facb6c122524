"""What is learned of a conversation, token by token, in templates of several styles."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from tests.trainer.chats import (
    DISAGREEING,
    HIDING,
    LINES,
    LLAMA,
    REASONING,
    STRICT,
    marked,
    talk,
)
from trainer.batch import IGNORE
from trainer.config import ConfigError, Data, Source
from trainer.data import DataError
from trainer.data.chat import CHATML, view_of
from trainer.data.chunks import covered
from trainer.data.stream import Rows, build_rows


def rows_of(
    folder: Path, records: list[Any], tokenizer: Any, *, length: int = 400, **data: Any
) -> Rows:
    """One document a row, as stage `sft` reads `records`."""
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = Data(train=(Source(path=str(path)),), sequence_length=length, **data)
    view = view_of(config, "sft", tokenizer)
    return build_rows(config.train, tokenizer, sequence_length=length, packing=False, view=view)


def shown(rows: Rows, tokenizer: Any) -> list[str]:
    """Every document, what is learned of it in square brackets."""
    documents = []
    for index in range(len(rows)):
        batch = rows.batch([index])
        ids, targets = batch.input_ids[0].tolist(), batch.targets[0].tolist()
        # A target is the token that follows: put it back where it stands.
        tokens = [(ids[0], False)]
        for following, target in zip([*ids[1:], None], targets):
            if target != IGNORE:
                assert following in (target, None)
                tokens.append((target, True))
            elif following is not None:
                tokens.append((following, False))
        text = ""
        for learned, run in groupby(tokens, key=lambda pair: pair[1]):
            words = tokenizer.decode([token for token, _ in run])
            text += f"[{words}]" if learned else words
        documents.append(text)
    return documents


@pytest.mark.parametrize(
    ("template", "words", "expected"),
    [
        (
            CHATML,
            ("hi", "yo", "bye", "so long"),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[yo<|im_end|>]\n"
            "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n[so long<|im_end|>]",
        ),
        (
            LLAMA,
            (" hi ", " yo\n", "bye", "ok"),
            "<BOS><H>user</H>\n\nhi<EOT><H>assistant</H>\n\n[yo<EOT>]"
            "<H>user</H>\n\nbye<EOT><H>assistant</H>\n\n[ok<EOT><|im_end|>]",
        ),
        (
            LINES,
            ("hi", "yo", "bye", "ok"),
            "user: hi\n[assistant: yo\n]user: bye\n[assistant: ok\n<|im_end|>]",
        ),
    ],
    ids=["chatml", "llama-bos-trim", "lines-without-marks"],
)  # fmt: skip
def test_the_words_of_the_assistant_and_the_mark_that_ends_them_are_learned(
    template: str, words: tuple[str, ...], expected: str, tokenizer: str, tmp_path: Path
) -> None:
    tokens = marked(tokenizer, template)
    assert shown(rows_of(tmp_path, [talk(*words)], tokens), tokens) == [expected]


def test_a_template_that_rewrites_earlier_turns_gives_each_turn_as_it_will_be_said(
    tokenizer: str, tmp_path: Path
) -> None:
    tokens = marked(tokenizer, REASONING)
    rows = rows_of(tmp_path, [talk("a", "b", "c", "d")], tokens)
    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert shown(rows, tokens) == [
        ask.format("a") + "[<think></think>b<|im_end|>]",
        ask.format("a") + "b<|im_end|>\n" + ask.format("c") + "[<think></think>d<|im_end|>]",
    ]


def test_tools_their_calls_and_their_results_are_read_and_only_the_call_is_learned(
    tokenizer: str, tmp_path: Path
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    record = {
        "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "1"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "never answered"},
        ],
    }
    tokens = marked(tokenizer, LLAMA)
    assert shown(rows_of(tmp_path, [record], tokens), tokens) == [
        "<BOS><H>system</H>tools: add<EOT><H>system</H>\n\nbe brief<EOT><H>user</H>\n\n1<EOT>"
        '<H>assistant</H>\n\n[{"name": "add", "arguments": {"x": 1}}<EOT>]<H>tool</H>\n\n2<EOT>'
        "<H>assistant</H>\n\n[two<EOT><|im_end|>]"
    ]


@pytest.mark.parametrize("template", [LLAMA, CHATML], ids=["bos-in-template", "no-bos"])
def test_begin_of_text_is_the_templates_business_and_never_doubled(
    template: str, tokenizer: str, tmp_path: Path
) -> None:
    tokens = marked(tokenizer, template)
    tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<BOS> $A", special_tokens=[("<BOS>", tokens.bos_token_id)]
    )
    (chat, prompt) = shown(
        rows_of(tmp_path, [talk("a", "b")], tokens), tokens
    ) + shown(rows_of(tmp_path, [{"prompt": "a", "completion": "b"}], tokens), tokens)  # fmt: skip
    assert chat.count("<BOS>") == (template == LLAMA)
    assert prompt == "<BOS>a[b<|im_end|>]"


def test_prompts_and_completions_and_text_are_taken_as_they_are(
    tokenizer: str, tmp_path: Path
) -> None:
    tokens = marked(tokenizer, None)
    pairs = [{"prompt": "2+2 é=", "completion": " 4"}, {"prompt": "", "completion": "x"}]
    assert shown(rows_of(tmp_path, pairs, tokens), tokens) == [
        "2+2 é=[ 4<|im_end|>]",
        "x[<|im_end|>]",
    ]
    assert shown(rows_of(tmp_path, [{"text": "all"}], tokens), tokens) == ["a[ll<|im_end|>]"]


def test_a_prompt_in_messages_is_context_even_where_the_assistant_speaks_in_it(
    tokenizer: str, tmp_path: Path
) -> None:
    tokens = marked(tokenizer, LINES)
    record = {
        "prompt": talk("a", "b", "c")["messages"],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    assert shown(rows_of(tmp_path, [record], tokens), tokens) == [
        "user: a\nassistant: b\nuser: c\n[assistant: d\n<|im_end|>]"
    ]


def test_an_answer_beyond_the_row_is_cut_and_one_that_never_begins_is_left_out(
    tokenizer: str, tmp_path: Path
) -> None:
    tokens = marked(tokenizer, None)
    records = [
        {"prompt": "p" * 4, "completion": "c" * 20},
        {"prompt": "p" * 30, "completion": "c"},
        {"prompt": "p", "completion": "c"},
    ]
    rows = rows_of(tmp_path, records, tokens, length=8)
    # Nine tokens fit: the last one is only predicted.
    assert shown(rows, tokens) == ["pppp[ccccc]", "p[c<|im_end|>]"]
    (facts,) = rows.summary["sources"]
    assert (facts["documents"], facts["truncated"], facts["unsupervised"]) == (2, 2, 1)
    assert rows.summary["supervised_tokens"] == 7
    with pytest.raises(DataError, match=r"in all 1 documents, the first 8 tokens hold nothing"):
        rows_of(tmp_path, records[1:2], tokens, length=8)


@pytest.mark.parametrize(
    ("template", "record", "said"),
    [
        (HIDING, talk("a", "b"), r"messages\[1\]: the chat template leaves out what the assistant"),
        (HIDING + "{% if add_generation_prompt %}go{% endif %}", talk("a", "b"),
         "leaves out what the assistant says"),
        (DISAGREEING, talk("a", "b"), r"after '<think>' but then writes 'b<\|im"),
        (STRICT, {"messages": [{"role": "system", "content": "s"}, *talk("a", "b")["messages"]]},
         "the chat template refuses these messages: System role not supported"),
        (CHATML, {"messages": talk("a")["messages"]}, "no message is the assistant's"),
        (CHATML, talk("a", "b", first="assistant"), "begins with the assistant"),
        (CHATML, {"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'"),
        (CHATML, {"messages": []}, "must be a list of messages, got an empty list"),
        (CHATML, {"messages": "hi"}, "must be a list of messages, got a string"),
        (CHATML, {"messages": ["hi"]}, r"'messages\[0\]' must be an object, got a string"),
        (CHATML, talk("a", ""), r"'messages\[1\]' is an empty answer"),
        (CHATML, {"messages": [{"role": "user"}]}, r"'messages\[0\].content' must be a string"),
        (CHATML, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        (CHATML, {**talk("a", "b"), "tools": "["}, "'tools' is a string that is not JSON"),
        (CHATML, {"prompt": "a", "completion": " "}, "'completion' is empty"),
        (CHATML, {"prompt": "a", "completion": ["b"]}, "'completion' must be a string"),
        (CHATML, {"prompt": "a"}, "neither `messages`, nor `prompt` and `completion`, nor 'text'"),
        (CHATML, {**talk("a", "b"), "text": "t"}, "could be messages or text; say which"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_one_line_with_its_place(
    template: str, record: Any, said: str, tokenizer: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"chat\.jsonl:1: .*{said}") as error:
        rows_of(tmp_path, [record], marked(tokenizer, template))
    assert "\n" not in str(error.value)


def test_bad_lines_are_skipped_and_counted_only_when_asked(tokenizer: str, tmp_path: Path) -> None:
    tokens = marked(tokenizer, CHATML)
    records = [
        "no object",
        talk("a", "b"),
        {"messages": 3},
        talk("c"),
        talk("d", "e"),
        {"text": "t"},
    ]
    rows = rows_of(tmp_path, records, tokens, skip_bad=True)
    (facts,) = rows.summary["sources"]
    assert (facts["documents"], facts["skipped"]) == (2, 4)
    assert [line.split(": ")[0][-12:] for line in facts["skipped_lines"]] == [
        "chat.jsonl:1", "chat.jsonl:3", "chat.jsonl:4",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"chat\.jsonl:1: expected an object"):
        rows_of(tmp_path, records, tokens)
    with pytest.raises(
        DataError, match=r"nothing is left: 2 lines cannot be used; the first: .*:1"
    ):
        rows_of(tmp_path, [1, 2], tokens, skip_bad=True)


def test_a_tokenizer_without_a_template_needs_one_that_is_asked_for(
    tokenizer: str, tmp_path: Path
) -> None:
    tokens = marked(tokenizer, None)
    with pytest.raises(ConfigError, match=r"has no chat template; name one: data\.chat_template"):
        rows_of(tmp_path, [talk("a", "b")], tokens, skip_bad=True)
    file = tmp_path / "lines.jinja"
    file.write_text(LINES)
    rows = rows_of(tmp_path, [talk("a", "b")], tokens, chat_template=str(file))
    assert shown(rows, tokens) == ["user: a\n[assistant: b\n<|im_end|>]"]
    assert tokens.chat_template == LINES, "saved with the model"
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere: No such file"):
        rows_of(tmp_path, [talk("a", "b")], tokens, chat_template=str(tmp_path / "nowhere"))
    file.write_text("{% for %}")
    with pytest.raises(ConfigError, match="the chat template is no template"):
        rows_of(tmp_path, [talk("a", "b")], tokens, chat_template=str(file))


@given(words=st.lists(st.text("ab \n<é", min_size=1).filter(str.strip), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_what_is_learned_is_what_the_assistant_said(
    words: list[str], tokenizer: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = words[: len(words) // 2 * 2]
    tokens = marked(tokenizer, CHATML)
    rows = rows_of(tmp_path_factory.mktemp("chat"), [talk(*words)], tokens, length=2000)
    targets = rows.batch([0]).targets[0]
    learned = tokens.decode(targets[targets != IGNORE])
    assert learned == "".join(f"{word}<|im_end|>" for word in words[1::2])


@pytest.mark.parametrize(
    ("offsets", "spans", "expected"),
    [
        ([(0, 2), (2, 5), (5, 6)], [(2, 5)], [False, True, False]),
        ([(0, 3), (3, 5)], [(2, 3)], [True, False]),  # across a border
        ([(0, 1), (1, 2), (1, 2)], [(1, 2)], [False, True, True]),  # one character in two tokens
        ([(0, 1), (3, 3), (3, 4)], [(1, 3)], [False, True, False]),  # space, trimmed to nothing
        ([(0, 1), (3, 3), (3, 4)], [(3, 4)], [False, False, True]),
        ([(0, 1), (1, 2), (2, 3)], [(0, 1), (2, 3)], [True, False, True]),
        ([(0, 1)], [], [False]),
    ],
)
def test_a_token_is_learned_when_it_holds_a_character_of_a_span(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]], expected: list[bool]
) -> None:
    assert covered(offsets, spans) == expected
