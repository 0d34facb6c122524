"""What a checkpoint costs: how long it takes to write, and how long training waits for it.

    python benchmarks/checkpoint.py [--folder DIR] [--check]

First an atomic, verified checkpoint of 50 MB beside a plain `torch.save` with fsync: 16 weights and
the two AdamW moments of each, 48 tensors of fp32. Then the stall of `train.save_async`, on and off,
with the same state: how long a save at a step's end keeps the loop, and what the write then does to
a small step (one product of matrices). The ways alternate. `--check` fails when the median of 7
saves is above 0.25 s, or the stall of a save beside the loop above half of that of one that waits.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint import Checkpoints, load_state
from trainer.manifest import verify
from trainer.runtime import Runtime
from trainer.saver import Saver
from trainer.store import fsync

TENSORS, MEGABYTES, LIMIT_SECONDS, REPEATS = 48, 50.0, 0.25, 7
#: The largest stall of a save beside the loop, as a share of that of one that waits.
LIMIT_STALL = 0.5


class Files:
    """A model of a few tensors, as a `Saver` sees it."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def tensors(self) -> dict[str, Tensor]:
        return self._weights

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / "model.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    limits = f"fail above {LIMIT_SECONDS} s, or {LIMIT_STALL} of the stall"
    parser.add_argument("--check", action="store_true", help=limits)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    weights, state = content()
    try:
        median = writes(work, weights, state)
        share = stalls(work, weights, state)
    finally:
        shutil.rmtree(work)
    wrong = []
    if median > LIMIT_SECONDS:
        wrong.append(f"{median:.3f} s is above {LIMIT_SECONDS} s")
    if share > LIMIT_STALL:
        wrong.append(f"a stall of {share:.2f} is above {LIMIT_STALL}")
    if arguments.check and wrong:
        print(f"FAILED: {'; '.join(wrong)}")
        return 1
    return 0


def content() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, and the state with their moments."""
    each = int(MEGABYTES * 1e6 / 4 / TENSORS)
    weights = {f"weight.{i}": torch.randn(each) for i in range(TENSORS // 3)}
    moments = {
        i: {"exp_avg": torch.randn(each), "exp_avg_sq": torch.rand(each)}
        for i in range(TENSORS // 3)
    }
    return weights, {"optimizer": moments, "step": 1}


def writes(work: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> float:
    """Print how long a save takes beside others; the median in seconds."""
    checkpoints, files = Checkpoints(work / "checkpoints", keep=2), Files(weights)

    def write_model(folder: Path) -> None:
        files.write(folder, weights)

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
    return median


def stalls(work: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> float:
    """Print how long a save keeps the loop; that of `save_async` as a share of one that waits."""
    process = Runtime(torch.device("cpu"), "fp32")
    ways = {
        way: Saver(Checkpoints(work / name, keep=2), Files(weights), process, None, background=way)
        for way, name in ((True, "beside"), (False, "waits"))
    }
    operand = torch.randn(256, 256)
    stall: dict[bool, list[float]] = {True: [], False: []}
    pace: dict[bool, list[float]] = {True: [], False: []}
    passed: list[int] = []
    longest: list[float] = []
    for step in range(REPEATS + 1):
        for way, saver in ways.items():
            os.sync()
            stall[way].append(timed(lambda s=saver, n=step: s.save(n, dict(state))))
            steps = [timed(lambda: operand @ operand) for _ in range(20)]
            while not saver.news:
                steps.append(timed(lambda: operand @ operand))
            saver.news.clear()
            saver.wait()
            pace[way].append(statistics.median(steps))
            if way:
                passed.append(len(steps))
                longest.append(max(steps))
    beside = report("stall, save_async", stall[True][1:])
    waits = report("stall, a save that waits", stall[False][1:])
    slower = statistics.median(pace[True][1:]) / statistics.median(pace[False][1:])
    print(
        f"share {beside / waits:.2f}; {statistics.median(passed[1:]):.0f} small steps pass during"
        f" the write, each {slower:.2f} times as long, the longest {max(longest) * 1e3:.0f} ms"
    )
    return beside / waits


def torch_save(weights: dict[str, Any], state: dict[str, Any], path: Path) -> None:
    torch.save({"model": weights, **state}, path)
    fsync(path)


def seconds(work: Callable[[], Any]) -> float:
    os.sync()  # what was written before must not be paid for here
    return timed(work)


def timed(work: Callable[[], Any]) -> float:
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
