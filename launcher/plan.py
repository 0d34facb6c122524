"""What a run will create and cost, before anything is created: jobs, requests, prices.

Pure but for reading the environment it is given: the engine sends the very requests that `make`
shows, with their holes filled by `fill`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from launcher import backends, code, hardware, wheels
from launcher.artifacts import missing_client
from launcher.backends.base import CanWarn, Env, Intent, JobSpec, Offer, Phase
from launcher.clock import seconds
from launcher.errors import Again, Exit, LaunchError, NoCapacity, Signal, UsageError
from launcher.fold import duration, spent
from launcher.google import project_of
from launcher.rules import STAGE_REFERENCE
from launcher.run import JSON_VERSION, Run
from launcher.spec import Budget, Hardware, Recipe, Stage, Vertex
from trainer.config import Job, StageConfig, to_dict

if TYPE_CHECKING:
    from launcher.bundle import Bundle
    from launcher.forecast import Forecast, RunForecast

#: The run id of a preview; a run that starts gets its own.
PREVIEW = "0" * 16
_STAGE_FIELDS = (
    "model", "data", "train", "kd", "sdce", "preference", "grpo", "targets", "tokenizer",
    "evaluate", "merge", "export", "smoke",
)  # fmt: skip


@dataclass(frozen=True)
class JobPlan:
    """One job. `offers` are in the order in which they are tried; `usd_per_hour` is that of the
    first, None: unknown, or no offer. `forecasts`: of its stages, where they were asked for."""

    index: int
    name: str
    backend: str
    accelerator: str
    nodes: int
    stages: tuple[str, ...]
    offers: tuple[Offer, ...]
    intents: tuple[Intent, ...]
    usd_per_hour: Optional[float]
    forecasts: tuple[Forecast, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why a run cannot start: a job has no place. The words and the exit code of an error."""

    message: str
    hint: str
    exit_code: int

    def error(self) -> LaunchError:
        error = LaunchError(self.message, self.hint)
        error.code = Exit(self.exit_code)
        return error


@dataclass(frozen=True)
class RunPlan:
    """`usd_total`: the most that the run can cost within its budget, wherever it is placed; None:
    unknown. `usd_priced`: the most while it stays where the price is known. `refusal`: what `up`
    answers instead of creating anything."""

    recipe: str
    root: str
    jobs: tuple[JobPlan, ...]
    hours: Optional[float]
    usd_per_hour: Optional[float]
    usd_total: Optional[float]
    notes: tuple[str, ...]
    refusal: Optional[Refusal] = None
    forecast: Optional[RunForecast] = None
    usd_priced: Optional[float] = None

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        for written, job in zip(facts["jobs"], self.jobs):
            written["forecasts"] = [forecast.to_json() for forecast in job.forecasts]
        if self.forecast is not None:
            from launcher.forecast import steady

            facts["forecast"] = steady(facts["forecast"])
        return {"v": JSON_VERSION, **facts}

    def lines(self) -> list[str]:
        """The plan for a reader, one line a fact; a preview's ids read `<id>`."""
        from launcher import plan_lines

        lines = plan_lines.lines(self)
        return [x.replace(PREVIEW, "<id>").replace(f"-{PREVIEW[-6:]}", "-<id>") for x in lines]

    def explanation(self) -> list[str]:
        """The arithmetic of the forecasts and the sources of the prices, for a reader."""
        from launcher import plan_lines

        return plan_lines.explanation(self)


def jobs(recipe: Recipe) -> list[list[Stage]]:
    """Stages by job: contiguous stages on equal hardware share one, so that they need no driver
    between them; a gate ends its job, because only the driver can answer it."""
    found: list[list[Stage]] = []
    for stage in recipe.stages:
        before = found[-1][-1] if found else None
        if before is None or before.gate or before.hardware != stage.hardware:
            found.append([])
        found[-1].append(stage)
    return found


def stage_configs(recipe: Recipe, stages: Iterable[Stage], root: str) -> tuple[StageConfig, ...]:
    """What the trainer is told: `${stage:ID}` is that stage's folder under `root`, a stage of a
    pipeline writes to its own folder, a recipe without pipeline to `root` itself."""
    return tuple(_stage_config(recipe, stage, root) for stage in stages)


def artifact_root(recipe: Recipe, run_id: str, run_name: str, home: Path) -> str:
    """The run's artifact root; `{run}` is the run's name. Without `{run}` the name is added: two
    runs may not share a folder."""
    if recipe.artifacts is None:
        return str(home / "runs" / run_id / "artifacts")
    return of_run(recipe.artifacts, run_name)


