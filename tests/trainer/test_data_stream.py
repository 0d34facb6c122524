"""Rows and their order: what a model is asked to predict, and when it sees which row."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from trainer.batch import IGNORE, Batch
from trainer.config import ConfigError, Source
from trainer.data import DataError
from trainer.data.stream import Rows, Stream, batches_a_rank, build_rows, validation_batches

S = 16


@pytest.fixture(scope="module")
def byte(tokenizer: str) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer)


@pytest.fixture(scope="module")
def with_bos(byte: Any) -> Any:
    """A tokenizer that puts `<s>` before every text, as Llama's do."""
    tokenizer = deepcopy(byte)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def source(folder: Path, texts: list[str], name: str = "a.jsonl") -> Source:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(path=str(path))


def rows_of(folder: Path, texts: list[str], tokenizer: Any, packing: bool, length: int = S) -> Rows:
    sources = (source(folder, texts),)
    return build_rows(sources, tokenizer, sequence_length=length, packing=packing)


def everything(rows: Rows) -> Batch:
    return rows.batch(range(len(rows)))


def pairs(rows: Rows) -> Counter[tuple[int, int]]:
    """(token, what is to be predicted after it), over all rows, in batches of three."""
    found: Counter[tuple[int, int]] = Counter()
    for batch in validation_batches(rows, 3, 0, 1):
        kept = batch.targets != IGNORE
        found.update(zip(batch.input_ids[kept].tolist(), batch.targets[kept].tolist()))
    return found


texts_strategy = st.lists(st.text("abcdefgh", min_size=1, max_size=3 * S), min_size=1, max_size=8)


@given(texts=texts_strategy)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_packed_or_not_every_token_is_followed_by_the_next_one_of_its_document(
    tmp_path_factory: pytest.TempPathFactory, byte: Any, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    expected: Counter[tuple[int, int]] = Counter()
    for text in texts:
        ids = [*byte(text)["input_ids"], byte.eos_token_id]
        expected.update(pairwise(ids))
    for packing in (True, False):
        rows = rows_of(folder, texts, byte, packing)
        assert pairs(rows) == expected
        assert rows.summary["supervised_tokens"] == expected.total()


@given(lengths=st.lists(st.integers(1, 3 * S), min_size=1, max_size=8), packing=st.booleans())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_segment_of_rising_positions_never_holds_two_documents(
    tmp_path_factory: pytest.TempPathFactory, byte: Any, lengths: list[int], packing: bool
) -> None:
    """Document i is one letter, repeated: a neighbour would show at once."""
    texts = [chr(ord("a") + i) * length for i, length in enumerate(lengths)]
    rows = rows_of(tmp_path_factory.mktemp("segments"), texts, byte, packing)
    batch, eos = everything(rows), byte.eos_token_id
    supervised = 0
    for row in range(batch.rows):
        starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], batch.input_ids.shape[1]]):
            positions = batch.position_ids[row, begin:end]
            assert positions.tolist() == list(range(end - begin))
            ids, targets = batch.input_ids[row, begin:end], batch.targets[row, begin:end]
            letters = set(ids.tolist()) - {eos}
            assert len(letters) <= 1
            assert set(targets.tolist()) <= letters | {eos, IGNORE}
            assert (targets[ids == eos] == IGNORE).all()
            supervised += int((targets != IGNORE).sum())
    assert supervised == sum(lengths)


def test_packed_rows_have_one_shape_and_their_unused_tail_is_a_segment_of_its_own(
    tmp_path: Path, byte: Any
) -> None:
    batch = everything(rows_of(tmp_path, ["aaaa", "bbb"], byte, packing=True))
    a, b, eos = byte("a")["input_ids"][0], byte("b")["input_ids"][0], byte.eos_token_id
    assert batch.input_ids.tolist() == [[a] * 4 + [eos] + [b] * 3 + [eos] + [eos] * 7]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]]
    assert batch.targets.tolist() == [[a] * 3 + [eos, IGNORE] + [b] * 2 + [eos] + [IGNORE] * 8]
    assert all(t.dtype == torch.int64 for t in (batch.input_ids, batch.targets, batch.position_ids))


def test_padded_rows_are_cut_to_the_longest_of_their_batch(tmp_path: Path, byte: Any) -> None:
    rows = rows_of(tmp_path, ["a", "bbbbbb", "ccc"], byte, packing=False)
    assert rows.batch([0, 2]).input_ids.shape == (2, 4)
    assert rows.batch([0, 1, 2]).input_ids.shape == (3, 7)


