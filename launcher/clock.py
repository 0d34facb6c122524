"""Time, injected: the engine waits on a `Clock`, tests turn a `ManualClock`. And how moments and
durations are written and read."""

from __future__ import annotations

import math
import re
import time
from datetime import datetime, timezone
from typing import Optional, Protocol

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])")


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


def seconds(text: str, units: str = "smhd") -> float:
    """`90s`, `30m`, `2h`, `1d`, and `2w` where `units` has it, in seconds. Errors: `ValueError`."""
    found = _DURATION.fullmatch(text)
    if found is None or found[2] not in units:
        raise ValueError(f"'{text}' is no number with one of the units {', '.join(units)}")
    return float(found[1]) * _UNITS[found[2]]


def ago(text: str, now: float, units: str = "smhd", zone: Optional[timezone] = None) -> float:
    """So long before `now` (as `seconds`), or at that `moment`, in UTC seconds. Errors: those of
    `moment`."""
    try:
        return now - seconds(text, units)
    except ValueError:
        return moment(text, zone)


def duration(seconds: float) -> str:
    """`45s`, `3m20s`, `2h05m`, `3d04h`."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
