"""Two laptops and one run: adopted by its URI, followed, taken over; never driven by both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import api, engine, home, view
from launcher.adopt import adopt
from launcher.artifacts import open_artifacts
from launcher.backends.base import Env, Phase
from launcher.claim import claimed, write_marker
from launcher.errors import Exit, HeldElsewhere, UsageError
from launcher.journal import Journal
from launcher.run import Run
from tests.launcher.bucketed import begin, bucket, journal, laptop, load
from tests.launcher.rehearsed import Scene
from tests.launcher.runs import scene as local_scene
from trainer.store import open_store

from launcher.rehearsal.vertex import PREEMPTED, Stub  # isort: skip


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with bucket(tmp_path, monkeypatch) as made:
        yield made


class Left(Exception):
    """A driver that goes away in the middle, as a killed one does."""


class LeavesAt:
    """A clock on which a driver leaves at its `last` wait."""

    def __init__(self, it: Scene, last: int) -> None:
        self.it, self.last, self.waits = it, last, 0

    def now(self) -> float:
        return self.it.clock.now()

    def sleep(self, seconds: float) -> None:
        self.waits += 1
        if self.waits == self.last:
            raise Left
        self.it.clock.sleep(seconds)


def driven_for_a_while(it: Scene, fate: Stub = Stub(1, 1, 500), waits: int = 3) -> str:  # noqa: B008
    """A run of the first laptop, whose job runs and whose driver has gone without a word."""
    run_id = begin(it)
    it.server.vertex.fates.append(fate)
    env = Env(it.home, it.env.environ, LeavesAt(it, waits), "ann", "python3")
    with pytest.raises(Left):
        engine.drive(run_id, env, load)
    assert len(it.server.vertex.created) == 1
    return run_id


def root(run_id: str) -> str:
    return f"gs://bkt/runs/thing-{run_id[-6:]}"


def look(env: Env, run_id: str) -> Run:
    return view.look(env, home.find(env.home, run_id))


def test_a_run_is_adopted_by_its_uri_and_then_known_by_name(it: Scene, tmp_path: Path) -> None:
    run_id = driven_for_a_while(it)
    other = laptop(it, tmp_path / "other", "bob")
    facts = adopt(root(run_id) + "/", other)
    assert facts["id"] == run_id and facts["owner"] == "ann"
    mine = look(it.env, run_id)
    theirs = look(other, f"thing-{run_id[-6:]}")
    assert theirs == mine or (theirs.jobs, theirs.stages) == (mine.jobs, mine.stages)
    assert theirs.driver is not None and theirs.driver.alive is None
    assert any("--take-over` drives it from here" in text for text in theirs.warnings)
    assert [run.id for run in view.listed(other, 5)] == [run_id]
    assert adopt(root(run_id), other)["id"] == run_id
    assert not (home.folder(other.home, run_id) / "journal").exists(), "nothing is claimed"


def test_a_run_that_another_laptop_drives_is_followed_only(
    it: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = driven_for_a_while(it)
    records = journal(it, run_id)
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path / "other"))
    seen = api.attach(root(run_id))
    assert seen.driver is not None and seen.driver.alive is None and seen.ended is None
    assert journal(it, run_id) == records, "attaching wrote nothing"
    other = laptop(it, tmp_path / "other")
    with pytest.raises(HeldElsewhere, match=f"thing-{run_id[-6:]} is driven by"):
        engine.drive(run_id, other, load)


def test_attach_with_take_over_claims_and_the_other_cannot_write_any_more(
    it: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = driven_for_a_while(it)
    place = home.folder(it.home, run_id)
    ours = Journal(place, open_artifacts(root(run_id), place, {}, it.clock), it.clock)
    ours.read()
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path / "other"))
    spawned: list[str] = []
    monkeypatch.setattr("launcher.driver.spawn", lambda i, env, lock: spawned.append(i))
    api.attach(root(run_id), take_over=True)
    assert spawned == [run_id] and journal(it, run_id)[-1] == "driver"
    with pytest.raises(HeldElsewhere, match="is driven by"):
        ours.append("phase", job=0)
    assert journal(it, run_id).count("driver") == 2


def test_who_takes_over_drives_and_the_other_leaves_the_job_alone(
    it: Scene, tmp_path: Path
) -> None:
    run_id = begin(it)
    it.server.vertex.fates.append(Stub(1, 1, 40, PREEMPTED))
    other = laptop(it, tmp_path / "other", "bob")
    ended: list[Run] = []

    class TakenOver(LeavesAt):
        """While the first driver waits, the other laptop takes over and drives to the end."""

        def sleep(self, seconds: float) -> None:
            self.waits += 1
            if self.waits == 4:
                adopt(root(run_id), other)
                ended.append(engine.drive(run_id, other, load, take_over=True))
            self.it.clock.sleep(seconds)

    first = Env(it.home, it.env.environ, TakenOver(it, 0), "ann", "python3")
    with pytest.raises(HeldElsewhere, match="is driven by") as caught:
        engine.drive(run_id, first, load)
    assert caught.value.code == Exit.HELD
    (run,) = ended
    assert run.phase is Phase.SUCCEEDED and run.owner == "ann"
    kinds = journal(it, run_id)
    assert kinds.count("driver") == 2 and kinds[-1] == "end"
    names = [job["displayName"] for job in it.server.vertex.created]
    assert len(names) == len(set(names)) == 2
    assert it.server.vertex.states() == {}
    assert look(it.env, run_id).phase is Phase.SUCCEEDED, "the first laptop reads how it ended"


def test_another_laptop_needs_no_bundle_file_of_its_own(it: Scene, tmp_path: Path) -> None:
    run_id = driven_for_a_while(it, Stub(1, 1, 500, PREEMPTED))
    (it.home / "b.tar.gz").unlink()
    other = laptop(it, tmp_path / "other")
    adopt(root(run_id), other)
    run = engine.drive(run_id, other, load, take_over=True)
    assert run.phase is Phase.SUCCEEDED and len(run.jobs[0].attempts) == 2
    boot = json.loads(open_store(root(run_id)).get_bytes(f"boot/thing-{run_id[-6:]}-j0-a2.json"))
    assert boot["bundle"]["sha256"] == "ab" * 32


def test_a_driver_that_died_before_it_copied_its_claim_is_known_as_ours(it: Scene) -> None:
    run_id = driven_for_a_while(it)
    place = home.folder(it.home, run_id)
    (claim,) = [f for f in (place / "journal").iterdir() if '"kind": "driver"' in f.read_text()]
    later = [f for f in (place / "journal").iterdir() if f.name >= claim.name]
    for file in later:
        file.unlink()
    seen = look(it.env, run_id)
    assert seen.driver is not None and seen.driver.alive is False
    assert engine.drive(run_id, it.env, load).phase is Phase.SUCCEEDED


def test_stop_and_teardown_work_from_another_laptop(it: Scene, tmp_path: Path) -> None:
    run_id = driven_for_a_while(it)
    other = laptop(it, tmp_path / "other", "bob")
    facts = adopt(root(run_id), other)
    place = home.folder(other.home, run_id)
    artifacts = open_artifacts(facts["root"], place, other.environ, other.clock)
    write_marker(artifacts, it.clock.now(), "bob", "enough")
    run = engine.teardown(run_id, other, load)
    assert run.ended is not None and it.server.vertex.states() == {}
    assert json.loads(artifacts.read("control/stop.json") or b"")["by"] == "bob"
    with pytest.raises(HeldElsewhere), claimed(run_id, it.env, load, None, False):
        pass


def test_a_summary_here_does_not_hide_that_another_laptop_went_on(
    it: Scene, tmp_path: Path
) -> None:
    run_id = begin(it)
    engine.drive(run_id, it.env, load)
    other = laptop(it, tmp_path / "other")
    adopt(root(run_id), other)
    assert look(other, run_id).ended is not None
    summary = home.folder(other.home, run_id) / "summary.json"
    assert summary.exists()
    asked = [method for method, _, _ in list(it.server.log)]
    adopt(root(run_id), other)
    assert not summary.exists(), "named by its URI it is looked at again"
    assert look(other, run_id).ended is not None and summary.exists()
    later = [method for method, _, _ in list(it.server.log)[len(asked) :]]
    assert set(later) <= {"GET"}, "looking writes nothing"


def test_what_a_run_from_elsewhere_holds_is_swept_here_once_it_was_looked_at(
    it: Scene, tmp_path: Path
) -> None:
    run_id = driven_for_a_while(it)
    environ = {k: v for k, v in it.env.environ.items() if k != "GOOGLE_CLOUD_PROJECT"}
    other = Env(tmp_path / "other", environ, LeavesAt(it, 2), "bob", "python3")
    adopt(root(run_id), other)
    with pytest.raises(Left):
        engine.drive(run_id, other, load, take_over=True)
    (ref,) = it.backend.sweep(Env(other.home, environ, it.clock, "ann", "python3"))
    assert ref.run == run_id


def test_what_is_no_run_is_one_clear_line(it: Scene, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run has its journal there"):
        adopt("gs://bkt/nothing", it.env)
    with pytest.raises(UsageError, match="there is no bucket elsewhere"):
        adopt("gs://elsewhere/run", it.env)
    with pytest.raises(UsageError, match="no run has its journal there"):
        adopt(str(tmp_path), it.env)
    run_id = begin(it)
    copy, store = tmp_path / "copied", open_store(root(run_id))
    for name in store.list():
        store.get_file(name, copy / name)
    other = laptop(it, tmp_path / "other")
    with pytest.raises(UsageError, match=f"is a copy: its run lies at {root(run_id)}"):
        adopt(str(copy), other)
    assert not (other.home / "runs").exists()


def test_a_folder_on_a_shared_disk_is_adopted_too(tmp_path: Path) -> None:
    made = local_scene(tmp_path)
    made.drive()
    other = Env(tmp_path / "other", made.env.environ, made.env.clock, "me", "python3")
    facts = adopt(str(made.root), other)
    assert facts["id"] == made.run_id
    assert look(other, made.run_id).phase is Phase.SUCCEEDED


def test_a_teardown_deletes_the_job_though_its_bucket_is_gone(
    it: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = driven_for_a_while(it)
    look(it.env, run_id)
    it.clock.sleep(60)
    monkeypatch.setattr(api, "env", lambda: it.env)
    del it.server.objects.buckets["bkt"]
    with pytest.raises(UsageError, match="holds nothing any more, but its journal") as caught:
        api.teardown(run_id)
    assert "there is no bucket bkt" in str(caught.value)
    assert it.server.vertex.states() == {}


def test_a_teardown_from_a_machine_that_never_drove_finds_the_job_without_its_bucket(
    it: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = driven_for_a_while(it)
    other = laptop(it, tmp_path / "other")
    unnamed = {k: v for k, v in other.environ.items() if "PROJECT" not in k}
    other = replace(other, environ=unnamed)
    adopt(root(run_id), other)
    assert look(other, run_id).live
    monkeypatch.setattr(api, "env", lambda: other)
    del it.server.objects.buckets["bkt"]
    with pytest.raises(UsageError, match="holds nothing any more, but its journal"):
        api.teardown(run_id)
    assert it.server.vertex.states() == {}
