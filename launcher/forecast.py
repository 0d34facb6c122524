"""What a run will take: memory, speed, hours and dollars of each stage, before anything is created.

Memory comes from `fit`, the work of a step from `speed`, how much is read from `amount`, prices
from the offers. A figure that cannot be had is absent, and `unknown` says why; nothing is guessed.
What is assumed is called so.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from launcher import amount, answers, fit, hardware, measured, shapes, speed
from launcher.amount import Amount, figure
from launcher.backends.base import Offer
from launcher.errors import Exit
from launcher.fit import Change, Memory
from launcher.shapes import Absent, Shapes
from launcher.spec import Budget, Recipe, Stage

if TYPE_CHECKING:
    from launcher.hardware import Accelerator
    from launcher.plan import RunPlan

#: Least and most.
Range = tuple[float, float]
#: Stages whose time is not forecast: minutes, mostly of reading and writing.
_BRIEF = ("tokenizer", "evaluate", "merge", "export", "smoke")
#: What comes on top of the hours of a forecast.
NOT_COUNTED = (
    "queues, preemption, retries, evaluation, checkpoints, loading, communication come on top"
)
#: Changes that `explain` names.
_NAMED = 3
NO_BUDGET = Budget()
#: Parts of `fit.Memory` that are weights.
_WEIGHTS = ("weights", "teacher", "surrogate", "start")
_STAGE = re.compile(r"\$\{stage:([^}]*)\}")


@dataclass(frozen=True)
class Forecast:
    """One stage. `steps`: in all, of which `done` are in a checkpoint; `hours`: least and most;
    `usd`: over its offers, None where a price is not known. `basis`: whether the speed is `given`
    by the recipe, `measured`, `published` or `assumed`; `source`: by whom. `unknown`: why a figure
    is missing; `absent`: the models that it would take. `explain`: the arithmetic."""

    stage: str
    kind: str
    memory: Optional[Memory] = None
    changes: tuple[Change, ...] = ()
    steps: Optional[int] = None
    done: int = 0
    tokens: Optional[float] = None
    tokens_per_second: Optional[float] = None
    basis: str = ""
    source: str = ""
    hours: Optional[Range] = None
    usd: Optional[Range] = None
    unknown: tuple[str, ...] = ()
    explain: tuple[str, ...] = ()
    absent: tuple[Absent, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether its hours belong into those of the run."""
        return self.kind not in _BRIEF

    @property
    def fits(self) -> Optional[bool]:
        return None if self.memory is None else self.memory.fits

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        if self.memory is not None:
            facts["memory"].update(bytes=self.memory.bytes, margin=self.memory.margin)
        for written, change in zip(facts["changes"], self.changes):
            written["memory"].update(bytes=change.memory.bytes, margin=change.memory.margin)
        return {name: steady(value) for name, value in {**facts, "fits": self.fits}.items()}


@dataclass(frozen=True)
class RunForecast:
    """All stages together. None: one of them is not known, and `unknown` says which. `unpriced`:
    places without a known price; `usd_priced`: the dollars over the other ones."""

    hours: Optional[Range]
    usd: Optional[Range]
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    usd_priced: Optional[Range] = None
    unpriced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reached:
    """How far a run got that is to go on. `steps`: of each stage the step of its newest checkpoint;
    `completed`: stages that do not run again; `budget`: what is left of it."""

    steps: Mapping[str, int]
    completed: Collection[str]
    budget: Budget


def added(
    plan: RunPlan, recipe: Recipe, launch_home: Path, reached: Optional[Reached] = None
) -> RunPlan:
    """`plan` of `recipe` with the forecasts of its stages, and with a refusal where the weights
    alone exceed the device. Reads local data and this user's own runs; creates nothing."""
    from launcher.plan import Refusal

    stages = {stage.id: stage for stage in recipe.stages}
    made: dict[str, Forecast] = {}
    shown: dict[str, Forecast] = {}
    jobs, pairs = [], []
    refusal = plan.refusal
    for job in plan.jobs:
        for name in job.stages:
            done = reached.steps.get(name, 0) if reached is not None else 0
            one = of_stage(recipe, stages[name], job.offers, launch_home, made, done)
            made[name] = one
            if reached is not None and name in reached.completed:
                one = _completed(one)
            shown[name] = one
            pairs.append((one, job.offers))
            if refusal is None and (over := hopeless(one)) is not None:
                refusal = Refusal(*over, int(Exit.USAGE))
        jobs.append(replace(job, forecasts=tuple(shown[name] for name in job.stages)))
    whole = of_run(pairs, recipe.budget if reached is None else reached.budget)
    return replace(plan, jobs=tuple(jobs), forecast=whole, refusal=refusal)


