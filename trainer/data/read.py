"""Documents of a source: files on this machine, or text that is part of CPython.

What is kept of a source (`share`, `weight`) is decided by hashes of document ids, so every machine
and every run keeps the same documents.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from trainer.config import Source
from trainer.data import DataError
from trainer.data.corpus import python_reference

SUFFIXES = (".jsonl", ".txt")
_SUFFIX_WORDS = "`.jsonl` (one JSON object per line) and `.txt` (one document per file) are read"


@dataclass(frozen=True)
class Document:
    """`id` is stable: the path inside the source (and the line), or `topic/NN`. `source` is the
    index of the source it comes from."""

    id: str
    text: str
    source: int


def documents(sources: tuple[Source, ...]) -> Iterator[Document]:
    """The documents of all sources, in order; blank ones are left out. Errors: `DataError`."""
    require_sources(sources)
    for index, source in enumerate(sources):
        for name, text in _kept(source):
            yield Document(name, text, index)


def require_sources(sources: tuple[Source, ...]) -> None:
    """Errors: `DataError` when there is none."""
    if not sources:
        raise DataError("no data: name a source under `data.train` or `data.validation`")


def source_name(source: Source) -> str:
    """What people call a source: its path, or `python-reference/SPLIT`."""
    if source.path is not None:
        return source.path
    return f"{source.builtin}/{source.split}" if source.split else str(source.builtin)


def shards(source: Source) -> int:
    """The number of files of a source (a built-in one has 1). Errors: `DataError`."""
    return 1 if source.path is None else len(_files(source.path))


def sample_names(sources: tuple[Source, ...]) -> dict[tuple[int, str], str]:
    """(index of the source, document id) -> what people call the sample: `id` or `sample_id` of a
    JSONL line, else `FILE-LINE` without the suffix; of a `.txt` file its name without it."""
    names: dict[tuple[int, str], str] = {}
    for index, source in enumerate(sources):
        for name, path in _files(source.path) if source.path is not None else ():
            if path.suffix != ".jsonl":
                names[index, name] = path.stem
                continue
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    content = line.removeprefix(b"\xef\xbb\xbf").strip()
                    record: Any = json.loads(content) if content else {}
                    given = record.get("id", record.get("sample_id", f"{path.stem}-{number}"))
                    names[index, f"{name}:{number}"] = str(given)
    return names


def hash_fraction(text: str) -> float:
    """sha256 of `text` as a number in [0, 1): the same everywhere."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _kept(source: Source) -> Iterator[tuple[str, str]]:
    """Every document as often as `share` and `weight` say. The two hash different strings: one
    choice does not foretell the other."""
    read = kept = 0
    for name, text in _all(source):
        read += 1
        if hash_fraction(name) >= source.share:
            continue
        copies = int(source.weight)
        copies += hash_fraction(f"weight/{name}") < source.weight - copies
        kept += copies
        for _ in range(copies):
            yield name, text
    if not read:
        raise DataError(f"{source_name(source)}: holds no text; a source needs a document")
    if not kept:
        raise DataError(
            f"{source_name(source)}: share {source.share:g} and weight {source.weight:g} keep none"
            f" of its {read} documents; raise them"
        )


def _all(source: Source) -> Iterator[tuple[str, str]]:
    if source.path is None:
        yield from python_reference(source.split)
        return
    for name, path in _files(source.path):
        found = _lines(name, path, source.field) if path.suffix == ".jsonl" else _whole(name, path)
        yield from ((at, text) for at, text in found if text.strip())


def _files(given: str) -> list[tuple[str, Path]]:
    """(name inside the source, path) of every file, sorted by name."""
    path = _local(given)
    try:
        return _found(given, path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _found(given: str, path: Path) -> list[tuple[str, Path]]:
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
        found = [p for p in found if not _hidden(p.relative_to(path))]
        if not found:
            raise DataError(f"{given}: no data file in this folder; {_SUFFIX_WORDS}")
        return _named(found, path)
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{given}: unknown kind of file; {_SUFFIX_WORDS}")
        return [(path.name, path)]
    if not glob.has_magic(str(path)):
        raise DataError(f"{given}: no such file or folder (looked in {Path.cwd()})")
    base = _fixed_part(path)
    found = [p for p in base.glob(str(path.relative_to(base))) if p.is_file()]
    found = [p for p in found if not _hidden(p.relative_to(base))]
    if not found:
        raise DataError(f"{given}: no file matches this pattern (looked in {Path.cwd()})")
    strangers = sorted(str(p) for p in found if p.suffix not in SUFFIXES)
    if strangers:
        raise DataError(f"{given}: matches {strangers[0]}; only {_SUFFIX_WORDS}")
    return _named(found, base)


def _local(given: str) -> Path:
    scheme, separator, rest = given.partition("://")
    if not separator:
        try:
            return Path(given).expanduser()
        except RuntimeError as error:
            raise DataError(f"{given}: no such user; write the path in full") from error
    if scheme != "file":
        raise DataError(
            f"{given}: cannot read `{scheme}://` data; allowed: a file, folder or glob on this"
            " machine (plain, or as file:///PATH); copy the data here first"
        )
    host, _, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise DataError(f"{given}: `{host}` is another host; write file:///PATH")
    return Path(unquote(f"/{path}"))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _named(found: list[Path], base: Path) -> list[tuple[str, Path]]:
    return sorted((path.relative_to(base).as_posix(), path) for path in found)


def _fixed_part(pattern: Path) -> Path:
    """The folders of a pattern before its first wildcard."""
    while glob.has_magic(str(pattern)):
        pattern = pattern.parent
    return pattern


def _whole(name: str, path: Path) -> Iterator[tuple[str, str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    yield name, _decode(content.removeprefix(b"\xef\xbb\xbf"), str(path))


def _lines(name: str, path: Path, key: str) -> Iterator[tuple[str, str]]:
    """The field `key` of every line; lines are cut at b"\\n" only, as JSON Lines are."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                at = f"{path}:{number}"
                content = _decode(line, at).strip()
                if content:
                    yield f"{name}:{number}", _field(content, key, at)
    except OSError as error:
        raise _unreadable(path, error) from error


def _field(content: str, key: str, at: str) -> str:
    try:
        record: Any = json.loads(content)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise DataError(f"{at}: not JSON at column {error.colno}: {what}") from error
    except (ValueError, RecursionError) as error:  # absurd numbers, absurd nesting
        raise DataError(f"{at}: cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f'{at}: expected an object like {{"{key}": ...}}, got {_kind(record)}')
    if key not in record:
        has = ", ".join(f"'{name}'" for name in sorted(record)[:8]) or "none"
        raise DataError(f"{at}: no key '{key}'; keys here: {has}; name one with `field`")
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{at}: '{key}' must be a string, got {_kind(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{at}: '{key}' holds half a character (a lone surrogate, U+"
            f"{ord(text[error.start]):04X}) at {error.start}; repair or remove the line"
        ) from error
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _decode(content: bytes, at: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{at}: not UTF-8: byte 0x{content[error.start]:02x} at {error.start};"
            " convert the file (iconv -t UTF-8)"
        ) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}")
