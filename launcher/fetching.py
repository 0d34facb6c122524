"""`launch pull` of a run in a store: what changed since the last time, each checkpoint whole.

An interrupted pull goes on where it was: a file that is there and is the same is not fetched again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from launcher import home
from launcher.artifacts import LOGS, Bucket, parsed
from launcher.errors import Damaged
from trainer.store import sha256_file

#: Of use to drivers and jobs only.
_LEFT_OUT = re.compile(r"(?:journal|control)/.+|boot/[^/]+-a\d+\.json|(?:.*/)?\..+")
_MERGED = re.compile(r"(?:(?P<stage>.+)/)?metrics/[^/]+\.jsonl")
_CHECKPOINT = re.compile(r"(?P<step>(?:.+/)?checkpoints/step-\d+)/(?P<file>.+)")
_MANIFEST = "MANIFEST.json"
#: The versions of what a folder holds.
_VERSIONS = ".versions.json"


def fetch(
    artifacts: Bucket, to: Path, metrics: Callable[[Path, Path], None],
    logs: Callable[[Path, Path], None],
) -> None:  # fmt: skip
    """Bring the run into the folder `to`. `metrics(stage folder, file)` and `logs(folder, folder)`
    make one file of the parts. Errors: those of a store; `Damaged` for checkpoints that are not
    what their manifests say, after everything else is there."""
    artifacts.refresh(LOGS, anew=True)
    there = artifacts.versions()
    have = {key: str(value) for key, value in parsed(_bytes(to / _VERSIONS)).items()}
    kept = {m["step"] for name in there if (m := _CHECKPOINT.fullmatch(name))
            and m["file"] == _MANIFEST}  # fmt: skip
    damaged = []
    try:
        for step in sorted(kept):
            if wrong := _checkpoint(artifacts, step, there, have, to):
                damaged.append(wrong)
        for name, version in there.items():
            plain = not any(p.fullmatch(name) for p in (_LEFT_OUT, _MERGED, LOGS, _CHECKPOINT))
            same = have.get(name) == version and (to / name).exists()
            if plain and not same and artifacts.fetch(name, to / name):  # not: pruned meanwhile
                have[name] = version
    finally:
        home.write(to / _VERSIONS, json.dumps(have), sync=False)
    for stage in sorted({m["stage"] or "" for name in there if (m := _MERGED.fullmatch(name))}):
        metrics(artifacts.folder / stage, to / stage / "metrics.jsonl")
    if any(LOGS.fullmatch(name) for name in there):
        logs(artifacts.folder / "logs", to / "logs")
    for old in to.rglob("checkpoints/step-*"):
        if old.relative_to(to).as_posix() not in kept:
            shutil.rmtree(old, ignore_errors=True)
    if damaged:
        raise Damaged("; ".join(damaged), f"everything else is in {to}")


def _checkpoint(
    artifacts: Bucket, step: str, there: Mapping[str, str], have: dict[str, str], to: Path
) -> str:
    """One checkpoint under its name when every file is what the manifest says, else not at all, and
    what is wrong with it."""
    manifest, final = f"{step}/{_MANIFEST}", to / step
    if have.get(manifest) == there[manifest] and (final / _MANIFEST).exists():
        return ""
    text = artifacts.read(manifest)
    if text is None:
        return ""  # pruned
    partial = final.with_name(f".{final.name}.part")
    where = f"{artifacts.uri}/{step} is damaged"
    digests = _digests(text)
    if digests is None:
        return f"{where}: {_MANIFEST} cannot be read"
    for name, sha256 in digests.items():
        file = partial / name
        if ".." in PurePosixPath(name).parts or f"{step}/{name}" not in there:
            return f"{where}: {_MANIFEST} names {name}, which is not there"
        if file.exists() and sha256_file(file) == sha256:
            continue
        if not artifacts.fetch(f"{step}/{name}", file):
            shutil.rmtree(partial, ignore_errors=True)
            return ""  # pruned while it was copied
        if sha256_file(file) != sha256:
            file.unlink()
            return f"{where}: {name} is not what its manifest says"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / _MANIFEST).write_bytes(text)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    have[manifest] = there[manifest]
    return ""


def _digests(manifest: bytes) -> dict[str, str] | None:
    """File name -> sha256; None where the manifest makes no sense."""
    try:
        return {str(n): str(f["sha256"]) for n, f in json.loads(manifest)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _bytes(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None
