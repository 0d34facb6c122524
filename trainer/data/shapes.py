"""What one record of a source says, and which part of it is to be learned.

A record has a shape: `text` (a string), `math_tool` (text with tool calls), `prompt` (with its
`completion`), `preference` (two answers) or `messages`. Where records come from is read.py's
business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional, Protocol, Union

from trainer.data import DataError

Span = tuple[int, int]  # characters [start, end)
#: A text, or the JSON object of a record of another shape.
Value = Union[str, dict[str, Any]]
TEXTS = ("text", "math_tool")
#: What a record of the other shapes must hold.
KEYS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
}
_EXAMPLES = 3


class Piece(NamedTuple):
    """A text of which only `spans` (None: everything) is to be learned. `bos`: begin-of-text goes
    where the tokenizer puts it (a chat template has put its own). `cut`: a longer text becomes
    several chunks; without, its end is left out, since an answer without its question misleads."""

    text: str
    spans: Optional[tuple[Span, ...]] = None
    bos: bool = True
    cut: bool = True


class Renderer(Protocol):
    """A chat template (chat.Template)."""

    def conversation(self, record: dict[str, Any], at: str) -> list[Piece]: ...
    def answer(self, record: dict[str, Any], at: str) -> list[Piece]: ...


@dataclass(frozen=True)
class View:
    """How a stage sees records. `default`: the shape of sources that name none (`auto`: by their
    keys). `renderer` None: conversations are plain text. `tool_ratio`: see `config.ToolUse`.
    `pairs`: every record is one of two answers, and gives a piece for each."""

    default: str = "text"
    renderer: Optional[Renderer] = None
    tool_ratio: float = 0.0
    skip_bad: bool = False
    pairs: bool = False


@dataclass
class Skipped:
    """Lines that were left out: their number, and what was wrong with the first few."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, error: DataError) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(str(error))


def parse(content: str, key: str, at: str) -> dict[str, Any]:
    """A line as a JSON object; `key` is one that it might hold. Errors: `DataError`."""
    try:
        record: Any = json.loads(content)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        if content.strip().startswith("[") and at.endswith(":1"):
            what += "; a file that is one list has to become one object a line"
        raise DataError(f"{at}: not JSON at column {error.colno}: {what}") from error
    except (ValueError, RecursionError) as error:  # absurd numbers, absurd nesting
        raise DataError(f"{at}: cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f'{at}: expected an object like {{"{key}": ...}}, got {kind(record)}')
    return record


def shape_of(record: dict[str, Any], key: str, at: str, pairs: bool = False) -> str:
    """The shape that the keys of a record tell; two answers do, whatever stands beside them.
    `pairs`: nothing else will do. Errors: `DataError` for none, or more than one."""
    found = [
        shape
        for shape, keys in (*KEYS.items(), ("text", (key,)))
        if all(name in record for name in keys)
    ]
    if "preference" in found:
        return "preference"
    if len(found) == 1:
        return found[0]
    if pairs and not found:
        raise DataError(
            f"{at}: no `chosen` and `rejected`; keys here: {_keys(record)}; give the two answers"
            " these names, and the question `prompt`"
        )
    if found:
        raise DataError(f"{at}: could be {' or '.join(found)}; say which with `format`")
    raise DataError(
        f"{at}: neither `messages`, nor `prompt` and `completion`, nor '{key}', nor `chosen` and"
        " `rejected`;"
        f" keys here: {_keys(record)}; name the one that holds text with `field`"
    )


def value_of(record: dict[str, Any], shape: str, key: str, at: str) -> Value:
    """The text of a text-like record, or the record itself. Errors: `DataError`."""
    if shape in TEXTS:
        if key not in record:
            raise DataError(
                f"{at}: no key '{key}'; keys here: {_keys(record)}; name one with `field`"
            )
        return checked_text(record[key], key, at)
    for name in KEYS[shape]:
        if name not in record:
            raise DataError(f"{at}: no key '{name}'; keys here: {_keys(record)}")
    return record


def checked_text(text: Any, name: str, at: str) -> str:
    """A string that can be encoded. Errors: `DataError`."""
    if not isinstance(text, str):
        raise DataError(f"{at}: '{name}' must be a string, got {kind(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{at}: '{name}' holds half a character (a lone surrogate, U+"
            f"{ord(text[error.start]):04X}) at {error.start}; repair or remove the line"
        ) from error
    return text


def kind(value: Any) -> str:
    """What JSON calls the type of a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _keys(record: dict[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(record)[:8]) or "none"
