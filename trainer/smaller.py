"""What an out-of-memory of sharded workers leaves for the next start. Standard library only.

They cannot repeat a step: a rank that runs out of memory leaves the others in the middle of an
exchange. So it notes a smaller micro-batch in the stage's folder, all leave, and the next start
goes on from the last checkpoint with that, with the same rows in a step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

from trainer.store import atomic_write

#: In a stage's folder; docs/contracts.md.
NOTE = "memory.json"
_AGAIN, _CONFIG = 75, 64


class Leave(Exception):
    """A rank that had no memory for `tried` rows at a time, and why all ranks leave. `rows`: the
    micro-batch of the next start; 0 where none is small enough, for the `reason`. `during`: what
    memory ran out in, where that was no step."""

    def __init__(self, tried: int, rows: int, reason: str = "", during: str = "") -> None:
        self.tried, self.rows = tried, rows
        self.code = _AGAIN if rows else _CONFIG
        when = f"{during}, " if during else ""
        again = (
            f"out of memory {when}with {tried} rows at a time, and sharded workers cannot repeat a"
            f" step: the next start goes on from the last checkpoint with {rows}"
        )
        super().__init__(again if rows else reason)


def noted(folder: Path) -> Optional[int]:
    """The micro-batch that a stage's folder asks for; None where it asks for none."""
    try:
        rows = json.loads((folder / NOTE).read_bytes())["micro_batch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rows if type(rows) is int and rows >= 1 else None


def note(folder: Path, rows: int) -> None:
    """Ask for micro-batches of `rows`, unless the folder asks for fewer. Errors: `StoreError`."""
    before = noted(folder)
    if before is None or rows < before:
        atomic_write(folder / NOTE, json.dumps({"v": 1, "micro_batch": rows}) + "\n")
