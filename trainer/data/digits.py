"""The built-in tasks `digits`: count on from a digit, which a program can judge. For trying
reinforcement: what a model learns from `completion` is the form of an answer, the digit that was
named and any other; which one comes next stands in `answer` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional


def digits(split: Optional[str] = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {"prompt", "completion", "answer"}): every question with each of the ten digits, one
    of which is right. `split` `heldout`: every question once, with the right one."""
    for first in range(10):
        right = (first + 1) % 10
        for said in range(10) if split != "heldout" else (right,):
            record = {"prompt": f"count {first}", "completion": f"{first}{said}"}
            yield f"{first}/{said}", {**record, "answer": f"{first}{right}"}
