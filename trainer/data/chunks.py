"""Documents as token ids in one flat array, cut into chunks no longer than a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from trainer.config import ConfigError, Source
from trainer.data import DataError
from trainer.data.read import Document, documents, require_sources, shards, source_name

#: What is tokenised in one call: enough to keep all cores busy, little enough to stop early.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1_000_000
_SAMPLE_IDS = 3


@dataclass(frozen=True)
class Chunks:
    """Chunk i is `tokens[starts[i] : starts[i] + lengths[i]]`. Its first `supervised[i]` tokens
    have a successor in their document: all of them where the document goes on after the chunk, all
    but the last where it ends. `sources`: of each {name, shards, documents, tokens, sample_ids}.
    Chunk i is part of `documents[document[i]]`: (index of the source, id of the document)."""

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    end_of_text: int
    sources: list[dict[str, Any]]
    document: NDArray[np.int64]
    documents: list[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.starts)

    def offset(self, chunk: int) -> int:
        """The token of its document at which a chunk begins."""
        first = np.searchsorted(self.document, self.document[chunk])
        return int(self.starts[chunk] - self.starts[first])

    def spans(self, chunks: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """(start, length, supervised) of the given chunks."""
        columns = (self.starts[chunks], self.lengths[chunks], self.supervised[chunks])
        return zip(*(column.tolist() for column in columns))


def read_chunks(
    sources: tuple[Source, ...],
    tokenizer: Any,
    *,
    sequence_length: int,
    limit: Optional[int] = None,
    worth: Callable[[int], int] = lambda tokens: 1,
) -> Chunks:
    """Every document of `sources`, tokenised (BOS where the tokenizer itself puts it, EOS after
    each) and cut into chunks of at most `sequence_length` tokens. A special token that is written
    out in a text is read as that token: text rendered from a chat template relies on it.

    `limit`: stop reading when the sum of `worth(tokens of a document)` reaches it, every source
    giving an equal part, or more where others have less. Errors: `DataError`, also where nothing
    is left to learn; `ConfigError` for a tokenizer without EOS."""
    require_sources(sources)
    encoder = _Encoder(tokenizer)
    parts: list[NDArray[np.int32]] = []
    names: list[tuple[int, str]] = []
    facts: list[dict[str, Any]] = []
    have = 0
    for index, source in enumerate(sources):
        quota = None if limit is None else have + -(-(limit - have) // (len(sources) - index))
        ids: dict[str, None] = {}
        before = len(parts)
        for document, tokens in encoder(documents((source,))):
            parts.append(tokens)
            names.append((index, document.id))
            if len(ids) < _SAMPLE_IDS:
                ids[document.id] = None
            have += worth(len(tokens))
            if quota is not None and have >= quota:
                break
        facts.append(
            {
                "name": source_name(source),
                "shards": shards(source),
                "documents": len(parts) - before,
                "tokens": sum(map(len, parts[before:])),
                "sample_ids": list(ids),
            }
        )
    starts, lengths, supervised, document_of = _cut(
        np.array([len(p) for p in parts]), sequence_length
    )
    if not len(starts):
        read = ", ".join(fact["name"] for fact in facts)
        raise DataError(f"{read}: no token to learn: every document is a single token")
    tokens_of_all = np.concatenate(parts)
    return Chunks(
        tokens_of_all, starts, lengths, supervised, encoder.eos, facts, document_of, names
    )


class _Encoder:
    """Documents to token ids, in batches."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"tokenizer {tokenizer.name_or_path or ''}: has no end-of-text token, so documents"
                " cannot end; set `eos_token` in its tokenizer_config.json"
            )
        self.eos = int(tokenizer.eos_token_id)
        bos = tokenizer.bos_token_id
        puts_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self.bos: Optional[int] = int(bos) if puts_bos else None

    def __call__(self, found: Iterable[Document]) -> Iterator[tuple[Document, NDArray[np.int32]]]:
        for batch in _batches(found):
            encoded = self.tokenizer(
                [document.text for document in batch],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            for document, ids in zip(batch, encoded):
                yield document, np.array(self._framed(ids), dtype=np.int32)

    def _framed(self, ids: list[int]) -> list[int]:
        """BOS and EOS around a document, unless its own text already holds them there."""
        if self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in found:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _cut(
    sizes: NDArray[np.int64], sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(starts, lengths, supervised, document) of the chunks of documents of `sizes` tokens. A last
    chunk of a single token is left out: it would have nothing to learn, and nobody after it to
    help."""
    counts = -(-(sizes - 1) // sequence_length)
    document = np.repeat(np.arange(len(sizes)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.cumsum(sizes) - sizes)[document] + nth * sequence_length
    left = sizes[document] - nth * sequence_length
    lengths = np.minimum(left, sequence_length)
    return starts, lengths, np.minimum(left - 1, sequence_length), document
