"""Accelerators: memory, peak speed, how machines group them, and dated prices.

The facts of the hardware stand here; every price stands in data/prices.csv with its source and
date, and a price that is not there is unknown, never guessed.
"""

from __future__ import annotations

import csv
import functools
import re
from dataclasses import dataclass
from importlib import resources
from typing import Literal, Optional

from trainer.config import nearest


@dataclass(frozen=True)
class Kind:
    """One accelerator model. `memory_gib`, `bf16_tflops` (dense) and `memory_gbs` (GB/s) are per
    chip, from the makers' data sheets; 0 where it has no meaning (cpu), or is not used yet."""

    name: str
    vendor: Literal["cpu", "nvidia", "tpu"]
    memory_gib: float = 0
    bf16_tflops: float = 0
    aliases: tuple[str, ...] = ()
    capability: float = 0  # NVIDIA's compute capability
    cores_in_name: bool = False  # TPU: `v4-32` counts TensorCores, two a chip; `v6e-8` chips
    memory_gbs: float = 0  # of NVIDIA's: the form factor that clouds have (SXM but for L4, T4, NVL)


KINDS = (
    Kind("cpu", "cpu"),
    Kind("L4", "nvidia", 24, 121, capability=8.9, memory_gbs=300),
    Kind("A100-40GB", "nvidia", 40, 312, ("A100", "A100-SXM4-40GB"), 8.0, memory_gbs=1555),
    Kind(
        "A100-80GB", "nvidia", 80, 312, ("A100-SXM4-80GB", "A100-PCIE-80GB"), 8.0, memory_gbs=2039
    ),
    Kind("H100", "nvidia", 80, 989, ("H100-80GB", "H100-SXM"), 9.0, memory_gbs=3350),
    Kind("H100-MEGA", "nvidia", 80, 989, ("H100-MEGA-80GB",), 9.0, memory_gbs=3350),
    Kind("H100-NVL", "nvidia", 94, 835, capability=9.0, memory_gbs=3900),
    Kind("H200", "nvidia", 141, 989, ("H200-141GB",), 9.0, memory_gbs=4800),
    Kind("B200", "nvidia", 180, 2250, ("B200-180GB",), 10.0, memory_gbs=8000),
    Kind("RTX4090", "nvidia", 24, 165, ("RTX_4090", "RTX-4090"), 8.9, memory_gbs=1008),
    Kind("RTX5090", "nvidia", 32, 209.5, ("RTX_5090", "RTX-5090"), 12.0, memory_gbs=1792),
    # No bf16 on the matrix units of these two.
    Kind("T4", "nvidia", 16, aliases=("TESLA-T4",), capability=7.5, memory_gbs=320),
    Kind("V100", "nvidia", 16, aliases=("V100-16GB", "TESLA-V100"), capability=7.0, memory_gbs=900),
    Kind("v2", "tpu", 16, 45, cores_in_name=True),
    Kind("v3", "tpu", 32, 123, cores_in_name=True),
    Kind("v4", "tpu", 32, 275, cores_in_name=True),
    Kind("v5p", "tpu", 95, 459, cores_in_name=True),
    Kind("v5litepod", "tpu", 16, 197, ("v5e",)),
    Kind("v6e", "tpu", 32, 918),
)

#: Machine types by cloud, accelerator and count of one machine.
MACHINES: dict[str, dict[tuple[str, int], str]] = {
    "gcp": {
        ("L4", 1): "g2-standard-8",
        ("L4", 2): "g2-standard-24",
        ("L4", 4): "g2-standard-48",
        ("L4", 8): "g2-standard-96",
        **{("A100-40GB", n): f"a2-highgpu-{n}g" for n in (1, 2, 4, 8)},
        ("A100-40GB", 16): "a2-megagpu-16g",
        **{("A100-80GB", n): f"a2-ultragpu-{n}g" for n in (1, 2, 4, 8)},
        **{("H100", n): f"a3-highgpu-{n}g" for n in (1, 2, 4, 8)},
        ("H100-MEGA", 8): "a3-megagpu-8g",
        ("H200", 8): "a3-ultragpu-8g",
        ("B200", 8): "a4-highgpu-8g",
    }
}


@dataclass(frozen=True)
class Accelerator:
    """`count` chips of one kind on a node (a TPU slice: of the slice)."""

    kind: Kind
    count: int

    @property
    def memory_gib(self) -> float:
        return self.kind.memory_gib * self.count

    def __str__(self) -> str:
        if self.kind.vendor == "tpu":
            return f"{self.kind.name}-{self.count * (2 if self.kind.cores_in_name else 1)}"
        return f"{self.kind.name}:{self.count}"


@dataclass(frozen=True)
class Price:
    """What one machine costs an hour, in US dollars; None: unknown."""

    cloud: str
    machine: str
    region: str
    on_demand: Optional[float]
    spot: Optional[float]
    source: str
    snapshot: str
    note: str


