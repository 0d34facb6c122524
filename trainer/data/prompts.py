"""Prompts as rows, one each, with what else their records hold: what rewards are given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Optional, Union

import numpy as np

from trainer.batch import Batch
from trainer.config import Data, Source
from trainer.data import DataError
from trainer.data.chat import Template, checked_messages
from trainer.data.chunks import SAMPLE_IDS, Chunks, Encoder, source_facts
from trainer.data.manifest import expand
from trainer.data.pack import one_per_row
from trainer.data.read import Object, objects, source_name
from trainer.data.shapes import Skipped, checked_text
from trainer.data.stream import Rows

#: Keys of a record that are no column: the prompt itself, what others use for answers, and what
#: rewards are given under these names.
_NO_COLUMNS = ("prompt", "prompts", "completion", "completions", "completion_ids")


@dataclass(frozen=True)
class Prompt:
    """`ids`: the prompt as the model reads it. `given`: as the record has it, a string or messages.
    `columns`: the other keys of the record."""

    ids: tuple[int, ...]
    given: Union[str, list[dict[str, Any]]]
    columns: dict[str, Any]


class Prompts(Rows):
    """Rows of one prompt each, without targets; `Batch.records` holds each row's `Prompt`."""

    def __init__(self, chunks: Chunks, prompts: Sequence[Prompt], longest: int, repeats: int):
        super().__init__(chunks, one_per_row(len(prompts)), longest, fixed=False)
        self.prompts, self.repeats = prompts, repeats

    @property
    def columns(self) -> list[str]:
        """The keys that any record has besides its prompt, sorted."""
        return sorted({name for prompt in self.prompts for name in prompt.columns})

    @cached_property
    def digest(self) -> str:
        """Other answers to the same prompts are other data, too."""
        digest = hashlib.sha256(super().digest.encode())
        for prompt in self.prompts:
            digest.update(json.dumps(prompt.columns, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int]) -> Batch:
        made = super().batch(indices)
        made.records = [self.prompts[index] for index in indices]
        return made


def read_prompts(
    sources: tuple[Source, ...],
    tokenizer: Any,
    data: Data,
    *,
    answer: int,
    repeats: int = 1,
    limit: Optional[int] = None,
) -> Prompts:
    """The prompts of `sources`, at most `limit`, each source giving an equal part. A string is
    taken as it is, after a begin-of-text token where the tokenizer puts one; messages go through
    the chat template. `answer`: tokens that must be left for an answer in `data.sequence_length`.
    Errors: `DataError` for a bad record, a prompt that is too long among them; `ConfigError`."""
    encoder = Encoder(tokenizer, data.sequence_length)
    listed = expand(sources)
    found: list[Prompt] = []
    names: list[tuple[int, str]] = []
    facts: list[dict[str, Any]] = []
    for index, source in enumerate(listed):
        quota = None
        if limit is not None:
            quota = len(found) + -(-(limit - len(found)) // (len(listed) - index))
        skipped = Skipped() if data.skip_bad else None
        before = len(found)
        for item in objects((source,), skipped):
            if quota is not None and len(found) >= quota:
                break
            for prompt in _prompt(item, encoder, data.sequence_length - answer, skipped):
                found.append(prompt)
                names.append((index, item.id))
        if len(found) == before:
            first = f": {skipped.examples[0]}" if skipped is not None and skipped.examples else ""
            raise DataError(f"{source_name(source)}: no prompt can be used{first}")
        tokens = sum(len(prompt.ids) for prompt in found[before:])
        ids = dict.fromkeys(name for _, name in names[before:][:SAMPLE_IDS])
        facts.append(source_facts(source, len(found) - before, tokens, ids, skipped))
    lengths = np.array([len(prompt.ids) for prompt in found], dtype=np.int64)
    none = np.zeros(len(found), dtype=np.int64)
    chunks = Chunks(
        np.concatenate([np.array(prompt.ids, dtype=np.int32) for prompt in found]),
        np.cumsum(lengths) - lengths, lengths, none, None, none, encoder.eos, facts,
        np.arange(len(found)), names, lengths, np.zeros(len(found), dtype=np.bool_),
    )  # fmt: skip
    return Prompts(chunks, found, data.sequence_length, repeats)


def _prompt(
    item: Object, encoder: Encoder, most: int, skipped: Optional[Skipped]
) -> Iterator[Prompt]:
    """The prompt of a record, or nothing where it is bad and that was noted."""
    try:
        yield _made(item, encoder, most)
    except DataError as error:
        if skipped is None:
            raise
        skipped.add(error)


def _made(item: Object, encoder: Encoder, most: int) -> Prompt:
    record, at = item.record, item.at
    # Tables give every record all columns: null is what a record does not have.
    if record.get("messages") is not None and record.get("prompt") is None:
        # An exchange: what was asked before its last answer, which becomes a column.
        messages = checked_messages(record["messages"], "messages", at)
        record = {name: value for name, value in record.items() if name != "messages"}
        if len(messages) > 1 and messages[-1]["role"] == "assistant":
            answer = messages.pop()["content"]
            if record.get("answer") is None:
                record["answer"] = answer
        record["prompt"] = messages
    if "prompt" not in record:
        keys = ", ".join(f"'{name}'" for name in sorted(record)[:8]) or "none"
        raise DataError(f"{at}: no key 'prompt'; keys here: {keys}")
    given, begin = record["prompt"], []
    if isinstance(given, list):
        text = Template(encoder.tokenizer).asked(record, at)
    else:
        text = checked_text(given, "prompt", at)
        begin = [encoder.bos] if encoder.bos is not None else []
    ids = encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*(begin if ids[:1] != begin else []), *ids]
    if not ids:
        raise DataError(f"{at}: 'prompt' is empty: there is nothing to answer")
    if len(ids) > most:
        raise DataError(
            f"{at}: 'prompt' has {len(ids)} tokens; data.sequence_length leaves {most} beside"
            " grpo.max_new_tokens: raise it, shorten the prompt, or leave such lines out with"
            " data.skip_bad"
        )
    columns = {name: value for name, value in record.items() if name not in _NO_COLUMNS}
    return Prompt(tuple(ids), given, columns)
