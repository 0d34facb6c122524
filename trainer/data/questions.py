"""The built-in exchanges `python-questions`: what names of the standard library do, asked of and
answered by CPython's own documentation strings. Nothing to download, a few hundred pairs.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, Optional

from trainer.data import DataError

#: The part of the names that is held out, by hash.
HELDOUT_SHARE = 0.10
_MODULES = (
    "bisect", "collections", "copy", "datetime", "fractions", "functools", "heapq", "itertools",
    "json", "math", "os", "os.path", "random", "re", "shutil", "statistics", "string", "struct",
    "textwrap", "time",
)  # fmt: skip
_QUESTIONS = (
    "What does {} do?",
    "Explain {} in Python.",
    "What is {} for?",
    "How is {} described in Python's documentation?",
)
_SHORTEST, _LONGEST = 20, 400  # characters of an answer


def python_questions(split: Optional[str] = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted name, {"messages": [question, answer]}) of `split`: `train`, `heldout` or None for
    both. No answer occurs twice, and none of the held-out ones is a train answer. Errors:
    `DataError` where this Python comes without documentation strings (-OO)."""
    found = dict(_described())
    seen: set[str] = set()
    pairs: list[tuple[str, dict[str, Any]]] = []
    # Train first: an answer that occurs on both sides stays there.
    for name in sorted(found, key=lambda name: (_fraction(name) < HELDOUT_SHARE, name)):
        answer = found[name]
        if answer in seen:
            continue
        seen.add(answer)
        part = "heldout" if _fraction(name) < HELDOUT_SHARE else "train"
        if split in (None, part):
            pairs.append((name, _exchange(name, answer)))
    if not pairs:
        raise DataError(
            "python-questions: this Python has no documentation strings (-OO strips them)"
        )
    return iter(pairs)


def _described() -> Iterator[tuple[str, str]]:
    """(dotted name, first paragraph of its documentation) of what is public."""
    for module_name in ("builtins", *_MODULES):
        module = importlib.import_module(module_name)
        prefix = "" if module is builtins else f"{module_name}."
        for name, value in _public(module):
            yield from _answer(prefix + name, value)
            if inspect.isclass(value) and not issubclass(value, BaseException):
                for method, function in _public(value):
                    yield from _answer(f"{prefix}{name}.{method}", function)


def _public(owner: Any) -> list[tuple[str, Any]]:
    names = [name for name in sorted(vars(owner)) if not name.startswith("_")]
    values = [(name, getattr(owner, name, None)) for name in names]
    return [(name, v) for name, v in values if callable(v) or inspect.isdatadescriptor(v)]


def _answer(name: str, value: Any) -> Iterator[tuple[str, str]]:
    text = inspect.getdoc(value) or ""
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        # The signature that many begin with is no sentence.
        words = re.sub(r"^[\w.]+\([^)]*\)\s*(->\s*[\w\[\], .]+?)?(\s-+\s|$)", "", words)
        if _SHORTEST <= len(words) <= _LONGEST and words.endswith(".") and words[0].isupper():
            yield name, words
            return


def _exchange(name: str, answer: str) -> dict[str, Any]:
    question = _QUESTIONS[int(_fraction(f"question/{name}") * len(_QUESTIONS))].format(name)
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def _fraction(text: str) -> float:
    digest = hashlib.sha256(f"python-questions/{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
