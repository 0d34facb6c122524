"""The command line, the driver, boot and the trainer together: real processes, real training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stub_jobs import descendants

RECIPE = """\
launch: 1
name: tiny
hardware: {backend: local, accelerator: "cpu:1"}
data:
  train: [{builtin: python-reference, split: train, share: 0.1}]
  validation: [{builtin: python-reference, split: heldout, share: 0.2}]
  sequence_length: 64
train: {steps: 20, micro_batch: 4, lr: 3.0e-3, warmup: 2, log_every: 1, evaluate_batches: 2}
pipeline:
  - {id: tokenizer, stage: tokenizer, tokenizer: {vocab_size: 300}}
  - id: model
    stage: pretrain
    model: &model
      init: random
      tokenizer: ${stage:tokenizer}
      architecture: {hidden_size: 32, layers: 2, heads: 4, dropout: 0.1}
  - id: student
    stage: kd
    model: *model
    kd: {teacher: "${stage:model}"}
    gate: {metric: val_loss, max: 100}
"""


class Shell:
    """`launch` with a home of its own."""

    def __init__(self, home: Path, recipe: Path) -> None:
        self.home, self.recipe = home, recipe
        self.environ = {
            **os.environ,
            "LAUNCH_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            capture_output=True, text=True, env=self.environ, timeout=240,
        )  # fmt: skip
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def start(self, *more: str) -> str:
        """Start the recipe without following it; the run's name."""
        self("up", str(self.recipe), "-d", "--yes", *more)
        return str(self.runs()[0]["name"])

    def runs(self) -> list[dict[str, Any]]:
        return list(json.loads(self("status", "--all", "--json"))["runs"])

    def run(self, name: str) -> dict[str, Any]:
        return next(run for run in self.runs() if run["name"] == name)

    def over(self, name: str) -> dict[str, Any]:
        """Wait until nothing of the run lives; the run."""
        until(lambda: self.summary(name).exists())
        return self.run(name)

    def summary(self, name: str) -> Path:
        return self.home / "runs" / self.run(name)["id"] / "summary.json"

    def weights(self, name: str, stage: str) -> str:
        """sha256 of the last checkpoint of a stage."""
        folder = Path(self.run(name)["root"]) / stage / "checkpoints"
        last = json.loads((folder / "last.json").read_text())["path"]
        return hashlib.sha256((folder / last / "model.safetensors").read_bytes()).hexdigest()

    def boot(self, name: str, attempt: int = 1) -> dict[str, Any]:
        """What boot says of its process, once it does."""
        path = self.home / "local" / f"{name}-j0-a{attempt}" / "process.json"
        until(path.exists)
        return dict(json.loads(path.read_text()))


def until(true: Callable[[], Any], seconds: float = 120.0, every: float = 0.05) -> None:
    """Poll a real process's doing, with a deadline."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Shell]:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    shell = Shell(tmp_path / "home", recipe)
    yield shell
    shell("teardown", "--all", "--yes")
    assert live_processes(shell.home) == []


def live_processes(home: Path) -> list[str]:
    """Command lines of processes that still carry the home."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode()
            if str(home) in line:
                found.append(line)
    return found


def test_a_run_from_up_to_gone(launch: Shell, tmp_path: Path) -> None:
    said = launch("up", str(launch.recipe), "--yes")
    assert "step 20/20" in said and "succeeded" in said
    name = launch.runs()[0]["name"]
    run = launch.run(name)
    assert (run["phase"], run["held"], run["exit_code"]) == ("succeeded", "gone", 0)
    assert [stage["phase"] for stage in run["stages"]] == ["succeeded"] * 3
    assert "gate" in said and "val_loss" in said

    assert "step 20/20" in launch("logs", name, "--tail", "40")
    root = Path(run["root"])
    assert (root / "report.html").exists()
    launch("pull", name, "--to", str(tmp_path / "pulled"))
    metrics = (tmp_path / "pulled" / "model" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "step" for line in metrics) == 20

    assert launch.runs() == [run]
    launch("teardown", name, "--yes")
    assert live_processes(launch.home) == []
    # From the bundle, not from the repository: the bundle's folder was the working directory.
    log = next((root / "logs" / "worker-0").iterdir()).read_text()
    assert "stage model" in log


