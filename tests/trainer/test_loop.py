"""Training end to end in this process: resume, recovery, records."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.conftest import in_folder
from trainer import stages
from trainer.batch import Batch
from trainer.checkpoint import Checkpoints
from trainer.config import ConfigError, Distill, Job, StageConfig, Train
from trainer.objective import Loss
from trainer.objectives.next_token import NextToken
from trainer.schedule import Horizon, learning_rate

Run = Callable[..., Any]


def weights(folder: Path | str) -> str:
    """sha256 of the last checkpoint's weights."""
    pointer = json.loads((Path(folder) / "checkpoints" / "last.json").read_text())
    path = Path(folder) / "checkpoints" / pointer["path"] / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(folder: Path | str, kind: str) -> list[dict[str, Any]]:
    parts = sorted((Path(folder) / "metrics").glob("*.jsonl"))
    found = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.fixture
def kd_stage(stage: StageConfig, run_stage: Run, tmp_path: Path) -> StageConfig:
    """A `kd` stage whose teacher is a stage folder trained for a few steps."""
    teacher = in_folder(stage, tmp_path / "teacher", steps=4)
    run_stage(teacher)
    kd = Distill(teacher=teacher.output, temperature=2.0, alpha=0.3)
    return replace(stage, stage="kd", kd=kd)


@pytest.mark.parametrize("kind", ["pretrain", "kd"])
def test_ten_steps_and_resume_equal_twenty_bit_for_bit(
    kind: str, request: pytest.FixtureRequest, run_stage: Run, tmp_path: Path
) -> None:
    config = request.getfixturevalue("stage" if kind == "pretrain" else "kd_stage")
    whole = in_folder(config, tmp_path / "whole", save_every=10)
    parts = in_folder(config, tmp_path / "parts", save_every=10, until=10)
    assert run_stage(whole).stopped is None
    assert run_stage(parts).stopped == "until"
    assert weights(parts.output) != weights(whole.output)
    resumed = run_stage(in_folder(config, tmp_path / "parts", save_every=10), attempt=2)
    assert resumed.stopped is None and resumed.step == 20
    assert weights(parts.output) == weights(whole.output)
    rates = [line["lr"] for line in lines(parts.output, "step")]
    assert rates == [line["lr"] for line in lines(whole.output, "step")]


def test_what_a_stage_leaves_behind(stage: StageConfig, run_stage: Run) -> None:
    outcome = run_stage(stage, commit="abc", project="p")
    folder = Path(stage.output)
    meta = json.loads((folder / "run_meta.json").read_text())
    assert meta["completed"] is True and meta["global_step"] == 20
    assert meta["commit"] == "abc" and meta["hf_token_present"] is False
    assert meta["versions"]["torch"] == torch.__version__
    step = lines(folder, "step")[-1]
    wanted = {"global_step", "train_loss", "ce_loss", "lr", "tokens_per_sec", "grad_norm"}
    assert wanted | {"examples_per_sec"} <= step.keys() and step["global_step"] == 20
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert math.isclose(evaluation["val_ppl"], math.exp(evaluation["val_loss"]), rel_tol=1e-9)
    assert evaluation["best_val_loss"] <= evaluation["val_loss"]
    assert (folder / "args_snapshot.json").exists() and any((folder / "tensorboard").iterdir())
    said = "\n".join(outcome.lines)
    for fact in ("seed 0", "precision fp32", "attention sdpa", "flash-attn", "1 shard", "samples"):
        assert fact in said


def test_kd_logs_its_terms(kd_stage: StageConfig, run_stage: Run) -> None:
    run_stage(kd_stage)
    step = lines(kd_stage.output, "step")[3]
    mixed = 0.3 * step["ce_loss"] + 0.7 * step["kd_loss"]
    assert math.isclose(step["train_loss"], mixed, rel_tol=1e-5)
    assert step["logit_l2"] > 0


