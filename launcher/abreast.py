"""Several questions at once, within one limit of time: for checks that ask services."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar, Union

T = TypeVar("T")


class Late(Exception):
    """No answer within the time."""


def ask(tasks: Mapping[str, Callable[[], T]], seconds: float) -> dict[str, Union[T, Exception]]:
    """Run every task in a thread of its own; what each returned or raised, in the order of `tasks`.
    One that is not done after `seconds` is a `Late`, and its thread is left behind: it cannot keep
    the process from ending."""
    done: queue.SimpleQueue[tuple[str, Union[T, Exception]]] = queue.SimpleQueue()

    def run(name: str, task: Callable[[], T]) -> None:
        try:
            done.put((name, task()))
        except Exception as error:
            done.put((name, error))

    for name, task in tasks.items():
        threading.Thread(target=run, args=(name, task), daemon=True).start()
    found: dict[str, Union[T, Exception]] = {}
    end = time.monotonic() + seconds
    while len(found) < len(tasks):
        try:
            name, outcome = done.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        found[name] = outcome
    late = Late(f"no answer within {seconds:g} s")
    return {name: found.get(name, late) for name in tasks}
