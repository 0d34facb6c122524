"""Time and peak memory of the chunked losses, forward and backward, against their peers.

    python benchmarks/losses.py           a CPU: against the textbook (all logits at once), fp32
    python benchmarks/losses.py           with CUDA: bf16, against the textbook and Liger
    python benchmarks/losses.py --tiny    in seconds: that it runs, not how fast

The ways take turns in this process, and their medians are compared. Time is the wall clock's: on a
CPU measure on a quiet machine; beside it stands what the process spent on its cores, which other
processes change little. Memory there is the highest resident set (VmHWM) less what was resident
before the call, so it includes the gradients. With CUDA there
are 20 turns after three warm-ups, time is measured by events and memory is the allocator's peak
less what was allocated before the call. Liger's chunked distillation loss runs with beta = 0 and
compiled; where it cannot be imported it is reported absent, and nothing is compared with it.

`--check` exits 1 over a limit. On a CPU, against the textbook: at hidden 256 0.75 of the time and
an eighth of the memory, at hidden 1,024 0.95 and a sixth, at another shape 1.0 and a sixth. With
CUDA, for distillation: 0.7 of Liger's time and a third of its memory where the student is smaller
than the teacher; 55 ms for a student of 4,096 at the default shape, on an H200. A limit that cannot
be checked here is named.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

REPOSITORY = Path(__file__).resolve().parents[1]
TITLES = {
    "kd": "distillation (KL + CE, T = 2)",
    "ce": "cross-entropy",
    "topk": "distillation from 20 stored tokens",
}
NAMES = ("tokens", "vocab", "student", "teacher")
#: Shapes in the order of NAMES.
CPU_SHAPES = [(4096, 65536, 256, 256), (4096, 65536, 1024, 1024)]
CUDA_SHAPES = [(8192, 128256, 2048, 4096), (8192, 128256, 4096, 4096)]
TINY = (64, 2048, 16, 16)
#: Ratios of time and memory on a CPU: student size of the default shapes -> limits.
CPU_LIMITS = {256: (0.75, 1 / 8), 1024: (0.95, 1 / 6)}
OTHER_LIMITS, LIGER_LIMITS = (1.0, 1 / 6), (0.7, 1 / 3)
H200_SECONDS = 0.055
WARMUPS = 3

Shape = tuple[int, ...]
Row = dict[str, Any]
Samples = dict[str, list[dict[str, float]]]


def main() -> int:
    options = parse_options()
    sys.path.insert(0, str(REPOSITORY))
    on_cuda = options.device == "cuda" or (options.device == "auto" and has_cuda())
    shapes = shapes_of(options, CUDA_SHAPES if on_cuda else CPU_SHAPES)
    absent = [] if not on_cuda or liger() is not None else ["liger"]
    rows = [
        compare(op, shape, options.rounds or (20 if on_cuda else 3), on_cuda)
        for shape in shapes
        for op in options.ops
    ]
    if options.json:
        print(json.dumps({"v": 3, "device": device_name(on_cuda), "absent": absent, "rows": rows}))
    else:
        print_table(rows, device_name(on_cuda), absent)
    return 1 if options.check and not within_limits(rows, device_name(on_cuda), on_cuda) else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, what in (
        ("tokens", "rows of hidden states"),
        ("vocab", "entries of both vocabularies"),
        ("student", "hidden size of the student"),
        ("teacher", "hidden size of the teacher"),
        ("rounds", "measurements of each"),
    ):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=what)
    parser.add_argument("--ops", nargs="+", choices=tuple(TITLES), default=list(TITLES))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="one small shape, one round")
    parser.add_argument("--json", action="store_true", help="print facts, not a table")
    parser.add_argument("--check", action="store_true", help="exit 1 over a limit")
    options = parser.parse_args()
    if options.check and options.tiny:
        parser.error("--check needs a real shape: --tiny is too small to be fast")
    if options.device == "cuda" and not has_cuda():
        parser.error("--device cuda: torch finds no CUDA device here")
    if options.tiny:
        options.rounds = options.rounds or 1
    return options


def shapes_of(options: argparse.Namespace, defaults: list[Shape]) -> list[Shape]:
    given = [getattr(options, name) for name in NAMES]
    if any(given):
        return [tuple(mine or default for mine, default in zip(given, defaults[0]))]
    return [TINY] if options.tiny else defaults


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number greater than 0")
    return int(text)


def has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def device_name(on_cuda: bool) -> str:
    import torch

    if on_cuda:
        return f"{torch.cuda.get_device_name()}, bf16, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, fp32, torch {torch.__version__}"


def liger() -> Any:
    """Liger's loss as a class, or None."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return None
    return LigerFusedLinearJSDLoss


