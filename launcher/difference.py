"""A recipe against a run: which keys differ, and what each of them takes. Pure: no disk, no clock.

Keys are those of the canonical recipe, written as `--set` takes them. docs/run.md has the table of
`RULES`; what it says of checkpoints is held by runs of the trainer (tests/trainer).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from launcher.backends.base import Intent, Phase
from launcher.changes import IN_PLACE
from launcher.errors import UsageError
from launcher.fold import Fold
from launcher.plan import fill, jobs
from launcher.run import Run
from launcher.spec import Recipe

Effect = Literal["none", "now", "next attempt", "stop", "resume", "new run"]


_LATER = "from the last checkpoint on"
_AGAIN = "a stage that is not completed starts again"
_ROWS = "a checkpoint counts rows: it is refused where they are others (exit code 65)"
_BATCH = (
    "micro_batch x accumulate x workers rows a step are the same training, others are warned of"
)
_OPTIMIZER = "a resumed optimizer keeps the one in its checkpoint"
_LENGTH = f"the schedule is that of the new length, {_LATER}"
#: A key, or a block for all its keys without a row of their own -> what a change of it takes, and
#: why. Of a stage whose stage is completed, or has no checkpoint, `compare` says otherwise.
RULES: dict[str, tuple[Effect, str]] = {
    "launch": ("none", "it says how the file is read"),
    "name": ("new run", "a run keeps its name"),
    "description": ("none", "words for people"),
    "budget": ("now", "a job that runs keeps its own deadline, its next attempt has the new one"),
    "budget.usd_per_hour": ("next attempt", "it decides where an attempt may go"),
    "budget.wait": ("now", "it counts from when the attempt that waits began"),
    "retry": ("now", "it counts the attempts since the run was last resumed"),
    "notify": ("now", "the driver reads it"),
    "infra": ("none", "`launch infra` reads it, a run does not"),
    "forecast": ("none", "`launch plan` reads it, a run does not"),
    "env": ("resume", "a job has its variables from its start"),
    "secrets": ("resume", "a job has its variables from its start"),
    "artifacts": ("new run", "the journal and the checkpoints are there"),
    "tensorboard": ("resume", "the curves so far stay where they are"),
    "id": ("new run", "it names the folder of the stage"),
    "stage": ("new run", "its checkpoints are of what it was"),
    "needs": ("none", "stages run in their order"),
    "gate": ("resume", "it is asked until it has passed"),
    "hardware": ("resume", f"another machine, {_LATER}"),
    "hardware.backend": ("new run", "a run keeps its backends"),
    "model": ("new run", "its checkpoints are of this model, and refused for another"),
    "model.precision": ("resume", _LATER),
    "model.attention": ("resume", _LATER),
    "model.float8": ("resume", _LATER),
    "model.gradient_checkpointing": ("resume", "the same numbers in other memory"),
    "model.compile": ("resume", f"the same numbers up to rounding, {_LATER}"),
    "data": ("new run", _ROWS),
    "data.validation": ("resume", "the best checkpoint so far was judged by the old ones"),
    "data.curriculum": ("new run", "a checkpoint is refused for other lengths (exit code 65)"),
    "data.skip_bad": ("resume", "bad lines had no rows before either"),
    "train": ("resume", _LATER),
    "train.steps": ("resume", _LENGTH),
    "train.epochs": ("resume", _LENGTH),
    "train.seconds_of": ("resume", _LENGTH),
    "train.micro_batch": ("resume", _BATCH),
    "train.accumulate": ("resume", _BATCH),
    "train.global_batch": ("resume", _BATCH),
    "train.parallel": ("resume", f"the same numbers up to rounding, {_LATER}"),
    "train.weight_decay": ("new run", _OPTIMIZER),
    "train.beta1": ("new run", _OPTIMIZER),
    "train.beta2": ("new run", _OPTIMIZER),
    "train.epsilon": ("new run", _OPTIMIZER),
    "train.seed": ("new run", "resumed, it would read some rows of the epoch twice, some never"),
    "train.limit_batches": ("new run", _ROWS),
    "train.resume": ("new run", "a stage goes on from a checkpoint of its own"),
    "kd": ("resume", _LATER),
    "sdce": ("resume", _LATER),
    "preference": ("resume", f"the reference stays the model that the stage began with, {_LATER}"),
    "grpo": ("resume", _LATER),
    "targets": ("resume", "what was stored with other settings is made again"),
    "tokenizer": ("resume", _AGAIN),
    "evaluate": ("resume", _AGAIN),
    "merge": ("resume", _AGAIN),
    "export": ("resume", _AGAIN),
    "smoke": ("resume", _AGAIN),
    "code": ("new run", "a run keeps the code that it began with, also when it is resumed"),
    "bundle": ("new run", "a run keeps the trainer that it began with, also when it is resumed"),
}
#: What holds for a key that has no row, of a block that this table does not know.
_UNKNOWN: tuple[Effect, str] = ("resume", _LATER)
_MARKS = {"none": "~", "now": "~", "next attempt": "~", "stop": "!", "resume": "!", "new run": "x"}
#: What a reader is told that a change takes.
WORDS: dict[Effect, str] = {
    "none": "changes nothing",
    "now": "in place, now",
    "next attempt": "in place, from the next attempt on",
    "stop": "this stops the run",
    "resume": "at a resume",
    "new run": "needs a new run",
}
#: Whose absence an empty value stands for.
_ABSENT = object()
#: The longest value, and the most lines about requests, that a reader is shown.
_WIDTH, _REQUESTS = 60, 8
#: Texts that need no quotes, but for words that mean something else.
_PLAIN = re.compile(r"[A-Za-z/](?:[\w./@+:-]*[\w/])?")
_RESERVED = {"y", "n", "null", "true", "false", "yes", "no", "on", "off"}
#: Jobs of a plan: their names, and their requests in order.
Requests = Mapping[str, Sequence[Intent]]


@dataclass(frozen=True)
class Change:
    """One key that differs; None stands for a key that is not there."""

    path: str
    before: Any
    after: Any
    effect: Effect
    why: str

    def line(self) -> str:
        told = [WORDS[self.effect], self.why]
        if self.effect == "stop":
            told.reverse()
        values = f"{_shown(self.before)} -> {_shown(self.after)}"
        return f"{_MARKS[self.effect]} {self.path}: {values}  {': '.join(told)}"


@dataclass(frozen=True)
class Difference:
    """`ours`: the requests of the run as it is planned now, `theirs`: those of the recipe, both
    under the run's name; `sent`: those of its newest attempts, as they were sent. `same`: the run
    was started from this very recipe and trainer, so that `launch up` attaches to it."""

    run: Run
    changes: tuple[Change, ...]
    unchanged: int
    ours: Requests = field(default_factory=dict)
    theirs: Requests = field(default_factory=dict)
    sent: Sequence[Mapping[str, Any]] = ()
    same: bool = False

    @property
    def in_place(self) -> bool:
        """Whether the run is live and can take up all that differs without a stop."""
        effects = {change.effect for change in self.changes}
        return self.run.ended is None and effects <= {"none", "now", "next attempt"}

    @property
    def stops(self) -> tuple[Change, ...]:
        """Changes that the driver could take up in place, and which would end the run at once."""
        found = tuple(change for change in self.changes if change.effect == "stop")
        effects = {change.effect for change in self.changes}
        return found if effects <= {"none", "now", "next attempt", "stop"} else ()

    def refusal(self) -> UsageError:
        """What `up` answers to a change that would end the live run (`stops`)."""
        name, told = self.run.name, "; ".join(f"{c.path}: {c.why}" for c in self.stops)
        return UsageError(f"this would stop {name}, which goes on: {told}", self._keep())

    def blocks(self) -> list[str]:
        """The blocks at the top of the recipe in which something changes in place."""
        found = (c.path.partition(".")[0] for c in self.changes if c.effect != "none")
        return [name for name in dict.fromkeys(found) if name in IN_PLACE]

    def lines(self, recipe: str) -> list[str]:
        """The difference for a reader. `recipe`: what the recipe is called on a command line."""
        name, count = self.run.name, len(self.changes)
        many = f"{count} key{'' if count == 1 else 's'} differ{'s' if count == 1 else ''}"
        lines = [f"against {name} ({self.run.phase.value}): {many if count else 'the same recipe'}"]
        lines += [f"  {change.line()}" for change in self.changes]
        lines.append(f"  = {self.unchanged} unchanged")
        requests = list(_request_lines(self.ours, self.theirs))
        lines += [f"  {line}" for line in requests[:_REQUESTS]]
        if len(requests) > _REQUESTS:
            lines.append(f"  and {len(requests) - _REQUESTS} more values of requests: --json")
        return lines + [f"  {line}" for line in self._advice(recipe)]

    def to_json(self) -> dict[str, Any]:
        return {
            "against": self.run.name,
            "changes": [
                {"path": c.path, "from": c.before, "to": c.after, "effect": c.effect, "why": c.why}
                for c in self.changes
            ],
            "unchanged": self.unchanged,
            "requests": {
                "run": [vars(intent) for job in self.ours.values() for intent in job],
                "recipe": [vars(intent) for job in self.theirs.values() for intent in job],
                "sent": list(self.sent),
            },
        }

    def overrides(self) -> list[str]:
        """The `KEY=VALUE` of a resume that makes the changes which one can make."""
        wanted = [c for c in self.changes if c.effect not in ("none", "stop", "new run")]
        return [f"{c.path}={_literal(_yaml(c.after))}" for c in wanted]

    def _advice(self, recipe: str) -> Iterator[str]:
        effects = {change.effect for change in self.changes}
        if self.in_place and self.blocks():
            yield f"`launch up {recipe}` makes these changes; the run goes on"
        elif self.stops:
            yield f"`launch up {recipe}` refuses that:"
            yield from (f"  {line}" for line in self._keep().splitlines())
        elif self.same and self.changes:
            yield f"`launch up {recipe}` attaches to it as it is: it was changed since"
        elif "new run" in effects:
            yield f"`launch up {recipe}` starts another run; {self.run.name} is not changed by it"
        elif effects - {"none"}:
            given = " ".join(f"--set {shlex.quote(text)}" for text in self.overrides())
            first = "" if self.run.ended is not None else f"`launch stop {self.run.name}`, then "
            yield f"{first}`launch resume {self.run.name} {given}`"

    def _keep(self) -> str:
        """How to keep a run that a change would end, and how to end it."""
        name, keys = self.run.name, " and ".join(change.path for change in self.stops)
        return (
            f"to keep it: `launch attach {name}` follows it as it is; or raise {keys} in the "
            f"recipe\nto stop it: `launch stop {name}`"
        )


def compare(
    fold: Fold,
    recipe: Mapping[str, Any],
    wanted: Recipe,
    existing: Recipe,
    bundle: str,
    without_checkpoint: Collection[str],
) -> tuple[tuple[Change, ...], int]:
    """What differs between the recipe in force of a run (`fold`, and typed: `existing`) and the
    canonical `recipe` (typed: `wanted`), with the trainer of sha256 `bundle`, and how many keys do
    not. `without_checkpoint`: stages that have nothing which a change could make useless."""
    judge = _Judge(fold, _cut(existing) != _cut(wanted), without_checkpoint)
    changes, same = [], 0
    for path, key, stage, before, after in _pairs(fold.recipe, recipe):
        if before == after:
            same += 1
            continue
        effect, why = judge.effect(key, stage)
        changes.append(Change(path, _plain(before), _plain(after), effect, why))
    if fold.bundle["sha256"] == bundle:
        same += 1
    else:
        effect, why = judge.effect("bundle", None)
        changes.append(Change("bundle", fold.bundle["sha256"][:12], bundle[:12], effect, why))
    return tuple(changes), same


def rule(key: str) -> tuple[Effect, str]:
    """The row of `RULES` for a key such as `train.lr`: its own, or that of the block around it."""
    while key:
        if key in RULES:
            return RULES[key]
        key = key.rpartition(".")[0]
    return _UNKNOWN


class _Judge:
    """What a change takes, of this run as it is now."""

    def __init__(self, fold: Fold, recut: bool, without_checkpoint: Collection[str]) -> None:
        self.run, self.recut, self.fresh = fold.run, recut, without_checkpoint
        self.states = {state.id: state for state in fold.run.stages}
        done = {s.id for s in fold.run.stages if s.phase is Phase.SUCCEEDED}
        self.done = done
        self.busy = {s.job for s in fold.run.stages if s.id not in done}

    def effect(self, key: str, stage: Optional[str]) -> tuple[Effect, str]:
        effect, why = rule(key)
        block = key.partition(".")[0]
        if effect == "none":
            return effect, why
        if self.run.phase is Phase.SUCCEEDED and self.run.ended is not None:
            return "new run", "the run is complete"
        if self.recut and block in ("hardware", "gate"):
            return "new run", "its stages would run in other jobs"
        if stage is not None:
            effect, why = self._of_stage(stage, key, block, effect, why)
        if self.run.ended is not None and effect in ("now", "next attempt"):
            return "resume", "the run is over"
        return effect, why

    def _of_stage(
        self, stage: str, key: str, block: str, effect: Effect, why: str
    ) -> tuple[Effect, str]:
        state = self.states.get(stage)
        if state is None:
            return "new run", "a run keeps its stages"
        open_gate = block == "gate" and state.gate != "passed"
        open_job = block == "hardware" and state.job in self.busy
        if state.id in self.done and not open_gate and not open_job:
            return "new run", f"stage '{stage}' is completed"
        if effect == "new run" and stage in self.fresh and block in ("model", "data", "train"):
            return "resume", f"stage '{stage}' has no checkpoint yet"
        return effect, why


def _cut(recipe: Recipe) -> list[tuple[str, list[str]]]:
    """The jobs of a recipe: their backends and the ids of their stages."""
    return [(found[0].hardware.backend, [s.id for s in found]) for found in jobs(recipe)]


def _pairs(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[tuple[str, str, Optional[str], Any, Any]]:
    """(path as --set takes it, key for `rule`, id of the stage, before, after) of every key."""
    tops = [{k: v for k, v in raw.items() if k != "stages"} for raw in (before, after)]
    for path, old, new in _leaves("", *tops):
        yield path, _key(path), None, old, new
    stages = [{stage["id"]: stage for stage in raw["stages"]} for raw in (before, after)]
    several = any(len(found) > 1 for found in stages)
    if not several and stages[0].keys() != stages[1].keys():
        (old,), (new,) = (found.values() for found in stages)
        yield "stage", "stage", None, old["id"], new["id"]
        return
    orders = [[i for i in found if all(i in s for s in stages)] for found in stages]
    if orders[0] != orders[1]:
        yield "pipeline", "stage", None, orders[0], orders[1]
    for stage in dict.fromkeys([*stages[0], *stages[1]]):
        start = f"pipeline.{stage}" if several else ""
        one, other = stages[0].get(stage), stages[1].get(stage)
        if one is None or other is None:
            kinds = [raw["stage"] if raw is not None else None for raw in (one, other)]
            yield start, "stage", stage, *kinds
            continue
        for path, old, new in _leaves("", one, other):
            yield ".".join(filter(None, (start, path))), _key(path), stage, old, new


def _leaves(path: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """Values side by side, mapping by mapping, and item by item where lists hold mappings."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            at = f"{path}.{key}" if path else str(key)
            yield from _leaves(at, before.get(key, _ABSENT), after.get(key, _ABSENT))
        return
    lists = isinstance(before, list) and isinstance(after, list)
    if lists and len(before) == len(after) and any(isinstance(x, Mapping) for x in before):
        for index, (old, new) in enumerate(zip(before, after)):
            yield from _leaves(f"{path}.{index}", old, new)
        return
    yield path, before, after


