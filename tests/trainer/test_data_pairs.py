"""Pairs of answers: the shapes they are read in, the tokens that are compared, and their rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.batch import IGNORE
from trainer.config import Data, Source
from trainer.data import DataError
from trainer.data.chat import view_of
from trainer.data.pairs import build_pairs
from trainer.data.preferences import python_preferences, sides
from trainer.data.read import documents
from trainer.data.stream import Rows
from trainer.models import load_tokenizer

ASK = {"role": "user", "content": "Hi?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
SYSTEM = {"role": "system", "content": "Be kind."}
AGAIN = {"role": "user", "content": "And?"}


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def rows_of(
    tokenizer: str, path: str, length: int, packing: bool = True, stage: str = "dpo", **data: Any
) -> Rows:
    tokens = load_tokenizer(tokenizer)
    view = view_of(Data(chat_template="chatml", **data), stage, tokens)
    sources = (Source(path=path),)
    return build_pairs(sources, tokens, sequence_length=length, packing=packing, view=view)


def texts_of(rows: Rows, tokenizer: str) -> list[tuple[str, str]]:
    """Of each answer its whole text, and the part that is learned."""
    tokens, found = load_tokenizer(tokenizer), []
    for start, length, _ in rows.chunks.spans(np.arange(len(rows.chunks))):
        ids = rows.chunks.tokens[start : start + length + 1]
        assert rows.chunks.learned is not None
        learned = ids[rows.chunks.learned[start : start + length + 1]]
        found.append((tokens.decode(ids), tokens.decode(learned)))
    return found


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "a ", "chosen": "b", "rejected": "c"}, "a ", "b", "c"),
        ({"messages": None, "prompt": "a ", "chosen": "xb", "rejected": "xc"}, "a ", "xb", "xc"),
        (
            {"messages": None, "prompt": [ASK], "chosen": "yes", "rejected": "no", "tools": None},
            [ASK], [YES], [NO],
        ),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, [ASK], [YES], [NO]),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, [ASK], [YES], [NO]),
        (
            {"messages": [SYSTEM, ASK], "chosen": "yes", "rejected": "no"},
            [SYSTEM, ASK], [YES], [NO],
        ),
        ({"messages": [ASK], "chosen": YES, "rejected": NO}, [ASK], [YES], [NO]),
        ({"messages": [ASK], "chosen": [YES], "rejected": [NO]}, [ASK], [YES], [NO]),
        ({"prompt": "Hi?", "chosen": [YES], "rejected": [NO]}, [ASK], [YES], [NO]),
        # Whole conversations beside their own first words, as several datasets have them.
        (
            {"prompt": "Hi?", "chosen": [ASK, YES], "rejected": [ASK, NO], "messages": [ASK, YES]},
            [ASK], [YES], [NO],
        ),
        # Turns that both share are asked, not compared.
        (
            {"chosen": [ASK, YES, AGAIN, YES], "rejected": [ASK, YES, AGAIN, NO]},
            [ASK, YES, AGAIN], [YES], [NO],
        ),
        ({"chosen": "Q: x A: one", "rejected": "Q: x A: two"}, "Q: x A:", " one", " two"),
    ],
)  # fmt: skip
def test_the_usual_shapes_say_the_same(
    record: dict[str, Any], prompt: Any, chosen: Any, rejected: Any
) -> None:
    assert sides(record, "here") == (prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": "a", "chosen": "b"}, "no key 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' must be a list of messages"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' must be a list of messages"),
        ({"chosen": "one", "rejected": "two"}, "have no common beginning; give `prompt`"),
        ({"chosen": [YES], "rejected": [NO]}, "no prompt; give `prompt`, or whole conversations"),
        ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, "are the same"),
        ({"chosen": [ASK, YES], "rejected": [NO]}, "is a whole conversation, the other an answer"),
        ({"chosen": [ASK, YES], "rejected": [AGAIN, NO]}, "do not begin with the same message"),
        ({"chosen": [ASK, YES], "rejected": [ASK]}, "'rejected' has no answer of the assistant"),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [{**NO, "content": ""}]},
         "'rejected[0]' is an empty answer"),
        ({"text": "a"}, "no key 'chosen'"),
        ({"prompt": "a", "chosen": 1, "rejected": 2},
         "'chosen' must be a list of messages, or a string, got a number"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_refused_with_its_line(
    record: dict[str, Any], says: str, tokenizer: str, tmp_path: Path
) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "pairs.jsonl", [good, record, good])
    with pytest.raises(DataError) as raised:
        rows_of(tokenizer, path, 64)
    assert str(raised.value).startswith(f"{path}:2: ") and says in str(raised.value)
    assert "\n" not in str(raised.value)
    kept = rows_of(tokenizer, path, 64, skip_bad=True)
    (facts,) = kept.summary["sources"]
    assert (facts["documents"], facts["unit"], facts["skipped"]) == (2, "pair", 1)


def test_pairs_under_other_names_are_told_the_right_ones(tokenizer: str, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"question": "a", "good": "b", "bad": "c"}])
    with pytest.raises(DataError) as raised:
        rows_of(tokenizer, path, 64)
    assert str(raised.value) == (
        f"{path}:1: no `chosen` and `rejected`; keys here: 'bad', 'good', 'question'; give the two"
        " answers these names, and the question `prompt`"
    )


def test_other_formats_are_refused_by_name(tokenizer: str, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [{"messages": [ASK, YES]}])
    with pytest.raises(DataError, match="1: a `messages` record holds no two answers"):
        rows_of(tokenizer, path, 64)
    (tmp_path / "plain.txt").write_text("words")
    with pytest.raises(DataError, match="a `text` record holds no two answers"):
        rows_of(tokenizer, str(tmp_path / "plain.txt"), 64)


def test_answers_are_learned_with_their_end_and_prompts_are_not(
    tokenizer: str, tmp_path: Path
) -> None:
    records = [
        {"prompt": "ab", "chosen": "cd", "rejected": "e"},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    ]
    end = load_tokenizer(tokenizer).eos_token
    for record, learned in zip(records, (("cd", "e"), ("yes<|im_end|>", "no<|im_end|>"))):
        found = texts_of(rows_of(tokenizer, write(tmp_path / "p.jsonl", [record]), 256), tokenizer)
        assert [part for _, part in found] == [text + end for text in learned]
        assert len({whole.removesuffix(part) for whole, part in found}) == 1


@pytest.mark.parametrize(
    ("prompt", "tokens", "same"),
    [("ab", [[1, 4, 0], [1, 2, 5, 0]], 1), ("aab", [[1, 1, 4, 0], [1, 6, 5, 0]], 1)],
)
def test_both_answers_go_on_from_the_same_tokens(
    tmp_path: Path, prompt: str, tokens: list[list[int]], same: int
) -> None:
    """A token may hold the end of the prompt and the begin of one answer: then what stands there
    in the other text is compared with it, from the first token that is another, even before."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = {"<e>": 0, "a": 1, "b": 2, "c": 3, "bc": 4, "d": 5, "ab": 6}
    merged = [("b", "c"), ("a", "b")] if prompt == "aab" else [("b", "c")]
    core = Tokenizer(models.BPE(pieces, merged))
    core.pre_tokenizer = pre_tokenizers.Split("x", "isolated")
    merges = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    path = write(tmp_path / "p.jsonl", [{"prompt": prompt, "chosen": "c", "rejected": "d"}])
    rows = build_pairs(
        (Source(path=path),), merges, sequence_length=16, packing=True,
        view=view_of(Data(), "dpo", merges),
    )  # fmt: skip
    assert rows.chunks.tokens.tolist() == [token for side in tokens for token in side]
    assert rows.chunks.learned is not None
    learned = [i >= same for side in tokens for i in range(len(side))]
    assert rows.chunks.learned.tolist() == learned


