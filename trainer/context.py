"""What every stage gets, and the one question that it may ask about its job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from torch import nn

from trainer.config import Job, StageConfig
from trainer.data.stream import Rows
from trainer.metrics import Metrics
from trainer.runtime import Runtime


@dataclass(frozen=True)
class Context:
    """What every stage gets. `metrics` is None on ranks that do not write; `rows` are those that a
    training stage has laid out, `held_out` those of its validation, `model` the one that it trains:
    `fresh` as the stage first found it, a resumed one is not. `ready` is what the stage made
    before."""

    config: StageConfig
    job: Job
    runtime: Runtime
    metrics: Optional[Metrics]
    say: Callable[[str], None]
    signalled: Callable[[], bool]
    rows: Optional[Rows] = None
    held_out: Optional[Rows] = None
    model: Optional[nn.Module] = None
    fresh: bool = True
    ready: Any = None

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def stop_asked(self) -> bool:
        return stop_asked(self.job)


def stop_asked(job: Job) -> bool:
    """Whether the marker asks the job to end."""
    return job.control is not None and (Path(job.control) / "stop.json").exists()
