"""Log lines of Vertex AI jobs: each once and in order, whatever comes late or twice, and within
what a project may read a minute."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.base import JobHandle, Line, LogQuery
from launcher.backends.vertex import logs, quota
from launcher.errors import Transient
from tests.launcher.rehearsed import Scene, scene

from launcher.rehearsal.faults import Fault, Script  # isort: skip
from launcher.rehearsal.vertex import Said, Stub  # isort: skip


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as made:
        yield made


def started(it: Scene, *lines: Said, **given: Any) -> JobHandle:
    it.server.vertex.fates.append(Stub(queued=0, pending=0, running=None, lines=lines))
    return it.attempt(**given)


class Follower:
    """Reads as a caller does: again and again, with the cursor of the last line."""

    def __init__(self, it: Scene, job: JobHandle, worker: int | None = None) -> None:
        self.it, self.job, self.worker = it, job, worker
        self.cursor: Any = {}
        self.lines: list[Line] = []

    def look(self, most: int | None = None) -> bool:
        """False: not its turn. `most`: the caller goes away after so many lines."""
        query = LogQuery(self.worker, self.cursor)
        try:
            for count, line in enumerate(self.it.backend.logs(self.job, query, self.it.env)):
                if count == most:
                    return True
                self.lines.append(line)
                self.cursor = line.cursor
        except Transient:
            return False
        return True

    @property
    def texts(self) -> list[str]:
        return [line.text for line in self.lines]


def test_lines_of_all_workers_come_once_in_the_order_of_time(it: Scene) -> None:
    job = started(
        it, Said(1, "chief 1"), Said(2, "second 1", "workerpool1-0"), Said(3, "chief 2"),
        Said(3.5, "Job is running.", "service"), Said(4, "third 1", "workerpool1-1"),
    )  # fmt: skip
    follower = Follower(it, job)
    for _ in range(12):
        follower.look()
        it.clock.sleep(1.0)
    assert follower.texts == ["chief 1", "second 1", "chief 2", "Job is running.", "third 1"]
    assert [line.worker for line in follower.lines] == [0, 1, 0, 0, 2]
    begun = follower.lines[0].time
    assert [round(line.time - begun, 3) for line in follower.lines] == [0, 1, 2, 2.5, 3]
    alone = Follower(it, job, worker=1)
    alone.look()
    assert alone.texts == ["second 1"]


def test_a_worker_is_its_global_rank_however_many_a_node_has(it: Scene) -> None:
    said = (Said(1, "boot 0"), Said(2, "[worker 1] from 1"), Said(3, "boot 1", "workerpool1-0"),
            Said(4, "[worker 2] from 2", "workerpool1-0"),
            Said(5, "[worker 3] from 3", "workerpool1-0"))  # fmt: skip
    more = ("hardware.accelerator=A100-40GB:2", "hardware.vertex.machine=null", "hardware.nodes=2",
            "hardware.places=[us-central1]")  # fmt: skip
    it.server.vertex.fates.append(Stub(queued=0, pending=0, running=None, lines=said))
    job = it.attempt(*more)
    every, third = Follower(it, job), Follower(it, job, worker=3)
    it.clock.sleep(20)
    every.look()
    it.clock.sleep(20)
    third.look()
    told = [(line.worker, line.text) for line in every.lines]
    assert told == [(0, "boot 0"), (1, "from 1"), (2, "boot 1"), (2, "from 2"), (3, "from 3")]
    assert third.texts == ["from 3"]


def test_late_and_repeated_entries_show_once_and_in_order_per_worker(it: Scene) -> None:
    """As late as the newest seconds are held back: nothing is out of order."""
    chance = random.Random(4)
    tasks = ["workerpool0-0", "workerpool1-0", "workerpool1-1"]
    lines = [
        Said(n * 0.2, f"line {n}", chance.choice(tasks), chance.uniform(0, logs.SETTLE - 0.5),
             chance.choice([1, 1, 2, 3]))
        for n in range(300)
    ]  # fmt: skip
    follower = Follower(it, started(it, *lines))
    for _ in range(70):
        follower.look()
        it.clock.sleep(1.3)
    assert follower.texts == [f"line {n}" for n in range(300)]


def test_an_entry_that_is_later_than_that_is_shown_late_but_not_lost(it: Scene) -> None:
    lines = [Said(1, "first"), Said(2, "late", late=20), Said(3, "second"), Said(30, "third")]
    follower = Follower(it, started(it, *lines))
    for _ in range(50):
        follower.look()
        it.clock.sleep(1.3)
    assert follower.texts == ["first", "second", "late", "third"]


@pytest.mark.parametrize("late", [60.0, 200.0, 500.0])
def test_an_entry_that_is_minutes_late_is_found_while_the_job_runs(it: Scene, late: float) -> None:
    steps = [Said(n * 5.0, f"step {n}") for n in range(1, 140)]
    follower = Follower(it, started(it, Said(2, "late", late=late), *steps))
    for _ in range(int(late + 2 * logs.WIDE_EVERY) // 4):
        follower.look()
        it.clock.sleep(4.0)
    assert follower.texts.count("late") == 1
    assert len(set(follower.texts)) == len(follower.texts)
    assert len(it.server.logging.lists) < 15 * (late + 2 * logs.WIDE_EVERY) / 60 + 15


def test_a_wide_look_that_gives_nothing_is_not_made_again_at_once(it: Scene) -> None:
    """Also where one worker is followed, and others of its node say more."""
    said = (Said(1, "[worker 1] mine"), Said(2, "[worker 0] other"))
    it.server.vertex.fates.append(Stub(queued=0, pending=0, running=None, lines=said))
    two = ("hardware.accelerator=A100-40GB:2", "hardware.vertex.machine=null",
           "hardware.places=[us-central1]")  # fmt: skip
    follower = Follower(it, it.attempt(*two), worker=1)
    it.clock.sleep(20)
    follower.look()
    it.clock.sleep(logs.WIDE_EVERY)
    before = len(it.server.logging.lists)
    for _ in range(10):
        follower.look()
        it.clock.sleep(1.0)
    assert follower.texts == ["mine"]
    assert len(it.server.logging.lists) - before == 11


def test_the_last_looks_go_far_back_and_read_what_is_new_too(
    it: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much lies in between: a wide look is bounded, what is new is not."""
    monkeypatch.setattr(logs, "_PAGE", 5)
    between = [Said(10 + n, f"{n:03d}") for n in range(100)]
    last = Said(120, "the last", late=25)
    follower = Follower(it, started(it, Said(1, "late", late=130), *between, last))
    it.clock.sleep(115)
    follower.look()
    assert follower.texts == [f"{n:03d}" for n in range(100)]
    it.clock.sleep(40)  # less than a minute later: no wide look is due
    follower.look()
    assert follower.texts[100:] == ["the last"]
    query = LogQuery(None, follower.cursor, None, last=True)
    lines = [line.text for line in it.backend.logs(follower.job, query, it.env)]
    assert lines == ["late"]


