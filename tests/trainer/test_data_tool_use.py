"""Tool calls in a text: what is answered, what is learned, and what the calculator refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Data, Source, ToolUse
from trainer.data import DataError
from trainer.data.chat import view_of
from trainer.data.read import Document, documents
from trainer.data.shapes import Piece, Skipped
from trainer.data.tool_use import answered, calculate


def read(path: Path, ratio: float | None, skipped: Skipped | None = None) -> list[Document]:
    tool_use = None if ratio is None else ToolUse(ratio)
    view = view_of(Data(tool_use=tool_use), "pretrain", None)
    return list(documents((Source(path=str(path), format="math_tool"),), view, skipped))


def learned(piece: Piece) -> list[str]:
    return [piece.text[start:end] for start, end in piece.spans or ()]


def test_a_call_is_answered_below_and_the_answer_is_not_learned() -> None:
    piece = answered('What is 6*7?\nCALL calculator:"6*7"\nIt is 42.', "f:1")
    assert piece.text == 'What is 6*7?\nCALL calculator:"6*7"\nRESULT: 42\nIt is 42.'
    assert learned(piece) == ['What is 6*7?\nCALL calculator:"6*7"\n', "It is 42."]


def test_a_call_that_ends_the_text_gets_a_line_for_its_answer() -> None:
    piece = answered('CALL calculator:"1/4"', "f:1")
    assert piece.text == 'CALL calculator:"1/4"\nRESULT: 0.25'
    assert learned(piece) == ['CALL calculator:"1/4"\n']


def test_an_answer_that_is_there_stays_and_is_not_learned_either() -> None:
    text = 'CALL calculator:"1+1"\nRESULT: 3\nso 3'
    for fill in (True, False):
        piece = answered(text, "f:1", fill)
        assert piece.text == text
        assert learned(piece) == ['CALL calculator:"1+1"\n', "so 3"]


def test_the_scratchpad_shows_its_last_eight_notes() -> None:
    text = "\n".join(f'CALL scratchpad:"note  {i}"' for i in range(10))
    results = [line for line in answered(text, "f:1").text.splitlines() if "RESULT" in line]
    assert results[0] == "RESULT: note 0"
    assert results[9] == "RESULT: " + " | ".join(f"note {i}" for i in range(2, 10))


@given(lines=st.lists(st.sampled_from(['CALL calculator:"2*3"', "RESULT: 6", "text", ""])))
def test_everything_but_results_is_learned_once(lines: list[str]) -> None:
    piece = answered("\n".join(lines), "f:1")
    kept = "".join(
        line for line in piece.text.splitlines(keepends=True) if not line.startswith("RESULT:")
    )
    assert "".join(learned(piece)) == kept
    again = answered(piece.text, "f:1")
    assert again.text == piece.text


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2+2", "4"), ("6 * (7 - 2)", "30"), ("7/2", "3.5"), ("6/2", "3"), ("7//2", "3"),
        ("-2**2", "-4"), ("2^10", "1024"), ("sin(pi/2)", "1"), ("sqrt(2)", "1.41421356237"),
        ("round(2.567, 1)", "2.6"), ("max(1, 2, 3) % 2", "1"), ("2**-1", "0.5"),
        ("1e20*3", "3e+20"),
    ],
)  # fmt: skip
def test_the_calculator_computes(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("1/0", "division by zero"), ("9**9**9", "too large"), ("2**100000", "too large"),
        ("(10**600)*(10**700)", "too large"), ("1e308*10", "no finite number"),
        ("10.0**400", "no finite number"), ("(-8)**0.5", "no real number"),
        ("__import__('os').system('true')", "only arithmetic"), ("().__class__", "only arithmetic"),
        ("x", "only arithmetic"), ("'a'*9", "only arithmetic"), ("True+1", "only arithmetic"),
        ("[1][0]", "only arithmetic"), ("1 if 1 else 2", "only arithmetic"),
        ("sqrt(x=1)", "only arithmetic"), ("lambda: 1", "only arithmetic"),
        ("2+", "not an expression"), ("(" * 300, "not an expression"), ("1" * 501, "too long"),
        ("-" * 400 + "1", "too long"), ("gcd(1.5, 2)", "no finite number"), ("min()", "no finite"),
    ],
)  # fmt: skip
def test_the_calculator_refuses_all_else_at_once(expression: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        calculate(expression)


def test_rounding_to_a_billion_digits_does_not_hang() -> None:
    assert calculate("round(5, -1000000000)") == "0"


def test_what_the_calculator_refuses_is_said_as_its_result() -> None:
    assert answered('CALL calculator:"1/0"', "f:1").text.endswith("RESULT: error: division by zero")


def test_the_ratio_says_how_many_documents_are_answered(tmp_path: Path) -> None:
    path = tmp_path / "math.jsonl"
    path.write_text(json.dumps({"text": 'CALL calculator:"1+1"'}) + "\n")
    path.write_text(path.read_text() * 400)
    shares = {
        ratio: sum("RESULT: 2" in d.text for d in read(path, ratio)) / 400
        for ratio in (None, 0.0, 0.25, 1.0)
    }
    assert shares[None] == shares[0.0] == 0 and shares[1.0] == 1
    assert 0.18 < shares[0.25] < 0.32
    assert read(path, 0.25) == read(path, 0.25)


def test_a_tool_that_does_not_exist_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "math.jsonl"
    path.write_text('{"text": "plain"}\n{"text": "CALL shell:\\"ls\\""}\n')
    with pytest.raises(DataError, match=r"math\.jsonl:2: CALL of 'shell': no such tool"):
        read(path, 1.0)
    skipped = Skipped()
    assert [d.text for d in read(path, 1.0, skipped)] == ["plain"]
    assert skipped.count == 1
