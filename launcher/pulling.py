"""`launch pull`: a run's artifacts as a reader wants them, without journal and numbered parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from launcher import home, records
from launcher.artifacts import Artifacts, Bucket
from launcher.errors import UsageError
from launcher.fetching import fetch
from launcher.records import part_order
from launcher.run import JSON_VERSION, Run

_ELSEWHERE = "give --to another folder"
#: Says whose files a folder holds: {"v", "id", "name", "root"}.
_OWNER = "pulled.json"
#: Of use to drivers and jobs only.
_LEFT_OUT = ("journal", "control")


def pull(run: Run, to: Path, artifacts: Artifacts) -> Path:
    """Copy the artifacts of `run` into the folder `to` and return it. Metrics parts become one
    `metrics.jsonl` per stage (of each step the highest attempt), log parts one file per worker.
    What is there already, unchanged, is not copied again; a checkpoint is copied whole or not.
    Errors: `UsageError`, `Unwritable`, those of a store; `Damaged` when checkpoints in a store are
    not what their manifests say: all else is there then."""
    root, to = artifacts.folder, to.expanduser().absolute()
    if not artifacts.remote and not root.is_dir():
        raise UsageError(f"{run.name} has no artifacts: {root} does not exist")
    if to.exists() and not to.is_dir():
        raise UsageError(f"{to} is not a folder", _ELSEWHERE)
    _refuse_another(run, to)
    if root.resolve() in (to.resolve(), *to.resolve().parents):
        raise UsageError(f"{to} lies inside the artifacts themselves", _ELSEWHERE)
    try:
        to.mkdir(parents=True, exist_ok=True)
        owner = {"v": JSON_VERSION, "id": run.id, "name": run.name, "root": run.root}
        home.write(to / _OWNER, json.dumps(owner) + "\n")
        if isinstance(artifacts, Bucket):
            fetch(artifacts, to, _metrics, _logs)
        else:
            _folder(root, to, _LEFT_OUT)
    except home.Unwritable as error:
        raise home.Unwritable(str(error), _ELSEWHERE) from error
    except OSError as error:
        told = f"cannot write {error.filename or to}: {error.strerror or error}"
        raise home.Unwritable(told, _ELSEWHERE) from error
    return to


def _refuse_another(run: Run, to: Path) -> None:
    """Two runs in one folder are neither: files of the same name replace one another."""
    for name in (_OWNER, "summary.json"):
        try:
            there = json.loads((to / name).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(there, dict) and there.get("id", run.id) != run.id:
            other = there.get("name", there["id"])
            raise UsageError(f"{to} holds files of the run {other}", _ELSEWHERE)


def _folder(source: Path, target: Path, left_out: tuple[str, ...] = ()) -> None:
    for item in sorted(source.iterdir()):
        place = target / item.name
        if item.name in left_out or item.name.startswith("."):
            continue
        if not item.is_dir():
            _file(item, place)
        elif item.name == "metrics":
            _metrics(source, target / "metrics.jsonl")
        elif item.name == "logs":
            _logs(item, place)
        elif item.name == "checkpoints":
            _checkpoints(item, place)
        else:
            place.mkdir(exist_ok=True)
            _folder(item, place)


def _file(source: Path, target: Path) -> None:
    """Copy through a temporary name; a file that vanished meanwhile (pruned) is left out."""
    try:
        facts = source.stat()
        if target.exists():
            there = target.stat()
            if (there.st_size, there.st_mtime_ns) == (facts.st_size, facts.st_mtime_ns):
                return
        temporary = target.with_name(f".{target.name}.part")
        shutil.copy2(source, temporary)
        temporary.replace(target)
    except FileNotFoundError:
        return


def _metrics(stage: Path, target: Path) -> None:
    lines = records.metrics(stage)
    home.write(target, "".join(json.dumps(line) + "\n" for line in lines))


def _logs(source: Path, target: Path) -> None:
    """`worker-<n>/<job>-<attempt>.log`, or its parts, one after the other, as `worker-<n>.log`."""
    target.mkdir(exist_ok=True)
    for worker in sorted(item for item in source.iterdir() if item.is_dir()):
        whole = target / f"{worker.name}.log"
        temporary = target / f".{worker.name}.log.part"
        with temporary.open("wb") as out:
            for part in sorted(worker.glob("*.log"), key=lambda part: part_order(part.name)):
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, out)
        temporary.replace(whole)


def _checkpoints(source: Path, target: Path) -> None:
    """Whole checkpoints only (their manifest is written last), and the pointers after them. One
    that was pruned here goes there too."""
    target.mkdir(exist_ok=True)
    pointers = [item for item in source.iterdir() if item.is_file() and item.suffix == ".json"]
    kept = {item.name for item in source.iterdir() if (item / "MANIFEST.json").exists()}
    for name in sorted(kept):
        if (target / name / "MANIFEST.json").exists():
            continue
        temporary = target / f".{name}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(source / name, temporary)
        except (FileNotFoundError, shutil.Error):
            if (source / name / "MANIFEST.json").exists():
                raise
            shutil.rmtree(temporary, ignore_errors=True)  # pruned while we copied it
            continue
        temporary.replace(target / name)
    for pointer in pointers:
        _file(pointer, target / pointer.name)
    for old in target.glob("step-*"):
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)
