"""A checkpoint is written while the loop goes on: the numbers are those of its step."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import in_folder
from tests.trainer.test_loop import Interrupted, lines, weights
from trainer import stages
from trainer.batch import Batch
from trainer.checkpoint import CheckpointError, Checkpoints, load_state
from trainer.config import Adapter, Model, StageConfig
from trainer.manifest import verify
from trainer.model_files import ModelFiles
from trainer.objectives.next_token import NextToken
from trainer.runtime import Runtime
from trainer.saver import Saver
from trainer.snapshot import Snapshot

Run = Callable[..., Any]
CPU = Runtime(torch.device("cpu"), "fp32")
#: A test whose threads wait for each other for longer than this fails instead of hanging.
PATIENCE = 60.0


class Watched(NextToken):
    """Next-token loss that says when the loop has begun a step."""

    def __init__(self, step: int) -> None:
        self.at, self.reached = step, threading.Event()

    def prepare(self, batch: Batch, step: int) -> Batch:
        if step == self.at:
            self.reached.set()
        return super().prepare(batch, step)


def writing(monkeypatch: pytest.MonkeyPatch, before: Callable[[Path], None]) -> None:
    """Make every stage do something before it writes the files of a model."""

    class Files(ModelFiles):
        def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
            before(folder)
            super().write(folder, tensors)

    monkeypatch.setattr(stages, "ModelFiles", Files)


def use(monkeypatch: pytest.MonkeyPatch, objective: Any) -> None:
    """Make stage `pretrain` use another objective: a row of the table, as a plugin would."""
    monkeypatch.setitem(stages.STAGES, "pretrain", stages.train(lambda *_: objective))


def test_the_loop_goes_on_while_a_disk_is_slow_and_the_checkpoint_is_of_its_step(
    stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 5 does not begin before step 9 has; a run resumed from it ends as the
    undisturbed one, bit for bit, which dropout makes a matter of random states too."""
    whole = in_folder(stage, tmp_path / "whole", save_every=5, save_async=False, keep=9)
    run_stage(whole)
    watched, held = Watched(9), []

    def wait(folder: Path) -> None:
        if "step-5" in folder.name:
            held.append(watched.reached.wait(PATIENCE))

    writing(monkeypatch, wait)
    use(monkeypatch, watched)
    folder = tmp_path / "slow"
    run_stage(in_folder(stage, folder, save_every=5, keep=9, until=14))
    assert held == [True], "the loop waited for the write"
    saved = [e["global_step"] for e in lines(folder, "event") if e["event"] == "checkpoint"]
    assert saved == [5, 10, 14]
    for step in (5, 10):
        found, expected = (
            at / "checkpoints" / f"step-{step}" for at in (folder, tmp_path / "whole")
        )
        assert verify(found) == []
        check_same(found, expected)
    for later in ("step-10", "step-14"):
        shutil.rmtree(folder / "checkpoints" / later)
    resumed = run_stage(in_folder(stage, folder, save_every=5, keep=9), attempt=2)
    assert any("resumed at step 5" in line for line in resumed.lines)
    assert weights(folder) == weights(tmp_path / "whole")


