"""The built-in text: nothing of the held-out part is in the train part."""

from __future__ import annotations

import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import Source
from trainer.data import DataError
from trainer.data.corpus import PIECE_BYTES, cut, is_heldout
from trainer.data.read import Document, documents


def text_of(split: str | None) -> list[Document]:
    source = Source(builtin="python-reference", split=split)  # type: ignore[arg-type]
    return list(documents((source,)))


def size(found: list[Document]) -> int:
    return sum(len(d.text.encode()) for d in found)


def blocks(found: list[Document]) -> list[str]:
    return [" ".join(b.split()) for d in found for b in re.split(r"\n\s*\n", d.text)]


def test_heldout_text_holds_no_paragraph_of_train_and_no_paragraph_occurs_twice() -> None:
    train, heldout = blocks(text_of("train")), blocks(text_of("heldout"))
    assert len(train) > 1000 and len(heldout) > 100
    assert not set(train) & set(heldout)
    assert len(set(train)) == len(train) and len(set(heldout)) == len(heldout)


def test_the_split_is_by_topic_and_holds_out_about_a_tenth() -> None:
    train, heldout = text_of("train"), text_of("heldout")
    topics = [{d.id.split("/")[0] for d in part} for part in (train, heldout)]
    assert not topics[0] & topics[1]
    assert 0.08 <= size(heldout) / (size(train) + size(heldout)) <= 0.14
    assert len(topics[1]) >= 8


def test_no_split_gives_both_parts() -> None:
    assert text_of(None) == text_of("train") + text_of("heldout")


def test_pieces_are_about_3_kb_and_have_ids_of_their_own() -> None:
    found = text_of(None)
    assert len({d.id for d in found}) == len(found)
    assert all(re.fullmatch(r"[a-z-]+/\d\d", d.id) for d in found)
    longer = [d for d in found if len(d.text.encode()) > PIECE_BYTES]
    assert all("\n\n" not in d.text for d in longer), "only one paragraph alone may be longer"


def test_a_quoted_paragraph_stays_in_train_however_it_is_wrapped() -> None:
    names = [f"topic{i}" for i in range(200)]
    held, kept = (
        next(n for n in names if is_heldout(n)),
        next(n for n in names if not is_heldout(n)),
    )
    topics = {
        kept: "Own.\n\nQuoted as it\nis here. [1]",
        held: "Quoted as it is\n   here. [17]\n\nSecret.\n\nSecret.",
    }
    assert cut(topics, "heldout") == [(f"{held}/00", "Secret.")]
    assert cut(topics, "train") == [(f"{kept}/00", topics[kept])]


@given(
    topics=st.dictionaries(
        st.text("abc", min_size=1, max_size=4),
        st.lists(st.sampled_from("uvwxyz"), min_size=1, max_size=6).map("\n\n".join),
        max_size=12,
    )
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_every_paragraph_is_kept_exactly_once(topics: dict[str, str]) -> None:
    kept = [b for _, text in cut(topics, None) for b in text.split("\n\n")]
    given_ = {b for text in topics.values() for b in text.split("\n\n")}
    assert sorted(kept) == sorted(given_)


def test_a_python_without_the_text_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(
        DataError, match=r"this Python lacks pydoc_data.topics .*; use python.org's"
    ):
        text_of("train")
