"""Packing a million documents of mixed length: padding and speed.

    python benchmarks/packing.py [--count N] [--sequence-length S] [--check]

Compared with what needs no search: one document per row, and documents in their order, a new row
where the next one does not fit. `--check` exits with 1 where packing leaves more than 2% padding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trainer.data.pack import pack

LIMIT = 0.02
Lengths = NDArray[np.int64]


def main() -> int:
    parser = argparse.ArgumentParser(description="Padding and speed of packing.")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--check", action="store_true", help="fail above 2%% padding")
    options = parser.parse_args()
    sets = mixed_sets(options.count, options.sequence_length)
    print(f"{options.count:,} documents, rows of {options.sequence_length} tokens")
    print(f"{'lengths':<12}{'method':<22}{'rows':>10}{'padding':>10}{'documents/s':>14}")
    worst = 0.0
    for name, lengths in sets.items():
        methods: dict[str, Callable[[], int]] = {
            "one per row": lambda n=lengths: len(n),
            "in order": lambda n=lengths: in_order(n, options.sequence_length),
            "best fit decreasing": lambda n=lengths: len(pack(n, options.sequence_length)),
        }
        for method, run in methods.items():
            rows, seconds = measure(run)
            padding = 1 - int(lengths.sum()) / (rows * options.sequence_length)
            speed = f"{len(lengths) / seconds:,.0f}" if method != "one per row" else "-"
            print(f"{name:<12}{method:<22}{rows:>10,}{padding:>10.4%}{speed:>14}")
        worst = max(worst, padding)
    if options.check and worst > LIMIT:
        print(f"FAILED: {worst:.2%} padding, at most {LIMIT:.0%} allowed")
        return 1
    return 0


def mixed_sets(count: int, sequence_length: int) -> dict[str, Lengths]:
    """Token counts as web text has them (log-normal), evenly spread, and mostly short chats with
    some documents cut at the length of a row."""
    random = np.random.default_rng(0)
    web = random.lognormal(np.log(sequence_length) - 2.0, 1.2, count)
    chats = random.lognormal(np.log(sequence_length) - 3.5, 0.7, count)
    chats[random.random(count) < 0.1] = sequence_length
    sets = {"web": web, "even": random.uniform(1, sequence_length, count), "chats": chats}
    return {n: np.clip(x, 2, sequence_length).astype(np.int64) for n, x in sets.items()}


def measure(run: Callable[[], int]) -> tuple[int, float]:
    """The result of `run`, and the median of three times."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        rows = run()
        seconds.append(time.perf_counter() - started)
    return rows, statistics.median(seconds)


def in_order(lengths: Lengths, sequence_length: int) -> int:
    """Rows that documents need in their order, none cut (next fit)."""
    rows, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            rows, room = rows + 1, sequence_length
        room -= length
    return rows


if __name__ == "__main__":
    sys.exit(main())