def check_same(found: Path, expected: Path) -> None:
    """Two checkpoints with the same bytes; of the plain state, all but the clock."""
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in set(names) - {"MANIFEST.json", "trainer_state.pt"}:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    ours, theirs = load_state(found), load_state(expected)
    clock = {"training_seconds": 0.0}
    assert same({**ours, **clock}, {**theirs, **clock})


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return bool(torch.equal(one, other)) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_an_adapter_is_written_as_by_a_save_that_waits(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    run_stage(in_folder(stage, tmp_path / "base", steps=2))
    plan = Model(name=str(tmp_path / "base"), adapter=Adapter(rank=2))
    stage = replace(stage, model=plan)
    for way in (True, False):
        run_stage(in_folder(stage, tmp_path / str(way), steps=4, save_every=2, save_async=way))
    for step in (2, 4):
        at = f"checkpoints/step-{step}"
        check_same(tmp_path / "True" / at, tmp_path / "False" / at)


def test_tied_weights_are_written_as_the_library_writes_them(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run_stage(in_folder(stage, tmp_path / "out", steps=4, save_every=2))
    found = tmp_path / "out" / "checkpoints" / "step-2"
    model = AutoModelForCausalLM.from_pretrained(found, dtype="float32")
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert (found / "model.safetensors").read_bytes() == again


def test_a_full_disk_in_the_background_ends_the_run_in_one_line(
    stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        if "step-4" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    writing(monkeypatch, full)
    with pytest.raises(CheckpointError, match=r"^disk full: step 4 not saved") as raised:
        run_stage(in_folder(stage, tmp_path / "out", save_every=2))
    assert "\n" not in str(raised.value)
    root = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["last.json", "step-2"]
    assert verify(root / "step-2") == []
    assert len(lines(tmp_path / "out", "step")) <= 6  # at the latest, the next save said so


def test_the_end_a_signal_and_an_error_wait_for_the_write(
    stage: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is on its way out while the write has not begun."""
    import signal

    class Failing(Watched):
        def prepare(self, batch: Batch, step: int) -> Batch:
            prepared = super().prepare(batch, step)
            if step == self.at:
                raise ValueError("injected")
            return prepared

    class Asked(Interrupted):
        def __init__(self) -> None:
            super().__init__(6, signal.SIGTERM)
            self.reached = threading.Event()

        def prepare(self, batch: Batch, step: int) -> Batch:
            prepared = super().prepare(batch, step)
            if step == 6:
                self.reached.set()
            return prepared

    ways = {"error": (Failing(6), 5), "signal": (Asked(), 7), "end": (Watched(6), 20)}
    for name, (objective, last) in ways.items():
        use(monkeypatch, objective)

        def wait(folder: Path, objective: Any = objective) -> None:
            if "step-5" in folder.name:
                assert objective.reached.wait(PATIENCE)

        writing(monkeypatch, wait)
        config = in_folder(stage, tmp_path / name, save_every=5)
        if name == "error":
            with pytest.raises(ValueError, match="injected"):
                run_stage(config)
        else:
            run_stage(config)
        newest = Checkpoints(tmp_path / name / "checkpoints", keep=3).newest()
        assert newest is not None and newest.name == f"step-{last}"
        assert not any(thread.name.startswith("save-") for thread in threading.enumerate())


class Small:
    """A model of one tensor, whose write can be held back."""

    def __init__(self, note: Callable[[str], None], go: threading.Event) -> None:
        self.weight, self.note, self.go = torch.zeros(4), note, go

    def tensors(self) -> dict[str, Tensor]:
        self.note("take")
        return {"w": self.weight}

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        assert self.go.wait(PATIENCE)
        torch.save(tensors, folder / "w.pt")
        self.note(f"write {tensors['w'][0]:.0f}")


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    noted: list[str] = []
    go = threading.Event()

    class Observed(Saver):
        def _join(self) -> None:
            noted.append("join")
            go.set()  # only who waits lets the first write begin
            super()._join()

    files = Small(noted.append, go)
    saver = Observed(Checkpoints(tmp_path, keep=3), files, CPU, None, background=True)
    saver.save(1, {"step": 1})
    files.weight.add_(7)
    assert noted == ["take"] and not saver.news
    saver.save(2, {"step": 2})
    saver.wait()
    assert noted[:4] == ["take", "join", "write 0", "take"]
    assert sorted(noted[4:]) == ["join", "write 7"]  # in whatever order: nothing holds them
    assert [saved.path.name for saved in saver.news] == ["step-1", "step-2"]
    assert torch.load(tmp_path / "step-1" / "w.pt", weights_only=True)["w"].eq(0).all()


def test_an_error_is_raised_once_and_the_next_save_works(tmp_path: Path) -> None:
    go = threading.Event()
    go.set()
    files = Small(lambda line: None, go)
    saver = Saver(Checkpoints(tmp_path, keep=3), files, CPU, None, background=True)
    saver.save(1, {"step": {1, 2}})
    with pytest.raises(CheckpointError, match=r"state\['step'\] is a set"):
        saver.wait()
    saver.wait()
    assert not saver.failed
    saver.save(2, {"step": 2})
    saver.wait()
    assert json.loads((tmp_path / "last.json").read_text())["step"] == 2


def test_a_snapshot_is_changed_by_nothing_and_shares_what_was_shared() -> None:
    base = torch.arange(6.0)
    tree = {
        "tied": [base, base.view(2, 3).t()],
        "half": base[3:],
        "ordered": OrderedDict(a=(torch.tensor(1), "text", None)),
        "empty": [torch.empty(0), torch.empty(0, 3)],
    }
    expected = {
        "tied": [base.clone(), base.view(2, 3).t().clone()],
        "half": base[3:].clone(),
        "ordered": OrderedDict(a=(torch.tensor(1), "text", None)),
        "empty": [torch.empty(0), torch.empty(0, 3)],
    }
    copy = Snapshot().copy(tree)
    base.fill_(9)
    tree["ordered"]["a"][0].fill_(9)
    assert same(copy, expected) and type(copy["ordered"]) is OrderedDict
    assert copy["tied"][1].stride() == (1, 3) and copy["empty"][1].shape == (0, 3)
    copy["tied"][0][4] = 5.0
    assert copy["half"][1] == 5.0 and copy["tied"][1][1, 1] == 5.0 and base[4] == 9.0