@pytest.mark.parametrize("wrong", [-7200.0, -120.0, 120.0, 7200.0])
def test_this_machines_clock_may_be_wrong(it: Scene, wrong: float) -> None:
    class Wrong:
        def now(self) -> float:
            return it.clock.now() + wrong

        def sleep(self, seconds: float) -> None:
            it.clock.sleep(seconds)

    lines = [Said(n * 2.0, f"{n:02d}", late=n % 3) for n in range(30)]
    follower = Follower(it, started(it, *lines))
    follower.it = replace_clock(it, Wrong())
    for _ in range(50):
        follower.look()
        it.clock.sleep(1.5)
    assert follower.texts == [f"{n:02d}" for n in range(30)]


def replace_clock(it: Scene, clock: Any) -> Scene:
    other = Scene(it.server, it.home, clock)
    other.backend = it.backend
    return other


def test_a_worker_whose_clock_runs_ahead_hides_nobody(it: Scene) -> None:
    """Its entries have times that are still to come; the service says when it received them."""
    follower = Follower(it, job := started(it))
    it.see(job)
    number, begun = job.refs[-1].data["job_id"], it.clock.now()
    for n in range(20):
        it.clock.sleep(2.0)
        for task, ahead in (("workerpool1-0", 300.0), ("workerpool0-0", 0.0)):
            it.server.logging.write(
                "proj", number, task, f"{task} {n}", begun + 2 * n + ahead, late=2.0 - ahead
            )
        follower.look()
    it.clock.sleep(logs.SETTLE + 2)
    follower.look()
    for worker, task in enumerate(("workerpool0-0", "workerpool1-0")):
        texts = [line.text for line in follower.lines if line.worker == worker]
        assert texts == [f"{task} {n}" for n in range(20)]