@pytest.mark.parametrize("packing", [True, False])
def test_a_pair_is_never_parted(packing: bool, tokenizer: str, tmp_path: Path) -> None:
    records = [
        {"prompt": "p" * (1 + i % 5), "chosen": "c" * (1 + i % 7), "rejected": "r" * (1 + i % 3)}
        for i in range(40)
    ]
    path, length = write(tmp_path / "p.jsonl", records), 48
    rows = rows_of(tokenizer, path, length, packing)
    assert (len(rows) < 20) if packing else (len(rows) == 40)
    assert sorted(rows.packing.items) == list(range(80))
    for index, items in enumerate(rows.packing):
        assert (items[0::2] % 2 == 0).all() and (items[1::2] == items[0::2] + 1).all()
        assert packing or len(items) == 2
        batch = rows.batch([index])
        lengths = rows.chunks.lengths[items]
        assert lengths.sum() <= batch.input_ids.shape[1] <= length
        positions = np.concatenate([np.arange(n) for n in lengths])
        assert (batch.position_ids[0, : len(positions)].numpy() == positions).all()
        wanted = int((batch.targets != IGNORE).sum())
        assert wanted == rows.chunks.targets[items].sum()


@pytest.mark.parametrize(
    ("chosen", "rejected", "kept"),
    [
        (6, 3, (6, 3)),  # 3 + 7 and 3 + 4 less a token each: 16
        (20, 3, (8, 3)),  # the longer one loses its end
        (20, 19, (6, 6)),  # both do, from half a row on
    ],
)
def test_a_long_pair_loses_the_end_of_its_longer_answer(
    chosen: int, rejected: int, kept: tuple[int, int], tokenizer: str, tmp_path: Path
) -> None:
    record = {"prompt": "ppp", "chosen": "c" * chosen, "rejected": "r" * rejected}
    rows = rows_of(tokenizer, write(tmp_path / "p.jsonl", [record]), 16)
    found = [part for _, part in texts_of(rows, tokenizer)]
    assert (found[0].count("c"), found[1].count("r")) == kept
    cut = kept != (chosen, rejected)
    assert rows.summary["sources"][0].get("truncated", 0) == cut
    assert rows.chunks.lengths.sum() <= 16


