"""Tokens, rows and their order: what the loop draws its micro-batches from.

`build_rows` tokenises and packs; `Stream` is the endless, resumable order of training;
`validation_batches` goes over everything once. Rows know no rank and no epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.batch import IGNORE, Batch
from trainer.config import Source
from trainer.data import DataError
from trainer.data.chunks import Chunks, read_chunks
from trainer.data.pack import Packing, one_per_row, pack
from trainer.data.shapes import View

#: Tokens that `Rows.digest` looks at, at most about so many.
_HASHED = 1 << 20


class Rows:
    """Rows of at most `sequence_length` tokens, made of `chunks` as `packing` says. `fixed`: every
    row is `sequence_length` long (packed rows); else a batch is cut to its longest row. `repeats`:
    the steps in a row that a stream gives them to. `apart`: that of their batches."""

    repeats = 1
    apart = False

    def __init__(
        self,
        chunks: Chunks,
        packing: Packing,
        sequence_length: int,
        *,
        fixed: bool,
    ) -> None:
        self.chunks, self.packing = chunks, packing
        self.sequence_length, self.fixed = sequence_length, fixed
        self.summary: dict[str, Any] = self._summary()

    def __len__(self) -> int:
        return len(self.packing)

    def first(self, rows: int) -> Rows:
        """The first `rows` of them; 0: all."""
        if not 0 < rows < len(self):
            return self
        kept = self.packing.first(rows)
        found = Rows(self.chunks, kept, self.sequence_length, fixed=self.fixed)
        found.apart = self.apart
        return found

    @cached_property
    def digest(self) -> str:
        """Tells other texts, tokens, masks or layouts apart: a checkpoint's position is of these
        rows. Of a large store, a sample of the tokens is hashed, and of what is learned of them."""
        tokens, lengths = self.chunks.tokens, self.chunks.lengths[self.packing.items]
        sample = slice(None, None, max(1, len(tokens) // _HASHED))
        digest = hashlib.sha256(str(len(tokens)).encode())
        arrays = [tokens[sample], lengths, self.packing.starts]
        if self.chunks.learned is not None:
            arrays.append(np.packbits(self.chunks.learned[sample]))
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows `indices` as int64 tensors [rows, length]. What a row does not use is a segment
        of its own: positions from 0, no targets. Its token is an existing one, never a pad token
        that the model may not have; nothing recognises padding by its id."""
        rows = [self.packing[index] for index in indices]
        lengths = self.chunks.lengths
        longest = max(int(lengths[row].sum()) for row in rows)
        width = self.sequence_length if self.fixed else longest
        ids = np.full((len(rows), width), self.chunks.end_of_text, dtype=np.int64)
        positions = np.empty_like(ids)
        targets = np.full_like(ids, IGNORE)
        for i, row in enumerate(rows):
            at = 0
            for start, length, supervised in self.chunks.spans(row):
                ids[i, at : at + length] = self.chunks.tokens[start : start + length]
                positions[i, at : at + length] = np.arange(length)
                # The token after a chunk is known where the document goes on.
                following = slice(start + 1, start + 1 + supervised)
                wanted = self.chunks.tokens[following]
                if self.chunks.learned is not None:
                    wanted = np.where(self.chunks.learned[following], wanted, IGNORE)
                targets[i, at : at + supervised] = wanted
                at += length
            positions[i, at:] = np.arange(width - at)
        made = Batch(*(torch.from_numpy(array) for array in (ids, positions, targets)))
        made.apart = self.apart
        return made

    def _summary(self) -> dict[str, Any]:
        """`sources`: {name, shards, documents, tokens, sample_ids, ...} as read; the rest is about
        the rows. `padding_share` of unpacked rows is that of one batch of all of them."""
        used = self.packing.items
        lengths = self.chunks.lengths[used]
        tokens = int(lengths.sum())
        per_row = np.add.reduceat(lengths, self.packing.starts[:-1])
        width = self.sequence_length if self.fixed else int(per_row.max())
        return {
            "sources": self.chunks.sources,
            "rows": len(self),
            "tokens": tokens,
            "supervised_tokens": int(self.chunks.targets[used].sum()),
            "padding_share": 1 - tokens / (len(self) * width),
        }


