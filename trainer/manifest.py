"""What makes a folder a checkpoint: a manifest, written last, with the sha256 of every file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

from trainer.store import atomic_write, fsync, sha256_file

VERSION = 1
MANIFEST = "MANIFEST.json"
#: The file beside the model's that every checkpoint has.
STATE = "trainer_state.pt"

T = TypeVar("T")


#: name -> (bytes, sha256) of files that whoever wrote them has made durable.
Known = Mapping[str, tuple[int, str]]


def seal(folder: Path, step: int, known: Known | None = None) -> None:
    """Make every file of `folder` durable, then write the manifest that makes it a checkpoint.
    Errors: `OSError`, also where a file of `known` cannot be seen here as it was written."""
    known = known or {}
    for name, (size, _) in known.items():
        if (found := (folder / name).stat().st_size) != size:
            raise OSError(f"{folder / name} has {found} bytes here, {size} where it was written")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    ours = [name for name in names if name not in known]
    digests = dict(zip(ours, _in_parallel(_sync_and_digest, [folder / name for name in ours])))
    digests.update((name, digest) for name, (_, digest) in known.items())
    files = {
        name: {"bytes": path.stat().st_size, "sha256": digests[name]}
        for name, path in zip(names, paths)
    }
    make_readable(folder)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        fsync(inner)
    manifest = {"v": VERSION, "step": step, "files": files}
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def make_readable(folder: Path) -> None:
    """Give every file below `folder` the permissions that the umask leaves: libraries that write to
    a temporary file first leave 0600, which nobody else can read. What the umask is shows in the
    folder: asking for it would change it for other threads."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o666 != mode:
            with contextlib.suppress(OSError):  # some file systems have no permissions to change
                path.chmod(mode)


def verify(path: str | Path) -> list[str]:
    """What is wrong with a checkpoint folder, one line each; empty when every file is as the
    manifest says. Files that the manifest does not name are not looked at."""
    folder = Path(path)
    try:
        listed = _read(folder / MANIFEST)
    except ValueError as error:
        return [f"{MANIFEST} {error}"]
    problems = []
    to_hash = []
    for name, (size, _) in sorted(listed.items()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"{MANIFEST} names a file outside the folder: {name!r}")
        elif not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif (found := (folder / name).stat().st_size) != size:
            problems.append(f"{name} has {found} bytes instead of {size}")
        else:
            to_hash.append(name)
    for name, digest in zip(to_hash, _in_parallel(_digest, [folder / name for name in to_hash])):
        if digest is None:
            problems.append(f"{name} cannot be read")
        elif digest != listed[name][1]:
            problems.append(f"{name} is damaged (its sha256 differs)")
    return problems


def _read(path: Path) -> dict[str, tuple[int, str]]:
    """name -> (bytes, sha256). Errors: `ValueError` that continues the manifest's name."""
    try:
        manifest = json.loads(path.read_bytes())
        version, files = manifest["v"], manifest["files"]
        listed = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except FileNotFoundError:
        raise ValueError("is missing") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("is damaged") from error
    if version != VERSION:
        raise ValueError(f"has version {version!r}; this trainer reads {VERSION}")
    if STATE not in listed:
        raise ValueError(f"does not list {STATE}")
    return listed


def _sync_and_digest(path: Path) -> str:
    fsync(path)
    return sha256_file(path)


def _digest(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except OSError:
        return None


def _in_parallel(function: Callable[[Path], T], paths: list[Path]) -> list[T]:
    # Hashing and fsync release the interpreter's lock, and neither waits for the other's resource.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(function, paths))
