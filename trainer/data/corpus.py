"""The built-in text `python-reference`: CPython's language reference, as `pydoc_data` holds it.

Real English with nothing to download. Topics quote each other at length ("class" is a chapter of
"compound"), so paragraphs are deduplicated before anything is held out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Optional

from trainer.data import DataError

#: Pieces are cut at paragraph borders, at about this many bytes.
PIECE_BYTES = 3000
#: A topic is held out when the hash of salt and name falls below this share.
HELDOUT_SHARE = 0.10
#: The first of 0, 1, 2, ... that holds out 9-12% of the deduplicated bytes, no topic being over a
#: third of them, in CPython 3.10, 3.11, 3.12 and 3.13: chosen by size alone, before any training.
HELDOUT_SALT = 49

_FOOTNOTE = re.compile(r"\[\d+\]")


def python_reference(split: Optional[str] = None) -> Iterator[tuple[str, str]]:
    """(`topic/NN`, text) of every piece of `split`: `train`, `heldout` or None for both.

    No paragraph occurs twice, and none of the held-out ones is in a train topic. Errors:
    `DataError` where this Python comes without the text."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "python-reference: this Python lacks pydoc_data.topics (some distributions strip it);"
            " use python.org's or your distribution's full Python, or give a `path` to your text"
        ) from error
    return iter(cut(topics, split))


def cut(topics: Mapping[str, str], split: Optional[str]) -> list[tuple[str, str]]:
    """`python_reference` over any topics: name -> text."""
    names = sorted(topics)
    heldout = [name for name in names if is_heldout(name)]
    train = [name for name in names if name not in set(heldout)]
    seen: set[str] = set()
    pieces: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
    # Train first: what occurs on both sides stays there.
    for part, members in (("train", train), ("heldout", heldout)):
        for name in members:
            fresh = _unseen(paragraphs(topics[name]), seen)
            for number, text in enumerate(_pieces(fresh)):
                pieces[part].append((f"{name}/{number:02d}", text))
    return pieces[split] if split else pieces["train"] + pieces["heldout"]


def is_heldout(topic: str, salt: int = HELDOUT_SALT) -> bool:
    """Whether a topic belongs to the held-out part; it depends on its name only."""
    digest = hashlib.sha256(f"python-reference/{salt}/{topic}".encode()).digest()
    return int.from_bytes(digest[:6], "big") < HELDOUT_SHARE * 2**48


def paragraphs(text: str) -> list[str]:
    """Blocks between blank lines, indentation kept."""
    return [block.strip("\n") for block in re.split(r"\n\s*\n", text) if block.strip()]


def paragraph_key(paragraph: str) -> str:
    """Equal for paragraphs that differ in line breaks, indentation or footnote numbers only."""
    return " ".join(_FOOTNOTE.sub(" ", paragraph).split())


def _unseen(blocks: Iterable[str], seen: set[str]) -> Iterator[str]:
    for block in blocks:
        key = paragraph_key(block)
        if key not in seen:
            seen.add(key)
            yield block


def _pieces(blocks: Iterable[str]) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for block in blocks:
        length = len(block.encode()) + 2
        if piece and size + length > PIECE_BYTES:
            yield "\n\n".join(piece)
            piece, size = [], 0
        piece.append(block)
        size += length
    if piece:
        yield "\n\n".join(piece)
