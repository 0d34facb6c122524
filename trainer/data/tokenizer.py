"""Byte-level BPE tokenizers, written as folders that `AutoTokenizer.from_pretrained` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data import DataError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
_SPECIALS = [END_OF_TEXT, PAD]
#: What a tokenizer has before any merge: the specials and the 256 bytes.
BASE_SIZE = len(_SPECIALS) + 256


def train_tokenizer(
    texts: Sequence[str], vocab_size: int, min_frequency: int, folder: str | Path
) -> int:
    """Train on `texts` and write `folder`; the size reached (smaller than `vocab_size` where pairs
    that occur `min_frequency` times run out). Equal texts give equal bytes. Errors: `DataError`
    without text, ValueError for a size below `BASE_SIZE`.

    BPE over bytes: Sennrich et al. 2016 (arXiv 1508.07909), Radford et al. 2019 (GPT-2)."""
    if vocab_size < BASE_SIZE:
        raise ValueError(f"vocab_size {vocab_size}: must be at least {BASE_SIZE}")
    if not any(texts):
        raise DataError("tokenizer: no text to train on; give documents under `data.train`")
    tokenizer = _bytes(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    _write(tokenizer, Path(folder))
    return int(tokenizer.get_vocab_size())


def byte_tokenizer(folder: str | Path) -> int:
    """Write a tokenizer without merges, one token a byte; its size."""
    symbols = _SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = _bytes(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.add_special_tokens(_SPECIALS)
    _write(tokenizer, Path(folder))
    return len(symbols)


def _bytes(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _write(tokenizer: Tokenizer, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(folder)