def test_the_secret_token_is_said_to_be_present_and_never_written(
    stage: StageConfig, run_stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret_value")
    run_stage(in_folder(stage, Path(stage.output), steps=2))
    meta = json.loads((Path(stage.output) / "run_meta.json").read_text())
    assert meta["hf_token_present"] is True
    for path in Path(stage.output).rglob("*"):
        assert not path.is_file() or b"hf_very_secret_value" not in path.read_bytes()


class Faulty(NextToken):
    """Next-token loss that goes wrong at given steps."""

    def __init__(self, nan: tuple[int, ...] = (), largest: int = 1 << 30) -> None:
        self.nan, self.largest, self.now = nan, largest, 0

    def prepare(self, batch: Batch, step: int) -> Batch:
        self.now = step
        return super().prepare(batch, step)

    def loss(self, model: nn.Module, batch: Batch, norm: dict[str, Tensor], log: bool) -> Loss:
        if batch.rows > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        loss = super().loss(model, batch, norm, log)
        if self.now in self.nan:
            loss.total = loss.total * float("nan")
        return loss


@pytest.fixture
def with_objective(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Make stage `pretrain` use another objective: a row of the table, as a plugin would."""

    def use(objective: Any) -> None:
        row = stages.train(lambda context, tokens: objective)
        monkeypatch.setitem(stages.STAGES, "pretrain", row)

    return use


def test_nans_that_are_not_in_a_row_are_skipped(
    stage: StageConfig, run_stage: Run, with_objective: Any, tmp_path: Path
) -> None:
    with_objective(Faulty(nan=(3, 7)))
    outcome = run_stage(in_folder(stage, tmp_path / "one"))
    assert outcome.stopped is None
    skipped = [e["step"] for e in lines(tmp_path / "one", "event") if e["event"] == "nan_skipped"]
    assert skipped == [4, 8]
    assert all(math.isfinite(v["train_loss"]) for v in lines(tmp_path / "one", "step")[4:6])


def test_out_of_memory_splits_the_micro_batch_and_keeps_the_global_batch(
    stage: StageConfig, run_stage: Run, with_objective: Any, tmp_path: Path
) -> None:
    assert stage.model is not None and stage.model.architecture is not None
    still = replace(stage.model, architecture=replace(stage.model.architecture, dropout=0.0))
    stage = replace(stage, model=still)
    with_objective(Faulty())
    run_stage(in_folder(stage, tmp_path / "calm"))
    with_objective(Faulty(largest=1))
    run_stage(in_folder(stage, tmp_path / "split"))
    splits = [e for e in lines(tmp_path / "split", "event") if e["event"] == "oom_split"]
    assert [e["micro_batch"] for e in splits] == [2, 1]  # remembered: no third one
    calm, split = lines(tmp_path / "calm", "step"), lines(tmp_path / "split", "step")
    assert [s["tokens"] for s in split] == [s["tokens"] for s in calm]
    assert math.isclose(split[-1]["train_loss"], calm[-1]["train_loss"], rel_tol=1e-4)

    with_objective(Faulty(largest=2))
    run_stage(in_folder(stage, tmp_path / "taught", until=5))
    run_stage(in_folder(stage, tmp_path / "taught"), attempt=2)
    splits = [e for e in lines(tmp_path / "taught", "event") if e["event"] == "oom_split"]
    assert len(splits) == 1  # the resumed run knows

    with_objective(Faulty(largest=0))
    with pytest.raises(ConfigError, match=r"one row does not fit.*gradient_checkpointing"):
        run_stage(in_folder(stage, tmp_path / "never"))


class Interrupted(NextToken):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.at, self.number = step, number

    def prepare(self, batch: Batch, step: int) -> Batch:
        if step == self.at:
            os.kill(os.getpid(), self.number)
        return super().prepare(batch, step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_step_boundary_and_resume_equals_the_undisturbed_run(
    number: int, stage: StageConfig, run_stage: Run, with_objective: Any, tmp_path: Path
) -> None:
    run_stage(in_folder(stage, tmp_path / "calm"))
    with_objective(Interrupted(7, number))
    outcome = run_stage(in_folder(stage, tmp_path / "cut"))
    assert (outcome.stopped, outcome.step) == ("signal", 8)
    with_objective(NextToken())
    run_stage(in_folder(stage, tmp_path / "cut"), attempt=2)
    assert weights(tmp_path / "cut") == weights(tmp_path / "calm")


@pytest.fixture
def asked_in_evaluation() -> Iterator[Callable[[int], list[int]]]:
    """Send this process SIGTERM, twice, in a batch of an evaluation, counted from 1 over all of
    them; the list holds how many there were so far."""
    handles = []

    def ask(batch: int) -> list[int]:
        seen = [0]

        def before(module: Any, inputs: Any) -> None:
            # The few tokens of the trial at the start are no evaluation.
            learning = torch.is_grad_enabled()
            if isinstance(module, nn.Embedding) and not learning and inputs[0].shape[1] > 16:
                seen[0] += 1
                if seen[0] == batch:
                    os.kill(os.getpid(), signal.SIGTERM)
                    os.kill(os.getpid(), signal.SIGTERM)

        while handles:
            handles.pop().remove()
        handles.append(nn.modules.module.register_module_forward_pre_hook(before))
        return seen

    yield ask
    while handles:
        handles.pop().remove()


def test_a_signal_in_the_last_evaluation_ends_it_and_a_resume_makes_up_for_it(
    stage: StageConfig, tmp_path: Path, asked_in_evaluation: Any
) -> None:
    """24 rows in batches of 4: in the second batch it is left, and the stage not completed. In the
    last one it is done, and so is the stage; but nothing else begins."""
    from trainer import __main__

    jobs = tuple(
        replace(in_folder(stage, tmp_path / name, steps=3), id=name) for name in ("one", "two")
    )
    seen = asked_in_evaluation(2)
    assert __main__.run(Job(run="r", stages=jobs)) == 75
    assert seen == [2] and not lines(tmp_path / "one", "eval")
    meta = json.loads((tmp_path / "one" / "run_meta.json").read_text())
    assert (meta["completed"], meta["stopped"], meta["global_step"]) == (False, "signal", 3)
    assert not (tmp_path / "one" / "checkpoints" / "best.json").exists()

    seen = asked_in_evaluation(6)
    assert __main__.run(Job(run="r", stages=jobs, attempt=2)) == 75
    assert seen == [6]
    assert json.loads((tmp_path / "one" / "run_meta.json").read_text())["completed"] is True
    assert [line["global_step"] for line in lines(tmp_path / "one", "eval")] == [3]
    best = json.loads((tmp_path / "one" / "checkpoints" / "best.json").read_text())
    assert best["step"] == 3
    assert not (tmp_path / "two").exists()

    asked_in_evaluation(2)
    (tmp_path / "stop.json").write_text("{}")
    assert __main__.run(Job(run="r", stages=jobs, attempt=3, control=str(tmp_path))) == 0


@pytest.mark.parametrize("batch", [2, 6])
def test_a_signal_in_an_evaluation_is_followed_by_no_other_step(
    batch: int, stage: StageConfig, run_stage: Run, tmp_path: Path, asked_in_evaluation: Any
) -> None:
    """Left in the second batch, or done when it comes in the last one; what the resumed run ends
    with, and what it found on the way, is that of the calm one."""
    stage = in_folder(stage, tmp_path / "calm", steps=4, evaluate_every=2, log_every=5)
    run_stage(stage)
    asked_in_evaluation(batch)
    outcome = run_stage(in_folder(stage, tmp_path / "cut"))
    assert (outcome.stopped, outcome.step) == ("signal", 2)
    assert len(lines(tmp_path / "cut", "eval")) == (batch == 6)
    assert [line["global_step"] for line in lines(tmp_path / "cut", "step")] == [1, 2]
    asked_in_evaluation(0)
    run_stage(in_folder(stage, tmp_path / "cut"), attempt=2)
    assert weights(tmp_path / "cut") == weights(tmp_path / "calm")
    found, expected = (
        [(line["global_step"], line["val_loss"]) for line in lines(tmp_path / name, "eval")]
        for name in ("cut", "calm")
    )
    assert found == expected and len(found) == 2
    pointers = [(tmp_path / n / "checkpoints" / "best.json").read_text() for n in ("cut", "calm")]
    assert pointers[0] == pointers[1]


def test_a_signal_during_the_last_save_does_not_lose_it(
    stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def interrupted(self: Checkpoints, *arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return save(self, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    run_stage(in_folder(stage, tmp_path / "out", steps=3))
    assert json.loads((tmp_path / "out" / "checkpoints" / "last.json").read_text())["step"] == 3


def test_the_last_step_is_logged_whatever_log_every_is(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    run_stage(in_folder(stage, tmp_path / "out", steps=7, log_every=5))
    assert [s["global_step"] for s in lines(tmp_path / "out", "step")] == [1, 5, 7]


def test_a_first_evaluation_that_is_not_finite_is_not_the_best(
    stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import evaluate

    losses = iter([float("nan"), 4.5, 4.6])
    monkeypatch.setattr(evaluate, "cross_entropy", lambda *a, **k: (next(losses), 10))
    run_stage(in_folder(stage, tmp_path / "out", steps=6, evaluate_every=2))
    best = json.loads((tmp_path / "out" / "checkpoints" / "best.json").read_text())
    assert (best["step"], best["val_loss"]) == (4, 4.5)


def test_a_best_pointer_that_a_kill_prevented_is_written_on_resume(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    run_stage(in_folder(stage, folder, until=10, evaluate_every=5))
    pointer = folder / "checkpoints" / "best.json"
    assert json.loads(pointer.read_text())["step"] == 10
    pointer.write_text(json.dumps({"v": 1, "step": 5, "path": "step-5", "val_loss": 9.0}))
    run_stage(in_folder(stage, folder, until=10, evaluate_every=5), attempt=2)
    assert json.loads(pointer.read_text())["step"] == 10


def test_a_signal_with_the_stop_marker_is_a_stop(
    stage: StageConfig, run_stage: Run, with_objective: Any, tmp_path: Path
) -> None:
    (tmp_path / "stop.json").write_text("{}")
    with_objective(Interrupted(2, signal.SIGTERM))
    assert run_stage(stage, control=str(tmp_path)).stopped == "stop"


def test_seconds_of_trains_for_the_time_of_the_other_stage(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    first = run_stage(in_folder(stage, tmp_path / "first"))
    config = in_folder(stage, tmp_path / "second", steps=None, seconds_of=str(tmp_path / "first"))
    second = run_stage(config)
    assert second.stopped is None
    assert second.training_seconds >= first.training_seconds
    steps = lines(config.output, "step")
    last = steps[-1]["tokens"] - steps[-2]["tokens"]
    overshoot = second.training_seconds - first.training_seconds
    assert overshoot <= last / steps[-1]["tokens_per_sec"] + 1e-6


def test_vocabularies_that_differ_are_refused(
    kd_stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    from trainer.data.tokenizer import train_tokenizer

    train_tokenizer(["some other text, some other text"] * 9, 270, 1, tmp_path / "other")
    assert kd_stage.model is not None
    other = replace(kd_stage, model=replace(kd_stage.model, tokenizer=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match=r"kd.teacher: its vocabulary differs"):
        run_stage(other)


@pytest.mark.parametrize("schedule,last", [("cosine", 0.05), ("linear", 0.05), ("constant", 1.0)])
def test_the_schedule_warms_up_and_ends_where_it_should(schedule: Any, last: float) -> None:
    config = Train(steps=100, lr=1.0, warmup=10, schedule=schedule)
    horizon = Horizon(steps=100)
    rates = [learning_rate(config, horizon.progress(s, 0), s, horizon) for s in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(last)
    assert rates[10:] == sorted(rates[10:], reverse=True)
