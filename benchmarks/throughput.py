"""Tokens a second, utilisation and peak memory of whole training steps, against TRL and a textbook.

    python benchmarks/throughput.py            a GPU: the shape of Llama-3.2-1B, bf16
    python benchmarks/throughput.py            no GPU: as with --tiny, a toy, a minute of CPU time
    python benchmarks/throughput.py --only kd --json FILE
    python benchmarks/throughput.py --gpu      an H100: 1B and 3B in full, LoRA on 8B (10 minutes)
    python benchmarks/throughput.py --gpu --tiny      its cases on a toy, anywhere: that they run

Ours is a job run by the trainer's own stages and loop. All cases have the same model, texts, global
batch, optimizer and device; each runs in a process of its own, they take turns, and medians are
compared. The first half of the steps warms up. `sft`: texts of log-normal lengths. `kd` and
`kd-precompute`: texts that fill their rows, so padding plays no part, and the pure divergence at
T = 1, which is what TRL's trainer computes. Tokens are real ones: padding is never counted. On a
GPU seconds are those of the wall, without one those of the process: others' load is not counted.

Two gains are told apart: that of packing (ours packed against ours padded) and that of the loss
(ours against the textbook on the very same batches). A baseline that cannot be imported is
reported as absent, one that fails as failed; neither is compared with. A case of ours is absent
where the device or the installation lacks what it is about. `lora` trains adapters of rank 16 on
the texts of `sft`, `dpo` pairs that fill their rows, with the reference's log-probs computed
beforehand. Of torchtune there is only what it publishes (speed/gpu.py): its recipes take no random
weights.

Exits 1 where a case of ours fails or, at full size, is absent; with `--check` also where, at full
size, a budget is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
TASKS = ("sft", "lora", "dpo", "kd", "kd-precompute")
CASES = {
    "sft": ("ours packed", "ours padded", "textbook packed", "textbook padded", "trl packed",
            "trl packed liger", "ours compiled", "ours checkpointing", "ours selective",
            "ours selective compiled", "ours fsdp", "ours float8"),
    "lora": ("ours", "ours compiled", "trl"),
    "dpo": ("ours", "trl"),
    "kd": ("ours", "textbook", "trl"),
    "kd-precompute": ("ours",),
}  # fmt: skip
#: What is divided by what, and what that says.
RATIOS = (
    ("sft ours packed", "sft ours padded", "packing"),
    ("sft ours packed", "sft textbook packed", "the loss"),
    ("sft ours packed", "sft trl packed", "TRL with packing"),
    ("sft ours packed", "sft trl packed liger", "TRL with packing and Liger"),
    ("sft ours compiled", "sft ours packed", "compiled blocks"),
    ("sft ours checkpointing", "sft ours packed", "gradient checkpointing"),
    ("sft ours selective", "sft ours packed", "selective checkpointing"),
    ("sft ours selective", "sft ours checkpointing", "selective for whole checkpointing"),
    ("sft ours selective compiled", "sft ours selective", "compiled blocks"),
    ("sft ours fsdp", "sft ours packed", "FSDP2 with one worker"),
    ("sft ours float8", "sft ours compiled", "float8 for bf16, both compiled"),
    ("lora ours", "lora trl", "TRL with PEFT and packing"),
    ("lora ours compiled", "lora ours", "compiled blocks"),
    ("dpo ours", "dpo trl", "TRL"),
    ("kd ours", "kd textbook", "the loss"),
    ("kd ours", "kd trl", "TRL"),
    ("kd-precompute ours", "kd ours", "stored answers for a teacher's pass"),
)
#: (ours, baseline) -> the least ratio of real tokens a second, on a GPU at full size.
BUDGETS = {("sft ours packed", "sft trl packed liger"): 1.2, ("kd ours", "kd trl"): 1.5}
#: Dense bf16 TFLOP/s, from the data sheets; --peak-tflops for others.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0}

Results = dict[str, dict[str, Any]]


def main() -> int:
    options = parse_options()
    if options.case:
        return run_case(options)
    on_gpu = has_gpu()
    if options.gpu:
        if not (on_gpu or options.tiny):
            told = "torch sees no CUDA device here; --gpu --tiny runs its cases on a toy"
            print(f"--gpu: {told}", file=sys.stderr)
            return 1
        return on_an_h100(options)
    tiny = options.tiny or not on_gpu
    tasks = (options.only,) if options.only else TASKS
    names = [f"{task} {case}" for task in tasks for case in CASES[task]]
    report = reported(options, "tiny" if tiny else "full", names)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return verdict(report, check=options.check)


def on_an_h100(options: argparse.Namespace) -> int:
    """The cases of `speed/gpu.py`, one shape after the other."""
    sys.path.insert(0, str(REPOSITORY))
    from speed import gpu

    kind = " tiny" if options.tiny else ""
    chosen = {
        size: [case for case in cases if options.only in (None, case.split()[0])]
        for size, cases in gpu.CASES.items()
    }
    if not any(chosen.values()):
        print(f"--gpu has no case of {options.only}; leave out --only", file=sys.stderr)
        return 1
    reports = {
        size: reported(options, size + kind, cases) for size, cases in chosen.items() if cases
    }
    if options.json:
        Path(options.json).write_text(json.dumps(reports, indent=1) + "\n")
    code = max(verdict(report, check=False) for report in reports.values())
    if options.tiny:
        print("what is asked of an H100: not checked: --tiny")
        return code
    for line, met in gpu.verdicts(reports):
        print(line)
        code = max(code, int(options.check and met is False))
    return code


def reported(options: argparse.Namespace, size: str, names: Sequence[str]) -> dict[str, Any]:
    """The report of some cases of one size, which is also printed."""
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        results = measure(options, Path(work), size, names)
        device = json.loads((Path(work) / "device.json").read_text())
    tiny = is_tiny(size)
    report = {"v": 1, **device, "tiny": tiny, "results": results, "ratios": ratios(results)}
    for name, facts in results.items():
        if "real_per_sec" in facts:
            facts["mfu"] = utilisation(report, name, facts)
    print_report(report)
    return report


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a toy: that it runs, not how fast")
    parser.add_argument("--gpu", action="store_true", help="larger shapes; 10 minutes of an H100")
    parser.add_argument("--only", choices=TASKS, help="one task")
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of each case")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="of the GPU, dense bf16")
    parser.add_argument(
        "--folder", help="where the models lie while this runs: 5 GB for a GPU, 17 with --gpu"
    )
    parser.add_argument("--json", metavar="FILE", help="write the facts there, too")
    parser.add_argument("--check", action="store_true", help="exit 1 below a budget")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def is_tiny(size: str) -> bool:
    return size.endswith("tiny")


def measure(options: argparse.Namespace, work: Path, size: str, cases: Sequence[str]) -> Results:
    """Every case, in turns; per case the medians, or why there are none."""
    names = list(cases)
    if names == ["kd-precompute ours"]:
        names.append("kd ours")  # what it is compared with
    setup = ["prepare"] + ["targets"] * ("kd-precompute ours" in names)
    for step in setup:
        done = in_process(step, options, work, size)
        if "failed" in done:
            raise SystemExit(f"{step}: {done['failed']}")
    rounds = options.rounds or json.loads((work / "device.json").read_text())["rounds"]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name, taken in samples.items():
            if turn and set(taken[0]) & {"absent", "failed"}:
                continue
            taken.append(in_process(name, options, work, size))
            print(f"{name}, {turn + 1} of {rounds}: {words(taken[-1])}", file=sys.stderr)
    return {name: summary(taken) for name, taken in samples.items()}


def in_process(case: str, options: argparse.Namespace, work: Path, size: str) -> dict[str, Any]:
    """The facts of one case, or {"absent": why} or {"failed": why}."""
    command = [sys.executable, __file__, "--case", case, "--work", str(work)]
    command += ["--size", size]
    if options.peak_tflops:
        command += ["--peak-tflops", str(options.peak_tflops)]
    out = work / "facts.json"
    out.unlink(missing_ok=True)
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
               "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "home"),
               "TOKENIZERS_PARALLELISM": "false",
               # Not that of all programs, where one that was killed may leave half a file.
               "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}  # fmt: skip
    environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device, also where there are several
    if is_tiny(size):  # threads that wait for each other cost more than a toy's products
        environ.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if out.exists():
        facts: dict[str, Any] = json.loads(out.read_text())
        return facts
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"failed": (lines or [f"exit code {done.returncode}"])[-1].strip()[:300]}


def run_case(options: argparse.Namespace) -> int:
    """One case, in this process."""
    sys.path.insert(0, str(REPOSITORY))
    from speed import ours, peers, textbook, world

    size = world.SIZES[options.size]
    work = Path(options.work)
    if options.case == "prepare":
        world.prepare(work, size, has_gpu())
        (work / "device.json").write_text(json.dumps(device_facts(options, size, work)))
        facts: dict[str, Any] = {}
    elif options.case == "targets":
        ours.write_targets(work, size)
        facts = {}
    else:
        sides = (ours, textbook, peers)
        side = next(side for side in sides if options.case in side.CASES)
        try:
            facts = side.measure(options.case, work, size, options.peak_tflops)
        except world.Absent as error:
            facts = {"absent": str(error)}
    (work / "facts.json").write_text(json.dumps(facts))
    return 0


def device_facts(options: argparse.Namespace, size: Any, work: Path) -> dict[str, Any]:
    """The device in words, its peak, and the FLOPs of a token of each task."""
    import torch
    from speed import ours, world

    from trainer import models
    from trainer.data.chat import view_of
    from trainer.data.stream import build_rows
    from trainer.throughput import flops_per_token, mean_context

    name, peak = f"CPU, {torch.get_num_threads()} threads, fp32", options.peak_tflops
    if has_gpu():
        name = f"{torch.cuda.get_device_name()}, bf16"
        # The longest name first: L40S is no L4.
        peak = peak or next((PEAKS[k] for k in sorted(PEAKS, key=len)[::-1] if k in name), None)
    model = world.student(work, torch.device("meta"), "sdpa")
    tokens = models.load_tokenizer(str(work / "student"))
    flops = {}
    for task, case in (("sft", "sft ours packed"), ("kd", "kd ours")):
        data = ours.stage(case, work, size).data
        rows = build_rows(
            data.train, tokens, sequence_length=data.sequence_length, packing=True,
            view=view_of(data, "sft", tokens),
        )  # fmt: skip
        flops[task] = flops_per_token(model, mean_context(rows))
        if task == "sft":
            frozen = flops_per_token(model.requires_grad_(False), mean_context(rows))
            model.requires_grad_(True)
    return {
        "device": f"{name}, torch {torch.__version__}",
        "peak_tflops": peak if has_gpu() else None,
        # An adapter's base has no gradient of its own; of a pair nobody counts them.
        "flops_per_token": {**flops, "kd-precompute": flops["kd"], "lora": frozen, "dpo": None},
        "parameters": models.parameter_count(model),
        "rounds": size.rounds,
        "batch": {"sft": size.sft, "lora": size.sft, "dpo": size.dpo, "kd": size.kd},
    }


def summary(taken: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the measurements that there are; the first reason where there is none."""
    good = [sample for sample in taken if "real_per_sec" in sample]
    if not good:
        return taken[0]
    keys = ("real_per_sec", "supervised_per_sec", "peak_mib", "loss")
    medians: dict[str, Any] = {k: statistics.median(s[k] for s in good) for k in keys}
    medians["all_real_per_sec"] = [round(sample["real_per_sec"], 1) for sample in good]
    failures = [sample["failed"] for sample in taken if "failed" in sample]
    return {**medians, **({"failed_once": failures[0]} if failures else {})}


