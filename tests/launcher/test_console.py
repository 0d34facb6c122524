"""What is printed: aligned and whole in a pipe, coloured on a terminal, one document as JSON."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import console
from launcher.backends.base import Check
from launcher.errors import RecipeErrors, UsageError
from tests.launcher.recorded import Recorder, quickstart


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in the test itself: pytest sets the streams again between a fixture and its test."""
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return out


_CELL = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60)


@settings(max_examples=60, derandomize=True)
@given(st.lists(st.tuples(_CELL, _CELL, _CELL), max_size=6), st.sets(st.integers(0, 2)))
def test_columns_are_aligned_and_never_cut(rows: list[tuple[str, ...]], right: set[int]) -> None:
    lines = console.columns(("A", "B", "C"), rows, right=right)

    assert len(lines) == len(rows) + 1
    for row, line in zip(rows, lines[1:]):
        assert line.split() == list(row)
    ends = {re.match(r"\s*\S+", line).end() for line in lines if 0 in right}  # type: ignore[union-attr]
    starts = {line.index(line.split()[0]) for line in lines if 0 not in right}
    assert len(ends) <= 1 and starts <= {0}


def test_a_pipe_gets_no_colour_and_a_terminal_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_a_terminal(monkeypatch)
    run = quickstart(tmp_path).run()
    coloured = "\n".join(console.runs([run], run.created))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        plain = "\n".join(console.runs([run], run.created))

    assert "\x1b[32msucceeded\x1b[0m" in coloured
    assert "\x1b" not in plain and "succeeded" in plain
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


def test_no_color_and_dumb_terminals_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_a_terminal(monkeypatch)
    assert console.can_show_live()
    assert console.paint("x", "red") != "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.paint("x", "red") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert console.paint("x", "red") == "x"
    assert not console.can_show_live()


def test_a_long_name_is_whole_in_the_list(tmp_path: Path) -> None:
    made = Recorder(tmp_path, recipe="a-recipe-with-a-very-long-name-of-40-chars")
    made.begin()
    made.train("kd")

    header, line = console.runs([made.run()], made.clock.now() + 65)

    assert made.name in line
    assert line.split()[1:8] == ["running", "kd", "100/100", "5.1245", "7,848", "0s", "$0"]
    assert header.split()[0] == "NAME" and line.endswith("1m05s ago")


def test_one_run_in_full_names_stages_attempts_and_artifacts(tmp_path: Path) -> None:
    made = Recorder(tmp_path)
    made.begin()
    made.stage("kd", "succeeded")
    made.gate("kd", False, "kd.val_loss 9 is above 5: failed")
    made.end("failed", 6, why="the gate of kd failed")

    text = "\n".join(console.run_lines(made.run(), made.clock.now()))

    for fact in (
        made.name, "failed  the gate of kd failed", "exit code 6", "kd.val_loss 9 is above 5",
        f"{made.name}-j0", "here", str(made.root), "holds nothing",
    ):  # fmt: skip
        assert fact in text, fact


def test_every_stage_shows_its_own_newest_numbers(tmp_path: Path) -> None:
    lines = console.stages(quickstart(tmp_path).run())

    kd, ce, compare = (line.split() for line in lines[1:])
    assert kd == ["kd", "kd", "succeeded", "100/100", "5.0294", "5.2294", "-"]
    assert ce == ["ce", "pretrain", "succeeded", "100/100", "5.8846", "6.0846", "-"]
    assert compare == ["compare", "evaluate", "succeeded", "-", "-", "-", "passed"]


def test_an_error_is_its_lines_then_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    console.error(RecipeErrors(["a.yaml:1:2: unknown key", "a.yaml:3:4: not a number"]))
    console.error(UsageError("no run 'x'", "`launch status` lists them"))

    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "error: a.yaml:1:2: unknown key",
        "error: a.yaml:3:4: not a number",
        "error: no run 'x'",
        "  `launch status` lists them",
    ]


def test_documents_are_versioned_and_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    console.document({"loss": float("nan"), "rows": [{"x": float("-inf")}], "path": Path("/a")})

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    facts = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert facts == {"v": 1, "loss": "nan", "rows": [{"x": "-inf"}], "path": "/a"}


def test_silence_is_no_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    with pytest.raises(UsageError, match="it costs money") as caught:
        console.confirm("Start it?", "it costs money")
    assert "--yes" in caught.value.hint


@pytest.mark.parametrize(
    ("answer", "meaning"), [("y", True), ("YES", True), ("n", False), ("", False), ("maybe", False)]
)
def test_only_yes_is_a_yes(answer: str, meaning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _on_a_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdin", Terminal(answer + "\n"))
    assert console.confirm("Start it?", "") is meaning
    assert terminal.getvalue() == "Start it? [y/N] "


def test_a_comparison_keeps_every_column_and_digit_that_matters() -> None:
    header, first, second = console.comparison(
        [
            {"note": "best", "val_loss": 5.21239, "model": "kd", "parameters": 418_272},
            {"model": "ce", "val_loss": "nan", "parameters": 1_720_000, "training_seconds": 22.24},
        ]
    )

    assert header.split() == ["model", "parameters", "training_seconds", "val_loss", "note"]
    assert first.split() == ["kd", "418,272", "-", "5.2124", "best"]
    assert second.split() == ["ce", "1,720,000", "22.2", "nan", "-"]


def test_a_check_that_failed_comes_with_its_fix() -> None:
    lines = console.checks(
        [Check("disk", "pass", "fine", "unused"), Check("torch", "fail", "absent", "install it")]
    )

    assert [line.split() for line in lines[1:]] == [
        ["disk", "pass", "fine"], ["torch", "fail", "absent"], ["fix:", "install", "it"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (90000, "1d01h"),
     (-5, "0s"), (float("inf"), "-")],
)  # fmt: skip
def test_durations_are_short(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_a_moment_is_utc_to_the_microsecond() -> None:
    assert console.moment(1_790_000_000.25) == "2026-09-21T14:13:20.250000Z"
    assert console.moment(1_790_000_000.99999999) == "2026-09-21T14:13:21.000000Z"


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_view_shows_the_stage_that_trains(tmp_path: Path, width: int) -> None:
    from rich.console import Console

    from launcher.commands.live import draw

    made = Recorder(tmp_path)
    made.begin()
    made.stage("kd", "running")
    made.train("kd", steps=100)
    out, run = io.StringIO(), made.run()
    run.warnings.clear()
    Console(file=out, width=width).print(draw(run, made.clock.now(), width))

    text = out.getvalue()
    for fact in (made.name, "kd", "100/100", "loss 5.1245", "tokens/s", "ETA 0s", "spent $0"):
        assert fact in text, fact
    assert "…" not in text
    assert text.count("\n") == 4  # the run, two stages, how to leave: no line is wrapped


def test_the_live_view_leaves_numbers_out_before_it_cuts_names(tmp_path: Path) -> None:
    from rich.console import Console

    from launcher.commands.live import draw

    made = Recorder(tmp_path)
    made.begin()
    made.stage("kd", "running")
    made.train("kd", steps=100)
    run = made.run()
    shown = {}
    for width in (60, 40, 32):
        out = io.StringIO()
        Console(file=out, width=width).print(draw(run, made.clock.now(), width))
        shown[width] = next(line for line in out.getvalue().splitlines() if line.startswith("kd "))

    assert "ETA" in shown[60]
    assert shown[40].split() == ["kd", "running", "100/100", "loss", "5.1245"]
    assert shown[32].split()[:3] == ["kd", "running", "100/100"]
    assert not any("…" in line for line in shown.values())
