"""Documents of a source: files on this machine, datasets of the hub, or text that CPython brings.

What is kept of a source (`share`, `weight`) is decided by hashes of document ids, so every machine
and every run keeps the same documents.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar
from urllib.parse import unquote

from trainer import copies
from trainer.config import Hub, Source
from trainer.data import DataError, hub
from trainer.data.chat import plain
from trainer.data.corpus import python_reference
from trainer.data.digits import digits
from trainer.data.manifest import expand
from trainer.data.preferences import pieces as answers_of
from trainer.data.preferences import python_preferences
from trainer.data.questions import python_questions
from trainer.data.shapes import (
    TEXTS,
    Piece,
    Skipped,
    Span,
    Value,
    View,
    parse,
    shape_of,
    value_of,
)
from trainer.data.tool_use import answered

SUFFIXES = (".jsonl", ".txt")
_SUFFIX_WORDS = "`.jsonl` (one JSON object per line) and `.txt` (one document per file) are read"


_UTF_16 = "UTF-16; convert the file (iconv -f UTF-16 -t UTF-8)"
#: How files begin that are taken for text by mistake; none of these is UTF-8.
_KINDS = {
    b"\xff\xfe": _UTF_16,
    b"\xfe\xff": _UTF_16,
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive; unpack it",
    b"\x89PNG": "a PNG image; give text",
    b"\xff\xd8\xff": "a JPEG image; give text",
}

#: Built-in sources whose records are no plain text.
_EXCHANGES: dict[str, Callable[[Optional[str]], Iterator[tuple[str, dict[str, Any]]]]] = {
    "python-questions": python_questions,
    "digits": digits,
}

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Document:
    """`id` is stable: the path inside the source (and the line), `topic/NN`, or the row's number;
    further parts of a conversation that had to be split add `#2`, ... `source` is the index of the
    source it comes from, a manifest counting as many. The rest is `shapes.Piece`'s."""

    id: str
    text: str
    source: int
    spans: Optional[tuple[Span, ...]] = None
    bos: bool = True
    cut: bool = True


#: (id, where it stands for errors, how to get it).
_Unread = tuple[str, str, Callable[[], dict[str, Any]]]


class _Record(NamedTuple):
    """`at` is what an error says, FILE:LINE; `name` the id."""

    name: str
    at: str
    shape: str
    value: Value


def documents(
    sources: tuple[Source, ...], view: Optional[View] = None, skipped: Optional[Skipped] = None
) -> Iterator[Document]:
    """The documents of all sources, in order; blank ones are left out. `view` None: plain text.
    Lines that cannot be used are added to `skipped`, or are an error where that is None.
    Errors: `DataError`."""
    require_sources(sources)
    for index, source in enumerate(expand(sources)):
        for name, piece in _kept(source, view or View(), skipped):
            yield Document(name, piece.text, index, piece.spans, piece.bos, piece.cut)


class Object(NamedTuple):
    """`source` and `id` as in `Document`; `at` is what an error says of it."""

    source: int
    id: str
    at: str
    record: dict[str, Any]


def objects(sources: tuple[Source, ...], skipped: Optional[Skipped] = None) -> Iterator[Object]:
    """The JSON objects of all sources as they stand there, for stages whose records have a shape of
    their own; each as often as `share` and `weight` say. Bad lines as in `documents`. Errors:
    `DataError`, also for what holds no objects."""
    require_sources(sources)
    for index, source in enumerate(expand(sources)):
        kept = 0
        for name, at, load in _unread(source):
            copies = int(source.weight)
            copies += hash_fraction(f"weight/{name}") < source.weight - copies
            if hash_fraction(name) >= source.share or not copies:
                continue
            if (record := _attempt(load, skipped)) is not None:
                kept += 1
                yield from [Object(index, name, at, record)] * copies
        if not kept:
            raise DataError(f"{source_name(source)}: holds no record that can be used")


def require_sources(sources: tuple[Source, ...]) -> None:
    """Errors: `DataError` when there is none."""
    if not sources:
        raise DataError("no data: name a source under `data.train` or `data.validation`")


def source_name(source: Source) -> str:
    """What people call a source: its path (of a copy, the URI), `hf:NAME:SPLIT`, or
    `python-reference/SPLIT`."""
    if source.hf is not None:
        return hub.hub_name(source.hf)
    if source.path is not None or source.manifest is not None:
        return copies.origin(str(source.path or source.manifest))
    return f"{source.builtin}/{source.split}" if source.split else str(source.builtin)


def shards(source: Source) -> int:
    """The number of files of a source (one that has no files counts as 1). Errors: `DataError`."""
    return 1 if source.path is None else len(_files(source.path))


