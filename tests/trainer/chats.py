"""Templates in the styles that are in use, and a tokenizer of bytes and their marks."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import AutoTokenizer

MARKS = ("<BOS>", "<H>", "</H>", "<EOT>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

#: Llama 3: begin-of-text inside the template, headers, trimmed contents, tools before the talk.
LLAMA = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<H>system</H>tools: ' + tools[0]['function']['name'] + '<EOT>' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<H>' + m['role'] + '</H>\n\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% else %}{{ m['content'] | trim }}{% endif %}{{ '<EOT>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<H>assistant</H>\n\n' }}{% endif %}"
)
#: Reasoning is shown for the last turn and dropped from those before it.
REASONING = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: No generation prompt, no marks: a line each.
LINES = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
HIDING = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
#: The generation prompt opens a thought that the rendered answer does not have.
DISAGREEING = (
    "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n<think>' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


def marked(folder: str, template: str | None, eos: str = "<|im_end|>") -> Any:
    """The tokenizer of `folder` with `MARKS`, a template, and one id for padding and the end."""
    tokenizer = deepcopy(AutoTokenizer.from_pretrained(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<BOS>", eos, eos
    tokenizer.chat_template = template
    return tokenizer


def talk(*words: str, first: str = "user") -> dict[str, Any]:
    """A conversation of turns that alternate."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[i % 2], "content": w} for i, w in enumerate(words)]}
