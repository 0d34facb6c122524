"""Conversations as text: what the chat template writes, and which characters the model says itself.

Templates do not say whose words they write, so that is found by rendering prefixes. What stands in
`render(messages[:i + 1])` after `render(messages[:i], with the generation prompt)` is what the
model will be asked to write as message i: its words and the mark that ends its turn.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Optional

from trainer.config import ConfigError, Data
from trainer.data import DataError
from trainer.data.shapes import Piece, Span, View, checked_text, kind

#: Turns between `<|im_start|>ROLE` and `<|im_end|>`; for tokenizers that bring no template.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
#: Stages whose sources are plain text unless they say otherwise; the others look at the keys.
_PLAIN_STAGES = ("pretrain",)
#: Stages that read pairs of answers.
_PAIRED_STAGES = ("dpo", "ipo")

Message = dict[str, Any]


def view_of(data: Data, stage: str, tokenizer: Any) -> View:
    """How `stage` sees its records. `tokenizer` None: conversations as plain text, without marks.
    With `data.chat_template`, that becomes the tokenizer's own, and is saved with it.
    Errors: `ConfigError` for a template that cannot be read."""
    if tokenizer is not None and data.chat_template is not None:
        tokenizer.chat_template = read_template(data.chat_template)
    return View(
        default="text" if stage in _PLAIN_STAGES else "auto",
        renderer=Template(tokenizer) if tokenizer is not None else None,
        tool_ratio=data.tool_use.ratio if data.tool_use is not None else 0.0,
        skip_bad=data.skip_bad,
        pairs=stage in _PAIRED_STAGES,
    )


def read_template(given: str) -> str:
    """The template called `chatml`, or the text of a file. Errors: `ConfigError`."""
    if given == "chatml":
        return CHATML
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"data.chat_template: cannot read {given}: {why}") from error


@dataclass(frozen=True)
class Template:
    """The chat template of `tokenizer`. One that is missing is an error where the first
    conversation is read (`ConfigError`): what is plain text needs none."""

    tokenizer: Any

    def conversation(self, record: dict[str, Any], at: str) -> list[Piece]:
        """A `messages` record: everything that the assistant says is learned, and nothing else.

        One piece; several where the template writes an earlier turn differently once others
        follow (as those do that drop past reasoning): then each turn is learned as it will be
        said. Errors: `DataError` for a bad record or a template that hides the assistant."""
        messages = checked_messages(record["messages"], "messages", at)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{at}: no message is the assistant's: there is nothing to learn")
        return self._pieces(messages, turns, _tools(record, at), at)

    def answer(self, record: dict[str, Any], at: str) -> list[Piece]:
        """A `prompt` record: only the completion is learned. Strings are taken as they are, lists
        of messages go through the template. Errors: `DataError`."""
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            before = checked_messages(prompt, "prompt", at)
            after = checked_messages(completion, "completion", at)
            turns = [len(before) + i for i, m in enumerate(after) if m["role"] == "assistant"]
            if not turns:
                raise DataError(f"{at}: no message of `completion` is the assistant's")
            return self._pieces(before + after, turns, _tools(record, at), at)
        first, second = checked_text(prompt, "prompt", at), checked_text(
            completion, "completion", at
        )  # fmt: skip
        if not second.strip():
            raise DataError(f"{at}: 'completion' is empty: there is nothing to learn")
        text = first + second
        return [Piece(text, ((len(first), len(text)),), cut=False)]

    def asked(self, record: dict[str, Any], at: str) -> str:
        """The messages of `prompt` up to where the model is to answer. Errors: `DataError`."""
        messages = checked_messages(record["prompt"], "prompt", at)
        if messages[-1]["role"] == "assistant":
            raise DataError(f"{at}: 'prompt' ends with the assistant: there is nothing to answer")
        return self._render(_tools(record, at), at, messages, True)

    def _pieces(
        self, messages: list[Message], turns: Sequence[int], tools: Optional[list[Any]], at: str
    ) -> list[Piece]:
        if turns[0] == 0:
            raise DataError(f"{at}: begins with the assistant; a message to answer must come first")
        render = partial(self._render, tools, at)
        pieces: list[Piece] = []
        for turn in turns:
            text, span = _said(render, messages, turn, at)
            if pieces and text.startswith(pieces[-1].text) and pieces[-1].spans is not None:
                pieces[-1] = Piece(text, (*pieces[-1].spans, span), bos=False, cut=False)
            else:
                pieces.append(Piece(text, (span,), bos=False, cut=False))
        return pieces

    def _render(
        self, tools: Optional[list[Any]], at: str, messages: list[Message], prompt: bool
    ) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"tokenizer {self.tokenizer.name_or_path or ''}: has no chat template; name one:"
                " data.chat_template: chatml, or the path of a Jinja file"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is no template: {error.message}") from error
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"{at}: the chat template refuses these messages: {error}") from error
        return text


def checked_messages(found: Any, name: str, at: str) -> list[Message]:
    """Messages with a known role and a content that is a string; the parts of a content in parts
    are joined, and arguments of tool calls that are JSON in a string become objects, as templates
    expect. Errors: `DataError`."""
    if not isinstance(found, list) or not found:
        got = kind(found) if found != [] else "an empty list"
        raise DataError(f"{at}: '{name}' must be a list of messages, got {got}")
    return [_message(message, f"{name}[{index}]", at) for index, message in enumerate(found)]


def plain(record: dict[str, Any], at: str) -> str:
    """The words of a conversation without any mark, one message after another."""
    if "messages" in record:
        return words(record["messages"], "messages", at)
    parts = [words(record[name], name, at) for name in ("prompt", "completion")]
    return ("\n" if isinstance(record["prompt"], list) else "").join(parts)


def words(found: Any, name: str, at: str) -> str:
    """A string, or what messages say, without any mark. Errors: `DataError`."""
    if isinstance(found, str):
        return checked_text(found, name, at)
    return "\n".join(m["content"] for m in checked_messages(found, name, at) if m["content"])


def _said(render: Any, messages: list[Message], turn: int, at: str) -> tuple[str, Span]:
    """The text up to the end of turn `turn`, and the part of it that the model says."""
    asked, text = render(messages[:turn], True), render(messages[: turn + 1], False)
    where = f"{at}: messages[{turn}]"
    hidden = DataError(
        f"{where}: the chat template leaves out what the assistant says, so there is nothing to"
        " learn; give another with data.chat_template: chatml, or a Jinja file"
    )
    if not text.startswith(asked):
        if text == render(messages[:turn], False):
            raise hidden
        same = next(i for i, pair in enumerate(zip_longest(asked, text)) if pair[0] != pair[1])
        raise DataError(
            f"{where}: the chat template asks for an answer after {asked[same:][:40]!r} but then"
            f" writes {text[same:][:40]!r} there, so what the assistant says cannot be told from"
            " the rest; give one whose prefixes agree with data.chat_template"
        )
    if not text[len(asked) :].strip():
        raise hidden
    # Space behind the mark that ends a turn belongs to the next one; without a mark it is the mark.
    stripped = text.rstrip()
    content = messages[turn]["content"].rstrip()
    if content and stripped.endswith(content):
        stripped = text
    return stripped, (len(asked), len(stripped))


def _message(message: Any, name: str, at: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{at}: '{name}' must be an object, got {kind(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        close = difflib.get_close_matches(str(role), ROLES, n=1, cutoff=0.6)
        near = f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(ROLES)}"
        raise DataError(f"{at}: '{name}' has the role {role!r}; {near}")
    calls = message.get("tool_calls")
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, name, at) for part in content)
    words = checked_text(content, f"{name}.content", at)
    made = {**message, "content": words}
    if role == "assistant" and not calls and not words.strip():
        raise DataError(f"{at}: '{name}' is an empty answer: there is nothing to learn")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise DataError(f"{at}: '{name}.tool_calls' must be a list of objects")
        made["tool_calls"] = [_call(call) for call in calls]
    return made


def _part(part: Any, name: str, at: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise DataError(f"{at}: '{name}.content' has a part that is not text")
    return checked_text(part.get("text"), f"{name}.content", at)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(record: dict[str, Any], at: str) -> Optional[list[Any]]:
    """The `tools` of a record: a list, or one written as JSON in a string."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{at}: 'tools' is a string that is not JSON") from error
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{at}: 'tools' must be a list, got {kind(tools)}")
    return tools or None
