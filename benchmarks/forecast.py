"""How well the launcher's forecast of speed holds here: calibrate on four jobs, predict the others.

    python benchmarks/forecast.py            one core; about two minutes of CPU time
    python benchmarks/forecast.py --check    exit 1 where a prediction is off by more than 25%

Tiny to small Llamas with random weights (nothing is downloaded) are trained for a few steps by the
trainer's own stages and loop: other widths, depths, vocabularies, lengths and batches; all weights,
adapters, a teacher, gradient checkpointing. The four that calibrate are those whose kinds of work
differ most from each other. Cases take turns, and the CPU time of this one thread is
what is measured, so that other work on the machine counts little. `launcher.speed` is fitted to the
four cases marked `calibrates` and then says what the rest should take, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from launcher import shapes, speed  # noqa: E402
from trainer.config import (  # noqa: E402
    Adapter,
    Data,
    Distill,
    Job,
    Model,
    Source,
    StageConfig,
    Train,
)

#: The most that a predicted speed may be off, as a part of what was measured.
BUDGET = 0.25
WARM, MEASURED = 2, 3  # optimizer steps


@dataclass(frozen=True)
class Case:
    """One job: the model, the rows of a step, what of it learns."""

    name: str
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    micro: int
    accumulate: int
    how: Literal["full", "lora", "kd", "checkpointing"] = "full"
    calibrates: bool = False


CASES = (
    Case("tiny, many layers", 64, 8, 4, 512, 64, 2, 2, calibrates=True),
    Case("wide", 384, 3, 6, 1024, 128, 8, 1, calibrates=True),
    Case("large vocabulary", 128, 2, 4, 16384, 256, 4, 1),
    Case("long rows", 128, 3, 4, 1024, 1024, 2, 1),
    Case("quickstart's teacher", 192, 3, 6, 2048, 128, 8, 1),
    Case("quickstart's student", 96, 2, 3, 2048, 128, 8, 1),
    Case("medium", 256, 4, 8, 4096, 256, 4, 2, calibrates=True),
    Case("medium, checkpointing", 256, 4, 8, 4096, 256, 4, 1, "checkpointing"),
    Case("adapter", 256, 4, 8, 2048, 256, 4, 1, "lora", calibrates=True),
    Case("adapter, wide", 384, 3, 6, 4096, 128, 8, 1, "lora"),
    Case("distilled", 96, 2, 3, 2048, 128, 8, 1, "kd"),
    Case("distilled, longer", 192, 3, 6, 4096, 256, 4, 1, "kd"),
)


class Enough(Exception):
    """The last step is measured."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 beyond 25%%")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each case")
    parser.add_argument("--json", metavar="FILE", help="write the facts there, too")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for case in CASES:
            prepare(case, work)
        taken: dict[str, list[float]] = {case.name: [] for case in CASES}
        for _ in range(options.rounds):
            for case in CASES:
                taken[case.name].append(measure(case, work))
        works = {case.name: speed.work(stage(case, work), *shapes_of(case, work)) for case in CASES}
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    known = [(works[c.name], seconds[c.name]) for c in CASES if c.calibrates]
    costs = speed.calibrated(known)
    facts = [
        {
            **asdict(case),
            "tokens_per_second": works[case.name].tokens / seconds[case.name],
            "predicted": works[case.name].tokens / costs.seconds(works[case.name]),
            "work": asdict(works[case.name]),
            "seconds": taken[case.name],
        }
        for case in CASES
    ]
    report(costs, facts)
    if options.json:
        document = {"v": 1, "costs": asdict(costs), "cases": facts}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    worst = max(abs(error(fact)) for fact in facts if not fact["calibrates"])
    print(f"the worst prediction is off by {worst:.0%}; the budget is {BUDGET:.0%}")
    return 1 if options.check and worst > BUDGET else 0


def prepare(case: Case, work: Path) -> None:
    """The case's tokenizer, model, teacher of four times the size, and text."""
    import torch
    from speed.world import write_texts, write_tokenizer  # of this folder, not the launcher's
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = place(case, work)
    tokens = write_tokenizer(folder / "model", case.vocabulary)
    tokens.save_pretrained(folder / "teacher")
    for name, times in (("model", 1), ("teacher", 2)):
        config = LlamaConfig(
            vocab_size=case.vocabulary, hidden_size=case.hidden * times,
            num_hidden_layers=case.layers, num_attention_heads=case.heads * times,
            intermediate_size=case.hidden * times * 8 // 3, tie_word_embeddings=True,
            max_position_embeddings=8192, bos_token_id=None, eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(times)
        if name == "model" or case.how == "kd":
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    count = (WARM + MEASURED) * case.micro * case.accumulate
    write_texts(folder / "train.jsonl", [case.length] * count, case.vocabulary)


def place(case: Case, work: Path) -> Path:
    return work / str(CASES.index(case))


def stage(case: Case, work: Path) -> StageConfig:
    folder = place(case, work)
    kd = Distill(teacher=str(folder / "teacher"), alpha=0.5) if case.how == "kd" else None
    return StageConfig(
        id="case",
        stage="kd" if kd else "pretrain",
        output=str(folder / "out"),
        model=Model(
            name=str(folder / "model"),
            gradient_checkpointing=case.how == "checkpointing",
            adapter=Adapter(rank=8) if case.how == "lora" else None,
        ),
        data=Data(
            train=(Source(path=str(folder / "train.jsonl")),), sequence_length=case.length
        ),
        train=Train(
            steps=WARM + MEASURED, micro_batch=case.micro, accumulate=case.accumulate, warmup=0,
            log_every=1, report_to=(),
        ),
        kd=kd,
    )  # fmt: skip


def shapes_of(case: Case, work: Path) -> tuple[shapes.Shape, shapes.Shape | None]:
    folder = place(case, work)
    student = shapes.of_model(Model(name=str(folder / "model")), work)
    assert student is not None
    if case.how != "kd":
        return student, None
    return student, shapes.of_model(Model(name=str(folder / "teacher")), work)


def measure(case: Case, work: Path) -> float:
    """CPU seconds of an optimizer step: the median of those after the warm-up."""
    from trainer import runtime, stages

    config = stage(case, work)
    shutil.rmtree(config.output, ignore_errors=True)
    times: list[float] = []

    def say(line: str) -> None:
        if line.startswith("step "):
            times.append(time.process_time())
        if line.startswith(f"step {WARM + MEASURED}/"):
            raise Enough

    with runtime.start() as process:
        try:
            job = Job(run="forecast", stages=(config,))
            stages.run_stage(config, job, process, say, lambda: False)
        except Enough:
            pass
    steps = [after - before for before, after in pairwise(times)][-MEASURED:]
    return statistics.median(steps)


def error(fact: dict[str, Any]) -> float:
    """How far the predicted speed is from the measured one, as a part of it."""
    return float(fact["predicted"] / fact["tokens_per_second"] - 1)


def report(costs: speed.Costs, facts: list[dict[str, Any]]) -> None:
    print(f"{'case':<24}{'measured tok/s':>16}{'predicted':>12}{'error':>9}")
    for fact in facts:
        note = "  calibrates" if fact["calibrates"] else ""
        print(
            f"{fact['name']:<24}{fact['tokens_per_second']:>16,.0f}{fact['predicted']:>12,.0f}"
            f"{error(fact):>9.1%}{note}"
        )
    print(f"costs of this core: {costs}")


if __name__ == "__main__":
    sys.exit(main())
