"""One micro-batch of rows, as the stream yields it and objectives complete it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class Batch:
    """Shapes [rows, length]. `targets[i, t]` is the token that follows `input_ids[i, t]` in its
    document, or `IGNORE`. `position_ids` start again at 0 with each document of a row: that, no
    attention mask and `use_cache=False` is what keeps documents apart. `weights` holds, per loss
    term, the 0-dim weight of this batch (e.g. supervised tokens); `extra` holds tensors with
    one entry per row that an objective prepared."""

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    weights: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; pinned memory is copied without waiting."""
        tensors = (self.input_ids, self.position_ids, self.targets)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))

    def split(self) -> tuple[Batch, Batch]:
        """The first and the second half of the rows, unprepared. Needs at least two rows."""
        half = self.rows // 2
        tensors = (self.input_ids, self.position_ids, self.targets)
        return Batch(*(t[:half] for t in tensors)), Batch(*(t[half:] for t in tensors))
