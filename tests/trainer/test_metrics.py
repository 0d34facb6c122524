"""Metrics: whole lines on disk, the same values in TensorBoard, and training never stops for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.disk import file_size_limit
from trainer.metrics import Metrics
from trainer.store import DiskFull, StoreError


def opened(folder: Path, attempt: int = 1, **options: Any) -> Metrics:
    options.setdefault("tensorboard", False)
    return Metrics(folder, "kd", attempt, now=lambda: 1_800_000_000.25, **options)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def lines(folder: Path, attempt: int = 1) -> list[dict[str, Any]]:
    text = (folder / "metrics" / f"{attempt:04d}.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_every_kind_of_line_is_as_the_contract_says(tmp_path: Path) -> None:
    metrics = opened(tmp_path, attempt=3)
    metrics.step(10, train_loss=2.5, kd_loss=None, grad_norm=float("inf"), steps=20)
    metrics.eval(10, val_loss=float("nan"), val_tokens=7)
    metrics.event("checkpoint", 10, path="step-10", best=True, name="x")
    metrics.table([{"model": "student", "val_loss": float("-inf"), "steps": None}])
    metrics.close()
    metrics.close()
    head = {"v": 1, "attempt": 3, "stage": "kd", "time": 1_800_000_000.25}
    assert lines(tmp_path, 3) == [
        {**head, "kind": "step", "global_step": 10}
        | {"train_loss": 2.5, "grad_norm": "inf", "steps": 20},
        {**head, "kind": "eval", "global_step": 10, "val_loss": "nan", "val_tokens": 7},
        {**head, "kind": "event", "global_step": 10, "event": "checkpoint"}
        | {"path": "step-10", "best": True, "name": "x"},
        {**head, "kind": "table", "global_step": 0}
        | {"rows": [{"model": "student", "val_loss": "-inf"}]},
    ]


facts = st.dictionaries(
    st.text(max_size=4).map(lambda name: f"x{name}"),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=5,
    ),
    max_size=4,
)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(facts)
def test_any_facts_give_one_line_of_strict_json(
    tmp_path_factory: pytest.TempPathFactory, given_facts: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("facts")
    metrics = opened(folder)
    metrics.event("any", 1, **given_facts)
    metrics.close()
    (line,) = lines(folder)
    present = {key for key, value in given_facts.items() if value is not None}
    assert {key for key in line if key.startswith("x")} == present
    for key in present:
        if type(given_facts[key]) in (int, bool, str):
            assert line[key] == given_facts[key] and type(line[key]) is type(given_facts[key])


def test_scalars_of_torch_and_numpy_are_numbers(tmp_path: Path) -> None:
    opened(tmp_path).step(1, a=torch.tensor(0.5), b=numpy.float32(0.25), c=numpy.int64(3))
    assert {key: lines(tmp_path)[0][key] for key in "abc"} == {"a": 0.5, "b": 0.25, "c": 3}


def test_a_fact_cannot_take_the_place_of_the_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its own stage, attempt; rename the fact"):
        opened(tmp_path).step(1, stage="x", loss=1.0, attempt=7)
    assert lines(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"v": 1, "ki', "x" * 200_000])
def test_a_torn_last_line_is_cut_before_going_on(tmp_path: Path, torn: str) -> None:
    metrics = opened(tmp_path)
    metrics.step(1, loss=1.0)
    metrics.close()
    with metrics.path.open("a") as file:
        file.write(torn)
    opened(tmp_path).step(2, loss=2.0)
    assert [line["global_step"] for line in lines(tmp_path)] == [1, 2]
    metrics.path.write_text(torn)
    opened(tmp_path).step(3, loss=3.0)
    assert [line["global_step"] for line in lines(tmp_path)] == [3]


def test_lines_are_there_before_the_file_is_closed(tmp_path: Path) -> None:
    metrics = opened(tmp_path)
    for step in range(3):
        metrics.step(step, loss=1.0)
        assert len(lines(tmp_path)) == step + 1
    assert not (tmp_path / "tensorboard").exists()


def test_a_full_disk_stops_at_a_whole_line(tmp_path: Path) -> None:
    metrics = opened(tmp_path)
    metrics.step(1, loss=1.0)
    size = metrics.path.stat().st_size
    with file_size_limit(size + size // 2), pytest.raises(DiskFull) as raised:
        metrics.step(2, loss=2.0)
    assert f"disk full (file size limit): {metrics.path} needs {size} bytes" in str(raised.value)
    assert [line["global_step"] for line in lines(tmp_path)] == [1]
    metrics.step(3, loss=3.0)
    assert [line["global_step"] for line in lines(tmp_path)] == [1, 3]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("a file")
    with pytest.raises(StoreError, match=r"cannot write .*metrics/0001\.jsonl: "):
        opened(tmp_path)


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    tags = shown.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in tags}


def test_tensorboard_shows_the_numbers(tmp_path: Path) -> None:
    metrics = opened(tmp_path, tensorboard=True)
    metrics.step(1, train_loss=2.5, note="text", tokens=100, absent=None)
    metrics.eval(1, val_loss=0.5, ok=True)
    metrics.step(2, train_loss=float("inf"))
    metrics.event("oom_split", 2, micro_batch=4)
    metrics.close()
    assert board(tmp_path) == {
        "train_loss": [(1, 2.5), (2, float("inf"))],
        "tokens": [(1, 100.0)],
        "val_loss": [(1, 0.5)],
    }


def test_a_resumed_attempt_replaces_its_steps_in_tensorboard(tmp_path: Path) -> None:
    first = opened(tmp_path, attempt=1, tensorboard=True)
    for step in (1, 2, 3, 4):
        first.step(step, train_loss=float(step))
    second = opened(tmp_path, attempt=2, tensorboard=True)  # the first one died: never closed
    second.step(3, train_loss=30.0)
    second.close()
    assert board(tmp_path) == {"train_loss": [(1, 1.0), (2, 2.0), (3, 30.0)]}


def test_tensorboard_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way")
    told: list[str] = []
    metrics = opened(tmp_path, tensorboard=True, warn=told.append)
    for step in range(3):
        metrics.step(step, loss=1.0)
    metrics.close()
    assert len(told) == 1 and "TensorBoard is off" in told[0] and "FileExistsError" in told[0]
    assert len(lines(tmp_path)) == 3


def test_tensorboard_that_is_not_installed_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    metrics = opened(tmp_path, tensorboard=True)
    metrics.step(1, loss=1.0)
    metrics.step(2, loss=1.0)
    metrics.close()
    said = capsys.readouterr().err
    assert said.count("TensorBoard is off") == 1 and "ModuleNotFoundError" in said
    assert len(lines(tmp_path)) == 2


def test_a_disk_too_full_for_tensorboard_alone_does_not_stop_training(tmp_path: Path) -> None:
    """Many short names take more room in an event file than in a line of JSON."""
    told: list[str] = []
    metrics = opened(tmp_path, tensorboard=True, warn=told.append)
    many = {f"{a}{b}": 1 for a in "abcdefghijklmno" for b in "abcdefghijklmno"}
    metrics.step(0, **many)
    (events,) = (tmp_path / "tensorboard").iterdir()
    line, record = metrics.path.stat().st_size, events.stat().st_size
    assert record > line + 300
    with file_size_limit(20 * line + 500):
        for step in range(1, 20):
            metrics.step(step, **many)
        metrics.close()
    assert len(told) == 1 and "disk full (file size limit)" in told[0]
    assert len(lines(tmp_path)) == 20
    assert list((tmp_path / "tensorboard").iterdir()) == [events]


def test_a_restart_of_an_attempt_has_a_part_of_its_own(tmp_path: Path) -> None:
    for restart in (0, 2):
        metrics = Metrics(tmp_path, "sft", 1, restart=restart, tensorboard=False)
        metrics.step(1, loss=1.0)
        metrics.close()
    first, second = (
        json.loads((tmp_path / "metrics" / name).read_text())
        for name in ("0001.jsonl", "0001r2.jsonl")
    )
    assert "restart" not in first and (second["attempt"], second["restart"]) == (1, 2)
