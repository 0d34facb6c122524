"""Gates read recorded numbers and fail closed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.gates import evaluate
from launcher.spec import Gate

RECORDED: dict[str, Any] = {
    "ce": {"val_loss": 6.445, "best_val_loss": 6.103, "accuracy": 0.5},
    "kd": {"val_loss": 5.232, "val_ppl": 187.2, "accuracy": 0.75, "function_call_success": 0.9,
           "hallucinated_api_rate": 0.3},
    "compare": {"kd.val_loss": 5.3, "ce.val_loss": 6.5},
}  # fmt: skip


@pytest.mark.parametrize(
    ("gate", "passed", "line"),
    [
        (Gate("val_loss", below="ce.best_val_loss", by=0.1), True,
         "kd.val_loss 5.232 is 0.871 below ce.best_val_loss 6.103 (needed 0.1): passed"),
        (Gate("val_loss", below="ce.best_val_loss", by=0.9), False,
         "kd.val_loss 5.232 is 0.871 below ce.best_val_loss 6.103 (needed 0.9): failed"),
        (Gate("ce.val_loss", below="val_loss", by=0.1), False,
         "ce.val_loss 6.445 is 1.213 above kd.val_loss 5.232 (needed 0.1 below): failed"),
        (Gate("accuracy", above="ce.accuracy", by=0.2), True,
         "kd.accuracy 0.75 is 0.25 above ce.accuracy 0.5 (needed 0.2): passed"),
        (Gate("accuracy", above="ce.accuracy", by=0.3), False,
         "kd.accuracy 0.75 is 0.25 above ce.accuracy 0.5 (needed 0.3): failed"),
        (Gate("val_ppl", max=200), True, "kd.val_ppl 187.2 is at most 200: passed"),
        (Gate("val_ppl", max=100), False, "kd.val_ppl 187.2 is above 100: failed"),
        (Gate("accuracy", min=0.75), True, "kd.accuracy 0.75 is at least 0.75: passed"),
        (Gate("accuracy", min=0.8), False, "kd.accuracy 0.75 is below 0.8: failed"),
    ],
)  # fmt: skip
def test_a_gate_compares_in_the_direction_it_says_and_shows_both_numbers(
    gate: Gate, passed: bool, line: str
) -> None:
    result = evaluate([gate], RECORDED, "kd")
    assert (result.passed, result.lines) == (passed, (line,))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "0", None, [0], {}])
@pytest.mark.parametrize(
    "gate", [Gate("x", min=-1e9), Gate("x", max=1e9), Gate("x", below="y"), Gate("y", above="x")]
)
def test_what_is_not_a_finite_number_fails(value: Any, gate: Gate) -> None:
    """`checkpoint_valid: false` once passed a gate elsewhere, because false <= true."""
    result = evaluate([gate], {"s": {"x": value, "y": 1.0}}, "s")
    assert not result.passed and result.lines[0].endswith(": failed")


@pytest.mark.parametrize(
    ("gate", "evaluations", "why"),
    [
        (Gate("vall_loss", max=9), RECORDED, "kd.vall_loss was not recorded: failed"),
        (Gate("ce.x", max=9), RECORDED, "ce.x was not recorded: failed"),
        (Gate("val_loss", below="ce.x"), RECORDED, "cannot be compared: ce.x was not recorded"),
        (Gate("nobody.val_loss", max=9), RECORDED, "nobody.val_loss was not recorded: failed"),
        (Gate("val_loss", max=9), {}, "kd.val_loss has no evaluation.json: failed"),
        (Gate("val_loss", max=9), {"kd": None}, "kd.val_loss has no evaluation.json: failed"),
        (Gate("ce.val_loss", max=9), {"kd": {}, "ce": None}, "ce.val_loss has no evaluation.json"),
        (Gate("val_loss", max=9), {"kd": {}}, "kd.val_loss was not recorded: failed"),
    ],
)
def test_what_is_missing_fails_and_is_named(gate: Gate, evaluations: Any, why: str) -> None:
    """A missing metric was once skipped elsewhere, an unknown gate let everything through."""
    result = evaluate([gate], evaluations, "kd")
    assert not result.passed and why in result.lines[0]


def test_the_name_of_a_metric_does_not_choose_the_direction() -> None:
    """A name holding `rate` was once read as higher-is-better, `success` as lower-is-better."""
    assert not evaluate([Gate("hallucinated_api_rate", max=0.1)], RECORDED, "kd").passed
    assert evaluate([Gate("function_call_success", min=0.8)], RECORDED, "kd").passed


def test_every_condition_of_every_gate_must_hold() -> None:
    gates = [Gate("accuracy", min=0.7, max=0.8, above="ce.accuracy"), Gate("val_ppl", max=1)]
    result = evaluate(gates, RECORDED, "kd")
    assert not result.passed
    assert [line.rpartition(": ")[2] for line in result.lines] == ["passed"] * 3 + ["failed"]
    assert evaluate(gates[:1], RECORDED, "kd").passed
    assert evaluate([], RECORDED, "kd").passed


def test_a_name_in_the_stages_own_evaluation_comes_before_another_stages() -> None:
    result = evaluate([Gate("kd.val_loss", below="ce.val_loss")], RECORDED, "compare")
    assert result.lines == ("kd.val_loss 5.3 is 1.2 below ce.val_loss 6.5 (needed 0): passed",)


def test_equal_is_neither_below_nor_above() -> None:
    same = {"s": {"x": 2.0, "y": 2.0}}
    for gate in (Gate("x", below="y"), Gate("x", above="y")):
        result = evaluate([gate], same, "s")
        assert not result.passed and "is equal to" in result.lines[0]


def test_a_margin_is_met_as_written_in_decimal() -> None:
    assert 6.1 - 6.0 < 0.1
    assert evaluate([Gate("x", below="y", by=0.1)], {"s": {"x": 6.0, "y": 6.1}}, "s").passed
    assert not evaluate([Gate("x", below="y", by=0.1)], {"s": {"x": 6.0, "y": 6.0999}}, "s").passed


@settings(max_examples=200, derandomize=True)
@given(
    x=st.floats() | st.integers(), y=st.floats() | st.integers(), by=st.floats(0, 1e3),
    below=st.booleans(),
)  # fmt: skip
def test_a_gate_passes_only_when_the_numbers_say_so(
    x: float, y: float, by: float, below: bool
) -> None:
    gate = Gate("x", below="y" if below else None, above=None if below else "y", by=by)
    result = evaluate([gate], {"s": {"x": x, "y": y}}, "s")
    if result.passed:
        margin = y - x if below else x - y
        assert math.isfinite(margin) and margin > 0
        assert margin >= by - 1e-9 * max(1.0, abs(x), abs(y))
