"""Templates with the traits of those that models ship with: what is learned of them, exactly.

Each is written here, small, with what makes assistant masks go wrong in the original: begin-of-text
inside the template, a date in the header, thoughts that are dropped from earlier turns, no system
role, a role of another name, channels, and marks that differ between the last turn and others.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from tests.trainer.chats import talk
from tests.trainer.test_data_chat import rows_of, shown
from trainer.data import DataError

LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

#: A thought is shown in turns after the last question, and taken out of those before it.
QWEN_3 = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

GEMMA_3 = """\
{{ bos_token }}
{%- set first = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\n\n' %}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/...") }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}
    {{- message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}
"""

#: Channels; the analysis of the last turn only; `<|return|>` where the talk ends, else `<|end|>`.
GPT_OSS = """\
{{- '<|start|>system<|message|>You are a model.\nCurrent date: ' + '2025-08-05' + '<|end|>' }}
{%- if messages[0].role in ('developer', 'system') %}
    {{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '<|end|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- if loop.last and not add_generation_prompt %}
            {%- if message.thinking %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' }}
                {{- message.thinking + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
        {%- endif %}
    {%- else %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""

MARKS = {
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "gpt-oss": ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
}


def shipped(folder: str, kind: str, template: str, *, bos: str | None, eos: str) -> Any:
    """A tokenizer as such a model brings it: one that puts BOS before any text by itself where it
    has one, and with the end of a turn for padding."""
    tokenizer = deepcopy(AutoTokenizer.from_pretrained(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS[kind])})
    tokenizer.eos_token = tokenizer.pad_token = eos
    tokenizer.chat_template = template
    if bos is not None:
        tokenizer.bos_token = bos
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


def with_system(words: str, *turns: str) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": words}, *talk(*turns)["messages"]]}


def test_llama_3_one_begin_of_text_and_every_answer_with_its_mark(
    tokenizer: str, tmp_path: Path
) -> None:
    tokens = shipped(tokenizer, "llama", LLAMA_3, bos="<|begin_of_text|>", eos="<|eot_id|>")
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    record = with_system("be kind", " hi ", " yo ", "bye", "so long")
    assert shown(rows_of(tmp_path, [record], tokens, length=900), tokens) == [
        "<|begin_of_text|>" + head.format("system")
        + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nbe kind<|eot_id|>"
        + head.format("user") + "hi<|eot_id|>" + head.format("assistant") + "[yo<|eot_id|>]"
        + head.format("user") + "bye<|eot_id|>" + head.format("assistant") + "[so long<|eot_id|>]"
    ]  # fmt: skip


def test_qwen_3_learns_the_thought_where_it_is_said_and_not_where_it_is_dropped(
    tokenizer: str, tmp_path: Path
) -> None:
    tokens = shipped(tokenizer, "qwen", QWEN_3, bos=None, eos="<|im_end|>")
    record = talk("1+1", "<think>\ncount\n</think>\n\ntwo", "and 2+2", "four")
    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert shown(rows_of(tmp_path, [record], tokens), tokens) == [
        ask.format("1+1") + "[<think>\ncount\n</think>\n\ntwo<|im_end|>]",
        ask.format("1+1") + "two<|im_end|>\n" + ask.format("and 2+2")
        + "[<think>\n\n</think>\n\nfour<|im_end|>]",
    ]  # fmt: skip
    apart = talk("1+1", "two")
    apart["messages"][1]["reasoning_content"] = "count"
    assert shown(rows_of(tmp_path, [apart], tokens), tokens) == [
        ask.format("1+1") + "[<think>\ncount\n</think>\n\ntwo<|im_end|>]"
    ]


def test_gemma_3_has_no_system_role_and_calls_the_assistant_model(
    tokenizer: str, tmp_path: Path
) -> None:
    tokens = shipped(tokenizer, "gemma", GEMMA_3, bos="<bos>", eos="<end_of_turn>")
    record = with_system("be kind", "hi", "yo", "bye", "so long")
    turn = "<start_of_turn>{}\n"
    assert shown(rows_of(tmp_path, [record], tokens), tokens) == [
        "<bos>" + turn.format("user") + "be kind\n\nhi<end_of_turn>\n"
        + turn.format("model") + "[yo<end_of_turn>]\n"
        + turn.format("user") + "bye<end_of_turn>\n"
        + turn.format("model") + "[so long<end_of_turn>]"
    ]  # fmt: skip
    twice = {"messages": [*talk("a")["messages"], *talk("b", "c")["messages"]]}
    with pytest.raises(DataError, match=r"chat\.jsonl:1: .*refuses.*roles must alternate"):
        rows_of(tmp_path, [twice], tokens)


def test_gpt_oss_learns_channels_and_the_mark_that_ends_the_last_turn(
    tokenizer: str, tmp_path: Path
) -> None:
    tokens = shipped(tokenizer, "gpt-oss", GPT_OSS, bos=None, eos="<|return|>")
    record = with_system("be kind", "1+1", "two", "2+2", "four")
    record["messages"][2]["thinking"] = "count"
    record["messages"][4]["thinking"] = "more"
    head = (
        "<|start|>system<|message|>You are a model.\nCurrent date: 2025-08-05<|end|>"
        "<|start|>developer<|message|># Instructions\n\nbe kind<|end|>"
        "<|start|>user<|message|>1+1<|end|><|start|>assistant"
    )
    said = (
        "[<|channel|>analysis<|message|>{}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>{}<|return|>]"
    )
    assert shown(rows_of(tmp_path, [record], tokens, length=900), tokens) == [
        head + said.format("count", "two"),
        head + "<|channel|>final<|message|>two<|end|>"
        "<|start|>user<|message|>2+2<|end|><|start|>assistant" + said.format("more", "four"),
    ]


@pytest.mark.parametrize(
    ("kind", "template", "bos", "eos"),
    [
        ("llama", LLAMA_3, "<|begin_of_text|>", "<|eot_id|>"),
        ("qwen", QWEN_3, None, "<|im_end|>"),
        ("gemma", GEMMA_3, "<bos>", "<end_of_turn>"),
        ("gpt-oss", GPT_OSS, None, "<|return|>"),
    ],
)
def test_the_stock_mask_is_empty_and_ours_is_not(
    kind: str, template: str, bos: str | None, eos: str, tokenizer: str, tmp_path: Path
) -> None:
    tokens = shipped(tokenizer, kind, template, bos=bos, eos=eos)
    stock = tokens.apply_chat_template(
        talk("hi", "yo")["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(stock["assistant_masks"]) == 0  # the templates have no `generation` blocks
    rows = rows_of(tmp_path, [talk("hi", "yo")], tokens, length=900)
    (text,) = shown(rows, tokens)
    assert rows.summary["supervised_tokens"] > len("yo")
    # The end is learned although padding has its id, and stands there once.
    assert text.endswith(f"yo{eos}]") and tokens.pad_token_id == tokens.eos_token_id
    assert bos is None or text.count(bos) == 1
