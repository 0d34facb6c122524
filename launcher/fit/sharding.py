"""What FSDP2 changes of a step's memory: what the workers share, and what is gathered.

trainer/parallel.py is followed: each block is a unit, whose tensors are gathered in the precision
of the products and given back after its pass; embeddings, last norm and head are another unit,
gathered as they are at the beginning of a forward pass and kept to the end of the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Optional

from launcher.fit.parts import Part, count, usable
from launcher.hardware import Accelerator
from launcher.spec import Stage
from trainer.config_train import refused

if TYPE_CHECKING:
    from launcher.fit.step import Step

#: The share of a device's memory from which on `train.parallel: auto` shards (trainer/parallel.py).
SHARE = 0.4
#: What a worker holds a part of.
_SHARED = {"weights", "adapter", "optimizer", "gradients"}


def chosen(stage: Stage, accelerator: Accelerator, step: Step) -> Optional[str]:
    """Why the workers share the model, in a phrase, by what the trainer decides; None: each has
    all of it. `step`: of that one."""
    assert stage.train is not None
    if stage.train.parallel == "ddp" or step.nf4 or refused(stage.stage, "fsdp"):
        return None
    if stage.train.parallel == "fsdp":
        return "train.parallel: fsdp"
    total = usable(accelerator.kind)
    if step.workers == 1 or total is None:
        return None
    whole = step.shape.parameters * step.base_bytes + 4 * step.adapted + 12 * step.trained
    if whole <= SHARE * total:
        return None
    return f"fsdp: whole, weights, gradients and moments take {whole / total:.0%} of a GPU"


def shared(parts: list[Part], step: Step) -> list[Part]:
    """`parts` with one worker's part of what is shared."""
    workers = step.workers
    return [
        replace(part, bytes=part.bytes / workers, how=f"{part.how}, of {workers} workers one's")
        if part.name in _SHARED
        else part
        for part in parts
    ]


def root(step: Step) -> Part:
    """What lies outside the blocks, whole."""
    blocks = sum(math.prod(size) for size in step.shape.layer().values()) * step.shape.layers
    number = step.shape.parameters - blocks
    size = step.base_bytes
    return Part("embeddings and head", number * size, f"{count(number)} gathered x {size} bytes")


def root_learns(step: Step) -> float:
    """Parameters outside the blocks that learn."""
    return sum(
        math.prod(size)
        for name, size in step.learns.items()
        if not name.startswith("model.layers.")
    )


def beginning(step: Step) -> list[Part]:
    """Beside `root`, when the first block has been gathered: the buffers that both came in."""
    if step.workers == 1:
        return []
    held, arrived = _of_block(step), root(step)
    return [
        replace(arrived, name="buffer of embeddings and head"),
        Part("gathered blocks", 2 * step.wide * held,
             f"{count(held)} parameters x {step.wide} bytes, and their buffer"),
    ]  # fmt: skip


def block(step: Step, at: int, done: bool) -> list[Part]:
    """What FSDP2 holds of blocks in the backward pass of block `at` (0: the first, whose turn comes
    last): its weights, gathered; those of the one before it, on their way, in the buffer that they
    arrive in; the gradient of its last product, which comes first, or of all where it is `done`;
    and the fp32 buffer in which the gradients of the block after it are summed over the workers,
    which stays until this one's are due."""
    held, learns = _of_block(step), _learns(step) if done else _learns(step, ".down_proj")
    times = 2 if at > 0 and step.workers > 1 else 1
    of = f"{count(held)} parameters x {step.wide} bytes"
    why = f"{of}, and the next one's in the buffer that gathers it" if times == 2 else of
    parts = [
        Part("gathered blocks", times * step.wide * held, why),
        Part("gradients of one block", step.wide * learns,
             f"{count(learns)} parameters x {step.wide} bytes"),
    ]  # fmt: skip
    return parts if at == step.shape.layers - 1 else [*parts, summed(step)]


def summed(step: Step) -> Part:
    """The buffer in which the gradients of a block are summed over the workers."""
    learns = _learns(step)
    return Part("sum of one block", 4 * learns, f"{count(learns)} gradients x 4 bytes (fp32)")


def left(step: Step, blocks: int, outside: bool = False) -> list[Part]:
    """The gradients of the last `blocks` of them, and of what lies outside: one worker's part. With
    `accumulate` all of them are there all the time, and counted as such."""
    number = blocks * _learns(step) + (root_learns(step) if outside else 0)
    if step.accumulate > 1:
        number = 0.0
    how = f"{count(number)} parameters x 4 bytes (fp32)"
    return shared([Part("gradients", 4 * number, how)], step)


def _learns(step: Step, named: str = "") -> float:
    """Parameters of one block that learn, all or those `named` so: on average, where patterns
    freeze some blocks. Of adapters always all: they are small."""
    found = (
        math.prod(size)
        for name, size in step.learns.items()
        if name.startswith("model.layers.") and named in name
    )
    return (step.adapted + sum(found)) / step.shape.layers


def _of_block(step: Step) -> float:
    """Parameters of one block, with its adapters."""
    own = sum(math.prod(size) for size in step.shape.layer().values())
    return own + step.adapted / step.shape.layers