def parse(text: str) -> Accelerator:
    """`L4:1`, `H100` (one), `cpu:2`, `v4-32` as an accelerator; letter case does not matter.
    Errors: `ValueError`, one line with the nearest name."""
    match = re.fullmatch(r"([^:]+)(?::([1-9][0-9]{0,5}))?", text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not an accelerator; write KIND:COUNT, such as L4:1 or cpu:2")
    name, count = match[1], match[2]
    kind = _by_name().get(name.lower())
    if kind is not None and kind.vendor != "tpu":
        return Accelerator(kind, int(count or 1))
    return _parse_slice(text, name, count, kind)


def prices(accelerator: Accelerator, cloud: str) -> tuple[Price, ...]:
    """Every price of exactly this accelerator and count in `cloud`; empty: unknown. Prices of
    other counts are never scaled, since the machine around the chips differs."""
    return tuple(price for held, price in _prices() if held == accelerator and price.cloud == cloud)


def priced(cloud: str) -> tuple[tuple[Accelerator, tuple[str, ...]], ...]:
    """Every accelerator and count that has a price in `cloud`, with the regions of its prices."""
    found: dict[Accelerator, dict[str, None]] = {}
    for held, price in _prices():
        if price.cloud == cloud:
            found.setdefault(held, {})[price.region] = None
    return tuple((held, tuple(regions)) for held, regions in found.items())


def machine(accelerator: Accelerator, cloud: str) -> Optional[str]:
    """The machine type of `cloud` that holds this accelerator, None when there is none."""
    return MACHINES.get(cloud, {}).get((accelerator.kind.name, accelerator.count))


def held_by(machine: str, cloud: str) -> tuple[tuple[str, int], ...]:
    """The (accelerator, count) that the table knows this machine type to carry; of a size that it
    does not list, those of the other sizes of the family, with count 0 (unknown). Empty: nothing is
    known about it."""
    known = MACHINES.get(cloud, {})
    exact = tuple(held for held, name in known.items() if name == machine)
    family = machine.rpartition("-")[0]
    relatives = [kind for (kind, _), name in known.items() if name.rpartition("-")[0] == family]
    return exact or tuple((kind, 0) for kind in dict.fromkeys(relatives))


def counts(kind: Kind, cloud: str) -> tuple[int, ...]:
    """How many of `kind` one machine of `cloud` can hold."""
    return tuple(count for name, count in MACHINES.get(cloud, {}) if name == kind.name)


def kinds(cloud: str) -> tuple[str, ...]:
    """Accelerators for which `cloud` has machines."""
    return tuple(dict.fromkeys(name for name, _ in MACHINES.get(cloud, {})))


def _parse_slice(text: str, name: str, count: Optional[str], kind: Optional[Kind]) -> Accelerator:
    generation, _, size = name.lower().rpartition("-")
    slice_kind = _by_name().get(generation)
    if slice_kind is not None and slice_kind.vendor == "tpu":
        cores = 2 if slice_kind.cores_in_name else 1
        if count is None and re.fullmatch(r"[1-9][0-9]{0,5}", size) and int(size) % cores == 0:
            return Accelerator(slice_kind, int(size) // cores)
        raise ValueError(f"'{text}' is not a TPU slice; write {slice_kind.name}-8 and no count")
    if kind is not None:
        raise ValueError(f"'{text}' is not a TPU slice; write its size, such as {kind.name}-8")
    raise ValueError(f"no accelerator '{name}'; {nearest(name, _spellings())}")


@functools.cache
def _by_name() -> dict[str, Kind]:
    return {name.lower(): kind for kind in KINDS for name in (kind.name, *kind.aliases)}


def _spellings() -> list[str]:
    return [f"{kind.name}-8" if kind.vendor == "tpu" else kind.name for kind in KINDS]


@functools.cache
def _prices() -> tuple[tuple[Accelerator, Price], ...]:
    """The rows of the table. A row whose on-demand price is below its spot price is a commitment
    price read by mistake (seen in public catalogs), and is left out."""
    text = resources.files("launcher").joinpath("data/prices.csv").read_text("utf-8")
    rows: list[tuple[Accelerator, Price]] = []
    for row in csv.DictReader(text.splitlines()):
        on_demand, spot = _dollars(row["on_demand_usd_h"]), _dollars(row["spot_usd_h"])
        if on_demand is not None and spot is not None and on_demand < spot:
            continue
        held = _of_row(row["accelerator"], int(row["count"]))
        place = (row["cloud"], row["machine_type"], row["region"])
        told = (row["price_source"], row["price_snapshot"], row["note"])
        rows.append((held, Price(*place, on_demand, spot, *told)))
    return tuple(rows)


def _of_row(name: str, count: int) -> Accelerator:
    kind = _by_name().get(name.lower())
    return Accelerator(kind, count) if kind is not None else parse(name)


def _dollars(text: str) -> Optional[float]:
    return float(text) if text else None
