"""The mirror and the way back, over the rehearsal's gs:// with its faults and a clock we turn."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("google.cloud.storage", reason="gs:// needs the extra `google`")

from launcher.clock import ManualClock
from launcher.rehearsal.faults import Fault, Script, Seeded
from launcher.rehearsal.gcs import GcsServer
from tests.trainer.remote import QUICK, environment
from trainer import mirror_parts
from trainer.manifest import MANIFEST, STATE, seal, verify
from trainer.mirror import Mirror
from trainer.restore import restore
from trainer.store import FileStore, Store, atomic_write
from trainer.store_gcs import GcsStore
from trainer.store_remote import Patience

CLOCK = ManualClock()
PATIENCE = Patience(**QUICK, total=5.0)
ONE_TRY = Patience(**QUICK, total=0.0)
UNIQUE = itertools.count()


@pytest.fixture(scope="module")
def gcs() -> Iterator[GcsServer]:
    with GcsServer(clock=CLOCK) as server, environment(STORAGE_EMULATOR_HOST=server.url):
        server.objects.create_bucket("runs", {})
        yield server


@pytest.fixture
def server(gcs: GcsServer) -> Iterator[GcsServer]:
    gcs.log.clear()
    gcs.faults = Script()
    yield gcs
    gcs.faults = Script()
    gcs.objects.denied.clear()
    gcs.objects.limit_writes = False


def new_store(patience: Patience = PATIENCE) -> GcsStore:
    return GcsStore(f"gs://runs/m{next(UNIQUE)}", patience)


class Watched:
    """A mirror without threads, whose warnings are kept."""

    def __init__(self, folder: Path, store: Store, **options: object) -> None:
        self.warnings: list[str] = []
        self.mirror = Mirror(
            folder, store, warn=self.warnings.append, now=CLOCK.now, sleep=CLOCK.sleep, **options
        )

    def look(self, times: int = 2) -> None:
        """Both lanes look, the period passes, and again: large files must have come to rest."""
        for _ in range(times):
            CLOCK.sleep(min(self.mirror.step("small"), self.mirror.step("large")))


def checkpoint(stage: Path, step: int, best: bool = False, size: int = 1000) -> Path:
    """Publish a checkpoint as the trainer does, pointers and all."""
    at = stage / "checkpoints"
    temporary = at / f".tmp-step-{step}-1"
    temporary.mkdir(parents=True)
    (temporary / "model.safetensors").write_bytes(os.urandom(size))
    (temporary / STATE).write_bytes(step.to_bytes(8, "big"))
    seal(temporary, step)
    if (at / f"step-{step}").exists():
        shutil.rmtree(at / f"step-{step}")
    temporary.rename(at / f"step-{step}")
    pointer = json.dumps({"v": 1, "step": step, "path": f"step-{step}", "val_loss": 1.5})
    for name in ("last", "best") if best else ("last",):
        atomic_write(at / f"{name}.json", pointer)
    return at / f"step-{step}"


def append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def joined(store: Store, start: str) -> bytes:
    return b"".join(store.get_bytes(key) for key in store.list(start))


def whole(store: Store) -> list[str]:
    """The checkpoints of a store that have a manifest; each must be what it says."""
    found = [key.rpartition("/")[0] for key in store.list() if key.endswith(MANIFEST)]
    for base in found:
        for name, facts in json.loads(store.get_bytes(f"{base}/{MANIFEST}"))["files"].items():
            assert store.checksum(f"{base}/{name}") == facts["sha256"]
    return found


def uploads(server: GcsServer) -> list[str]:
    """The names of objects in the order in which they were last written."""
    metas = [server.objects.get("runs", name) for name in server.objects.names("runs")]
    return [meta["name"] for meta in sorted(metas, key=lambda meta: int(meta["generation"]))]


def test_a_run_is_copied_with_every_name(server: GcsServer, tmp_path: Path) -> None:
    store = new_store()
    watched = Watched(tmp_path, store)
    for stage in (tmp_path / "sft", tmp_path / "kd"):
        checkpoint(stage, 10, best=True)
        append(stage / "metrics" / "0001.jsonl", '{"a": 1}\n')
        append(stage / "tensorboard" / "events.1", "bytes")
        atomic_write(stage / "run_meta.json", '{"completed": true}')
    append(tmp_path / "logs" / "worker-0" / "00-0001.log", "hello\n")
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "00000001.json").write_text("the launcher's")
    watched.look()
    assert watched.mirror.behind() == watched.warnings == []
    stage_keys = [
        "checkpoints/best.json", "checkpoints/last.json", f"checkpoints/step-10/{MANIFEST}",
        "checkpoints/step-10/model.safetensors", f"checkpoints/step-10/{STATE}",
        "metrics/0001-00000.jsonl", "run_meta.json", "tensorboard/events.1",
    ]  # fmt: skip
    keys = [f"{stage}/{key}" for stage in ("sft", "kd") for key in stage_keys]
    assert store.list() == sorted([*keys, "logs/worker-0/00-0001-00000.log"])
    assert store.get_bytes("kd/metrics/0001-00000.jsonl") == b'{"a": 1}\n'
    server.log.clear()
    watched.look()
    assert not server.log  # nothing changed: nothing is asked


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.text("ab\n", max_size=9), st.booleans()), max_size=12))
def test_parts_are_the_file_whenever_they_were_sent(writes: list[tuple[str, bool]]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror_parts, "PART_BYTES", 8)
        folder, store, once = Path(name), FileStore(f"{name}/.s"), FileStore(f"{name}/.o")
        watched = Watched(folder, store)
        path = folder / "metrics" / "0001.jsonl"
        append(path, "")
        for text, look in writes:
            append(path, text)
            if look:
                watched.mirror.step("small")
                sent = joined(store, "metrics/")
                assert path.read_bytes().startswith(sent)
                assert sent.endswith(b"\n") or len(sent) % 8 == 0
        assert watched.mirror.close() == []
        assert Watched(folder, once).mirror.close() == []
        assert joined(store, "metrics/") == joined(once, "metrics/") == path.read_bytes()
        assert store.list() == once.list()
        assert all(len(store.get_bytes(key)) <= 8 for key in store.list())


def test_an_object_is_written_at_most_once_a_second(server: GcsServer, tmp_path: Path) -> None:
    server.objects.limit_writes = True
    store, lines = new_store(ONE_TRY), ""
    watched = Watched(tmp_path, store, period=1.0)
    for number in range(20):
        lines += f"{number}\n"
        append(tmp_path / "metrics" / "0001.jsonl", f"{number}\n")
        atomic_write(tmp_path / "evaluation.json", f'{{"n": {number}}}')
        watched.look(1)
    assert joined(store, "metrics/") == lines.encode() and not watched.warnings
    assert not [row for row in server.log if row[2] == 429]
    with pytest.raises(ValueError, match="at least 1 second"):
        Mirror(tmp_path, store, period=0.5)


def test_what_commits_comes_last(server: GcsServer, tmp_path: Path) -> None:
    store = new_store()
    checkpoint(tmp_path, 10, best=True)
    append(tmp_path / "metrics" / "0001.jsonl", "{}\n")
    atomic_write(tmp_path / "run_meta.json", '{"completed": true}')
    atomic_write(tmp_path / "evaluation.json", "{}")
    assert Watched(tmp_path, store).mirror.close() == []
    names = [name[len(store.prefix) :] for name in uploads(server) if store.prefix in name]
    step = [name for name in names if "step-10" in name]
    assert step[-1].endswith(MANIFEST) and len(step) == 3
    assert names.index("checkpoints/last.json") > names.index(step[-1])
    assert names[-1] == "run_meta.json"


class DiesAfter:
    """A service that goes away after a number of requests, and comes back when told to."""

    def __init__(self, requests: int) -> None:
        self.left, self.back = requests, False

    def next(self, request: str) -> Fault | None:
        self.left -= 1
        return None if self.back or self.left >= 0 else Fault("status", 503)


@pytest.mark.parametrize("requests", range(14))
def test_cut_off_at_any_request_the_store_holds_whole_checkpoints_only(
    server: GcsServer, tmp_path: Path, requests: int
) -> None:
    store = new_store(ONE_TRY)
    watched = Watched(tmp_path, store)
    checkpoint(tmp_path, 10)
    watched.look()
    checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 10)  # another one of that step
    server.faults = dying = DiesAfter(requests)
    watched.look()
    dying.back = True
    names = whole(store)
    assert len(names) >= 1
    last = json.loads(store.get_bytes("checkpoints/last.json"))["step"]
    assert f"checkpoints/step-{last}" in [*names, "checkpoints/step-10"]
    watched.look(6)
    assert watched.mirror.behind() == [] and len(watched.warnings) <= 1
    assert whole(store) == ["checkpoints/step-10", "checkpoints/step-20"]


@pytest.mark.parametrize("requests", range(3, 11))
def test_a_mirror_that_was_killed_is_followed_by_one_that_goes_on(
    server: GcsServer, tmp_path: Path, requests: int
) -> None:
    store = new_store(ONE_TRY)
    checkpoint(tmp_path, 10)
    append(tmp_path / "metrics" / "0001.jsonl", "1\n")
    server.faults = DiesAfter(requests)
    Watched(tmp_path, store).look(1)
    server.faults = Script()
    sent = set(store.list())
    append(tmp_path / "metrics" / "0001.jsonl", "2\n")
    server.log.clear()
    assert Watched(tmp_path, store).mirror.close() == []
    assert joined(store, "metrics/") == b"1\n2\n" and whole(store) == ["checkpoints/step-10"]
    again = [row for row in server.log if row[0] == "POST"]
    assert len(again) == len(set(store.list()) - sent) + ("metrics/0001-00000.jsonl" in sent)


def test_an_outage_is_told_once_and_caught_up(server: GcsServer, tmp_path: Path) -> None:
    store = new_store(ONE_TRY)
    watched = Watched(tmp_path, store)
    append(tmp_path / "metrics" / "0001.jsonl", "0\n")
    watched.look()
    server.faults = dying = DiesAfter(0)
    waits = []
    for number in range(1, 12):
        append(tmp_path / "metrics" / "0001.jsonl", f"{number}\n")
        waits.append(watched.mirror.step("small"))
        CLOCK.sleep(waits[-1])
    assert waits[:4] == [6.0, 12.0, 24.0, 48.0] and max(waits) == 60.0
    (warning,) = watched.warnings
    assert "503" in warning and "training goes on" in warning and "\n" not in warning
    dying.back = True
    watched.look()
    assert joined(store, "metrics/") == (tmp_path / "metrics" / "0001.jsonl").read_bytes()
    server.faults = DiesAfter(0)
    append(tmp_path / "metrics" / "0001.jsonl", "12\n")
    watched.look()
    assert len(watched.warnings) == 2  # another outage


def test_an_end_in_an_outage_names_what_is_missing(server: GcsServer, tmp_path: Path) -> None:
    store = new_store(ONE_TRY)
    watched = Watched(tmp_path, store)
    checkpoint(tmp_path, 10)
    append(tmp_path / "metrics" / "0001.jsonl", "0\nhalf")
    server.faults = dying = DiesAfter(0)
    before = CLOCK.now()
    missing = watched.mirror.close(bound=100)
    assert 100 <= CLOCK.now() - before < 101
    assert missing == [
        f"{name}: not copied to {store.uri}/"
        for name in ("checkpoints/step-10", "metrics/0001.jsonl", "checkpoints/last.json")
    ]
    dying.back = True
    assert watched.mirror.close() == []
    assert joined(store, "metrics/") == b"0\nhalf"


def test_a_refusal_is_told_once(server: GcsServer, tmp_path: Path) -> None:
    watched = Watched(tmp_path, new_store())
    for number in range(5):
        atomic_write(tmp_path / f"{number}.json", "{}")
    server.objects.denied.add("runs")
    watched.look(5)
    (warning,) = watched.warnings
    assert "access denied" in warning and "roles/storage.object" in warning


def test_what_the_trainer_prunes_goes_and_the_best_stays(server: GcsServer, tmp_path: Path) -> None:
    store = new_store()
    watched = Watched(tmp_path, store)
    for step in (10, 20, 30, 40):
        checkpoint(tmp_path, step, best=step == 10)
        if step == 40:
            shutil.rmtree(tmp_path / "checkpoints" / "step-20")
        watched.look()
    assert whole(store) == [f"checkpoints/step-{n}" for n in (10, 30, 40)]
    assert not store.list("checkpoints/step-20/") and watched.mirror.behind() == []
    shutil.rmtree(tmp_path / "checkpoints")  # somebody's mistake
    watched.look()
    assert whole(store) == [f"checkpoints/step-{n}" for n in (10, 30, 40)]


def test_another_machine_goes_on_from_the_newest_whole_checkpoint(
    server: GcsServer, tmp_path: Path
) -> None:
    store, first, second = new_store(), tmp_path / "first", tmp_path / "second"
    for step in (10, 20, 30):
        checkpoint(first / "kd", step, best=step == 20, size=2_000_000)
    append(first / "kd" / "metrics" / "0001.jsonl", "{}\n")
    atomic_write(first / "kd" / "run_meta.json", '{"completed": false}')
    (first / "kd" / "tokenizer").mkdir()
    atomic_write(first / "kd" / "tokenizer" / "tokenizer.json", "{}")
    assert Watched(first, store).mirror.close() == []
    found = restore(store, second)
    assert found == [second / "kd" / "checkpoints" / "step-30"]
    names = sorted(p.relative_to(second).as_posix() for p in second.rglob("*") if p.is_file())
    assert not [name for name in names if "metrics" in name or "step-10" in name]
    assert len(names) == 2 * 3 + 4
    for name in names:
        assert (second / name).read_bytes() == (first / name).read_bytes()
    # What came from there does not go back there.
    server.log.clear()
    watched = Watched(second, store)
    watched.look()
    assert not [row for row in server.log if row[0] in ("POST", "PUT")]
    assert watched.mirror.behind() == []
    # And what the first machine left goes when two newer ones stand.
    checkpoint(second / "kd", 40)
    watched.look()
    assert whole(store) == [f"kd/checkpoints/step-{n}" for n in (20, 30, 40)]


@pytest.mark.parametrize("pointer", [True, False])
def test_the_best_checkpoint_of_an_earlier_machine_is_not_pruned(
    server: GcsServer, tmp_path: Path, pointer: bool
) -> None:
    store, second = new_store(), tmp_path / "second"
    for step in (10, 20, 30):
        checkpoint(tmp_path / "first", step, best=step == 10)
    assert Watched(tmp_path / "first", store).mirror.close() == []
    restore(store, second)
    shutil.rmtree(second / "checkpoints" / "step-10")
    if not pointer:
        (second / "checkpoints" / "best.json").unlink()
    checkpoint(second, 40)
    watched = Watched(second, store)
    watched.look(3)
    assert whole(store) == [f"checkpoints/step-{n}" for n in (10, 30, 40)]
    assert watched.mirror.behind() == []


@pytest.mark.parametrize("harm", ["damaged", "missing", "manifest", "outside"])
def test_a_broken_checkpoint_is_passed_over(server: GcsServer, tmp_path: Path, harm: str) -> None:
    store, warnings = new_store(), list[str]()
    checkpoint(tmp_path / "first", 10)
    checkpoint(tmp_path / "first", 20)
    assert Watched(tmp_path / "first", store).mirror.close() == []
    base = "checkpoints/step-20/"
    if harm == "damaged":
        store.put_bytes(f"{base}model.safetensors", os.urandom(1000))
    elif harm == "missing":
        store.delete(base + STATE)
    elif harm == "manifest":
        store.put_bytes(base + MANIFEST, b"{}")
    else:
        facts = json.loads(store.get_bytes(base + MANIFEST))
        facts["files"]["../../../evil"] = {"bytes": 1, "sha256": "0"}
        store.put_bytes(base + MANIFEST, json.dumps(facts).encode())
    second = tmp_path / "second"
    assert restore(store, second, warn=warnings.append) == [second / "checkpoints" / "step-10"]
    assert json.loads((second / "checkpoints" / "last.json").read_text())["step"] == 10
    assert not verify(second / "checkpoints" / "step-10")
    assert sorted(p.name for p in (second / "checkpoints").iterdir()) == ["last.json", "step-10"]
    (warning,) = warnings
    assert f"skipping the checkpoint {store.uri}/checkpoints/step-20: " in warning


def test_a_restore_is_repeated_without_harm(server: GcsServer, tmp_path: Path) -> None:
    store = new_store()
    checkpoint(tmp_path / "first", 10)
    assert Watched(tmp_path / "first", store).mirror.close() == []
    (found,) = restore(store, tmp_path / "second")
    (found / "model.safetensors").write_bytes(b"torn")
    server.log.clear()
    assert restore(store, tmp_path / "second") == [found] and not verify(found)
    assert restore(store, tmp_path / "second") == [found]
    downloads = [row for row in server.log if "model.safetensors?alt=media" in row[1]]
    assert len(downloads) == 1
    assert restore(new_store(), tmp_path / "third") == [] and not (tmp_path / "third").exists()


def test_a_file_damaged_after_it_was_sealed_never_becomes_a_checkpoint(
    server: GcsServer, tmp_path: Path
) -> None:
    store = new_store()
    watched = Watched(tmp_path, store)
    (checkpoint(tmp_path, 10) / "model.safetensors").write_bytes(b"x" * 1000)
    atomic_write(tmp_path / "run_meta.json", '{"completed": true}')
    watched.look(4)
    assert not store.exists("run_meta.json")  # a stage is not complete without it
    atomic_write(tmp_path / "run_meta.json", '{"completed": false}')
    watched.look()
    assert store.exists("run_meta.json")
    assert whole(store) == [] and not store.exists("checkpoints/last.json")
    assert [line for line in watched.warnings if "its manifest says sha256" in line]
    assert len(watched.warnings) == 1


def test_of_stored_targets_the_mark_of_a_whole_shard_comes_last(
    server: GcsServer, tmp_path: Path
) -> None:
    """A machine may be taken at any look: what is there then must not pass for a whole shard."""
    store, shard = new_store(), tmp_path / "answers" / "targets" / "shard-00000"
    for name, size in (("ids.npy", 3 << 20), ("keys.npy", 1000), ("meta.json", 10)):
        atomic_write(shard / name, os.urandom(size))
    watched = Watched(tmp_path, store)
    seen = []
    for lane in ("small", "large") * 4:
        watched.mirror.step(lane)
        seen.append({key.rpartition("/")[2] for key in store.list()})
        CLOCK.sleep(3.0)
    assert seen[0] == {"keys.npy"} and seen[-1] == {"ids.npy", "keys.npy", "meta.json"}
    assert all(found == seen[-1] for found in seen if "meta.json" in found)


def test_a_checkpoint_pruned_while_it_is_sent_is_forgotten(
    server: GcsServer, tmp_path: Path
) -> None:
    class Prunes:
        def next(self, request: str) -> None:
            if request.startswith("POST"):
                shutil.rmtree(tmp_path / "checkpoints" / "step-10", ignore_errors=True)

    store = new_store()
    watched = Watched(tmp_path, store)
    checkpoint(tmp_path, 20)
    watched.look()
    checkpoint(tmp_path, 10)
    atomic_write(tmp_path / "checkpoints" / "last.json", '{"step": 20, "path": "step-20"}')
    server.faults = Prunes()
    watched.look(3)
    assert whole(store) == ["checkpoints/step-20"] and not store.list("checkpoints/step-10/")
    assert watched.warnings == watched.mirror.behind() == []


def test_event_files_go_to_their_own_store_now_and_then(server: GcsServer, tmp_path: Path) -> None:
    store, board = new_store(), new_store()
    watched = Watched(tmp_path, store, tensorboard=board)
    path = tmp_path / "kd" / "tensorboard" / "events.1"
    for number in range(20):  # 57 seconds
        append(path, f"{number} ")
        watched.look(1)
    assert board.list() == ["kd/events.1"] and not store.list()
    assert len([row for row in server.log if row[0] == "POST"]) == 2
    assert watched.mirror.close() == []
    assert board.get_bytes("kd/events.1") == path.read_bytes()


def test_a_large_file_travels_once_it_rests(server: GcsServer, tmp_path: Path) -> None:
    store = new_store()
    watched = Watched(tmp_path, store)
    for _ in range(3):
        append(tmp_path / "model.safetensors", "x" * 2_000_000)
        watched.look(1)
    assert not store.list() and watched.mirror.behind() == ["model.safetensors"]
    watched.look(2)
    assert len(store.get_bytes("model.safetensors")) == 6_000_000


@pytest.mark.parametrize("seed", range(8))
def test_faults_by_chance_lose_nothing(server: GcsServer, tmp_path: Path, seed: int) -> None:
    rates = {
        Fault("status", 503): 0.1, Fault("cut_before"): 0.1, Fault("cut_after"): 0.1,
        Fault("corrupt"): 0.1, Fault("cut_upload", at_bytes=200): 0.05,
    }  # fmt: skip
    store = new_store(Patience(**QUICK, total=0.0 if seed % 2 else 5.0))
    watched = Watched(tmp_path / "first", store)
    server.faults = seeded = Seeded(seed, rates)
    for step in range(1, 7):
        append(tmp_path / "first" / "metrics" / "0001.jsonl", f"{step}\n" * 50)
        checkpoint(tmp_path / "first", step, best=step == 2)
        if step > 4:
            shutil.rmtree(tmp_path / "first" / "checkpoints" / f"step-{step - 2}")
        watched.look(1)
    assert watched.mirror.close(bound=3600) == [] and len(seeded.met) > 3
    server.faults = Script()
    written = (tmp_path / "first" / "metrics" / "0001.jsonl").read_bytes()
    assert joined(store, "metrics/") == written
    kept = sorted(path.name for path in (tmp_path / "first/checkpoints").glob("step-*"))
    assert [name.rpartition("/")[2] for name in whole(store)] == kept
    (found,) = restore(store, tmp_path / "second")
    assert found.name == "step-6" and not verify(found)


def test_nothing_waits_for_a_store_that_hangs(server: GcsServer, tmp_path: Path) -> None:
    release, asked = threading.Event(), threading.Event()

    class Hangs:
        def next(self, request: str) -> None:
            asked.set()
            release.wait(30)

    store, warnings = new_store(), list[str]()
    server.faults = Hangs()
    mirror = Mirror(tmp_path, store, warn=warnings.append).start()
    append(tmp_path / "metrics" / "0001.jsonl", "0\n")
    mirror.poke()
    assert asked.wait(30)
    for number in range(1, 100):  # the store hangs; this thread does not
        append(tmp_path / "metrics" / "0001.jsonl", f"{number}\n")
        mirror.poke()
    checkpoint(tmp_path, 10)
    assert mirror.close(bound=0.0)  # what is missing is said, and nothing waited for
    release.set()
    assert mirror.close(bound=60.0) == [] and warnings == []
    written = (tmp_path / "metrics" / "0001.jsonl").read_bytes()
    assert joined(store, "metrics/") == written and whole(store) == ["checkpoints/step-10"]
