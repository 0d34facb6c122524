"""The device and the process group: everything the loop must not know about either."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import ConfigError
from trainer.smaller import Leave

#: Gradients are reduced in flat pieces of at most this many bytes.
BUCKET_BYTES = 64 * 2**20
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """One process of the job. `flags` is a gloo group beside NCCL: host decisions never wait for
    the device. Cpu and Cuda differ in so little that one class with a device serves both."""

    device: torch.device
    precision: Literal["fp32", "bf16", "fp16"]
    rank: int = 0
    world_size: int = 1
    flags: Optional[Any] = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and of frozen models."""
        return _DTYPES[self.precision]

    def at(self, precision: str) -> Runtime:
        """This runtime at `precision`; `auto` is bf16 on a GPU that has it, else fp32.
        Errors: `ConfigError` when the GPU lacks it."""
        cuda = self.device.type == "cuda"
        has_bf16 = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(self.device)
            raise ConfigError(f"model.precision: bf16 is not supported by {name}; use fp16 or fp32")
        if precision == "bf16" or (precision == "auto" and cuda and has_bf16):
            return replace(self, precision="bf16")
        if precision == "fp16":
            return replace(self, precision="fp16")
        return replace(self, precision="fp32")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision: parameters stay fp32, matrix products run in bf16 or fp16."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        mixed: contextlib.AbstractContextManager[Any] = torch.autocast(
            self.device.type, dtype=self.dtype
        )
        return mixed

    def all_sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """0-dim tensors, summed over all ranks in one collective (float64)."""
        if self.world_size == 1 or not values:
            return values
        flat = torch.stack([value.double() for value in values.values()]).to(self.device)
        dist.all_reduce(flat)
        return dict(zip(values, flat.unbind()))

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any rank raised it. All ranks must call it."""
        if self.world_size == 1:
            return flags
        tensor = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.flags)
        return tuple(bool(value) for value in tensor.tolist())

    def largest(self, value: float) -> float:
        """The largest `value` of any rank. All ranks must call it."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.flags)
        return float(tensor)

    def reduce_gradients(self, parameters: Iterable[nn.Parameter], ready: bool = True) -> bool:
        """Sum the gradients over all ranks, once per step. One that is absent on some ranks counts
        as zero there; one that is absent on all stays absent, as on one rank: the optimizer leaves
        such a parameter alone. False, on all ranks and with nothing summed, when one of them is not
        `ready` or has no memory for it."""
        if self.world_size == 1:
            return ready
        trainable = [p for p in parameters if p.requires_grad]
        room = _room(trainable, self.device) if ready else None
        failed, gaps = self.any(room is None, any(p.grad is None for p in trainable))
        if failed or room is None:
            return False
        if gaps and self.any(not self._fill(trainable))[0]:
            return False
        for bucket in _buckets([p.grad for p in trainable if p.grad is not None]):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            size = sum(grad.nbytes for grad in bucket)
            flat = room[:size].view(bucket[0].dtype)
            torch.cat([grad.flatten() for grad in bucket], out=flat)
            dist.all_reduce(flat)
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                grad.copy_(part.view_as(grad))
        return True

    def _fill(self, parameters: list[nn.Parameter]) -> bool:
        """Zeros for the gradients that only other ranks have; whether there was memory for them."""
        present = torch.tensor([int(p.grad is not None) for p in parameters])
        dist.all_reduce(present, op=dist.ReduceOp.MAX, group=self.flags)
        try:
            for parameter, wanted in zip(parameters, present.tolist()):
                if wanted and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        except torch.OutOfMemoryError:
            return False
        return True

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Make every rank's tensors those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in order; values are plain data."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.flags)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.flags)

    def memory_mb(self) -> Optional[float]:
        """Allocated on the GPU, in MB; None on CPU."""
        if self.device.type != "cuda":
            return None
        return float(torch.cuda.memory_allocated(self.device)) / 1e6

    def finish(self) -> None:
        """Wait until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def release_memory(self) -> None:
        """Give cached blocks back after an out-of-memory, so that smaller ones fit."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def start() -> Iterator[Runtime]:
    """The runtime of this process, from the variables that torchrun sets; fp32 until `at`."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    flags = None
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        flags = dist.new_group(backend="gloo") if cuda else dist.group.WORLD
    try:
        yield Runtime(device, "fp32", rank, world_size, flags)
        if world_size > 1:
            dist.barrier(group=flags)  # a rank that tears down early can abort its peers
    except Leave:
        cuda = False  # the group is in a collective that will not end
        raise
    finally:
        if world_size > 1 and cuda:
            dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Exit with `code`. Beside other processes this is done without the interpreter's clean-up:
    gloo's threads were seen to abort there (SIGABRT after the work was done), with a code of their
    own; for the same reason `start` leaves a gloo group as it is."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)
    sys.exit(code)


def _room(parameters: list[nn.Parameter], device: torch.device) -> Optional[Tensor]:
    """Bytes for the largest bucket that is copied; None when there is no memory for them. A tensor
    that fills a bucket needs none: its gradient is summed in place."""
    kept = [p if p.grad is None else p.grad for p in parameters]
    size = min(BUCKET_BYTES, sum(tensor.nbytes for tensor in kept))
    size = max([size, *(tensor.nbytes for tensor in kept if not tensor.is_contiguous())])
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, up to `BUCKET_BYTES` together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
