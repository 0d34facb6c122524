"""Teardowns that go wrong: a journal that cannot be read, a service that does not answer, and what
does not go. Real drivers' journals, and a clock that nobody waits for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from launcher import api, cli, home
from launcher.backends.base import Env, Held, Phase
from launcher.clock import ManualClock
from launcher.errors import Denied, Exit, JournalDamaged, Leaked
from tests.launcher.fake_backend import FakeBackend, World
from tests.launcher.runs import Scene, killed_at, plugged_in, scene


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    made = ManualClock()
    monkeypatch.setattr("launcher.api.SystemClock", lambda: made)
    return made


def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **script: object) -> Scene:
    """A run whose job goes on and whose driver was killed."""
    it = scene(tmp_path, jobs=[{"looks": None}], **script)
    plugged_in(monkeypatch, tmp_path, it.world)
    killed_at(8, it.drive)
    assert len(it.world.alive()) == 1
    return it


def damage(it: Scene, number: int = 2) -> None:
    for place in (it.root, it.place):
        (place / "journal" / f"{number:08d}.json").write_text("{")
    with pytest.raises(JournalDamaged):
        api.status(it.run_id)


@pytest.mark.parametrize("number", [1, 2])
def test_the_label_finds_what_a_damaged_journal_hides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock, number: int
) -> None:
    """A stranger's job of the same owner stays; without the first record every backend is asked."""
    it = working(tmp_path, monkeypatch)
    other = it.world.resource("other-j0-a1")
    other.write_text('{"kind": "machine", "place": "here", "run": "00000000000000aa"}')
    damage(it, number)
    done = api.teardown(it.run_id)
    assert it.world.alive() == ["other-j0-a1"]
    assert (done.phase, done.held, done.live) == (Phase.LOST, Held.GONE, False)
    (said,) = done.warnings
    assert f"record {number:08d}.json cannot be read in" in said
    assert (it.root / "control" / "stop.json").exists()
    assert home.holder(it.place) is None, "the lock is free again"


def test_what_another_home_has_written_leaves_a_doubt_and_7(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    it = working(tmp_path, monkeypatch)
    damage(it)
    (it.place / "journal" / "00000004.json").unlink()
    with pytest.raises(Leaked) as caught:
        api.teardown(it.run_id)
    name = home.find(it.env.home, it.run_id)["name"]
    assert it.world.alive() == [], "what can be found is deleted all the same"
    assert caught.value.commands == [f"launch teardown {name}"]
    said = str(caught.value)
    assert said.startswith(f"may still bill: {name}; its journal cannot be read (record 00000002")
    assert said.endswith(
        "this home has not written 00000004.json: it may hold something in a place where nothing "
        "was created from here"
    )


def test_what_of_a_damaged_run_cannot_be_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    it = working(tmp_path, monkeypatch, delete=["denied"])
    damage(it)
    (left,) = it.world.alive()
    with pytest.raises(Leaked, match=f"may still bill: {left}; its journal") as caught:
        api.teardown(it.run_id)
    assert [ref.name for ref in caught.value.refs] == [left]
    assert it.world.alive() == [left]
    assert api.teardown(it.run_id).held is Held.GONE


def test_the_command_asks_and_tells_what_it_could_not_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: ManualClock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    it = working(tmp_path, monkeypatch)
    damage(it)
    name = home.find(it.env.home, it.run_id)["name"]
    assert cli.run(["teardown", name]) == Exit.USAGE
    assert "cannot be read" in capsys.readouterr().err and len(it.world.alive()) == 1
    assert cli.run(["teardown", name, "--yes"]) == Exit.OK
    said = capsys.readouterr()
    assert said.out == f"{name}: lost, nothing is left of it that could bill\n"
    assert f"deleted machine {name}-j0-a1, here" in said.err
    assert f"{name}: its journal cannot be read: record 00000002.json" in said.err


def test_a_damaged_run_that_another_machine_has_started_is_not_called_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    it = working(tmp_path, monkeypatch)
    damage(it)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(it.env.home, elsewhere)
    file = home.folder(elsewhere, it.run_id) / "run.json"
    file.write_text(file.read_text().replace('{"v": 1,', '{"v": 1, "adopted": 1.0,'))
    monkeypatch.setenv("LAUNCH_HOME", str(elsewhere))
    with pytest.raises(Leaked, match="may still bill"):
        api.teardown_all()
    assert len(it.world.alive()) == 1, "it may go on there: only its own name ends it"
    with pytest.raises(Leaked, match="another machine has started it") as caught:
        api.teardown(it.run_id)
    assert caught.value.code == Exit.LEAKED and it.world.alive() == []


def test_what_may_be_left_is_told_where_a_backend_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    it = working(tmp_path, monkeypatch)
    damage(it, 1)
    name = home.find(it.env.home, it.run_id)["name"]

    def denied(self: FakeBackend, env: Env) -> NoReturn:
        raise Denied("the token is over")

    monkeypatch.setattr(FakeBackend, "sweep", denied)
    with pytest.raises(Leaked, match=f"may still bill: {name}") as caught:
        api.teardown_all()
    assert caught.value.commands == [f"launch teardown {name}"]


# Waiting.


def test_what_does_not_go_is_told_and_waited_for_as_long_as_is_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: ManualClock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    it = working(tmp_path, monkeypatch, delete=["slow"] * 10_000)
    name, took = it.run().name, []
    for options in ([], ["--timeout", "2m"], ["--timeout", "0s"]):
        before = clock.now()
        assert cli.run(["teardown", name, "--yes", *options]) == Exit.LEAKED
        took.append(round(clock.now() - before))
        said = capsys.readouterr().err
        told = re.findall(
            rf"{name}-j0-a1 in here is being deleted; waiting since (\S+), until", said
        )
        assert len(told) == round(took[-1] / 60)
        assert f"may still bill: {name}-j0-a1" in said and f"launch teardown {name}" in said
    assert 900 < took[0] < 905 and took[1:] == [120, 0]
    (it.world.folder / "script.json").write_text("{}")
    assert cli.run(["teardown", name, "--yes", "--timeout", "2m"]) == Exit.OK


def test_a_service_that_does_not_answer_is_asked_for_as_long_as_is_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: ManualClock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    it = working(tmp_path, monkeypatch, delete=["transient"] * 10_000)
    name, before = it.run().name, clock.now()
    assert cli.run(["teardown", name, "--yes", "--timeout", "90s"]) == Exit.LEAKED
    assert clock.now() - before == 90
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "503 from the fake; waiting since " in line]
    ends = {line.partition(", until ")[2] for line in lines}
    assert len(lines) > 5 and ends == {"22:14:50Z at most"}
    assert api.status(name).held is Held.LEAKED


def test_teardown_of_everything_is_bounded_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    working(tmp_path, monkeypatch, delete=["slow"] * 10_000)
    before = clock.now()
    with pytest.raises(Leaked):
        api.teardown_all(timeout=60)
    assert clock.now() - before == 60


def test_a_duration_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["teardown", "some-run", "--yes", "--timeout", "soon"]) == Exit.USAGE
    assert "--timeout 'soon': not a duration" in capsys.readouterr().err


def test_an_empty_world_is_torn_down_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    it = scene(tmp_path)
    plugged_in(monkeypatch, tmp_path, World(it.world.folder))
    before = clock.now()
    assert api.teardown(it.run_id, timeout=0).held is Held.NONE
    assert clock.now() == before