@pytest.mark.parametrize("stage", ["model", "student"])
def test_ten_steps_and_resume_equal_twenty(launch: Shell, stage: str) -> None:
    launch("up", str(launch.recipe), "--yes")
    whole = launch.runs()[0]["name"]
    said = launch("up", str(launch.recipe), "--yes", "--set", f"pipeline.{stage}.train.until=10")
    name = launch.runs()[0]["name"]
    assert name != whole and "step 10" in said
    run = launch.run(name)
    assert run["phase"] == "cancelled" and "paused at step 10" in run["why"]
    launch("resume", name)
    assert launch.run(name)["phase"] == "succeeded"
    assert launch.weights(name, stage) == launch.weights(whole, stage)


def test_a_trainer_killed_in_a_checkpoint_resumes_from_the_last_whole_one(launch: Shell) -> None:
    name = launch.start("--set", "train.save_every=1", "--set", "train.steps=400")
    checkpoints = Path(launch.run(name)["root"]) / "model" / "checkpoints"
    boot = launch.boot(name)
    until(lambda: any(int(path.name[5:]) >= 3 for path in checkpoints.glob("step-*")))
    until(lambda: any(checkpoints.glob(".tmp-*")), every=0.0002)
    for pid in descendants(boot["pid"]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run = launch.over(name)
    assert (run["phase"], run["exit_code"]) == ("failed", 6)
    manifests = checkpoints.glob("step-*/MANIFEST.json")
    whole = max(int(path.parent.name[5:]) for path in manifests)
    launch("resume", name, "-d")
    log = Path(run["root"]) / "logs" / "worker-0" / "00-0002.log"
    until(lambda: log.exists() and "resumed at step" in log.read_text())
    assert f"resumed at step {whole} " in log.read_text()


def test_a_killed_driver_is_seen_and_up_attaches(launch: Shell) -> None:
    name = launch.start("--set", "train.steps=30000")
    launch.boot(name)
    driver = launch.run(name)["driver"]["pid"]
    os.kill(driver, signal.SIGKILL)
    until(lambda: not launch.run(name)["driver"]["alive"])
    run = launch.run(name)
    assert run["phase"] in ("starting", "running", "provisioning")
    assert "no driver" in str(run["warnings"])
    said = launch("up", str(launch.recipe), "-d", "--yes", "--set", "train.steps=30000")
    assert name in said and len(launch.runs()) == 1
    until(lambda: launch.run(name)["driver"]["alive"])
    launch("stop", name)
    assert launch.over(name)["phase"] == "cancelled"


def test_two_ups_at_once_make_one_run(launch: Shell) -> None:
    command = [sys.executable, "-m", "launcher", "up", str(launch.recipe), "-d", "--yes"]
    both = [subprocess.Popen(command, env=launch.environ, stdout=subprocess.DEVNULL) for _ in "ab"]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert len(launch.runs()) == 1
    assert len(list((launch.home / "local").iterdir())) <= 1


def test_a_second_driver_is_refused(launch: Shell) -> None:
    name = launch.start("--set", "train.steps=300")
    assert "driven by" in launch("drive", name, code=8)


def test_bad_data_ends_the_run_with_one_clear_line(launch: Shell, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    data = json.dumps({"train": [{"path": str(bad)}]})
    said = launch("up", str(launch.recipe), "--yes", "--set", f"pipeline.model.data={data}", code=6)
    assert f"{bad}:2" in said and "Traceback" not in said
    assert launch.runs()[0]["jobs"][0]["attempts"][0]["exit_code"] == 65
