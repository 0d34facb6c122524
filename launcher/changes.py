"""Changes of a live run's recipe that wait for its driver.

Only its driver writes a run's journal, so a change waits for it as `changes/<n>.json` in the run's
folder of $LAUNCH_HOME, and is recorded at the driver's next look. Not under the artifact root: who
may write to a bucket must neither raise a budget nor name a command.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from launcher.artifacts import Folder

#: The blocks at the top of a recipe that a driver reads anew.
IN_PLACE = ("budget", "retry", "notify")
_FOLDER = "changes"


def leave(place: Path, now: float, by: str, blocks: Mapping[str, Any], taken: int = 0) -> int:
    """Leave a change for the driver of the run whose folder is `place`; returns its number, which
    is beyond `taken`, the last that its journal has: that may be of another home, from which the
    run was taken over. Errors: `Unwritable`."""
    text = json.dumps({"v": 1, "time": now, "by": by, "set": dict(blocks)}) + "\n"
    number = max(last(place), taken) + 1
    while not Folder(place).create_once(_name(number), text):
        number += 1
    return number


def waiting(place: Path, taken: int) -> Optional[tuple[int, dict[str, Any]]]:
    """The first change after number `taken`, and the blocks that it replaces; None: there is none.
    A file that holds no change replaces nothing."""
    file = place / _name(taken + 1)
    try:
        raw = json.loads(file.read_bytes())
        blocks = raw["set"].items()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return taken + 1, {}
    return taken + 1, {name: block for name, block in blocks if name in IN_PLACE}


def last(place: Path) -> int:
    """The number of the newest change that was left for a run, 0: of none."""
    found = (file.stem for file in (place / _FOLDER).glob("*.json"))
    return max((int(name) for name in found if name.isdigit()), default=0)


def _name(number: int) -> str:
    return f"{_FOLDER}/{number:04d}.json"
