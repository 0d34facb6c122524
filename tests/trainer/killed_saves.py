"""Kills a save at each of its calls to the file system, and prints what could be loaded then.

Run as a script: one process imports torch, its children are forked and killed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.trainer.disk import killed_at
from trainer.checkpoint import Checkpoints, load_state
from trainer.manifest import verify
from trainer.runtime import Runtime
from trainer.saver import Saver

BEFORE, AFTER = 1, 2


def save(folder: Path, step: int, mark: int, best: bool) -> None:
    """A checkpoint whose weights and state both say `mark`."""

    def write_model(path: Path) -> None:
        (path / "config.json").write_text("{}")
        save_file({"w": torch.full((64,), float(mark))}, path / "model.safetensors")

    state = {"mark": mark, "moment": torch.full((64,), float(mark))}
    Checkpoints(folder, keep=1).save(step, write_model, state, val_loss=1.0 / mark, best=best)


def save_beside(folder: Path, step: int, mark: int, best: bool) -> None:
    """The same checkpoint, written by the thread of a save in the background."""

    class Files:
        def tensors(self) -> dict[str, torch.Tensor]:
            return {"w": torch.full((64,), float(mark))}

        def write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
            (path / "config.json").write_text("{}")
            save_file(tensors, path / "model.safetensors")

    state = {"mark": mark, "moment": torch.full((64,), float(mark))}
    process = Runtime(torch.device("cpu"), "fp32")
    saver = Saver(Checkpoints(folder, keep=1), Files(), process, None, background=True)
    saver.save(step, state, val_loss=1.0 / mark, best=best)
    saver.wait()


def loaded(folder: Path) -> int:
    """The mark of the newest checkpoint; everything about it must be whole."""
    newest = Checkpoints(folder, keep=1).newest()
    assert newest is not None, "no checkpoint is loadable"
    state = load_state(newest)
    weights = load_file(newest / "model.safetensors")["w"]
    assert weights.eq(state["mark"]).all() and state["moment"].eq(state["mark"]).all()
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not hidden, f"left behind: {hidden}"
    for name in ("last", "best"):
        pointed = json.loads((folder / f"{name}.json").read_text())["path"]
        assert not verify(folder / pointed), f"{name}.json points at a broken checkpoint"
    return int(state["mark"])


def scenario(work: Path, step: int, act: Callable[..., None] = save) -> dict[str, Any]:
    """From a checkpoint of step 1, save `step` (1 replaces it), killed at every call in turn."""
    marks: list[int] = []
    while True:
        folder = work / str(len(marks))
        save(folder, 1, BEFORE, best=True)
        survived = not killed_at(lambda at=folder: act(at, step, AFTER, best=True), len(marks))
        mark = loaded(folder)
        save(folder, step, AFTER, best=True)
        assert loaded(folder) == AFTER, "the run cannot save again"
        shutil.rmtree(folder)
        if survived:
            return {"kills": len(marks), "marks": marks, "whole_save": mark}
        marks.append(mark)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # SIGKILL cannot show what fsync is for (the page cache survives it), so memory will do.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as work:
        found = {
            "new": scenario(Path(work), 2),
            "replace": scenario(Path(work), 1),
            "beside": scenario(Path(work), 2, save_beside),
        }
    sys.stdout.write(json.dumps(found))
