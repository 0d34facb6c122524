"""Records of two answers to one prompt: which shapes they come in, and the texts they make.

The prompt stands in `prompt` or `messages`, or is what whole conversations begin with alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Union

from trainer.data import DataError
from trainer.data.chat import Message, checked_messages, words
from trainer.data.questions import python_questions
from trainer.data.shapes import Piece, Renderer, Value, View, checked_text, kind

SIDES = ("chosen", "rejected")
#: Who speaks first in a whole conversation.
_FIRST = ("system", "developer", "user")
_SAME = "'chosen' and 'rejected' are the same: there is nothing to prefer"


class Sides(NamedTuple):
    """Strings, to be taken as they are, or lists of messages."""

    prompt: Union[str, list[Message]]
    chosen: Union[str, list[Message]]
    rejected: Union[str, list[Message]]


def pieces(value: Value, shape: str, view: View, at: str) -> list[Piece]:
    """What a stage reads of a record: where `view` asks for pairs, the chosen and the rejected
    text, each with its prompt, of which the answer is learned; else the chosen one alone. Without
    a chat template, all words as one text. Errors: `DataError`."""
    if isinstance(value, str) or shape != "preference":
        raise DataError(
            f"{at}: a `{shape}` record holds no two answers; give `chosen` and `rejected`, and"
            " `prompt` beside them"
        )
    found = sides(value, at)
    if view.renderer is None:
        return [Piece("\n".join(words(part, "messages", at) for part in found))]
    tools = {"tools": value["tools"]} if "tools" in value else {}
    made = [
        _piece(view.renderer, {"prompt": found.prompt, "completion": answer, **tools}, at)
        for answer in (found.chosen, found.rejected)
    ]
    if made[0].text == made[1].text:
        raise DataError(f"{at}: {_SAME}, as the chat template writes them")
    return made if view.pairs else made[:1]


def sides(record: dict[str, Any], at: str) -> Sides:
    """The prompt and the two answers. Answers are strings, a message, or lists of messages; those
    that begin with the user are whole conversations, and what both begin with is the prompt. Of
    two strings without a prompt, that is their common beginning. Errors: `DataError`."""
    # Tables give every record all columns: null is what a record does not have.
    beside = "prompt" if record.get("messages") is None else "messages"
    before = record.get(beside)
    given = [record[name] for name in SIDES]
    if all(isinstance(part, str) for part in given) and isinstance(before, (str, type(None))):
        return _texts(before, at, *given)
    chosen, rejected = (_answer(part, name, at) for part, name in zip(given, SIDES))
    if chosen == rejected:
        raise DataError(f"{at}: {_SAME}")
    whole = [answer[0]["role"] in _FIRST for answer in (chosen, rejected)]
    if whole[0] != whole[1]:
        raise DataError(
            f"{at}: one of 'chosen' and 'rejected' is a whole conversation, the other an answer"
        )
    if whole[0]:
        alike = _alike(chosen, rejected)
        prompt, chosen, rejected = chosen[:alike], chosen[alike:], rejected[alike:]
    elif before is None:
        raise DataError(f"{at}: no prompt; give `prompt`, or whole conversations in both answers")
    elif isinstance(before, str):
        prompt = [{"role": "user", "content": checked_text(before, "prompt", at)}]
    else:
        prompt = checked_messages(before, beside, at)
    if not prompt:
        raise DataError(f"{at}: 'chosen' and 'rejected' do not begin with the same message")
    for name, answer in zip(SIDES, (chosen, rejected)):
        if not any(message["role"] == "assistant" for message in answer):
            raise DataError(f"{at}: '{name}' has no answer of the assistant after the prompt")
    return Sides(prompt, chosen, rejected)


def python_preferences(split: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted name, {"prompt", "chosen", "rejected"}) of `split`, from the exchanges of
    `python-questions`: the answer is preferred to its own words in another order."""
    for name, exchange in python_questions(split):
        question, answer = exchange["messages"]
        parts = answer["content"].split(" ")
        mixed = sorted(parts, key=lambda part: hashlib.sha256(f"{name}/{part}".encode()).digest())
        if mixed == parts:
            mixed.reverse()
        worse = {"role": "assistant", "content": " ".join(mixed)}
        yield name, {"prompt": [question], "chosen": [answer], "rejected": [worse]}


def _texts(before: str | None, at: str, chosen: str, rejected: str) -> Sides:
    for name, text in zip(SIDES, (chosen, rejected)):
        checked_text(text, name, at)
    if chosen == rejected:
        raise DataError(f"{at}: {_SAME}")
    if before is None:
        alike = _alike(chosen, rejected)
        alike -= chosen[:alike].endswith(" ")  # the space belongs to the word behind it
        if not alike:
            raise DataError(
                f"{at}: no prompt: 'chosen' and 'rejected' have no common beginning; give `prompt`"
            )
        before, chosen, rejected = chosen[:alike], chosen[alike:], rejected[alike:]
    checked_text(before, "prompt", at)
    for name, text in zip(SIDES, (chosen, rejected)):
        if not text.strip():
            raise DataError(f"{at}: '{name}' is empty: there is nothing to learn")
    return Sides(before, chosen, rejected)


def _answer(given: Any, name: str, at: str) -> list[Message]:
    if isinstance(given, str):
        given = {"role": "assistant", "content": given}
    if not isinstance(given, (dict, list)):
        raise DataError(
            f"{at}: '{name}' must be a list of messages, or a string, got {kind(given)}"
        )
    return checked_messages([given] if isinstance(given, dict) else given, name, at)


def _alike(one: Any, other: Any) -> int:
    """How many characters or messages both begin with."""
    pairs = enumerate(zip(one, other))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _piece(renderer: Renderer, record: dict[str, Any], at: str) -> Piece:
    made = renderer.answer(record, at)
    if len(made) != 1:
        raise DataError(
            f"{at}: the chat template writes a turn differently once others follow, so an answer of"
            " several turns is not one text; end each answer with its first turn"
        )
    return made[0]
