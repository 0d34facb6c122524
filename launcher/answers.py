"""How long stage `grpo` takes: answers that the model itself draws, one token after another, and
what is learned from them. An estimate: docs/forecast.md says which of its figures are measured.

Answers are taken to be as long as they may be, and so what comes out is the most. How long the
user's functions judge them is not known, and not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Optional

from launcher import amount, fit, speed
from launcher.fit.activations import cache
from launcher.fit.memory import step_of
from launcher.hardware import Accelerator, Kind
from launcher.shapes import Shape, Shapes
from launcher.spec import Stage

#: The part of its memory's bandwidth that a GPU reaches: assumed.
_REACHED = 0.7
#: Seconds in which Python asks a GPU for one block's pass of one token: 25.5 tokens/s of the 32
#: blocks of Llama 2 7B, batch 1, "simple implementation"; below that the GPU waits.
_BLOCK = 1 / 25.5 / 32
_BLOCK_SOURCE = "pytorch.org/blog/accelerating-generative-ai-2, 2023: 25.5 tokens/s of 32 blocks"
#: What `generate` itself costs on a processor, read off benchmarks/answers.py on one core of an AMD
#: EPYC, 2026-11-22: calls like that of a block for each draw, each of its answers and each pass,
#: and elements for each logit that is drawn from.
_DRAW, _ANSWER, _PASS, _LOGIT = 20.0, 0.25, 4.0, 16.0
#: A token's keys and values: the cache is copied to become longer, so read, written, and read.
_TOUCHED = 3


@dataclass(frozen=True)
class Pace:
    """`tokens_per_second` of all workers over a whole step, drawing and learning. `explain`: the
    arithmetic."""

    tokens_per_second: float
    basis: str
    source: str
    explain: tuple[str, ...]


def tokens(stage: Stage) -> tuple[float, int]:
    """Of a prompt and of an answer, at most: of local prompts their mean."""
    assert stage.grpo is not None
    answer = stage.grpo.max_new_tokens
    most = float(max(stage.data.sequence_length - answer, 1))
    each = amount.count(stage).tokens_per_example
    return (most if each is None else min(each, most)), answer


def tokens_per_prompt(stage: Stage) -> float:
    """Of all answers to a prompt, each with the prompt before it."""
    assert stage.grpo is not None
    return stage.grpo.group * float(sum(tokens(stage)))


def pace(
    stage: Stage, accelerator: Accelerator, models: Shapes, task: str, memory: Optional[fit.Memory]
) -> Pace:
    """The speed of a stage `grpo` on its own hardware. `task`: as the table of efficiencies calls
    it; `memory`: what `fit` found, for the answers that are drawn at once. Errors: ValueError, with
    what is not known."""
    assert stage.grpo is not None and stage.train is not None
    shape, kind = models.get("model"), accelerator.kind
    if shape is None:
        raise ValueError("the model's shape is not known")
    if stage.grpo.rollouts == "vllm":
        raise ValueError("how fast the vLLM server answers is not known")
    workers = accelerator.count * stage.hardware.nodes
    rows, micro_batches = speed.rows_of_step(stage.train)
    if isinstance(stage.train.micro_batch, str):
        rows = max(1, rows // workers)
    learn, told = _learning(stage, kind, shape, task, workers)
    wanted = rows // micro_batches * stage.grpo.group
    once = _at_once(stage, accelerator, models, memory, wanted)
    draws = micro_batches * -(-wanted // once)
    drawn, lines = drawing(stage, accelerator, models, once, task)
    served = stage.grpo.iterations
    seconds = draws * drawn / served + learn
    each = tokens_per_prompt(stage)
    lines += [
        f"speed: {draws} draw(s) of {once} answers at once, {_time(draws * drawn)}"
        + (f", for {served} steps" if served > 1 else ""),
        *told,
        f"speed: {rows * each:,.0f} tokens a worker's step / ({_time(draws * drawn / served)} + "
        f"{_time(learn)}); what grpo.rewards take comes on top, answers that end early take less",
    ]
    basis, source = "assumed", "an estimate from memory bandwidth and calls"
    if kind.vendor == "cpu":
        basis, source = "measured", "on one core of another machine"
    return Pace(rows * each * workers / seconds, basis, source, tuple(lines))


def drawing(
    stage: Stage, accelerator: Accelerator, models: Shapes, once: int, task: str
) -> tuple[float, list[str]]:
    """Seconds of one draw of `once` answers: the prompts in one pass, then a token each in every
    pass. A pass reads all weights once, whatever it serves."""
    kind, shape = accelerator.kind, models["model"]
    step = step_of(stage, accelerator, stage.hardware.nodes, models)
    prompt, answer = tokens(stage)
    context = prompt + answer / 2
    pairs = once * context * cache(step) * _TOUCHED
    first = speed.reading(shape, prompt, once * prompt, head=False)
    each = speed.reading(shape, context, once)
    if kind.vendor == "cpu":
        # Of a weight that is read half as much as of a number that is read and written.
        elements = each.elements + _weights(shape, once) / 2 + pairs / step.wide
        elements += _LOGIT * once * shape.vocabulary
        one = speed.CORE.seconds(speed.Work(once, each.flops, elements, each.calls + _PASS))
        around = speed.CORE.call * (_DRAW + _ANSWER * once)
        line = (f"speed: drawing: {_time(one)} a token of all ({speed.CORE_SOURCE}; "
                f"benchmarks/answers.py), {answer:,} one after another")  # fmt: skip
        return around + speed.CORE.seconds(first) + answer * one, [line]
    if not kind.memory_gbs:
        raise ValueError(f"the bandwidth of the memory of {kind.name} is not known")
    size = _weights(shape, once) * step.wide
    moved = (size + pairs) / (kind.memory_gbs * 1e9 * _REACHED)
    rate, _ = _products(stage, kind, shape, task, float(once))
    asked = shape.layers * _BLOCK * (2 if step.rank else 1)
    one = max(moved, each.flops / rate, asked)
    line = (
        f"speed: drawing: a token of all takes the most of {_time(moved)}, ({size / 1e9:.3g} GB of "
        f"weights + {pairs / 1e9:.3g} GB of keys and values) / ({kind.memory_gbs:,.0f} GB/s x "
        f"{_REACHED:.0%}, assumed); {_time(each.flops / rate)} of products; {_time(asked)} in "
        f"which Python asks for {shape.layers} blocks (published: {_BLOCK_SOURCE}); "
        f"{answer:,} one after another"
    )
    return first.flops / rate + answer * one, [line]


def _learning(
    stage: Stage, kind: Kind, shape: Shape, task: str, workers: int
) -> tuple[float, list[str]]:
    """Seconds a step in which one worker learns from its answers, with the passes that only read
    them."""
    assert stage.grpo is not None and stage.train is not None
    grpo, train, length = stage.grpo, stage.train, max(1, round(sum(tokens(stage))))
    more: dict[str, Any] = {"global_batch": (train.global_batch or 1) * grpo.group}
    if not isinstance(train.micro_batch, str):
        more = {"micro_batch": train.micro_batch * grpo.group}
    rows = replace(stage, data=replace(stage.data, sequence_length=length),
                   train=replace(train, **more))  # fmt: skip
    work = speed.work(rows, shape)
    if isinstance(train.micro_batch, str):
        work = work.shared(workers)
    readings = (grpo.beta > 0) + (1 / grpo.iterations if grpo.iterations > 1 else 0)
    reading = speed.reading(shape, length, work.tokens)
    work = speed.Work(
        work.tokens, work.flops + readings * reading.flops,
        work.elements + readings * reading.elements, work.calls + readings * reading.calls,
    )  # fmt: skip
    said = f"speed: learning: {work.flops / work.tokens / 1e9:.4g} GFLOP a token"
    if kind.vendor == "cpu":
        seconds = speed.CORE.seconds(work)
        return seconds, [f"{said}: {_time(seconds)} a step ({speed.CORE_SOURCE})"]
    flight = float(train.micro_batch if not isinstance(train.micro_batch, str) else 8)
    rate, found = _products(stage, kind, shape, task, flight * grpo.group * length)
    seconds = work.flops / rate
    how = f"{kind.bf16_tflops:g} TFLOP/s x {found.value:.1%} ({found.basis}: {found.source})"
    return seconds, [f"{said}, {how}: {_time(seconds)} a step"]


def _products(
    stage: Stage, kind: Kind, shape: Shape, task: str, flight: float
) -> tuple[float, speed.Efficiency]:
    """FLOP/s of one device's matrix products with so many tokens at once. Errors: ValueError."""
    precision = stage.model.precision if stage.model is not None else "auto"
    if not kind.bf16_tflops or precision == "fp32":
        in_what = "fp32" if kind.bf16_tflops else "fp16"
        raise ValueError(f"the peak of {kind.name} in {in_what} is not known")
    found = speed.efficiency(kind, task, shape.parameters, flight)
    if found is None:
        raise ValueError(f"no efficiency of {kind.name} is known")
    return kind.bf16_tflops * 1e12 * found.value, found


def _at_once(
    stage: Stage,
    accelerator: Accelerator,
    models: Shapes,
    memory: Optional[fit.Memory],
    wanted: int,
) -> int:
    """Answers that are drawn together: all of a micro-batch, or as often halved as their keys and
    values do not fit beside what stays in memory."""
    if memory is None or memory.limit is None:
        return wanted
    step = step_of(stage, accelerator, stage.hardware.nodes, models)
    each = cache(step) * sum(tokens(stage))
    room = memory.limit - fit.staying(memory)
    while wanted > 1 and wanted * each > room:
        wanted //= 2
    return wanted


def _weights(shape: Shape, once: int) -> float:
    """Weights of matrix products that a pass for `once` tokens reads: of experts, those that any of
    the tokens is likely to meet."""
    met = 1.0
    if shape.experts:
        met = 1 - (1 - shape.experts_per_token / shape.experts) ** once
    total = 0.0
    for name, size in shape.tensors().items():
        if len(size) > 1 and (shape.tied or name != "model.embed_tokens.weight"):
            total += math.prod(size) * (met if ".experts." in name else 1.0)
    return total


def _time(seconds: float) -> str:
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
