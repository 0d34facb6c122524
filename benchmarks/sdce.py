"""What surrogate-guided cross-entropy is worth where the model's own text is scarce: both forms,
with a surrogate of another tokenizer and of the model's own, beside KL and plain cross-entropy.

    python benchmarks/sdce.py [--seeds 0 1 2] [--out FILE] [--threads N]

Two surrogates learn from all training topics of the text that comes with CPython, one with the
model's tokenizer, one with another; all seeds share them. For each seed models then learn from a
fifth of that text: same start, same rows in the same order, same number of steps, but for
`ce-longer`, which has twice as many. The stages are the trainer's own. Prints the table of
docs/sdce.md; there is nothing to fail.
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

import torch
from transformers.utils import logging

from trainer import interrupts, runtime, stages
from trainer.config import (
    Architecture,
    Data,
    Job,
    Model,
    Sdce,
    Source,
    StageConfig,
    Tokenizer,
    Train,
)
from trainer.data.corpus import python_reference

STEPS, SURROGATE_STEPS = 120, 600
SMALL = Architecture(hidden_size=64, layers=2, heads=2, intermediate_size=176)
LARGE = Architecture(hidden_size=128, layers=2, heads=4, intermediate_size=352)
#: Run -> (form or loss, whose tokenizer the surrogate has).
GUIDED = {
    "soft, other tokenizer": ("soft", "other"),
    "parity, other tokenizer": ("parity", "other"),
    "soft, same tokenizer": ("soft", "same"),
    "parity, same tokenizer": ("parity", "same"),
    "kl, same tokenizer": ("kl", "same"),
}
SCARCE = Data(
    train=(Source(builtin="python-reference", split="train", share=0.2),),
    validation=(Source(builtin="python-reference", split="heldout"),),
    sequence_length=128,
)
TEXT = replace(SCARCE, train=(Source(builtin="python-reference", split="train"),))
QUESTIONS = Data(train=(Source(builtin="python-questions", split="train"),))
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a surrogate is worth on scarce text.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="write the results there, as JSON")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    started, load = time.time(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        shared = Path(scratch) / "surrogates"
        guides = surrogates(shared)
        found = {
            str(seed): one_seed(Path(scratch) / str(seed), seed, shared) for seed in options.seeds
        }
    summary = over_seeds(found)
    print(table(guides, summary))
    if options.out is not None:
        results = {
            "v": 1,
            "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, torch"
            f" {torch.__version__}, {options.threads} thread",
            "seconds": round(time.time() - started, 1),
            "settings": {"steps": STEPS, "surrogate_steps": SURROGATE_STEPS},
            "surrogates": guides,
            "runs": found,
            "over_seeds": summary,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def surrogates(folder: Path) -> dict[str, Figures]:
    """Train both tokenizers and both surrogates below `folder`: the surrogates' figures."""
    bench = Bench(folder, 0, folder)
    for name, data, size in (("same", TEXT, 1024), ("other", QUESTIONS, 768)):
        bench.run(f"{name}-tokenizer", stage="tokenizer", model=None, train=None, data=data,
                  tokenizer=Tokenizer(vocab_size=size))  # fmt: skip
    rarely = replace(bench.train(SURROGATE_STEPS), evaluate_every=200)
    return {
        name: bench.run(name, model=bench.model(name, LARGE), train=rarely, data=TEXT)
        for name in ("same", "other")
    }


def one_seed(folder: Path, seed: int, shared: Path) -> dict[str, Figures]:
    """Train the models of `seed`, guided by the surrogates in `shared`: the figures of each run."""
    bench = Bench(folder, seed, shared)
    found = {
        "ce": bench.run("ce"),
        "ce-longer": bench.run("ce-longer", train=bench.train(2 * STEPS)),
    }
    for label, (kind, whose) in GUIDED.items():
        loss: dict[str, Any] = {"loss": "kl"} if kind == "kl" else {"form": kind}
        sdce = Sdce(f"{shared / whose}@best", **loss)
        found[label] = bench.run(label.replace(", ", "-"), stage="sdce", sdce=sdce)
    return found