def of_stage(
    recipe: Recipe, stage: Stage, offers: Sequence[Offer], launch_home: Path,
    before: Mapping[str, Forecast] = {}, done: int = 0,
) -> Forecast:  # fmt: skip
    """The forecast of a stage of `recipe` on its own hardware at these offers. `before`: those of
    the stages before it, which `train.seconds_of` may name. `done`: the step of the checkpoint that
    it goes on from."""
    accelerator = hardware.parse(stage.hardware.accelerator)
    models = shapes.of_stage(stage, recipe.stages, Path.cwd())
    made = _with_memory(Forecast(stage.id, stage.stage), recipe, stage, accelerator, models)
    if not made.counts:
        return made
    workers = accelerator.count * stage.hardware.nodes
    read = amount.left(amount.of_stage(stage, workers), done)
    made = replace(
        made, done=done, steps=read.steps, tokens=read.tokens, explain=(*made.explain, *read.how)
    )
    made = _with_speed(made, stage, accelerator, models, launch_home)
    made = _with_hours(made, stage, read, before)
    made = _with_reference(made, stage, models)
    return replace(made, usd=dollars(made.hours, offers))


def of_run(stages: Sequence[tuple[Forecast, Sequence[Offer]]], budget: Budget) -> RunForecast:
    """Hours and dollars of all stages, each with the offers of its job, and where the budget would
    end them."""
    counted = [forecast for forecast, _ in stages if forecast.counts]
    if not counted:
        return RunForecast(None, None)
    missing = [f.stage for f in counted if f.hours is None]
    hours = _sum([f.hours for f in counted])
    notes = tuple(_budget_notes(stages, budget))
    unknown = (f"the time of {', '.join(missing)} is not known",) if missing else ()
    all_offers = [offer for forecast, offers in stages if forecast.counts for offer in offers]
    known = _sum([dollars(f.hours, priced(offers)) for f, offers in stages if f.counts])
    usd = _sum([f.usd for f in counted])
    return RunForecast(hours, usd, unknown, notes, known, unpriced(all_offers))


def dollars(hours: Optional[Range], offers: Sequence[Offer]) -> Optional[Range]:
    """The least and the most that these hours cost at one of the offers; None: not known."""
    rates = [offer.usd_per_hour for offer in offers if offer.usd_per_hour is not None]
    if hours is None or not rates or len(rates) < len(offers):
        return None
    return hours[0] * min(rates), hours[1] * max(rates)


def priced(offers: Sequence[Offer]) -> list[Offer]:
    return [offer for offer in offers if offer.usd_per_hour is not None]


def unpriced(offers: Sequence[Offer]) -> tuple[str, ...]:
    """Where a price is not known: places, with the capacity where another one there has a price."""
    known = {offer.place for offer in priced(offers)}
    missing = [offer for offer in offers if offer.usd_per_hour is None]
    names = [f"{o.place} ({o.capacity})" if o.place in known else o.place for o in missing]
    return tuple(dict.fromkeys(names))


def hopeless(forecast: Forecast) -> Optional[tuple[str, str]]:
    """The error and the hint for a stage whose weights alone exceed the device; None: they do not,
    as far as is known."""
    memory = forecast.memory
    if memory is None or memory.limit is None:
        return None
    weights = sum(part.bytes for part in memory.parts if part.name in _WEIGHTS)
    if weights <= memory.limit:
        return None
    what = (f"{forecast.stage}: the weights alone are {gib(weights)} GiB, and a device has "
            f"{gib(memory.limit)}")  # fmt: skip
    helps = [settings(change) for change in forecast.changes]
    return what, f"it fits with {helps[0]}" if helps else "take a larger accelerator"