def test_a_chunk_of_a_longer_document_predicts_the_first_token_of_the_next_chunk(
    tmp_path: Path, byte: Any
) -> None:
    rows = rows_of(tmp_path, ["abcdefgh"], byte, packing=True, length=4)
    ids = [*byte("abcdefgh")["input_ids"], byte.eos_token_id]
    batch = everything(rows)
    assert batch.input_ids.tolist() == [ids[:4], ids[4:8]], "no third row with the EOS alone"
    assert batch.targets.tolist() == [ids[1:5], ids[5:9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2


def test_the_end_of_a_document_is_learned_where_padding_has_the_same_token(
    tmp_path: Path, byte: Any
) -> None:
    same = deepcopy(byte)
    same.pad_token = same.eos_token
    for packing in (True, False):
        rows = rows_of(tmp_path, ["aaa", "bbbbb"], same, packing)
        ends = sum(n for (_, target), n in pairs(rows).items() if target == same.eos_token_id)
        assert ends == 2


def test_bos_comes_first_where_the_tokenizer_puts_it_and_never_twice(
    tmp_path: Path, with_bos: Any, byte: Any
) -> None:
    bos = with_bos.bos_token_id
    rows = rows_of(tmp_path, ["aaaa", "<s>bb"], with_bos, packing=True)
    ids = everything(rows).input_ids[0]
    assert (ids == bos).nonzero().flatten().tolist() == [0, 6]
    assert bos not in everything(rows_of(tmp_path, ["aaaa"], byte, packing=True)).input_ids


def test_a_bos_that_the_tokenizer_knows_but_does_not_put_is_not_added(
    tmp_path: Path, byte: Any
) -> None:
    known = deepcopy(byte)
    known.bos_token = known.eos_token
    ids = everything(rows_of(tmp_path, ["aaaa"], known, packing=False)).input_ids[0].tolist()
    assert ids == [*byte("aaaa")["input_ids"], byte.eos_token_id]


def test_a_text_that_brings_its_own_end_gets_no_second_one(tmp_path: Path, byte: Any) -> None:
    rows = rows_of(tmp_path, ["aa<|endoftext|>"], byte, packing=False)
    assert (everything(rows).input_ids == byte.eos_token_id).sum() == 1


def test_the_summary_counts_what_the_rows_hold(tmp_path: Path, byte: Any) -> None:
    first = source(tmp_path, ["a" * 7, "b" * 20], "one.jsonl")
    second = source(tmp_path, ["c" * 3] * 4, "two.jsonl")
    rows = build_rows((first, second), byte, sequence_length=S, packing=True)
    assert rows.summary == {
        "sources": [
            {
                "name": first.path,
                "shards": 1,
                "documents": 2,
                "tokens": 29,
                "sample_ids": ["one.jsonl:1", "one.jsonl:2"],
            },
            {
                "name": second.path,
                "shards": 1,
                "documents": 4,
                "tokens": 16,
                "sample_ids": ["two.jsonl:1", "two.jsonl:2", "two.jsonl:3"],
            },
        ],
        "rows": 3,
        "tokens": 45,
        "supervised_tokens": 39,
        "padding_share": pytest.approx(1 - 45 / 48),
    }


@pytest.mark.parametrize("packing", [True, False])
def test_a_limit_reads_no_further_than_it_needs_and_from_every_source(
    tmp_path: Path, byte: Any, packing: bool
) -> None:
    first = source(tmp_path, ["a" * 12] * 3000, "one.jsonl")
    second = source(tmp_path, ["b" * 12] * 3000, "two.jsonl")
    for path in (first.path, second.path):
        with Path(str(path)).open("a") as file:
            file.write("broken\n")
    options = {"sequence_length": S, "packing": packing}
    rows = build_rows((first, second), byte, limit_rows=6, **options)
    assert len(rows) == 6
    assert [s["documents"] > 0 for s in rows.summary["sources"]] == [True, True]
    with pytest.raises(DataError, match=r"one\.jsonl:3001: not JSON at column 1: Expecting value"):
        build_rows((first, second), byte, **options)


def test_a_document_of_one_token_is_fine_but_nothing_else_is_an_error(
    tmp_path: Path, byte: Any
) -> None:
    rows = rows_of(tmp_path, ["<|endoftext|>", "ab"], byte, packing=True)
    assert rows.summary["supervised_tokens"] == 2
    with pytest.raises(DataError, match=r"a\.jsonl: no token to learn"):
        rows_of(tmp_path, ["<|endoftext|>"], byte, packing=True)


def test_a_tokenizer_without_an_end_says_so(tmp_path: Path, byte: Any) -> None:
    endless = deepcopy(byte)
    endless.eos_token = None
    with pytest.raises(ConfigError, match=r"set `eos_token` in its tokenizer_config.json"):
        rows_of(tmp_path, ["a"], endless, packing=True)


def test_no_source_is_an_error(byte: Any) -> None:
    with pytest.raises(DataError, match="name a source"):
        build_rows((), byte, sequence_length=S, packing=True)


@pytest.fixture
def ten(tmp_path: Path, byte: Any) -> Rows:
    """Ten rows of one document each; row i holds only the letter number i."""
    return rows_of(tmp_path, [chr(ord("a") + i) * 15 for i in range(10)], byte, packing=True)


def stream_of(rows: Rows, micro: int, accumulate: int, rank: int = 0, of: int = 1) -> Stream:
    options = {"micro_batch": micro, "accumulate": accumulate, "rank": rank, "world_size": of}
    return Stream(rows, seed=3, **options)


def first_tokens(group: list[Batch]) -> list[int]:
    return [int(token) for batch in group for token in batch.input_ids[:, 0]]


@pytest.mark.parametrize(("micro", "accumulate", "world"), [(1, 8, 1), (4, 1, 2), (1, 2, 4)])
def test_the_global_batch_is_the_same_however_it_is_cut(
    ten: Rows, micro: int, accumulate: int, world: int
) -> None:
    whole = stream_of(ten, 8, 1)
    ranks = [stream_of(ten, micro, accumulate, rank, world) for rank in range(world)]
    for _ in range(7):
        groups = [rank.next_group() for rank in ranks]
        assert all([b.rows for b in group] == [micro] * accumulate for group in groups)
        assert list(chain(*map(first_tokens, groups))) == first_tokens(whole.next_group())


def test_each_epoch_is_all_rows_in_an_order_of_its_own(ten: Rows) -> None:
    stream = stream_of(ten, 2, 1)
    seen = [token for _ in range(20) for token in first_tokens(stream.next_group())]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed_alone(ten: Rows) -> None:
    orders = []
    for seed in (0, 0, 1, -1):
        stream = Stream(ten, micro_batch=10, accumulate=1, rank=0, world_size=1, seed=seed)
        orders.append(first_tokens(stream.next_group()))
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_a_global_batch_larger_than_the_data_goes_on_with_the_next_epochs(ten: Rows) -> None:
    seen = first_tokens(stream_of(ten, 25, 1).next_group())
    assert Counter(Counter(seen).values()) == Counter({2: 5, 3: 5})


def test_a_restored_stream_goes_on_where_the_other_stopped_even_when_cut_otherwise(
    ten: Rows,
) -> None:
    stream = stream_of(ten, 4, 1)
    for _ in range(4):
        stream.next_group()
    state = json.loads(json.dumps(stream.state_dict()))
    assert state == {"position": 16, "epoch_rows": 10, "digest": ten.digest}
    restored = stream_of(ten, 2, 2)
    restored.load_state_dict(state)
    for _ in range(5):
        assert first_tokens(restored.next_group()) == first_tokens(stream.next_group())


def test_data_that_changed_since_the_checkpoint_is_an_error(ten: Rows) -> None:
    stream = stream_of(ten, 4, 1)
    state = stream.state_dict()
    for other in ({"epoch_rows": 11}, {"digest": "of other tokens"}):
        with pytest.raises(DataError, match=r"the data changed.*now there are 10.*restore"):
            stream.load_state_dict({**state, **other})


def test_a_smaller_micro_batch_cuts_the_same_global_batch_finer(ten: Rows) -> None:
    stream, whole = stream_of(ten, 8, 1), stream_of(ten, 8, 1)
    stream.resize(3)
    group = stream.next_group()
    assert [batch.rows for batch in group] == [3, 3, 2]
    assert first_tokens(group) == first_tokens(whole.next_group())
    assert stream.micro_batch == 3 and stream.rows_per_step == 8


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 3), (2, 5), (1.5, 4), (0.4, 1), (0.8, 2), (0.001, 1), (4.0, 10)]
)
def test_epochs_are_rounded_up_to_whole_steps(ten: Rows, epochs: float, steps: int) -> None:
    assert stream_of(ten, 4, 1).steps_for_epochs(epochs) == steps


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_validation_sees_every_row_once_over_all_ranks(ten: Rows, world: int) -> None:
    seen = [
        token
        for rank in range(world)
        for token in first_tokens(list(validation_batches(ten, 3, rank, world)))
    ]
    assert sorted(seen) == sorted(first_tokens([everything(ten)]))


