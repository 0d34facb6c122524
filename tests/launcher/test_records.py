"""What `records` makes of files that are whole, growing, torn, or written by several attempts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import records
from tests.launcher.recorded import Recorder, write_part


def _step(step: int, **facts: Any) -> dict[str, Any]:
    return {"kind": "step", "global_step": step, "time": float(step), **facts}


def test_the_highest_attempt_of_a_step_wins_whatever_the_order_of_the_parts(tmp_path: Path) -> None:
    write_part(tmp_path, [_step(10, train_loss=3.0), _step(20, train_loss=2.9)], attempt=10)
    write_part(tmp_path, [_step(10, train_loss=5.0), _step(30, train_loss=4.0)], attempt=9)

    found = records.metrics(tmp_path)

    assert [(line["global_step"], line["train_loss"]) for line in found] == [
        (10, 3.0),
        (20, 2.9),
        (30, 4.0),
    ]


def test_of_an_attempt_the_last_restart_wins_and_is_the_newest(tmp_path: Path) -> None:
    """Names alone would put the tenth restart before the second."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    for name, restart, step, loss in [
        ("0001-00000", None, 10, 5.0), ("0001r2-00000", 2, 20, 3.0), ("0001r10-00000", 10, 10, 2.0)
    ]:  # fmt: skip
        line = {"v": 1, "attempt": 1, "restart": restart, **_step(step, train_loss=loss)}
        (folder / f"{name}.jsonl").write_text(json.dumps(line) + "\n")

    found = [(line["global_step"], line["train_loss"]) for line in records.metrics(tmp_path)]

    assert found == [(10, 2.0), (20, 3.0)]
    assert records.progress(tmp_path)["train_loss"] == 2.0


def test_kinds_of_one_step_do_not_replace_each_other(tmp_path: Path) -> None:
    write_part(tmp_path, [_step(50), {"kind": "eval", "global_step": 50, "val_loss": 4.0}])

    assert {line["kind"] for line in records.metrics(tmp_path)} == {"step", "eval"}


def test_all_events_of_a_step_are_kept_but_only_of_the_highest_attempt(tmp_path: Path) -> None:
    def event(name: str) -> dict[str, Any]:
        return {"kind": "event", "global_step": 7, "event": name}

    write_part(tmp_path, [event("signal"), event("checkpoint")], attempt=1)
    write_part(tmp_path, [event("oom_split"), event("oom_split"), event("checkpoint")], attempt=2)

    found = [line["event"] for line in records.metrics(tmp_path)]

    assert found == ["oom_split", "oom_split", "checkpoint"]


def test_a_torn_last_line_and_damaged_lines_are_left_out(tmp_path: Path) -> None:
    part = write_part(tmp_path, [_step(10), _step(20)])
    with part.open("ab") as out:
        out.write(b'\xff\xfe not json\n[1, 2]\n{"kind": "step"}\n')
        out.write(json.dumps({"v": 1, "attempt": 1, **_step(30)}).encode())  # no newline yet

    assert [line["global_step"] for line in records.metrics(tmp_path)] == [10, 20]
    assert records.progress(tmp_path)["global_step"] == 20


