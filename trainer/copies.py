"""Which folders of this machine are copies of folders in a store, for what outlives the machine.

Paths of copies differ from machine to machine, so what is written to be read elsewhere (the base
that an adapter names, the teacher that stored answers come from) names the store, and is looked up
here when it is read. A job says what is a copy of what (`config.Job.copies`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: URIs of stores that jobs read from; everything else is a path, a name, or not known.
REMOTE = re.compile(r"(gs|s3)://")
#: URI -> the folder or file that is its copy; without a slash at the end.
_copies: dict[str, str] = {}


def use(copies: Mapping[str, str]) -> None:
    """From now on `copies` (URI -> absolute path) is what this process knows."""
    _copies.clear()
    _copies.update((uri.rstrip("/"), path.rstrip("/")) for uri, path in copies.items())


def here(reference: str) -> str:
    """The path of the copy of a URI, by the longest prefix that is known; any other text, and a
    URI of which there is no copy, unchanged."""
    if not REMOTE.match(reference):
        return reference
    return _swapped(reference, _copies)


def origin(reference: str) -> str:
    """The URI of which a path is the copy; any other text unchanged. The opposite of `here`."""
    if not Path(reference).is_absolute():
        return reference
    return _swapped(reference, {path: uri for uri, path in _copies.items()})


def named(value: Any) -> Any:
    """Plain dicts, lists and scalars with `origin` of every string in them."""
    if isinstance(value, dict):
        return {key: named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [named(item) for item in value]
    return origin(value) if isinstance(value, str) else value


def _swapped(text: str, known: Mapping[str, str]) -> str:
    for prefix in sorted(known, key=len, reverse=True):
        if text == prefix or text.startswith((f"{prefix}/", f"{prefix}@")):
            return known[prefix] + text[len(prefix) :]
    return text
