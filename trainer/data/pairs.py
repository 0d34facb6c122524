"""Pairs of answers as rows: the chosen text and the rejected one stand side by side in one row,
each a segment of its own, and what packing moves is the pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import numpy as np

from trainer.config import Source
from trainer.data import DataError
from trainer.data.chunks import SAMPLE_IDS, Chunks, Encoder, Learned, Tokens, source_facts
from trainer.data.manifest import expand
from trainer.data.pack import Packing, one_per_row, pack
from trainer.data.read import Document, documents, require_sources
from trainer.data.shapes import Skipped, View
from trainer.data.stream import Rows


class _Side(NamedTuple):
    document: Document
    tokens: Tokens
    learned: Learned
    whole: bool


@dataclass
class _Read:
    """The answers in order, chosen and rejected in turn."""

    sides: list[_Side] = field(default_factory=list)
    names: list[tuple[int, str]] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)


def build_pairs(
    sources: tuple[Source, ...],
    tokenizer: Any,
    *,
    sequence_length: int,
    packing: bool,
    limit_rows: Optional[int] = None,
    view: View,
) -> Rows:
    """Read, tokenise and lay out pairs: with `packing` several in a row of `sequence_length`
    tokens, best fit first, else one. Both texts have positions from 0.

    A pair that is too long loses the end of its longer answer, then, from half a row on, that of
    both. One of which no differing answer is left is left out and counted. `limit_rows`: read only
    as much as fills that many. Errors: those of `build_rows`; `DataError` when no pair is left."""
    require_sources(sources)
    sources, read = expand(sources), _Read()
    encoder = Encoder(tokenizer, sequence_length)
    limit = None
    if limit_rows is not None:
        limit = limit_rows * (sequence_length if packing else 1)
    have = 0
    for index, source in enumerate(sources):
        quota = None if limit is None else have + -(-(limit - have) // (len(sources) - index))
        have = _read_source(source, encoder, view, read, have, quota, packing)
    if not read.sides:
        names = ", ".join(fact["name"] for fact in read.facts)
        count = sum(fact.get("unsupervised", 0) for fact in read.facts)
        raise DataError(
            f"{names}: no pair to learn from: of all {count} pairs, {sequence_length} tokens hold"
            " nothing in which the answers differ; raise data.sequence_length"
        )
    chunks = _chunks(read, encoder.eos)
    units = chunks.lengths.reshape(-1, 2).sum(axis=1)
    layout = _of_both(pack(units, sequence_length) if packing else one_per_row(len(units)))
    if limit_rows is not None:
        layout = layout.first(limit_rows)
    return Rows(chunks, layout, sequence_length, fixed=packing)


def _read_source(
    source: Source,
    encoder: Encoder,
    view: View,
    read: _Read,
    have: int,
    quota: Optional[int],
    packing: bool,
) -> int:
    """Add the pairs of one source; `have` with what they are worth, in tokens of packed rows or in
    rows."""
    skipped = Skipped() if view.skip_bad else None
    before, unsupervised, truncated = len(read.sides), 0, 0
    ids: dict[str, None] = {}
    for one, other in _twos(source, encoder, view, skipped):
        chosen, rejected = _fitted(one, other, encoder.sequence_length)
        truncated += not (chosen.whole and rejected.whole)
        if not _differ(chosen, rejected):
            unsupervised += 1
            continue
        read.sides += [chosen, rejected]
        read.names += [(len(read.facts), side.document.id) for side in (chosen, rejected)]
        if len(ids) < SAMPLE_IDS:
            ids[chosen.document.id] = None
        have += len(chosen.tokens) + len(rejected.tokens) - 2 if packing else 1
        if quota is not None and have >= quota:
            break
    added = read.sides[before:]
    tokens = sum(len(side.tokens) for side in added)
    facts = source_facts(
        source, len(added) // 2, tokens, ids, skipped,
        truncated=truncated, unsupervised=unsupervised,
    )  # fmt: skip
    read.facts.append({**facts, "unit": "pair"})
    return have


def _twos(
    source: Source, encoder: Encoder, view: View, skipped: Optional[Skipped]
) -> Iterator[tuple[_Side, _Side]]:
    sides = (
        _Side(document, tokens, _known(learned), whole)
        for document, tokens, learned, whole in encoder(documents((source,), view, skipped))
    )
    return zip(sides, sides)


def _known(learned: Optional[Learned]) -> Learned:
    assert learned is not None, "an answer is a part of its text"
    return learned


def _fitted(one: _Side, other: _Side, sequence_length: int) -> tuple[_Side, _Side]:
    """Both answers within one row, learned from where their tokens part. A text's last token is
    only predicted, so it takes no place."""
    sizes = [len(side.tokens) - 1 for side in (one, other)]
    room = max(sequence_length // 2, sequence_length - min(sizes))
    # A token that holds the end of the prompt and the begin of one answer is learned, and what
    # stands there in the other text with it: both go on from the same tokens.
    first = min(int(side.learned.argmax()) for side in (one, other))
    apart = np.flatnonzero(one.tokens[:first] != other.tokens[:first])
    begin = int(apart[0]) if len(apart) else first
    fitted = []
    for side, size in zip((one, other), sizes):
        learned = side.learned[: room + 1].copy()
        learned[begin : int(side.learned.argmax())] = True
        fitted.append(
            _Side(side.document, side.tokens[: room + 1], learned, side.whole and size <= room)
        )
    return fitted[0], fitted[1]


def _differ(one: _Side, other: _Side) -> bool:
    """Whether both have something to learn, and not the same."""
    learns = all(side.learned[1:].any() for side in (one, other))
    return learns and not np.array_equal(one.tokens, other.tokens)


def _chunks(read: _Read, end_of_text: int) -> Chunks:
    """A chunk for each answer; its last token is a target alone."""
    sizes = np.array([len(side.tokens) for side in read.sides], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    targets = np.array([side.learned[1:].sum() for side in read.sides], dtype=np.int64)
    return Chunks(
        tokens=np.concatenate([side.tokens for side in read.sides]),
        starts=starts,
        lengths=sizes - 1,
        supervised=sizes - 1,
        learned=np.concatenate([side.learned for side in read.sides]),
        targets=targets,
        end_of_text=end_of_text,
        sources=read.facts,
        document=np.arange(len(sizes)),
        documents=read.names,
        sizes=sizes,
        cut=np.zeros(len(sizes), dtype=np.bool_),
    )


def _of_both(pairs: Packing) -> Packing:
    """The same rows, of answers 2p and 2p + 1 instead of pair p."""
    items = np.stack([2 * pairs.items, 2 * pairs.items + 1], axis=1).ravel()
    return Packing(items, 2 * pairs.starts)
