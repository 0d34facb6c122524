"""A disk of this machine that takes nothing more: what bills is deleted all the same, and a run
that is over is shown as it ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import api, cli, engine, google, home
from launcher.backends.base import Phase
from launcher.errors import Denied, Exit, Leaked
from tests.launcher import runs
from tests.launcher.bucketed import begin, bucket, load
from tests.launcher.rehearsed import Scene
from tests.launcher.test_settling import lists_lag
from tests.launcher.test_unanswered import Killed, dying

from launcher.rehearsal.faults import Fault, Script  # isort: skip
from launcher.rehearsal.vertex import Stub  # isort: skip


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with bucket(tmp_path, monkeypatch) as made:
        monkeypatch.setenv("LAUNCH_HOME", str(made.home))
        monkeypatch.setenv("LAUNCH_OWNER", "ann")
        monkeypatch.setattr("launcher.api.SystemClock", lambda: made.clock)
        made.server.vertex.fate = Stub(2, 2, None)
        yield made
    google._forget()


def refuse(file: Path) -> None:
    """From now on this file cannot be written, whoever asks."""
    file.unlink(missing_ok=True)
    file.mkdir()


def test_a_teardown_deletes_what_it_cannot_record(
    it: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = begin(it)
    it.server.faults = Script([*[("/b/bkt/o", Fault("slow"))] * 30,
                               ("/b/bkt/o", Fault("status", 403))])  # fmt: skip
    with pytest.raises(Denied):
        engine.drive(run_id, it.env, load)
    assert [*it.server.vertex.states().values()] == ["RUNNING"]
    it.server.faults = Script()
    refuse(home.folder(it.home, run_id) / "claim.json")
    assert cli.run(["teardown", run_id, "--yes"]) == Exit.ACCESS
    assert it.server.vertex.states() == {}
    said = capsys.readouterr().err
    assert "holds nothing any more, but its journal does not say so: cannot write" in said
    assert "free space on or make writable" in said


def test_it_does_so_where_the_journal_is_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = runs.scene(tmp_path, jobs=[{"looks": None}])
    runs.plugged_in(monkeypatch, tmp_path, local.world)
    runs.killed_at(8, local.drive)
    assert local.world.alive() == [f"{local.run().jobs[0].name}-a1"]
    refuse(local.place / "claim.json")
    with pytest.raises(home.Unwritable, match="holds nothing any more"):
        api.teardown(local.run_id)
    assert local.world.alive() == []


def test_it_waits_for_a_job_that_may_not_show_yet(it: Scene) -> None:
    run_id = begin(it)
    lists_lag(it, 5.0)
    with pytest.raises(Killed):
        engine.drive(run_id, it.env, dying)
    assert it.server.vertex.states()
    refuse(home.folder(it.home, run_id) / "claim.json")
    with pytest.raises(home.Unwritable, match="holds nothing any more"):
        api.teardown(run_id)
    assert it.server.vertex.states() == {}


def test_it_waits_no_longer_than_is_asked_and_then_is_not_sure(
    it: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = begin(it)
    with pytest.raises(Killed):
        engine.drive(run_id, it.env, dying)
    refuse(home.folder(it.home, run_id) / "claim.json")
    before = it.clock.now()
    with pytest.raises(Leaked, match="may still bill"):
        api.teardown(run_id, timeout=20)
    assert it.clock.now() - before == 20
    assert "it might show late; waiting 20 s for it, of 60 s" in capsys.readouterr().err
    with pytest.raises(home.Unwritable, match="holds nothing any more"):
        api.teardown(run_id)
    assert it.server.vertex.states() == {}


def test_a_run_whose_journal_and_lock_are_damaged_is_deleted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = runs.scene(tmp_path, jobs=[{"looks": None}])
    runs.plugged_in(monkeypatch, tmp_path, local.world)
    runs.killed_at(8, local.drive)
    for place in (local.root, local.place):
        (place / "journal" / "00000002.json").write_text("{")
    refuse(local.place / "driver.lock")
    with pytest.raises(home.Unwritable, match="nothing any more, but it may have a driver: cannot"):
        api.teardown(local.run_id)
    assert local.world.alive() == []


def test_a_run_without_its_summary_is_shown_as_it_ended(it: Scene) -> None:
    it.server.vertex.fate = Stub(2, 2, 5)
    run_id = begin(it)
    refuse(home.folder(it.home, run_id) / "summary.json")
    assert engine.drive(run_id, it.env, load).exit_code == Exit.OK
    (listed,) = api.list_runs()
    assert (listed.phase, api.status(run_id).phase) == (Phase.SUCCEEDED, Phase.SUCCEEDED)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(home.Unwritable, match="cannot write"):
        home.DriverLock.acquire(tmp_path / "runs" / "1")