def sample_names(
    sources: tuple[Source, ...], only: Optional[set[tuple[int, str]]] = None
) -> dict[tuple[int, str], str]:
    """(index of the source, a manifest counting as many; document id) -> what people call the
    sample: `id` or `sample_id` of a JSONL line, else `FILE-LINE` without the suffix; of a `.txt`
    file its name without it. `only`: of these few, without reading further than they stand."""
    names: dict[tuple[int, str], str] = {}
    for index, source in enumerate(expand(sources)):
        for name, path in _files(source.path) if source.path is not None else ():
            if path.suffix != ".jsonl":
                names[index, name] = path.stem
                continue
            wanted = _lines_of(name, index, only) if only is not None else None
            last = None if wanted is None else max(wanted, default=0)
            with path.open("rb") as file:
                for number, line in enumerate(islice(file, last), 1):
                    if wanted is not None and number not in wanted:
                        continue
                    content = line.removeprefix(b"\xef\xbb\xbf").strip()
                    try:
                        record: Any = json.loads(content)
                    except ValueError:  # blank, or a bad line: an error or skipped elsewhere
                        continue
                    if not isinstance(record, dict):
                        continue
                    given = record.get("id", record.get("sample_id", f"{path.stem}-{number}"))
                    names[index, f"{name}:{number}"] = str(given)
    return names


def _lines_of(name: str, index: int, only: set[tuple[int, str]]) -> set[int]:
    """The numbers of the lines of a file that are among `only`."""
    places = (at.partition("#")[0].rpartition(":") for i, at in only if i == index)
    return {int(line) for file, _, line in places if file == name and line.isdigit()}


