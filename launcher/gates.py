"""May the next stage start? Decided on recorded evaluation alone; whatever is not clear fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, Union

from launcher.spec import Gate

if TYPE_CHECKING:
    from launcher.claim import Claim
    from launcher.run import JobState

Evaluations = Mapping[str, Optional[Mapping[str, Any]]]
#: `below: x, by: 0.1` holds for 0.1 as written in decimal, although 6.1 - 6.0 is a little less.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class GateResult:
    """`lines`: one sentence for each condition, with the numbers it compared."""

    passed: bool
    lines: tuple[str, ...]


def evaluate(gates: Iterable[Gate], evaluations: Evaluations, stage: str) -> GateResult:
    """Judge the gates of `stage`. `evaluations`: stage id -> its evaluation.json (None: there is
    none). A name is looked up in the stage's own evaluation first, then as `STAGE.NAME`. Missing
    stages and metrics, NaN, infinities, booleans and strings fail."""
    verdicts = [verdict for gate in gates for verdict in _judge(gate, evaluations, stage)]
    lines = tuple(f"{line}: {'passed' if holds else 'failed'}" for holds, line in verdicts)
    return GateResult(all(holds for holds, _ in verdicts), lines)


def refused(claim: Claim, job: JobState) -> str:
    """Ask, and record, the gates after this job's stages: why the first that does not pass did not;
    empty when all passed."""
    stages = claim.run.stages
    for stage in claim.jobs[job.index]:
        state = next(s for s in stages if s.id == stage.id)
        if not stage.gate or state.gate == "passed":
            continue
        evaluations = {s.id: claim.evaluation(s) for s in stages}
        result = evaluate(stage.gate, evaluations, stage.id)
        lines = list(result.lines)
        claim.record("gate", id=stage.id, passed=result.passed, lines=lines)
        if not result.passed:
            return f"the gate after '{stage.id}' did not pass: {'; '.join(lines)}"
    return ""


def _judge(gate: Gate, evaluations: Evaluations, stage: str) -> Iterable[tuple[bool, str]]:
    name = _label(gate.metric, evaluations, stage)
    value = _number(gate.metric, evaluations, stage)
    if isinstance(value, str):
        yield False, f"{name} {value}"
        return
    if gate.min is not None:
        side = "at least" if value >= gate.min else "below"
        yield value >= gate.min, f"{name} {value:.6g} is {side} {gate.min:.6g}"
    if gate.max is not None:
        side = "at most" if value <= gate.max else "above"
        yield value <= gate.max, f"{name} {value:.6g} is {side} {gate.max:.6g}"
    for side, other in (("below", gate.below), ("above", gate.above)):
        if other is not None:
            yield _against(name, value, side, other, gate.by, evaluations, stage)
    if (gate.min, gate.max, gate.below, gate.above) == (None, None, None, None):
        yield False, f"{name} {value:.6g} is compared with nothing"


def _against(
    name: str, value: float, side: str, other: str, by: float,
    evaluations: Evaluations, stage: str,
) -> tuple[bool, str]:  # fmt: skip
    """`value` must be more than, and by at least `by`, on that `side` of `other`."""
    bound = _number(other, evaluations, stage)
    label = _label(other, evaluations, stage)
    if isinstance(bound, str):
        return False, f"{name} {value:.6g} cannot be compared: {label} {bound}"
    margin = bound - value if side == "below" else value - bound
    slack = _ROUNDING * max(1.0, abs(value), abs(bound)) if by > 0 else 0.0
    holds = math.isfinite(by) and margin > 0 and margin >= by - slack
    actual = side if margin > 0 else {"below": "above", "above": "below"}[side]
    where = f"{abs(margin):.6g} {actual}" if margin else "equal to"
    needed = f"needed {by:.6g} {side}" if margin <= 0 else f"needed {by:.6g}"
    return holds, f"{name} {value:.6g} is {where} {label} {bound:.6g} ({needed})"


def _number(name: str, evaluations: Evaluations, stage: str) -> Union[float, str]:
    """The recorded number, or in words why there is none."""
    found = _find(name, evaluations, stage)
    if found is None:
        owner = name.partition(".")[0]
        recorded = evaluations.get(owner if owner in evaluations else stage)
        return "was not recorded" if recorded is not None else "has no evaluation.json"
    value = found[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"is {value!r}, not a number"
    try:
        number = float(value)
    except OverflowError:
        return "is too large a number"
    return number if math.isfinite(number) else f"is {number}"


def _find(name: str, evaluations: Evaluations, stage: str) -> Optional[tuple[Any]]:
    own = evaluations.get(stage) or {}
    if name in own:
        return (own[name],)
    owner, dot, metric = name.partition(".")
    theirs = evaluations.get(owner) or {}
    return (theirs[metric],) if dot and metric in theirs else None


def _label(name: str, evaluations: Evaluations, stage: str) -> str:
    own = evaluations.get(stage) or {}
    stands_alone = name in own or name.partition(".")[0] not in evaluations
    return f"{stage}.{name}" if stands_alone and "." not in name else name
