"""The smallest changes of a stage that make it fit, each verified by computing it again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

from launcher import hardware
from launcher.fit.memory import TRAINING, memory
from launcher.fit.parts import Memory
from launcher.hardware import Accelerator
from launcher.shapes import Shapes
from launcher.spec import Stage
from trainer.config import Adapter

#: Where a backend's machines are listed; others have no table to choose from.
CLOUDS = {"vertex": "gcp"}
_RANK = 16
_ADAPTER = f"model.adapter.rank={_RANK}"
#: Experts are one tensor, which no adapter fits, and the trainer refuses to pass over them unasked.
_ATTENTION = "model.adapter.targets=[q_proj, k_proj, v_proj, o_proj]"
_EMBEDDINGS = "model.embed_tokens.*"


@dataclass(frozen=True)
class Change:
    """What would make a stage fit: `what` in words, the `--set` arguments (KEY=VALUE) that do it,
    and the memory that it then takes."""

    what: str
    settings: tuple[str, ...]
    memory: Memory


class _Try(NamedTuple):
    what: str
    settings: tuple[str, ...]
    stage: Stage
    accelerator: Accelerator


def changes(
    stage: Stage, accelerator: Accelerator, nodes: int, shapes: Shapes, prefix: str = ""
) -> tuple[Change, ...]:
    """What makes the stage fit, best first: smaller micro-batches, gradient checkpointing, frozen
    embeddings, an adapter, the next larger accelerator; of each kind the smallest that does. Where
    none of them does alone, the smallest combination. Empty: it fits as it is, nothing is known, or
    nothing helps. `prefix`: of the keys, such as `pipeline.ID.`."""
    now = memory(stage, accelerator, nodes, shapes)
    if now is None or now.fits is not False:
        return ()

    fused = "model" in shapes and shapes["model"].experts > 0

    def made(tried: _Try) -> Optional[Change]:
        found = memory(tried.stage, tried.accelerator, nodes, shapes)
        if found is None or not found.fits:
            return None
        settings = [*tried.settings]
        if fused and _ADAPTER in settings:
            settings.insert(settings.index(_ADAPTER) + 1, _ATTENTION)
        return Change(tried.what, tuple(prefix + s for s in settings), found)

    alone: dict[str, Change] = {}  # by the key that it sets first
    for tried in _singles(stage, accelerator):
        key = tried.settings[0].partition("=")[0]
        if key not in alone and (change := made(tried)) is not None:
            alone[key] = change
    if alone:
        return tuple(alone.values())
    for tried in _combined(stage, accelerator):
        if (change := made(tried)) is not None:
            return (change,)
    return ()


def _singles(stage: Stage, accelerator: Accelerator) -> Iterator[_Try]:
    here = _Try("", (), stage, accelerator)
    yield from _smaller(here)
    for step in (_checkpointing, _frozen, _adapter):
        if (tried := step(here)) is not None:
            yield tried
    yield from _larger(here)


def _combined(stage: Stage, accelerator: Accelerator) -> Iterator[_Try]:
    """Checkpointing with ever smaller micro-batches; with the smallest, frozen embeddings or an
    adapter; then larger accelerators with as few of these as will do."""
    at = _Try("", (), stage, accelerator)
    ladder = [at]
    if (checkpointing := _checkpointing(at)) is not None:
        ladder.append(checkpointing)
    base = ladder[-1]
    ladder += [_both(base, tried) for tried in _smaller(at)]
    base = ladder[-1]
    ladder += [rung for rung in (_frozen(base), _adapter(base)) if rung is not None]
    yield from ladder[1:]
    for rung in ladder:
        yield from _larger(rung)


def _both(first: _Try, second: _Try) -> _Try:
    """`second` on top of `first`; both were made from the same stage."""
    stage = replace(first.stage, train=second.stage.train, targets=second.stage.targets)
    what = " and ".join(text for text in (first.what, second.what) if text)
    return _Try(what, (*first.settings, *second.settings), stage, first.accelerator)


def _smaller(at: _Try) -> Iterator[_Try]:
    """Half the rows of a micro-batch, and twice as many of them: the same global batch."""
    train = at.stage.train
    if at.stage.targets is not None and at.stage.targets.micro_batch > 1:
        rows = at.stage.targets.micro_batch
        while rows > 1:
            rows //= 2
            stage = replace(at.stage, targets=replace(at.stage.targets, micro_batch=rows))
            what = f"{rows} {_rows(rows)} in a forward pass"
            yield _Try(what, (f"targets.micro_batch={rows}",), stage, at.accelerator)
        return
    if train is None or isinstance(train.micro_batch, str):
        return
    whole = train.micro_batch * train.accumulate
    rows = train.micro_batch
    while rows > 1:
        rows //= 2
        if whole % rows:
            continue
        smaller = replace(train, micro_batch=rows, accumulate=whole // rows)
        settings = (f"train.micro_batch={rows}", f"train.accumulate={whole // rows}")
        what = f"{rows} {_rows(rows)} in a micro-batch, of the same {whole} in a step"
        yield _Try(what, settings, replace(at.stage, train=smaller), at.accelerator)


def _rows(number: int) -> str:
    return "row" if number == 1 else "rows"


def _checkpointing(at: _Try) -> Optional[_Try]:
    model = at.stage.model
    if at.stage.stage not in TRAINING or model is None or model.gradient_checkpointing:
        return None
    stage = replace(at.stage, model=replace(model, gradient_checkpointing=True))
    return _added(at, "gradient checkpointing", "model.gradient_checkpointing=true", stage)


def _frozen(at: _Try) -> Optional[_Try]:
    model = at.stage.model
    if at.stage.stage not in TRAINING or model is None or model.adapter is not None:
        return None
    if model.init == "random" or _EMBEDDINGS in model.freeze:
        return None
    patterns = (*model.freeze, _EMBEDDINGS)
    stage = replace(at.stage, model=replace(model, freeze=patterns))
    said = ", ".join(f'"{pattern}"' for pattern in patterns)
    return _added(at, "frozen embeddings", f"model.freeze=[{said}]", stage)


def _adapter(at: _Try) -> Optional[_Try]:
    model = at.stage.model
    if at.stage.stage not in TRAINING or model is None or model.adapter is not None:
        return None
    if model.init == "random":
        return None
    stage = replace(at.stage, model=replace(model, adapter=Adapter(rank=_RANK), freeze=()))
    made = _added(at, f"an adapter of rank {_RANK}", _ADAPTER, stage)
    if model.freeze:  # its patterns may name nothing there
        made = made._replace(settings=(*made.settings, "model.freeze=[]"))
    return made


def _added(at: _Try, what: str, setting: str, stage: Stage) -> _Try:
    words = f"{at.what} and {what}" if at.what else what
    return _Try(words, (*at.settings, setting), stage, at.accelerator)


def _larger(at: _Try) -> Iterator[_Try]:
    """Accelerators with more memory that the backend has machines for, the smallest first."""
    cloud = CLOUDS.get(at.stage.hardware.backend)
    if cloud is None:
        return
    kinds = [kind for kind in hardware.KINDS if kind.name in hardware.kinds(cloud)]
    for kind in sorted(kinds, key=lambda kind: (kind.memory_gib, kind.bf16_tflops)):
        if kind.memory_gib <= at.accelerator.kind.memory_gib:
            continue
        sizes = [n for n in hardware.counts(kind, cloud) if n >= at.accelerator.count]
        count = min(sizes, default=math.inf)
        if count == math.inf:
            continue
        other = Accelerator(kind, int(count))
        settings = [f"hardware.accelerator={other}"]
        vertex = at.stage.hardware.vertex
        if vertex is not None and vertex.machine is not None:
            settings.append(f"hardware.vertex.machine={hardware.machine(other, cloud)}")
        what = f"{at.what} and {other}" if at.what else str(other)
        yield _Try(what, (*at.settings, *settings), at.stage, other)