def hash_fraction(text: str) -> float:
    """sha256 of `text` as a number in [0, 1): the same everywhere."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _kept(source: Source, view: View, skipped: Optional[Skipped]) -> Iterator[tuple[str, Piece]]:
    """Every document as often as `share` and `weight` say. The two hash different strings: one
    choice does not foretell the other."""
    read = kept = 0
    for record in _records(source, view, skipped):
        read += 1
        if hash_fraction(record.name) >= source.share:
            continue
        copies = int(source.weight)
        copies += hash_fraction(f"weight/{record.name}") < source.weight - copies
        pieces = (_attempt(_pieces, skipped, record, view) or []) if copies else []
        kept += copies if pieces else 0
        for _ in range(copies):
            for number, piece in enumerate(pieces, 1):
                yield record.name + (f"#{number}" if number > 1 else ""), piece
    if not kept and skipped is not None and skipped.examples:
        raise DataError(
            f"{source_name(source)}: nothing is left: {skipped.count} lines cannot be used;"
            f" the first: {skipped.examples[0]}"
        )
    if not read:
        raise DataError(f"{source_name(source)}: holds no text; a source needs a document")
    if not kept:
        raise DataError(
            f"{source_name(source)}: share {source.share:g} and weight {source.weight:g} keep none"
            f" of its {read} documents; raise them"
        )


def _pieces(record: _Record, view: View) -> list[Piece]:
    if view.pairs or record.shape == "preference":
        return answers_of(record.value, record.shape, view, record.at)
    if isinstance(record.value, str):
        if record.shape == "text":
            return [Piece(record.value)]
        fill = hash_fraction(f"tool_use/{record.name}") < view.tool_ratio
        return [answered(record.value, record.at, fill)]
    if view.renderer is None:
        return [Piece(plain(record.value, record.at))]
    if record.shape == "messages":
        return view.renderer.conversation(record.value, record.at)
    return view.renderer.answer(record.value, record.at)


def _unread(source: Source) -> Iterator[_Unread]:
    if source.hf is not None:
        yield from _rows(source.hf)
    elif source.builtin in _EXCHANGES:
        for name, exchange in _EXCHANGES[source.builtin](source.split):
            yield name, name, partial(dict, exchange)
    elif source.builtin is not None:
        raise DataError(f"{source_name(source)}: is plain text; this stage reads records")
    else:
        for name, path in _files(str(source.path)):
            if path.suffix != ".jsonl":
                raise DataError(f"{path}: this stage reads .jsonl files, one object a line")
            yield from _lines(name, path, source.field)


def _records(source: Source, view: View, skipped: Optional[Skipped]) -> Iterator[_Record]:
    """The records of a source, blank texts left out."""
    for record in _all(source, source.format or view.default, skipped, view.pairs):
        if not isinstance(record.value, str) or record.value.strip():
            yield record


def _all(source: Source, shape: str, skipped: Optional[Skipped], pairs: bool) -> Iterator[_Record]:
    if source.builtin == "python-reference":
        for name, text in python_reference(source.split):
            yield _Record(name, name, "text", text)
    elif source.builtin == "python-preferences":
        for name, pair in python_preferences(source.split):
            yield _Record(name, name, "preference", pair)
    elif source.builtin is not None:
        for name, exchange in _EXCHANGES[source.builtin](source.split):
            yield _Record(name, name, "messages" if "messages" in exchange else "prompt", exchange)
    elif source.hf is not None:
        yield from _shaped(_rows(source.hf), source, shape, skipped, pairs)
    else:
        for name, path in _files(str(source.path)):
            if path.suffix == ".jsonl":
                lines = _lines(name, path, source.field)
                yield from _shaped(lines, source, shape, skipped, pairs)
            elif shape in (*TEXTS, "auto"):
                text = _whole(path)
                yield _Record(name, str(path), shape if shape in TEXTS else "text", text)
            else:
                raise DataError(f"{path}: a .txt file holds no `{shape}`; write them as .jsonl")


def _files(given: str) -> list[tuple[str, Path]]:
    """(name inside the source, path) of every file, sorted by name."""
    path = local_path(given)
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
    try:
        found = [p for p in base.glob(str(path.relative_to(base))) if p.is_file()]
    except ValueError as error:  # `**` beside other letters, before Python 3.13
        raise DataError(f"{given}: cannot be matched: {error}") from error
    found = [p for p in found if not _hidden(p.relative_to(base))]
    if not found:
        raise DataError(f"{given}: no file matches this pattern (looked in {Path.cwd()})")
    strangers = sorted(str(p) for p in found if p.suffix not in SUFFIXES)
    if strangers:
        raise DataError(f"{given}: matches {strangers[0]}; only {_SUFFIX_WORDS}")
    return _named(found, base)


def local_path(given: str) -> Path:
    """A path of this machine, plain or as file:///PATH. Errors: `DataError`."""
    scheme, separator, rest = given.partition("://")
    if not separator:
        try:
            return Path(given).expanduser()
        except RuntimeError as error:
            raise DataError(f"{given}: no such user; write the path in full") from error
    if scheme != "file":
        raise DataError(
            f"{given}: cannot read `{scheme}://` data; allowed: a file, folder or glob on this"
            " machine (plain, or as file:///PATH); gs:// and s3:// are fetched before, by"
            " `python -m trainer inputs`"
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


def _whole(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return _decode(content.removeprefix(b"\xef\xbb\xbf"), str(path))


def _lines(name: str, path: Path, key: str) -> Iterator[_Unread]:
    """Every line that is not blank; lines are cut at b"\\n" only, as JSON Lines are."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    at = f"{path}:{number}"
                    yield f"{name}:{number}", at, partial(_object, line, key, at)
    except OSError as error:
        raise _unreadable(path, error) from error


def _rows(dataset: Hub) -> Iterator[_Unread]:
    """Every row of a dataset of the hub, by its number from 0."""
    for number, row in enumerate(hub.rows(dataset)):
        yield str(number), f"{hub.hub_name(dataset)}: row {number}", partial(dict, row)


def _object(line: bytes, key: str, at: str) -> dict[str, Any]:
    content = _decode(line, at).strip()
    if "\0" in content:  # JSON writes it as \u0000
        raise DataError(f"{at}: not text: byte 0x00 at {line.index(0)}; give a .jsonl file")
    return parse(content, key, at)


def _shaped(
    unread: Iterable[_Unread], source: Source, shape: str, skipped: Optional[Skipped], pairs: bool
) -> Iterator[_Record]:
    """The records of one file; `auto` is settled by the first one that can be read."""
    for name, at, load in unread:
        record = _attempt(load, skipped)
        if record is None:
            continue
        if shape == "auto":
            shape = _attempt(shape_of, skipped, record, source.field, at, pairs) or "auto"
        if shape != "auto":
            value = _attempt(value_of, skipped, record, shape, source.field, at)
            if value is not None:
                yield _Record(name, at, shape, value)


def _attempt(
    make: Callable[..., _Result], skipped: Optional[Skipped], *arguments: Any
) -> Optional[_Result]:
    """What `make` gives, or None where its `DataError` was noted in `skipped`."""
    try:
        return make(*arguments)
    except DataError as error:
        if skipped is None:
            raise
        skipped.add(error)
        return None


def _decode(content: bytes, at: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        for mark, words in _KINDS.items():
            if content.startswith(mark):
                raise DataError(f"{at}: not text: begins like {words}") from error
        raise DataError(
            f"{at}: not UTF-8: byte 0x{content[error.start]:02x} at {error.start};"
            " convert the file (iconv -t UTF-8)"
        ) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}")
