"""How much a stage reads: its steps, rows and tokens, as far as that can be known beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from launcher.spec import Stage
from trainer import phases
from trainer.config import Grpo, Source, Train

#: Where only a text's size is known. English prose with the vocabularies of today is near it; code,
#: other languages and small vocabularies have fewer bytes a token.
BYTES_PER_TOKEN = 4.0
#: Bytes of local data that are read to count its lines, about a second's worth; the rest is
#: taken to be like them.
_COUNTED = 256 * 2**20


@dataclass(frozen=True)
class Amount:
    """`rows` are of `data.sequence_length` where packed, else examples. `about`: a count is an
    estimate. `how`: the arithmetic, in lines. `unknown`: why there is none, else empty."""

    tokens: Optional[float] = None
    rows: Optional[float] = None
    steps: Optional[int] = None
    examples: Optional[float] = None
    about: bool = False
    how: tuple[str, ...] = ()
    unknown: str = ""


@dataclass(frozen=True)
class Counted:
    """What the data hold, once. `tokens_per_example` None: not known."""

    examples: Optional[float]
    tokens_per_example: Optional[float]
    how: str
    about: bool = False


def of_stage(stage: Stage, workers: int) -> Amount:
    """What all `workers` of the stage read until it is over; of a run that pauses at `train.until`,
    until then. Not of `train.seconds_of`: that is a time."""
    if stage.targets is not None:
        return _of_targets(stage)
    train = stage.train
    if train is None:
        return Amount(unknown="it does not train")
    if train.seconds_of is not None:
        return Amount(unknown="train.seconds_of says how long it takes, not how much it reads")
    per_step, words = _rows_per_step(train, workers)
    held = count(stage)
    if stage.grpo is not None:
        return _of_answers(stage, stage.grpo, train, per_step, words, held)
    if train.steps is not None:
        steps = min(train.steps, train.until or train.steps)
        return _of_rows(stage, steps * per_step, steps, held, f"{steps:,} steps x {words}")
    return _of_epochs(stage, train, per_step, words, held)


def left(read: Amount, done: int) -> Amount:
    """What is left of `read` from a checkpoint of step `done` on; all of it, and that is said,
    where nobody knows how many steps there are."""
    if done <= 0:
        return read
    if read.steps is None:
        said = f"all of it is counted: of how many steps {done:,} is one is not known"
        return replace(read, how=(*read.how, said))
    rest = max(0, read.steps - done)
    part = rest / read.steps
    tokens, rows, examples = (
        None if whole is None else whole * part for whole in (read.tokens, read.rows, read.examples)
    )
    said = f"from the checkpoint of step {done:,} on: {rest:,} of {read.steps:,} steps"
    return replace(read, tokens=tokens, rows=rows, examples=examples, how=(*read.how, said))


def count(stage: Stage) -> Counted:
    """The stage's training data: what `forecast` says of them, else what local files show."""
    told = stage.forecast
    if told is not None and told.examples is not None:
        how = f"forecast.examples: {told.examples:,}"
        return Counted(told.examples, told.tokens_per_example, how)
    seen = _count_files(stage.data.train)
    if told is not None and told.tokens_per_example is not None:
        return Counted(seen.examples, told.tokens_per_example, seen.how, seen.about)
    return seen


