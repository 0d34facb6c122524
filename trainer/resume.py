"""Where a stage goes on from: its own newest checkpoint, or one of another run (`train.resume`).

The latter becomes the stage's own first one, and with it the best one of those before; from there
everything is as after an interruption. Nodes may have disks of their own: each looks at its own
folder, and they agree on what all of them have. What the state means is the loop's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trainer import adapters, copies, models
from trainer.checkpoint import CheckpointError, Checkpoints, newest, resolve
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
T = TypeVar("T")


def begin(
    folder: Path, config: StageConfig, tokens: Any, runtime: Runtime, say: Say
) -> tuple[Checkpoints | None, Path | None]:
    """The checkpoints of the stage's `folder` (None on ranks that do not write), and the one in it
    that its state is read from, if there is one: the newest that every node has whole, and the
    same. Errors, on all ranks alike: `CheckpointError`; `ConfigError` for a checkpoint of another
    model."""
    assert config.train is not None and config.model is not None
    root, reference, plan = folder / "checkpoints", config.train.resume, config.model
    checkpoints = Checkpoints(root, config.train.keep, warn=say) if runtime.main else None
    step = _agreed(root, runtime, say)
    if step is not None:
        ours = root / f"step-{step}"
        _together(runtime, lambda: check_model(ours, plan, tokens, f"stage {config.id}"))
    elif reference is not None:

        def take() -> int | None:
            if checkpoints is None:
                return None
            found = whole(reference, say)
            # Before it is taken for the stage's own.
            check_model(found, plan, tokens, "train.resume")
            adopt(found, checkpoints, say)
            return _step_of(found)

        taken = _together(runtime, take)[0]
        assert taken is not None
        _together(runtime, lambda: _follow(reference, taken, root))
        step = _agreed(root, runtime, say)
        if step != taken:
            raise CheckpointError(
                f"train.resume: the nodes read {reference} as different checkpoints; name one:"
                " checkpoints/step-N"
            )
    found = None if step is None else root / f"step-{step}"
    if found is not None and plan.adapter is not None:
        _warn_of_base(found, plan, say)
    return checkpoints, found


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


def _warn_of_base(found: Path, plan: Model, say: Say) -> None:
    """A line where the adapter in `found` was made for another model than `plan` names. Only the
    last names are compared: a run that moves has its models in other folders."""
    theirs, ours = adapters.base_of(found), resolve(str(plan.name))
    if Path(theirs).name != Path(ours).name:
        say(
            f"WARNING: the adapter in {found} was made for {copies.origin(theirs)}, and goes on on"
            f" {copies.origin(ours)}"
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


def _agreed(root: Path, runtime: Runtime, say: Say) -> int | None:
    """The newest step below `root` that is whole on every node, and the same there; None if there
    is none. One rank of a node looks. What a node has besides is left alone: a machine that kept
    its disk may be ahead of the store that the others were filled from."""
    until: int | None = None
    ahead: dict[int, int] = {}
    while True:
        mine = newest(root, say, until) if _first_of_node() else None
        seal = "" if mine is None else hashlib.sha256((mine / MANIFEST).read_bytes()).hexdigest()
        offer = (_first_of_node(), -1 if mine is None else _step_of(mine), seal)
        offers = {at: o[1:] for at, o in enumerate(runtime.gather(offer)) if o[0]}
        steps = [step for step, _ in offers.values()]
        ahead = ahead or dict(zip(offers, steps))
        if len(set(offers.values())) == 1 or min(steps) < 0:
            break
        until = min(steps) if len(set(steps)) > 1 else steps[0] - 1
    step = min(steps)
    if max(ahead.values()) > step:
        has = ", ".join(f"rank {at} step {n}" if n >= 0 else f"rank {at} none"
                        for at, n in ahead.items())  # fmt: skip
        begins = f"going on from step {step}" if step >= 0 else "beginning anew"
        say(f"WARNING: the nodes' newest checkpoints differ ({has}): {begins}, which all have")
    return step if step >= 0 else None


def _follow(reference: str, step: int, root: Path) -> None:
    """Take, on a node with a disk of its own, what rank 0 took. Errors: `CheckpointError`."""
    found = newest(root, until=step) if _first_of_node() else None
    if not _first_of_node() or (found is not None and _step_of(found) == step):
        return
    folder = Path(reference.removeprefix("file://"))
    if not (folder / MANIFEST).exists():
        folder = folder / "checkpoints" / f"step-{step}"
    if problems := verify(folder):
        raise CheckpointError(f"train.resume: {folder}: {problems[0]}")
    Checkpoints(root, keep=1).adopt(folder, step)


def _together(runtime: Runtime, act: Callable[[], T]) -> list[T]:
    """What `act` returns on each rank. Its error, if it fails on one, on all of them: else the
    others would wait for a peer that is gone."""
    value, error = None, None
    try:
        value = act()
    except (CheckpointError, ConfigError) as raised:
        error = raised
    kind = "" if error is None else type(error).__name__
    told = runtime.gather((value, kind, str(error)))
    if error is not None:
        raise error
    for _, kind, text in told:
        if kind:
            raise (ConfigError if kind == ConfigError.__name__ else CheckpointError)(text)
    return [value for value, _, _ in told]


def _first_of_node() -> bool:
    """Whether this rank speaks for the folders of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


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
