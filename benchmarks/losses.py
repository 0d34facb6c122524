"""Time and peak memory of the chunked losses against the textbook ones (all logits at once), fp32,
forward and backward, on this CPU.

    python benchmarks/losses.py [--tokens 4096 --vocab 65536 --student 512 --teacher 1024]

Every measurement is a process of its own; textbook and chunked take turns, and the medians are
compared. Memory is the highest resident set (VmHWM) less what was resident before the call, so it
includes the gradients. `--check` exits 1 when distillation is slower than the textbook, or takes
more than a sixth of its memory: a budget for the default shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
WAYS = ("textbook", "chunked")
TITLES = {"kd": "distillation (KL + CE, T = 2)", "ce": "cross-entropy"}
TIME_BUDGET, MEMORY_BUDGET = 1.0, 1 / 6


def main() -> int:
    options = parse_options()
    if options.measure:
        print(json.dumps(measure(options.ops[0], options.measure, options)))
        return 0
    rows = [compare(op, options) for op in options.ops]
    if options.json:
        print(json.dumps({"v": 1, "shape": shape_of(options), "rows": rows}))
    else:
        print_table(rows, options)
    return 1 if options.check and not within_budget(rows) else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, default, what in (
        ("tokens", 4096, "rows of hidden states"),
        ("vocab", 65536, "entries of both vocabularies"),
        ("student", 512, "hidden size of the student"),
        ("teacher", 1024, "hidden size of the teacher"),
        ("rounds", 3, "measurements of each"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=what)
    parser.add_argument("--ops", nargs="+", choices=("kd", "ce"), default=["kd", "ce"])
    parser.add_argument("--json", action="store_true", help="print facts, not a table")
    parser.add_argument("--check", action="store_true", help="exit 1 over the budget of kd")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check and "kd" not in options.ops:
        parser.error("--check needs kd among --ops")
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number greater than 0")
    return int(text)


def compare(op: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the medians of both ways over `rounds` turns, and their ratios."""
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            samples[way].append(in_process(op, way, options))
    losses = [sample["loss"] for way in WAYS for sample in samples[way]]
    if max(losses) - min(losses) > 1e-4 * abs(losses[0]):
        raise SystemExit(f"{op}: textbook and chunked do not compute the same loss: {losses}")
    row: dict[str, Any] = {"op": op}
    for way in WAYS:
        row[way] = {
            key: statistics.median(sample[key] for sample in samples[way])
            for key in ("seconds", "peak_mib")
        }
        row[way]["all_seconds"] = [round(sample["seconds"], 3) for sample in samples[way]]
    for ratio, key in (("time_ratio", "seconds"), ("memory_ratio", "peak_mib")):
        row[ratio] = row["chunked"][key] / row["textbook"][key]
    return row


def in_process(op: str, way: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", way, "--ops", op]
    for name, value in shape_of(options).items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{op} {way}: exit code {done.returncode}\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def shape_of(options: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(options, name) for name in ("tokens", "vocab", "student", "teacher")}


def measure(op: str, way: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds, peak MiB and loss of one forward and backward pass, in this process."""
    sys.path.insert(0, str(REPOSITORY))
    loss = loss_of(op, way)
    loss(tokens=16, vocab=64, student=16, teacher=16)().backward()  # starts the thread pool
    compute = loss(**shape_of(options))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set starts again from here
    start = time.perf_counter()
    value = compute()
    value.backward()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_mib": (resident("VmHWM") - before) / 1024,
        "loss": float(value),
    }


def loss_of(op: str, way: str) -> Callable[..., Callable[[], Any]]:
    """A function of the shape that makes the inputs and returns the computation."""
    import torch

    from trainer.losses import linear, reference

    def prepare(tokens: int, vocab: int, student: int, teacher: int) -> Callable[[], Any]:
        torch.manual_seed(0)
        hidden = torch.randn(tokens, student, requires_grad=True)
        head = (torch.randn(vocab, student) / student**0.5).requires_grad_()
        labels = torch.randint(vocab, (tokens,))
        if op == "ce":
            if way == "textbook":
                return lambda: reference.cross_entropy(hidden, head, labels)
            ids, w = labels.unsqueeze(1), torch.ones(tokens, 1)
            return lambda: linear.sparse_target(hidden, head, ids, w).loss
        teacher_hidden = torch.randn(tokens, teacher)
        teacher_head = torch.randn(vocab, teacher) / teacher**0.5
        dense_kl = linear.dense_kl if way == "chunked" else reference.dense_kl
        inputs = hidden, head, teacher_hidden, teacher_head, labels
        return lambda: dense_kl(*inputs, temperature=2.0, ce_weight=0.5, kl_weight=0.5).loss

    return prepare


def resident(field: str) -> int:
    """KiB of `VmRSS` (resident now) or `VmHWM` (highest so far) of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit("benchmarks/losses.py reads memory from /proc: it runs on Linux only")
    return next(
        int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)
    )


def print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    shape = ", ".join(f"{name} {value}" for name, value in shape_of(options).items())
    print(f"{shape}; fp32, median of {options.rounds}\n")
    header = ("", "textbook", "chunked", "time", "textbook", "chunked", "memory")
    print("{:<30} {:>10} {:>10} {:>6} {:>12} {:>12} {:>7}".format(*header))
    for row in rows:
        old, new = row["textbook"], row["chunked"]
        print(
            f"{TITLES[row['op']]:<30} {old['seconds']:>8.2f} s {new['seconds']:>8.2f} s "
            f"{row['time_ratio']:>6.2f} {old['peak_mib']:>8.0f} MiB {new['peak_mib']:>8.0f} MiB "
            f"{'1/' + format(1 / row['memory_ratio'], '.1f'):>7}"
        )


def within_budget(rows: list[dict[str, Any]]) -> bool:
    row = next(row for row in rows if row["op"] == "kd")
    problems = [
        f"{name} ratio of distillation is {row[name + '_ratio']:.3f}; the budget is {budget:.3f}"
        for name, budget in (("time", TIME_BUDGET), ("memory", MEMORY_BUDGET))
        if row[name + "_ratio"] > budget
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return not problems


if __name__ == "__main__":
    sys.exit(main())
