"""A manifest: a JSONL file of sources, one `{"path", "type", "weight"}` a line.

`path` may be a folder or a glob over shards, relative to the manifest. `type` is the shape of the
records: `lm` or `text` (the default), `messages`, `prompt`, `preference`,
`math_tool` or `auto`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.config import FieldErrors, Source, nearest
from trainer.data import DataError
from trainer.data.shapes import kind, parse

Format = Literal["auto", "text", "messages", "prompt", "preference", "math_tool"]
_TYPES: dict[str, Format] = {"lm": "text", **{name: name for name in get_args(Format)}}
_KEYS = ("path", "type", "weight", "field")


def expand(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """The sources with every manifest replaced by what it lists. Its own `weight` multiplies
    those, its `share` holds for all. Errors: `DataError` with FILE:LINE."""
    found: list[Source] = []
    for source in sources:
        found += [source] if source.manifest is None else _listed(source, source.manifest)
    return tuple(found)


def _listed(manifest: Source, given: str) -> list[Source]:
    from trainer.data.read import local_path  # reading asks for manifests, too

    path = local_path(given)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"{given}: cannot be read: {why}") from error
    found: list[Source] = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            at = f"{path}:{number}"
            found.append(_entry(manifest, parse(line, "path", at), path.parent, at))
            _require_files(found[-1], at)
    if not found:
        raise DataError(f"{given}: an empty manifest; write a source on each line")
    return found


def _require_files(source: Source, at: str) -> None:
    """Errors: `DataError` that names the line of the manifest, where it lists what is not there.
    Places on other machines are the reader's to refuse: a dry run replaces them."""
    from trainer.data.read import shards

    if source.path is None or "://" in source.path:
        return
    try:
        shards(source)
    except DataError as error:
        raise DataError(f"{at}: {error}") from error


def _entry(manifest: Source, record: dict[str, Any], base: Path, at: str) -> Source:
    for key in record:
        if key not in _KEYS:
            raise DataError(f"{at}: unknown key '{key}'; {nearest(key, _KEYS)}")
    where, weight = record.get("path"), record.get("weight", 1.0)
    if not isinstance(where, str) or not where:
        raise DataError(f"{at}: 'path' must be a file, folder or glob, got {kind(where)}")
    shape = record.get("type", "lm")
    if shape not in _TYPES:
        raise DataError(f"{at}: type {shape!r} is not known; {nearest(str(shape), _TYPES)}")
    key = record.get("field", manifest.field)
    if not isinstance(key, str):
        raise DataError(f"{at}: 'field' must be a string, got {kind(key)}")
    if type(weight) not in (int, float) or not math.isfinite(weight):
        raise DataError(f"{at}: 'weight' must be a number, got {weight!r}")
    try:
        return replace(
            manifest,
            manifest=None,
            path=where if "://" in where else str(base / where),
            format=_TYPES[shape],
            field=key,
            weight=manifest.weight * weight,
        )
    except FieldErrors as error:
        raise DataError(f"{at}: {error}") from error
