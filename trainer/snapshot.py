"""Copies of what a checkpoint holds, in the memory of the host, that later steps cannot change."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Copies tensors. What comes from a GPU goes to pinned buffers, which are kept: a copy is valid
    until the next one is taken."""

    def __init__(self) -> None:
        self._kept: defaultdict[int, list[Tensor]] = defaultdict(list)

    def copy(self, value: Any) -> Any:
        """`value` (dicts, lists and tuples of tensors and plain values) with every tensor copied to
        the host; tensors that shared memory share it again. Waits for the device once."""
        copying = _Copying(self._kept)
        copied = copying.of(value)
        self._kept = copying.used
        if copying.waits:
            torch.cuda.current_stream().synchronize()
        return copied


class _Copying:
    def __init__(self, kept: defaultdict[int, list[Tensor]]) -> None:
        self._kept = kept
        self._copies: dict[int, Tensor] = {}  # storage -> its bytes on the host
        self.used: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.waits = False

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value.detach())
        if isinstance(value, OrderedDict):
            return OrderedDict((key, self.of(item)) for key, item in value.items())
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.of(item) for item in value)
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        # Whole storages, not tensors: tied weights stay one piece of memory, written once.
        storage = tensor.untyped_storage()
        copy = self._copies.get(storage._cdata)
        if copy is None:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            copy = self._copies[storage._cdata] = self._bytes(source)
        same = torch.empty(0, dtype=tensor.dtype)
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        return same.set_(copy.untyped_storage(), *place)

    def _bytes(self, source: Tensor) -> Tensor:
        if source.device.type != "cuda":
            return source.to("cpu", copy=True)
        self.waits = True
        size = source.numel()
        buffer = (
            self._kept[size].pop()
            if self._kept[size]
            else torch.empty(size, dtype=torch.uint8, pin_memory=True)
        )
        self.used[size].append(buffer)
        return buffer.copy_(source, non_blocking=True)