def test_missing_and_broken_files_are_empty_answers(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"val_loss": 1')

    assert records.metrics(tmp_path) == []
    assert records.evaluation(tmp_path) == {}
    assert records.meta(tmp_path / "nowhere") == {}
    assert records.progress(tmp_path) == {}


def test_eta_is_what_is_left_at_the_recent_speed(tmp_path: Path) -> None:
    slow = [_step(n, steps=1000) | {"time": n * 9.0} for n in range(0, 100, 10)]
    fast = [_step(n, steps=1000) | {"time": 900 + (n - 100) * 0.5} for n in range(100, 500, 10)]
    write_part(tmp_path, slow + fast)

    found = records.progress(tmp_path)

    assert found["global_step"] == 490
    assert found["eta_seconds"] == pytest.approx(510 * 0.5)


def test_without_a_horizon_there_is_no_eta(tmp_path: Path) -> None:
    write_part(tmp_path, [_step(10), _step(20)])

    assert "eta_seconds" not in records.progress(tmp_path)


def test_progress_reads_only_the_end_of_a_large_part(tmp_path: Path) -> None:
    part = write_part(tmp_path, [_step(n, steps=100_000) for n in range(5000)])
    damaged = b"x" * (part.stat().st_size - 100_000)
    with part.open("r+b") as out:
        out.write(damaged)  # whoever reads from the start finds no line at all before the end

    assert records.progress(tmp_path)["global_step"] == 4999


def test_the_newest_table_of_a_stage_counts(tmp_path: Path) -> None:
    run = Recorder(tmp_path, stages=(("compare", "evaluate"),))
    for attempt, loss in ((1, 9.0), (2, 5.0)):
        table = {"kind": "table", "global_step": 0, "rows": [{"model": "m", "val_loss": loss}]}
        run.metrics("compare", [table], attempt)

    assert records.tables(run.run()) == [("compare", [{"model": "m", "val_loss": 5.0}])]


def test_gates_gives_the_newest_verdict_of_each_stage(tmp_path: Path) -> None:
    run = Recorder(tmp_path, stages=(("a", "kd"), ("b", "kd")))
    run.gate("a", False, "too high")
    run.gate("b", True, "low enough")
    run.gate("a", True, "low now")

    found = {g["id"]: (g["passed"], g["lines"]) for g in records.gates(run.root / "journal")}

    assert found == {"a": (True, ["low now"]), "b": (True, ["low enough"])}


def test_numbers_written_as_words_are_numbers_but_are_not_drawn() -> None:
    lines = [_step(n, train_loss=v) for n, v in enumerate([1.0, "nan", "inf", None, True, 2.0])]

    assert records.series(lines, "step", "train_loss") == [(0.0, 1.0), (5.0, 2.0)]
    assert records.number("-inf") == float("-inf")
    assert records.number("5") is None


_LINE = st.tuples(
    st.sampled_from(["step", "eval", "event"]), st.integers(0, 5), st.integers(1, 3), st.integers()
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(_LINE, max_size=30))
def test_one_line_survives_per_step_and_it_is_of_the_highest_attempt(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, int, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("stage")
    for kind, step, attempt, value in lines:
        write_part(folder, [{"kind": kind, "global_step": step, "value": value}], attempt=attempt)

    found = records.metrics(folder)

    steps = [line["global_step"] for line in found]
    assert steps == sorted(steps)
    for kind, step in {(kind, step) for kind, step, _, _ in lines}:
        highest = max(a for k, s, a, _ in lines if (k, s) == (kind, step))
        wanted = [v for k, s, a, v in lines if (k, s, a) == (kind, step, highest)]
        kept = [x["value"] for x in found if (x["kind"], x["global_step"]) == (kind, step)]
        assert kept == (wanted if kind == "event" else wanted[-1:])


def test_parts_are_read_by_attempt_restart_and_number() -> None:
    names = ["0001-00000", "0001-00001", "0001r1-00000", "0001r2", "0001r10-00000", "0002"]
    shuffled = [f"{name}.jsonl" for name in (names[4], names[0], names[5], names[3], *names[1:3])]
    ordered = sorted(shuffled, key=records.part_order)
    assert [name.partition(".")[0] for name in ordered] == names
    assert records.part_order("00-0002r1-00003.log") == (0, 0, 2, 1, 3, 0)


def test_of_a_step_the_newest_restart_of_the_highest_attempt_counts(tmp_path: Path) -> None:
    for name, restart, loss in (("0001r10", 10, 1.0), ("0001", None, 3.0), ("0001r2", 2, 2.0)):
        line = {"v": 1, "kind": "step", "attempt": 1, "global_step": 5, "train_loss": loss}
        part = tmp_path / "metrics" / f"{name}.jsonl"
        part.parent.mkdir(exist_ok=True)
        part.write_text(json.dumps({**line, **({"restart": restart} if restart else {})}) + "\n")
    assert [line["train_loss"] for line in records.metrics(tmp_path)] == [1.0]
