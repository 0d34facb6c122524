"""`launch sweep`: what carries our label and no live run owns, through the real clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import cli, console, home, sweeping
from launcher.backends.base import JobHandle
from launcher.errors import Leaked
from launcher.journal import Journal
from tests.launcher.rehearsed import RUN, Scene, scene
from trainer.store import open_store

from launcher.rehearsal.faults import Fault, Script  # isort: skip
from launcher.rehearsal.vertex import Stub  # isort: skip

ELSEWHERE, OTHERS = "00000000000000aa", "00000000000000bb"
NAME = "kd-l4-0000ff-j0-a1"


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with scene(tmp_path / "home") as made:
        made.home.mkdir()
        for name, value in made.env.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LAUNCH_HOME", str(made.home))
        monkeypatch.setenv("LAUNCH_OWNER", "ann")
        yield made


def names(it: Scene, everyone: bool = False) -> list[str]:
    return [stray.found.ref.name for stray in sweeping.find(it.env, everyone)]


def run_here(it: Scene, *kinds: str) -> None:
    """A run of this home with the id RUN, whose journal holds these records."""
    place = home.folder(it.home, RUN)
    root = place / "artifacts"
    journal = Journal(place, root, it.clock)
    facts = {
        "id": RUN, "name": "kd-l4-0000ff", "fingerprint": "f", "owner": "ann", "root": str(root),
        "created": 1.0,
    }  # fmt: skip
    recipe = {"recipe": {"name": "kd-l4"}, "stages": [], "jobs": []}
    bundle = {"path": "b", "sha256": "0", "bytes": 1}
    journal.append("created", **facts, **recipe, bundle=bundle)
    for kind in kinds:
        journal.append(kind, phase="failed", why="", exit_code=6)
    (place / "run.json").write_text(json.dumps({"v": 1, **facts, "recipe": "kd-l4"}))


def written_elsewhere(*kinds: str) -> None:
    """The journal that another machine keeps in the run's bucket."""
    store = open_store("gs://bkt/runs/kd-l4-0000ff")
    for seq, kind in enumerate(kinds, 1):
        store.create_once(f"journal/{seq:08d}.json", json.dumps({"kind": kind}).encode())


def over(it: Scene, **given: object) -> JobHandle:
    """A job that has ended, so that it is gone as soon as it is deleted."""
    it.server.vertex.fates.append(Stub(1, 1, 1))
    job = it.attempt(**given)  # type: ignore[arg-type]
    it.clock.sleep(5)
    return job


def test_a_live_run_owns_its_jobs_with_a_driver_or_without(it: Scene) -> None:
    it.attempt()
    run_here(it, "driver")
    assert names(it) == []


@pytest.mark.parametrize("kinds", [("end",), ("end", "driver")])
def test_a_run_that_is_over_owns_nothing(it: Scene, kinds: tuple[str, ...]) -> None:
    it.attempt()
    run_here(it, *kinds)
    assert names(it) == [NAME]


def test_a_run_of_another_machine_is_known_by_its_journal_in_the_bucket(it: Scene) -> None:
    it.attempt()
    assert names(it) == [NAME], "no journal: no run"
    written_elsewhere("created", "driver", "intent", "ref")
    assert names(it) == []


def test_a_run_that_another_machine_has_ended_owns_nothing(it: Scene) -> None:
    it.attempt()
    written_elsewhere("created", "intent", "ref", "end", "driver", "gone")
    assert names(it) == [NAME]
    written_elsewhere("created", "intent", "ref", "end", "driver", "gone", "resumed")
    assert names(it) == []


def test_what_may_be_a_live_runs_is_left_alone_and_told(it: Scene) -> None:
    it.attempt()
    it.server.objects.denied.add("bkt")
    found = sweeping.find(it.env)
    assert "cannot be read" in found[0].doubt
    with pytest.raises(Leaked) as caught:
        sweeping.delete(it.env, found)
    assert caught.value.commands == [found[0].command]
    assert list(it.server.vertex.states()) == [NAME]


def test_it_tells_age_and_since_when_it_bills_and_deletes_with_a_confirmation(it: Scene) -> None:
    it.server.vertex.fates.append(Stub(10, 20, None))
    it.attempt()
    it.clock.sleep(100)
    (stray,) = sweeping.find(it.env)
    now = it.clock.now()
    assert stray.found.created is not None and stray.found.bills_since is not None
    assert (now - stray.found.created, now - stray.found.bills_since) == (100, 70)
    assert stray.found.root == "gs://bkt/runs/kd-l4-0000ff"
    assert stray.command.startswith("gcloud ai custom-jobs cancel ")
    sweeping.delete(it.env, [stray])
    assert it.server.vertex.states() == {} and names(it) == []


