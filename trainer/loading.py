"""Plain data (of JSON or YAML) as dataclasses: strict, and every problem with the path of its key.

Standard library only; it knows no particular dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Optional, Union

KeyPath = tuple[Union[str, int], ...]
Problem = tuple[KeyPath, str]  # the path of a key, and what is wrong with it
#: Keys of a block that are listed beside a guess.
_FEW = 6


class Strict:
    """Mixin: the JSON Schema (`launch schema`, by pydantic) allows no other keys."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


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


#: What other trainers call a key -> what it is called here.
_ELSEWHERE = {
    "attn_implementation": "attention",
    "batch_size": "micro_batch",
    "dtype": "precision",
    "eval_steps": "evaluate_every",
    "gpu": "accelerator",
    "gradient_accumulation_steps": "accumulate",
    "learning_rate": "lr",
    "logging_steps": "log_every",
    "lora": "adapter",
    "lora_alpha": "alpha",
    "lr_scheduler_type": "schedule",
    "max_completion_length": "max_new_tokens",
    "max_grad_norm": "clip",
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "max_steps": "steps",
    "num_generations": "group",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch",
    "r": "rank",
    "reward_funcs": "rewards",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "target_modules": "targets",
    "torch_dtype": "precision",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
}


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest allowed name, else the list of what is allowed."""
    options = sorted(allowed)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(options)}"


def unknown_key(name: str, allowed: typing.Collection[str]) -> str:
    """What is said of a key that a block does not have; a small block's keys are all listed."""
    if _ELSEWHERE.get(name) in allowed:
        return f"unknown key; here it is '{_ELSEWHERE[name]}'"
    near = nearest(name, allowed)
    small = len(allowed) <= _FEW and near.startswith("did you mean")
    return f"unknown key; {near}" + (f" allowed: {', '.join(sorted(allowed))}" if small else "")


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


#: Combinations of guesses that are tried before the rules of a dataclass are left for later.
_MOST_TRIES = 64
_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _build_dataclass(kind: Any, raw: Any, at: KeyPath, problems: list[Problem]) -> Any:
    if not isinstance(raw, Mapping):
        return _wrong(raw, "a mapping", at, problems)
    hints = _hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    before = len(problems)
    unknown: set[str] = set()
    for key in raw:
        if key not in fields:
            problems.append(((*at, key), unknown_key(str(key), fields)))
            unknown.update(difflib.get_close_matches(str(key), fields, n=1))
    values, wrong = {}, unknown - set(raw)
    for name in fields:
        if name in raw:
            known = len(problems)
            values[name] = build(hints[name], raw[name], (*at, name), problems)
            if len(problems) > known:
                wrong.add(name)
    for name, f in fields.items():
        no_default = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if no_default and name not in raw:
            problems.append((at, f"missing key `{name}`"))
            wrong.add(name)
    if len(problems) > before:
        guesses = {name: _guesses(hints[name]) for name in sorted(wrong)}
        problems.extend(((*at, name), what) for name, what in _remaining(kind, values, guesses))
        return None
    try:
        return kind(**values)
    except FieldErrors as error:
        problems.extend(((*at, name), message) for name, message in error.problems)
        return None


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields; a driver reads the same few dataclasses all the time."""
    return typing.get_type_hints(kind)


def _remaining(
    kind: Any, values: Mapping[str, Any], guesses: Mapping[str, list[Any]]
) -> list[tuple[str, str]]:
    """The problems of fields in `values` that stay whatever `guesses`, the fields that could not
    be read, are put right to: a rule about several fields says nothing while one is not known."""
    stay: Optional[list[tuple[str, str]]] = None
    tries = itertools.product(*guesses.values())
    for guess in itertools.islice(tries, _MOST_TRIES + 1):
        try:
            kind(**{**values, **dict(zip(guesses, guess))})
            return []
        except FieldErrors as error:
            found = [(name, what) for name, what in error.problems if name not in guesses]
        except (TypeError, AttributeError):  # a rule that looks into a field that is not known
            return []
        stay = found if stay is None else [one for one in stay if one in found]
        if not stay:
            return []
    return (stay or []) if math.prod(map(len, guesses.values())) <= _MOST_TRIES else []


def _guesses(kind: Any) -> list[Any]:
    """Values that a field of this type may have, enough for every rule on other fields to hold for
    one of them: 720720 is a multiple of whatever small number a rule wants to divide it by."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return [guess for option in arguments for guess in _guesses(option)]
    if origin is Literal:
        return list(arguments)
    known: dict[Any, list[Any]] = {
        type(None): [None], bool: [False, True], int: [1, 720720], float: [1.0], str: ["x"]
    }  # fmt: skip
    return known.get(kind, [()] if origin is tuple else [{}] if origin else [object()])


def _wrong(raw: Any, wanted: str, at: KeyPath, problems: list[Problem]) -> None:
    problems.append((at, f"expected {wanted}, got {raw!r}"))