def job_spec(
    recipe: Recipe, run_id: str, run_name: str, index: int, root: str, home: Path,
    bundle: Bundle, owner: str, env: Env, commit: Optional[str] = None,
) -> JobSpec:  # fmt: skip
    """Job `index` of `recipe` as a backend takes it. The boot specification (docs/contracts.md)
    holds `${attempt}` and `${deadline}`, and references to secrets, never their values."""
    stages = jobs(recipe)[index]
    asked = stages[0].hardware
    project = cloud_project(asked, env)
    if asked.backend == "vertex":
        asked = replace(asked, vertex=replace(asked.vertex or Vertex(), project=project))
    name = f"{run_name}-j{index}"
    local = asked.backend == "local"
    # Elsewhere below that machine's own temporary folder.
    work = str(home / "local" / name) if local else f"launch/{name}"
    job = Job(
        run=run_id,
        name=run_name,
        stages=stage_configs(recipe, stages, root),
        control=f"{root}/control",
        commit=commit,
        project=project,
        peak_tflops=hardware.parse(asked.accelerator).kind.bf16_tflops or None,
    )
    boot = {
        "schema": 1,
        "run": run_id,
        "name": name,
        "job_index": index,
        "attempt": "${attempt}",
        "owner": owner,
        "bundle": {"url": str(bundle.path), "sha256": bundle.sha256, "bytes": bundle.bytes},
        "job": {**to_dict(job), "attempt": "${attempt}"},
        "root": root,
        "work": work + "-a${attempt}",
        "python": (asked.local and asked.local.python) or (env.python if local else "python3"),
        "workers": hardware.parse(asked.accelerator).count,
        "nodes": asked.nodes,
        "env": dict(recipe.env),
        "secrets": dict(recipe.secrets),
        "deadline_seconds": "${deadline}",
        "grace_seconds": 600,
    }
    if shipped := wheels.shipped(asked.environment):
        boot["wheels"] = shipped
    if recipe.code is not None:
        boot["code"] = code.shipped(recipe.code, home, bundle.path.name)
    if recipe.tensorboard is not None:
        boot["tensorboard"] = of_run(recipe.tensorboard, run_name)
    labels = {"launch-run": run_id, "launch-owner": owner}
    return JobSpec(run_id, name, asked, boot, labels, recipe.env, recipe.secrets)


def placed(spec: JobSpec, budget: Budget, offer: Offer) -> JobSpec:
    """`spec` with the most hours that the budget allows at this offer; the same for a preview and
    for every attempt there, while `${deadline}` is what is left when a request is recorded."""
    limits = [] if budget.hours is None else [budget.hours]
    if budget.usd is not None and offer.usd_per_hour:
        limits.append(budget.usd / offer.usd_per_hour)
    wait = None if budget.wait is None else seconds(budget.wait) / 3600
    return replace(spec, hours=min(limits, default=None), wait_hours=wait)


def cloud_project(asked: Hardware, env: Env) -> Optional[str]:
    """The cloud project of a job: the recipe's, else that of the environment."""
    named = asked.vertex.project if asked.backend == "vertex" and asked.vertex else None
    return named or project_of(env.environ)


_HOLE = re.compile(r"\$\{([a-z]+(?::[^{}]+)?)\}")


def fill(request: Any, holes: Mapping[str, Any]) -> Any:
    """`request` with `${attempt}`, `${resume}`, `${deadline}`, `${ref:NAME}` from `holes`. A string
    that is one hole takes the value with its type; a longer one around a hole that is None is
    None; names not in `holes` stay as they are."""
    if isinstance(request, Mapping):
        return {key: fill(value, holes) for key, value in request.items()}
    if isinstance(request, (list, tuple)):
        return [fill(value, holes) for value in request]
    if not isinstance(request, str):
        return request
    whole = _HOLE.fullmatch(request)
    if whole and whole[1] in holes:
        return holes[whole[1]]
    if any(holes.get(name, "") is None for name in _HOLE.findall(request)):
        return None
    return _HOLE.sub(lambda m: str(holes[m[1]]) if m[1] in holes else m[0], request)


