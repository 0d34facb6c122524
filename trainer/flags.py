"""Flags of the device, read a step late."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor


class Flags:
    """What steps say of themselves on the device, read later: nothing waits for it in the step."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, Tensor, Optional[torch.cuda.Event]]] = deque()

    def put(self, step: int, flag: Tensor) -> None:
        """Start copying a flag (a scalar, 0: finite) to the host."""
        if flag.device.type != "cuda":
            self._held.append((step, flag, None))
            return
        host = torch.empty((), pin_memory=True).copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._held.append((step, host, event))

    def read(self, keep: int) -> Iterator[tuple[int, bool]]:
        """All but the newest `keep`: the step, and whether it was finite."""
        while len(self._held) > keep:
            step, flag, event = self._held.popleft()
            if event is not None:
                event.synchronize()
            yield step, float(flag) == 0.0
