"""What is read of a deployment: the state as the engine exports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.changes import name_of


class Strange(Exception):
    """The engine has answered something that it never answers."""


def checked(deployment: Any) -> Mapping[str, Any]:
    """`deployment`, None being an empty one, if what is read of it has the form that the engine
    gives it. Errors: `Strange`: an odd one must not pass for an empty one, whose state would be
    deleted."""
    if deployment is None:  # of a stack in which nothing was made yet
        return {}
    if not isinstance(deployment, dict):
        raise Strange("the state is damaged: its deployment is no mapping")
    for resource in _entries(deployment, "resources"):
        _named(resource, "resources")
    for operation in _entries(deployment, "pending_operations"):
        _named(operation.get("resource"), "pending_operations")
    return deployment


def resources(deployment: Mapping[str, Any]) -> list[str]:
    """The URNs in the state but those of the stack itself and of providers."""
    found = deployment.get("resources") or ()
    return [r["urn"] for r in found if not str(r.get("type", "")).startswith("pulumi:")]


def pending(deployment: Mapping[str, Any]) -> tuple[str, ...]:
    """`creating NAME`, ... of the operations whose outcome is not known, each once: several
    interruptions may have hidden that of the same one."""
    found = deployment.get("pending_operations") or ()
    told = (f"{one.get('type', 'changing')} {name_of(one['resource']['urn'])}" for one in found)
    return tuple(dict.fromkeys(told))


def _entries(deployment: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = deployment.get(key) or []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise Strange(f"the state is damaged: its {key} are no list of mappings")
    return found


def _named(resource: Any, key: str) -> None:
    if not isinstance(resource, dict) or not isinstance(resource.get("urn"), str):
        raise Strange(f"the state is damaged: one of its {key} has no urn")
