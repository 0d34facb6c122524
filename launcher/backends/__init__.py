"""Backends by name, imported on use: the table below plus the entry points `launch.backends`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from launcher.backends.base import Backend
from launcher.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

BACKENDS = {
    "local": "launcher.backends.local:LocalBackend",
    "vertex": "launcher.backends.vertex:VertexBackend",
}


def names() -> list[str]:
    """Every backend that `load` knows, built in or installed."""
    return sorted({*BACKENDS, *(entry.name for entry in _installed())})


def load(name: str) -> Backend:
    """The backend called `name`. Errors: `UsageError` naming those that exist."""
    target = BACKENDS.get(name)
    if target is None:
        found = [entry for entry in _installed() if entry.name == name]
        if not found:
            raise UsageError(f"no backend '{name}'", f"available: {', '.join(names())}")
        target = found[0].value
    module, _, factory = target.partition(":")
    backend: Backend = getattr(import_module(module), factory)()
    return backend


def _installed() -> list[EntryPoint]:
    from importlib.metadata import entry_points  # 20 ms that most commands need not pay

    return list(entry_points(group="launch.backends"))
