"""Priced places for a recipe over all backends of this machine, best first: `launch offers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import util
from typing import Any, Optional

from launcher import backends, fit, forecast, hardware
from launcher.backends.base import Env, Offer
from launcher.errors import LaunchError
from launcher.forecast import Forecast, Range
from launcher.plan import jobs
from launcher.spec import CapacityName, Hardware, Recipe, Stage

#: What a backend needs to be used: a module, and the extra that brings it.
_CLIENTS = {"vertex": ("google.auth", "google")}
#: The cloud in whose table of prices a backend's places are.
_CLOUDS = {"vertex": "gcp"}
_CAPACITIES: dict[str, tuple[CapacityName, ...]] = {"vertex": ("spot", "standard")}


@dataclass(frozen=True)
class Ranked:
    """One offer for one job. `fits` None: not known; `tokens_per_second`: of its first stage that
    trains; `hours` and `usd`: of all its stages, None: not known. `assumed`: its speed is."""

    job: int
    stages: tuple[str, ...]
    offer: Offer
    fits: Optional[bool]
    tokens_per_second: Optional[float]
    hours: Optional[Range]
    usd: Optional[Range]
    assumed: bool
    recipe: bool  # it is what the recipe asks for

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Offers:
    """`ranked`: best first. `left_out`: backends that were not asked or had nothing, and why."""

    ranked: tuple[Ranked, ...]
    left_out: tuple[str, ...]


def rank(recipe: Recipe, env: Env, any_accelerator: bool = False) -> Offers:
    """Every place that can take a job of `recipe`, with the recipe's accelerator or, on request,
    with any that is known. What fits comes first, then what costs least in all; a price that is
    not known comes last. Asks no service."""
    found: list[Ranked] = []
    left: dict[str, str] = {}
    for index, stages in enumerate(jobs(recipe)):
        for name in backends.names():
            reason = _unusable(name, stages[0].hardware)
            if reason is not None:
                left[name] = reason
                continue
            rows = list(_of_backend(recipe, index, stages, name, env, any_accelerator, left))
            found += rows
            if rows:
                left.pop(name, None)
    found.sort(key=_order)
    return Offers(tuple(found), tuple(f"{name}: {why}" for name, why in left.items()))


def _of_backend(
    recipe: Recipe, index: int, stages: Sequence[Stage], name: str, env: Env,
    any_accelerator: bool, left: dict[str, str],
) -> Iterator[Ranked]:  # fmt: skip
    asked = stages[0].hardware
    for spec in _asked_of(asked, name, any_accelerator):
        try:
            offers = list(backends.load(name).offers(spec, env))
        except LaunchError as error:  # it has no such machine
            left.setdefault(name, str(error))
            continue
        own = spec.accelerator == asked.accelerator
        moved = [_moved(stage, spec) for stage in stages]
        forecasts: dict[str, Forecast] = {}
        for stage in moved:
            forecasts[stage.id] = forecast.of_stage(recipe, stage, offers, env.home, forecasts)
        fits = _fit(list(forecasts.values()))
        if not own and fits is not True:
            continue
        for offer in offers:
            yield _ranked(
                index, list(forecasts.values()), offer, fits, own and name == asked.backend
            )


def _asked_of(asked: Hardware, name: str, any_accelerator: bool) -> Iterator[Hardware]:
    """What to ask a backend for: the recipe's own words on its own backend, else its accelerator
    in every capacity; with other accelerators where the table has prices for them."""
    own = asked.backend == name
    capacities = _CAPACITIES.get(name, ("standard",))
    if own:
        yield asked
    else:
        yield Hardware(name, asked.accelerator, asked.nodes, capacities)
    if not any_accelerator:
        return
    mine = hardware.parse(asked.accelerator)
    for accelerator, places in hardware.priced(_CLOUDS.get(name, "")):
        if accelerator != mine and accelerator.kind.vendor == mine.kind.vendor:
            yield replace(
                asked, backend=name, accelerator=str(accelerator), places=places,
                capacity=capacities, usd_per_hour=None,
                vertex=None if asked.vertex is None else replace(asked.vertex, machine=None),
            )  # fmt: skip


def _moved(stage: Stage, spec: Hardware) -> Stage:
    """The stage on other hardware, with as many rows in a step, where they can be shared evenly:
    with more devices each does fewer micro-batches, or smaller ones."""
    train = stage.train
    if train is not None:
        train = fit.same_rows(train, _workers(stage.hardware), _workers(spec)) or train
    return replace(stage, hardware=spec, train=train)


def _workers(spec: Hardware) -> int:
    return hardware.parse(spec.accelerator).count * spec.nodes


def _ranked(
    index: int, forecasts: Sequence[Forecast], offer: Offer, fits: Optional[bool], own: bool
) -> Ranked:
    counted = [one for one in forecasts if one.counts]
    hours = forecast.of_run([(one, [offer]) for one in counted], forecast.NO_BUDGET).hours
    speeds = [one.tokens_per_second for one in counted if one.tokens_per_second is not None]
    assumed = any(one.basis == "assumed" for one in counted)
    return Ranked(
        index, tuple(one.stage for one in forecasts), offer, fits, next(iter(speeds), None), hours,
        forecast.dollars(hours, [offer]), assumed, own,
    )  # fmt: skip


def _fit(forecasts: Sequence[Forecast]) -> Optional[bool]:
    """Whether all stages of a job fit; None: no stage is known not to, and not all are known to."""
    known = [one.fits for one in forecasts if one.counts]
    if False in known:
        return False
    return None if None in known or not known else True


def _unusable(name: str, asked: Hardware) -> Optional[str]:
    module, extra = _CLIENTS.get(name, ("", ""))
    if module and not _installed(module):
        return f"pip install 'launch-llm[{extra}]' to use it"
    on_cpu = hardware.parse(asked.accelerator).kind.vendor == "cpu"
    if on_cpu and _CLOUDS.get(name) is not None and asked.backend != name:
        return "it has no machine without an accelerator"
    return None


def _installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _order(one: Ranked) -> tuple[Any, ...]:
    """By job; what fits, what may, what does not; then by dollars, and by dollars an hour."""
    rank = {True: 0, None: 1, False: 2}[one.fits]
    usd = one.usd[1] if one.usd is not None else float("inf")
    rate = one.offer.usd_per_hour if one.offer.usd_per_hour is not None else float("inf")
    hours = one.hours[1] if one.hours is not None else float("inf")
    return one.job, rank, rate == float("inf"), usd, rate, hours, one.offer.place