def figure(number: float) -> str:
    """A large number with a word, three digits of it."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


def _of_targets(stage: Stage) -> Amount:
    assert stage.targets is not None
    limit, length, held = stage.targets.limit_rows, stage.data.sequence_length, count(stage)
    if limit is not None:
        how = f"at most {limit:,} rows x {length:,} tokens"
        return Amount(limit * length, limit, how=(how,))
    if held.examples is None or held.tokens_per_example is None:
        return Amount(unknown=f"{held.how}; give forecast.examples and forecast.tokens_per_example")
    tokens = held.examples * held.tokens_per_example
    how = f"{held.how}: {figure(tokens)} tokens, read once"
    return Amount(tokens, tokens / length, None, held.examples, held.about, (how,))


def _of_rows(stage: Stage, rows: float, steps: int, held: Counted, words: str) -> Amount:
    length = stage.data.sequence_length
    if stage.data.packing:
        how = f"{words} = {rows:,.0f} rows of {length:,} tokens: {figure(rows * length)} tokens"
        each = held.tokens_per_example
        examples = None if each is None else rows * length / each
        return Amount(rows * length, rows, steps, examples, False, (how, *_shorter(stage)))
    each = held.tokens_per_example
    if each is None:
        unknown = f"rows are not packed, and {held.how}; give forecast.tokens_per_example"
        return Amount(None, rows, steps, rows, unknown=unknown)
    tokens = rows * min(each, length)
    how = f"{words} = {rows:,.0f} examples of {each:,.0f} tokens: {figure(tokens)} tokens"
    return Amount(tokens, rows, steps, rows, held.about, (how,))


def _shorter(stage: Stage) -> tuple[str, ...]:
    """What a curriculum changes of that: not the tokens, and so neither steps nor passes."""
    if not stage.data.curriculum:
        return ()
    lengths = phases.words(stage.data)
    return (f"rows of {lengths}: the shorter, the more of them, as many tokens a step",)


def _of_epochs(stage: Stage, train: Train, per_step: int, words: str, held: Counted) -> Amount:
    epochs = train.epochs or 0.0
    if held.examples is None:
        return Amount(unknown=f"{held.how}; give forecast.examples")
    examples = held.examples * epochs
    passes = f"{held.how} x {epochs:g} epochs = {figure(examples)} examples"
    each, most = held.tokens_per_example, _most_rows(train, per_step) * epochs
    if each is None:
        if stage.data.packing:
            unknown = "the length of the examples is not known; give forecast.tokens_per_example"
            return Amount(None, None, None, examples, held.about, (passes,), unknown)
        examples = min(examples, most)
        steps = max(1, math.ceil(examples / per_step))
        unknown = f"{passes}, of unknown length; give forecast.tokens_per_example"
        return Amount(None, examples, steps, examples, held.about, (passes,), unknown)
    tokens = examples * (each if stage.data.packing else min(each, stage.data.sequence_length))
    rows = tokens / stage.data.sequence_length if stage.data.packing else examples
    if most < rows:
        part = most / rows
        tokens, rows, examples = tokens * part, most, examples * part
        passes += f", of which train.limit_batches leaves {figure(rows)} rows"
    steps = max(1, math.ceil(rows / per_step))
    until = train.until or steps
    if until < steps:
        part = until / steps
        tokens, rows, examples, steps = tokens * part, rows * part, examples * part, until
    how = (passes, f"{each:,.0f} tokens each: {figure(tokens)} tokens, {steps:,} steps of {words}",
           *_shorter(stage))  # fmt: skip
    return Amount(tokens, rows, steps, examples, held.about, how)


def _most_rows(train: Train, per_step: int) -> float:
    """Rows of all workers that `train.limit_batches` lets through in one pass."""
    if train.limit_batches is None:
        return math.inf
    return train.limit_batches * per_step / (train.accumulate if train.global_batch is None else 1)


def _of_answers(
    stage: Stage, grpo: Grpo, train: Train, per_step: int, words: str, held: Counted
) -> Amount:
    """Rows are prompts; their tokens are those of all answers, as long as they may be."""
    most = float(max(stage.data.sequence_length - grpo.max_new_tokens, 1))
    prompt = min(held.tokens_per_example or most, most)
    steps, passes = train.steps, ""
    if steps is None:
        if held.examples is None:
            return Amount(unknown=f"{held.how}; give forecast.examples")
        once = max(1, -(-int(held.examples * (train.epochs or 0.0)) // per_step))
        steps, passes = once * grpo.iterations, f"{held.how} x {train.epochs:g} epochs: "
    steps = min(steps, train.until or steps)
    prompts = float(steps * per_step)
    tokens = prompts * grpo.group * (prompt + grpo.max_new_tokens)
    told = "as data.train has them" if held.tokens_per_example else "at most"
    how = (f"{passes}{steps:,} steps x {words} x {grpo.group} answers of up to "
           f"{grpo.max_new_tokens:,} tokens, prompts of {prompt:,.0f} ({told}): "
           f"{figure(tokens)} tokens")  # fmt: skip
    return Amount(tokens, prompts, steps, prompts, held.about, (how,))


def _rows_per_step(train: Train, workers: int) -> tuple[int, str]:
    if isinstance(train.micro_batch, str):
        return int(train.global_batch or 1), f"{train.global_batch} rows (train.global_batch)"
    rows = train.micro_batch * train.accumulate * workers
    parts = [f"{train.micro_batch} rows", f"{train.accumulate} micro-batches", f"{workers} workers"]
    return rows, " x ".join(parts[: 3 if workers > 1 else 2])


def _count_files(sources: tuple[Source, ...]) -> Counted:
    """Documents and bytes of local files, as far as that takes about a second."""
    if not sources:
        return Counted(None, None, "data.train is empty")
    lines = size = 0.0
    left, about = _COUNTED, False
    for source in sources:
        if source.path is None or "://" in source.path or source.path.startswith("${"):
            named = source.path or source.builtin or source.manifest
            named = named or (source.hf.name if source.hf is not None else "")
            return Counted(None, None, f"{named} is not counted from here")
        if source.weight != 1.0:
            return Counted(None, None, "data.train has weights, which change what is read")
        for file in _files(Path(source.path)):
            found, read, whole = _lines(file, left)
            left -= read
            about = about or read < whole
            lines += source.share * found * (whole / read if read else 0)
            size += source.share * whole
    if not lines:
        return Counted(None, None, "data.train has no documents that can be counted from here")
    how = f"{'about ' if about else ''}{lines:,.0f} documents in data.train"
    return Counted(lines, size / lines / BYTES_PER_TOKEN, f"{how} (4 bytes a token: assumed)", True)


def _files(path: Path) -> Iterator[Path]:
    """As the trainer reads `data.train.path`: a file, a folder, or a glob."""
    if path.is_dir():
        yield from sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".txt"))
    elif path.is_file() or not path.is_absolute():
        yield path
    else:
        yield from sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _lines(file: Path, limit: int) -> tuple[int, int, int]:
    """Documents in the first `limit` bytes of a file, how many bytes that were, and its size: one a
    line of a .jsonl, a .txt as a whole."""
    lines, read, last = 0, 0, b"\n"
    try:
        if file.suffix == ".txt":
            return 1, file.stat().st_size, file.stat().st_size
        with file.open("rb") as handle:
            while read < limit and (block := handle.read(min(2**20, limit - read))):
                read, last = read + len(block), block[-1:]
                lines += block.count(b"\n")
        whole = file.stat().st_size
    except OSError:
        return 0, 0, 0
    return lines + (last != b"\n"), read, whole