def affordable(offers: Iterable[Offer], budget: Budget) -> list[Offer]:
    """Offers within `budget.usd_per_hour`; an unknown price cannot be shown to exceed it."""
    cap = budget.usd_per_hour
    return [o for o in offers if cap is None or o.usd_per_hour is None or o.usd_per_hour <= cap]


def make(
    recipe: Recipe,
    env: Env,
    bundle: Optional[Bundle] = None,
    run_id: str = PREVIEW,
    commit: Optional[str] = None,
) -> RunPlan:
    """The plan of a run that starts now, from the git commit `commit`. Reads offers of the
    backends; creates nothing but the trainer's bundle under $LAUNCH_HOME, when none is given."""
    if bundle is None:
        from launcher.bundle import build

        bundle = build(env.home)
    run_name = f"{recipe.name}-{run_id[-6:]}"
    root = artifact_root(recipe, run_id, run_name, env.home)
    notes = [] if recipe.code is None else [code.line(recipe.code)]
    refusals: list[Refusal] = []
    planned = []
    for index, stages in enumerate(jobs(recipe)):
        spec = job_spec(
            recipe, run_id, run_name, index, root, env.home, bundle, env.owner, env, commit
        )
        notes += wheels.lines(index, spec.hardware.environment)
        planned.append(_plan_job(index, stages, spec, recipe.budget, env, notes, refusals))
    notes += [
        f"stage {stage.id} goes on from {stage.train.resume} where it has no checkpoint of its own"
        for stage in recipe.stages
        if stage.train is not None and stage.train.resume is not None
    ]
    rates = [job.usd_per_hour for job in planned]
    rate = None if None in rates else max(r for r in rates if r is not None)
    total = _total(_dearest(planned), recipe.budget)
    notes += _uncapped(planned, recipe.budget)
    return RunPlan(
        recipe.name, root, tuple(planned), recipe.budget.hours, rate, total,
        tuple(dict.fromkeys(notes)), next(iter(refusals), None),
        usd_priced=_total(_dearest(planned, priced=True), recipe.budget),
    )  # fmt: skip


def remainder(plan: RunPlan, budget: Budget, run: Run, now: float) -> RunPlan:
    """`plan` as it is for a run that goes on: the jobs that have not succeeded, each at its next
    attempt, within what the budget has left."""
    left = []
    for job in plan.jobs:
        attempts = run.jobs[job.index].attempts
        if not attempts or attempts[-1].phase is not Phase.SUCCEEDED:
            holes = {"attempt": len(attempts) + 1}
            named = tuple(replace(i, name=fill(i.name, holes)) for i in job.intents)
            left.append(replace(job, intents=named))
    used = sum(duration(attempt, now) for job in run.jobs for attempt in job.attempts) / 3600
    hours = None if budget.hours is None else max(0.0, budget.hours - used)
    paid = spent(run, now)
    usd = None if budget.usd is None else max(0.0, budget.usd - (paid or 0.0))
    rates = [job.usd_per_hour for job in left]
    rate = None if None in rates else max((r for r in rates if r is not None), default=0.0)
    rest = replace(budget, hours=hours, usd=usd)
    total, where_priced = (_total(_dearest(left, priced=p), rest) for p in (False, True))
    notes = plan.notes + ((f"{paid:.2f} USD are spent already",) if paid else ())
    return replace(
        plan, root=run.root, jobs=tuple(left), hours=hours, usd_per_hour=rate, usd_total=total,
        notes=notes, usd_priced=where_priced,
    )  # fmt: skip


def refuse(plan: RunPlan) -> None:
    """Errors: what keeps a run of this plan from starting; nothing was created then."""
    for job in plan.jobs:
        if not backends.load(job.backend).can.create:
            raise UsageError(
                f"backend '{job.backend}' only plans in this version: nothing was started",
                "`launch up RECIPE --dry-run` tries the recipe here, `launch plan RECIPE` shows "
                "what would be sent",
            )
    if missing := missing_client(plan.root):
        raise UsageError(f"artifacts: {plan.root} cannot be reached from here", missing)
    if plan.refusal is not None:
        raise plan.refusal.error()


