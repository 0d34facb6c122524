"""Tokens by their bytes, and where a surrogate with other tokens meets the model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.batch import IGNORE, Batch
from trainer.config import ConfigError
from trainer.data.token_bytes import Reader, matches, token_bytes
from trainer.data.tokenizer import byte_tokenizer, train_tokenizer
from trainer.models import load_tokenizer
from trainer.surrogate import Vocabularies, _batch

PROSE = (
    "The object is the same as the other object, and the type of the list is the type of the"
    " object that is in the list. Ein Märchen für die Großmutter — naïve café, 東京 東京 😀😀.\n"
) * 3
CODE = (
    "def the_list(object):\n    return [type(x) for x in object if x is not None]  # für 東\n" * 3
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Two byte-level BPE tokenizers that learned other merges."""
    folder = tmp_path_factory.mktemp("pair")
    train_tokenizer([PROSE], 340, 2, folder / "a")
    train_tokenizer([CODE], 320, 2, folder / "b")
    return load_tokenizer(str(folder / "a")), load_tokenizer(str(folder / "b"))


def sentencepiece() -> Any:
    """BPE over `▁` with a token for each byte, as Llama's is: a space before every text."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz▁"), limit_alphabet=40,
    )  # fmt: skip
    bpe.train_from_iterator([PROSE], trainer)
    # The bytes are tokens as others are, not marks to be found in a text.
    state = json.loads(bpe.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    state["model"]["byte_fallback"] = True
    again = tokenizers.Tokenizer.from_str(json.dumps(state))
    again.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", again.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=again, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def wordpiece() -> Any:
    words = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=specials, show_progress=False
    )
    words.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]",
    )  # fmt: skip


def rows_of(tokenizer: Any, texts: list[str], length: int, bos: Optional[int] = None) -> Batch:
    """One row of each text, in chunks of `length` tokens with positions from 0 that share it."""
    rows: list[list[tuple[Any, Any]]] = []
    for text in texts:
        marks = [] if bos is None else [bos]
        ids = np.array([*marks, *tokenizer(text, add_special_tokens=False)["input_ids"],
                        tokenizer.eos_token_id])  # fmt: skip
        cuts = range(0, len(ids) - 1, length)
        rows.append([(ids[c : min(c + length, len(ids) - 1)], ids[c + 1 : c + 1 + length])
                     for c in cuts])  # fmt: skip
    return _batch(rows)


def joined(spelt: list[Optional[bytes]], ids: Any) -> bytes:
    return b"".join(spelt[int(i)] or b"" for i in ids)


def whole(text: bytes) -> bytes:
    """Without what is left of a character at its beginning."""
    return text.lstrip(bytes(range(0x80, 0xC0)))


WORDS = [*PROSE.split()[:24], "for x in", "  ", "\n    ", "é", "東京", "😀", "<|pad|>"]
TEXTS = st.lists(
    st.lists(
        st.sampled_from(WORDS)
        | st.text(max_size=5).filter(lambda t: t.isprintable()),
        min_size=1, max_size=24,
    ).map(" ".join),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@example(texts=["东东东东 😀😀😀 the object"], length=3)
@given(texts=TEXTS, length=st.integers(3, 40))
def test_a_place_that_both_have_begins_at_the_same_byte_and_is_the_same_token(
    pair: tuple[Any, Any], texts: list[str], length: int
) -> None:
    ours, theirs = pair
    words, host = Vocabularies(ours, theirs), rows_of(ours, texts, length)
    spelt, other = token_bytes(ours), token_bytes(theirs)
    view = words.view(host)
    read = view.batch
    flat = [x.flatten().numpy() for x in (host.input_ids, host.position_ids, host.targets)]
    own = [x.flatten().numpy() for x in (read.input_ids, read.position_ids, read.targets)]
    places = np.flatnonzero(flat[2] != IGNORE)[view.places.numpy()]
    found = np.flatnonzero(own[2] != IGNORE)
    assert len(places) == len(found)
    assert len({*view.places.tolist()}) == len(view.places)
    for place, at in zip(places.tolist(), found.tolist()):
        assert place // host.input_ids.shape[1] == at // read.input_ids.shape[1]  # the same row
        before = joined(spelt, flat[0][place - flat[1][place] : place + 1])
        seen = joined(other, own[0][at - own[1][at] : at + 1])
        # The surrogate has read as much of the same chunk, and nothing of what comes.
        assert seen == whole(before)
        assert spelt[flat[2][place]] == other[own[2][at]] is not None


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS)
def test_no_place_that_both_have_is_left_out(pair: tuple[Any, Any], texts: list[str]) -> None:
    """Where tokens begin is counted here on the printed text, in one chunk a document."""
    ours, theirs = pair
    texts = [text.replace("<|pad|>", "") or "x" for text in texts]
    host, number, expected = rows_of(ours, texts, 10_000), 0, []
    spelt, other = token_bytes(ours), token_bytes(theirs)
    to_theirs = {part: i for i, part in enumerate(other) if part}
    for text in texts:
        borders = []
        for tokenizer, parts in ((ours, spelt), (theirs, other)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            borders.append(np.cumsum([0, *(len(parts[i] or b"") for i in ids)])[:-1].tolist())
        ids = ours(text, add_special_tokens=False)["input_ids"]
        for token, begin in zip(ids[1:], borders[0][1:]):
            if begin in borders[1] and spelt[token] in to_theirs:
                expected.append(number)
            number += 1
        number += 1  # the end of the text
    assert Vocabularies(ours, theirs).view(host).places.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_bytes_of_tokens_add_up_to_the_text(pair: tuple[Any, Any], text: str) -> None:
    for tokenizer in pair:
        (read,) = Reader(tokenizer, token_bytes(tokenizer))([text])
        spelt = token_bytes(tokenizer)
        assert joined(spelt, read.ids) == text.encode()
        assert [text.encode()[s:].startswith(spelt[i]) for s, i in zip(read.starts, read.ids)] == [
            True
        ] * len(read.ids)


def test_tokens_match_by_their_bytes_not_by_their_print(pair: tuple[Any, Any]) -> None:
    """As strings, `Ġthe` and `▁the` are two; the letters of both would be all that is shared."""
    ours = pair[0]
    for theirs, word in ((sentencepiece(), "▁the"), (wordpiece(), "the")):
        a, b = token_bytes(ours), token_bytes(theirs)
        found = matches(a, b)
        index = theirs.convert_tokens_to_ids(word)
        assert found[index] == ours.convert_tokens_to_ids("Ġthe")
        used = found[found >= 0]
        assert len(used) > 20 and len(set(used.tolist())) == len(used)  # one to one
        assert all(a[int(i)] == b[j] for j, i in enumerate(found) if i >= 0)
        assert all(found[i] == -1 for i in theirs.all_special_ids)


def test_a_byte_that_is_a_letter_too_stands_for_the_letter_once() -> None:
    theirs = sentencepiece()
    spelt = token_bytes(theirs)
    letter, byte = theirs.convert_tokens_to_ids("a"), theirs.convert_tokens_to_ids("<0x61>")
    assert spelt[letter] == spelt[byte] == b"a" and letter != byte
    found = matches([b"a"], spelt)
    assert found[letter] == 0 and found[byte] == -1


@pytest.mark.parametrize("make", [sentencepiece, wordpiece])
def test_a_surrogate_that_reads_otherwise_meets_the_model_at_words(
    pair: tuple[Any, Any], make: Callable[[], Any]
) -> None:
    """SentencePiece puts a space before a text, and bytes for what it does not know; WordPiece
    drops spaces and capitals. Where they meet the model, the words are the same."""
    ours, theirs = pair[0], make()
    words, text = Vocabularies(ours, theirs), "the object is the list of the Type, 東 the object"
    host = rows_of(ours, [text], 100)
    view = words.view(host)
    spelt, other = token_bytes(ours), token_bytes(theirs)
    targets = host.targets.flatten()
    golds = [spelt[int(i)] for i in targets[targets != IGNORE][view.places]]
    met = view.batch.targets[view.batch.targets != IGNORE]
    assert golds == [other[int(i)] for i in met]
    assert golds.count(b" the") == 3 and golds[-1] == b" object"
    ids = view.batch.input_ids[0].tolist()
    assert (ids[0] == theirs.bos_token_id) == (make is sentencepiece)
    # What the surrogate has read before its last place is the text before it.
    at = int((view.batch.targets[0] != IGNORE).nonzero()[-1])
    seen = joined(other, [i for i in ids[: at + 1] if i not in theirs.all_special_ids])
    if make is sentencepiece:
        assert seen == b" " + text[: -len(" object")].encode()


def test_special_tokens_are_the_surrogates_own_or_left_out(tmp_path: Path) -> None:
    """A turn of a conversation: the mark that both know is read, the one that only the model has
    is not, and nothing is expected of the surrogate right after that one."""
    byte_tokenizer(tmp_path / "a")
    a, b = (AutoTokenizer.from_pretrained(tmp_path / "a") for _ in range(2))
    a.add_special_tokens({"additional_special_tokens": ["<|both|>", "<|ours|>"]})
    b.add_special_tokens({"additional_special_tokens": ["<|theirs|>", "<|both|>"]})
    words, host = Vocabularies(a, b), rows_of(a, ["ab<|both|>cd<|ours|>ef"], 100)
    view = words.view(host)
    assert not words.same
    ids = view.batch.input_ids[0]
    assert b.decode(ids) == "ab<|both|>cde" and len(ids) == 6
    golds = host.targets[0][view.places]
    # `a` is the first token, both marks and the end of the text are special, `e` follows <|ours|>.
    assert a.decode(golds) == "bcdf"


@pytest.mark.parametrize("bytes_left", [1, 2, 3])
def test_a_chunk_that_ends_within_a_character_is_read_up_to_it(
    bytes_left: int, tmp_path: Path
) -> None:
    """Byte-level tokens cut an emoji after any of its four bytes."""
    byte_tokenizer(tmp_path / "a")
    a, b = (AutoTokenizer.from_pretrained(tmp_path / "a") for _ in range(2))
    b.add_special_tokens({"additional_special_tokens": ["<|theirs|>"]})
    # A chunk's last target is the first token of the next one.
    host = rows_of(a, ["hello 😀"], len("hello ") + bytes_left - 1)
    golds = host.targets[host.targets != IGNORE][Vocabularies(a, b).view(host).places]
    assert a.decode(golds[: len("ello ")]) == "ello "


def test_a_chunk_is_cut_where_the_surrogates_context_ends(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    host = rows_of(ours, [PROSE[:300]], 1000)
    whole_view, cut_view = (Vocabularies(ours, theirs, most).view(host) for most in (None, 20))
    assert cut_view.batch.input_ids.shape[1] <= 20 < whole_view.batch.input_ids.shape[1]
    kept = len(cut_view.places)
    assert 0 < kept < len(whole_view.places)
    assert torch.equal(cut_view.places, whole_view.places[:kept])


def test_a_batch_without_a_common_place_is_read_without_error(pair: tuple[Any, Any]) -> None:
    view = Vocabularies(*pair).view(rows_of(pair[0], ["x", "y"], 8))
    assert len(view.places) == 0 and bool((view.batch.targets == IGNORE).all())


def test_a_tokenizer_whose_tokens_have_no_bytes_is_refused() -> None:
    plain = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="b")
    with pytest.raises(ConfigError, match=r"bytes of its tokens are not known \(decoder: none\)"):
        token_bytes(wrapped)