def ratios(results: Results) -> list[dict[str, Any]]:
    """Of real tokens a second and of memory, where both sides were measured."""
    found = []
    for ours, other, what in RATIOS:
        a, b = results.get(ours, {}), results.get(other, {})
        if "real_per_sec" in a and "real_per_sec" in b:
            found.append({
                "ours": ours, "other": other, "what": what,
                "speed": a["real_per_sec"] / b["real_per_sec"],
                "memory": a["peak_mib"] / b["peak_mib"],
            })  # fmt: skip
    return found


def print_report(report: dict[str, Any]) -> None:
    size = "toy" if report["tiny"] else "full size"
    print(f"{report['device']}; {report['parameters']:,} parameters ({size}); medians")
    for task, (micro, accumulate, length) in report["batch"].items():
        print(f"{task}: {micro} x {accumulate} rows of {length} tokens a step")
    head = (
        f"{'case':<24}{'real tok/s':>12}{'learned tok/s':>15}{'MFU':>8}{'peak MiB':>10}{'loss':>9}"
    )
    print(f"\n{head}")
    for name, facts in report["results"].items():
        if "real_per_sec" not in facts:
            print(f"{name:<24}{words(facts)}")
            continue
        used = utilisation(report, name, facts)
        shown = f"{used:.1%}" if used is not None else "-"
        print(
            f"{name:<24}{facts['real_per_sec']:>12,.0f}{facts['supervised_per_sec']:>15,.0f}"
            f"{shown:>8}{facts['peak_mib']:>10,.0f}{facts['loss']:>9.4f}"
        )
    print()
    for ratio in report["ratios"]:
        print(
            f"{ratio['ours']} : {ratio['other']} ({ratio['what']}): {ratio['speed']:.2f} x the"
            f" speed, {ratio['memory']:.2f} x the memory"
        )


