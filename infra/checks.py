"""The inputs of the foundations against pulumi_gcp's own argument types, before the engine starts.

Pulumi checks the names of a resource's arguments and nothing below: not the keys inside, not what
they require, not types, not values. The argument classes say the first three; the values that a
service takes are written down here, as far as the foundations use them.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Union

from infra.google import Declared, Foundations, resource_class, resources

_LOCATION = re.compile(r"[A-Z]+-[A-Z]+[0-9]+|US|EU|ASIA|[A-Z]{3,4}[0-9]{1,2}")
_ROLE = re.compile(r"roles/[A-Za-z]+(\.[A-Za-z]+)*|(projects|organizations)/[^/]+/roles/\w+")
_MEMBER = re.compile(
    r"(user|group|serviceAccount):[^@\s:]+@[^@\s:]+|domain:[^@\s:]+|principal(Set)?://\S+"
)
_CLASSES = ("STANDARD", "NEARLINE", "COLDLINE", "ARCHIVE")
_ACTIONS = ("Delete", "AbortIncompleteMultipartUpload", "SetStorageClass")

#: Path of an input, without indices -> (what it has to be, whether a value is that).
_VALUES: dict[str, tuple[str, Any]] = {
    "project": ("a project id: 6 to 30 of a-z, 0-9 and -, a letter first",
                re.compile(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]").fullmatch),
    "Bucket.name": ("3 to 63 of a-z, 0-9, -, _ and ., a letter or digit at both ends",
                    re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]").fullmatch),
    "Bucket.location": ("a region (US-CENTRAL1) or a multi-region (US, EU, ASIA)",
                        _LOCATION.fullmatch),
    "Bucket.storage_class": (f"one of {', '.join(_CLASSES)}", _CLASSES.__contains__),
    "Bucket.public_access_prevention": ("enforced or inherited",
                                        ("enforced", "inherited").__contains__),
    "Bucket.lifecycle_rules.action.type": (f"one of {', '.join(_ACTIONS)}", _ACTIONS.__contains__),
    # Empty, it would be the beginning, or the end, of every name.
    **dict.fromkeys(
        ("Bucket.lifecycle_rules.condition.matches_prefixes",
         "Bucket.lifecycle_rules.condition.matches_suffixes"), ("a part of a name", bool)),
    "Bucket.lifecycle_rules.condition.age": ("1 day or more", lambda days: days >= 1),
    "Bucket.soft_delete_policy.retention_duration_seconds": (
        "0, or 604800 (7 days) to 7776000 (90 days)",
        lambda seconds: seconds == 0 or 604800 <= seconds <= 7776000),
    "Account.account_id": ("6 to 30 of a-z, 0-9 and -, a letter first",
                           re.compile(r"[a-z][a-z0-9-]{4,28}[a-z0-9]").fullmatch),
    "Secret.secret_id": ("1 to 255 letters, digits, - and _",
                         re.compile(r"[A-Za-z0-9_-]{1,255}").fullmatch),
    "Repository.format": ("DOCKER", ("DOCKER",).__contains__),
    "Repository.repository_id": ("2 to 63 of a-z, 0-9 and -, a letter first",
                                 re.compile(r"[a-z][a-z0-9-]{0,61}[a-z0-9]").fullmatch),
    "Service.service": ("the name of an API, such as storage.googleapis.com",
                        re.compile(r"[a-z][a-z0-9]*\.googleapis\.com").fullmatch),
    "role": ("roles/..., or a role of a project or an organization", _ROLE.fullmatch),
    "member": ("user:EMAIL, group:EMAIL, serviceAccount:EMAIL, domain:NAME or principal://...",
               _MEMBER.fullmatch),
    "labels.*": ("at most 63 of a-z, 0-9, - and _", re.compile(r"[a-z0-9_-]{0,63}").fullmatch),
}  # fmt: skip


def problems(f: Foundations) -> list[str]:
    """What is wrong with `f`, one line each: `RESOURCE: INPUT: what, and what is allowed`."""
    declared = resources(f)
    found = [line for one in declared for line in of_declared(one)]
    names = [one.name for one in declared]
    found += [
        f"{name}: declared twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    return found


def of_declared(one: Declared) -> Iterator[str]:
    """The same for one resource."""
    resource = resource_class(one.type_token)
    arguments = getattr(sys.modules[resource.__module__], f"{resource.__name__}Args")
    kind = resource.__name__
    for path, what in _of_block(arguments, one.inputs, ""):
        yield f"{one.name}: {path}: {what}"
    for path, value in _scalars(one.inputs, ""):
        allowed = _allowed(kind, re.sub(r"\[\d+\]", "", path), value)
        if allowed is not None:
            yield f"{one.name}: {path}: {value!r} is not allowed; write {allowed}"


def _of_block(arguments: Any, given: Mapping[str, Any], at: str) -> Iterator[tuple[str, str]]:
    """Keys and types of a block of inputs, against the class of its arguments."""
    parameters = list(inspect.signature(arguments.__init__).parameters.values())[1:]
    known = {parameter.name: parameter for parameter in parameters}
    for key in given.keys() - known.keys():
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
        yield _under(at, key), f"unknown key; {hint}"
    for parameter in parameters:
        if parameter.default is inspect.Parameter.empty and parameter.name not in given:
            yield _under(at, parameter.name), "is missing, and required"
    hints = _hints(arguments)
    for key, value in given.items():
        if key in known:
            yield from _of_value(hints[key], value, _under(at, key))


def _hints(arguments: Any) -> dict[str, Any]:
    import pulumi

    module = vars(sys.modules[arguments.__module__])
    # `pulumi.Input` names these two, and the modules that use it do not know them.
    unseen = {"Output": pulumi.Output, "T": Any}
    return typing.get_type_hints(arguments.__init__, module, unseen)


def _of_value(hint: Any, value: Any, at: str) -> Iterator[tuple[str, str]]:
    options = list(_plain(hint))
    if value is None:
        if type(None) not in options:
            yield at, "is null"
        return
    kind = next(option for option in options if option is not type(None))
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is not None and issubclass(origin, Mapping):
        yield from _of_mapping(inner[1], value, at)
    elif origin is not None and issubclass(origin, Sequence):
        if not isinstance(value, (list, tuple)):
            yield at, f"must be a list, not {type(value).__name__}"
            return
        for index, item in enumerate(value):
            yield from _of_value(inner[0], item, f"{at}[{index}]")
    elif kind in (str, bool, int, float):
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            yield at, f"must be {_NAMES[kind]}, not {value!r}"
    elif not isinstance(value, Mapping):
        yield at, f"must be a mapping, not {type(value).__name__}"
    else:
        yield from _of_block(kind, value, at)


_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def _of_mapping(hint: Any, value: Any, at: str) -> Iterator[tuple[str, str]]:
    if not isinstance(value, Mapping):
        yield at, f"must be a mapping, not {type(value).__name__}"
        return
    for key, item in value.items():
        yield from _of_value(hint, item, f"{at}.{key}")


def _plain(hint: Any) -> Iterator[Any]:
    """The types that a value itself may have: without `Awaitable` and `Output` of pulumi.Input."""
    if typing.get_origin(hint) is not Union:
        yield hint
        return
    import pulumi

    for option in typing.get_args(hint):
        origin = typing.get_origin(option)
        if origin is not None and (origin is pulumi.Output or origin.__name__ == "Awaitable"):
            continue
        yield from _plain(option)


def _scalars(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(item, _under(at, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _scalars(item, f"{at}[{index}]")
    else:
        yield at, value


def _allowed(kind: str, path: str, value: Any) -> Optional[str]:
    """What the value has to be, if it is not that. A wrong type was told before."""
    general = "labels.*" if path.startswith("labels.") else path
    what, fits = _VALUES.get(f"{kind}.{path}") or _VALUES.get(general) or ("", None)
    if fits is None:
        return None
    try:
        return None if fits(value) else what
    except TypeError:
        return None


def _under(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key
