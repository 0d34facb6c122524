"""Tokenizers as llama.cpp reads them from a GGUF file, and what ids it gives a text.

llama.cpp knows how a text is cut into words before merging (`tokenizer.ggml.pre`) by name only.
The name is looked up by what a tokenizer does to one long text, as llama.cpp's own converter does;
for one that nobody knows, it is the first name that cuts texts as the tokenizer itself does.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Union

from trainer.config import ConfigError
from trainer.data.corpus import python_reference
from trainer.gguf_words import EXACT, IGNORES_MERGES, KNOWN, PROBE, WORDS, encode_pieces

#: Kinds of tokens (`tokenizer.ggml.token_type`).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPECIALS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
#: Score of a token that no merge makes.
_ADDED = -1000.0
#: What control tokens look like, by llama.cpp's converter: those of DeepSeek, Gemma, Command R.
_CONTROLS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_AROUND_CONTROLS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
_PASSAGES = 48
_OTHERS = (
    "",
    " ",
    "a",
    "naïve Ångström — 東京 2024年 🙂👍🏽",
    "if x == 10:\n\treturn  x**2 # 3.14\r\n\r\n",
)


@dataclass(frozen=True)
class Vocabulary:
    """`model`: `gpt2` (byte-level BPE, with `merges`) or `llama` (SentencePiece, with `scores`).
    `adds`: whether `bos` and `eos` are put around a text."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(default_factory=dict)
    space_prefix: bool = True
    template: Union[str, Mapping[str, str], None] = None


