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

#: What Ctrl-C does to most commands that follow.
DETACHES = "Ctrl-C detaches; the run goes on"
#: Numbers of the stage that trains, the most telling first.
_FACTS = 3


class View:
    """A part of the terminal that is drawn again with each look; the last one stays. `hint`: what
    Ctrl-C does, shown while a run lasts."""

    def __init__(self, hint: str = DETACHES) -> None:
        self._hint = hint
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

    def run(self, run: Run, now: float, late: float = 0.0) -> None:
        self._live.update(draw(run, now, self._live.console.width, self._hint, late))

    def lines(self, lines: Sequence[str]) -> None:
        self._live.update(Text.from_ansi("\n".join(lines), no_wrap=True))


def draw(run: Run, now: float, width: int = 80, hint: str = DETACHES, late: float = 0.0) -> Group:
    """One run: its phase, its stages, the newest numbers of the one that trains, as far as `width`
    columns have room, a bar in what they leave, its warnings. `late`: seconds for which the last
    lines of a run that is over are awaited; they are what the clock shows meanwhile."""
    lasted = console.duration(run.lasted(now))
    head = Text.assemble(
        (console.plain(run.name), "bold"),
        "  ",
        (console.phase(run), console.style(console.phase(run))),
        ("" if late else f"  {lasted}", "dim"),
        (f"  spent {console.spent(run)}", "dim"),
    )
    for facts in range(_FACTS, -1, -1):
        rows = [_cells(run, stage, facts) for stage in run.stages]
        used = sum(max(len(cell) for cell in column) + 2 for column in zip(*rows))
        if used <= width:
            break
    table = Table.grid(padding=(0, 2))
    for _ in range(5):
        table.add_column(no_wrap=True)
    for stage, cells in zip(run.stages, rows):
        table.add_row(*cells, _bar(run, stage, min(24, width - used - 2)))
    notes = [Text(console.plain(text), style="yellow") for text in run.warnings]
    if to_come := console.outlook(run):
        notes.insert(0, Text(to_come, style="dim"))
    if late:
        notes.append(Text(f"waiting for the last log lines: {late:.0f} s", style="dim"))
    if run.ended is None:
        notes.append(Text(hint, style="dim"))
    return Group(head, table, *notes)


def _cells(run: Run, stage: StageState, count: int) -> list[Text]:
    word = console.stage_phase(run, stage)
    phase = Text(word, style=console.style(word))
    if not _training(run, stage):
        return [Text(stage.id), phase, Text(""), Text("")]
    last = run.progress
    facts = [f"loss {console.figure(last.get('train_loss'))}"]
    facts.append(f"{console.figure(last.get('tokens_per_sec'), 0)} tokens/s")
    eta = records.number(last.get("eta_seconds"))
    if eta is not None:
        facts.append(f"ETA {console.duration(eta)}")
    shown = Text("  ".join(facts[:count]))
    return [Text(stage.id, style="bold"), phase, Text(console.steps(last)), shown]


def _bar(run: Run, stage: StageState, width: int) -> Text | ProgressBar:
    step = records.number(run.progress.get("global_step"))
    horizon = records.number(run.progress.get("steps"))
    if not _training(run, stage) or step is None or not horizon or width < 6:
        return Text("")
    return ProgressBar(total=horizon, completed=step, width=width)


def _training(run: Run, stage: StageState) -> bool:
    return run.progress.get("stage") == stage.id and not stage.phase.over
