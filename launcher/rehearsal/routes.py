"""Paths and messages of a Google service, read off its installed client, so that they cannot drift:
the URI templates are the client's own, and its messages refuse what they do not know."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional
from urllib.parse import unquote

from launcher.google import library
from launcher.rehearsal.http import HttpError, Request, Response, answer

json_format = library("google.protobuf.json_format")
_FIELD = re.compile(r"\{([a-z_]+)(?:=([^}]+))?\}")
#: Parameters of every Google API that say how to answer, not what.
_SYSTEM = {"$alt", "alt", "key", "prettyPrint", "fields", "access_token", "quotaUser"}


@dataclass(frozen=True)
class Method:
    """A method of a service, however it is called: `act` takes a parsed `message` and returns the
    answering message. Errors: `HttpError`."""

    name: str  # CreateCustomJob
    message: Any
    act: Callable[[Any], Any]


@dataclass(frozen=True)
class Route:
    """One way to call a method. `body`: the field that is the body, `*` for all, None for none."""

    method: str
    pattern: re.Pattern[str]
    body: Optional[str]
    message: Any
    act: Callable[[Any], Any]


def routes(transport: Any, methods: Iterable[Method]) -> list[Route]:
    """The routes of methods in a REST transport's base class."""
    return [
        Route(
            option["method"].upper(), _pattern(option["uri"]), option.get("body"),
            method.message, method.act,
        )
        for method in methods
        for option in getattr(transport, f"_Base{method.name}")._get_http_options()
    ]  # fmt: skip


def dispatch(table: list[Route], request: Request) -> Optional[Response]:
    """The answer of the first route that fits; None: no route does. Errors: `HttpError` 400 for
    fields that the request's message does not have."""
    path = unquote(request.path)
    for route in table:
        found = route.pattern.fullmatch(path)
        if found and route.method == request.method:
            return answer(to_json(route.act(_parse(route, found.groupdict(), request))))
    return None


def parse(message: Any, value: Mapping[str, Any]) -> Any:
    """`value` as a message of that type. Errors: `HttpError` 400 naming what is unknown."""
    made = message()
    try:
        json_format.ParseDict(value, message.pb(made) if hasattr(message, "pb") else made)
    except json_format.ParseError as error:
        words = " ".join(str(error).split())
        raise HttpError(400, f"Invalid JSON payload received. {words}") from None
    return made


def to_json(message: Any) -> Any:
    """A message as the REST interface renders it: camelCase, enums by name."""
    plain = type(message).pb(message) if hasattr(type(message), "pb") else message
    return json_format.MessageToDict(plain)


def _parse(route: Route, fields: Mapping[str, str], request: Request) -> Any:
    value: dict[str, Any] = dict(fields)
    for name, given in request.query.items():
        if name not in _SYSTEM:
            value[name] = given[-1]
    if route.body == "*":
        value.update(request.json())
    elif route.body is not None:
        value[route.body] = request.json()
    return parse(route.message, value)


def _pattern(uri: str) -> re.Pattern[str]:
    """`/v1/{parent=projects/*/locations/*}/customJobs` as a regular expression."""
    pattern, end = "", 0
    for found in _FIELD.finditer(uri):
        inner = re.escape(found[2] or "*").replace(r"\*\*", ".+").replace(r"\*", "[^/:]+")
        pattern += re.escape(uri[end : found.start()]) + f"(?P<{found[1]}>{inner})"
        end = found.end()
    return re.compile(pattern + re.escape(uri[end:]))