def vocabulary(tokens: Any, configuration: Any, folder: Path) -> Vocabulary:
    """The vocabulary of a tokenizer for a model of `configuration`, which gives equal ids on
    `sample_texts`. `folder`: where a `tokenizer.model` may lie. Errors: `ConfigError` for a
    tokenizer that llama.cpp cannot follow."""
    size, have = int(configuration.vocab_size), tokens.get_vocab()
    if max(have.values()) >= size:
        raise ConfigError(
            f"export.model: its tokenizer has {max(have.values()) + 1} tokens, its output {size};"
            " name the tokenizer that it was trained with"
        )
    described = json.loads(tokens.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE":
        _refuse(f"is a {described['model']['type']} tokenizer, not BPE")
    facts = {
        "special": _special(tokens, configuration),
        "adds": _adds(tokens),
        "template": tokens.chat_template,
    }
    if described["model"].get("byte_fallback"):
        return _checked(_sentencepiece(tokens, size, folder, facts), tokens)
    names, types = _tokens(tokens, have, size)
    merges = tuple(" ".join(pair) for pair in described["model"]["merges"])
    found = [Vocabulary("gpt2", name, names, types, merges, **facts) for name in _pre_names(tokens)]
    return next((one for one in found if not differences(one, tokens)), None) or _checked(
        found[0], tokens
    )


def is_known(tokens: Any) -> bool:
    """Whether llama.cpp knows this very tokenizer."""
    return _fingerprint(tokens) in KNOWN


def sample_texts() -> list[str]:
    """Texts to compare ids on: prose, code, white space, digits, scripts."""
    passages = [text for _, text in python_reference("heldout")]
    texts = passages[:: max(len(passages) // _PASSAGES, 1)][:_PASSAGES]
    return [*texts, PROBE, *_OTHERS]


def cuts_marks(vocabulary: Vocabulary, tokens: Any) -> bool:
    """Whether llama.cpp cuts a text with combining marks otherwise than the tokenizer, which it is
    known to do under some names: all files of such models have that."""
    return vocabulary.pre in EXACT and encoder(vocabulary)(PROBE) != list(tokens.encode(PROBE))


def differences(vocabulary: Vocabulary, tokens: Any) -> list[str]:
    """Those of `sample_texts` to which llama.cpp would give other ids than the tokenizer, beside
    what `cuts_marks` says: of texts with such marks the ids must be those of the exact words."""
    encode, texts = encoder(vocabulary), sample_texts()
    if vocabulary.model == "gpt2":  # SentencePiece tokenizers differ in spaces beside such tokens
        added = [token.content for token in tokens.added_tokens_decoder.values()][:8]
        texts += [f"one{token}two {token}\n" for token in added]
    wrong = [text for text in texts if encode(text) != list(tokens.encode(text))]
    if wrong and vocabulary.pre in EXACT:
        exact = encoder(vocabulary, EXACT[vocabulary.pre])
        wrong = [t for t in wrong if not _has_marks(t) or exact(t) != list(tokens.encode(t))]
    return wrong


def encoder(vocabulary: Vocabulary, words: tuple[str, ...] = ()) -> Any:
    """A function from a text to its ids, as llama.cpp would give them: special tokens first, then
    words (cut by the expressions `words`, if given), then merges; `bos` and `eos` around it where
    the file asks for them."""
    if vocabulary.model == "llama":
        known = dict(zip(vocabulary.tokens, range(len(vocabulary.tokens))))
        lead = "▁" if vocabulary.space_prefix else ""
        return lambda text: _around(vocabulary, encode_pieces(known, vocabulary.scores, lead, text))
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    pairs = [(left, right) for left, _, right in (m.partition(" ") for m in vocabulary.merges)]
    ignores = vocabulary.pre in IGNORES_MERGES
    machine = Tokenizer(models.BPE(vocab=ids, merges=pairs, ignore_merges=ignores))
    machine.pre_tokenizer = pre_tokenizers.Sequence([
        _splitter(words or WORDS[vocabulary.pre]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    apart = (CONTROL, USER_DEFINED, UNKNOWN)
    machine.add_special_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types)
            if kind in apart
        ]
    )
    return lambda text: _around(vocabulary, machine.encode(text, add_special_tokens=False).ids)


def _checked(vocabulary: Vocabulary, tokens: Any) -> Vocabulary:
    if wrong := differences(vocabulary, tokens):
        _refuse(f"cuts texts in a way that llama.cpp does not know, such as {wrong[0][:40]!r}")
    return vocabulary


def _refuse(what: str) -> NoReturn:
    raise ConfigError(
        f"export.format: gguf: the tokenizer {what}; write `format: huggingface` and use"
        " llama.cpp's own converter: python convert_hf_to_gguf.py FOLDER"
    )


def _around(vocabulary: Vocabulary, ids: Sequence[int]) -> list[int]:
    first = [vocabulary.special["bos"]] if vocabulary.adds["bos"] else []
    last = [vocabulary.special["eos"]] if vocabulary.adds["eos"] else []
    return [*first, *ids, *last]


def _pre_names(tokens: Any) -> list[str]:
    """Names that may fit, best first: the one that the tokenizer is known by, else those that cut
    texts into the words that it makes itself, else all."""
    if (name := KNOWN.get(_fingerprint(tokens))) is not None:
        return [name]
    own = tokens.backend_tokenizer.pre_tokenizer
    texts = sample_texts()
    words = {**WORDS, **EXACT}
    fits = [n for n in words if own and all(_words(own, t) == _cut(words[n], t) for t in texts)]
    return fits or list(WORDS)


def _words(pre_tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where the words lie, in characters."""
    return [where for _, where in pre_tokenizer.pre_tokenize_str(text)]


def _cut(words: tuple[str, ...], text: str) -> list[tuple[int, int]]:
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _words(pre_tokenizers.Sequence([_splitter(words), level]), text)


def _splitter(words: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words]
    )


def _has_marks(text: str) -> bool:
    return any(unicodedata.category(character).startswith("M") for character in text)


def _fingerprint(tokens: Any) -> str:
    return hashlib.sha256(str(list(tokens.encode(PROBE))).encode()).hexdigest()


def _tokens(
    tokens: Any, have: Mapping[str, int], size: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and their kinds by id; ids that the tokenizer lacks are filled up."""
    names, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in have.items():
        names[i], types[i] = token, NORMAL
    for i, added in tokens.added_tokens_decoder.items():
        types[i] = _kind(added)
    return tuple(names), tuple(types)


def _kind(added: Any) -> int:
    """Some models leave their control tokens unmarked; their form gives them away."""
    text = added.content
    looks = text in _CONTROLS or any(
        text.startswith(begin) and text.endswith(end) for begin, end in _AROUND_CONTROLS
    )
    return CONTROL if added.special or looks else USER_DEFINED


def _special(tokens: Any, configuration: Any) -> dict[str, int]:
    """The ids of special tokens: the tokenizer's, else those of the model's configuration."""
    found: dict[str, int] = {}
    for name in _SPECIALS:
        for holder in (tokens, configuration):
            value = getattr(holder, f"{name}_token_id", None)
            if isinstance(value, int) and 0 <= value < configuration.vocab_size:
                found.setdefault(name, value)
    return found


def _adds(tokens: Any) -> dict[str, bool]:
    """Whether the tokenizer puts `bos` before a text and `eos` behind it."""
    plain, whole = tokens.encode("a", add_special_tokens=False), tokens.encode("a")
    for first in (False, True):
        for last in (False, True):
            before = [tokens.bos_token_id] if first else []
            behind = [tokens.eos_token_id] if last else []
            if [*before, *plain, *behind] == list(whole):
                return {"bos": first, "eos": last}
    _refuse("puts other tokens than bos and eos around a text")


def _sentencepiece(tokens: Any, size: int, folder: Path, facts: Mapping[str, Any]) -> Vocabulary:
    """From `tokenizer.model`, whose scores say what is merged first."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        _refuse("is a SentencePiece one, and its tokenizer.model, which holds the scores, is not"
                f" in {folder}")  # fmt: skip
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ConfigError(
            "export.format: gguf: this tokenizer needs sentencepiece:"
            ' pip install "launch-llm[quantize]"'
        ) from error
    model = SentencePieceProcessor(model_file=str(path))
    names, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    scores = [-10000.0] * size
    for i in range(min(model.get_piece_size(), size)):
        names[i], scores[i] = model.id_to_piece(i), model.get_score(i)
        types[i] = (
            UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i)
            else UNUSED if model.is_unused(i) else BYTE if model.is_byte(i) else NORMAL
        )  # fmt: skip
    for i, added in tokens.added_tokens_decoder.items():
        if types[i] != UNKNOWN:
            names[i], types[i], scores[i] = added.content, _kind(added), _ADDED
    made = Vocabulary("llama", "default", tuple(names), tuple(types), (), tuple(scores), **facts)
    without = replace(made, space_prefix=False)
    return without if not differences(without, tokens) else made