def _plan_job(
    index: int, stages: list[Stage], spec: JobSpec, budget: Budget, env: Env,
    notes: list[str], refusals: list[Refusal],
) -> JobPlan:  # fmt: skip
    backend = backends.load(spec.hardware.backend)
    intents: tuple[Intent, ...] = ()
    offers: list[Offer] = []
    try:
        found = list(backend.offers(spec.hardware, env))
        offers = affordable(found, budget)
        if not found:
            raise NoCapacity(
                spec.hardware.backend, f"it has no offer for {spec.hardware.accelerator}"
            )
        if not offers:
            cheapest = min(o.usd_per_hour for o in found if o.usd_per_hour is not None)
            what = (f"job {index}: the cheapest offer is {cheapest:.2f} USD an hour, "
                    f"budget.usd_per_hour is {budget.usd_per_hour:g}")  # fmt: skip
            refusals.append(Refusal(what, "raise budget.usd_per_hour", int(Exit.BUDGET)))
        if offers:
            intents = tuple(backend.plan(placed(spec, budget, offers[0]), offers[0]).intents)
    except Signal as signal:
        if signal.again is Again.HERE:  # the driver asks once more
            notes.append(f"job {index}: {signal}" + (f" ({signal.hint})" if signal.hint else ""))
        else:
            refusals.append(Refusal(f"job {index}: {signal}", signal.hint, int(signal.code)))
    if isinstance(backend, CanWarn):
        notes.extend(backend.warnings(spec.hardware, env))
    asked, accelerator = spec.hardware, str(hardware.parse(spec.hardware.accelerator))
    if accelerator.lower() != asked.accelerator.strip().lower():
        notes.append(f"job {index}: hardware.accelerator {asked.accelerator} means {accelerator}")
    return JobPlan(
        index, spec.name, asked.backend, accelerator, asked.nodes,
        tuple(stage.id for stage in stages), tuple(offers), intents,
        offers[0].usd_per_hour if offers else None,
    )  # fmt: skip


def _stage_config(recipe: Recipe, stage: Stage, root: str) -> StageConfig:
    folder = _join(root, stage.id) if recipe.pipeline else root

    def resolve(value: Any) -> Any:
        if isinstance(value, str):
            return STAGE_REFERENCE.sub(lambda match: _join(root, match[1]), value)
        if isinstance(value, tuple):
            return tuple(resolve(item) for item in value)
        if isinstance(value, Mapping):
            return {key: resolve(item) for key, item in value.items()}
        if hasattr(value, "__dataclass_fields__"):
            changed = {name: resolve(getattr(value, name)) for name in value.__dataclass_fields__}
            return replace(value, **changed)
        return value

    blocks = {name: resolve(getattr(stage, name)) for name in _STAGE_FIELDS}
    return StageConfig(id=stage.id, stage=stage.stage, output=folder, **blocks)


def _join(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def of_run(folder: str, run_name: str) -> str:
    """A folder of a recipe for one run: `{run}` is its name, and without it the name is added."""
    if "{run}" in folder:
        return folder.replace("{run}", run_name)
    return f"{folder.rstrip('/')}/{run_name}"


def _dearest(planned: Iterable[JobPlan], priced: bool = False) -> Optional[float]:
    """USD an hour of the dearest offer that a job may end up with; None: unknown, or no offer.
    `priced`: of those with a price, where every job has one."""
    rates: list[Optional[float]] = []
    for job in planned:
        found = [offer.usd_per_hour for offer in job.offers]
        known = [rate for rate in found if rate is not None]
        rates += (known if priced and known else found) or [job.usd_per_hour]
    return None if None in rates else max((r for r in rates if r is not None), default=0.0)


def _uncapped(planned: Iterable[JobPlan], budget: Budget) -> list[str]:
    """What a budget in USD does not hold for, as a note."""
    caps = [f"budget.{name}" for name in ("usd", "usd_per_hour") if getattr(budget, name)]
    where = [
        f"{offer.capacity} in {offer.place}"
        for job in planned
        for offer in job.offers
        if offer.usd_per_hour is None
    ]
    if not caps or not where:
        return []
    does = "nothing else does: set budget.hours"
    if budget.hours is not None:
        does = f"budget.hours ({budget.hours:g}) does"
    verb = "does" if len(caps) == 1 else "do"
    return [
        f"the price is unknown: {', '.join(dict.fromkeys(where))}; {' and '.join(caps)} {verb} not "
        f"cap what runs there, {does}"
    ]


def _total(rate: Optional[float], budget: Budget) -> Optional[float]:
    """Hours at the dearest rate, and never more than the budget in USD."""
    if rate == 0:
        return 0.0
    bounds = [] if rate is None or budget.hours is None else [rate * budget.hours]
    if rate is not None and budget.usd is not None:
        bounds.append(budget.usd)
    return min(bounds, default=None)
