"""The smoke test: flags, exit codes, and what it says, alone and on two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import torchrun
from trainer import __main__, smoke
from trainer.config import ConfigError, Smoke, StageConfig
from trainer.runtime import Runtime

ONE = Runtime(torch.device("cpu"), "fp32")


def test_the_seven_flags_have_the_documented_defaults() -> None:
    assert smoke.parse([]) == Smoke(2, 256, 4096, 128, 4, 3e-3, 42)
    flags = "--epochs 1 --batch 2 --samples 3 --features 4 --classes 5 --lr 6e-2 --seed 7"
    assert smoke.parse(flags.split()) == Smoke(1, 2, 3, 4, 5, 6e-2, 7)


def test_it_passes_here_and_the_loss_falls(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["smoke", "--samples", "1024", "--batch", "64"]) == 0
    said = capsys.readouterr().out
    assert "device CPU x 1" in said and "smoke test passed" in said


def test_a_loss_that_does_not_fall_ends_with_6_and_says_what_to_try(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert __main__.main(["smoke", "--samples", "512", "--lr", "1e9"]) == 6
    assert "the loss did not fall" in (said := capsys.readouterr().err) and "--lr 1e+09" in said


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--epochs", "0"], "--epochs: must be at least 1"),
        (["--classes", "1"], "--classes: must be at least 2"),
        (["--lr", "nan"], "--lr: must be greater than 0"),
        (["--lr", "fast"], "--lr: invalid float value"),
        (["--epoch", "3"], "unrecognized arguments"),
    ],
)
def test_a_bad_flag_is_64_in_one_line(
    flags: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["smoke", *flags]) == 64
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1


def test_a_group_that_cannot_start_is_told_before_it_hangs() -> None:
    with pytest.raises(smoke.GroupError, match=r"MASTER_ADDR, MASTER_PORT is not set.*torchrun"):
        smoke.preflight({"WORLD_SIZE": "2", "RANK": "0"})
    with pytest.raises(smoke.GroupError, match="RANK is 2 of WORLD_SIZE 2"):
        smoke.preflight({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"})
    with pytest.raises(ConfigError, match="WORLD_SIZE=two"):
        smoke.preflight({"WORLD_SIZE": "two"})


def test_a_rank_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(smoke.GroupError, match=r"LOCAL_RANK is 3, but this node shows 1 GPU"):
        smoke.preflight({"LOCAL_RANK": "3"})


def test_the_same_seed_gives_the_same_losses() -> None:
    config = Smoke(epochs=1, samples=256, batch=32)
    first, again = (smoke.run(config, ONE, lambda line: None) for _ in range(2))
    assert (first.first, first.last) == (again.first, again.last)
    assert first.steps == 8 and first.bandwidth is None


def test_it_is_a_stage_and_leaves_a_record(tmp_path: Path, run_stage: Callable[..., Any]) -> None:
    config = StageConfig(
        id="try", stage="smoke", output=str(tmp_path), smoke=Smoke(samples=512, batch=64)
    )
    run_stage(config)
    assert json.loads((tmp_path / "run_meta.json").read_text())["completed"] is True
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["last_loss"] < found["first_loss"]


def test_two_processes_check_the_all_reduce() -> None:
    done = torchrun("-m", "trainer", "smoke", "--samples", "1024", "--batch", "64")
    assert done.returncode == 0, done.stderr
    assert "backend gloo" in done.stdout
    assert "all-reduce: right on 2 processes; 16 MiB at " in done.stdout


def test_a_wrong_sum_and_unequal_replicas_are_found_on_two_processes(tmp_path: Path) -> None:
    """Rank 1 spoils what it was given, as a faulty link would."""
    script = tmp_path / "faulty.py"
    script.write_text(_FAULTY)
    for fault, words in (("sum", "wrong sum on rank 1"), ("weights", "weights of rank 1 differ")):
        done = torchrun(str(script), fault)
        assert words in done.stdout + done.stderr, done.stderr


_FAULTY = """
import sys
import torch.distributed as dist
from trainer import runtime, smoke
from trainer.config import Smoke

true, calls = dist.all_reduce, []
def faulty(tensor, *arguments, **options):
    done = true(tensor, *arguments, **options)
    calls.append(tensor.shape)
    late = sys.argv[1] == "weights" and tensor.ndim == 1 and tensor.numel() in range(1000, 10**5)
    if dist.get_rank() == 1 and ((sys.argv[1] == "sum" and len(calls) == 1) or late):
        tensor[3] += 1
    return done
dist.all_reduce = faulty
with runtime.start() as process:
    try:
        smoke.run(Smoke(epochs=1, samples=256, batch=32), process, print)
    except smoke.SmokeFailed as error:
        print(error)
    process.barrier()
runtime.leave(0)
"""
