"""The blocks of a job that say what is read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Optional

from trainer.loading import Strict, require


@dataclass(frozen=True)
class Hub(Strict):
    """A dataset of the Hugging Face hub (or a local folder of one), by name and configuration."""

    name: str
    config: Optional[str] = None
    split: str = "train"


@dataclass(frozen=True)
class Source(Strict):
    """Where documents come from, exactly one of: `path` (file, folder or glob; .jsonl or .txt; a
    URI), `builtin` (text that is part of CPython), `hf` (a dataset of the hub) and `manifest` (a
    JSONL file of sources). `share` keeps that part of the documents, by hash."""

    path: Optional[str] = None
    builtin: Optional[
        Literal["python-reference", "python-questions", "python-preferences", "digits"]
    ] = None
    hf: Optional[Hub] = None
    manifest: Optional[str] = None
    split: Optional[Literal["train", "heldout"]] = None  # builtin sources: which topics
    #: None: what the stage reads by default; `auto`: seen in the first line of each file.
    format: Optional[Literal["auto", "text", "messages", "prompt", "preference", "math_tool"]] = (
        None
    )
    field: str = "text"  # the JSONL key that holds the text
    weight: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        given = [w for w in (self.path, self.builtin, self.hf, self.manifest) if w is not None]
        said_elsewhere = self.builtin is not None or self.manifest is not None
        require(
            self,
            path=(len(given) == 1, "give exactly one of `path`, `builtin`, `hf` and `manifest`"),
            split=(self.split is None or self.builtin is not None, "belongs to `builtin` sources"),
            format=(self.format is None or not said_elsewhere,
                    "belongs to `path` and `hf` sources (a manifest says `type` on each line)"),
            weight=(self.weight > 0, "must be greater than 0"),
            share=(0 < self.share <= 1, "must be in (0, 1]"),
        )  # fmt: skip


@dataclass(frozen=True)
class ToolUse(Strict):
    """`ratio`: the part of the `math_tool` documents, by hash, whose `CALL tool:"..."` lines are
    answered with a `RESULT:` line; what the tool says is read and not learned."""

    ratio: float

    def __post_init__(self) -> None:
        require(self, ratio=(0 <= self.ratio <= 1, "must be in [0, 1]"))


@dataclass(frozen=True)
class Phase(Strict):
    """Rows of `sequence_length` tokens `until` a share of the horizon (below 1) or a step."""

    sequence_length: int
    until: float

    def __post_init__(self) -> None:
        require(
            self,
            sequence_length=(self.sequence_length >= 2, "must be at least 2"),
            until=(self.until > 0 and (self.until < 1 or self.until == int(self.until)),
                   "must be a share of the horizon below 1, or a number of steps"),
        )  # fmt: skip


@dataclass(frozen=True)
class Data(Strict):
    """What is read and how rows are cut. With `packing`, several documents share a row of
    `sequence_length` tokens and never see each other; without, a row is one document.
    `curriculum`: phases of shorter rows that come first.
    `chat_template`: `chatml` or a Jinja file, in place of the one that the tokenizer brings."""

    train: tuple[Source, ...] = ()
    validation: tuple[Source, ...] = ()
    sequence_length: int = 1024
    curriculum: tuple[Phase, ...] = ()  # shorter rows first, and more of them
    packing: bool = True
    chat_template: Optional[str] = None
    tool_use: Optional[ToolUse] = None
    skip_bad: bool = False  # leave out and count lines that cannot be used, instead of stopping

    def __post_init__(self) -> None:
        require(
            self,
            sequence_length=(self.sequence_length >= 2, "must be at least 2"),
            curriculum=(not (wrong := self._of_curriculum()), wrong),
        )

    def _of_curriculum(self) -> str:
        """What is wrong with the phases, taken together; empty: nothing."""
        lengths = [phase.sequence_length for phase in self.curriculum]
        ends = [phase.until for phase in self.curriculum]
        if not lengths:
            return ""
        if not self.packing:
            return "needs `packing: true`: else a row is one text, however short"
        if odd := [n for n in lengths if n >= self.sequence_length or self.sequence_length % n]:
            return f"{odd[0]} must divide sequence_length ({self.sequence_length}) and be below it"
        if any(b <= a for a, b in pairwise(lengths)) or any(b <= a for a, b in pairwise(ends)):
            return "lengths and ends must ascend"
        if ends[0] < 1 <= ends[-1]:
            return "its ends must be all shares of the horizon (below 1), or all steps"
        return ""
