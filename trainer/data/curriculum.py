"""Rows that become longer in the course of one run: short ones first, the whole length at the end.

Texts are tokenised once. Each phase cuts and packs them anew, when it begins; only the rows of the
current phase are kept, beside those of the whole length. A step has the same tokens in every phase:
k times as many rows of a k-th of the length, and so has a micro-batch.

Within a pass over the data nothing is read twice: a phase that begins in the middle of a pass first
reads what the phases before have left of it (of a text of which a part was read, the rest), then
all of it, pass after pass. Less than a step's rows at the end of such a rest stay unread. What is
left follows from where each phase before ended, so a checkpoint holds those positions and no rows.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from trainer.config_data import Phase
from trainer.data.chunks import recut
from trainer.data.pack import pack
from trainer.data.stream import Rows, Stream

_Read = NDArray[np.bool_]


class Curriculum(Stream):
    """A stream whose rows have the lengths of `phases`, and then that of `whole`. `rows`,
    `rows_per_step`, `micro_batch` and `position` are those of the current phase."""

    def __init__(
        self,
        whole: Rows,
        phases: tuple[Phase, ...],
        *,
        micro_batch: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        super().__init__(
            whole, micro_batch=micro_batch, accumulate=accumulate, rank=rank,
            world_size=world_size, seed=seed,
        )  # fmt: skip
        self.whole = whole
        self.curriculum = [[phase.sequence_length, phase.until] for phase in phases]
        self._lengths = [*(phase.sequence_length for phase in phases), whole.sequence_length]
        self._whole_step, self._whole_micro_batch = self.rows_per_step, micro_batch
        self._phase = 0
        self._resting = False  # whether `rows` are what the phases before left of a pass
        self._ended: list[tuple[bool, int]] = []  # of each phase before: `_resting`, `position`
        self._read: _Read = np.zeros(len(whole.chunks.tokens), dtype=np.bool_)
        self._begin(0)

    def advance(self, step: int, progress: float) -> bool:
        """Go to the phase that `step` (counted from 0) at `progress` of the horizon belongs to.
        True: rows became longer; a micro-batch then has as many tokens as it had."""
        phase = self._phase
        while phase < len(self.curriculum) and _over(self.curriculum[phase][1], step, progress):
            phase += 1
        if phase == self._phase:
            return False
        micro_batch = self.micro_batch * self._lengths[self._phase] // self._lengths[phase]
        while self._phase < phase:
            self._end()
        self.resize(max(1, micro_batch))
        return True

    @property
    def reading_batch(self) -> int:
        return max(1, self.micro_batch * self.rows.sequence_length // self.whole.sequence_length)

    def next_group(self) -> list[Any]:
        if self._resting and self.position + self.rows_per_step > len(self.rows):
            self._use(self._all(), resting=False)
        return super().next_group()

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "epoch_rows": len(self.whole),
            "digest": self.whole.digest,
            "curriculum": self.curriculum,
            "phase": self._phase,
            "resting": self._resting,
            "ended": [list(pair) for pair in self._ended],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the rows already seen. Errors: `DataError` if the data is not the same."""
        self.check(state, self.whole)
        self._read[:] = False
        self._phase, self._ended = 0, []
        self._begin(0)
        for resting, position in state["ended"]:
            self._go(resting, position)
            self._end()
        self._go(state["resting"], state["position"])

    def _go(self, resting: bool, position: int) -> None:
        """To a place in the current phase, which has just begun."""
        if self._resting and not resting:
            self._use(self._all(), resting=False)
        # With more rows a step than before, what was left may be too little to be read now.
        self.position = position if resting == self._resting else 0

    def _end(self) -> None:
        """Note what was read in the pass that is going on, and begin the next phase."""
        self._ended.append((self._resting, self.position))
        done = self.position
        if not self._resting:  # a new pass began with these rows, perhaps several times
            done %= len(self.rows)
            self._read[:] = False
        begin = self.position - done
        chunks, packing = self.rows.chunks, self.rows.packing
        for row in self._rows_at(range(begin, self.position)):
            for start, length, _ in chunks.spans(packing[row]):
                self._read[start : start + length] = True
        self._begin(self._phase + 1)

    def _begin(self, phase: int) -> None:
        self._phase = phase
        times = self.whole.sequence_length // self._lengths[phase]
        self.rows_per_step = self._whole_step * times
        self.micro_batch = self._whole_micro_batch * times
        rest = self._rest() if self._read.any() else None
        self._use(rest or self._all(), resting=rest is not None)

    def _use(self, rows: Rows, *, resting: bool) -> None:
        self.rows, self._resting, self.position = rows, resting, 0
        self._permutation.cache_clear()
        self.changed(rows)

    def _all(self) -> Rows:
        length = self._lengths[self._phase]
        if length == self.whole.sequence_length:
            return self.whole
        found = self._cut(np.zeros_like(self._read))
        assert found is not None  # the whole rows hold something to learn, and so do their parts
        return found

    def _rest(self) -> Optional[Rows]:
        """What is left of the pass; None: less than the rows of a step."""
        rows = self._cut(self._read)
        return rows if rows is not None and len(rows) >= self.rows_per_step else None

    def _cut(self, read: _Read) -> Optional[Rows]:
        """Rows of the current length of what was not `read`, of the documents that the whole rows
        hold; None: nothing to learn is left."""
        length = self._lengths[self._phase]
        used = np.unique(self.whole.chunks.document[self.whole.packing.items])
        chunks = recut(self.whole.chunks, length, used, read)
        if not len(chunks):
            return None
        return Rows(chunks, pack(chunks.lengths, length), length, fixed=True)


def _over(until: float, step: int, progress: float) -> bool:
    return step >= until if until >= 1 else progress >= until
