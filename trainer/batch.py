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
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        return Batch(move(self.input_ids), move(self.position_ids), move(self.targets))

    def split(self) -> tuple[Batch, Batch]:
        """The first and the second half of the rows, unprepared. Needs at least two rows."""
        half = self.rows // 2
        cut = lambda s: Batch(self.input_ids[s], self.position_ids[s], self.targets[s])  # noqa: E731
        return cut(slice(0, half)), cut(slice(half, None))
