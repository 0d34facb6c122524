"""The values of a job's secrets as they may stand in a text, and the text without them.

Whole values are found, and whole lines of those that have several: as they are, in a URL, in JSON,
and as Python shows them. What a program makes of one otherwise (a piece, base64) is not.
Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus

#: In the trainer's environment: the names of the variables that the recipe calls secrets.
NAMES = "LAUNCH_SECRETS"
HIDDEN = "***"


def words(environ: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """What must not be in a text: the values of the variables `names`, the longest form first, so
    that no part of a secret stays behind another one."""
    found: set[str] = set()
    for name in names:
        value = environ.get(name, "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        lines = [line for line in map(str.strip, value.splitlines()) if line]
        if len(lines) > 1:  # the brackets of a key in JSON tell nothing, and are everywhere
            lines = [line for line in lines if any(map(str.isalnum, line))]
        for line in lines:
            escaped = json.dumps(line)[1:-1], json.dumps(line, ensure_ascii=False)[1:-1]
            shown = repr(line)[1:-1], repr(line + "\"'")[1:-4]  # alone; with both quotes around
            found |= {line, *escaped, *shown, quote(line), quote(line, safe=""), quote_plus(line)}
    return sorted(found, key=lambda word: (-len(word), word))


def hide(text: str, secrets: Iterable[str]) -> str:
    """`text` with `***` for every one of `secrets` (see `words`)."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text
