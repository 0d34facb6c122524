"""What lies in a device's memory, and how much of it a process can use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from launcher.hardware import Kind

MIB = 2**20
#: MiB that the driver shows as the memory of a card (nvidia-smi, ECC on as clouds have it).
_SHOWN = {
    "L4": 23034,
    "A100-40GB": 40960,
    "A100-80GB": 81920,
    "H100": 81559,
    "H100-MEGA": 81559,
    "H100-NVL": 95830,
    "H200": 143771,
    "B200": 183359,
    "RTX4090": 24564,
    "RTX5090": 32607,
    "T4": 15360,
    "V100": 16384,
}
#: The driver keeps some of that for itself: of a card of 40,960 MiB torch sees 39.4 to 39.6 GiB
#: as `total_memory`, of 23,034 MiB 22.0 to 22.2, of 15,360 MiB 14.6 to 14.7.
_OF_SHOWN = 0.98
#: Bytes of a CUDA context with its kernels and cuBLAS's workspace: assumed, not measured here.
#: Cards of several generations show 0.4 to 0.6 GB for a process that has run a matrix product.
CONTEXT = 0.6e9
#: What NCCL adds for its channels' buffers: assumed, not measured here.
COMMUNICATION = 0.5e9
#: The part of what comes and goes that the caching allocator holds in pieces nobody can use:
#: assumed, not measured here.
SLACK = 0.05


@dataclass(frozen=True)
class Part:
    """One thing in the device's memory at its peak; `how`: the arithmetic in words. `outside`:
    torch's allocator does not count it as allocated."""

    name: str
    bytes: float
    how: str
    outside: bool = False


@dataclass(frozen=True)
class Memory:
    """One device at its peak, during `moment`. `limit`: bytes of it that a process can use; None:
    not known (a CPU). `notes`: what the numbers leave open, a line each."""

    parts: tuple[Part, ...]
    limit: Optional[float]
    moment: str = ""
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def allocated(self) -> float:
        """What torch's allocator counts of it (`max_memory_allocated`)."""
        return sum(part.bytes for part in self.parts if not part.outside)

    @property
    def margin(self) -> Optional[float]:
        """Bytes that are left of the limit; negative: so many are missing."""
        return None if self.limit is None else self.limit - self.bytes

    @property
    def fits(self) -> Optional[bool]:
        return None if self.limit is None else self.bytes <= self.limit


def usable(kind: Kind) -> Optional[float]:
    """Bytes of one chip that a process can use, its own CUDA context included; None: not known."""
    if kind.vendor != "nvidia":
        return None
    shown = _SHOWN.get(kind.name, kind.memory_gib * 1e9 / MIB)  # the lower reading of its "GB"
    return shown * MIB * _OF_SHOWN


def count(number: float) -> str:
    """`8.03 G`, `41.9 M`, `2,048`."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"
