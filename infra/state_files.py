"""What can be told of a state without the engine: where it lies, whether a stack was ever made in
it, and who updates it now. Only a folder of this machine tells the last two."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

#: The engine's name for what all our stacks belong to.
PROJECT = "launch"


@dataclass(frozen=True)
class Holder:
    """Who holds a state's lock, and since when."""

    user: str
    host: str
    pid: int
    since: str

    @property
    def dead(self) -> bool:
        """Whether it was a process of this machine which is gone."""
        return self.host == socket.gethostname() and not lives(self.pid)


def url(home: Path, environ: Mapping[str, str], state: Optional[str] = None) -> str:
    """Where the state lies: PULUMI_BACKEND_URL, else `state`, else a folder below `home`
    ($LAUNCH_HOME/infra)."""
    return environ.get("PULUMI_BACKEND_URL") or state or f"file://{home / 'state'}"


def is_local(state: str) -> bool:
    return state.startswith("file:")


def made(state: str, stack: str) -> Optional[bool]:
    """Whether `stack` has a state; None: this machine cannot tell."""
    if not is_local(state):
        return None
    folder = _root(state) / "stacks" / PROJECT
    return any((folder / f"{stack}{suffix}").exists() for suffix in (".json", ".json.gz"))


def holders(state: str, stack: str) -> Iterator[Holder]:
    """Those that hold the lock of `stack`, also the dead; none where this machine cannot tell."""
    if not is_local(state):
        return
    folder = _root(state) / "locks" / "organization" / PROJECT / stack
    for file in sorted(folder.glob("*.json")):
        try:
            facts = json.loads(file.read_text())
            yield Holder(
                str(facts["username"]), str(facts["hostname"]), int(facts["pid"]),
                str(facts["timestamp"]),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it goes this moment, or is not yet written to its end


def running(state: str, stack: str) -> Optional[Holder]:
    """Who updates `stack` now, as far as this machine can tell."""
    return next((one for one in holders(state, stack) if not one.dead), None)


def lives(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _root(state: str) -> Path:
    return Path(state.partition("://")[2]).expanduser() / ".pulumi"
