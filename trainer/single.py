"""Stages that do one thing, without the loop: merge, export, smoke."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trainer import smoke as smoke_test
from trainer.export import export_model
from trainer.loop import Outcome
from trainer.merge import merge_adapter

if TYPE_CHECKING:
    from trainer.context import Context


def merge(context: Context) -> Outcome:
    """Add an adapter into its base model; rank 0 works, on the CPU."""
    config, started = context.config.merge, time.perf_counter()
    assert config is not None
    facts = merge_adapter(config, context.folder, context.say) if context.runtime.main else {}
    context.runtime.barrier()
    return Outcome(None, 0, time.perf_counter() - started, facts)


def export(context: Context) -> Outcome:
    """Write a model as a plain folder, or to the Hub; rank 0 works, on the CPU."""
    config, started = context.config.export, time.perf_counter()
    assert config is not None
    facts = export_model(config, context.folder, context.say) if context.runtime.main else {}
    context.runtime.barrier()
    return Outcome(None, 0, time.perf_counter() - started, facts)


def smoke(context: Context) -> Outcome:
    """Device, all-reduce and training on synthetic data. Errors: `SmokeFailed`."""
    config = context.config.smoke
    assert config is not None
    report = smoke_test.run(config, context.runtime, context.say)
    if context.metrics is not None:
        context.metrics.step(
            report.steps, train_loss=report.last, all_reduce_GB_per_sec=report.bandwidth
        )
    facts = {"first_loss": report.first, "last_loss": report.last}
    if report.bandwidth is not None:
        facts["all_reduce_GB_per_sec"] = report.bandwidth
    return Outcome(None, report.steps, report.seconds, facts)
