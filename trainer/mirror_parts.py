"""Appended files as numbered parts: `0001.jsonl` becomes `0001-00000.jsonl`, `0001-00001.jsonl`...

A part is cut after the last line end within its first `PART_BYTES` bytes, so where parts begin
depends on the file only. The last one is written again as it grows. In the order of their names the
parts are the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PART_BYTES = 256 * 1024


@dataclass
class _Tail:
    """Where a file is: the current part begins at `start`, all before `sent` is in the store."""

    number: int = 0
    start: int = 0
    sent: int = 0
    inode: int = 0


class Parts:
    """`put(key, data)` writes or replaces one part."""

    def __init__(self, put: Callable[[str, bytes], None]) -> None:
        self.put = put
        self._tails: dict[str, _Tail] = {}

    def behind(self, name: str, path: Path, everything: bool) -> bool:
        """Whether there is something to send: whole lines, or `everything`."""
        try:
            facts = path.stat()
        except OSError:
            return False
        tail = self._tails.get(name) or _Tail(inode=facts.st_ino)
        if tail.inode != facts.st_ino or facts.st_size < tail.sent:
            return True
        return facts.st_size > tail.sent and (everything or _has_line(path, tail.sent))

    def send(self, name: str, path: Path, everything: bool) -> None:
        """Send what is there; a last line without its end only if `everything` is asked."""
        facts = path.stat()
        tail = self._tails.get(name)
        if tail is None or tail.inode != facts.st_ino or facts.st_size < tail.sent:
            tail = self._tails[name] = _Tail(inode=facts.st_ino)  # another file of that name
        while True:
            window = _read(path, tail.start)
            full = len(window) == PART_BYTES
            end = window.rfind(b"\n") + 1
            if (full and not end) or (everything and not full):
                end = len(window)  # a line longer than a part; or a last line without an end
            if end and tail.start + end > tail.sent:
                self.put(part_name(name, tail.number), window[:end])
                tail.sent = tail.start + end
            if not full:
                return
            tail.number, tail.start = tail.number + 1, tail.start + end


def part_name(name: str, number: int) -> str:
    """The name of a part of a file: `metrics/0001.jsonl`, 2 -> `metrics/0001-00002.jsonl`."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{number:05d}{dot}{suffix}"


def _read(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(PART_BYTES)


def _has_line(path: Path, start: int) -> bool:
    with contextlib.suppress(OSError):
        window = _read(path, start)
        return b"\n" in window or len(window) == PART_BYTES
    return False
