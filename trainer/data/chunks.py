"""Documents as token ids in one flat array, cut into chunks no longer than a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from trainer.config import ConfigError, Source
from trainer.data import DataError
from trainer.data.manifest import expand
from trainer.data.read import Document, documents, require_sources, shards, source_name
from trainer.data.shapes import Skipped, Span, View

#: What is tokenised in one call: enough to keep all cores busy, little enough to stop early.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1_000_000
#: Documents of a source of which the ids are noted.
SAMPLE_IDS = 3


Tokens = NDArray[np.int32]
Learned = NDArray[np.bool_]


@dataclass(frozen=True)
class Chunks:
    """Chunk i is `tokens[starts[i] : starts[i] + lengths[i]]`. Its first `supervised[i]` tokens
    have a successor in their document: all of them where the document goes on after the chunk, all
    but the last where it ends. `learned` [tokens]: which tokens are to be predicted (None: all);
    `targets[i]` of them are successors in chunk i, at least one. `sources`: of each {name, shards,
    documents, tokens, sample_ids} and, where there are any, `truncated` and `unsupervised`
    documents and `skipped` lines with `skipped_lines`, the first of them.
    Chunk i is part of `documents[document[i]]`: (index of the source, id of the document). `sizes`:
    tokens of each document, all of which lie in `tokens`, one behind the other; `cut`: whether it
    goes on in further chunks (text), or loses its end (an exchange)."""

    tokens: Tokens
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    learned: Optional[Learned]
    targets: NDArray[np.int64]
    end_of_text: int
    sources: list[dict[str, Any]]
    document: NDArray[np.int64]
    documents: list[tuple[int, str]]
    sizes: NDArray[np.int64]
    cut: NDArray[np.bool_]

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


@dataclass
class _Read:
    """Documents as tokens, each with what of it is learned (None: all)."""

    tokens: list[Tokens]
    learned: list[Optional[Learned]]
    names: list[tuple[int, str]]
    cut: list[bool]
    facts: list[dict[str, Any]]


def read_chunks(
    sources: tuple[Source, ...],
    tokenizer: Any,
    *,
    sequence_length: int,
    limit: Optional[int] = None,
    worth: Callable[[int], int] = lambda tokens: 1,
    view: Optional[View] = None,
) -> Chunks:
    """Every document of `sources`, tokenised (BOS where the tokenizer itself puts it, EOS after
    each) and cut into chunks of at most `sequence_length` tokens. A special token that is written
    out in a text is read as that token: text rendered from a chat template relies on it.

    `limit`: stop reading when the sum of `worth(tokens of a document)` reaches it, every source
    giving an equal part, or more where others have less. `view`: how records are seen. Errors:
    `DataError`, also where nothing is left to learn; `ConfigError` for a tokenizer without EOS."""
    require_sources(sources)
    sources = expand(sources)
    encoder = Encoder(tokenizer, sequence_length)
    read = _Read([], [], [], [], [])
    have = 0
    for index, source in enumerate(sources):
        quota = None if limit is None else have + -(-(limit - have) // (len(sources) - index))
        have = _read_source(source, encoder, view or View(), read, have, quota, worth)
    sizes = np.array([len(part) for part in read.tokens], dtype=np.int64)
    starts, lengths, supervised, document = _cut(sizes, sequence_length)
    learned = None
    if any(part is not None for part in read.learned):
        learned = np.concatenate(
            [np.ones(n, bool) if part is None else part for n, part in zip(sizes, read.learned)]
        )
    tokens = np.concatenate(read.tokens) if read.tokens else np.zeros(0, dtype=np.int32)
    chunks = Chunks(
        tokens, starts, lengths, supervised, learned, supervised, encoder.eos, read.facts, document,
        read.names, sizes, np.array(read.cut, dtype=np.bool_),
    )  # fmt: skip
    chunks = _that_teach(chunks)
    if not len(chunks):
        raise DataError(_nothing(read.facts, sequence_length))
    return chunks


def recut(
    chunks: Chunks,
    sequence_length: int,
    used: NDArray[np.int64],
    read: NDArray[np.bool_],
) -> Chunks:
    """The documents `used` (ascending) of `chunks` in chunks of at most `sequence_length` tokens,
    without the tokens that were `read` [tokens]: what is left of a document between those begins a
    chunk of its own. An exchange has only its beginning, and none where that was read."""
    ends = np.cumsum(chunks.sizes)
    begins = ends - chunks.sizes
    wanted = np.zeros(len(chunks.sizes), dtype=np.bool_)
    wanted[used] = True
    left = np.repeat(wanted, chunks.sizes) & ~read
    if not left.any():
        return _of(chunks, *(np.zeros(0, dtype=np.int64) for _ in range(4)))
    # A run of tokens that are left ends where its document does.
    first, last = left.copy(), left.copy()
    first[1:] &= ~left[:-1]
    last[:-1] &= ~left[1:]
    first[begins[chunks.sizes > 0]] |= left[begins[chunks.sizes > 0]]
    last[ends[chunks.sizes > 0] - 1] |= left[ends[chunks.sizes > 0] - 1]
    start, end = np.flatnonzero(first), np.flatnonzero(last) + 1
    document = np.searchsorted(ends, start, side="right")
    # Of these tokens the next one is known: all but the last of a document.
    known = np.minimum(end, ends[document] - 1) - start
    count = -(-known // sequence_length)
    whole = chunks.cut[document]
    count = np.where(whole, count, np.where(start == begins[document], np.minimum(count, 1), 0))
    run = np.repeat(np.arange(len(start)), count)
    at = (np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)) * sequence_length
    starts = start[run] + at
    lengths = np.minimum(end[run] - starts, sequence_length)
    supervised = np.minimum(known[run] - at, sequence_length)
    return _of(chunks, starts, lengths, supervised, document[run])


def _of(
    chunks: Chunks,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    supervised: NDArray[np.int64],
    document: NDArray[np.int64],
) -> Chunks:
    """Other chunks of the same tokens."""
    return _that_teach(
        replace(
            chunks, starts=starts, lengths=lengths, supervised=supervised, targets=supervised,
            document=document,
        )
    )  # fmt: skip


def _that_teach(chunks: Chunks) -> Chunks:
    """`chunks` with their `targets`, without those that only ask: they teach nothing."""
    if chunks.learned is None:
        return chunks
    starts, supervised = chunks.starts, chunks.supervised
    before = np.concatenate([[0], np.cumsum(chunks.learned)])
    targets = before[starts + 1 + supervised] - before[starts + 1]
    used = targets > 0
    return replace(
        chunks, starts=starts[used], lengths=chunks.lengths[used], supervised=supervised[used],
        targets=targets[used], document=chunks.document[used],
    )  # fmt: skip


def _read_source(
    source: Source,
    encoder: Encoder,
    view: View,
    read: _Read,
    have: int,
    quota: Optional[int],
    worth: Callable[[int], int],
) -> int:
    """Add the documents of one source; `have` with what they are worth."""
    skipped = Skipped() if view.skip_bad else None
    ids: dict[str, None] = {}
    before, unsupervised, truncated = len(read.tokens), 0, 0
    for document, tokens, learned, whole in encoder(documents((source,), view, skipped)):
        truncated += not whole
        if learned is not None and not learned[1:].any():
            unsupervised += 1
            continue
        read.tokens.append(tokens)
        read.learned.append(learned)
        read.names.append((len(read.facts), document.id))
        read.cut.append(document.cut)
        if len(ids) < SAMPLE_IDS:
            ids[document.id] = None
        have += worth(len(tokens))
        if quota is not None and have >= quota:
            break
    read.facts.append(
        source_facts(
            source, len(read.tokens) - before, sum(map(len, read.tokens[before:])), ids, skipped,
            truncated=truncated, unsupervised=unsupervised,
        )
    )  # fmt: skip
    return have


def source_facts(
    source: Source,
    documents: int,
    tokens: int,
    ids: Iterable[str],
    skipped: Optional[Skipped],
    **counts: int,
) -> dict[str, Any]:
    """What `Chunks.sources` says of one source: `ids` of its first documents, and of `counts` and
    of what was `skipped` only what there is."""
    facts: dict[str, Any] = {
        "name": source_name(source),
        "shards": shards(source),
        "documents": documents,
        "tokens": tokens,
        "sample_ids": list(ids),
    }
    facts.update({name: count for name, count in counts.items() if count})
    if skipped is not None and skipped.count:
        facts.update(skipped=skipped.count, skipped_lines=skipped.examples)
    return facts


def _nothing(facts: list[dict[str, Any]], sequence_length: int) -> str:
    names = ", ".join(fact["name"] for fact in facts)
    unsupervised = sum(fact.get("unsupervised", 0) for fact in facts)
    if unsupervised:
        return (
            f"{names}: no token to learn: in all {unsupervised} documents, the first"
            f" {sequence_length} tokens hold nothing of an answer; raise data.sequence_length"
        )
    return f"{names}: no token to learn: every document is a single token"


class Encoder:
    """Documents to token ids, in batches. Errors: `ConfigError` for a tokenizer without EOS."""

    def __init__(self, tokenizer: Any, sequence_length: int) -> None:
        self.tokenizer, self.sequence_length = tokenizer, sequence_length
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"tokenizer {tokenizer.name_or_path or ''}: has no end-of-text token, so documents"
                " cannot end; set `eos_token` in its tokenizer_config.json"
            )
        self.eos = int(tokenizer.eos_token_id)
        bos = tokenizer.bos_token_id
        puts_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self.bos: Optional[int] = int(bos) if puts_bos else None

    def __call__(
        self, found: Iterable[Document]
    ) -> Iterator[tuple[Document, Tokens, Optional[Learned], bool]]:
        """Of each document its tokens, which are learned (None: all), and whether it is whole."""
        for batch in _batches(found):
            offsets = any(document.spans is not None for document in batch)
            if offsets and not self.tokenizer.is_fast:
                raise ConfigError(
                    f"tokenizer {self.tokenizer.name_or_path or ''}: cannot say which characters"
                    " its tokens stand for, so answers cannot be told from questions; use one"
                    " with a tokenizer.json"
                )
            encoded = self.tokenizer(
                [document.text for document in batch],
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=offsets,
                verbose=False,
            )
            for index, (document, ids) in enumerate(zip(batch, encoded["input_ids"])):
                learned = None
                if document.spans is not None:
                    learned = covered(encoded["offset_mapping"][index], document.spans)
                yield self._framed(document, ids, learned)

    def _framed(
        self, document: Document, ids: list[int], learned: Optional[list[bool]]
    ) -> tuple[Document, Tokens, Optional[Learned], bool]:
        """BOS and EOS around a document, unless its own text already holds them there. An EOS is
        always learned, whatever its id is used for besides."""
        begin: list[int] = []
        if document.bos and self.bos is not None and ids[:1] != [self.bos]:
            begin = [self.bos]
        end = [] if ids[-1:] == [self.eos] else [self.eos]
        ids = [*begin, *ids, *end]
        if learned is not None:
            learned = [*(False for _ in begin), *learned, *(True for _ in end)]
        # The last token of an exchange that is too long is still a target.
        whole = document.cut or len(ids) <= self.sequence_length + 1
        most = None if document.cut else self.sequence_length + 1
        kept = None if learned is None else np.array(learned[:most], dtype=np.bool_)
        return document, np.array(ids[:most], dtype=np.int32), kept, whole


def covered(offsets: Iterable[tuple[int, int]], spans: Iterable[Span]) -> list[bool]:
    """Which tokens, given as ascending [start, end) characters, hold a character of `spans`. A
    token across a border counts, so that nothing of an answer goes unlearned. Tokenizers that trim
    space off their offsets give a token of nothing but space an empty range: it then stands for
    what follows the token before it."""
    ascending = list(spans)
    found: list[bool] = []
    before = at = 0
    for start, end in offsets:
        low, high = (start, end) if end > start else (before, max(end, before + 1))
        while at < len(ascending) and ascending[at][1] <= low:
            at += 1
        found.append(at < len(ascending) and ascending[at][0] < high)
        before = max(before, end)
    return found


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