def test_other_owners_are_shown_only_when_asked_for(it: Scene) -> None:
    Scene(it.server, it.home, it.clock, owner="bob").attempt(run=OTHERS)
    assert names(it) == []
    (stray,) = sweeping.find(it.env, everyone=True)
    assert (stray.found.owner, stray.found.ref.name) == ("bob", "kd-l4-0000bb-j0-a1")


def test_what_cannot_be_deleted_is_named_after_everything_was_tried(it: Scene) -> None:
    over(it)
    over(it, attempt=2)
    found = sweeping.find(it.env)
    it.server.faults = Script([(r"^DELETE ", Fault("status", 403))])
    with pytest.raises(Leaked) as caught:
        sweeping.delete(it.env, found)
    assert [ref.name for ref in caught.value.refs] == [NAME]
    assert names(it) == [NAME], "the other one is gone"


def test_a_run_whose_journal_is_damaged_is_looked_for_until_what_is_late_would_show(
    it: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launcher.api.SystemClock", lambda: it.clock)
    it.attempt()
    run_here(it, "driver")
    for place in (home.folder(it.home, RUN), home.folder(it.home, RUN) / "artifacts"):
        (place / "journal" / "00000001.json").write_text("{")
    before = it.clock.now()
    assert cli.run(["teardown", RUN, "--yes", "--timeout", "30s"]) == 7
    said = capsys.readouterr().err
    assert f"deleted custom_job {NAME}, us-central1" in said
    assert "waiting 20 s for it, of 55 s" in said
    assert "vertex: what the run has asked for last is not there, but it might show late" in said
    assert it.clock.now() == before + 30 and it.server.vertex.states() == {}
    assert cli.run(["teardown", RUN, "--yes"]) == 0
    assert it.clock.now() == before + 90


# The command.


def test_with_nothing_to_sweep_it_says_so(it: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sweep"]) == 0
    assert "no live run owns" in capsys.readouterr().out


def test_it_lists_asks_and_deletes(it: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    over(it)
    assert cli.run(["sweep"]) == 2, "no terminal to ask on"
    assert "--yes" in capsys.readouterr().err
    assert cli.run(["sweep", "--yes"]) == 0
    said = capsys.readouterr().out
    assert NAME in said and "us-central1" in said and "gcloud ai custom-jobs" in said
    assert "deleted 1" in said and it.server.vertex.states() == {}


def test_a_no_leaves_the_commands_and_exit_code_7(
    it: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    over(it)
    monkeypatch.setattr(console, "confirm", lambda question, refusal: False)
    assert cli.run(["sweep"]) == 7
    said = capsys.readouterr().err
    assert f"may still bill: {NAME}" in said and "gcloud ai custom-jobs cancel" in said


def test_json_only_lists_unless_told_to_delete(
    it: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    over(it)
    assert cli.run(["sweep", "--json"]) == 7
    (row,) = json.loads(capsys.readouterr().out)["found"]
    assert (row["name"], row["owner"], row["run"]) == (NAME, "ann", RUN)
    assert cli.run(["sweep", "--json", "--yes"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["left"], told["commands"]) == ([], [])
    assert cli.run(["sweep", "--json"]) == 0


def test_what_belongs_to_others_takes_a_typed_yes(
    it: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    bob = Scene(it.server, it.home, it.clock, owner="bob")
    over(bob, run=OTHERS)
    assert cli.run(["sweep", "--everyone", "--yes"]) == 2
    assert "bob may miss" in capsys.readouterr().err
    assert cli.run(["sweep", "--everyone", "--yes", "--json"]) == 7
    monkeypatch.setattr(console, "can_ask", lambda: True)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert cli.run(["sweep", "--everyone", "--yes"]) == 7
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    assert cli.run(["sweep", "--everyone"]) == 0
    assert it.server.vertex.states() == {}


def test_a_place_that_another_machine_used_is_swept_when_the_environment_names_it(
    it: Scene, tmp_path: Path
) -> None:
    it.attempt()
    fresh = replace(it.env, home=tmp_path / "fresh")
    assert [stray.found.ref.name for stray in sweeping.find(fresh)] == [NAME]
