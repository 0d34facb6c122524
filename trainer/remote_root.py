"""An artifact root in an object store, as a job works with it: a local folder of the same names,
filled from the store before the job and copied there while it runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.boot import Spec
from trainer.mirror import Mirror
from trainer.restore import restore
from trainer.store import NotFound, Store, StoreError, atomic_write, open_store

MARKER = "control/stop.json"
#: Seconds between two looks for the marker in the store.
_LOOK = 5.0
#: Seconds between two looks for a new checkpoint or crash dump, which is sent at once.
_HURRY = 0.5
#: What changes when there is one.
_URGENT = ("checkpoints/last.json", "targets/shard-*/meta.json", "crash_dump.pt")

Say = Callable[[str], None]


class RemoteRoot:
    """`spec.folder` and what the store has of it. Node 0 copies everything; the others, whose
    folder holds nothing new, their logs only."""

    def __init__(self, spec: Spec, store: Store, say: Say) -> None:
        self.spec, self.store, self.say = spec, store, say
        self.folder = spec.folder
        mirrored = self.folder
        if spec.node:
            mirrored = spec.work / "own"
            spec.logs = mirrored / "logs"
        events = spec.raw.get("tensorboard")
        self._mirror = Mirror(
            mirrored, store, warn=lambda line: say(f"warning: {line}"),
            tensorboard=open_store(events) if events else None,
        )  # fmt: skip
        self._done = threading.Event()

    def open(self) -> None:
        """Bring what earlier attempts left; from here on the store follows the folder, and the
        marker in the store comes to the folder. Errors: `StoreError`."""
        (self.folder / MARKER).unlink(missing_ok=True)  # of an earlier boot in this folder
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = restore(self.store, self.folder, warn=lambda line: self.say(f"warning: {line}"))
        for checkpoint in newest:
            self.say(f"restored {checkpoint.relative_to(self.folder)} from {self.store.uri}")
        self._take_marker()
        self._mirror.start()
        for act in (self._watch, self._hurry):
            threading.Thread(target=act, name=act.__name__, daemon=True).start()

    def close(self, bound: float) -> list[str]:
        """Send what is left, for at most `bound` seconds; what is still missing, one line each."""
        self._done.set()
        return self._mirror.close(bound)

    def unproven(self, job: Mapping[str, Any]) -> list[str]:
        """The stages' records that the store does not hold as they are here, one line each: without
        them a success is none. Errors: none; a store that does not answer proves nothing."""
        wrong = []
        for stage in job["stages"]:
            path = Path(stage["output"]) / "run_meta.json"
            if not path.is_relative_to(self.folder) or not path.exists():
                continue
            key = path.relative_to(self.folder).as_posix()
            try:
                if self.store.get_bytes(key) != path.read_bytes():
                    wrong.append(f"{key}: {self.store.uri} has another one")
            except StoreError as error:
                wrong.append(f"{key}: {error}")
        return wrong

    def _watch(self) -> None:
        while not self._done.wait(_LOOK):
            # An outage keeps the marker from us, and nothing else.
            with contextlib.suppress(StoreError):
                if self._take_marker():
                    return

    def _hurry(self) -> None:
        """A machine may be taken at any moment: what is whole does not wait for the next look."""
        known = self._urgent()
        while not self._done.wait(_HURRY):
            found = self._urgent()
            if found != known:
                self._mirror.poke()
            known = found

    def _urgent(self) -> dict[Path, int]:
        """When each was written last, of the run and of a pipeline's stages."""
        found = {}
        for pattern in (f"{level}{name}" for level in ("", "*/") for name in _URGENT):
            for path in self.folder.glob(pattern):
                with contextlib.suppress(FileNotFoundError):
                    found[path] = path.stat().st_mtime_ns
        return found

    def _take_marker(self) -> bool:
        try:
            marker = self.store.get_bytes(MARKER)
        except NotFound:
            return False
        atomic_write(self.folder / MARKER, marker)
        return True


def localized(value: Any, root: str, folder: Path) -> Any:
    """`value` with every text that is `root`, or lies below it, as a path in `folder`."""
    if isinstance(value, Mapping):
        return {key: localized(item, root, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [localized(item, root, folder) for item in value]
    if isinstance(value, str) and (value == root or value.startswith(f"{root}/")):
        return f"{folder}{value[len(root) :]}"
    return value