def settings(change: Change) -> str:
    """A change as the words of a command line."""
    return " ".join(_quoted(setting) for setting in change.settings)


def steady(value: Any) -> Any:
    """`value` with ten digits of each number in it: machines differ in the last of a logarithm."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, Mapping):
        return {name: steady(each) for name, each in value.items()}
    return [steady(each) for each in value] if isinstance(value, (list, tuple)) else value


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def size_text(size: float) -> str:
    """`16.1 GiB`, `24 MiB`."""
    return f"{gib(size)} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.0f} MiB"


def hours_text(hours: Range) -> str:
    """`12.4 h`, `208 to 312 h`, `3.1 min`."""
    unit, word = (3600.0, "s") if hours[1] < 1 / 60 else (60.0, "min") if hours[1] < 1 else (1, "h")
    low, high = (three(value * unit) for value in hours)
    return f"{low} {word}" if low == high else f"{low} to {high} {word}"


def three(value: float) -> str:
    """A number with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _completed(made: Forecast) -> Forecast:
    """Of a stage whose job goes on for those after it."""
    nothing = (0.0, 0.0)
    told = ("time: none, it is completed",)
    return Forecast(made.stage, made.kind, hours=nothing, usd=nothing, explain=told)


def _with_memory(
    made: Forecast, recipe: Recipe, stage: Stage, accelerator: Accelerator, models: Shapes
) -> Forecast:
    nodes = stage.hardware.nodes
    found = fit.memory(stage, accelerator, nodes, models)
    lines = [f"{part}: {shape.parameters:,} parameters ({shape.source})"
             for part, shape in models.items()]  # fmt: skip
    if found is None:
        why = fit.unknown(stage, accelerator, models)
        missing = (f"memory: {why}",) if why else ()
        absent = shapes.absent(stage, models, Path.cwd())
        return replace(made, unknown=(*made.unknown, *missing), absent=absent, explain=tuple(lines))
    shown = [part for part in found.parts if part.bytes >= 2**20]
    lines += [f"memory: {size_text(part.bytes)} {part.name}: {part.how}" for part in shown]
    if small := len(found.parts) - len(shown):
        lines.append(f"memory: {small} more below 1 MiB each")
    during = f", during {found.moment}" if found.moment else ""
    total = f"memory: {size_text(found.bytes)} in all{during}"
    if found.limit is not None:
        total += f", of {gib(found.limit)} GiB that a process can use"
    lines += [total, *(f"memory: {note}" for note in found.notes)]
    changes: tuple[Change, ...] = ()
    if found.fits is False:
        prefix = f"pipeline.{stage.id}." if recipe.pipeline else ""
        changes = fit.changes(stage, accelerator, nodes, models, prefix)
        for change in changes[:_NAMED]:
            taken = size_text(change.memory.bytes)
            effect = change.effect or "the training stays the same"
            lines.append(f"it would fit with {change.what}: {taken}")
            lines += [f"  {effect}", f"  {settings(change)}"]
    return replace(made, memory=found, changes=changes, explain=tuple(lines))


def _with_speed(
    made: Forecast, stage: Stage, accelerator: Accelerator, models: Shapes, launch_home: Path
) -> Forecast:
    told, held = stage.forecast, amount.count(stage)
    if told is not None and told.examples_per_hour is not None:
        return replace(made, basis="given", source="forecast.examples_per_hour")
    known = measured.like(stage, models, launch_home)
    length = float(stage.data.sequence_length)
    each = length if stage.data.packing else held.tokens_per_example
    if each is not None:
        each = min(each, length)  # longer ones are cut, as in `read`
    if stage.grpo is not None:  # its rows are prompts
        each = answers.tokens_per_prompt(stage)
    if known is not None and each is not None:
        rate = known.rows_per_second * each
        line = f"speed: {known.rows_per_second:.4g} rows a second, the {known.how} of {known.run}"
        return replace(made, tokens_per_second=rate, basis="measured", source=f"in {known.run}",
                       explain=(*made.explain, line))  # fmt: skip
    try:
        if stage.grpo is not None:
            found = answers.pace(stage, accelerator, models, task(stage), made.memory)
            return replace(
                made, tokens_per_second=found.tokens_per_second, basis=found.basis,
                source=found.source, explain=(*made.explain, *found.explain),
            )  # fmt: skip
        work = speed.work(stage, models.get("model"), models.get("teacher"))
    except ValueError as error:
        return replace(made, unknown=(*made.unknown, f"speed: {error}"))
    workers = accelerator.count * stage.hardware.nodes
    if stage.train is not None and isinstance(stage.train.micro_batch, str):
        work = work.shared(workers)
    return _computed(made, stage, accelerator, models, work, workers)


