"""What a stage reports while it runs: one JSON object a line (docs/contracts.md), and TensorBoard.

The lines are the record: they must be written. TensorBoard and trackers (sinks.py) are a
convenience: when one fails, training goes on without it.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional, Protocol

from trainer.sinks import without_secrets
from trainer.store import DiskFull, StoreError, disk_full, free_bytes, make_folder

VERSION = 1
#: Keys that every line has; facts must not carry them.
HEAD = ("v", "kind", "attempt", "restart", "stage", "time", "global_step")
#: Facts of a step that its line shows, in this order.
SHOWN = (
    "train_loss",
    "ce_loss",
    "kd_loss",
    "kd_alpha",
    "logit_l2",
    "keep_l2",
    "preference_loss",
    "sft_loss",
    "accuracy",
    "margin",
    "surrogate_loss",
    "surrogate_coverage",
    "surrogate_weight",
    *("reward", "reward_std", "zero_variance", "length", "truncated", "kl", "clipped", "entropy"),
    "grad_norm",
)
#: Facts of an evaluation that its line does not show.
COUNTS = ("val_tokens", "val_count")


class Sink(Protocol):
    """Where numbers go besides the lines. Both methods may raise anything."""

    def add(self, global_step: int, values: Mapping[str, float], /) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Writes `metrics/<attempt>.jsonl` and `tensorboard/` of a stage folder. One process does. A
    `restart` of the attempt has a file of its own, `<attempt>r<restart>.jsonl`.

    `trackers` get the same numbers. `warn` is told, once for each, when TensorBoard or a tracker
    cannot be written. Errors of every method that writes a
    line: `StoreError` when it cannot be written; the file then ends with the whole line before."""

    def __init__(
        self,
        folder: str | Path,
        stage: str,
        attempt: int,
        *,
        restart: int = 0,
        tensorboard: bool = True,
        trackers: Optional[Mapping[str, Sink]] = None,
        warn: Callable[[str], None] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        part = f"{attempt:04d}" + (f"r{restart}" if restart else "")
        self.path = Path(folder) / "metrics" / f"{part}.jsonl"
        self.stage, self.attempt, self.restart, self.now = stage, attempt, restart, now
        self._warn = warn or _to_stderr
        self._descriptor = _open_after_whole_lines(self.path)
        self._sinks = dict(trackers or {})
        if tensorboard:
            self._sinks["TensorBoard"] = _Board(Path(folder) / "tensorboard", now)

    def step(self, global_step: int, **facts: Any) -> None:
        """Facts of an optimizer step. A fact that is None is left out; numbers that are not finite
        are written as strings."""
        self._line("step", global_step, facts)
        self._scalars(global_step, facts)

    def eval(self, global_step: int, **facts: Any) -> None:
        """Facts of an evaluation on the validation data."""
        self._line("eval", global_step, facts)
        self._scalars(global_step, facts)

    def event(self, name: str, global_step: int, /, **facts: Any) -> None:
        """Something that happened: `nan_skipped`, `checkpoint`, `resumed`, ..."""
        facts = without_secrets(facts, os.environ)  # one may be the text of an error
        self._line("event", global_step, {"event": name, **facts})

    def table(self, rows: list[dict[str, Any]], global_step: int = 0) -> None:
        """The rows of a comparison."""
        self._line("table", global_step, {"rows": rows})

    def close(self) -> None:
        """Make the lines durable. A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise StoreError(f"cannot write {self.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)
            self._to_sinks(lambda sink: sink.close())

    def _line(self, kind: str, global_step: int, facts: Mapping[str, Any]) -> None:
        if taken := [key for key in facts if key in HEAD]:
            raise ValueError(f"a metrics line has its own {', '.join(taken)}; rename the fact")
        restart = self.restart or None  # absent: the attempt's first start
        time = round(self.now(), 3)
        head = (VERSION, kind, self.attempt, restart, self.stage, time, global_step)
        line = json.dumps(plain({**dict(zip(HEAD, head)), **facts}), allow_nan=False) + "\n"
        _append(self._descriptor, line.encode(), self.path)

    def _scalars(self, global_step: int, facts: Mapping[str, Any]) -> None:
        values = {key: plain(value) for key, value in facts.items() if value is not None}
        numbers = {key: float(v) for key, v in values.items() if type(v) in (int, float)}
        numbers.update({key: float(v) for key, v in values.items() if v in _NOT_FINITE})
        self._to_sinks(lambda sink: sink.add(global_step, numbers))

    def _to_sinks(self, act: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                act(sink)
            except Exception as error:  # whatever it is, it must not end a training
                del self._sinks[name]
                reason = disk_full(error) or (str(error).splitlines() or [""])[0]
                line = (
                    f"{name} is off from here on ({type(error).__name__}: {reason}); the metrics "
                    f"go on in {self.path}"
                )
                self._warn(without_secrets(line, os.environ))  # an address may hold a password


class _Board:
    """An event file, written in this thread: a failure is the caller's to see, and nothing hangs.
    The file is made with the first value."""

    def __init__(self, folder: Path, now: Callable[[], float]) -> None:
        self.folder, self.now = folder, now
        self._records: Any = None
        self._file: Any = None

    def add(self, global_step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._file is None:
            self._open()
            self._write(Event(wall_time=self.now(), file_version="brain.Event:2"))
            # TensorBoard drops what an earlier attempt wrote from this step on.
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=self.now(), step=global_step, session_log=start))
        pairs = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=self.now(), step=global_step, summary=Summary(value=pairs)))
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        # Readers follow the files of a folder in the order of their names.
        unique = f"{time.time_ns() / 1e9:020.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self.folder / f"events.out.tfevents.{unique}").open("xb")
        self._records = RecordWriter(self._file)

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


_NOT_FINITE = ("nan", "inf", "-inf")


def plain(value: Any) -> Any:
    """`value` as JSON has it: keys whose value is None are left out, numbers that are not finite
    become strings, scalars of torch and numpy become numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        return float(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if hasattr(value, "item"):
        return plain(value.item())
    return str(value)


def _open_after_whole_lines(path: Path) -> int:
    """A descriptor that appends to `path`, after cutting a line that was torn when the process of
    an earlier start of the same attempt died."""
    try:
        make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(descriptor).st_size
        end = _end_of_whole_lines(descriptor, size)
        if end < size:
            os.ftruncate(descriptor, end)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    return descriptor


def _end_of_whole_lines(descriptor: int, size: int) -> int:
    """The position after the last newline."""
    end = size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _append(descriptor: int, line: bytes, path: Path) -> None:
    """One write, so that a reader who follows the file sees whole lines."""
    before = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        while written < len(line):  # a full disk takes a part, and the next write says why
            written += os.write(descriptor, line[written:])
    except OSError as error:
        os.ftruncate(descriptor, before)
        if full := disk_full(error):
            room = f"needs {len(line)} bytes, {free_bytes(path)} are free"
            raise DiskFull(f"{full}: {path} {room}; free some space and resume") from error
        raise StoreError(f"cannot write {path}: {error.strerror}") from error


def _to_stderr(message: str) -> None:
    sys.stderr.write(f"warning: {message}\n")
