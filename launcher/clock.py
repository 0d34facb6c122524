"""Time, injected: the engine waits on a `Clock`, tests turn a `ManualClock`."""

from __future__ import annotations

import re
import time
from datetime import datetime, timezone
from typing import Optional, Protocol


class Clock(Protocol):
    def now(self) -> float: ...  # UTC seconds
    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class ManualClock:
    """Sleeping moves the time; nothing waits."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


def moment(text: str, zone: Optional[timezone] = None) -> float:
    """An ISO date or time in UTC seconds; one without a zone is of `zone`, None: of this machine's.
    Errors: `ValueError`, `OverflowError` for a year that no clock has."""
    found = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))  # 3.10 reads no trailing Z
    if found.tzinfo is None:
        found = found.astimezone() if zone is None else found.replace(tzinfo=zone)
    return found.timestamp()