def compare(op: str, shape: Shape, rounds: int, on_cuda: bool) -> Row:
    device = "cuda" if on_cuda else "cpu"
    ways = ["textbook", "chunked", *(["liger"] if on_cuda and op == "kd" and liger() else [])]
    samples: Samples = {way: [] for way in ways}
    computations = {way: computation(op, way, shape, device) for way in ways}
    take = measure_on_cuda if on_cuda else measure_on_cpu
    for turn in range((WARMUPS if on_cuda else 0) + rounds):
        for way, compute in computations.items():
            sample = take(compute)
            if turn >= WARMUPS or not on_cuda:
                samples[way].append(sample)
    # The textbook's logits and sums are bf16 with CUDA, which is good for two digits.
    return row_of(op, shape, samples, ways, tolerance=2e-2 if on_cuda else 1e-4)


def measure_on_cpu(compute: Callable[[], Any]) -> dict[str, float]:
    """Seconds of all cores, peak MiB and loss of one forward and backward pass."""
    ctypes.CDLL(None).malloc_trim(0)  # what the last one freed is not resident now
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set starts again from here
    start, wall = time.process_time(), time.perf_counter()
    value = compute()
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    peak = (resident("VmHWM") - before) / 1024
    return {"seconds": seconds, "wall_seconds": wall, "peak_mib": peak, "loss": float(value)}


def resident(field: str) -> int:
    """KiB of `VmRSS` (resident now) or `VmHWM` (highest so far) of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit("benchmarks/losses.py reads memory from /proc: it runs on Linux only")
    return next(
        int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)
    )


def measure_on_cuda(compute: Callable[[], Any]) -> dict[str, float]:
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    value = compute()
    end.record()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    seconds = start.elapsed_time(end) / 1000
    return {"seconds": seconds, "wall_seconds": seconds, "peak_mib": peak, "loss": float(value)}


def computation(op: str, way: str, shape: Shape, device: str) -> Callable[[], Any]:
    """Makes random inputs; returns what computes their loss, and gradients that it drops again."""
    import torch

    from trainer.losses import linear, reference

    tokens, vocab, student, teacher = shape
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": device}
    kind["dtype"] = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(tokens, student, **kind).requires_grad_()
    head = (torch.randn(vocab, student, **kind) / student**0.5).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=device)

    def both_ways(loss: Callable[[], Any]) -> Callable[[], Any]:
        def compute() -> Any:
            value = loss()
            value.backward()
            hidden.grad = head.grad = None
            return value.detach()

        return compute

    if op == "ce":
        if way == "textbook":
            return both_ways(lambda: reference.cross_entropy(hidden, head, labels))
        ids, w = labels.unsqueeze(1), torch.ones(tokens, 1, device=device)
        return both_ways(lambda: linear.sparse_target(hidden, head, ids, w).loss)
    if op == "topk":
        k = min(20, vocab)
        ids = (labels.unsqueeze(1) + torch.arange(k, device=device)) % vocab
        p = torch.full((tokens, k), 0.9 / k, device=device)
        ghost = torch.full((tokens,), 0.1, device=device)
        target = linear.sparse_target if way == "chunked" else reference.sparse_target
        options: dict[str, Any] = {"ghost": ghost, "temperature": 2.0}
        return both_ways(lambda: target(hidden, head, ids, p, **options).loss)
    teacher_hidden = torch.randn(tokens, teacher, **kind)
    teacher_head = torch.randn(vocab, teacher, **kind) / teacher**0.5
    if way == "liger":  # a mean over tokens
        module = liger()(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0, temperature=2.0)
        return both_ways(
            lambda: module(hidden, head, teacher_hidden, teacher_head, labels, None, None) * tokens
        )
    dense_kl = linear.dense_kl if way == "chunked" else reference.dense_kl
    inputs = hidden, head, teacher_hidden, teacher_head, labels
    return both_ways(lambda: dense_kl(*inputs, temperature=2.0, ce_weight=0.5, kl_weight=0.5).loss)


def row_of(op: str, shape: Shape, samples: Samples, ways: list[str], tolerance: float) -> Row:
    """Medians of each way, and the ratios of the chunked one to the peer. The losses of
    chunked and textbook may differ by `tolerance`; Liger's has a scale of its own."""
    against = "liger" if "liger" in ways else "textbook"
    row: Row = {"op": op, "shape": dict(zip(NAMES, shape)), "against": against, "ways": {}}
    for way, taken in samples.items():
        row["ways"][way] = {
            key: statistics.median(sample[key] for sample in taken) for key in taken[0]
        }
        row["ways"][way]["all_seconds"] = [round(sample["seconds"], 4) for sample in taken]
    chunked, textbook = row["ways"]["chunked"], row["ways"]["textbook"]
    if abs(chunked["loss"] - textbook["loss"]) > tolerance * abs(textbook["loss"]):
        raise SystemExit(f"{op}: textbook and chunked do not compute the same loss: {row['ways']}")
    keys = (("time_ratio", "wall_seconds"), ("cpu_ratio", "seconds"), ("memory_ratio", "peak_mib"))
    for ratio, key in keys:
        row[ratio] = chunked[key] / row["ways"][against][key]
    return row


