"""Our side: a job, run by the trainer's own stages and loop."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from speed.world import (
    CLIP,
    LR,
    RANK,
    STUDENT_SEED,
    Absent,
    Size,
    now,
    pair_tokens,
    peak_mib,
    texts,
)
from trainer.config import (
    ConfigError,
    Data,
    Distill,
    Job,
    Model,
    Source,
    StageConfig,
    StageName,
    Targets,
    Train,
    build,
    to_dict,
)

#: case -> (stage, what `kd` says, packed rows)
CASES: dict[str, tuple[StageName, dict[str, Any], bool]] = {
    "sft ours packed": ("sft", {}, True),
    "sft ours padded": ("sft", {}, False),
    **{
        f"sft ours {how}": ("sft", {}, True)
        for how in (
            "compiled",
            "checkpointing",
            "checkpointing compiled",
            "selective",
            "selective compiled",
            "fsdp",
            "float8",
            "checkpointing float8",
        )
    },
    "lora ours": ("sft", {}, True),
    "lora ours compiled": ("sft", {}, True),
    "dpo ours": ("dpo", {}, False),
    "kd ours": ("kd", {"teacher": "teacher"}, True),
    "kd-precompute ours": ("kd", {"mode": "precompute", "targets": "targets"}, True),
}

_COMPILED = {"compile": True}
#: case -> what else its stage says, by block. `BASE` stands for the model that has weights.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "sft ours compiled": {"model": _COMPILED},
    "sft ours checkpointing": {"model": {"gradient_checkpointing": True}},
    "sft ours checkpointing compiled": {"model": {"gradient_checkpointing": True, **_COMPILED}},
    "sft ours checkpointing float8": {
        "model": {"gradient_checkpointing": True, "float8": "torchao", **_COMPILED}
    },
    "sft ours selective": {"model": {"gradient_checkpointing": "selective"}},
    "sft ours selective compiled": {"model": {"gradient_checkpointing": "selective", **_COMPILED}},
    "sft ours fsdp": {"train": {"parallel": "fsdp"}},
    "sft ours float8": {"model": {"float8": "torchao", **_COMPILED}},
    "lora ours": {"model": {"name": "BASE", "init": "pretrained", "adapter": {"rank": RANK}}},
    "lora ours compiled": {
        "model": {"name": "BASE", "init": "pretrained", "adapter": {"rank": RANK}, **_COMPILED}
    },
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

    with runtime.start() as process:

        def say(line: str) -> None:
            if line.startswith((middle, last)):
                times.append(now(process.device))
            if line.startswith(last):
                raise Enough

        job = Job(run="throughput", stages=(config,), peak_tflops=peak_tflops)
        try:
            stages.run_stage(config, job, process, say, lambda: False)
        except ConfigError as error:  # such as a device that lacks what the case is about
            if case not in CHANGES:
                raise
            raise Absent(str(error).splitlines()[0]) from error
        except Enough:
            before, after = logged_steps(Path(config.output))[-2:]
        peak = peak_mib(process.device)
    seconds = times[-1] - times[-2]
    if config.stage == "dpo":  # every pair is as long as any other
        micro, accumulate, _ = size.dpo
        learned = size.steps * micro * accumulate * pair_tokens(size) / seconds
        shutil.rmtree(config.output)
        return {"supervised_per_sec": learned, "real_per_sec": learned, "peak_mib": peak,
                "loss": after["train_loss"]}  # fmt: skip
    tokens = models.load_tokenizer(str(work / "student"))
    rows = build_rows(
        config.data.train, tokens, sequence_length=config.data.sequence_length,
        packing=config.data.packing, view=view_of(config.data, config.stage, tokens),
    )  # fmt: skip
    # Metrics count what is learned: all tokens but the first of each text.
    real = rows.summary["tokens"] / rows.summary["supervised_tokens"]
    learned = (after["tokens"] - before["tokens"]) / seconds
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
    micro, accumulate, length = {"kd": size.kd, "dpo": size.dpo}.get(name, size.sft)
    paths = {k: str(work / v) if k in ("teacher", "targets") else v for k, v in kd.items()}
    path = str(work / f"{name}.jsonl")
    if not packing and name == "sft":
        micro = padded_micro_batch(work, size)
    made = StageConfig(
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
    return changed(made, CHANGES[case], work) if case in CHANGES else made


def changed(config: StageConfig, blocks: dict[str, dict[str, Any]], work: Path) -> StageConfig:
    """The stage with other settings. Errors: `ConfigError` where the trainer has no such key."""
    raw, problems = to_dict(config), []  # type: ignore[var-annotated]
    for block, settings in blocks.items():
        raw[block].update(settings)
    if raw["model"]["name"] == "BASE":
        raw["model"]["name"] = str(work / "teacher")
    made: StageConfig = build(StageConfig, raw, (), problems)
    if problems:
        at, what = problems[0]
        raise ConfigError(f"{'.'.join(map(str, at))}: {what}")
    return made


def padded_micro_batch(work: Path, size: Size) -> int:
    """Texts of one padded micro-batch that hold about as many tokens as one of packed rows."""
    micro, _, length = size.sft
    found = [text.count(" ") + 2 for text in texts(work / "sft.jsonl")]
    return max(1, round(micro * length / (sum(found) / len(found))))


def logged_steps(folder: Path) -> list[dict[str, Any]]:
    (path,) = sorted((folder / "metrics").glob("*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]
