"""The optimizer's state, written by all workers, each its part, with torch.distributed.checkpoint.

It is in the folder `state/` of a checkpoint, by the names of parameters, so that any number of
workers can read it. The weights and everything plain stay with rank 0. The files are committed by
the checkpoint's manifest, not by their own `.metadata`, which shards.py reads.
"""

from __future__ import annotations

import errno
import heapq
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from trainer import parallel
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError
from trainer.manifest import Known
from trainer.runtime import Runtime
from trainer.store import disk_full, sha256_file

FOLDER = "state"
#: How long a worker waits for another one that is silent: what goes wrong in one is told, and a
#: process that dies is noticed at once. Between two exchanges rank 0 writes at most its half of
#: weights and moments: 48 GB of 8 billion parameters, the most that one GPU trains, take 8 minutes
#: on a disk of 100 MB/s.
_PATIENCE = timedelta(minutes=15)
#: In the plain state: the names of the optimizer's parameters, where their state is in shards.
NAMES = "shards"
#: In the plain state: [name, shape] of the optimizer's parameters, by their numbers in its state.
PARAMETERS = "parameters"
#: Before the name of a parameter, as in torch's own flattened state of an optimizer.
PREFIX = "state."

#: What needs no folder that all workers see, by what does.
_INSTEAD = {"train.sharded": "`sharded: false`", "train.parallel: fsdp": "`parallel: ddp`"}