def test_pairs_without_a_difference_before_the_end_of_a_row_are_counted(
    tokenizer: str, tmp_path: Path
) -> None:
    late = {"prompt": "p" * 20, "chosen": "one", "rejected": "two"}
    alike = {"prompt": "p", "chosen": "same for long, yes", "rejected": "same for long, no"}
    good = {"prompt": "p", "chosen": "b", "rejected": "c"}
    rows = rows_of(tokenizer, write(tmp_path / "p.jsonl", [late, good, alike]), 16)
    (facts,) = rows.summary["sources"]
    assert (facts["documents"], facts["unsupervised"], facts["truncated"]) == (1, 2, 2)
    path = write(tmp_path / "bad.jsonl", [late, alike])
    with pytest.raises(DataError, match=r"of all 2 pairs, 16 tokens hold nothing in which"):
        rows_of(tokenizer, path, 16)


def test_limited_rows_read_no_further_than_they_need(tokenizer: str, tmp_path: Path) -> None:
    records: list[Any] = [{"prompt": "p", "chosen": "b" * 3, "rejected": "c"}] * 300
    path = write(tmp_path / "p.jsonl", [*records, "no pair"])
    tokens = load_tokenizer(tokenizer)
    options: dict[str, Any] = {"sequence_length": 16, "view": view_of(Data(), "ipo", tokens)}
    for packing, pairs in ((True, 6), (False, 2)):
        rows = build_pairs((Source(path=path),), tokens, packing=packing, limit_rows=2, **options)
        assert len(rows) == 2 and rows.summary["sources"][0]["documents"] == pairs


def test_other_stages_learn_the_chosen_answer(tokenizer: str, tmp_path: Path) -> None:
    record = {"prompt": "ab", "chosen": "cd", "rejected": "e"}
    sources = (Source(path=write(tmp_path / "p.jsonl", [record]), format="preference"),)
    tokens = load_tokenizer(tokenizer)
    (document,) = documents(sources, view_of(Data(), "sft", tokens))
    assert (document.text, document.spans) == ("abcd", ((2, 4),))
    (plain,) = documents(sources, view_of(Data(), "tokenizer", None))
    assert plain.text.split() == ["ab", "cd", "e"]


def test_a_template_that_rewrites_earlier_turns_cannot_write_an_answer_of_several(
    tokenizer: str, tmp_path: Path
) -> None:
    template = tmp_path / "drops.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] }}: "
        "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    record = {"prompt": [ASK], "chosen": [YES, AGAIN, YES], "rejected": [NO]}
    path, tokens = write(tmp_path / "p.jsonl", [record]), load_tokenizer(tokenizer)
    view = view_of(Data(chat_template=str(template)), "dpo", tokens)
    with pytest.raises(DataError, match=r"p.jsonl:1: .* end each answer with its first turn"):
        list(documents((Source(path=path),), view))


def test_the_builtin_pairs_are_the_same_everywhere_and_differ_in_order_alone() -> None:
    train, held_out = (dict(python_preferences(split)) for split in ("train", "heldout"))
    assert len(train) > 300 and len(held_out) > 30 and not set(train) & set(held_out)
    for record in (*train.values(), *held_out.values()):
        good, bad = (record[side][0]["content"] for side in ("chosen", "rejected"))
        assert good != bad and sorted(good.split(" ")) == sorted(bad.split(" "))
    assert train == dict(python_preferences("train"))


def test_a_manifest_names_the_format(tokenizer: str, tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    manifest = tmp_path / "list.jsonl"
    manifest.write_text(json.dumps({"path": "p.jsonl", "type": "preference", "weight": 2.0}) + "\n")
    tokens = load_tokenizer(tokenizer)
    rows = build_pairs(
        (Source(manifest=str(manifest)),), tokens, sequence_length=16, packing=True,
        view=replace(view_of(Data(), "dpo", tokens), default="auto"),
    )  # fmt: skip
    assert len(rows.chunks) == 4