def utilisation(report: dict[str, Any], name: str, facts: dict[str, Any]) -> float | None:
    """Model FLOP/s over the device's peak; None where one of them is not known."""
    flops, peak = report["flops_per_token"][name.split()[0]], report["peak_tflops"]
    return facts["real_per_sec"] * flops / (peak * 1e12) if flops and peak else None


def words(facts: dict[str, Any]) -> str:
    for state in ("absent", "failed"):
        if state in facts:
            return f"{state} ({facts[state]})"
    return f"{facts['real_per_sec']:,.0f} tokens/s"


def verdict(report: dict[str, Any], *, check: bool) -> int:
    """1 where ours failed or, with `check`, a budget is missed."""
    found = {(ratio["ours"], ratio["other"]): ratio["speed"] for ratio in report["ratios"]}
    problems = [
        f"{name}: {words(facts)}" for name, facts in report["results"].items()
        if " ours" in name and not math.isfinite(facts.get("real_per_sec", math.nan))
        and not (report["tiny"] and "absent" in facts)
    ]  # fmt: skip
    for pair, least in BUDGETS.items() if check else ():
        ours, other = pair
        if ours not in report["results"]:
            continue
        label = f"{ours} : {other} at least {least} x"
        if report["tiny"]:
            print(f"{label}: not checked: {'no GPU' if not has_gpu() else '--tiny'}")
        elif pair not in found:
            print(f"{label}: not checked: {words(report['results'][other])}")
        elif found[pair] < least:
            problems.append(f"{label}: {found[pair]:.2f}")
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
