"""Rows of `launch doctor` about the command-line tools that some recipes, and some fixes, need."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from launcher import abreast
from launcher.backends.base import Check

#: Seconds that a tool may take to tell its version.
SECONDS = 5.0
_NUMBER = re.compile(r"\d+\.\d+[\w.+-]*")
#: Tool -> the backends that cannot do without it, what it is for, and how to get it.
_TOOLS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "gcloud": ((), "logging in, and the commands that fixes name",
               "install the Google Cloud CLI"),
    "kubectl": (("kubernetes",), "clusters of Kubernetes",
                "install kubectl, or `gcloud components install kubectl`"),
    "pulumi": ((), "`launch infra`, which brings its own",
               "`launch infra` installs it on first use"),
}  # fmt: skip


def rows(backends: set[str], environ: Mapping[str, str]) -> Iterator[Check]:
    """A row for each tool: its version, or why that does not matter to recipes on `backends`."""
    path = environ.get("PATH")
    found = {name: shutil.which(name, path=path) for name in _TOOLS}
    ask: dict[str, Callable[[], str]] = {"gcloud": lambda: gcloud_version(str(found["gcloud"]))}
    ask["kubectl"] = lambda: kubectl_version(_said([str(found["kubectl"]), "version", "--client",
                                                    "-o", "json"], environ))  # fmt: skip
    ask["pulumi"] = lambda: first_number(_said([str(found["pulumi"]), "version"], environ))
    told = abreast.ask({name: ask[name] for name in found if found[name]}, SECONDS)
    for name, (needed_by, purpose, how) in _TOOLS.items():
        if found[name] is None:
            needed = bool(backends & set(needed_by))
            detail = f"not found; it is for {purpose}"
            yield Check(name, "fail" if needed else "skip", detail, how)
            continue
        version = told[name]
        if isinstance(version, str) and version:
            yield Check(name, "pass", f"{version} at {found[name]}")
        else:
            why = f": {version}" if version else ""
            yield Check(name, "warn", f"{found[name]} does not tell its version{why}",
                        f"run `{name} version`")  # fmt: skip


def gcloud_version(path: str) -> str:
    """From the file VERSION of the SDK: the command itself takes seconds. Empty: there is none (a
    package of a distribution)."""
    file = Path(path).resolve().parent.parent / "VERSION"
    return file.read_text().strip() if file.is_file() else ""


def kubectl_version(text: str) -> str:
    """From `kubectl version --client -o json`; empty: it says something else."""
    try:
        return str(json.loads(text)["clientVersion"]["gitVersion"])
    except (ValueError, KeyError, TypeError):
        return ""


def first_number(text: str) -> str:
    """The first version number in a text; empty: there is none."""
    match = _NUMBER.search(text)
    return match[0] if match else ""


def _said(command: list[str], environ: Mapping[str, str]) -> str:
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        timeout=SECONDS, check=False, env=dict(environ),
    )  # fmt: skip
    return ended.stdout