def build_rows(
    sources: tuple[Source, ...],
    tokenizer: Any,
    *,
    sequence_length: int,
    packing: bool,
    limit_rows: Optional[int] = None,
    view: Optional[View] = None,
) -> Rows:
    """Read, tokenise (BOS where the tokenizer puts it, EOS after every document) and lay out rows.

    A document longer than `sequence_length` becomes several chunks, each with positions from 0.
    `limit_rows`: read only as much, from every source alike, as fills that many rows. `view`: how
    records are seen (None: as plain text), which also says what of them is learned. Errors:
    `DataError`, also where no token has a successor to learn; `ConfigError` without an EOS."""

    def worth(tokens: int) -> int:
        """What a document adds to `limit`: tokens of packed rows, or rows."""
        return tokens - 1 if packing else -(-(tokens - 1) // sequence_length)

    limit = None
    if limit_rows is not None:
        limit = limit_rows * (sequence_length if packing else 1)
    chunks = read_chunks(
        sources, tokenizer, sequence_length=sequence_length, limit=limit, worth=worth, view=view
    )
    layout = pack(chunks.lengths, sequence_length) if packing else one_per_row(len(chunks))
    if limit_rows is not None:
        layout = layout.first(limit_rows)
    return Rows(chunks, layout, sequence_length, fixed=packing)


class Stream:
    """An endless order of rows. Epoch e is a permutation drawn from (seed, e), and the row counter
    `position` is the only state, but for `served` where rows serve several steps; a step takes the
    next `rows_per_step` rows. How those are cut, over ranks and micro-batches, never changes which
    they are."""

    def __init__(
        self,
        rows: Rows,
        *,
        micro_batch: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        if min(micro_batch, accumulate, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"micro_batch {micro_batch}, accumulate {accumulate}, rank {rank} of {world_size}"
            )
        self.rows = rows
        self.micro_batch = micro_batch
        self.rows_per_step = micro_batch * accumulate * world_size
        self.position = 0
        self.served = 0  # steps that have had the rows at `position`
        #: Called with the rows of a phase that begins.
        self.changed: Callable[[Rows], None] = lambda rows: None
        self.curriculum: list[list[float]] = []  # [sequence_length, until] of shorter rows
        self._rank, self._world_size = rank, world_size
        self._entropy = seed % 2**64
        self._permutation = lru_cache(maxsize=2)(self._permute)

    @property
    def reading_batch(self) -> int:
        """The rows of a micro-batch where rows have their whole length, as held-out ones have."""
        return self.micro_batch

    def next_group(self) -> list[Batch]:
        """This rank's micro-batches of the next step; afterwards the position is behind it, once
        the rows have served as many steps as they are to."""
        share = self.rows_per_step // self._world_size
        begin = self.position + self._rank * share
        batches = []
        for places in _parts(range(begin, begin + share), self.micro_batch):
            batches.append(self.rows.batch(self._rows_at(places)))
            batches[-1].places = places
        self.served += 1
        self._advance()
        return [batch.pinned() for batch in batches] if torch.cuda.is_available() else batches

    def advance(self, step: int, progress: float) -> bool:
        """Whether rows become longer with `step` (counted from 0), at `progress` of the horizon:
        here they never do."""
        del step, progress
        return False

    def resize(self, micro_batch: int) -> None:
        """From now on, cut the same global batch into micro-batches of at most `micro_batch`."""
        if micro_batch < 1:
            raise ValueError(f"micro_batch {micro_batch}: must be at least 1")
        self.micro_batch = micro_batch

    def steps_for_epochs(self, epochs: float) -> int:
        """The steps that see every row `epochs` times, the last one whole; at least 1."""
        # A decimal number as written: 0.1 of 30 rows is 3 rows, not a hair more.
        seen = Fraction(str(epochs)) * len(self.rows)
        return max(1, math.ceil(seen / self.rows_per_step)) * self.rows.repeats

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.position,
            **({"served": self.served} if self.served else {}),
            "epoch_rows": len(self.rows),
            "digest": self.rows.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the rows already seen. Errors: `DataError` if the data is not the same."""
        self.check(state, self.rows)
        self.position, self.served = state["position"], state.get("served", 0)
        self._advance()  # they may serve fewer steps now

    def check(self, state: dict[str, Any], rows: Rows) -> None:
        """Errors: `DataError` where `state` is of other data than `rows`, or of rows of other
        lengths."""
        if (state["epoch_rows"], state["digest"]) != (len(rows), rows.digest):
            raise DataError(
                f"the data changed: the checkpoint was made with {state['epoch_rows']} rows, now"
                f" there are {len(rows)}, of other content; restore the data, its order and"
                " the tokenizer, or start a new run"
            )
        if state.get("curriculum", []) != self.curriculum:
            raise DataError(
                "data.curriculum changed: the checkpoint was made with"
                f" {state.get('curriculum', []) or 'none'}, now it is {self.curriculum or 'none'}"
                " ([sequence_length, until]); restore it, or start a new run"
            )

    def _advance(self) -> None:
        if self.served >= self.rows.repeats:
            self.position, self.served = self.position + self.rows_per_step, 0

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        generator = np.random.Generator(np.random.PCG64([self._entropy, epoch]))
        return generator.permutation(len(self.rows))

    def _rows_at(self, places: Sequence[int]) -> list[int]:
        epoch_rows = len(self.rows)
        return [int(self._permutation(p // epoch_rows)[p % epoch_rows]) for p in places]


def validation_batches(
    rows: Rows, micro_batch: int, rank: int, world_size: int, limit: int = 0
) -> Iterator[Batch]:
    """This rank's part of the first `limit` rows (0: of all), each once over all ranks; the numbers
    of batches may differ. Which rows those are depends on no cut."""
    for part in list(_parts(_first(rows, limit), micro_batch))[rank::world_size]:
        yield rows.batch(part)


def batches_a_rank(rows: Rows, micro_batch: int, world_size: int, limit: int = 0) -> int:
    """The most batches that `validation_batches` has for any rank."""
    return -(-len(_first(rows, limit)) // (micro_batch * world_size))


def _first(rows: Rows, limit: int) -> range:
    return range(min(limit, len(rows)) if limit else len(rows))


def _parts(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[i : i + size] for i in range(0, len(indices), size))
