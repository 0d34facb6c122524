"""The built-in tasks `digits`: a digit is asked for, and the right answer can be told by a program.
For trying reinforcement: what a model learns from `completion` is the form of an answer, since that
is any digit; which one is right stands in `answer` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

#: What is asked of a digit d -> the answer.
_ASKED = {"same": 0, "next": 1, "last": -1}


def digits(split: Optional[str] = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {"prompt", "completion", "answer"}): every question with each of the ten digits as its
    completion, one of which is right. `split` `heldout`: every question once."""
    for word, shift in _ASKED.items():
        for digit in range(10):
            answer = str((digit + shift) % 10)
            for said in range(10) if split != "heldout" else (int(answer),):
                record = {"prompt": f"{word} {digit}: ", "completion": str(said), "answer": answer}
                yield f"{word}/{digit}/{said}", record
