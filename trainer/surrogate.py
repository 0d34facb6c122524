"""A surrogate model's opinion of the tokens of another model's rows, whatever its own tokens are.

With another tokenizer the surrogate reads the text of each document as its own tokens. The two
meet where tokens of both begin at the same byte: there, what the surrogate expects next is about
the same text as what the model is to predict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.batch import IGNORE, Batch
from trainer.config import ConfigError, Sdce
from trainer.data.token_bytes import Reader, matches, token_bytes
from trainer.losses.heads import head_for
from trainer.models import head_weight, hidden_states
from trainer.runtime import Runtime

Indices = NDArray[np.int64]
#: Bytes of one buffer of logits.
_BUFFER = 64 * 2**20


@dataclass
class Opinion:
    """What the surrogate holds likely in place of the n supervised tokens of a batch. `ids` [n,
    1 + K]: first the token itself, then others, -1: no entry. `weights` [n, 1 + K]: of the
    entries, 0 in rows without an opinion. All on the device; counts are 0-dim.

    `covered`: tokens whose place the surrogate has too (known without waiting); `targets`: what
    the weights are a sum over; `kept`: entries besides the token itself; `agreed`: covered tokens
    that are the surrogate's first choice."""

    ids: Tensor
    weights: Tensor
    covered: int
    targets: Tensor
    kept: Tensor
    agreed: Tensor


class View(NamedTuple):
    """A batch as the surrogate reads it, with a target where it meets the model's, and which of
    the model's supervised tokens those are [m], ascending."""

    batch: Batch
    places: Tensor


class Vocabularies:
    """Which tokens of two tokenizers are the same, and how one reads the rows of the other.
    `to_ours` [their ids]: our id, or -1; `matched`: how many have one; `same`: equal vocabularies,
    where nothing has to be read again and special tokens count as well. `most`: tokens of a
    document that the surrogate may read.

    Special tokens match no bytes. In what the surrogate reads, one of ours is replaced by its
    own: the mark of the beginning or the end of a text, or one that is written alike; else it is
    left out. Errors: those of `token_bytes`; `ConfigError` where no token matches."""

    def __init__(self, ours: Any, theirs: Any, most: Optional[int] = None) -> None:
        self.same = ours.get_vocab() == theirs.get_vocab()
        self.most = most or 1 << 30
        if self.same:
            self.to_ours = np.arange(max(theirs.get_vocab().values()) + 1)
            self.matched = len(self.to_ours)
            return
        self.spelt, spelt = token_bytes(ours), token_bytes(theirs)
        self.to_ours = matches(self.spelt, spelt)
        self.matched = int((self.to_ours >= 0).sum())
        if not self.matched:
            raise ConfigError(
                f"sdce.surrogate: none of its {len(spelt)} tokens has the bytes of one of the"
                f" model's {len(self.spelt)}; take a surrogate for the same kind of text"
            )
        self.to_theirs = np.full(len(self.spelt), -1, dtype=np.int64)
        known = np.flatnonzero(self.to_ours >= 0)
        self.to_theirs[self.to_ours[known]] = known
        self.marks = np.array([part is None for part in self.spelt])
        # A special token is one unit wide, so that what stands around it stays apart.
        self.widths = np.array([1 if part is None else len(part) for part in self.spelt])
        self.special = _special(ours, theirs)
        self.reader = Reader(theirs, spelt)
        bos = theirs.bos_token_id
        puts_bos = bos is not None and theirs("a")["input_ids"][:1] == [bos]
        self.bos: Optional[int] = int(bos) if puts_bos else None

    def view(self, host: Batch) -> View:
        """The rows of `host` (on the CPU) as the surrogate reads them."""
        chunks = list(_chunks(host))
        pieces = [list(self._pieces(chunk.tokens)) for chunk in chunks]
        texts = iter(self.reader([p.text for of in pieces for p in of if p.text is not None]))
        rows: list[list[tuple[Indices, Indices]]] = [[] for _ in range(host.rows)]
        places = []
        for chunk, parts in zip(chunks, pieces):
            read, begins = self._read(parts, texts)
            wanted = self.to_theirs[chunk.tokens[chunk.at + 1]]
            ends = np.cumsum(self.widths[chunk.tokens])
            found = _predicting(begins, ends[chunk.at])
            met = (found >= 0) & (found < self.most) & (wanted >= 0)
            if not met.any():
                continue
            length = int(found[met].max()) + 1
            targets = np.full(length, IGNORE, dtype=np.int64)
            targets[found[met]] = wanted[met]
            rows[chunk.row].append((read[:length], targets))
            places.append(chunk.first + np.flatnonzero(met))
        none = np.empty(0, dtype=np.int64)
        return View(_batch(rows), torch.from_numpy(np.concatenate([none, *places])))

    def _pieces(self, tokens: Indices) -> Iterator[_Piece]:
        """The texts between special tokens, and these."""
        begin = at = 0
        for end in [*np.flatnonzero(self.marks[tokens]).tolist(), len(tokens)]:
            run = b"".join([self.spelt[i] or b"" for i in tokens[begin:end].tolist()])
            yield from _text(run, at)
            at += len(run)
            if end < len(tokens):
                yield _Piece(at, None, self.special.get(int(tokens[end])))
            begin, at = end + 1, at + 1

    def _read(self, pieces: list[_Piece], texts: Iterator[Any]) -> tuple[Indices, Indices]:
        """The surrogate's tokens of a chunk, and where each begins; -1: not to be met."""
        ids: list[int] = []
        begins: list[int] = []
        if self.bos is not None and (not pieces or pieces[0].special != self.bos):
            ids, begins = [self.bos], [-1]
        blind = False
        for piece in pieces:
            if piece.text is None:
                blind = piece.special is None
                if piece.special is not None:
                    ids.append(piece.special)
                    begins.append(piece.at)
                continue
            reading = next(texts)
            starts = np.where(reading.starts < 0, -1, reading.starts + piece.at)
            if blind:  # nobody told the surrogate what came before
                starts[:1] = -1
            ids.extend(reading.ids)
            begins.extend(starts.tolist())
            blind = False
        return np.array(ids, dtype=np.int64), np.array(begins, dtype=np.int64)


