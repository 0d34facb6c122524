"""Names for the shell's completion; silent, because a prompt is no place for errors."""

from __future__ import annotations

import os

from launcher import home, shipped
from launcher.errors import LaunchError

_MOST = 50


def runs(incomplete: str) -> list[str]:
    """Names of runs that start with `incomplete`, newest first."""
    found: list[str] = []
    place = home.path(os.environ)
    for run_id in home.ids(place):
        facts = home.identity(place, run_id)
        if facts and str(facts["name"]).startswith(incomplete):
            found.append(str(facts["name"]))
        if len(found) == _MOST:
            break
    return found


def recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes, then recipe files, that start with `incomplete`."""
    try:
        known = shipped.names()
    except LaunchError:
        known = []
    return [name for name in known if name.startswith(incomplete)] + _files(incomplete)


def _files(incomplete: str) -> list[str]:
    head, _, start = incomplete.rpartition("/")
    try:
        entries = sorted(os.scandir(head or ("/" if incomplete[:1] == "/" else ".")), key=_name)
    except OSError:
        return []
    before = f"{head}/" if "/" in incomplete else ""
    return [
        before + entry.name + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(start)
        and not (entry.name.startswith(".") and not start)
        and (entry.is_dir() or entry.name.endswith((".yaml", ".yml")))
    ]


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name