def test_a_validation_limit_is_a_number_of_rows_however_they_are_cut(ten: Rows) -> None:
    assert [b.rows for b in validation_batches(ten, 3, 0, 1, limit=7)] == [3, 3, 1]
    expected = sorted(first_tokens([ten.batch(range(7))]))
    for micro_batch, world in ((7, 1), (2, 1), (1, 2), (3, 2), (2, 5)):
        parts = [
            list(validation_batches(ten, micro_batch, rank, world, limit=7))
            for rank in range(world)
        ]
        assert sorted(first_tokens([batch for part in parts for batch in part])) == expected
        assert max(map(len, parts)) == batches_a_rank(ten, micro_batch, world, limit=7)
    assert [b.rows for b in validation_batches(ten, 3, 0, 1)] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    "wrong", [{"micro_batch": 0}, {"accumulate": 0}, {"world_size": 0}, {"rank": 1}, {"rank": -1}]
)
def test_a_stream_refuses_sizes_that_make_no_batch(ten: Rows, wrong: dict[str, int]) -> None:
    options = {"micro_batch": 1, "accumulate": 1, "rank": 0, "world_size": 1, **wrong}
    with pytest.raises(ValueError, match="micro_batch"):
        Stream(ten, seed=0, **options)
    with pytest.raises(ValueError, match="must be at least 1"):
        stream_of(ten, 1, 1).resize(0)
