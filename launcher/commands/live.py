"""The live view of a run on a terminal. The only user of rich."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Optional

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher import console, records
from launcher.run import Run, StageState


class View:
    """A part of the terminal that is drawn again with each look; the last one stays."""

    def __init__(self) -> None:
        self._live = Live(console=Console(stderr=True), refresh_per_second=4)

    def __enter__(self) -> View:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._live.stop()

    def run(self, run: Run, now: float) -> None:
        self._live.update(draw(run, now))

    def lines(self, lines: Sequence[str]) -> None:
        self._live.update(Text.from_ansi("\n".join(lines), no_wrap=True))


def draw(run: Run, now: float) -> Group:
    """One run: its phase, its stages with a bar for the one that trains, money and warnings."""
    ended = run.ended if run.ended is not None else now
    head = Text.assemble(
        (run.name, "bold"),
        "  ",
        (run.phase.value, console.style(run.phase.value)),
        (f"  {console.duration(ended - run.created)}  spent {console.usd(run.spent_usd)}", "dim"),
    )
    stages = Table.grid(padding=(0, 2))
    for _ in range(6):
        stages.add_column(no_wrap=True)
    for stage in run.stages:
        stages.add_row(*_cells(run, stage))
    notes = [Text(text, style="yellow") for text in run.warnings]
    if run.ended is None:
        notes.append(Text("Ctrl-C detaches; the run goes on", style="dim"))
    return Group(head, stages, *notes)


def _cells(run: Run, stage: StageState) -> list[Text | ProgressBar]:
    phase = Text(stage.phase.value, style=console.style(stage.phase.value))
    last = run.progress
    if last.get("stage") != stage.id or stage.phase.over:
        return [Text(stage.id), phase, Text(""), Text(""), Text(""), Text("")]
    step, horizon = records.number(last.get("global_step")), records.number(last.get("steps"))
    bar: Text | ProgressBar = Text("")
    if step is not None and horizon:
        bar = ProgressBar(total=horizon, completed=step, width=24)
    eta = records.number(last.get("eta_seconds"))
    return [
        Text(stage.id, style="bold"),
        phase,
        bar,
        Text(console.steps(last)),
        Text(f"loss {console.figure(last.get('train_loss'))}"),
        Text(
            f"{console.figure(last.get('tokens_per_sec'), 0)} tokens/s"
            + (f"  ETA {console.duration(eta)}" if eta is not None else "")
        ),
    ]