class Bench:
    """The stages of one seed, below `folder`; tokenizers and surrogates lie in `shared`."""

    def __init__(self, folder: Path, seed: int, shared: Path) -> None:
        self.folder, self.seed, self.shared = folder, seed, shared

    def model(self, whose: str, architecture: Architecture) -> Model:
        tokenizer = str(self.shared / f"{whose}-tokenizer")
        return Model(init="random", tokenizer=tokenizer, architecture=architecture)

    def train(self, steps: int) -> Train:
        return Train(steps=steps, lr=3e-3, micro_batch=8, warmup=20, evaluate_every=60,
                     evaluate_batches=0, keep=1, seed=self.seed, report_to=())  # fmt: skip

    def run(self, name: str, **fields: Any) -> Figures:
        """One stage, of the scarce text and the small model where `fields` do not say otherwise.
        A surrogate is found by its best checkpoint."""
        given = {"stage": "pretrain", "model": self.model("same", SMALL), "data": SCARCE,
                 "train": self.train(STEPS)}  # fmt: skip
        out = self.folder / name
        config = StageConfig(id="bench", output=str(out), **{**given, **fields})
        started = time.process_time()
        job = Job(run="benchmark", stages=(config,))
        with interrupts.listening() as signalled, runtime.start() as process:
            outcome = stages.run_stage(config, job, process, lambda line: None, signalled)
        spent = time.process_time() - started
        trained = config.train is not None
        figures = self.figures(out, outcome.evaluation, spent) if trained else {}
        print(f"{out}: {spent:.1f} s of CPU, {json.dumps(figures)}", file=sys.stderr)
        return figures

    @staticmethod
    def figures(out: Path, facts: Mapping[str, float], spent: float) -> Figures:
        lines = [json.loads(line) for file in sorted((out / "metrics").glob("*.jsonl"))
                 for line in file.read_text().splitlines()]  # fmt: skip
        steps = [fact for fact in lines if fact["kind"] == "step"]
        means = {
            name: statistics.fmean(fact[f"surrogate_{name}"] for fact in steps)
            for name in ("coverage", "kept", "agreement")
            if f"surrogate_{name}" in steps[-1]
        }
        size = sum(len(text.encode()) for _, text in python_reference("heldout"))
        return {
            "ce_last": facts["val_loss"],
            "ce_best": facts["best_val_loss"],
            "nats_per_byte": facts["best_val_loss"] * facts["val_tokens"] / size,
            "cpu_seconds": spent,
            **means,
        }


def over_seeds(found: Mapping[str, Mapping[str, Figures]]) -> dict[str, dict[str, Figures]]:
    """Mean, least and greatest of each figure of each run; `gain`: the best of `ce` less the best
    of the run, seed by seed."""
    runs = [
        {name: {**figures, "gain": run["ce"]["ce_best"] - figures["ce_best"]}
         for name, figures in run.items()}
        for run in found.values()
    ]  # fmt: skip
    return {
        name: {
            key: {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
            for key in runs[0][name]
            for values in [[run[name][key] for run in runs]]
        }
        for name in runs[0]
    }  # fmt: skip


def table(guides: Mapping[str, Figures], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of docs/sdce.md: means over the seeds, with the spread where it matters. Losses of
    another tokenizer's tokens are not compared."""
    lines = [
        "| run | held-out CE, best | last | gain over `ce`, best | nats a byte | coverage"
        " | kept | agreement | CPU, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in guides.items():
        best, last = (f"{own[key]:.3f}" if name == "same" else "" for key in ("ce_best", "ce_last"))
        cells = [f"surrogate, {name} tokenizer", best, last, "", f"{own['nats_per_byte']:.3f}"]
        cells += ["", "", "", f"{own['cpu_seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for name, figures in summary.items():
        cells = [
            f"`{name}`",
            _spread(figures["ce_best"]),
            _spread(figures["ce_last"]),
            "" if name == "ce" else _spread(figures["gain"], "+"),
            f"{figures['nats_per_byte']['mean']:.3f}",
            _mean(figures.get("coverage")),
            _mean(figures.get("kept")),
            _mean(figures.get("agreement")),
            f"{figures['cpu_seconds']['mean']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(figure: Mapping[str, float], sign: str = "") -> str:
    return f"{figure['mean']:{sign}.3f} ({figure['min']:{sign}.3f} to {figure['max']:{sign}.3f})"


def _mean(figure: Optional[Mapping[str, float]]) -> str:
    return "" if figure is None else f"{figure['mean']:.2f}"


if __name__ == "__main__":
    main()