class Surrogate:
    """A frozen model with its vocabulary, asked about rows. `runtime`: where it is to run; it stays
    on the CPU until `move`."""

    def __init__(self, model: nn.Module, words: Vocabularies, runtime: Runtime) -> None:
        self.model, self.words, self.runtime = model.eval().requires_grad_(False), words, runtime
        padded = np.full(len(head_weight(model)), -1, dtype=np.int64)
        padded[: len(words.to_ours)] = words.to_ours
        self.to_ours = torch.from_numpy(padded)

    def move(self) -> None:
        """Onto the runtime's device."""
        self.model.to(self.runtime.device)
        self.to_ours = self.to_ours.to(self.runtime.device)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def hidden(self, batch: Batch) -> Tensor:
        """Its last hidden states [m, H] where `batch`, of its own tokens, has targets."""
        with self.runtime.autocast():
            return hidden_states(self.model, batch)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def opinion(self, batch: Batch, config: Sdce) -> Opinion:
        """What it thinks of a batch that is on the device (see `Opinion`)."""
        labels = batch.labels
        device, n = labels.device, len(labels)
        if self.words.same:
            view, places = batch, torch.arange(n, device=device)
        else:
            assert batch.host is not None, "call `to` first"
            read = self.words.view(batch.host)
            view, places = read.batch.to(device), read.places.to(device, non_blocking=True)
        parts = [*self._answers(view, config)] if len(places) else []
        width = 1 + min(config.k, len(self.to_ours))
        ids = labels.new_full((n, width), -1)
        ids[:, 0] = labels
        kept = torch.zeros((), dtype=torch.int64, device=device)
        if not parts:
            weights = torch.zeros(ids.shape, dtype=torch.float32, device=device)
            return Opinion(ids, weights, 0, kept, kept, kept)
        found, p, right = (torch.cat(part) for part in zip(*parts))
        ids[:, 1:].index_copy_(0, places, found)
        weights = p.new_zeros(ids.shape).index_copy_(0, places, p)
        kept = (found >= 0).sum()
        targets = kept if config.form == "parity" else (p > 0).any(dim=1).sum()
        return Opinion(ids, weights, len(places), targets, kept, right.sum())

    def _answers(self, view: Batch, config: Sdce) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        hidden, weight, gold = self.hidden(view), head_weight(self.model), view.labels
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        chunk = max(16, _BUFFER // (4 * len(weight)))
        head = head_for(hidden, weight, dtype, min(chunk, len(hidden)))
        for first in range(0, len(hidden), chunk):
            rows = hidden[first : first + chunk]
            every = torch.ones_like(rows[:, :1], dtype=torch.bool)
            p = torch.softmax(head.logits(head.operand(rows, every)), dim=1)
            yield choose(p, gold[first : first + chunk], self.to_ours, config)


def choose(p: Tensor, gold: Tensor, to_ours: Tensor, config: Sdce) -> tuple[Tensor, Tensor, Tensor]:
    """From the surrogate's distributions p [m, V], overwritten: the model's ids of the tokens kept
    [m, K] (-1: no entry), the weights [m, 1 + K] of the token itself (`gold` [m], below V) and of
    those, and whether `gold` is the first choice [m].

    Kept are, of the tokens that have an id in `to_ours` [V] and are not `gold`, the k most
    probable, as far as p >= threshold. `soft`: with them goes `gold`, and the weights are
    p / sum of p over both, so that a row adds up to 1; a row where nothing, `gold` neither, comes
    to the threshold has none. `parity`: softmax over the kept ones of -1 / p, and 0 for `gold`."""
    right = p.argmax(dim=1) == gold
    own = p.gather(1, gold.unsqueeze(1))
    p.masked_fill_(to_ours < 0, 0).scatter_(1, gold.unsqueeze(1), 0)
    top = p.topk(min(config.k, p.shape[1]), dim=1)
    # Above what has a reciprocal: other tokens of no probability stand among the first k too.
    kept = (top.values >= config.threshold) & (top.values > torch.finfo(p.dtype).tiny)
    ids = to_ours[top.indices].masked_fill(~kept, -1)
    some = kept.any(dim=1, keepdim=True)
    if config.form == "parity":
        surprise = (-1 / top.values).masked_fill(~kept, -torch.inf).masked_fill(~some, 0)
        weights = torch.softmax(surprise, dim=1).masked_fill(~kept, 0)
        return ids, torch.cat([torch.zeros_like(own), weights], dim=1), right
    both = torch.cat([own, top.values.masked_fill(~kept, 0)], dim=1)
    counts = some | (own >= config.threshold)
    share = both / both.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return ids, share.masked_fill(~counts, 0), right


class _Chunk(NamedTuple):
    """A chunk of a document in row `row`: its tokens with the last target; the places `at` in it
    that have a target, the first of which is the batch's `first`."""

    row: int
    tokens: Indices
    at: Indices
    first: int


class _Piece(NamedTuple):
    """Text that begins `at` a unit of its chunk, or (`text` None) a special token: the surrogate's
    own for it, if any."""

    at: int
    text: Optional[str]
    special: Optional[int]


def _chunks(batch: Batch) -> Iterator[_Chunk]:
    first = 0
    for row in range(batch.rows):
        ids, targets = batch.input_ids[row].numpy(), batch.targets[row].numpy()
        borders = np.flatnonzero(batch.position_ids[row].numpy() == 0).tolist()
        for begin, end in zip(borders, [*borders[1:], len(ids)]):
            at = np.flatnonzero(targets[begin:end] != IGNORE)
            if not len(at):
                continue
            # The last target may be the first token of the next chunk.
            last = begin + int(at[-1])
            yield _Chunk(row, np.append(ids[begin : last + 1], targets[last]), at, first)
            first += len(at)


def _text(run: bytes, at: int) -> Iterator[_Piece]:
    """The whole characters of a run of bytes, which a chunk's ends may have cut; nothing where it
    is no UTF-8 besides."""
    begin = 0
    while begin < min(3, len(run)) and run[begin] & 0xC0 == 0x80:
        begin += 1
    for end in range(len(run), max(begin, len(run) - 4), -1):  # up to 3 of 4 bytes
        try:
            yield _Piece(at + begin, run[begin:end].decode(), None)
            return
        except UnicodeDecodeError:
            continue


def _predicting(begins: Indices, wanted: Indices) -> Indices:
    """The position before the token that begins at each of `wanted` (ascending, as is `begins` but
    for -1), or -1. Of several that begin there, all but the last are empty."""
    known = np.flatnonzero(begins >= 0)
    if not len(known):
        return np.full(len(wanted), -1, dtype=np.int64)
    after = np.searchsorted(begins[known], wanted, side="right") - 1
    found = known[after.clip(min=0)]
    met = (after >= 0) & (begins[found] == wanted)
    return np.where(met, found - 1, -1)


def _batch(rows: list[list[tuple[Indices, Indices]]]) -> Batch:
    """Chunks of (tokens, targets) as rows of equal length; the rest of a row is a segment of its
    own, without targets."""
    width = max(sum(len(ids) for ids, _ in row) for row in rows) or 1
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions, targets = np.empty_like(ids), np.full_like(ids, IGNORE)
    for i, row in enumerate(rows):
        at = 0
        for tokens, wanted in row:
            here = slice(at, at + len(tokens))
            ids[i, here], targets[i, here] = tokens, wanted
            positions[i, here] = np.arange(len(tokens))
            at += len(tokens)
        positions[i, at:] = np.arange(width - at)
    return Batch(*(torch.from_numpy(array) for array in (ids, positions, targets)))


def _special(ours: Any, theirs: Any) -> dict[int, int]:
    """Our special tokens -> those that the surrogate reads in their place."""
    alike = {
        token.content: index
        for index, token in theirs.added_tokens_decoder.items()
        if token.special
    }
    found = {
        index: alike[token.content]
        for index, token in ours.added_tokens_decoder.items()
        if token.content in alike
    }
    for name in ("bos_token_id", "eos_token_id"):
        own, other = getattr(ours, name), getattr(theirs, name)
        if own is not None and other is not None:
            found[own] = other
    return found
