"""The optimizer's state in shards: any number of workers, one killed, none trusted."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from trainer.checkpoint import CheckpointError
from trainer.config import Train
from trainer.optimizer import make_optimizer
from trainer.sharded import FOLDER, NAMES, balance, parameter_names
from trainer.shards import optimizer_state, read_metadata

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tokenizer: str, texts: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What sharded_runs.py found."""
    out = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.sharded_runs", str(out), tokenizer, texts],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=240,  # a worker that hangs fails here
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["shards to 1", "shards to 4", "plain to 2"])
def test_another_number_of_workers_goes_on_with_the_same_training(
    runs: dict[str, Any], way: str
) -> None:
    found = runs[way]
    assert set(found["digests"]) == {runs["plain"]}, "the optimizer's state is not bit-equal"
    assert len(found["losses"]) == 10
    assert found["losses"] == pytest.approx(runs["whole"], rel=1e-5)
    warned = any("random numbers (dropout)" in line for line in found["said"])
    assert warned == (way != "plain to 2")  # those were two before, too
    assert not any("rows, in the checkpoint" in line for line in found["said"])


def test_another_global_batch_is_said_in_one_line(runs: dict[str, Any]) -> None:
    found = runs["more rows"]
    (line,) = [line for line in found["said"] if "rows, in the checkpoint" in line]
    assert line.startswith("WARNING: a step now takes 16 rows, in the checkpoint 8; change")
    assert found["losses"][:5] == pytest.approx(runs["whole"][:5], rel=1e-5)
    assert abs(found["losses"][5] - runs["whole"][5]) > 1e-3  # the control: other rows


def test_every_worker_writes_its_part(runs: dict[str, Any]) -> None:
    sizes = runs["files"]
    assert set(sizes) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    # Rank 0 writes the weights (107 kB of fp32) besides; the moments are 215 kB.
    assert 0 < sizes["__0_0.distcp"] < sizes["__1_0.distcp"]


@pytest.mark.parametrize("who", ["0", "1", "both"])
def test_workers_killed_while_they_save_leave_the_checkpoint_before(
    runs: dict[str, Any], who: str
) -> None:
    found = runs[f"killed {who}"]
    assert found["newest"] == "step-2"
    for rank, result in enumerate(found["results"]):
        if who in (str(rank), "both"):
            assert result == 9
        else:
            assert result.startswith("error: ")  # it ended by itself


def test_workers_that_see_different_folders_are_told_so(runs: dict[str, Any]) -> None:
    for line in runs["two folders"]:
        assert line.startswith("error: ConfigError: train.sharded: rank 1 does not see the folder")
        assert "`sharded: false`" in line


@pytest.mark.parametrize("sharded", [True, False])
def test_a_full_disk_at_one_worker_is_everyones_clear_line(
    runs: dict[str, Any], sharded: bool
) -> None:
    (first, second), left = runs[f"full {sharded}"]
    assert first == second
    assert first.startswith("error: CheckpointError: disk full") and "step 2 not saved" in first
    assert left == []


def test_the_parts_are_balanced_and_agreed_on() -> None:
    sizes = {"a": 8, "b": 8, "c": 4, "d": 4, "e": 0}
    assert balance(sizes, 2) == balance(dict(reversed(sizes.items())), 2)
    loads = [0, 0]
    for name, rank in balance(sizes, 2, beside=8).items():
        loads[rank] += sizes[name]
    assert loads == [8, 16]
    assert set(balance(sizes, 1).values()) == {0}
    assert set(balance({"a": 1}, 8).values()) == {0}


class Stored:
    """A model's optimizer after a step, its state in shards on disk."""

    def __init__(self, folder: Path) -> None:
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = make_optimizer(self.model, Train(steps=1))
        self.model(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()
        whole = self.optimizer.state_dict()
        names = parameter_names(self.model, self.optimizer)
        self.tensors = {
            f"state.{names[index]}.{key}": value
            for index, entries in whole["state"].items()
            for key, value in entries.items()
        }
        self.folder, self.whole = folder, whole
        self.state = {"optimizer": {**whole, "state": {}}, NAMES: names}
        self.metadata = folder / FOLDER / ".metadata"
        self.write(self.tensors)

    def write(self, tensors: dict[str, Any]) -> None:
        writer = dcp.FileSystemWriter(self.folder / FOLDER)
        planner = DefaultSavePlanner(flatten_state_dict=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process writes alone is meant
            dcp.save(tensors, storage_writer=writer, planner=planner, no_dist=True)
        metadata = pickle.loads(self.metadata.read_bytes())
        metadata.storage_meta = None
        self.metadata.write_bytes(pickle.dumps(metadata))

    def read(self) -> dict[str, Any]:
        return optimizer_state(self.folder, self.state, self.model, self.optimizer)

    def change(self, change: Any) -> None:
        metadata = pickle.loads(self.metadata.read_bytes())
        change(metadata)
        self.metadata.write_bytes(pickle.dumps(metadata))


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path)


def test_shards_are_read_as_they_were(stored: Stored) -> None:
    found = stored.read()
    assert found["param_groups"] == stored.whole["param_groups"]
    for index, entries in stored.whole["state"].items():
        assert entries.keys() == found["state"][index].keys()
        assert all(found["state"][index][key].equal(value) for key, value in entries.items())
    stored.optimizer.load_state_dict(found)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.target,))


