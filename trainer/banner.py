"""What a stage says about itself at the start, and what `run_meta.json` keeps."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Optional

import torch
from torch import nn

from trainer.config import Job, StageConfig
from trainer.data.stream import Rows
from trainer.models import flash_attention_status, parameter_count
from trainer.probe import first_cut
from trainer.runtime import Runtime
from trainer.schedule import Horizon

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "flash-attn")


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
        f"stage {config.id} ({config.stage}): {length}, output {config.output}",
        f"seed {train.seed}  precision {runtime.precision}  device {device} x {runtime.world_size}",
        f"attention {getattr(model.config, '_attn_implementation', '?')}"
        f"  flash-attn {flash_attention_status(runtime)}",
        f"model {config.model.name or 'random' if config.model else '?'}:"
        f" {parameter_count(model):,} parameters, vocabulary {len(tokenizer)}",
        f"{batch} x {runtime.world_size} workers, of {config.data.sequence_length} tokens",
    ]
    for name, part in (("train", rows), ("validation", held_out)):
        if part is not None:
            lines += _data(name, part.summary)
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


def _data(name: str, summary: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{name} data: {summary['rows']} rows, {summary['tokens']:,} tokens"
        f" ({summary['supervised_tokens']:,} supervised), {summary['padding_share']:.2%} padding"
    ]
    for source in summary["sources"]:
        lines.append(
            f"  {source['name']}: {_many(source['shards'], 'shard')},"
            f" {_many(source['documents'], 'document')}, {source['tokens']:,} tokens;"
            f" samples {', '.join(source['sample_ids'])}"
        )
        if "truncated" in source:
            lines.append(f"    {_many(source['truncated'], 'document')} cut at the end of a row")
        if "unsupervised" in source:
            count = _many(source["unsupervised"], "document")
            lines.append(f"    {count} left out: nothing to learn before the end of a row")
        if "skipped" in source:
            lines.append(f"    {_many(source['skipped'], 'bad line')} skipped:")
            lines += [f"      {what}" for what in source["skipped_lines"]]
    return lines


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
