"""Runs that another machine has started: known here from the journal at their root."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher import home
from launcher.artifacts import is_remote, open_artifacts, parsed
from launcher.backends.base import Env
from launcher.errors import UsageError

_FACTS = ("id", "name", "fingerprint", "owner", "root", "created")


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
    lies = first["root"] if is_remote(first["root"]) else str(home.local_root(first["root"]))
    if lies.rstrip("/") != root:
        raise UsageError(f"{text} is a copy: its run lies at {first['root']}", "name that instead")
    place = home.folder(env.home, first["id"])
    identity = {"v": 1, **{key: first[key] for key in _FACTS}, "recipe": first["recipe"]["name"]}
    home.write(place / "run.json", json.dumps(identity) + "\n")
    return identity


def _known(root: str, folder: Path) -> dict[str, Any] | None:
    for run_id in home.ids(folder):
        facts = home.identity(folder, run_id)
        if facts is not None and facts["root"].rstrip("/") == root:
            return facts
    return None
