"""Which chunks share a row: best-fit-decreasing bin packing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """A sequence of rows; row r holds the chunks `items[starts[r]:starts[r + 1]]`, ascending. Rows
    are in the order of their first chunk."""

    items: Indices  # [chunks]
    starts: Indices  # [rows + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Indices:
        return self.items[self.starts[row] : self.starts[row + 1]]

    def __iter__(self) -> Iterator[Indices]:
        return (self[row] for row in range(len(self)))

    def first(self, rows: int) -> Packing:
        """The first `rows` rows."""
        starts = self.starts[: rows + 1]
        return Packing(self.items[: starts[-1]], starts)


def pack(lengths: NDArray[Any], sequence_length: int) -> Packing:
    """Put every chunk (`lengths` [n], 1 to `sequence_length` tokens) into one row of at most
    `sequence_length` tokens: longest first, each into the fullest row that has room (best fit
    decreasing, Johnson 1973). Deterministic. O(n log n) for the order, then one step for each
    group of equally long chunks that goes into equally full rows. Errors: ValueError."""
    sizes: Indices = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (sizes.min() < 1 or sizes.max() > sequence_length):
        raise ValueError(
            f"chunks of {sizes.min()} to {sizes.max()} tokens: must be in 1..{sequence_length}"
        )
    order = np.argsort(-sizes, kind="stable")
    return _in_order(_place(sizes[order], order, sequence_length))


def one_per_row(count: int) -> Packing:
    """`count` rows of one chunk each."""
    return Packing(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def _place(descending: Indices, order: Indices, sequence_length: int) -> Indices:
    """The row of every chunk; `descending` are the lengths of the chunks `order`."""
    row_of = np.empty(len(order), dtype=np.int64)
    room = _Room(sequence_length)
    borders = np.flatnonzero(np.diff(descending, prepend=-1, append=-1)).tolist()
    for begin, end in pairwise(borders):
        length = int(descending[begin])
        while begin < end:
            space, each = room.best_fit(length)
            rows = room.take(space, -(-(end - begin) // each))
            count = min(end - begin, len(rows) * each)
            # A row that is the best fit stays it until it is full: it takes `each` in a row.
            row_of[order[begin : begin + count]] = np.repeat(rows, each)[:count]
            begin += count
            in_last = count - (len(rows) - 1) * each
            room.give(space - each * length, rows[:-1])
            room.give(space - in_last * length, rows[-1:])
    return row_of


class _Room:
    """Open rows by their free space. Bit s of `mask` says that a row with s free tokens exists, so
    the best fit is the lowest bit at or above a length."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.open: dict[int, list[int]] = {}
        self.mask = 0
        self.count = 0

    def best_fit(self, length: int) -> tuple[int, int]:
        """The free space of the fullest rows with room for `length` (a new row's if there is
        none), and how many chunks of that length go into one."""
        fitting = self.mask >> length
        lowest = (fitting & -fitting).bit_length() - 1
        space = length + lowest if fitting else self.sequence_length
        return space, space // length

    def take(self, space: int, wanted: int) -> list[int]:
        """At most `wanted` rows with `space` free; new rows where none is open."""
        if not self.mask >> space & 1:
            self.count += wanted
            return list(range(self.count - wanted, self.count))
        rows = self.open[space]
        taken, rows[-wanted:] = rows[-wanted:], []
        if not rows:
            self.mask &= ~(1 << space)
        return taken

    def give(self, space: int, rows: list[int]) -> None:
        if space and rows:
            self.open.setdefault(space, []).extend(rows)
            self.mask |= 1 << space


def _in_order(row_of: Indices) -> Packing:
    _, first, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    row_of = rank[row_of]
    items = np.argsort(row_of, kind="stable").astype(np.int64)
    sizes = np.bincount(row_of, minlength=len(first))
    return Packing(items, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