class Shards:
    """How this worker takes part. All workers make one, in the same order, before any saves: it
    makes a process group of its own, for collectives in another thread than the loop's."""

    def __init__(self, model: nn.Module, optimizer: Any, runtime: Runtime, folder: Path) -> None:
        self.names = parameter_names(model, optimizer)
        self.rank, self.world_size = runtime.rank, runtime.world_size
        self.parts = parallel.is_sharded(model)  # each worker has a part of every tensor
        check_one_folder(folder, runtime, "train.parallel: fsdp" if self.parts else "train.sharded")
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._layouts: dict[str, _Layout] = {}  # of what the last state has in parts

    def take(self, state: dict[str, Any], beside: int) -> dict[str, Tensor]:
        """This worker's part of the optimizer's state, by name; the whole of it is taken out of
        `state`. `beside`: bytes that rank 0 writes besides."""
        optimizer = state["optimizer"]
        whole: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        left: dict[int, dict[str, Any]] = {}
        for index, entries in optimizer["state"].items():
            for key, value in entries.items():
                if hasattr(value, "to_local"):
                    parts[f"{PREFIX}{self.names[index]}.{key}"] = value
                elif isinstance(value, Tensor):
                    whole[f"{PREFIX}{self.names[index]}.{key}"] = value
                else:
                    left.setdefault(index, {})[key] = value
        state["optimizer"] = {**optimizer, "state": left}
        state[NAMES] = list(self.names)
        # Where each has its parts, rank 0 alone knows what it writes besides.
        beside = 0 if self.parts else beside
        writers = balance({n: v.nbytes for n, v in whole.items()}, self.world_size, beside)
        mine = {name: value for name, value in whole.items() if writers[name] == self.rank}
        self._layouts = {name: _Layout.of(value) for name, value in parts.items()}
        return {**mine, **{name: parallel.local(value) for name, value in parts.items()}}

    def write(self, folder: Path, part: dict[str, Tensor], error: str = "") -> Known:
        """Write this worker's part into `folder`/`state`, with all the others; what is known of
        everyone's files. `error`: why this worker cannot. Errors: `CheckpointError`, on every
        worker, whatever went wrong in one: who raised on its own would leave the others waiting."""
        from torch.distributed.checkpoint.api import CheckpointException

        into = folder / FOLDER
        save: Callable[[], None] = _nothing
        if not error:
            try:
                save = _dcp_save(into, self._placed(part), self._group)
            except Exception as failed:
                error = f"rank {self.rank}: {described(failed)}"
        self._agree(into, error)
        mine: dict[str, tuple[int, str]] | list[str]
        try:
            save()
            mine = self._digests(into)
        except (Exception, CheckpointException) as failed:  # torch's is no `Exception`
            mine = self._said(failed)
        known: dict[str, tuple[int, str]] = {}
        for theirs in self._gather(mine):
            if isinstance(theirs, list):
                line, full = theirs
                cause = OSError(errno.ENOSPC, full) if full else None
                raise CheckpointError(f"{into}: {line}") from cause
            known.update(theirs)
        return known

    def tell(self, line: str) -> str:
        """What rank 0 says, on every worker."""
        said = [line]
        dist.broadcast_object_list(said, src=0, group=self._group)
        return said[0]

    def _placed(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """`part`, with each tensor that is a part of one as that, on the host."""
        if not self._layouts:
            return part
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor

        mesh = DeviceMesh.from_group(self._group, "cpu")
        placed = dict(part)
        for name, layout in self._layouts.items():
            placed[name] = DTensor.from_local(
                part[name].cpu(), mesh, layout.placements, run_check=False,
                shape=layout.shape, stride=layout.stride,
            )  # fmt: skip
        return placed

    def _agree(self, into: Path, error: str) -> None:
        if failed := [line for line in self._gather(error) if line]:
            raise CheckpointError(f"{into}: {failed[0]}")

    def _said(self, error: BaseException) -> list[str]:
        """What went wrong, and the words for a full disk or none. Torch tells every rank which of
        them failed, and how."""
        rank = self.rank
        if failures := getattr(error, "failures", None):
            rank, (error, _) = min(failures.items())
        line = f"rank {rank} could not write its part of the state: {described(error)}"
        return [line, disk_full(error) or ""]

    def _digests(self, into: Path) -> dict[str, tuple[int, str]]:
        paths = sorted(into.glob(f"__{self.rank}_*"))
        return {f"{FOLDER}/{path.name}": (path.stat().st_size, sha256_file(path)) for path in paths}

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


@dataclass(frozen=True)
class _Layout:
    """A tensor of which every worker has a part."""

    shape: Any
    stride: Any
    placements: Any

    @classmethod
    def of(cls, tensor: Any) -> _Layout:
        return cls(tensor.shape, tensor.stride(), tensor.placements)


def parameter_names(model: nn.Module, optimizer: Any) -> list[str]:
    """The names of the optimizer's parameters, in the order of its state's numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def parameter_shapes(model: nn.Module, optimizer: Any) -> list[Any]:
    """[name, shape] of the optimizer's parameters, in the order of its state's numbers."""
    shapes = (list(p.shape) for group in optimizer.param_groups for p in group["params"])
    return [[name, shape] for name, shape in zip(parameter_names(model, optimizer), shapes)]


def balance(sizes: Mapping[str, int], world_size: int, beside: int = 0) -> dict[str, int]:
    """Which rank writes what: name -> rank, the same on every rank. The largest first, each to the
    rank with the fewest bytes so far; rank 0 begins with `beside`."""
    loads = [(beside if rank == 0 else 0, rank) for rank in range(world_size)]
    heapq.heapify(loads)
    writers = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = heapq.heappop(loads)
        writers[name] = rank
        heapq.heappush(loads, (load + sizes[name], rank))
    return writers


def check_one_folder(folder: Path, runtime: Runtime, key: str = "train.sharded") -> None:
    """Errors: `ConfigError` on every rank when one does not see what rank 0 writes in `folder`;
    `key` asks for that."""
    token = runtime.gather(f".seen-{secrets.token_hex(8)}")[0]
    if runtime.main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    runtime.barrier()
    seen = runtime.gather((folder / token).exists())
    if runtime.main:
        (folder / token).unlink()
    if blind := [str(rank) for rank, sees in enumerate(seen) if not sees]:
        raise ConfigError(
            f"{key}: rank {', '.join(blind)} does not see the folder {folder} of rank 0; put the"
            f" output on a disk that all workers share, or set {_INSTEAD[key]}"
        )


def line_of(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def described(error: BaseException) -> str:
    """An error in one line, with its type where it is not one that is expected."""
    line, name = line_of(error), type(error).__name__
    expected = isinstance(error, (CheckpointError, OSError)) or line == name
    return line if expected else f"{name}: {line}"


def _nothing() -> None:
    """What a worker saves that does not get so far."""


def _dcp_save(into: Path, part: dict[str, Tensor], group: Any) -> Callable[[], None]:
    """The collective that writes `part`; what can fail before it has been done."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    class Writer(dcp.FileSystemWriter):  # type: ignore[misc]
        def write_data(self, *arguments: Any) -> Any:
            try:
                return super().write_data(*arguments)
            except Exception as error:
                # On its way to the other ranks, an error loses what it was raised from.
                if full := disk_full(error):
                    raise OSError(errno.ENOSPC, full) from error
                raise

        def storage_meta(self) -> None:
            """Nothing: it would hold this machine's path."""

    # No copying ahead: that is for tensors on a GPU, and uses the loop's device.
    writer = Writer(into, sync_files=True, per_thread_copy_ahead=0)
    planner = DefaultSavePlanner(flatten_state_dict=False)

    def save() -> None:
        dcp.save(part, storage_writer=writer, planner=planner, process_group=group)

    return save
