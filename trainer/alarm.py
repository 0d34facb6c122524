"""How a rank that must leave in the middle of a step tells the others, who wait for it there.

They sit in a collective of the device or of gloo: the one would last until its timeout, the other
fail with an error that says nothing. So each rank has a thread that asks the job's key-value store,
and leaves for all of the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from torch.distributed import TCPStore

from trainer import smaller
from trainer.parallel import is_sharded
from trainer.runtime import Runtime
from trainer.smaller import Leave
from trainer.store import StoreError

_KEY, _HEARD = "launch/leave", "launch/heard"
#: Seconds between two looks, and seconds that the others get to hear of it.
_PERIOD, PATIENCE = 0.5, 20.0


@contextlib.contextmanager
def listening(model: nn.Module, runtime: Runtime, folder: Path) -> Iterator[None]:
    """While it lasts, a `Leave` that one rank raises is noted in `folder` and ends all of them with
    its code, those others from within. Nothing where `model` is not sharded."""
    if not is_sharded(model):
        yield
        return
    alarm = Alarm(runtime, folder) if runtime.world_size > 1 else None
    try:
        yield
    except Leave as leave:
        if leave.rows:
            try:
                smaller.note(folder, leave.rows)
            except StoreError as error:
                leave = Leave(leave.tried, 0, f"{leave}, but that cannot be noted: {error}")
        if alarm is not None:
            alarm.tell(leave)
        raise leave from None
    finally:
        if alarm is not None:
            alarm.close()


class Alarm:
    """The thread of a rank that listens for one that leaves, and its word to the others."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self.rank, self.world_size, self.folder = runtime.rank, runtime.world_size, folder
        # A connection of its own: one client answers one question at a time.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=PATIENCE)
        self._store = TCPStore(host, port, timeout=patience, wait_for_workers=False)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="alarm", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def tell(self, leave: Leave) -> None:
        """Let the other ranks leave, and wait until they have heard it."""
        self.close()
        said = {"code": leave.code, "rows": leave.rows, "line": f"rank {self.rank}: {leave}"}
        until = time.monotonic() + PATIENCE
        with contextlib.suppress(RuntimeError):  # who keeps the store may be gone already
            self._store.set(_KEY, json.dumps(said))
            self._store.add(_HEARD, 1)  # others may have run out of memory, too, and wait as well
            while self._store.add(_HEARD, 0) < self.world_size and time.monotonic() < until:
                time.sleep(0.05)

    def _listen(self) -> None:
        while not self._end.wait(_PERIOD):
            try:
                if not self._store.check([_KEY]):
                    continue
                said = json.loads(self._store.get(_KEY))
            except RuntimeError:  # the store is gone, and with it the job
                return
            self._leave(said)

    def _leave(self, said: dict[str, Any]) -> NoReturn:
        code = int(said["code"])
        sys.stderr.write(f"error: {said['line']}\n")
        if said["rows"] and os.environ.get("LOCAL_RANK", "0") == "0":  # nodes may share no disk
            try:
                smaller.note(self.folder, int(said["rows"]))
            except StoreError as error:
                sys.stderr.write(f"error: {error}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(RuntimeError):
            self._store.add(_HEARD, 1)
        os._exit(code)  # the main thread is where nothing can reach it
