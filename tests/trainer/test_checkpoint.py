"""Checkpoints over real files: whole or absent, verified, pruned, refused when not ours."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.trainer.disk import file_size_limit
from trainer.checkpoint import (
    CheckpointError,
    Checkpoints,
    crash_dump,
    load_state,
    resolve,
    rng_state,
    set_rng_state,
)
from trainer.manifest import MANIFEST, STATE, seal, verify
from trainer.store import atomic_write

ROOT = Path(__file__).parents[2]


def model(value: float, size: int = 8) -> Callable[[Path], None]:
    """What writes a model whose weights are all `value`."""

    def write(folder: Path) -> None:
        (folder / "config.json").write_text('{"vocab_size": 8}')
        save_file({"w": torch.full((size,), value)}, folder / "model.safetensors")

    return write


def save(checkpoints: Checkpoints, step: int, **options: Any) -> Path:
    return checkpoints.save(step, model(float(step)), {"step": step}, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pointer(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "stage" / "checkpoints"


def test_a_checkpoint_holds_what_was_given(folder: Path) -> None:
    state = {
        "step": 3,
        "optimizer": {0: {"exp_avg": torch.arange(4.0), "step": torch.tensor(3)}},
        "shape": torch.Size([2, 3]),
        "plain": [1, 2.5, None, True, "text", (1, b"x"), float("inf")],
    }
    path = Checkpoints(folder, keep=3).save(3, model(1.5), state, val_loss=2.0)
    assert path == folder / "step-3" and verify(path) == []
    files = json.loads((path / MANIFEST).read_text())["files"]
    assert set(files) == {"config.json", "model.safetensors", STATE}
    assert set(names(path)) == {*files, MANIFEST}
    assert load_file(path / "model.safetensors")["w"].eq(1.5).all()
    loaded = load_state(path)
    assert loaded["optimizer"][0]["exp_avg"].equal(torch.arange(4.0))
    assert {**loaded, "optimizer": 0} == {**state, "optimizer": 0}
    assert pointer(folder, "last") == {"v": 1, "step": 3, "path": "step-3", "val_loss": 2.0}
    assert names(folder) == ["last.json", "step-3"]


def test_killed_at_any_call_the_checkpoint_before_is_loadable() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.killed_saves"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for scenario in json.loads(done.stdout).values():
        assert scenario["kills"] > 30 and scenario["whole_save"] == 2
        assert scenario["marks"][0] == 1 and scenario["marks"][-1] == 2
        assert scenario["marks"] == sorted(scenario["marks"])


def test_everything_is_durable_before_it_has_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(folder.parents[1])
        synced.append((path.as_posix(), (folder / "step-1").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    save(Checkpoints(folder, keep=1), 1)
    temporary = f"stage/checkpoints/.tmp-step-1-{os.getpid()}"
    before = [path for path, published in synced if not published]
    assert {f"{temporary}/{name}" for name in ("config.json", "model.safetensors", STATE)} <= {
        *before
    }
    manifest, inside = before[-2:]
    assert manifest.startswith(f"{temporary}/.tmp-") and inside == temporary
    assert synced[len(before)] == ("stage/checkpoints", True)


def test_the_newest_stay_and_the_best(folder: Path) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.6}
    for step, loss in losses.items():
        save(checkpoints, step, val_loss=loss, best=loss == min(losses.values()))
    assert names(folder) == ["best.json", "last.json", "step-2", "step-4", "step-5"]
    assert pointer(folder, "best")["step"] == 2 and pointer(folder, "last")["step"] == 5
    checkpoints.mark_best(5, float("nan"))
    assert pointer(folder, "best") == {"v": 1, "step": 5, "path": "step-5", "val_loss": None}
    save(checkpoints, 6)
    assert names(folder) == ["best.json", "last.json", "step-5", "step-6"]
    with pytest.raises(CheckpointError, match="step 2 has no checkpoint to be marked as best"):
        checkpoints.mark_best(2, 1.0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def rewritten(manifest: str) -> Callable[[Path], None]:
    return lambda path: atomic_write(path / MANIFEST, manifest)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (lambda p: flip(p / "model.safetensors"), "model.safetensors is damaged"),
    "torn state": (lambda p: os.truncate(p / STATE, 100), f"{STATE} has 100 bytes instead of"),
    "lost file": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "torn manifest": (lambda p: os.truncate(p / MANIFEST, 30), f"{MANIFEST} is damaged"),
    "not a manifest": (rewritten("[]"), f"{MANIFEST} is damaged"),
    "newer format": (rewritten('{"v": 2, "files": {}}'), "version 2; this trainer reads 1"),
    "empty manifest": (rewritten('{"v": 1, "files": {}}'), f"does not list {STATE}"),
    "empty folder": (emptied, f"{MANIFEST} is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_newest_is_skipped_aloud_and_not_deleted(folder: Path, damage: str) -> None:
    told: list[str] = []
    checkpoints = Checkpoints(folder, keep=3, warn=told.append)
    save(checkpoints, 9)
    save(checkpoints, 10)
    harm, words = DAMAGE[damage]
    harm(folder / "step-10")
    assert checkpoints.newest() == folder / "step-9"
    assert told == checkpoints.warnings and len(told) == 1
    assert f"{folder}/step-10: " in told[0] and words in told[0]
    assert (folder / "step-10").exists()
    harm(folder / "step-9")
    assert checkpoints.newest() is None


def test_a_manifest_cannot_name_files_elsewhere(folder: Path) -> None:
    path = save(Checkpoints(folder, keep=1), 1)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../last.json"] = {"bytes": 1, "sha256": ""}
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert verify(path) == [f"{MANIFEST} names a file outside the folder: '../last.json'"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(Checkpoints(tmp_path_factory.mktemp("whole"), keep=1), 1)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_no_changed_byte_escapes_the_verification(whole: Path, data: st.DataObject) -> None:
    path = whole / data.draw(st.sampled_from(["config.json", "model.safetensors", STATE]))
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(bad)
        assert verify(whole) == [f"{path.name} is damaged (its sha256 differs)"]
    finally:
        path.write_bytes(good)
    assert verify(whole) == []


def test_broken_newer_ones_do_not_push_out_the_good(folder: Path) -> None:
    checkpoints = Checkpoints(folder, keep=1)
    save(checkpoints, 10)
    shutil.copytree(folder / "step-10", folder / "step-20")
    flip(folder / "step-20" / STATE)
    save(checkpoints, 12)
    assert checkpoints.newest() == folder / "step-12"
    assert names(folder) == ["last.json", "step-12", "step-20"]


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    checkpoints = Checkpoints(folder, keep=3)
    path = save(checkpoints, 4)
    (path / "left.txt").write_text("of the first save")
    (path / MANIFEST).unlink()
    checkpoints.save(4, model(44.0), {"step": 4})
    assert verify(path) == [] and load_file(path / "model.safetensors")["w"][0] == 44.0
    assert names(folder) == ["last.json", "step-4"] and not (path / "left.txt").exists()


def test_opening_tidies_up_after_the_dead_and_spares_the_living(folder: Path) -> None:
    save(Checkpoints(folder, keep=3), 1)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, living = child.pid, os.getppid()
    (folder / "step-1").rename(folder / f".old-step-1-{dead}")
    for name in (f".tmp-step-2-{dead}", f".gone-step-0-{dead}", f".tmp-step-3-{living}", "mine"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("x")
    checkpoints = Checkpoints(folder, keep=3)
    assert names(folder) == [f".tmp-step-3-{living}", "last.json", "mine", "step-1"]
    assert checkpoints.newest() == folder / "step-1"


def big(value: float) -> Callable[[Path], None]:
    return model(value, size=100_000)


def state_of(size: int) -> dict[str, Any]:
    return {"step": 2, "moment": torch.zeros(size)}


def check_full_disk(folder: Path, write: Callable[[Path], None], state: dict[str, Any]) -> str:
    """A save on a disk that is full fails in one line and leaves nothing; that line."""
    before = names(folder)
    with pytest.raises(CheckpointError) as raised:
        Checkpoints(folder, keep=1).save(2, write, state)
    assert names(folder) == before == ["last.json", "step-1"]
    assert verify(folder / "step-1") == [] and pointer(folder, "last")["step"] == 1
    line = str(raised.value)
    assert line.startswith("disk full") and "step 2 not saved" in line and str(folder) in line
    assert "\n" not in line
    return line


@pytest.mark.parametrize("part", ["model", "state", "manifest"])
def test_a_full_disk_leaves_the_previous_checkpoint(folder: Path, part: str) -> None:
    save(Checkpoints(folder, keep=1), 1)
    write, state, limit = {
        "model": (big(2.0), state_of(1), 50_000),
        "state": (model(2.0), state_of(100_000), 50_000),
        "manifest": (many_files, state_of(1), 4000),
    }[part]
    with file_size_limit(limit):
        check_full_disk(folder, write, state)
    assert Checkpoints(folder, keep=1).newest() == folder / "step-1"
    save(Checkpoints(folder, keep=1), 2)
    assert names(folder) == ["last.json", "step-2"]


def many_files(folder: Path) -> None:
    """Small ones, so that only the manifest is long."""
    (folder / "parts").mkdir()
    for number in range(50):
        (folder / "parts" / f"{number}.json").write_text("{}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs more rights")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_a_small_disk_that_fills_up(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    save(Checkpoints(folder, keep=1), 1)
    for write, state in ((model(2.0, 400_000), state_of(1)), (model(2.0), state_of(400_000))):
        line = check_full_disk(folder, write, state)
        assert line.startswith("disk full: step 2 not saved")
        assert "1.0 MB are free, step-1 takes 0.0 MB" in line


def test_a_model_that_cannot_be_written_leaves_nothing(folder: Path) -> None:
    checkpoints = Checkpoints(folder, keep=1)
    save(checkpoints, 1)

    def interrupted(path: Path) -> None:
        model(2.0)(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, interrupted, {})
    with pytest.raises(CheckpointError, match=r"step 2 not saved: .*Permission denied"):
        checkpoints.save(2, denied, {})
    assert names(folder) == ["last.json", "step-1"]


def denied(path: Path) -> None:
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": [1, numpy.float64(2)]}}, r"state\['a'\]\['b'\]\[1\] is a float64"),
        ({"rows": numpy.zeros(2)}, r"state\['rows'\] is a ndarray"),
        ({"device": torch.device("cpu")}, r"state\['device'\] is a device"),
        ({"seen": {1, 2}}, r"state\['seen'\] is a set"),
        ({(1, 2): 3}, r"state has a key of type tuple"),
    ],
)
def test_state_that_could_not_be_loaded_is_not_saved(
    folder: Path, state: dict[Any, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words + r".*a checkpoint holds tensors, numbers"):
        Checkpoints(folder, keep=1).save(1, model(1.0), state)
    assert not folder.exists()


class Evil:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.target,))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    torch.save({"step": Evil(str(target))}, tmp_path / STATE)
    with pytest.raises(CheckpointError, match="refused, it holds more than tensors and plain"):
        load_state(tmp_path)
    (tmp_path / STATE).write_bytes(pickle.dumps(Evil(str(target))))
    with pytest.raises(CheckpointError):
        load_state(tmp_path)
    assert not target.exists()
    pickle.loads(pickle.dumps(Evil(str(target))))
    assert target.exists()  # the control: without the guard it runs


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"not a checkpoint"])
def test_state_that_is_no_checkpoint_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match=f"{STATE}: No such file"):
        load_state(tmp_path)
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{STATE}: ") as raised:
        load_state(tmp_path)
    assert "\n" not in str(raised.value)


def test_changing_loaded_state_changes_no_file(folder: Path) -> None:
    path = Checkpoints(folder, keep=1).save(1, model(1.0), state_of(1000))
    load_state(path)["moment"].add_(1)
    assert verify(path) == [] and load_state(path)["moment"].eq(0).all()


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(numpy.random.rand()),
        float(numpy.random.randn()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_random_generators_go_on_where_they_were(folder: Path) -> None:
    random.gauss(0, 1), numpy.random.randn()  # one half of a pair of normals is now kept back
    path = Checkpoints(folder, keep=1).save(1, model(1.0), {"rng": [rng_state()]})
    expected = draws()
    assert draws() != expected
    set_rng_state(load_state(path)["rng"][0])
    assert draws() == expected


def test_a_reference_names_the_last_or_the_best_checkpoint(folder: Path) -> None:
    checkpoints, stage = Checkpoints(folder, keep=3), folder.parent
    save(checkpoints, 1, val_loss=1.0, best=True)
    save(checkpoints, 2, val_loss=2.0)
    for reference in (f"{stage}", f"{stage}@last", f"file://{stage}"):
        assert resolve(reference) == f"{folder}/step-2"
    assert resolve(f"{stage}@best") == resolve(f"file://{stage}@best") == f"{folder}/step-1"
    told: list[str] = []
    flip(folder / "step-2" / STATE)
    assert resolve(str(stage), told.append) == f"{folder}/step-1"
    assert len(told) == 1 and "step-2: trainer_state.pt is damaged" in told[0]
    flip(folder / "step-1" / STATE)
    with pytest.raises(CheckpointError, match=r"step-1: the best checkpoint is broken .*@last"):
        resolve(f"{stage}@best")
    with pytest.raises(CheckpointError, match=r"stage: no whole checkpoint \(2 broken\); run"):
        resolve(f"{stage}@last")


def test_references_that_are_no_stage_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for reference in ("org/name", "gpt2", str(tmp_path), str(tmp_path / "none")):
        assert resolve(reference) == reference


def test_a_tokenizer_stage_resolves_to_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "run_meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no whole checkpoint; run"):
        resolve(str(tmp_path))
    (tmp_path / "tokenizer").mkdir()
    assert resolve(str(tmp_path)) == resolve(f"{tmp_path}@last") == str(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("name", "words"),
    [("none", "there is no folder"), ("plain", "is not the output folder of a stage")],
)
def test_a_wrong_stage_reference_says_what_is_there(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(CheckpointError, match=f"{name}@best: .*{words}"):
        resolve(f"{tmp_path}/{name}@best")


def test_best_without_a_validation_says_so(folder: Path) -> None:
    save(Checkpoints(folder, keep=1), 1)
    with pytest.raises(CheckpointError, match="no checkpoint is marked as best; use @last"):
        resolve(f"{folder.parent}@best")


def test_a_crash_dump_is_whole_or_absent(tmp_path: Path) -> None:
    module = torch.nn.Linear(100, 100)
    state = {"model": module.state_dict(), "batch_shape": [8, 128]}
    with file_size_limit(4096), pytest.raises(CheckpointError, match="not written: disk full"):
        crash_dump(tmp_path, state)
    assert names(tmp_path) == []
    path = crash_dump(tmp_path, state)
    assert names(tmp_path) == ["crash_dump.pt"]
    loaded = torch.load(path, weights_only=True)
    assert loaded["model"]["weight"].equal(module.weight) and loaded["batch_shape"] == [8, 128]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_for_whom_the_umask_says(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = tmp_path / "step-1"
        (folder / "state").mkdir(parents=True)
        for name in ("model.safetensors", "state/part"):  # as a library's temporary file leaves it
            (folder / name).touch(mode=0o600)
        (folder / "trainer_state.pt").touch()
        seal(folder, 1)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}
    assert len(modes) == 4 and set(modes.values()) == {mode}
