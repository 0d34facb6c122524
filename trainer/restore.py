"""Brings a run back from a store to another machine, so that its stages go on from where they were.

What comes: of every stage the newest whole checkpoint and the best one, their pointers, and what
later steps and stages read (run_meta.json, evaluations, tokenizers, targets, exported models). What
stays: metrics, logs, TensorBoard, older checkpoints, crash dumps.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from trainer.manifest import MANIFEST, verify
from trainer.store import NotFound, Store, atomic_write, fsync, make_folder

_MANIFEST = re.compile(rf"((?:.+/)?)checkpoints/step-(\d+)/{re.escape(MANIFEST)}")
_STAYS = re.compile(
    r"(?:.+/)?(?:checkpoints|metrics|logs|tensorboard)/.+|(?:control|journal|attempts)/.+"
    r"|boot/[^/]+\.json|(?:.+/)?crash_dump\.pt|(?:recipe\.yaml|summary\.json|report\.html)"
)

Warn = Callable[[str], None]


class _Broken(Exception):
    """A checkpoint in the store that is not what its manifest says."""


def restore(
    store: Store, folder: str | Path, prefix: str = "", warn: Warn | None = None
) -> list[Path]:
    """Fill `folder` from what a mirror left under `prefix`; what is there already and whole stays.

    Returns the newest checkpoint of every stage that has one. A checkpoint that is not what its
    manifest says is passed over with a warning, for the one before it. Errors: `StoreError`."""
    root, tell = Path(folder), warn or _to_stderr
    keys = [key[len(prefix) :] for key in store.list(prefix)]
    stages: dict[str, list[int]] = {}
    for key in keys:
        if match := _MANIFEST.fullmatch(key):
            stages.setdefault(match.group(1), []).append(int(match.group(2)))
    newest = []
    for stage, steps in sorted(stages.items()):
        at = root / stage / "checkpoints"
        base = f"{prefix}{stage}checkpoints/"
        found = _newest(store, base, at, sorted(steps, reverse=True), tell)
        if found is not None:
            newest.append(at / f"step-{found}")
            _point(store, base, at, "last", found)
            _restore_best(store, base, at, tell)
    for key in keys:
        if not _STAYS.fullmatch(key) and not (root / key).exists():
            store.get_file(prefix + key, root / key)
    return newest


def _newest(store: Store, base: str, at: Path, steps: list[int], warn: Warn) -> int | None:
    for step in steps:
        try:
            _fetch(store, base, at, step)
        except _Broken as error:
            warn(f"skipping the checkpoint {store.uri}/{base}step-{step}: {error}")
        else:
            return step
    return None


def _restore_best(store: Store, base: str, at: Path, warn: Warn) -> None:
    try:
        step = int(json.loads(store.get_bytes(f"{base}best.json"))["step"])
        _fetch(store, base, at, step)
        _point(store, base, at, "best", step)
    except NotFound:
        return
    except (_Broken, ValueError, KeyError, TypeError) as error:
        warn(f"the best checkpoint of {store.uri}/{base} was not restored: {error}")


def _fetch(store: Store, base: str, at: Path, step: int) -> None:
    """Errors: `_Broken`, `StoreError`."""
    final = at / f"step-{step}"
    if final.is_dir() and not verify(final):
        return
    # The name of unfinished work, which the next save tidies away should this process die.
    temporary = at / f".tmp-step-{step}-{os.getpid()}"
    make_folder(temporary)
    try:
        _download(store, f"{base}step-{step}/", temporary)
        if problems := verify(temporary):
            raise _Broken(problems[0])
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        fsync(at)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(store: Store, base: str, folder: Path) -> None:
    try:
        manifest = store.get_bytes(base + MANIFEST)
        names = list(json.loads(manifest)["files"])
    except (NotFound, ValueError, KeyError, TypeError):
        raise _Broken(f"{MANIFEST} is missing or damaged") from None
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise _Broken(f"{MANIFEST} names a file outside the folder: {name!r}")
        try:
            store.get_file(base + name, folder / name)
        except NotFound:
            raise _Broken(f"{name} is missing") from None
    atomic_write(folder / MANIFEST, manifest)


def _point(store: Store, base: str, at: Path, name: str, step: int) -> None:
    """The pointer as the store has it if it names this step, else one without a loss."""
    if (at / f"{name}.json").exists():
        return
    text = b""
    with contextlib.suppress(NotFound):
        text = store.get_bytes(f"{base}{name}.json")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if json.loads(text)["step"] == step:
            atomic_write(at / f"{name}.json", text)
            return
    pointer = {"v": 1, "step": step, "path": f"step-{step}", "val_loss": None}
    atomic_write(at / f"{name}.json", json.dumps(pointer) + "\n")


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"warning: {line}\n")
