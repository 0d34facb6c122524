"""Runs that another machine has started: known here from the journal at their root."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Optional

from launcher import home
from launcher.artifacts import is_remote, open_artifacts, parsed
from launcher.backends.base import Env
from launcher.errors import UsageError

_FACTS = ("id", "name", "fingerprint", "owner", "root", "created")
#: What the facts of a run look like. A journal in a store may be anybody's: these become names of
#: folders here, labels in a cloud, and words on a terminal.
_LOOKS = {
    "id": re.compile(r"[0-9a-f]{16}"),
    "name": re.compile(r"[a-z][a-z0-9-]{0,39}-[0-9a-f]{6}"),
    "fingerprint": re.compile(r"[0-9a-f]{64}"),
    "owner": re.compile(r"[a-z0-9-]{1,40}"),
    "root": re.compile(r"[^\x00-\x1f\x7f-\x9f]+"),
}
_RECIPE = re.compile(r"[a-z][a-z0-9-]{0,39}")


def is_root(text: str) -> bool:
    """Whether the word for a run is where its artifacts lie, and not its name or id."""
    return "/" in text


def adopt(text: str, env: Env) -> dict[str, Any]:
    """The identity of the run whose artifacts lie at `text` (gs://, s3://, a folder). One that is
    not known here gets its folder in $LAUNCH_HOME, `run.json` last; nothing is claimed. Errors:
    `UsageError` when no run's journal is there, those of a store."""
    root = text.rstrip("/") if is_remote(text) else str(home.local_root(text))
    known = _known(root, env.home)
    if known is not None:
        # What this machine noted at the end of a run is not the end of one that others drive.
        (home.folder(env.home, known["id"]) / "summary.json").unlink(missing_ok=True)
        return known
    artifacts = open_artifacts(root, env.home / "runs" / "unknown", env.environ, env.clock)
    first = parsed(artifacts.read("journal/00000001.json"))
    if first.get("kind") != "created" or not set(_FACTS) <= first.keys():
        raise UsageError(
            f"{text}: no run has its journal there",
            "give the `artifacts` of a run, as `launch status RUN` shows them on its machine",
        )
    if (odd := _odd(first)) is not None:
        raise UsageError(
            f"{text}: its journal is not one of launch: {odd} is {ascii(first.get(odd))[:80]}",
            "nothing was adopted",
        )
    lies = first["root"] if is_remote(first["root"]) else str(home.local_root(first["root"]))
    if lies.rstrip("/") != root:
        raise UsageError(f"{text} is a copy: its run lies at {first['root']}", "name that instead")
    if (other := home.identity(env.home, first["id"])) is not None:
        raise UsageError(
            f"{text}: its run has the id of {other['name']}, which lies at {other['root']}",
            "nothing was adopted; one of the two is a copy or a forgery",
        )
    place = home.folder(env.home, first["id"])
    identity = {"v": 1, **{key: first[key] for key in _FACTS}, "recipe": first["recipe"]["name"]}
    identity["adopted"] = True
    home.write(place / "run.json", json.dumps(identity) + "\n")
    return identity


def _odd(first: dict[str, Any]) -> Optional[str]:
    """The first fact that does not look as `up` writes it; None: all do."""
    for key, looks in _LOOKS.items():
        if not isinstance(first[key], str) or not looks.fullmatch(first[key]):
            return key
    if not first["name"].endswith(f"-{first['id'][-6:]}"):
        return "name"
    if isinstance(first["created"], bool) or not isinstance(first["created"], (int, float)):
        return "created"
    recipe = first.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    return None if isinstance(name, str) and _RECIPE.fullmatch(name) else "recipe"


def _known(root: str, folder: Path) -> dict[str, Any] | None:
    for run_id in home.ids(folder):
        facts = home.identity(folder, run_id)
        if facts is not None and facts["root"].rstrip("/") == root:
            return facts
    return None