def print_table(rows: list[Row], device: str, absent: list[str]) -> None:
    print(device)
    for name in absent:
        print(f"{name}: absent (it cannot be imported), so there is no comparison with it")
    for row in rows:
        shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
        print(f"\n{TITLES[row['op']]}: {shape}; median of {count_of(row)}")
        for way, facts in row["ways"].items():
            wall, seconds = facts["wall_seconds"] * 1e3, facts["seconds"] * 1e3
            cpu = f" ({seconds:>8.1f} of CPU)" if wall != seconds else ""
            line = f"  {way:<9} {wall:>9.1f} ms{cpu} {facts['peak_mib']:>6.0f} MiB"
            print(f"{line}   loss {facts['loss']:.6g}")
        time_ratio, memory_ratio = row["time_ratio"], row["memory_ratio"]
        verdict = f"  {time_ratio:.2f} of the time and 1/{1 / memory_ratio:.1f} of the memory"
        cpu = f" ({row['cpu_ratio']:.2f} of the CPU time)" if row["cpu_ratio"] != time_ratio else ""
        print(f"{verdict} of {row['against']}{cpu}")


def count_of(row: Row) -> int:
    return len(row["ways"]["chunked"]["all_seconds"])


def within_limits(rows: list[Row], device: str, on_cuda: bool) -> bool:
    """Prints each limit of these rows that is broken, or cannot be checked on this device."""
    found = [
        line for row in rows for line in (cuda_problems(row, device) if on_cuda else problems(row))
    ]
    for line in found:
        print(line, file=sys.stderr)
    return all(line.startswith("not checked") for line in found)


def problems(row: Row, limits: Optional[tuple[float, float]] = None) -> list[str]:
    """What is over `limits` of time and memory; without them over those of a CPU."""
    shape = tuple(row["shape"].values())
    if limits is None:
        limits = CPU_LIMITS[shape[2]] if shape in CPU_SHAPES else OTHER_LIMITS
    return [
        f"{row['op']}, student {shape[2]}: {name} ratio {row[f'{name}_ratio']:.3f} to "
        f"{row['against']}; the limit is {limit:.3f}"
        for name, limit in zip(("time", "memory"), limits)
        if row[f"{name}_ratio"] > limit
    ]


def cuda_problems(row: Row, device: str) -> list[str]:
    shape = tuple(row["shape"].values())
    if row["op"] != "kd":
        return []
    if shape[2] < shape[3] and row["against"] != "liger":
        return [f"not checked: student {shape[2]} against Liger, which is absent"]
    if shape[2] < shape[3]:
        return problems(row, LIGER_LIMITS)
    if shape != CUDA_SHAPES[1]:
        return []
    if "H200" not in device:
        return [f"not checked: {H200_SECONDS * 1e3:.0f} ms at student 4096, a limit of an H200"]
    seconds = row["ways"]["chunked"]["seconds"]
    over = f"kd, student 4096: {seconds * 1e3:.1f} ms; the limit is {H200_SECONDS * 1e3:.0f} ms"
    return [over] if seconds > H200_SECONDS else []


if __name__ == "__main__":
    sys.exit(main())