def test_a_worker_whose_clock_is_an_hour_ahead_repeats_nothing(it: Scene) -> None:
    """The service finds its entries by their times, long after they were received."""
    follower = Follower(it, job := started(it))
    it.see(job)
    number, begun = job.refs[-1].data["job_id"], it.clock.now()
    for n in range(45):
        it.clock.sleep(20.0)
        for task, ahead in (("workerpool1-0", 3600.0), ("workerpool0-0", 0.0)):
            time = begun + 20 * n + ahead
            it.server.logging.write(
                "proj", number, task, f"{task} {n}", time, late=it.clock.now() - time
            )
        follower.look()
    it.clock.sleep(logs.SETTLE + 2)
    follower.look()
    assert len(follower.texts) == 90
    assert sorted(follower.texts) == sorted({*follower.texts})


def test_of_an_attempt_that_was_created_twice_the_lines_of_the_first_job_all_come(
    it: Scene,
) -> None:
    """The second job was followed until it left; what the first had said by then is not lost."""
    first = started(it, *(Said(n * 10.0, f"{n:02d}") for n in range(10)))
    it.clock.sleep(60)
    ref = first.refs[-1]
    second = replace(ref, data={**ref.data, "job_id": "77"})
    now = it.clock.now()
    it.server.logging.write("proj", "77", "workerpool0-0", "created twice: nothing was done", now)
    follower = Follower(it, it.handle([second]))
    it.clock.sleep(20)
    follower.look()
    assert follower.texts == ["created twice: nothing was done"]
    follower.job = it.handle([second, ref])
    it.clock.sleep(60)
    follower.look()
    assert follower.texts[1:] == [f"{n:02d}" for n in range(10)]


def test_a_cursor_without_memory_never_repeats_what_lies_before_it(it: Scene) -> None:
    follower = Follower(it, started(it, *(Said(n * 4.0, f"{n:02d}") for n in range(30))))
    it.clock.sleep(60)
    follower.look()
    at = follower.lines[9].cursor
    other = Follower(it, follower.job)
    other.cursor = {"time": at["time"], "id": at["id"]}
    for _ in range(40):
        other.look()
        it.clock.sleep(4)
    assert other.texts == [f"{n:02d}" for n in range(10, 30)]


def test_a_cursor_goes_on_exactly_after_its_line(it: Scene) -> None:
    lines = [Said(n * 0.01, f"{n}", times=1 + n % 2) for n in range(20)]
    follower = Follower(it, started(it, *lines))
    it.clock.sleep(20)
    while len(follower.lines) < 20 and len(it.server.log) < 200:
        follower.look(most=3)  # cut after three lines
    assert follower.texts == [str(n) for n in range(20)]
    again = Follower(it, follower.job)
    again.cursor = follower.lines[6].cursor  # an older one: the lines after it come again
    again.look()
    assert again.texts == [str(n) for n in range(7, 20)]
    other = Follower(it, follower.job)
    memory = {k: v for k, v in follower.lines[6].cursor.items() if k in ("time", "id")}
    other.cursor = memory  # as another process would have it
    other.look()
    assert other.texts == [str(n) for n in range(7, 20)]


