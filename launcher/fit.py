"""Will it fit: the memory of one device at its peak, from the shapes of the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from launcher.hardware import Accelerator
from launcher.shapes import Shapes
from launcher.spec import Stage


@dataclass(frozen=True)
class Part:
    """One thing that lies in the device's memory at its peak; `how`: the arithmetic in words."""

    name: str
    bytes: float
    how: str


@dataclass(frozen=True)
class Memory:
    """One device at its peak. `limit`: bytes that a process can use of it; None: not known (cpu).
    `notes`: what the numbers leave open, a line each."""

    parts: tuple[Part, ...]
    limit: Optional[float]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def margin(self) -> Optional[float]:
        """Bytes that are left of the limit; negative: missing."""
        return None if self.limit is None else self.limit - self.bytes

    @property
    def fits(self) -> Optional[bool]:
        return None if self.limit is None else self.bytes <= self.limit


@dataclass(frozen=True)
class Change:
    """What would make a stage fit: `settings` are `--set` arguments of the recipe (KEY=VALUE, below
    the stage), `memory` what it then takes."""

    what: str
    settings: tuple[str, ...]
    memory: Memory


def memory(stage: Stage, accelerator: Accelerator, nodes: int, shapes: Shapes) -> Optional[Memory]:
    """The memory of one device of `accelerator` at its peak; None: not known, see `unknown`."""
    del stage, accelerator, nodes, shapes
    return None


def unknown(stage: Stage, accelerator: Accelerator, shapes: Shapes) -> Optional[str]:
    """Why `memory` has no answer, in a phrase; None when it has."""
    del stage, accelerator, shapes
    return None


def changes(
    stage: Stage, accelerator: Accelerator, nodes: int, shapes: Shapes
) -> tuple[Change, ...]:
    """The smallest changes that make the stage fit, best first; empty: it fits, or none is known."""
    del stage, accelerator, nodes, shapes
    return ()


def checkpoint_bytes(stage: Stage, shapes: Shapes) -> Optional[float]:
    """Bytes of one whole checkpoint: weights that learn and AdamW's two moments, in fp32."""
    del stage, shapes
    return None