def _computed(
    made: Forecast, stage: Stage, accelerator: Accelerator, models: Shapes, work: speed.Work,
    workers: int,
) -> Forecast:  # fmt: skip
    kind, lines = accelerator.kind, list(made.explain)
    each = work.flops / work.tokens
    lines.append(
        f"speed: {each / 1e9:.4g} GFLOP a token, {work.tokens:,.0f} tokens a worker's step"
    )
    if kind.vendor == "cpu":
        seconds = speed.CORE.seconds(work)
        lines.append(f"speed: {seconds:.3g} s a step, {workers} worker(s) ({speed.CORE_SOURCE})")
        basis, source = "measured", "on one core of another machine"
        rate = work.tokens * workers / seconds
    else:
        precision = stage.model.precision if stage.model is not None else "auto"
        if not kind.bf16_tflops or precision == "fp32":
            why = (
                f"the peak of {kind.name} in {'fp32' if kind.bf16_tflops else 'fp16'} is not known"
            )
            return replace(made, unknown=(*made.unknown, f"speed: {why}"), explain=tuple(lines))
        main = models.get("model") or models["teacher"]
        found = speed.efficiency(kind, task(stage), main.parameters, in_flight(stage, work))
        if found is None:
            return replace(
                made, unknown=(*made.unknown, f"speed: no efficiency of {kind.name} is known")
            )
        basis, source = found.basis, found.source
        rate = kind.bf16_tflops * 1e12 * found.value / each * workers
        lines.append(
            f"speed: {kind.bf16_tflops:g} TFLOP/s x {found.value:.1%} ({basis}: {source}) x "
            f"{workers} device(s) = {rate:,.0f} tokens/s"
        )
    return replace(made, tokens_per_second=rate, basis=basis, source=source, explain=tuple(lines))


def task(stage: Stage) -> str:
    """What the table of efficiencies calls it."""
    if stage.targets is not None:
        return "targets"
    if stage.model is not None and stage.model.adapter is not None:
        return "lora"
    guided = stage.sdce is not None and stage.sdce.surrogate is not None
    return "kd" if stage.kd is not None or guided else "full"


def in_flight(stage: Stage, work: speed.Work) -> float:
    """Tokens of one micro-batch."""
    length = stage.data.sequence_length
    if stage.targets is not None:
        return float(stage.targets.micro_batch * length)
    rows = stage.train.micro_batch if stage.train is not None else 1
    return min(work.tokens, 8.0 * length) if isinstance(rows, str) else float(rows * length)


def _with_hours(
    made: Forecast, stage: Stage, read: Amount, before: Mapping[str, Forecast]
) -> Forecast:
    told, train = stage.forecast, stage.train
    if train is not None and train.seconds_of is not None:
        match = _STAGE.fullmatch(train.seconds_of)
        other = before.get(match[1]) if match else None
        if other is None or other.hours is None:
            why = f"time: that of {train.seconds_of} (train.seconds_of) is not known"
            return replace(made, unknown=(*made.unknown, why))
        line = f"time: as long as {other.stage} trains (train.seconds_of)"
        return replace(made, hours=other.hours, explain=(*made.explain, line))
    if told is not None and told.examples_per_hour is not None:
        if read.examples is None:
            why = read.unknown or "how many examples a row holds: give forecast.tokens_per_example"
            return replace(made, unknown=(*made.unknown, f"time: {why}"))
        slow, fast = told.examples_per_hour
        hours = (read.examples / fast, read.examples / slow)
        line = (f"time: {read.examples:,.0f} examples / {slow:,.0f} to {fast:,.0f} an hour "
                f"(forecast.examples_per_hour) = {hours_text(hours)}")  # fmt: skip
        return replace(made, hours=hours, explain=(*made.explain, line))
    if read.tokens is None:
        return replace(made, unknown=(*made.unknown, f"time: {read.unknown}"))
    if made.tokens_per_second is None:
        return made
    one = read.tokens / made.tokens_per_second / 3600
    line = (f"time: {figure(read.tokens)} tokens / {made.tokens_per_second:,.0f} tokens/s = "
            f"{hours_text((one, one))}")  # fmt: skip
    return replace(made, hours=(one, one), explain=(*made.explain, line))


