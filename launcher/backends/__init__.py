"""Backends by name, imported on use: the table below plus the entry points `launch.backends`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from launcher.backends.base import Backend
from launcher.errors import UsageError

BACKENDS = {
    "local": "launcher.backends.local:LocalBackend",
    "vertex": "launcher.backends.vertex:VertexBackend",
}


def names() -> list[str]:
    """Every backend that `load` knows, built in or installed."""
    return sorted({*BACKENDS, *(entry.name for entry in entry_points(group="launch.backends"))})


def load(name: str) -> Backend:
    """The backend called `name`. Errors: `UsageError` naming those that exist."""
    target = BACKENDS.get(name)
    if target is None:
        found = [entry for entry in entry_points(group="launch.backends") if entry.name == name]
        if not found:
            raise UsageError(f"no backend '{name}'", f"available: {', '.join(names())}")
        target = found[0].value
    module, _, factory = target.partition(":")
    backend: Backend = getattr(import_module(module), factory)()
    return backend