def _key(path: str) -> str:
    """`data.train.0.weight` as `data.train.weight`."""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _plain(value: Any) -> Any:
    return None if value is _ABSENT else value


def _request_lines(ours: Requests, theirs: Requests) -> Iterator[str]:
    """Where the request that starts a job differs, apart from the job's own specification: that
    follows from the keys. Nothing is compared with a job that has no place: none is sent for it."""
    for job in dict.fromkeys([*ours, *theirs] if ours and theirs else []):
        if any(job in found and not found[job] for found in (ours, theirs)):
            continue
        last = [found[job][-1] if found.get(job) else None for found in (ours, theirs)]
        old, new = ({} if i is None else {"place": i.place, **i.request} for i in last)
        request = next((intent.name for intent in last if intent is not None), "")
        for path, one, other in _leaves("", old, new):
            if one != other and path.partition(".")[0] != "boot":
                values = f"{_shown(one)} -> {_shown(other)}"
                yield f"request {fill(request, {'attempt': 'N'})}: {path}: {values}"


def _shown(value: Any) -> str:
    if value is None or value is _ABSENT:
        return "none"
    text = " ".join(_yaml(value).split())
    ends = _WIDTH // 2 - 1  # two long values may differ only at their ends
    return text if len(text) <= _WIDTH else f"{text[: ends - 1]}...{text[-ends:]}"


def _literal(text: str) -> str:
    """As a recipe writes it: `$` doubled where it would read a variable."""
    return text.replace("${", "$${").replace("$${stage:", "${stage:")


def _yaml(value: Any) -> str:
    """One line that YAML reads as this value."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
        return value
    return json.dumps(value, ensure_ascii=False)
