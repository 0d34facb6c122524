"""Trackers: the same numbers under the same names, no secret, and never in training's way."""

from __future__ import annotations

import importlib
import json
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import in_folder
from tests.trainer.test_loop import lines
from trainer import sinks
from trainer.config import StageConfig
from trainer.metrics import Metrics

Run = Callable[..., Any]


@pytest.fixture
def as_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a real module of this name, with this source, before any installed one."""

    def put(name: str, source: str) -> None:
        folder = tmp_path / "modules"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(source)
        for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()

    yield put
    for name in ("mlflow", "wandb"):
        if "modules" in str(getattr(sys.modules.get(name), "__file__", "")):
            del sys.modules[name]


BROKEN_AT_ONCE = "raise RuntimeError('broken at import')"
BROKEN_LATER = """
class Settings:
    def __init__(self, **options): pass
class Run:
    def log(self, values, step): raise OSError("broken at every call")
    def finish(self): raise OSError("broken at every call")
def init(**options): return Run()
"""
LEAVES = "import sys\nsys.exit('I end your process')"


@pytest.mark.parametrize("source", [BROKEN_AT_ONCE, BROKEN_LATER, LEAVES])
def test_a_tracker_that_fails_at_every_call_costs_one_warning(
    source: str, as_module: Any, stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    as_module("wandb", source)
    outcome = run_stage(in_folder(stage, tmp_path / "out", steps=5, report_to=("wandb",)))
    assert outcome.stopped is None
    told = [line for line in outcome.lines if "wandb is off from here on" in line]
    assert len(told) == 1
    assert [line["global_step"] for line in lines(tmp_path / "out", "step")] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_trackers_that_are_not_installed_cost_one_warning_each(
    stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mlflow", "mlflow.entities", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # what an import of a missing one does
    everything = ("tensorboard", "mlflow", "wandb")
    outcome = run_stage(in_folder(stage, tmp_path / "out", steps=3, report_to=everything))
    for name in ("mlflow", "wandb"):
        (told,) = [line for line in outcome.lines if f"{name} is off from here on" in line]
        assert "ModuleNotFoundError" in told
        assert "pip install 'launch-llm[tracking]'" in told
    assert any((tmp_path / "out" / "tensorboard").iterdir())


class Recorder:
    """A tracker that keeps what it is given, when it is let."""

    def __init__(self, gate: threading.Event) -> None:
        self.gate, self.seen, self.closed = gate, [], False  # type: ignore[var-annotated]

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.gate.wait()
        self.seen.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def test_everything_arrives_in_order_before_close_returns(tmp_path: Path) -> None:
    gate = threading.Event()
    tracker = Recorder(gate)
    metrics = Metrics(
        tmp_path, "kd", 1, tensorboard=False, trackers={"x": sinks.Background(lambda: tracker)}
    )
    metrics.step(1, train_loss=2.5, kd_loss=None)
    metrics.eval(1, val_loss=2.0, note="a word")
    metrics.event("checkpoint", 1, path="step-1")
    assert tracker.seen == []  # nobody waited for it
    gate.set()
    metrics.close()
    assert tracker.seen == [(1, {"train_loss": 2.5}), (1, {"val_loss": 2.0})] and tracker.closed


def test_a_tracker_that_hangs_is_left_behind(tmp_path: Path) -> None:
    gate, told = threading.Event(), []  # type: ignore[var-annotated]
    stuck = sinks.Background(lambda: Recorder(gate), patience=0.0)
    metrics = Metrics(tmp_path, "kd", 1, tensorboard=False, trackers={"x": stuck}, warn=told.append)
    for step in range(1100):
        metrics.step(step, train_loss=1.0)
    assert len(told) == 1 and "1000 steps behind" in told[0]
    metrics.close()
    again = Metrics(
        tmp_path, "kd", 2, tensorboard=False, warn=told.append,
        trackers={"y": sinks.Background(lambda: Recorder(gate), patience=0.0)},
    )  # fmt: skip
    again.step(1, train_loss=1.0)
    again.close()
    assert len(told) == 2 and "not finished after 0 s" in told[1]
    gate.set()


def test_the_value_of_a_secret_variable_is_not_among_the_parameters() -> None:
    environ = {"HF_TOKEN": "hf_0123456789", "WANDB_API_KEY": "k" * 40, "HOME": "/home/somebody"}
    given = {"model": {"name": "https://hf_0123456789@hub/m"}, "data": ["/home/somebody/x"], "n": 3}
    assert sinks.without_secrets(given, environ) == {
        "model": {"name": "https://***@hub/m"}, "data": ["/home/somebody/x"], "n": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("no route to http://alice:S3cret@host:80/x", "no route to http://***@host:80/x"),
        ("http://alice:S3c@ret@host", "http://***@host"),
        ("postgresql://alice:S3cret@db/runs", "postgresql://***@db/runs"),
        ("https://hf_short@hub/m", "https://***@hub/m"),
        ("gs://bucket@best", "gs://bucket@best"),
        ("https://host:8080/model@best", "https://host:8080/model@best"),
        ("file:///runs/teacher@last", "file:///runs/teacher@last"),
    ],
)
def test_a_url_is_shown_without_user_and_password(given: str, shown: str) -> None:
    assert sinks.without_secrets({"said": [given]}, {}) == {"said": [shown]}


def test_no_password_of_a_tracker_or_of_the_configuration_is_written(
    stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (source,) = stage.data.train
    data = replace(stage.data, train=(replace(source, path=f"{tmp_path}/hf_0123456789.txt"),))
    Path(str(data.train[0].path)).write_text("some text to learn")
    with socket.socket() as reserved:  # bound and not listening: it refuses
        reserved.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{reserved.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://alice:S3cret@{place}")
        config = replace(stage, data=data)
        outcome = run_stage(in_folder(config, tmp_path / "out", steps=2, report_to=("mlflow",)))
    (told,) = [line for line in outcome.lines if "mlflow is off from here on" in line]
    assert place in told and "S3cret" not in told
    snapshot = (tmp_path / "out" / "args_snapshot.json").read_text()
    assert "***.txt" in snapshot and "hf_0123456789" not in snapshot


def test_parameters_are_flat_and_absent_ones_left_out() -> None:
    given = {"train": {"lr": 0.1, "steps": None}, "data": [{"path": "a"}, {"path": "b"}]}
    assert sinks.flat(given) == {"train.lr": 0.1, "data.0.path": "a", "data.1.path": "b"}


SECRET = "wk_0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def tracked(
    stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """A run of five steps that reports to one tracker; its stage folder. No warning was told."""

    def run(name: str, at: str = "out") -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        config = in_folder(stage, tmp_path / at, steps=5, report_to=(name,))
        outcome = run_stage(config, run_id="00ff", name="kd-l4")
        assert not [line for line in outcome.lines if "is off from here on" in line], outcome.lines
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
        return tmp_path / at

    return run


@pytest.mark.parametrize(
    ("at", "store"),
    [("out", "out/mlruns"), ("runs/00ff/artifacts/kd/artifacts", "runs/00ff/mlruns")],
)
def test_mlflow_has_the_same_numbers_names_and_parameters(
    at: str, store: str, tracked: Any, tmp_path: Path
) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    from mlflow.tracking import MlflowClient

    folder = tracked("mlflow", at)
    client = MlflowClient((tmp_path / store).as_uri())
    place = client.get_experiment_by_name("launch").experiment_id
    (run,) = client.search_runs([place])
    assert run.info.run_name == "kd-l4-tiny" and run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == "0.003" and "train.epochs" not in run.data.params
    history = client.get_metric_history(run.info.run_id, "train_loss")
    recorded = [(line["global_step"], line["train_loss"]) for line in lines(folder, "step")]
    assert [(m.step, m.value) for m in history] == recorded
    assert run.data.metrics["val_loss"] == lines(folder, "eval")[-1]["val_loss"]


@pytest.mark.parametrize("full", [False, True], ids=["no-server", "no-place"])
def test_mlflow_out_of_reach_costs_one_warning_and_no_number(
    full: bool, stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    (tmp_path / "file").touch()
    with socket.socket() as reserved:  # bound and not listening: it refuses
        reserved.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        nowhere = (tmp_path / "file" / "mlruns").as_uri()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", nowhere if full else server)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        config = in_folder(stage, tmp_path / "out", steps=3, report_to=("mlflow",))
        outcome = run_stage(config)
    (told,) = [line for line in outcome.lines if "mlflow is off from here on" in line]
    assert str(tmp_path / "out" / "metrics") in told
    assert outcome.stopped is None and len(lines(tmp_path / "out", "step")) == 3


def test_wandb_offline_has_the_same_numbers_names_and_parameters(
    tracked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tracked("wandb")
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    losses, named = {}, set()
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        named |= {record.run.display_name} | {i.key for i in record.run.config.update}
        items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
        if "train_loss" in items:
            losses[items["_step"]] = items["train_loss"]
    recorded = {line["global_step"]: line["train_loss"] for line in lines(folder, "step")}
    assert losses == recorded
    assert {"kd-l4-tiny", "train.lr"} <= named


def _records(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format, after a file header of 7 bytes: blocks of 32 KiB, each
    piece with checksum (4 bytes), length (2) and type (1 whole, 2 first, 3 middle, 4 last)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""
