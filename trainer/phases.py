"""The phases of a curriculum of lengths: what they are in numbers, and where there may be one.
Standard library only; how rows are made of them is `data/curriculum.py`'s."""

from __future__ import annotations

from typing import Any, Optional

from trainer.config import KeyPath
from trainer.config_data import Data, Phase

#: Stages whose rows may change their length on the way.
STAGES = ("pretrain", "sft", "kd")
#: Those that lay out rows and cannot do that.
_OTHERS = ("sdce", "dpo", "ipo", "grpo", "targets")
_AT: KeyPath = ("data", "curriculum")


def problem(stage: Any) -> Optional[tuple[KeyPath, str]]:
    """Why a stage (of a recipe or of a job: `stage`, `data`, `train`, `kd`) cannot have the
    curriculum that it has, with the key to change; None: it can, or has none."""
    phases, train = stage.data.curriculum, stage.train
    if not phases:
        return None
    if stage.stage in _OTHERS:
        return _AT, f"stage '{stage.stage}' has no curriculum of lengths; leave it out"
    if stage.kd is not None and stage.kd.mode != "online":
        return _AT, "stored answers belong to rows of one length; leave it out, or ask the teacher"
    last = phases[-1].until
    if train is not None and train.steps is not None and last >= max(train.steps, 1):
        return _AT, f"no step of {train.steps} is left after step {last:g} for the whole length"
    return None


def mean_length(data: Data, steps: Optional[int] = None) -> float:
    """The mean over the horizon of the length of a row, in tokens: every step has as many tokens.
    `steps`: of the horizon. Where phases end at steps and it is not known, the whole length."""
    if data.curriculum and data.curriculum[0].until >= 1 and steps is None:
        return float(data.sequence_length)
    mean, begin = 0.0, 0.0
    for phase in data.curriculum:
        end = min(phase.until / steps if steps and phase.until >= 1 else phase.until, 1.0)
        mean += (end - begin) * phase.sequence_length
        begin = end
    return mean + (1.0 - begin) * data.sequence_length


def words(data: Data) -> str:
    """`128 tokens until 30%, 256 until step 600, then 512`."""
    parts = []
    for index, phase in enumerate(data.curriculum):
        end = f"step {phase.until:g}" if phase.until >= 1 else f"{phase.until * 100:.3g}%"
        parts.append(f"{phase.sequence_length}{'' if index else ' tokens'} until {end}")
    return ", ".join([*parts, f"then {data.sequence_length}"])


def shortened(data: Data, length: int) -> tuple[Phase, ...]:
    """The curriculum of `data` for rows of `length` tokens and any number of steps: lengths in the
    same proportion as far as they are whole, ends as shares."""
    kept = []
    for phase in data.curriculum:
        times = data.sequence_length // phase.sequence_length
        if length % times == 0 and length // times >= 2:
            kept.append(length // times)
    count = len(kept) + 1
    return tuple(Phase(size, (index + 1) / count) for index, size in enumerate(kept))
