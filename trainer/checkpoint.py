"""Checkpoints of a stage: written whole or not at all, verified when read.

A checkpoint is a folder `step-N` that its manifest describes (manifest.py). It is written beside
its place and renamed, so that a process killed at any instant leaves the one before loadable. One
process writes to a stage's folder: rank 0, to whom the others hand what they hold. What the state
means is the loop's business.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pickle
import random
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainer import copies
from trainer.manifest import STATE, VERSION, Known, seal, verify
from trainer.store import (
    StoreError,
    atomic_write,
    disk_full,
    free_bytes,
    fsync,
    make_folder,
    open_store,
    other_lives,
    remove_unfinished,
)

_STEP = re.compile(r"step-(\d+)")
#: Names of unfinished work: being written, replaced by a new one of that step, being removed.
_HIDDEN = re.compile(r"\.(tmp|old|gone)-step-(\d+)-(\d+)")
_PLAIN = (bool, int, float, str, bytes, type(None))

_ALLOWED = "a checkpoint holds tensors, numbers, strings, lists and dicts only"

Warn = Callable[[str], None]


class CheckpointError(Exception):
    """One clear line: what could not be saved or loaded, where, and what to do."""


class Checkpoints:
    """The folder `checkpoints/` of a stage: the newest `keep` stay, and the best one.

    Opening tidies up after a process that died while it wrote. What is skipped or could not be
    removed is appended to `warnings` and told to `warn`."""

    def __init__(self, folder: str | Path, keep: int, warn: Warn | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.root = Path(folder)
        self.keep = keep
        self.warnings: list[str] = []
        self._tell = warn
        self._tidy()

    def save(
        self,
        step: int,
        write_model: Callable[[Path], Known | None],
        state: dict[str, Any],
        val_loss: float | None = None,
        best: bool = False,
    ) -> Path:
        """Write `step-<step>`; a folder of that name is replaced. `write_model(folder)` writes what
        `from_pretrained` reads, and may return what it knows of files that are durable already;
        `state` holds tensors, numbers, strings, lists and dicts only. Then `last.json` (and
        `best.json` if `best`) point at it and older ones are removed.

        Returns the folder. Errors: `CheckpointError`, with the checkpoints before it as they were
        and nothing half-written left."""
        _check_plain(state, "state")
        final = self._folder(step)
        temporary = self._hidden("tmp", step)
        with self._told(f"step {step}"):
            make_folder(self.root)
            temporary.mkdir()
            known = write_model(temporary)
            _save_tensors(state, temporary / STATE)
            seal(temporary, step, known)
            self._publish(temporary, final, step)
        with self._told(f"the pointers to step {step}"):
            self._point("last", step, val_loss)
            if best:
                self._point("best", step, val_loss)
        self._prune(step)
        return final

    def mark_last(self, step: int, val_loss: float | None) -> None:
        """Point `last.json` at a step that was saved, unless it is. Errors: `CheckpointError`."""
        if _pointed(self.root, "last") != step:
            with self._told("the pointer to the last checkpoint"):
                self._point("last", step, val_loss)

    def mark_best(self, step: int, val_loss: float | None) -> None:
        """Point `best.json` at a step that was saved. Errors: `CheckpointError`."""
        if not self._folder(step).is_dir():
            raise CheckpointError(
                f"{self.root}: step {step} has no checkpoint to be marked as best"
            )
        with self._told("the pointer to the best checkpoint"):
            self._point("best", step, val_loss)

    def adopt(self, source: Path, step: int) -> None:
        """Take a whole checkpoint from elsewhere as `step-<step>`: links where the disk allows it,
        else copies. Errors: `CheckpointError`, with nothing half-copied left."""
        temporary = self._hidden("tmp", step)
        with self._told(f"step {step} of {source}"):
            make_folder(self.root)
            shutil.copytree(source, temporary, copy_function=_link)
            for path in (temporary, *temporary.rglob("*")):
                fsync(path)
            self._publish(temporary, self._folder(step), step)

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; None if there is none. Broken ones are skipped with
        a warning and stay where they are."""
        return _newest(self.root, verify, self._warn)

    def _folder(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def _hidden(self, kind: str, step: int) -> Path:
        return self.root / f".{kind}-step-{step}-{os.getpid()}"

    def _publish(self, temporary: Path, final: Path, step: int) -> None:
        # A rename cannot replace a folder that has files: the old one steps aside first. Killed
        # between the two renames, `_tidy` puts it back.
        aside = self._hidden("old", step)
        if final.exists():
            final.rename(aside)
        temporary.rename(final)
        fsync(self.root)
        if aside.exists():
            self._discard(aside, step)

    def _point(self, name: str, step: int, val_loss: float | None) -> None:
        known = val_loss is not None and math.isfinite(val_loss)
        pointer = {
            "v": VERSION,
            "step": step,
            "path": f"step-{step}",
            "val_loss": val_loss if known else None,
        }
        atomic_write(self.root / f"{name}.json", json.dumps(pointer) + "\n")

    def _prune(self, step: int) -> None:
        # Newer steps than the one just saved are broken ones that a resume stepped over: they count
        # for nothing, or they would push out the good ones.
        steps = [at for at in _steps(self.root) if at <= step]
        spared = {*steps[: self.keep], _pointed(self.root, "best")}
        for old in steps:
            if old not in spared:
                self._discard(self._folder(old), old)

    def _discard(self, folder: Path, step: int) -> None:
        # Out of sight first: killed half-way, it must not look like a broken checkpoint.
        gone = self._hidden("gone", step)
        try:
            folder.rename(gone)
            shutil.rmtree(gone)
        except OSError as error:
            self._warn(f"could not remove the old checkpoint {folder}: {error.strerror}")

    def _tidy(self) -> None:
        """Remove what this process, or one that is dead, left unfinished."""
        remove_unfinished(self.root)
        for path in _entries(self.root):
            match = _HIDDEN.fullmatch(path.name)
            if match is None or other_lives(int(match.group(3))):
                continue
            final = self._folder(int(match.group(2)))
            if match.group(1) == "old" and not final.exists():
                with contextlib.suppress(OSError):
                    path.rename(final)
            else:
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Whatever goes wrong, no trace stays; a full disk becomes one clear line."""
        try:
            yield
        except BaseException as error:
            self._tidy()
            if full := disk_full(error):
                raise CheckpointError(
                    f"{full}: {what} not saved in {self.root}: {self._room()}; earlier "
                    "checkpoints are whole; free some space, or lower train.keep, and resume"
                ) from error
            if isinstance(error, (OSError, StoreError)):
                raise CheckpointError(f"{self.root}: {what} not saved: {error}") from error
            raise

    def _room(self) -> str:
        room = f"{free_bytes(self.root) / 1e6:.1f} MB are free"
        for step in _steps(self.root)[:1]:
            room += f", step-{step} takes {_bytes_in(self._folder(step)) / 1e6:.1f} MB"
        return room

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        if self._tell is not None:
            self._tell(message)


def newest(root: Path, warn: Warn | None = None, until: int | None = None) -> Path | None:
    """The newest checkpoint of a folder `checkpoints/` that verifies, at most of step `until`; None
    if there is none. `warn` hears of broken ones that are passed over."""
    return _newest(root, _verify_once, warn, until)


def load_state(path: str | Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint folder, tensors on the CPU. They are mapped, not read:
    copied to a GPU they never fill the memory of the host, and writing to one changes no file.
    Plain data only is unpickled. Errors: `CheckpointError`."""
    file = Path(path) / STATE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: refused, it holds more than tensors and plain values; it was not written by"
            " this trainer"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    except (RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{file}: damaged, it cannot be read as a checkpoint") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, not the trainer's state")
    return state


def resolve(reference: str, warn: Warn | None = None) -> str:
    """What `from_pretrained` reads for a model reference (docs/contracts.md): the newest whole
    checkpoint of a stage folder (`FOLDER`, `FOLDER@last`), the best one (`FOLDER@best`), the
    `tokenizer/` of a tokenizer stage; any other string unchanged. `warn` hears of broken
    checkpoints that were passed over.

    Errors: `CheckpointError` for a stage folder without a whole checkpoint, and for a URI that was
    not fetched."""
    if copies.REMOTE.match(reference):
        raise CheckpointError(
            f"{reference}: is not on this machine; fetch it first:"
            " python -m trainer inputs JOB.json FOLDER"
        )
    folder, which = _local(reference), "last"
    suffix = re.fullmatch(r"(.+)@(best|last)", reference)
    if not folder.is_dir() and suffix:
        folder, which = _local(suffix.group(1)), suffix.group(2)
        if not folder.is_dir():
            raise CheckpointError(f"{reference}: there is no folder {folder}")
        if (folder / "config.json").exists() and (folder / "run_meta.json").exists():
            return str(folder)  # stages merge and export: one model, the best and the last
        if not _is_stage(folder):
            raise CheckpointError(f"{reference}: {folder} is not the output folder of a stage")
    if not _is_stage(folder):
        return str(folder) if reference.startswith("file://") else reference
    root = folder / "checkpoints"
    if not _steps(root) and (folder / "tokenizer").is_dir():
        return str(folder / "tokenizer")
    if which == "best":
        return str(_best(root))
    path = _newest(root, _verify_once, warn)
    if path is None:
        broken = f" ({len(steps)} broken)" if (steps := _steps(root)) else ""
        raise CheckpointError(
            f"{folder}: no whole checkpoint{broken}; run (or resume) the stage that writes it first"
        )
    return str(path)


def crash_dump(folder: str | Path, state: dict[str, Any]) -> Path:
    """Write `crash_dump.pt` into a stage folder, atomically; what `state` may hold is as in
    `Checkpoints.save`. Errors: `CheckpointError`."""
    _check_plain(state, "state")
    final = Path(folder) / "crash_dump.pt"
    temporary = final.with_name(f".tmp-crash_dump-{os.getpid()}.pt")
    try:
        make_folder(final.parent)
        _save_tensors(state, temporary)
        fsync(temporary)
        temporary.replace(final)
        fsync(final.parent)
    except (OSError, RuntimeError) as error:
        why = disk_full(error) or str(error)
        raise CheckpointError(f"{final}: the crash dump was not written: {why}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return final


def rng_state() -> dict[str, Any]:
    """The states of the random generators of python, numpy (global), torch, and of the current CUDA
    device when CUDA is in use, as plain data for a checkpoint."""
    import numpy

    version, words, gauss = random.getstate()
    generator = numpy.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    mersenne = generator["state"]
    state = {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": torch.from_numpy(mersenne["key"].astype("int64")),
            "pos": int(mersenne["pos"]),
            "has_gauss": int(generator["has_gauss"]),
            "gauss": float(generator["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned; a generator that it does not hold stays as it is."""
    import numpy

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    held = state["numpy"]
    key = held["key"].numpy().astype("uint32")
    numpy.random.set_state(("MT19937", key, held["pos"], held["has_gauss"], held["gauss"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _save_tensors(state: dict[str, Any], path: Path) -> None:
    # Through a file of Python: given a path, torch would lose the reason of a failed write.
    with path.open("wb") as file:
        torch.save(state, file)


def _check_plain(value: Any, at: str) -> None:
    """Refuse now what `load_state` would refuse when the run is to be resumed."""
    if type(value) in _PLAIN or type(value) in (torch.Tensor, torch.nn.Parameter):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in _PLAIN:
                raise CheckpointError(f"{at} has a key of type {type(key).__name__}; {_ALLOWED}")
            _check_plain(item, f"{at}[{key!r}]")
        return
    if type(value) not in (list, tuple, torch.Size):
        raise CheckpointError(f"{at} is a {type(value).__name__}; {_ALLOWED}")
    for index, item in enumerate(value):
        _check_plain(item, f"{at}[{index}]")


def _newest(
    root: Path, check: Callable[[Path], list[str]], warn: Warn | None, until: int | None = None
) -> Path | None:
    for step in _steps(root):
        if until is not None and step > until:
            continue
        folder = root / f"step-{step}"
        problems = check(folder)
        if not problems:
            return folder
        if warn is not None:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            warn(f"skipping the broken checkpoint {folder}: {problems[0]}{more}")
    return None


def _best(root: Path) -> Path:
    step = _pointed(root, "best")
    if step is None:
        raise CheckpointError(f"{root}: no checkpoint is marked as best; use @last")
    folder = root / f"step-{step}"
    if problems := _verify_once(folder):
        raise CheckpointError(f"{folder}: the best checkpoint is broken ({problems[0]}); use @last")
    return folder


def _verify_once(folder: Path) -> list[str]:
    """`verify`, remembered while no file of the folder changes: a stage resolves one reference
    several times, and a teacher may have many gigabytes."""
    stamp = []
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            stamp.append((path.name, facts.st_size, facts.st_mtime_ns, facts.st_ino))
    return _remembered(folder.absolute(), tuple(stamp))


@functools.lru_cache(maxsize=32)
def _remembered(folder: Path, stamp: tuple[tuple[str, int, int, int], ...]) -> list[str]:
    return verify(folder)


def _steps(root: Path) -> list[int]:
    """The steps that have a folder, newest first."""
    found = (_STEP.fullmatch(path.name) for path in _entries(root) if path.is_dir())
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def _pointed(root: Path, name: str) -> int | None:
    """The step of a pointer; None if there is no such pointer, or no sense in it."""
    try:
        step = json.loads((root / f"{name}.json").read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int else None


def _entries(root: Path) -> list[Path]:
    try:
        return list(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _local(reference: str) -> Path:
    if not reference.startswith("file://"):
        return Path(reference)
    folder = open_store(reference).local_path("checkpoints")
    assert folder is not None, "file:// is local"
    return folder.parent


def _is_stage(folder: Path) -> bool:
    if not folder.is_dir() or (folder / "config.json").exists():
        return False
    marks = ("checkpoints", "run_meta.json", "args_snapshot.json")
    return any((folder / mark).exists() for mark in marks)