def test_many_entries_are_read_page_by_page(it: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_PAGE", 7)
    follower = Follower(it, started(it, *(Said(0, f"{n:02d}") for n in range(40))))
    it.clock.sleep(20)
    assert follower.look()
    assert follower.texts == [f"{n:02d}" for n in range(40)]
    assert len(it.server.logging.lists) == 6


def test_an_outage_in_the_middle_loses_nothing(it: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_PAGE", 7)
    follower = Follower(it, started(it, *(Said(0, f"{n:02d}") for n in range(40))))
    it.clock.sleep(20)
    faults = Script()
    it.server.faults = faults
    for fault in (Fault("cut_before"), Fault("status", 503), Fault("cut_download", at_bytes=80)):
        faults.add("entries:list", fault)
        assert not follower.look()
        faults.clear()
    faults.left = [("nothing", Fault("status"))]
    assert follower.look()
    assert follower.texts == [f"{n:02d}" for n in range(40)]


def test_the_last_lines_of_a_job_that_is_deleted_are_still_read(it: Scene) -> None:
    it.server.vertex.fates.append(Stub(0, 0, 3, lines=(Said(2.9, "the end", late=10),)))
    job = it.attempt()
    follower = Follower(it, job)
    it.clock.sleep(4)
    follower.look()
    assert it.gone(job.refs[-1]) and not follower.texts
    assert it.backend.can.drain == logs.DRAIN
    it.clock.sleep(logs.DRAIN)
    follower.look()
    assert follower.texts == ["the end"]


def test_a_hundred_followed_runs_stay_within_what_a_project_may_read(it: Scene) -> None:
    """Five minutes of a virtual clock; everybody comes when told to, and nobody starves."""
    (*_, job) = it.intents()
    ref = it.backend.create(job, it.env)
    followers = []
    for number in range(100):
        data = {**ref.data, "job_id": str(number)}
        followers.append(Follower(it, it.handle([replace(ref, data=data)])))
    turns = [0] * 100
    ready = [0.0] * 100
    for _ in range(300):
        for number, follower in enumerate(followers):
            if it.clock.now() < ready[number]:
                continue
            query = LogQuery()
            try:
                list(it.backend.logs(follower.job, query, it.env))
                turns[number] += 1
            except Transient as signal:
                ready[number] = it.clock.now() + signal.after
        it.clock.sleep(1.0)
    times = it.server.logging.lists
    busiest = max(sum(start <= t < start + 60 for t in times) for start in times)
    assert 40 <= busiest <= 60, busiest
    assert len(times) >= 5 * 45, "the allowance is used"
    assert min(turns) >= 2, "everybody gets a turn"


def test_readers_in_other_processes_share_one_allowance(tmp_path: Path) -> None:
    now = 1_795_000_000.0
    for number in range(quota.A_MINUTE):
        quota.take(tmp_path, "proj", f"reader {number}", now)
    with pytest.raises(Transient, match="reads of logs a minute are used up in proj") as caught:
        quota.take(tmp_path, "proj", "late", now + 1)
    assert caught.value.after == pytest.approx(59.0)
    with pytest.raises(Transient) as again:
        quota.take(tmp_path, "proj", "late", now + 30)
    assert again.value.after == pytest.approx(30.0), "its turn is kept, not moved"
    quota.take(tmp_path, "proj", "late", now + 60)
    quota.take(tmp_path, "other", "late", now + 1)
    file = tmp_path / "google" / "logging-proj.json"
    file.write_text("{damaged")
    quota.take(tmp_path, "proj", "anyone", now + 61)


def test_a_clock_that_was_set_back_locks_nobody_out(tmp_path: Path) -> None:
    for number in range(quota.A_MINUTE):
        quota.take(tmp_path, "proj", f"reader {number}", 2_000_000_000.0)
    assert quota.spare(tmp_path, "proj", 1_795_000_000.0)
    quota.take(tmp_path, "proj", "later", 1_795_000_000.0)


def test_a_read_that_may_wait_takes_no_turn_of_those_who_wait(tmp_path: Path) -> None:
    for number in range(quota.A_MINUTE):
        assert quota.spare(tmp_path, "proj", 1_795_000_000.0 + number / 10)
    assert not quota.spare(tmp_path, "proj", 1_795_000_010.0)
    assert quota.spare(tmp_path, "other", 1_795_000_010.0)
    assert quota.spare(tmp_path, "proj", 1_795_000_060.0)


@pytest.mark.parametrize(
    ("task", "node"),
    [("workerpool0-0", 0), ("workerpool1-0", 1), ("workerpool1-12", 13), ("service", 0), ("", 0)],
)
def test_a_task_is_a_node(task: str, node: int) -> None:
    assert logs.node_of(task) == node
