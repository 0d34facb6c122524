"""When a checkpoint is written: while the loop waits, or in a thread while it goes on."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from trainer.checkpoint import CheckpointError, Checkpoints
from trainer.manifest import Known
from trainer.runtime import Runtime
from trainer.sharded import Shards, described, line_of
from trainer.snapshot import Snapshot


class Files(Protocol):
    """What `ModelFiles` does: a model's tensors, and how they are written."""

    def tensors(self) -> dict[str, Tensor]: ...
    def write(self, folder: Path, tensors: dict[str, Tensor], /) -> None: ...


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole and has its name."""

    step: int
    path: Path
    best: bool


@dataclass(frozen=True)
class _Work:
    """A checkpoint to be written: rank 0 has all of it, the others have their `part`."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    part: dict[str, Tensor]
    val_loss: Optional[float]
    best: bool
    failed: Optional[Exception] = None  # why there is nothing to be written


class Saver:
    """Saves at a step's end, at most one checkpoint at a time. `checkpoints` is None on ranks that
    write no folder; `shards` is None where rank 0 writes everything. All ranks call `save` and
    `wait` alike. In the `background`, a save returns once what it writes has been copied."""

    def __init__(
        self,
        checkpoints: Optional[Checkpoints],
        files: Files,
        runtime: Runtime,
        shards: Optional[Shards],
        background: bool,
    ) -> None:
        self.checkpoints, self.files, self.runtime = checkpoints, files, runtime
        self.shards, self.background = shards, background
        self.news: deque[Saved] = deque()
        self._snapshot = Snapshot()
        self._thread: Optional[threading.Thread] = None
        self._begun = False
        self._error: Optional[CheckpointError] = None

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        val_loss: Optional[float] = None,
        best: bool = False,
        wait: bool = False,
    ) -> None:
        """Save `step`, after the save before it; `state` is as in `Checkpoints.save`. `wait`: be
        done on return, without a copy. Errors: as `wait`, of this save or of the one before;
        `torch.OutOfMemoryError`, on one worker, of a model that all have a part of."""
        self.wait()
        self._begun = True
        beside = self.background and not wait
        if self.checkpoints is not None or self.shards is not None:
            self._start(step, state, val_loss, best, beside)
        if not beside:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being saved, on any rank. Errors: `CheckpointError`, on all ranks, when
        one could not write its part."""
        if not self._begun:
            return
        self._begun = False
        self._join()
        error, self._error = self._error, None
        lines = self.runtime.gather("" if error is None else line_of(error))
        if error is not None:
            raise error
        if failed := [line for line in lines if line]:
            raise CheckpointError(failed[0])

    def close(self) -> Optional[Exception]:
        """Wait for this rank's thread alone, after an error; what went wrong in it, if anything."""
        self._join()
        return self._error

    @property
    def failed(self) -> bool:
        """Whether this rank could not write; `wait` says what."""
        return self._error is not None

    def _start(
        self,
        step: int,
        state: dict[str, Any],
        val_loss: Optional[float],
        best: bool,
        beside: bool,
    ) -> None:
        tensors = self._gathered(step)
        try:
            work = _Work(step, *self._taken(tensors, state, beside), val_loss, best)
        except Exception as error:  # the other workers are about to write their parts
            work = _Work(step, {}, {}, {}, val_loss, best, error)
        if not beside:
            self._run(work)
            return
        self._thread = threading.Thread(target=self._beside, args=(work,), name=f"save-{step}")
        self._thread.start()

    def _gathered(self, step: int) -> Optional[dict[str, Tensor]]:
        """The tensors of a model of which every worker has a part; else None. Who fails here has to
        leave: the others wait for it in the middle of an exchange, and hear nothing from a save."""
        if self.shards is None or not self.shards.parts:
            return None
        try:
            return self.files.tensors()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _not_saved(step, error) from error

    def _taken(
        self, tensors: Optional[dict[str, Tensor]], state: dict[str, Any], beside: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
        """The tensors of the model, which may be gathered, the state and the part that this worker
        writes."""
        tensors = self.files.tensors() if tensors is None else tensors
        part: dict[str, Tensor] = {}
        if self.shards is not None:
            part = self.shards.take(state, sum(value.nbytes for value in tensors.values()))
        if self.checkpoints is None:  # rank 0 writes these
            tensors, state = {}, {}
        taken = (tensors, state, part)
        if not beside:
            return taken
        if self.shards is not None and self.shards.parts:  # those tensors are copies already
            taken = (tensors, *self._snapshot.copy((state, part)))
        else:
            taken = self._snapshot.copy(taken)
        return taken

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _beside(self, work: _Work) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.set_device(self.runtime.device)  # a new thread begins on the first one
        self._run(work)

    def _run(self, work: _Work) -> None:
        try:
            if self.shards is not None:
                self._write_shards(self.shards, work)
            else:
                self._publish(work, lambda folder: self.files.write(folder, work.tensors))
        except Exception as error:  # the loop raises it, in its own thread
            self._error = _not_saved(work.step, error)

    def _publish(self, work: _Work, write: Callable[[Path], Optional[Known]]) -> None:
        assert self.checkpoints is not None
        if work.failed is not None:
            raise work.failed
        path = self.checkpoints.save(
            work.step, write, work.state, val_loss=work.val_loss, best=work.best
        )
        self.news.append(Saved(work.step, path, work.best))

    def _write_shards(self, shards: Shards, work: _Work) -> None:
        if self.checkpoints is None:
            _write_part(shards, work)
        else:
            self._write_all(shards, work)

    def _write_all(self, shards: Shards, work: _Work) -> None:
        """Rank 0 names the folder, everyone writes, rank 0 seals and says how it ended."""
        named = False

        def write(folder: Path) -> Known:
            nonlocal named
            named = True
            shards.tell(str(folder))
            with contextlib.ExitStack() as stack:
                error = ""
                try:
                    pool = stack.enter_context(ThreadPoolExecutor(max_workers=1))
                    model = pool.submit(self.files.write, folder, work.tensors)
                except Exception as failed:  # no thread is to be had
                    error = f"rank 0: {described(failed)}"
                known = shards.write(folder, work.part, error)
                model.result()
            return known

        try:
            self._publish(work, write)
        except Exception as error:
            if not named:
                shards.tell("")
            shards.tell(line_of(_not_saved(work.step, error)))
            raise
        shards.tell("")


def _write_part(shards: Shards, work: _Work) -> None:
    """What `_write_all` needs of every other rank. Errors: `CheckpointError`, as rank 0 says."""
    failed = work.failed
    if folder := shards.tell(""):
        try:
            shards.write(Path(folder), work.part, "" if failed is None else described(failed))
        except Exception as error:
            failed = error
    if line := shards.tell(""):
        raise CheckpointError(line) from failed
    if failed is not None:
        raise failed


def _not_saved(step: int, error: Exception) -> CheckpointError:
    """The error as the line that all ranks end with."""
    if isinstance(error, CheckpointError) and "not saved" in str(error):
        return error
    gone = isinstance(error, RuntimeError)  # most often of the process group
    why = "another worker may be gone: " if gone else ""
    line = CheckpointError(
        f"step {step} not saved: {why}{described(error)}; earlier checkpoints are whole"
    )
    line.__cause__ = error
    return line
