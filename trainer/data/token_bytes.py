"""Which bytes of a text a token stands for, whatever its tokenizer prints it as.

Byte-level BPE writes a space as `Ġ`, SentencePiece as `▁`, WordPiece not at all: two vocabularies
are comparable by the bytes of their tokens only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from numpy.typing import NDArray

from trainer.config import ConfigError

Indices = NDArray[np.int64]
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Reading(NamedTuple):
    """A text as tokens. `starts[i]`: the byte of the text at which token i begins, ascending; -1
    where the token's own bytes are not those of the text, after a normalisation for instance."""

    ids: list[int]
    starts: Indices


def token_bytes(tokenizer: Any) -> list[Optional[bytes]]:
    """The bytes of every id from 0 on; None for special tokens and for ids without a token.

    A token of SentencePiece that begins a word holds the space before it, and so does one of
    WordPiece that continues none. Errors: `ConfigError` for a tokenizer without tokenizer.json, or
    of a kind whose tokens cannot be turned into bytes."""
    backend = _backend(tokenizer)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    vocabulary = tokenizer.get_vocab()
    found: list[Optional[bytes]] = [None] * (max(vocabulary.values()) + 1)
    spell = _speller(backend, tokenizer)
    for token, index in vocabulary.items():
        if index not in special:
            found[index] = token.encode() if index in added else spell(token)
    return found


def matches(ours: Sequence[Optional[bytes]], theirs: Sequence[Optional[bytes]]) -> Indices:
    """For each of their ids the id of ours with the same bytes, -1 where there is none. At most one
    of theirs stands for one of ours: of several with the same bytes, such as a letter and the
    byte that it is, the last, which tokenizers use where they have it."""
    ids = {spelt: index for index, spelt in enumerate(ours) if spelt}
    last = {spelt: index for index, spelt in enumerate(theirs) if spelt}
    found = np.full(len(theirs), -1, dtype=np.int64)
    for spelt, index in last.items():
        found[index] = ids.get(spelt, -1)
    return found


class Reader:
    """Reads texts with a tokenizer, special tokens written out in them as plain text."""

    def __init__(self, tokenizer: Any, spelt: Sequence[Optional[bytes]]) -> None:
        self.tokenizer, self.spelt = tokenizer, spelt

    def __call__(self, texts: list[str]) -> list[Reading]:
        if not texts:
            return []
        found = self._encoded(texts)["input_ids"]
        return [Reading(ids, self._starts(text, ids)) for text, ids in zip(texts, found)]

    def _encoded(self, given: Union[str, list[str]], **options: Any) -> Any:
        return self.tokenizer(
            given, add_special_tokens=False, split_special_tokens=True,
            return_attention_mask=False, verbose=False, **options,
        )  # fmt: skip

    def _starts(self, text: str, ids: list[int]) -> Indices:
        raw = text.encode()
        spelt = [self.spelt[index] or b"" for index in ids]
        sizes = np.array([len(part) for part in spelt], dtype=np.int64)
        starts: Indices = np.cumsum(sizes) - sizes
        joined = b"".join(spelt)
        if joined == raw:
            return starts
        if joined == b" " + raw:  # a space that the tokenizer puts before every text
            starts -= 1
            starts[:1] = -1
            return starts
        offsets = self._encoded(text, return_offsets_mapping=True)["offset_mapping"]
        return _by_offsets(text, raw, spelt, offsets)


def _by_offsets(
    text: str, raw: bytes, spelt: list[bytes], offsets: list[tuple[int, int]]
) -> Indices:
    """Where the tokens are not simply the text in pieces, their own account of their characters
    counts, as far as the bytes agree."""
    at = np.cumsum([0, *(len(character.encode()) for character in text)])
    starts = np.full(len(spelt), -1, dtype=np.int64)
    for i, (part, (begin, end)) in enumerate(zip(spelt, offsets)):
        first, last = int(at[begin]), int(at[end])
        if not part or first == last:
            continue
        if raw[first:last] == part:
            starts[i] = first
        elif first and raw[first - 1 : last] == part:  # the space belongs to the token
            starts[i] = first - 1
    return starts


def _backend(tokenizer: Any) -> dict[str, Any]:
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path}: has no tokenizer.json, so the bytes of its tokens"
            " are not known; use one that has"
        )
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return backend


def _speller(backend: dict[str, Any], tokenizer: Any) -> Callable[[str], bytes]:
    """Token -> bytes, as the tokenizer's decoder has it."""
    decoder = backend["decoder"] or {}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step}
    if "ByteLevel" in steps:
        table = _byte_characters()
        return lambda token: (
            bytes(table[c] for c in token) if set(token) <= table.keys() else token.encode()
        )
    if "WordPiece" in steps:
        more = str(steps["WordPiece"]["prefix"])
        return lambda token: (
            token[len(more) :].encode() if token.startswith(more) else f" {token}".encode()
        )
    space = None
    if "Metaspace" in steps:
        space = str(steps["Metaspace"]["replacement"])
    elif steps.get("Replace", {}).get("content") == " ":
        space = steps["Replace"]["pattern"].get("String")
    if space is None:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path}: the bytes of its tokens are not known (decoder:"
            f" {', '.join(steps) or 'none'}); use one of byte-level BPE, SentencePiece or WordPiece"
        )
    mark, falls_back = space, "ByteFallback" in steps

    def piece(token: str) -> bytes:
        byte = _BYTE_PIECE.fullmatch(token) if falls_back else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(mark, " ").encode()

    return piece


def _byte_characters() -> dict[str, int]:
    """The character that byte-level BPE prints for each byte (Radford et al. 2019): itself where it
    is visible, else the next one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {
        **{chr(byte): byte for byte in visible},
        **{chr(256 + n): byte for n, byte in enumerate(hidden)},
    }
