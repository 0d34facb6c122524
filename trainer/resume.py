"""Where a stage goes on from: its own newest checkpoint, or one of another run (`train.resume`).

The latter becomes the stage's own first one, and with it the best one of those before; from there
everything is as after an interruption. What the state means is the loop's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import adapters, models
from trainer.checkpoint import CheckpointError, Checkpoints, resolve
from trainer.config import ConfigError, Model, StageConfig
from trainer.manifest import MANIFEST, verify
from trainer.runtime import Runtime

_STEP = re.compile(r"step-(\d+)")
#: What of a configuration decides the names and shapes of weights, and what they compute.
_SHAPE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip

Say = Callable[[str], None]


def begin(
    folder: Path, config: StageConfig, tokens: Any, runtime: Runtime, say: Say
) -> tuple[Checkpoints | None, Path | None]:
    """The checkpoints of the stage's `folder` (None on ranks that do not write), and the one that
    its state is read from, if there is one: rank 0 looks and verifies, for all.
    Errors: `CheckpointError`; `ConfigError` for a checkpoint of another model."""
    assert config.train is not None and config.model is not None
    checkpoints, found = None, None
    if runtime.main:
        checkpoints = Checkpoints(folder / "checkpoints", config.train.keep, warn=say)
        found = checkpoints.newest()
        if found is not None:
            check_model(found, config.model, tokens, f"stage {config.id}")
        elif config.train.resume is not None:
            found = whole(config.train.resume, say)
            # Before it is taken for the stage's own.
            check_model(found, config.model, tokens, "train.resume")
            adopt(found, checkpoints, say)
    newest = runtime.gather(str(found or ""))[0]
    return checkpoints, Path(newest) if newest else None


def adopt(found: Path, checkpoints: Checkpoints, say: Say) -> None:
    """Make a whole checkpoint one of `checkpoints`, and with it the best one of those before it.
    Errors: `CheckpointError`."""
    step = _step_of(found)
    checkpoints.adopt(found, step)
    best = _best(found.parent)
    if best is not None and best[0] < step:
        place = found.parent / f"step-{best[0]}"
        if problems := verify(place):
            say(f"WARNING: train.resume: the best checkpoint {place} stays behind: {problems[0]}")
        else:
            checkpoints.adopt(place, best[0])
            checkpoints.mark_best(*best)
    say(f"train.resume: step {step} of {found.parent.parent}")


def check_model(found: Path, plan: Model, tokens: Any, what: str) -> None:
    """Errors: `ConfigError` where the checkpoint `found` is of another model than `plan` says;
    `what` asked for it."""
    hint = "; resume with the model it was trained with, or start a new run"
    if adapters.is_adapter(found) != (plan.adapter is not None):
        held, asked = ("an adapter", "none") if plan.adapter is None else ("a model", "an adapter")
        raise ConfigError(f"{what}: {found} holds {held}, model.adapter asks for {asked}{hint}")
    if plan.adapter is not None:  # its shapes are compared when it is loaded
        return
    theirs = models.configuration(Model(name=str(found)), tokens)
    ours = models.configuration(plan, tokens)
    for name in _SHAPE:
        before, now = getattr(theirs, name, None), getattr(ours, name, None)
        if before != now:
            raise ConfigError(
                f"{what}: {found} is of another model: {name} is {before} there, {now} here{hint}"
            )


def whole(reference: str, say: Say) -> Path:
    """The newest whole checkpoint of a stage folder, or the checkpoint that `reference` is itself.
    Errors: `CheckpointError`."""
    folder = Path(reference.removeprefix("file://"))
    if not (folder / MANIFEST).exists():
        try:
            path = Path(resolve(reference, lambda line: say(f"WARNING: {line}")))
        except CheckpointError as error:
            raise CheckpointError(f"train.resume: {error}") from error
        if not _STEP.fullmatch(path.name):
            raise CheckpointError(
                f"train.resume: {reference} is not the folder of a stage that trains, nor one of"
                " its checkpoints/step-N"
            )
        return path
    if problems := verify(folder):
        raise CheckpointError(f"train.resume: {folder}: {problems[0]}")
    return folder.absolute()


def _step_of(folder: Path) -> int:
    """Of a folder that verifies."""
    return int(json.loads((folder / MANIFEST).read_bytes())["step"])


def _best(root: Path) -> tuple[int, float | None] | None:
    """(step, val_loss) of the pointer to the best checkpoint, if there is one."""
    try:
        pointer = json.loads((root / "best.json").read_bytes())
        return int(pointer["step"]), pointer.get("val_loss")
    except (OSError, ValueError, KeyError, TypeError):
        return None
