"""What a run is: recipe -> plan -> run -> gone.

The verbs are `launcher.api`'s, loaded on use. `plan` and `logs` are called there: here these
names are the modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_API = ("attach", "pull", "resume", "status", "stop", "teardown", "up", "validate")

if TYPE_CHECKING:
    from launcher.api import attach as attach
    from launcher.api import pull as pull
    from launcher.api import resume as resume
    from launcher.api import status as status
    from launcher.api import stop as stop
    from launcher.api import teardown as teardown
    from launcher.api import up as up
    from launcher.api import validate as validate


def __getattr__(name: str) -> Any:
    if name in _API:
        from launcher import api

        return getattr(api, name)
    raise AttributeError(f"module 'launcher' has no attribute {name!r}")
