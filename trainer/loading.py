"""Plain data (of JSON or YAML) as dataclasses: strict, and every problem with the path of its key.

Standard library only; it knows no particular dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

KeyPath = tuple[Union[str, int], ...]
Problem = tuple[KeyPath, str]  # the path of a key, and what is wrong with it


def dotted(path: KeyPath) -> str:
    """`("stages", 0, "train")` as `stages[0].train`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


class FieldErrors(ValueError):
    """Problems of single fields of one dataclass: `problems` is a list of (field name, message)."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{name}: {message}" for name, message in problems))
        self.problems = problems


def require(owner: object, **rules: tuple[bool, str]) -> None:
    """Raise `FieldErrors` for every rule `field=(holds, message)` that does not hold."""
    problems = [(name, message) for name, (holds, message) in rules.items() if not holds]
    if problems:
        raise FieldErrors(problems)


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest allowed name, else the list of what is allowed."""
    options = sorted(allowed)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(options)}"


def to_dict(value: Any) -> Any:
    """Plain dicts, lists and scalars of a configuration, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return value


def build(kind: Any, raw: Any, at: KeyPath, problems: list[Problem]) -> Any:
    """`raw` (of JSON or YAML) as an instance of the type `kind`: no unknown key, no conversion but
    int to float. Every problem is appended; what is wrong becomes None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if raw is None:
            return None if type(None) in arguments else _wrong(raw, "a value", at, problems)
        return _build_one_of([a for a in arguments if a is not type(None)], raw, at, problems)
    if origin is Literal:
        if raw not in arguments or isinstance(raw, bool):
            problems.append(
                (at, f"{raw!r} is not allowed; {nearest(str(raw), map(str, arguments))}")
            )
        return raw
    if origin is tuple:
        if not isinstance(raw, (list, tuple)):
            return _wrong(raw, "a list", at, problems)
        return tuple(build(arguments[0], item, (*at, i), problems) for i, item in enumerate(raw))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(raw, Mapping):
            return _wrong(raw, "a mapping", at, problems)
        return {key: build(arguments[1], v, (*at, key), problems) for key, v in raw.items()}
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, raw, at, problems)
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if not isinstance(raw, kind) or (kind is not bool and isinstance(raw, bool)):
        return _wrong(raw, _WORDS.get(kind, kind.__name__), at, problems)
    if kind is float and not math.isfinite(raw):
        return _wrong(raw, "a finite number", at, problems)
    return raw


def _build_one_of(options: list[Any], raw: Any, at: KeyPath, problems: list[Problem]) -> Any:
    """The first of `options` that takes `raw`; the problems of the last when none does."""
    *others, last = options
    words = ""
    for option in others:
        tried: list[Problem] = []
        value = build(option, raw, at, tried)
        if not tried:
            return value
        if typing.get_origin(option) is Literal:
            words += "".join(f"{word!r} or " for word in typing.get_args(option))
    found: list[Problem] = []
    value = build(last, raw, at, found)
    told = "expected "
    problems.extend(
        (path, what.replace(told, told + words, 1) if path == at else what) for path, what in found
    )
    return value


_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _build_dataclass(kind: Any, raw: Any, at: KeyPath, problems: list[Problem]) -> Any:
    if not isinstance(raw, Mapping):
        return _wrong(raw, "a mapping", at, problems)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    before = len(problems)
    for key in raw:
        if key not in fields:
            problems.append(((*at, key), f"unknown key; {nearest(str(key), fields)}"))
    values = {
        name: build(hints[name], raw[name], (*at, name), problems) for name in fields if name in raw
    }
    for name, f in fields.items():
        no_default = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if no_default and name not in raw:
            problems.append((at, f"missing key `{name}`"))
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except FieldErrors as error:
        problems.extend(((*at, name), message) for name, message in error.problems)
        return None


def _wrong(raw: Any, wanted: str, at: KeyPath, problems: list[Problem]) -> None:
    problems.append((at, f"expected {wanted}, got {raw!r}"))
