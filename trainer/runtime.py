"""The device and the process group: everything the loop must not know about either."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import ConfigError

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

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all ranks, once per step; absent ones count as zero."""
        if self.world_size == 1:
            return
        for bucket in _buckets(parameters):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grads = [p.grad for p in bucket if p.grad is not None]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(part.view_as(grad))

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


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, up to `BUCKET_BYTES` together."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        bytes_ = parameter.numel() * parameter.element_size()
        if bucket and (size + bytes_ > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += bytes_
    if bucket:
        yield bucket
