"""What distillation is worth where the student's own text is scarce: every mode of the stage `kd`
against plain cross-entropy, on the text that comes with CPython, for several seeds.

    python benchmarks/distillation.py [--seeds 0 1 2] [--out FILE] [--check] [--keep FOLDER]

For each seed a teacher learns from all training topics, then students of a quarter of its size
learn from a fifth of them: same start, same rows in the same order, same number of steps, except
`ce-time`, which gets the training time of `top64`. The stages are the trainer's own. One target is
not among them: `top8-renormalised`, the eight largest probabilities divided by their sum, as other
trainers store them; it is made here from the store of `top8`, which counts all other tokens as one.

`--check` exits with 1 where a claim of docs/distillation.md does not hold for one of the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from transformers.utils import logging

from trainer import interrupts, runtime, stages
from trainer.checkpoint import load_state, resolve
from trainer.config import (
    Architecture,
    Data,
    Distill,
    Evaluate,
    Job,
    Model,
    Source,
    StageConfig,
    Targets,
    Tokenizer,
    Train,
)

TEMPERATURE = 1.0
ALPHA = 0.1  # the weight of the cross-entropy
STEPS = 250
#: The student runs of as many steps on the same rows, each with the kind of its targets.
EQUAL_STEPS = ("ce", "online", "top64", "sampled64", "sampled256", "top8", "top8-renormalised")
STUDENTS = (*EQUAL_STEPS, "ce-time")
#: Claims: how far below, how near, in nats.
BELOW, NEAR = 0.1, 0.05
Figures = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description="What distillation is worth on scarce text.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="write the results there, as JSON")
    parser.add_argument("--check", action="store_true", help="fail where a claim does not hold")
    parser.add_argument("--keep", type=Path, help="keep the stages' folders below this one")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    options = parser.parse_args()
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep}: is not empty; name a new folder")
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    started, load = time.time(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        found = {str(seed): one_seed(root, seed) for seed in options.seeds}
    summary = over_seeds(found)
    results = {
        "v": 1,
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "machine": machine(options.threads, load),
        "seconds": round(time.time() - started, 1),
        "settings": {"temperature": TEMPERATURE, "alpha": ALPHA, "steps": STEPS},
        "runs": found,
        "over_seeds": summary,
    }  # fmt: skip
    print(table(summary))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    failures = claims(found)
    for line in failures:
        print(f"FAILED: {line}")
    return 1 if options.check and failures else 0


def one_seed(root: Path, seed: int) -> dict[str, Figures]:
    """Train and compare everything with `seed`: the figures of each run."""
    folder = root / f"seed-{seed}"
    bench = Bench(folder, seed)
    bench.run("tokenizer", stage="tokenizer", model=None, train=None, data=TEXT,
              tokenizer=Tokenizer(vocab_size=2048))  # fmt: skip
    bench.run("teacher", model=bench.model(hidden_size=192, layers=3, heads=6,
              intermediate_size=512), train=bench.train(400, 2e-3), data=TEXT)  # fmt: skip
    teacher = str(folder / "teacher")
    bench.run("ce")
    bench.run("online", kd=Distill(teacher, temperature=TEMPERATURE, alpha=ALPHA))
    bench.distil("top64", Targets(teacher, top_k=64))
    bench.run("ce-time", train=replace(bench.settings, steps=None,
              seconds_of=str(folder / "top64")))  # fmt: skip
    for samples in (64, 256):
        draws = Targets(teacher, sampler="sample", samples=samples, seed=seed)
        bench.distil(f"sampled{samples}", draws)
    bench.distil("top8", Targets(teacher, top_k=8))
    renormalise(folder / "top8-targets" / "targets", folder / "top8-renormalised-targets")
    bench.distil("top8-renormalised", None)
    return bench.figures()


SCARCE = Data(
    train=(Source(builtin="python-reference", split="train", share=0.2),),
    validation=(Source(builtin="python-reference", split="heldout"),),
    sequence_length=128,
)
TEXT = replace(SCARCE, train=(Source(builtin="python-reference", split="train"),))


class Bench:
    """The stages of one seed, below `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.student = self.model(hidden_size=96, layers=2, heads=3, intermediate_size=256)
        self.settings = self.train(STEPS, 3e-3)
        self.cpu: Figures = {}

    def model(self, **architecture: Any) -> Model:
        """A model at random; the seed of `train` draws its weights."""
        tokenizer = str(self.folder / "tokenizer")
        return Model(init="random", tokenizer=tokenizer, architecture=Architecture(**architecture))

    def train(self, steps: int, lr: float) -> Train:
        return Train(steps=steps, lr=lr, micro_batch=8, warmup=20, evaluate_every=25, keep=1,
                     seed=self.seed, report_to=())  # fmt: skip

    def run(self, name: str, **fields: Any) -> None:
        """One stage, of the scarce text and the student where `fields` do not say otherwise."""
        stage = "kd" if "kd" in fields else "pretrain"
        given = {"stage": stage, "model": self.student, "data": SCARCE, "train": self.settings}
        config = StageConfig(id=name, output=str(self.folder / name), **{**given, **fields})
        self.cpu[name] = run_stage(config)

    def distil(self, name: str, targets: Optional[Targets]) -> None:
        """Store a teacher's answers, where they are not there yet, and learn from them."""
        store = f"{name}-targets"
        if targets is not None:
            plan = replace(targets, temperature=TEMPERATURE)
            self.run(store, stage="targets", model=None, train=None, targets=plan)
        self.run(name, kd=Distill(mode="precompute", targets=str(self.folder / store),
                 temperature=TEMPERATURE, alpha=ALPHA))  # fmt: skip

    def figures(self) -> dict[str, Figures]:
        """Compare the last and the best checkpoints of all runs on the held-out topics."""
        states = {name: load_state(Path(resolve(str(self.folder / name))))
                  for name in ("teacher", *STUDENTS)}  # fmt: skip
        if any(states[name]["stream"] != states["ce"]["stream"] for name in EQUAL_STEPS):
            raise SystemExit("error: runs of equal steps did not read the same rows")
        chosen = {f"{name}@{which}": f"{self.folder / name}@{which}"
                  for name in states for which in ("last", "best")}  # fmt: skip
        self.run("compare", stage="evaluate", model=None, train=None,
                 evaluate=Evaluate(models=chosen))  # fmt: skip
        scores = json.loads((self.folder / "compare" / "evaluation.json").read_text())
        found = {}
        for name, state in states.items():
            seconds = state["training_seconds"]
            found[name] = {
                "ce_last": scores[f"{name}@last.val_loss"],
                "ce_best": scores[f"{name}@best.val_loss"],
                "ece_last": scores[f"{name}@last.ece"],
                "ece_best": scores[f"{name}@best.ece"],
                "steps": float(state["step"]),
                "training_seconds": seconds,
                "tokens_per_second": state["tokens"] / seconds,
                "cpu_seconds": self.cpu[name],
                "targets_cpu_seconds": self.cpu.get(f"{name}-targets", 0.0),
            }
        return found


def run_stage(config: StageConfig) -> float:
    """Run a stage in this process; CPU seconds, with its evaluations and checkpoints."""
    started = time.process_time()
    with interrupts.listening() as signalled, runtime.start() as process:
        outcome = stages.run_stage(
            config, Job(run="benchmark", stages=(config,)), process, lambda line: None, signalled
        )
    if outcome.stopped is not None:
        raise SystemExit(f"stage {config.id}: stopped ({outcome.stopped})")
    print(f"{config.output}: {time.process_time() - started:.1f} s of CPU", file=sys.stderr)
    return time.process_time() - started


def renormalise(store: Path, out: Path) -> None:
    """A copy of a store of top-k targets whose probabilities are divided by their sum. Marked as
    shares of samples, they are learnt with plain cross-entropy, nothing being left for others."""
    for shard in sorted(store.glob("shard-*")):
        target = out / shard.name
        target.mkdir(parents=True, exist_ok=True)
        arrays = {path.name: np.load(path) for path in shard.glob("*.npy")}
        offsets = arrays["offsets.npy"].astype(np.int64)
        p = arrays["values.npy"].astype(np.float32)
        sums = np.add.reduceat(p, offsets[:-1])
        arrays["values.npy"] = p / np.repeat(sums, np.diff(offsets))
        for name, array in arrays.items():
            np.save(target / name, array)
        meta = json.loads((shard / "meta.json").read_text())
        (target / "meta.json").write_text(
            json.dumps({**meta, "sampler": "sample", "values": "float32"})
        )


def over_seeds(found: Mapping[str, Mapping[str, Figures]]) -> dict[str, dict[str, Figures]]:
    """Mean, least and greatest of each figure of each run."""
    runs = list(found.values())
    return {
        name: {
            key: {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
            for key in runs[0][name]
            for values in [[run[name][key] for run in runs]]
        }
        for name in runs[0]
    }


def claims(found: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """What docs/distillation.md says and does not hold, one line each."""
    failures = []
    for seed, runs in found.items():
        ce, online = runs["ce"]["ce_best"], runs["online"]
        kd = {
            name: runs[name]["ce_last"] for name in ("online", "top64", "sampled64", "sampled256")
        }
        failures += [
            f"seed {seed}: {name} ends at {loss:.3f}, not {BELOW} below {ce:.3f}, the best of ce"
            for name, loss in kd.items()
            if not loss < ce - BELOW
        ]
        peers = min(runs[name]["ece_last"] for name in ("top8", "top8-renormalised"))
        for name in ("sampled64", "sampled256"):
            apart = runs[name]["ce_last"] - online["ce_last"]
            if not abs(apart) < NEAR:
                failures.append(f"seed {seed}: {name} is {apart:+.3f} nat from online")
            if not runs[name]["ece_last"] < peers:
                failures.append(f"seed {seed}: ECE of {name} {runs[name]['ece_last']:.3f}, not"
                                f" below {peers:.3f} of eight tokens")  # fmt: skip
    return failures


def table(summary: Mapping[str, Mapping[str, Figures]]) -> str:
    """The table of docs/distillation.md: means over the seeds, with the spread where it matters."""
    lines = [
        "| run | held-out CE, last | best | ECE, last | steps | training, s | tokens/s | CPU, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in summary.items():
        cells = [spread(figures["ce_last"], 3), spread(figures["ce_best"], 3),
                 spread(figures["ece_last"], 3), f"{figures['steps']['mean']:,.0f}",
                 f"{figures['training_seconds']['mean']:.1f}",
                 f"{figures['tokens_per_second']['mean']:,.0f}",
                 f"{figures['cpu_seconds']['mean']:.1f}"]  # fmt: skip
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(figure: Figures, digits: int) -> str:
    low, high = f"{figure['min']:.{digits}f}", f"{figure['max']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}" + (f" ({low} to {high})" if low != high else "")


def machine(threads: int, load: float) -> dict[str, Any]:
    """Where this ran, and how busy it was at the start and is now (1-minute load)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }


if __name__ == "__main__":
    sys.exit(main())
