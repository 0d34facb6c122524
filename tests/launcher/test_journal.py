"""The journal: records that are whole or absent, healed from the other place, fenced by number."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import api
from launcher.backends.base import Held, Phase
from launcher.clock import ManualClock
from launcher.errors import Exit, HeldElsewhere, JournalDamaged, UsageError
from launcher.fold import run_of
from launcher.home import Unwritable
from launcher.journal import Journal, fold
from launcher.run import Run
from tests.launcher.runs import Scene, killed_at, plugged_in, recipe, scene


def journal(folder: Path, records: int = 0) -> Journal:
    made = Journal(folder / "home", folder / "root", ManualClock())
    made.read()
    for number in range(records):
        made.append("driver", number=number)
    return made


def files(folder: Path, number: int) -> list[Path]:
    return [folder / part / "journal" / f"{number:08d}.json" for part in ("root", "home")]


#: What every record has beside its number, its kind and the facts of that kind.
ENVELOPE = {"v": 1, "epoch": 1, "time": 1_700_000_000.0, "driver": {"host": "here", "pid": 1}}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


def test_records_are_numbered_and_stand_in_both_places(tmp_path: Path) -> None:
    written = journal(tmp_path)
    written.epoch = 3
    record = written.append("intent", job=0, intent={"name": "x"})
    assert (record["seq"], record["epoch"], record["kind"], record["v"]) == (1, 3, "intent", 1)
    assert record["driver"]["pid"] == os.getpid()
    first, copy = files(tmp_path, 1)
    assert first.read_bytes() == copy.read_bytes()
    assert json.loads(first.read_text()) == record == journal(tmp_path).read()[0]
    assert [f.name for f in first.parent.iterdir()] == ["00000001.json"]


def test_of_two_writers_of_one_number_the_second_loses(tmp_path: Path) -> None:
    one, other = journal(tmp_path, 1), journal(tmp_path)
    one.append("phase", by="one")
    with pytest.raises(HeldElsewhere, match=f"process {os.getpid()}") as caught:
        other.append("phase", by="other")
    assert caught.value.code == Exit.HELD and "--take-over" in caught.value.hint
    assert [r.get("by") for r in journal(tmp_path).read()] == [None, "one"]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_a_record_damaged_in_one_place_is_healed_from_the_other(
    tmp_path: Path, place: int, number: int, harm: Any
) -> None:
    before = journal(tmp_path, 3).read()
    harm(files(tmp_path, number)[place])
    reader = journal(tmp_path)
    assert reader.read() == before
    assert len(reader.warnings) == (1 if place == 0 else 0)  # the copy is only a copy
    assert not place or not files(tmp_path, number)[place].exists() or harm is cut
    assert reader.read(heal=True) == before
    one, other = files(tmp_path, number)
    assert one.read_bytes() == other.read_bytes()
    assert reader.append("stop")["seq"] == 4


def test_a_last_record_damaged_in_both_places_is_set_aside(tmp_path: Path) -> None:
    before = journal(tmp_path, 3).read()
    for file in files(tmp_path, 3):
        cut(file)
    reader = journal(tmp_path)
    assert reader.read() == before[:2]
    assert all(file.exists() for file in files(tmp_path, 3))  # a reader repairs nothing
    assert reader.read(heal=True) == before[:2]
    assert "set aside" in reader.warnings[0]
    assert reader.append("stop")["seq"] == 3
    assert [r["kind"] for r in reader.read()] == ["driver", "driver", "stop"]
    assert len(list(tmp_path.glob("*/journal/*.damaged"))) == 2


@pytest.mark.parametrize("number", [1, 2])
def test_a_record_in_the_middle_damaged_in_both_places_is_one_clear_line(
    tmp_path: Path, number: int
) -> None:
    journal(tmp_path, 3)
    for file in files(tmp_path, number):
        cut(file)
    with pytest.raises(JournalDamaged) as caught:
        journal(tmp_path)
    assert "\n" not in str(caught.value) and caught.value.code == Exit.USAGE
    for place in ("root", "home"):
        assert str(tmp_path / place / "journal") in str(caught.value)


#: Valid JSON, and not a record: each lacks something, or says what cannot be.
INCOMPLETE: list[dict[str, Any]] = [
    {"v": 1, "kind": "phase"},
    {"v": 1, "kind": "driver", "epoch": 1, "time": 1.0, "driver": {}},
    {**ENVELOPE, "kind": "driver", "time": "noon"},
    {**ENVELOPE, "kind": "phase"},
    {**ENVELOPE, "kind": "phase", "job": 7, "attempt": 1, "phase": "running"},
    {**ENVELOPE, "kind": "phase", "job": 0, "attempt": 7, "phase": "running"},
    {**ENVELOPE, "kind": "phase", "job": 0, "attempt": 1, "phase": "nonsense", "held": "live"},
    {**ENVELOPE, "kind": "ref", "job": 0, "attempt": 1, "ref": {"sort": "machine"}},
    {**ENVELOPE, "kind": "stage", "id": "none", "phase": "running"},
]


def replaced(it: Scene, number: int, facts: dict[str, Any], places: int = 2) -> None:
    for folder in (it.root, it.place)[:places]:
        file = folder / "journal" / f"{number:08d}.json"
        file.write_text(json.dumps({**facts, "seq": number}))


@pytest.mark.parametrize("facts", INCOMPLETE)
def test_a_last_record_that_is_incomplete_is_treated_like_a_cut_one(
    tmp_path: Path, facts: dict[str, Any]
) -> None:
    it = scene(tmp_path, jobs=[{"looks": 3}])
    killed_at(9, it.drive)
    before = it.records()
    replaced(it, len(before), facts)
    assert it.records() == before[:-1] and it.run().live
    assert it.drive(ManualClock(1_700_100_000.0)).phase is Phase.SUCCEEDED
    assert it.world.alive() == [] and len(it.world.lines("begun.log")) == 1


@pytest.mark.parametrize("facts", INCOMPLETE)
def test_an_incomplete_record_is_healed_from_its_whole_copy(
    tmp_path: Path, facts: dict[str, Any]
) -> None:
    it = scene(tmp_path)
    it.drive()
    before = it.records()
    for number in range(2, len(before) + 1):
        replaced(it, number, facts, places=1)
    assert it.records() == before
    assert it.journal().read(heal=True) == before
    reader = it.journal()
    assert reader.read() == before and reader.warnings == []


@pytest.mark.parametrize("facts", INCOMPLETE)
def test_an_incomplete_record_in_the_middle_is_damage_and_everything_is_still_torn_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any]
) -> None:
    it = scene(tmp_path, jobs=[{"looks": None}])
    plugged_in(monkeypatch, tmp_path, it.world)
    killed_at(8, it.drive)
    assert len(it.world.alive()) == 1
    replaced(it, 2, facts)
    with pytest.raises(JournalDamaged, match=r"00000002\.json"):
        api.status(it.run_id)
    (shown,) = api.list_runs()
    assert shown.phase is Phase.LOST and shown.jobs[0].backend == "fake"
    api.teardown_all()
    assert it.world.alive() == []


@pytest.mark.parametrize("text", ["{", json.dumps({**ENVELOPE, "seq": 1, "kind": "created"})])
def test_everything_is_torn_down_without_a_single_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    it = scene(tmp_path, jobs=[{"looks": None}])
    plugged_in(monkeypatch, tmp_path, it.world)
    killed_at(8, it.drive)
    for folder in (it.root, it.place):
        (folder / "journal" / "00000001.json").write_text(text)
    api.teardown_all()
    assert it.world.alive() == []


@pytest.mark.parametrize("kind", ["phase", "ref", "intent", "created", "gate", "end"])
def test_a_record_without_its_facts_is_damage_to_the_fold(
    records: list[dict[str, Any]], kind: str
) -> None:
    bare = {**ENVELOPE, "seq": 2, "kind": kind}
    with pytest.raises(JournalDamaged, match=f"'{kind}', cannot be used"):
        fold([*records[:1], bare])


def test_a_first_record_damaged_in_both_places_leaves_nothing_to_go_on(tmp_path: Path) -> None:
    journal(tmp_path, 1)
    for file in files(tmp_path, 1):
        cut(file)
    with pytest.raises(JournalDamaged):
        journal(tmp_path)


def test_a_missing_number_is_not_read_over(tmp_path: Path) -> None:
    journal(tmp_path, 4)
    for file in files(tmp_path, 2):
        file.unlink()
    with pytest.raises(JournalDamaged, match=r"00000002\.json"):
        journal(tmp_path)


def test_a_journal_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    journal(tmp_path, 1)
    for file in files(tmp_path, 1):
        file.write_text(json.dumps({**json.loads(file.read_text()), "v": 2}))
    with pytest.raises(UsageError, match="newer version"):
        journal(tmp_path)


def test_a_disk_that_refuses_is_one_clear_line_and_nothing_is_lost(tmp_path: Path) -> None:
    """The limit on file sizes stands in for a full disk: the write itself fails."""
    before = journal(tmp_path, 2).read()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            writer = journal(tmp_path)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
            try:
                writer.append("phase", why="x" * 200)
            except Unwritable as error:
                clear = str(error).startswith("cannot write") and error.code == Exit.ACCESS
                code = 0 if clear and error.hint else 2
        finally:
            os._exit(code)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0
    reader = journal(tmp_path)
    assert reader.read() == before
    assert reader.append("stop")["seq"] == 3


def test_a_run_survives_its_own_json(tmp_path: Path) -> None:
    it = scene(tmp_path, recipe(2), jobs=[{"end": "preempted"}])
    run = it.drive()
    again = run_of(json.loads(json.dumps(run.to_json())))
    assert again == run and isinstance(again.phase, Phase) and isinstance(again.held, Held)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A journal in which much happens: no capacity, preemption, a stop, a resumption."""
    it = scene(
        tmp_path_factory.mktemp("run"),
        recipe(2),
        create=["no_capacity", "lost_reply"],
        jobs=[{"end": "preempted"}, {}, {"end": "until"}],
    )
    it.drive()
    it.resume()
    it.drive(ManualClock(1_700_100_000.0))
    return it.records()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(share=st.floats(0, 1))
def test_any_beginning_of_a_journal_folds(records: list[dict[str, Any]], share: float) -> None:
    beginning = records[: 1 + round(share * (len(records) - 1))]
    text = json.dumps(beginning)
    run = fold(beginning)
    assert isinstance(run, Run) and run == fold(json.loads(text))
    assert json.dumps(beginning) == text, "folding changes no record"
    ended = next((r["kind"] == "end" for r in reversed(beginning)
                  if r["kind"] in ("end", "resumed")), False)  # fmt: skip
    assert (run.ended is not None) == ended
    holding = [ref for job in run.jobs for a in job.attempts for ref in a.holding]
    assert not holding or run.held not in (Held.NONE, Held.GONE)


def test_a_beginning_without_the_first_record_is_no_run(records: list[dict[str, Any]]) -> None:
    with pytest.raises(JournalDamaged):
        fold([])
    with pytest.raises(JournalDamaged):
        fold(records[1:])


def test_a_kind_of_a_later_version_is_passed_over(records: list[dict[str, Any]]) -> None:
    strange = {**records[-1], "kind": "aurora"}
    assert fold([*records, strange]) == fold(records)
