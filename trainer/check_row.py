"""A row of `python -m trainer check`, and what it weighs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Result = Literal["pass", "warn", "fail", "skip"]
GIB = 1024**3

#: The environment score is 100 less what rows lose of these points: a `fail` all, a `warn` half, a
#: `pass` or a `skip` (it does not apply here) nothing.
WEIGHTS = {
    "torch": 20, "driver": 15, "gpu": 15, "precision": 10, "packages": 10, "python": 5,
    "flash-attn": 5, "nccl": 5, "disk": 5, "memory": 3, "shared memory": 3, "open files": 2,
    "clock": 1, "hub token": 1, "tokenizers": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One thing looked at. `fix` is what to do about a warning or a failure."""

    name: str
    result: Result
    detail: str
    fix: str = ""

    @property
    def lost(self) -> float:
        """Points of the environment score."""
        return WEIGHTS.get(self.name, 0) * {"fail": 1.0, "warn": 0.5}.get(self.result, 0.0)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.9.1+cu128 is (2, 9, 1)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def dots(version: tuple[int, ...]) -> str:
    """(2, 9) as 2.9."""
    return ".".join(map(str, version))
