"""The loss scale of fp16 training (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2): what
the loss is multiplied with so that small gradients do not round to zero in float16. It is a power
of two, so that multiplying and dividing round nothing. Pure: no tensors, no files."""

from __future__ import annotations

INITIAL = 2.0**16
SMALLEST = 1.0
LARGEST = 2.0**24
#: Steps without an overflow after which the scale is doubled.
INTERVAL = 2000
#: How often one step is tried again.
RETRIES = 20


class Scaler:
    """`scale` is halved when gradients overflow, and doubled after `INTERVAL` steps in a row in
    which none did. All ranks see the same reduced gradients, and so hold the same scale."""

    def __init__(self, scale: float = INITIAL) -> None:
        self.scale = scale
        self.clean = 0  # steps since the scale was last changed
        self._halvings = 0  # in this step

    def passed(self) -> None:
        """The gradients of a step were finite."""
        self._halvings = 0
        self.clean += 1
        if self.clean >= INTERVAL:
            self.scale, self.clean = min(self.scale * 2, LARGEST), 0

    def lower(self) -> bool:
        """The gradients overflowed: half the scale. False where it cannot be lowered again."""
        if self.scale <= SMALLEST or self._halvings >= RETRIES:
            return False
        self._halvings += 1
        self.scale, self.clean = self.scale / 2, 0
        return True

    def give_up(self) -> None:
        """The scale was not to blame: it is again what it was before this step."""
        self.scale *= 2.0**self._halvings
        self._halvings = 0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "clean": self.clean}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale, self.clean = float(state["scale"]), int(state["clean"])
        self._halvings = 0
