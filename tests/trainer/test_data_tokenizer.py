"""Tokenizers: nothing is lost, and equal text gives equal files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trainer.config import Source
from trainer.data import DataError
from trainer.data.read import documents
from trainer.data.tokenizer import byte_tokenizer, train_tokenizer

REFERENCE = (Source(builtin="python-reference", split="train"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    size = train_tokenizer([d.text for d in documents(REFERENCE)], 600, 2, folder)
    assert size == 600
    return folder


@pytest.fixture(scope="module")
def bpe(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def byte(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("byte")
    assert byte_tokenizer(folder) == 258
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text(max_size=200))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_any_text_survives_a_round_trip(bpe: Any, byte: Any, text: str) -> None:
    for tokenizer in (bpe, byte):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < len(tokenizer) for i in ids)


def test_a_byte_is_a_token(byte: Any) -> None:
    text = "naïve 🦜\t\x00"
    assert len(byte(text)["input_ids"]) == len(text.encode())


def test_it_learned_the_text_it_was_given(bpe: Any, byte: Any) -> None:
    text = next(documents(REFERENCE)).text
    assert len(bpe(text)["input_ids"]) < 0.6 * len(byte(text)["input_ids"])


def test_end_of_text_and_padding_are_two_tokens_and_nothing_is_added_to_a_text(
    bpe: Any, byte: Any
) -> None:
    for tokenizer in (bpe, byte):
        assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"
        assert tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.bos_token_id is None
        assert len(tokenizer("a")["input_ids"]) == 1
        assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id]


def test_equal_text_gives_equal_files_in_another_process(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from trainer.config import Source\n"
        "from trainer.data.read import documents\n"
        "from trainer.data.tokenizer import train_tokenizer\n"
        "s = (Source(builtin='python-reference', split='train'),)\n"
        "train_tokenizer([d.text for d in documents(s)], 600, 2, sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "99", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert "tokenizer.json" in names and "tokenizer_config.json" in names
    assert all((folder / n).read_bytes() == (tmp_path / n).read_bytes() for n in names)


def test_rare_pairs_are_not_merged(tmp_path: Path) -> None:
    size = train_tokenizer(["abab cd"], 300, 2, tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert merges == [["a", "b"]] and size == 259


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text to train on"):
        train_tokenizer(texts, 300, 2, tmp_path)


def test_a_vocabulary_smaller_than_the_bytes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least 258"):
        train_tokenizer(["a"], 257, 2, tmp_path)
