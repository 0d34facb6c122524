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
    number = step.shape.parameters - step.shape.layers * _of_block(step)
    size = step.base_bytes
    return Part("embeddings and head", number * size, f"{count(number)} gathered x {size} bytes")


def root_learns(step: Step) -> float:
    """Parameters outside the blocks that learn."""
    return sum(
        math.prod(size)
        for name, size in step.learns.items()
        if not name.startswith("model.layers.")
    )


def block(step: Step, first: bool) -> list[Part]:
    """Of the backward pass of a block: its weights, gathered, and its gradients. Before the `first`
    one, whose turn is last, there is the next block too, in the buffer that gathers it and as it
    comes out of that; with the first one there are the fp32 buffers in which its gradients and
    those of the block before are summed over the workers."""
    adapted = step.adapted / step.shape.layers
    inside = "model.layers.0."
    learns = adapted + sum(math.prod(d) for n, d in step.learns.items() if n.startswith(inside))
    held, size = _of_block(step) + adapted, step.wide
    times, sums = (1, 8) if first else (3, 0)
    how = f"{count(learns)} parameters x {size} bytes"
    if sums:
        how += ", and 2 buffers x 4 bytes that sum them"
    return [
        Part("gathered blocks", times * size * held, f"{times} x {count(held)} x {size} bytes"),
        Part("gradients of one block", (size + sums) * learns, how),
    ]


def _of_block(step: Step) -> int:
    return sum(math.prod(size) for size in step.shape.layer().values())
