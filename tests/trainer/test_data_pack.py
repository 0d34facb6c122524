"""Packing: every chunk once, no row too long, little padding."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.pack import one_per_row, pack


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    sequence_length = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(1, sequence_length), max_size=60)), sequence_length


def textbook(lengths: list[int], sequence_length: int) -> int:
    """Best fit decreasing as defined, one chunk at a time; the number of rows."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else sequence_length) - length)
    return len(free)


@given(problem=problems())
@settings(max_examples=300, derandomize=True, deadline=None)
def test_every_chunk_is_placed_once_and_no_row_overflows(problem: tuple[list[int], int]) -> None:
    lengths, sequence_length = problem
    rows = list(pack(np.array(lengths, dtype=np.int64), sequence_length))
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= sequence_length for row in rows)


@given(problem=problems())
@settings(max_examples=300, derandomize=True, deadline=None)
def test_it_needs_as_many_rows_as_textbook_best_fit_decreasing(
    problem: tuple[list[int], int],
) -> None:
    lengths, sequence_length = problem
    assert len(pack(np.array(lengths), sequence_length)) == textbook(lengths, sequence_length)


@given(problem=problems())
@settings(max_examples=50, derandomize=True, deadline=None)
def test_rows_follow_the_order_of_the_documents(problem: tuple[list[int], int]) -> None:
    lengths, sequence_length = problem
    rows = [row.tolist() for row in pack(np.array(lengths, dtype=np.int64), sequence_length)]
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_a_mixed_set_of_100000_leaves_at_most_2_percent_padding_and_packs_the_same_twice() -> None:
    draws = np.random.default_rng(0).lognormal(5.0, 1.1, 100_000)
    lengths = np.clip(draws, 2, 1024).astype(np.int64)
    started = time.process_time()
    packing = pack(lengths, 1024)
    assert time.process_time() - started < 5
    assert 1 - lengths.sum() / (len(packing) * 1024) <= 0.02
    again = pack(lengths.copy(), 1024)
    assert np.array_equal(packing.items, again.items)
    assert np.array_equal(packing.starts, again.starts)


def test_the_first_rows_of_a_packing_are_those_rows() -> None:
    packing = pack(np.array([5, 4, 3, 2, 1, 5]), 5)
    assert [row.tolist() for row in packing] == [[0], [1, 4], [2, 3], [5]]
    assert [row.tolist() for row in packing.first(2)] == [[0], [1, 4]]
    assert len(packing.first(9)) == 4


def test_one_per_row_packs_nothing() -> None:
    assert [row.tolist() for row in one_per_row(3)] == [[0], [1], [2]]


@pytest.mark.parametrize("lengths", [[0, 3], [9], [-1]])
def test_a_length_that_no_row_can_hold_is_an_error(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must be in 1\.\.8"):
        pack(np.array(lengths), 8)
