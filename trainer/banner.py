"""What a stage says about itself at the start, and what `run_meta.json` keeps."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from trainer import copies
from trainer.attention import flash_attention_status, kind_of
from trainer.config import Job, Source, StageConfig
from trainer.data.read import sample_names
from trainer.data.stream import Rows
from trainer.models import parameter_count
from trainer.phases import words
from trainer.probe import first_cut
from trainer.runtime import Runtime
from trainer.schedule import Horizon

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "flash-attn",
             "torchao", "transformer-engine")  # fmt: skip


def banner(
    config: StageConfig,
    runtime: Runtime,
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    held_out: Optional[Rows],
    horizon: Horizon,
) -> list[str]:
    """Seed, precision, attention, model, data and batch, one fact a line."""
    train = config.train
    assert train is not None
    device = str(runtime.device)
    if runtime.device.type == "cuda":
        device = torch.cuda.get_device_name(runtime.device)
    if train.global_batch is not None:
        batch = f"batch {train.global_batch} rows, cut as memory allows"
    else:
        micro_batch, accumulate = first_cut(train, runtime.world_size)
        group = micro_batch * accumulate * runtime.world_size
        batch = f"batch {group} rows = {micro_batch} x {accumulate} accumulated"
    length = f"{horizon.steps} steps" if horizon.steps else f"{horizon.seconds:.1f} s of training"
    lines = [
        f"stage {config.id} ({config.stage}): {length}, output {copies.origin(config.output)}",
        f"seed {train.seed}  precision {runtime.precision}  device {device} x {runtime.world_size}",
        f"attention {kind_of(model)}  flash-attn {flash_attention_status(runtime)}",
        f"model {copies.origin(config.model.name or 'random') if config.model else '?'}:"
        f" {parameter_count(model):,} parameters, vocabulary {len(tokenizer)}",
        f"{batch} x {runtime.world_size} workers, of {config.data.sequence_length} tokens",
    ]
    if config.data.curriculum:
        lines.append(f"curriculum: {words(config.data)}; a step has as many tokens at each length")
    if config.model is not None and config.model.compile:
        lines.append("each block is compiled as it first runs: the first steps may take minutes")
    for name, part, sources in (
        ("train", rows, config.data.train), ("validation", held_out, config.data.validation)
    ):  # fmt: skip
        if part is not None:
            lines += _data(name, part.summary, sources)
    return lines


def run_meta(
    config: StageConfig, job: Job, runtime: Runtime, environ: Mapping[str, str]
) -> dict[str, Any]:
    """The first state of `run_meta.json`; secrets are only said to be present."""
    return {
        "v": 1,
        "run": job.run,
        "attempt": job.attempt,
        "id": config.id,
        "stage": config.stage,
        "completed": False,
        "stopped": None,
        "steps": config.train.steps if config.train else None,
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": job.commit,
        "project": job.project,
        "hf_token_present": bool(environ.get("HF_TOKEN")),
        "device": str(runtime.device),
        "world_size": runtime.world_size,
        "precision": runtime.precision,
        "dry_run": job.dry_run,
    }


def _data(name: str, summary: Mapping[str, Any], sources: tuple[Source, ...]) -> list[str]:
    shown = {(i, x) for i, source in enumerate(summary["sources"]) for x in source["sample_ids"]}
    names = _given_names(sources, shown)
    lines = [
        f"{name} data: {summary['rows']} rows, {summary['tokens']:,} tokens"
        f" ({summary['supervised_tokens']:,} supervised), {summary['padding_share']:.2%} padding"
    ]
    for i, source in enumerate(summary["sources"]):
        unit = source.get("unit", "document")
        samples = ", ".join(names.get((i, x), x) for x in source["sample_ids"])
        lines.append(
            f"  {source['name']}: {_many(source['shards'], 'shard')},"
            f" {_many(source['documents'], unit)}, {source['tokens']:,} tokens;"
            f" samples {samples}"
        )
        if "truncated" in source:
            lines.append(f"    {_many(source['truncated'], unit)} cut at the end of a row")
        if "unsupervised" in source:
            count = _many(source["unsupervised"], unit)
            lines.append(f"    {count} left out: nothing to learn before the end of a row")
        if "skipped" in source:
            lines.append(f"    {_many(source['skipped'], 'bad line')} skipped:")
            lines += [f"      {what}" for what in source["skipped_lines"]]
    return lines


def _given_names(
    sources: tuple[Source, ...], shown: set[tuple[int, str]]
) -> dict[tuple[int, str], str]:
    """The `id` of those lines that have one; the others are better known by file and line."""
    found = sample_names(sources, shown)
    return {at: name for at, name in found.items() if not _by_place(at[1], name)}


def _by_place(document: str, name: str) -> bool:
    """Whether `name` is FILE-LINE, or that of a whole file."""
    file, _, line = document.rpartition(":")
    return name in (f"{Path(file).stem}-{line}", Path(document).stem)


def _many(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
