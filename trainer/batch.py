"""One micro-batch of rows, as the stream yields it and objectives complete it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100


@dataclass
class Batch:
    """Shapes [rows, length]. `targets[i, t]` is the token that follows `input_ids[i, t]` in its
    document, or `IGNORE`. `position_ids` start again at 0 with each document of a row: that, no
    attention mask and `use_cache=False` is what keeps documents apart.

    `to` fills `supervised`: the flat indices [n] of positions that have a target, found before the
    copy, so that nothing on the device has to be counted, and keeps the batch that was copied as
    `host`. `progress`: the share of the horizon done before this step. `weights` holds, per loss
    term, the 0-dim float64 weight of this batch (e.g. supervised tokens); `extra` is the
    objective's.

    `parts`, where an objective made any: what goes through the model in place of the batch, one
    after another, since its rows are too much for once.

    Of the host's batch, one for each row: `places`, where the stream has it (none: it is not of the
    stream), and `records`, what rows that are more than tokens were made of. `apart`: `to` gives
    each document a row of its own."""

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    supervised: Optional[Tensor] = None
    host: Optional[Batch] = None
    progress: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    parts: Sequence[Batch] = ()
    places: Sequence[int] = ()
    records: Sequence[Any] = ()
    apart: bool = False

    @property
    def rows(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def labels(self) -> Tensor:
        """The targets [n] of the supervised positions."""
        assert self.supervised is not None, "call `to` first"
        return self.targets.flatten().index_select(0, self.supervised)

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`, unprepared; pinned memory is copied without waiting."""
        if self.apart:
            return self.documents().to(device)
        supervised = (self.targets.flatten() != IGNORE).nonzero().squeeze(1)
        tensors = (self.input_ids, self.position_ids, self.targets, supervised)
        ids, positions, targets, found = (t.to(device, non_blocking=True) for t in tensors)
        return Batch(ids, positions, targets, found, host=self)

    def pinned(self) -> Batch:
        """The same rows, unprepared, in memory that a GPU can read by itself."""
        tensors = (self.input_ids, self.position_ids, self.targets)
        made = Batch(*(t.pin_memory() for t in tensors))
        made.places, made.records, made.apart = self.places, self.records, self.apart
        return made

    def documents(self) -> Batch:
        """Rows [documents, longest] of one document each, in order, of a batch on the CPU; padding
        has position 0. What has no targets is left out."""
        parts = [t.flatten() for t in (self.input_ids, self.position_ids, self.targets)]
        ids, positions, targets = parts
        borders = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        spans = [slice(*span) for span in pairwise(borders)]
        spans = [span for span in spans if bool((targets[span] != IGNORE).any())]
        fills = (int(ids[0]), 0, IGNORE)
        columns = (pad_sequence([part[span] for span in spans], True, fill)
                   for part, fill in zip(parts, fills))  # fmt: skip
        return Batch(*columns)

    def split(self) -> tuple[Batch, Batch]:
        """The first and the second half of the rows, unprepared. Needs at least two rows."""
        half = self.rows // 2
        tensors = (self.input_ids, self.position_ids, self.targets)
        first, second = Batch(*(t[:half] for t in tensors)), Batch(*(t[half:] for t in tensors))
        first.places, second.places = self.places[:half], self.places[half:]
        first.records, second.records = self.records[:half], self.records[half:]
        first.apart = second.apart = self.apart
        return first, second
