"""How long an atomic, verified checkpoint of 50 MB takes, beside a plain `torch.save` with fsync.

    python benchmarks/checkpoint.py [--folder DIR] [--check]

The state is that of a small training: 16 weights and the two AdamW moments of each, 48 tensors of
fp32. The two ways alternate. `--check` fails when the median of 7 saves is above 0.25 s.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trainer.checkpoint import Checkpoints, load_state
from trainer.manifest import verify
from trainer.store import fsync

TENSORS, MEGABYTES, LIMIT_SECONDS, REPEATS = 48, 50.0, 0.25, 7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--check", action="store_true", help=f"fail above {LIMIT_SECONDS} s")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        return measure(work, arguments.check)
    finally:
        shutil.rmtree(work)


def measure(work: Path, check: bool) -> int:
    """Print a table; 1 when `check` and the median is above the limit, else 0."""
    each = int(MEGABYTES * 1e6 / 4 / TENSORS)
    weights = {f"weight.{i}": torch.randn(each) for i in range(TENSORS // 3)}
    moments = {
        i: {"exp_avg": torch.randn(each), "exp_avg_sq": torch.rand(each)}
        for i in range(TENSORS // 3)
    }
    state = {"optimizer": moments, "step": 1}
    checkpoints = Checkpoints(work / "checkpoints", keep=2)

    def write_model(folder: Path) -> None:
        save_file(weights, folder / "model.safetensors")

    ours, plain, loads = [], [], []
    for step in range(REPEATS + 1):  # the first one warms up
        ours.append(seconds(lambda step=step: checkpoints.save(step, write_model, state)))
        plain.append(seconds(lambda: torch_save(weights, state, work / "plain.pt")))
        newest = checkpoints.newest()
        assert newest is not None
        loads.append(seconds(lambda path=newest: (verify(path), load_state(path))))
    print(f"{MEGABYTES:.0f} MB in {TENSORS} tensors on {work}, median of {REPEATS} (min-max)")
    median = report("atomic, verified save", ours[1:])
    report("torch.save + fsync", plain[1:])
    report("verify + load the state", loads[1:])
    if check and median > LIMIT_SECONDS:
        print(f"FAILED: {median:.3f} s is above {LIMIT_SECONDS} s")
        return 1
    return 0


def torch_save(weights: dict[str, Any], state: dict[str, Any], path: Path) -> None:
    torch.save({"model": weights, **state}, path)
    fsync(path)


def seconds(work: Any) -> float:
    os.sync()  # what was written before must not be paid for here
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def report(name: str, times: list[float]) -> float:
    median = statistics.median(times)
    spread = f"({min(times) * 1e3:.0f}-{max(times) * 1e3:.0f})"
    print(f"{name:26}{median * 1e3:6.0f} ms {spread:12}{MEGABYTES / median:6.0f} MB/s")
    return median


if __name__ == "__main__":
    sys.exit(main())
