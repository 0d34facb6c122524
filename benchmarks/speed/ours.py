"""Our side: a job, run by the trainer's own stages and loop."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from speed.world import CLIP, LR, STUDENT_SEED, Size, peak_mib, texts
from trainer.config import (
    Data,
    Distill,
    Job,
    Model,
    Source,
    StageConfig,
    StageName,
    Targets,
    Train,
)

#: case -> (stage, what `kd` says, packed rows)
CASES: dict[str, tuple[StageName, dict[str, Any], bool]] = {
    "sft ours packed": ("sft", {}, True),
    "sft ours padded": ("sft", {}, False),
    "kd ours": ("kd", {"teacher": "teacher"}, True),
    "kd-precompute ours": ("kd", {"mode": "precompute", "targets": "targets"}, True),
}


class Enough(Exception):
    """The last step is measured: the checkpoint that would follow is not what this is about."""


def measure(case: str, work: Path, size: Size, peak_tflops: float | None) -> dict[str, float]:
    """Tokens a second over the last `size.steps` steps, and peak memory. The tokens are those of
    the metrics. The time is that between two logged steps, by a clock read when their line is said:
    by then the device has done its work, which the time of the metrics does not wait for."""
    from trainer import models, runtime, stages
    from trainer.data.chat import view_of
    from trainer.data.stream import build_rows

    config = stage(case, work, size)
    shutil.rmtree(config.output, ignore_errors=True)
    assert config.train is not None
    middle, last = f"step {size.steps}/", f"step {2 * size.steps}/"
    times: list[float] = []

    def say(line: str) -> None:
        if line.startswith((middle, last)):
            times.append(time.perf_counter())
        if line.startswith(last):
            raise Enough

    with runtime.start() as process:
        job = Job(run="throughput", stages=(config,), peak_tflops=peak_tflops)
        try:
            stages.run_stage(config, job, process, say, lambda: False)
        except Enough:
            before, after = logged_steps(Path(config.output))[-2:]
        peak = peak_mib(process.device)
    tokens = models.load_tokenizer(str(work / "student"))
    rows = build_rows(
        config.data.train, tokens, sequence_length=config.data.sequence_length,
        packing=config.data.packing, view=view_of(config.data, config.stage, tokens),
    )  # fmt: skip
    # Metrics count what is learned: all tokens but the first of each text.
    real = rows.summary["tokens"] / rows.summary["supervised_tokens"]
    learned = (after["tokens"] - before["tokens"]) / (times[-1] - times[-2])
    shutil.rmtree(config.output)
    return {
        "supervised_per_sec": learned,
        "real_per_sec": learned * real,
        "peak_mib": peak,
        "loss": after["train_loss"],
    }


def write_targets(work: Path, size: Size) -> None:
    """The stage whose answers `kd-precompute` reads; its time is not measured."""
    from trainer import runtime, stages

    config = stage("kd-precompute ours", work, size)
    plan = Targets(str(work / "teacher"), temperature=1.0, micro_batch=size.kd[0])
    config = replace(
        config, id="targets", stage="targets", output=str(work / "targets"), targets=plan,
        model=None, train=None, kd=None,
    )  # fmt: skip
    with runtime.start() as process:
        job = Job(run="throughput", stages=(config,))
        stages.run_stage(config, job, process, lambda line: None, lambda: False)


def stage(case: str, work: Path, size: Size) -> StageConfig:
    """The job's stage. Distillation is the divergence alone, at T = 1, as TRL's trainer has it."""
    name, kd, packing = CASES[case]
    micro, accumulate, length = size.kd if name == "kd" else size.sft
    paths = {k: str(work / v) if k in ("teacher", "targets") else v for k, v in kd.items()}
    path = str(work / f"{name}.jsonl")
    if not packing:
        micro = padded_micro_batch(work, size)
    return StageConfig(
        id=name,
        stage=name,
        output=str(work / "out"),
        model=Model(
            name=str(work / "student"), init="random", tokenizer=str(work / "student")
        ),
        data=Data(train=(Source(path=path),), sequence_length=length, packing=packing),
        train=Train(
            steps=2 * size.steps, micro_batch=micro, accumulate=accumulate, lr=LR, clip=CLIP,
            schedule="constant", warmup=0, log_every=size.steps, seed=STUDENT_SEED, report_to=(),
        ),
        kd=Distill(**paths, temperature=1.0, alpha=0.0) if kd else None,
    )  # fmt: skip


def padded_micro_batch(work: Path, size: Size) -> int:
    """Texts of one padded micro-batch that hold about as many tokens as one of packed rows."""
    micro, _, length = size.sft
    found = [text.count(" ") + 2 for text in texts(work / "sft.jsonl")]
    return max(1, round(micro * length / (sum(found) / len(found))))


def logged_steps(folder: Path) -> list[dict[str, Any]]:
    (path,) = sorted((folder / "metrics").glob("*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]
