"""Runs that lie in a home as if they had happened: real journals, and what a trainer leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from launcher import view
from launcher.backends.base import Env, Ref
from launcher.clock import ManualClock
from launcher.journal import Journal
from launcher.run import Run

#: When recorded runs begin.
START = 1_790_000_000.0
GATE_LINE = "kd.val_loss 5.200000 is 0.900000 below ce.val_loss 6.100000 (needed 0.1): passed"


class Recorder:
    """One run. Its clock moves only when told to."""

    def __init__(
        self,
        home: Path,
        *,
        number: int = 1,
        recipe: str = "quickstart",
        backend: str = "local",
        stages: Sequence[tuple[str, str]] = (("kd", "kd"), ("ce", "pretrain")),
    ) -> None:
        self.clock = ManualClock(START + number * 1000)
        self.env = Env(home, {}, self.clock, "me", "python3")
        self.id = f"{int(self.clock.now() * 100):010x}{number:06x}"
        self.name = f"{recipe}-{self.id[-6:]}"
        self.place = home / "runs" / self.id
        self.root = self.place / "artifacts"
        self.journal = Journal(self.place, self.root, self.clock)
        self.facts: dict[str, Any] = {
            "id": self.id, "name": self.name, "recipe": recipe, "fingerprint": "f" * 64,
            "owner": "me", "root": str(self.root), "created": self.clock.now(),
        }  # fmt: skip
        self.place.mkdir(parents=True)
        (self.place / "run.json").write_text(json.dumps({"v": 1, **self.facts}))
        self.ids = [stage for stage, _ in stages]
        self.journal.append(
            "created",
            **{**self.facts, "recipe": {"name": recipe}},
            stages=[
                {"id": s, "stage": kind, "job": 0, "folder": str(self.root / s)}
                for s, kind in stages
            ],
            jobs=[{"index": 0, "name": self.job, "backend": backend, "stages": self.ids}],
            bundle={"path": "/nowhere.tar.gz", "sha256": "0" * 64, "bytes": 1},
        )
        self.backend = backend

    @property
    def job(self) -> str:
        return f"{self.name}-j0"

    def ref(self, attempt: int) -> Ref:
        return Ref(self.backend, "process", f"{self.job}-a{attempt}", "here", self.id)

    def begin(self, attempt: int = 1) -> None:
        intent = {"kind": "process", "name": self.ref(attempt).name, "place": "here", "request": {}}
        offer = {"place": "here", "capacity": "standard", "usd_per_hour": 0.0}
        self.journal.append("intent", job=0, attempt=attempt, intent=intent, offer=offer)
        self.journal.append("ref", job=0, attempt=attempt, ref=self.ref(attempt))
        self.phase("running", "live", attempt)

    def phase(
        self,
        phase: str,
        held: str,
        attempt: int = 1,
        why: str = "",
        exit_code: Optional[int] = None,
    ) -> None:
        self.journal.append(
            "phase", job=0, attempt=attempt, phase=phase, held=held, why=why, exit_code=exit_code
        )

    def stage(self, stage: str, phase: str) -> None:
        self.journal.append("stage", id=stage, phase=phase)

    def gate(self, stage: str, passed: bool, *lines: str) -> None:
        self.journal.append("gate", id=stage, passed=passed, lines=list(lines))

    def end(self, phase: str = "succeeded", exit_code: int = 0, why: str = "") -> None:
        self.phase(phase, "live", why=why, exit_code=exit_code)
        self.journal.append("gone", job=0, attempt=1, ref=self.ref(1))
        self.journal.append("end", phase=phase, why=why, exit_code=exit_code)

    def run(self) -> Run:
        return view.look(self.env, self.facts)

    def log(self, worker: int, lines: Sequence[str], attempt: int = 1, every: float = 0.5) -> None:
        """Log lines, `every` seconds apart, as boot writes them."""
        from launcher.console import moment

        part = self.root / "logs" / f"worker-{worker}" / f"00-{attempt:04d}.log"
        part.parent.mkdir(parents=True, exist_ok=True)
        start = self.clock.now()
        with part.open("a") as out:
            for number, text in enumerate(lines):
                out.write(f"{moment(start + number * every)} {text}\n")

    def metrics(self, stage: str, lines: Sequence[dict[str, Any]], attempt: int = 1) -> None:
        write_part(self.root / stage, lines, stage, attempt)

    def train(self, stage: str, steps: int = 100, start: float = 7.5, end: float = 5.0) -> None:
        """The files of a stage that trained `steps` steps and got from `start` to `end`."""
        loss = [end + (start - end) * math.exp(-3 * step / steps) for step in range(steps + 1)]
        lines: list[dict[str, Any]] = [
            {
                "kind": "step", "global_step": step, "train_loss": loss[step], "steps": steps,
                "lr": 3e-3 * min(1.0, step / 20) * (1 - 0.9 * step / steps),
                "tokens_per_sec": 8000.0 + 300 * math.sin(step), "time": START + step,
            }
            for step in range(10, steps + 1, 10)
        ]  # fmt: skip
        lines += [
            {
                "kind": "eval",
                "global_step": step,
                "val_loss": loss[step] + 0.2,
                "time": START + step,
            }
            for step in range(25, steps + 1, 25)
        ]
        lines.append({"kind": "event", "global_step": 40, "event": "nan_skipped", "time": START})
        self.metrics(stage, lines)
        folder = self.root / stage
        meta = {
            "v": 1, "completed": True, "global_step": steps, "training_seconds": 12.5,
            "parameters": 418_000.0, "device": "cpu", "precision": "fp32",
            "versions": {"torch": "2.13.0", "python": "3.11.7"},
        }  # fmt: skip
        evaluation = {"val_loss": loss[-1] + 0.2, "best_val_loss": loss[-1], "best_step": steps}
        (folder / "run_meta.json").write_text(json.dumps(meta))
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        (folder / "args_snapshot.json").write_text(json.dumps({"train": {"seed": 17}}))


def write_part(
    folder: Path, lines: Sequence[dict[str, Any]], stage: str = "kd", attempt: int = 1
) -> Path:
    """Append metrics lines to the part of one attempt."""
    part = folder / "metrics" / f"{attempt:04d}.jsonl"
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a") as out:
        for line in lines:
            out.write(json.dumps({"v": 1, "attempt": attempt, "stage": stage, **line}) + "\n")
    return part


def quickstart(home: Path, number: int = 1) -> Recorder:
    """A pipeline of two trainings and a comparison, ended well, with its gate passed."""
    stages = (("kd", "kd"), ("ce", "pretrain"), ("compare", "evaluate"))
    made = Recorder(home, number=number, stages=stages)
    made.begin()
    made.train("kd", end=4.9)
    made.train("ce", end=5.8)
    rows = [
        {"model": "student-kd", "parameters": 418_000, "val_loss": 5.2, "val_tokens": 9169},
        {"model": "student-ce", "parameters": 418_000, "val_loss": 6.1, "val_tokens": 9169},
    ]
    made.metrics("compare", [{"kind": "table", "global_step": 0, "rows": rows, "time": START}])
    for stage in made.ids:
        made.stage(stage, "succeeded")
    made.gate("compare", True, GATE_LINE)
    made.clock.sleep(95)
    made.end()
    return made
