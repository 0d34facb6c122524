"""The smallest changes of a stage that make it fit, each verified by computing it again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Optional, Union

from launcher import hardware
from launcher.fit.memory import TRAINING, memory
from launcher.fit.parts import Memory
from launcher.hardware import Accelerator
from launcher.shapes import Shapes
from launcher.spec import Stage
from trainer.config import Adapter, Train
from trainer.config_train import refused

#: Where a backend's machines are listed; others have no table to choose from.
CLOUDS = {"vertex": "gcp"}
_RANK = 16
_EMBEDDINGS = "model.embed_tokens.*"
#: A machine outside the recipe's places counts this many times its price: data, quota and service
#: accounts are in those places.
_ELSEWHERE = 2.0


@dataclass(frozen=True)
class Change:
    """What would make a stage fit: `what` in words, the `--set` arguments (KEY=VALUE) that do it,
    the memory that it then takes, and its `effect`: what it changes of the training or its price,
    empty where the training stays the same."""

    what: str
    settings: tuple[str, ...]
    memory: Memory
    effect: str = ""


class _Try(NamedTuple):
    stage: Stage
    accelerator: Accelerator
    what: tuple[str, ...] = ()
    settings: Mapping[str, str] = {}
    effect: tuple[str, ...] = ()

    def with_(self, stage: Stage, what: str, settings: Mapping[str, str], effect: str = "") -> _Try:
        """This and one more: a later setting of a key takes the place of an earlier one."""
        effects = (*self.effect, effect) if effect else self.effect
        merged = {**self.settings, **settings}
        return _Try(stage, self.accelerator, (*self.what, what), merged, effects)


def changes(
    stage: Stage, accelerator: Accelerator, nodes: int, shapes: Shapes, prefix: str = ""
) -> tuple[Change, ...]:
    """What makes the stage fit, best first. What keeps the training the same: smaller
    micro-batches, gradient checkpointing, several workers sharing the model, or where none is
    enough, both of the former, and then all. Then what changes it:
    frozen embeddings, an adapter, each with as few of the former as it needs; where none of these
    helps, an adapter on a base of 4 bits. Last the accelerator
    with more memory that costs least an hour by the table of prices, with as many rows in a step.
    Empty: it fits as it is, nothing is known, or nothing helps. `prefix`: of the keys, such as
    `pipeline.ID.`."""
    now = memory(stage, accelerator, nodes, shapes)
    if now is None or now.fits is not False:
        return ()

    fused = "model" in shapes and shapes["model"].fused_experts  # 4 bits do not reach them

    def first(tries: Iterator[_Try]) -> Optional[Change]:
        for tried in tries:
            found = memory(tried.stage, tried.accelerator, nodes, shapes)
            if found is not None and found.fits:
                settings = tuple(f"{prefix}{key}={value}" for key, value in tried.settings.items())
                return Change(" and ".join(tried.what), settings, found, "; ".join(tried.effect))
        return None

    here = _Try(stage, accelerator)
    same = [first(way) for way in (_smaller(here), _checkpointing(here), _sharded(here, nodes))]
    if not any(same):
        same = [first(_both(here))]
    if not any(same):
        same = [first(eased for split in _sharded(here, nodes) for eased in _eased(split))]
    ease = _eased if not any(same) else _plainly
    other = [first(ease(changed)) for step in (_frozen, _adapter) for changed in step(here)]
    if not any(same) and not any(other) and not fused:
        other += [first(ease(changed)) for changed in _nf4(here)]
    larger = first(rung for moved in _larger(here, nodes) for rung in _eased(moved))
    return tuple(change for change in (*same, *other, larger) if change is not None)


def same_rows(train: Train, now: int, then: int) -> Optional[Train]:
    """`train` with the same rows in a step by `then` devices for `now`: fewer micro-batches, or
    smaller ones; None: they cannot be shared evenly."""
    if isinstance(train.micro_batch, str):  # train.global_batch is shared by itself
        return train
    whole = train.micro_batch * train.accumulate * now
    if whole % then:
        return None
    each = whole // then
    rows = max(n for n in range(1, min(train.micro_batch, each) + 1) if each % n == 0)
    return replace(train, micro_batch=rows, accumulate=each // rows)


def _eased(at: _Try) -> Iterator[_Try]:
    """`at` itself, then with what keeps the training the same, the least first."""
    yield at
    yield from _smaller(at)
    yield from _checkpointing(at)
    yield from _both(at)


def _plainly(at: _Try) -> Iterator[_Try]:
    yield at


def _both(at: _Try) -> Iterator[_Try]:
    for checkpointing in _checkpointing(at):
        yield from _smaller(checkpointing)


def _smaller(at: _Try) -> Iterator[_Try]:
    """Half the rows of a micro-batch, and twice as many of them: the same global batch."""
    train = at.stage.train
    if at.stage.targets is not None:
        rows = at.stage.targets.micro_batch
        while rows > 1:
            rows //= 2
            stage = replace(at.stage, targets=replace(at.stage.targets, micro_batch=rows))
            what = f"{rows} {_rows(rows)} in a forward pass"
            yield at.with_(stage, what, {"targets.micro_batch": str(rows)})
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
        settings = {"train.micro_batch": str(rows), "train.accumulate": str(whole // rows)}
        what = f"{rows} {_rows(rows)} in a micro-batch, of the same {whole} in a step"
        yield at.with_(replace(at.stage, train=smaller), what, settings)


def _rows(number: int) -> str:
    return "row" if number == 1 else "rows"


def _checkpointing(at: _Try) -> Iterator[_Try]:
    """First what repeats no product, then what repeats all."""
    model = at.stage.model
    if at.stage.stage not in TRAINING or model is None or model.gradient_checkpointing is True:
        return
    ways: dict[str, Union[Literal["selective"], bool]] = {
        "selective checkpointing": "selective",
        "gradient checkpointing": True,
    }
    for what, how in ways.items():
        if how == model.gradient_checkpointing:
            continue
        stage = replace(at.stage, model=replace(model, gradient_checkpointing=how))
        yield at.with_(stage, what, {"model.gradient_checkpointing": str(how).lower()})


def _sharded(at: _Try, nodes: int) -> Iterator[_Try]:
    """Several workers with a part of the model each, where every one has all of it."""
    train, model = at.stage.train, at.stage.model
    if at.stage.stage not in TRAINING or train is None or model is None:
        return
    if train.parallel == "fsdp" or at.accelerator.count * nodes == 1:
        return
    packed = model.adapter is not None and model.adapter.quantization == "nf4"
    if packed or refused(at.stage.stage, "fsdp"):
        return
    stage = replace(at.stage, train=replace(train, parallel="fsdp"))
    yield at.with_(stage, "a part of the model on each worker", {"train.parallel": "fsdp"})


def _frozen(at: _Try) -> Iterator[_Try]:
    model = at.stage.model
    if at.stage.stage not in TRAINING or model is None or model.adapter is not None:
        return
    if model.init == "random" or _EMBEDDINGS in model.freeze:
        return
    patterns = (*model.freeze, _EMBEDDINGS)
    stage = replace(at.stage, model=replace(model, freeze=patterns))
    said = ", ".join(f'"{pattern}"' for pattern in patterns)
    settings = {"model.freeze": f"[{said}]"}
    yield at.with_(stage, "frozen embeddings", settings, "the embeddings do not learn")


def _adapter(at: _Try) -> Iterator[_Try]:
    model = at.stage.model
    if at.stage.stage not in TRAINING or model is None or model.adapter is not None:
        return
    if model.init == "random":
        return
    stage = replace(at.stage, model=replace(model, adapter=Adapter(rank=_RANK), freeze=()))
    settings = {"model.adapter.rank": str(_RANK)}
    if model.freeze:  # its patterns may name nothing there
        settings["model.freeze"] = "[]"
    yield at.with_(
        stage, f"an adapter of rank {_RANK}", settings, "only the adapter learns, not the model"
    )


def _nf4(at: _Try) -> Iterator[_Try]:
    """An adapter, the one that is asked for or another, on a base of 4 bits."""
    model = at.stage.model
    for made in [at] if model is not None and model.adapter is not None else _adapter(at):
        asked = made.stage.model
        if at.stage.stage not in TRAINING or asked is None or asked.adapter is None:
            continue
        if asked.adapter.quantization == "nf4" or asked.adapter.experts:
            continue
        packed = replace(asked.adapter, quantization="nf4")
        stage = replace(made.stage, model=replace(asked, adapter=packed))
        settings = {"model.adapter.quantization": "nf4"}
        yield made.with_(stage, "a base of 4 bits", settings, "the base is rounded to 4 bits")


def _larger(at: _Try, nodes: int) -> list[_Try]:
    """Accelerators with more memory that the backend has machines for, the cheapest first; where
    no price is known, the smallest first, after those."""
    cloud = CLOUDS.get(at.stage.hardware.backend)
    if cloud is None:
        return []
    found: list[tuple[tuple[float, float, float], _Try]] = []
    for kind in hardware.KINDS:
        sizes = [n for n in hardware.counts(kind, cloud) if n >= at.accelerator.count]
        if not sizes or kind.memory_gib <= at.accelerator.kind.memory_gib:
            continue
        other = Accelerator(kind, min(sizes))
        rate, place = _rate(other, cloud, at.stage)
        weight = rate if place is None else rate * _ELSEWHERE
        moved = _moved(at, other, cloud, rate * nodes, place)
        found.append(((weight, kind.memory_gib, kind.bf16_tflops), moved))
    return [moved for _, moved in sorted(found, key=lambda pair: pair[0])]


def _rate(other: Accelerator, cloud: str, stage: Stage) -> tuple[float, Optional[str]]:
    """USD an hour of one machine where it costs least in the capacities of the stage, and that
    region if it is not among its places; infinite: not known."""
    asked = stage.hardware
    known: list[tuple[float, str]] = []
    for price in hardware.prices(other, cloud):
        by_name = {"spot": price.spot, "standard": price.on_demand}
        rates = [rate for name in asked.capacity if (rate := by_name.get(name)) is not None]
        known += [(min(rates), price.region)] if rates else []
    inside = [pair for pair in known if not asked.places or pair[1] in asked.places]
    rate, region = min(inside or known, default=(math.inf, None))
    return rate, None if inside else region


def _moved(at: _Try, other: Accelerator, cloud: str, rate: float, place: Optional[str]) -> _Try:
    """The stage on `other`, with as many rows in a step where more devices can share them."""
    asked = at.stage.hardware
    settings = {"hardware.accelerator": str(other)}
    changed = replace(asked, accelerator=str(other))
    if asked.vertex is not None and asked.vertex.machine is not None:
        machine = hardware.machine(other, cloud)
        settings["hardware.vertex.machine"] = str(machine)
        changed = replace(changed, vertex=replace(asked.vertex, machine=machine))
    if place is not None:
        settings["hardware.places"] = f"[{place}]"
        changed = replace(changed, places=(place,))
    if asked.usd_per_hour is not None:  # what the other one costs
        settings["hardware.usd_per_hour"] = "null"
        changed = replace(changed, usd_per_hour=None)
    effects = ["its price is not known" if rate == math.inf else f"from {rate:.2f} USD/h"]
    train = at.stage.train
    if train is not None and other.count != at.accelerator.count:
        shared = same_rows(train, at.accelerator.count, other.count)
        if shared is not None and not isinstance(shared.micro_batch, str):
            for name in ("micro_batch", "accumulate"):
                if getattr(shared, name) != getattr(train, name):
                    settings[f"train.{name}"] = str(getattr(shared, name))
            effects.append("as many rows in a step")
        elif shared is None:
            effects.append(f"{other.count / at.accelerator.count:g} times the rows in a step")
        train = shared or train
    stage = replace(at.stage, hardware=changed, train=train)
    return _Try(stage, other, (str(other),), settings, ("; ".join(effects),))