def refused(stored: Stored, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as raised:
        stored.read()
    assert "\n" not in str(raised.value)


def test_a_malicious_description_is_refused_and_not_run(stored: Stored, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    for evil in (Evil(target), {"state_dict_metadata": [Evil(target)]}):
        stored.metadata.write_bytes(pickle.dumps(evil))
        refused(stored, r"\.metadata: refused: it names posix\.mkdir, which has no place there")
    assert not target.exists()
    pickle.loads(stored.metadata.read_bytes())
    assert target.exists()  # the control: without the guard it runs


def test_an_attribute_of_what_is_allowed_is_not(stored: Stored) -> None:
    for module, name in (("torch.serialization", "os.system"), ("torch", "load")):
        stored.metadata.write_bytes(f"c{module}\n{name}\n.".encode())
        refused(stored, "refused: it names")


def test_pickled_bytes_are_refused_and_not_run(stored: Stored, tmp_path: Path) -> None:
    """torch loads values that are no tensors without `weights_only`."""
    target = tmp_path / "executed"
    stored.write({**stored.tensors, "state.weight.step": Evil(target)})
    refused(stored, "refused: it names .*BytesStorageMetadata, which has no place there")
    assert not target.exists()


def test_a_malicious_tensor_is_refused_and_not_run(stored: Stored, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    shard = stored.folder / FOLDER / "__0_0.distcp"
    with shard.open("wb") as file:
        torch.save(Evil(target), file)

    def whole_file(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, shard.stat().st_size

    stored.change(whole_file)
    refused(stored, f"{FOLDER}: cannot be read: ")
    assert not target.exists()


def rename(value: str) -> Any:
    def change(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).relative_path = value

    return change


def not_a_tensor(metadata: Any) -> None:
    metadata.state_dict_metadata["state.weight.step"] = [1]


def bytes_(metadata: Any) -> None:
    metadata.state_dict_metadata["state.weight.step"] = BytesStorageMetadata()


def unknown(metadata: Any) -> None:
    described = metadata.state_dict_metadata
    described["state.other.exp_avg"] = described.pop("state.weight.exp_avg")


def huge(metadata: Any) -> None:
    metadata.state_dict_metadata["state.weight.exp_avg"].size = torch.Size([1 << 50])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename("../../trainer_state.pt"), r"names '\.\./\.\./trainer_state.pt', which is no file"),
        (rename("/etc/passwd"), "names '/etc/passwd', which is no file of a checkpoint"),
        (not_a_tensor, "'state.weight.step' is not a tensor"),
        (bytes_, "refused: it names .*BytesStorageMetadata"),
        (unknown, "state.other.exp_avg is not of this model's optimizer"),
        (huge, "state.weight.exp_avg is not of this model's optimizer"),
    ],
)
def test_a_description_of_something_else_is_refused(
    stored: Stored, change: Any, words: str
) -> None:
    stored.change(change)
    refused(stored, words)


@pytest.mark.parametrize("content", [b"", b"\x80\x04torn", b"not a pickle", pickle.dumps([1])])
def test_a_damaged_description_is_one_clear_line(stored: Stored, content: bytes) -> None:
    stored.metadata.write_bytes(content)
    refused(stored, r"\.metadata: (damaged, it cannot be read|refused: )")
    stored.metadata.unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata: No such file"):
        read_metadata(stored.folder / FOLDER)


def test_a_lost_or_torn_shard_is_one_clear_line(stored: Stored) -> None:
    shard = stored.folder / FOLDER / "__0_0.distcp"
    os.truncate(shard, 10)
    refused(stored, f"{FOLDER}: cannot be read: ")
    shard.unlink()
    refused(stored, f"{FOLDER}: cannot be read: .*No such file")


def test_the_optimizer_of_another_model_is_refused(stored: Stored) -> None:
    stored.model = torch.nn.Linear(3, 2, bias=False)
    stored.optimizer = make_optimizer(stored.model, Train(steps=1))
    refused(stored, "its optimizer holds 2 parameters, now 1 learn, or others; resume with")
