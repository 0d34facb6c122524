"""The objective of stage `kd`: with its teacher, or with the answers that one gave before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

from trainer import copies, models, trial
from trainer.context import Context
from trainer.data import read
from trainer.objective import Objective
from trainer.objectives.distill import DistillOnline
from trainer.objectives.distill_stored import DistillStored
from trainer.objectives.keep_logits import StayNear
from trainer.teacher import Answers, StoredAnswers, coverage
from trainer.teacher_files import LogitFiles

#: Above this share of tokens without a teacher's answer, a warning says so.
MISSING_SHARE = 0.1


def make(context: Context, tokens: Any) -> Objective:
    """Errors: `ConfigError` for a teacher that is not there or of another vocabulary."""
    kd = context.config.kd
    assert kd is not None
    keep = _stay_near(context, tokens)
    if kd.teacher is None:
        return DistillStored(kd, _answers(context, tokens), context.runtime, keep)
    if models.has_tokenizer(kd.teacher):
        models.check_vocabularies(tokens, models.load_tokenizer(kd.teacher))
    attention = models.attention_implementations(context.config.model, context.runtime)
    teacher = models.load_frozen(kd.teacher, context.runtime, attention)
    trial.check(teacher, context.runtime, kd.teacher, packing=context.config.data.packing)
    context.say(
        f"teacher: {copies.origin(kd.teacher)}, {models.parameter_count(teacher):,} parameters,"
        f" vocabulary {teacher.config.vocab_size}"
    )
    return DistillOnline(kd, teacher, context.runtime, keep)


def _stay_near(context: Context, tokens: Any) -> Optional[StayNear]:
    """The term of `kd.keep_logits`, with the model as this stage first found it."""
    config, runtime = context.config, context.runtime
    assert config.kd is not None and config.model is not None and config.train is not None
    if config.kd.keep_logits is None:
        return None
    plan = replace(config.model, gradient_checkpointing=False)
    start = models.load_model(plan, tokens, runtime, config.train.seed).to(runtime.dtype)
    size = models.parameter_count(start) * runtime.dtype.itemsize
    context.say(f"keep_logits: a frozen copy of the starting model, {size / 1e6:,.0f} MB")
    return StayNear(config.kd.keep_logits, start, runtime)


def _answers(context: Context, tokens: Any) -> Answers:
    """The stored answers of `kd`. Says, and records, when many are missing."""
    config, rows = context.config, context.rows
    assert config.kd is not None and config.model is not None and rows is not None
    kd = config.kd
    found: Answers
    if kd.targets is not None:
        found = StoredAnswers(kd.targets, tokens, kd.temperature)
    else:
        plan = config.model
        fresh = plan.architecture is not None or plan.name is None
        head = len(tokens) if fresh else models.vocabulary_size(str(plan.name))
        found = LogitFiles(
            str(kd.logits_dir),
            read.sample_names(config.data.train),
            rows,
            tokens=len(tokens),
            vocabularies=(len(tokens), head),
            temperature=kd.temperature,
            top_k=kd.top_k,
        )
    seen = coverage(found, rows)
    context.say(
        f"teacher: answers for {seen.known:,} of {seen.tokens:,} tokens, in {seen.known_chunks} of"
        f" {seen.chunks} chunks, from {found.name}"
    )
    if seen.missing > MISSING_SHARE:
        context.say(
            f"WARNING: {seen.missing:.0%} of the tokens of data.train have no answer of the"
            " teacher; they are learnt from with cross-entropy alone"
        )
        if context.metrics is not None:
            facts = {"missing": seen.tokens - seen.known, "tokens": seen.tokens}
            context.metrics.event(
                "teacher_missing", 0, **facts, missing_chunks=seen.chunks - seen.known_chunks,
                chunks=seen.chunks,
            )  # fmt: skip
    return found