def _with_reference(made: Forecast, stage: Stage, models: Shapes) -> Forecast:
    """And the pass in which the reference of `dpo` and `ipo` reads all pairs once; a run that goes
    on has its answers."""
    share = speed.reference_share(stage, models.get("model"))
    if not share or made.hours is None or made.tokens_per_second is None or made.done:
        return made
    held = amount.count(stage)
    if held.examples is None or held.tokens_per_example is None:
        line = "time: that the reference reads all pairs once, before the first step, comes on top"
        return replace(made, explain=(*made.explain, line))
    tokens = held.examples * held.tokens_per_example
    more = share * tokens / made.tokens_per_second / 3600
    line = (f"time: and {hours_text((more, more))} in which the reference reads {figure(tokens)} "
            "tokens once")  # fmt: skip
    low, high = made.hours
    return replace(made, hours=(low + more, high + more), explain=(*made.explain, line))


def _budget_notes(stages: Sequence[tuple[Forecast, Sequence[Offer]]], budget: Budget) -> list[str]:
    """Where the hours or the dollars of the budget end the run: at the offers tried first, and at
    the dearest ones."""
    found: dict[str, str] = {}
    for which in ("first", "dearest"):
        used, paid = 0.0, 0.0
        for forecast, offers in stages:
            if forecast.hours is None or not offers:
                if forecast.counts:
                    break  # what comes before it takes an unknown part
                continue
            known = [offer for offer in offers if offer.usd_per_hour is not None] or list(offers)
            offer = offers[0] if which == "first" else max(known, key=lambda o: o.usd_per_hour or 0)
            hours, rate = forecast.hours[1], offer.usd_per_hour or 0.0
            limits = {}
            if budget.hours is not None:
                limits[f"budget.hours ({budget.hours:g})"] = budget.hours - used
            if budget.usd is not None and rate > 0:
                at = f"budget.usd ({budget.usd:g}) at {rate:.2f} USD/h ({offer.capacity})"
                limits[at] = (budget.usd - paid) / rate
            cause = min(limits, key=lambda name: limits[name], default="")
            if cause and limits[cause] < hours:
                found.setdefault(cause, _ended(forecast, cause, limits[cause] / hours, hours))
                break
            used, paid = used + hours, paid + hours * rate
    return list(found.values())


def _ended(forecast: Forecast, cause: str, part: float, hours: float) -> str:
    where = forecast.stage
    if forecast.steps is not None:
        left = max(0, forecast.steps - forecast.done)
        where += f" at step ~{_round(forecast.done + left * part):,} of {forecast.steps:,}"
    return f"{cause} ends {where}: it is expected to take up to {hours_text((hours, hours))}"


def _sum(ranges: Sequence[Optional[Range]]) -> Optional[Range]:
    known = [each for each in ranges if each is not None]
    if len(known) < len(ranges):
        return None
    return sum(low for low, _ in known), sum(high for _, high in known)


def _round(step: float) -> int:
    """Two digits of a step: more would say more than is known."""
    unit = int("1" + "0" * max(0, len(str(int(step))) - 2))
    return int(step / unit) * unit


def _quoted(setting: str) -> str:
    if re.fullmatch(r"[\w.,:/=+@%-]+", setting):
        return f"--set {setting}"
    return f"--set {shlex.quote(setting)}" if '"' in setting else f'--set "{setting}"'
