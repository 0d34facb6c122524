"""Every fault that a run on Vertex AI can meet, one row each: how the run ends, the one line that
says so, and that nothing is left. The crash matrix (test_crash_matrix.py) crosses them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import pytest

from launcher import engine, google, home
from launcher.backends.base import Held, Phase
from launcher.clock import ManualClock
from launcher.errors import Exit, HeldElsewhere
from launcher.logs import follow
from launcher.run import Run
from launcher.spec import Budget, Recipe, Retry
from tests.launcher import runs
from tests.launcher.on_bucket import load
from tests.launcher.rehearsed import Scene, scene
from tests.launcher.test_vertex_engine import HARDWARE, SharedClock, begin, nothing_is_left, recipe
from tests.launcher.test_vertex_faults import L4, NO_QUOTA, credentials

from launcher.rehearsal.faults import Fault, Script  # isort: skip
from launcher.rehearsal.vertex import (  # isort: skip
    NO_IMAGE, PREEMPTED, Refusal, Said, Stub, exited,
)  # fmt: skip

_CREATE = r"^POST [^?]*customJobs(\?|$)"
_DAY = 86_400.0


class Turning(ManualClock):
    """A virtual clock on which things happen: `at` holds (UTC seconds, what happens)."""

    def __init__(self) -> None:
        super().__init__(1_795_000_000.0)
        self.at: list[tuple[float, Callable[[], object]]] = []

    def after(self, seconds: float, happens: Callable[[], object]) -> None:
        self.at.append((self.now() + seconds, happens))

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        due = [entry for entry in self.at if entry[0] <= self.now()]
        self.at = [entry for entry in self.at if entry not in due]
        for _, happens in due:
            happens()


@dataclass
class World:
    """A scene, and the run that a fault befalls."""

    it: Scene
    clock: Turning
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    run_id: str = ""
    asleep: float = 0.0
    seen: list[Any] = field(default_factory=list)

    @property
    def vertex(self) -> Any:
        return self.it.server.vertex

    def fate(self, *fates: Stub) -> None:
        self.vertex.fates.extend(fates)

    def fails(self, pattern: str, fault: Fault, times: int = 1) -> None:
        self.it.server.faults = Script([(pattern, fault)] * times)

    def drive(self) -> Run:
        return engine.drive(self.run_id, self.it.env, load)


# What befalls it. Each is told the world before the run is driven.


def no_credentials(world: World) -> None:
    credentials(world.monkeypatch, world.it, world.folder)


def expired_credentials(world: World) -> None:
    credentials(world.monkeypatch, world.it, world.folder)
    file = world.folder / "adc.json"
    token = f"{world.it.server.url}/token"  # which answers 404: the login is not known any more
    file.write_text(
        '{"type": "external_account_authorized_user", "client_id": "a", "client_secret": "b", '
        f'"refresh_token": "c", "token_url": "{token}", "audience": "us"}}'
    )
    world.monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))


def refused(status: int, message: str) -> Callable[[World], None]:
    def befalls(world: World) -> None:
        world.vertex.refusals["*"] = Refusal(status, message)

    return befalls


def api_off(world: World) -> None:
    world.vertex.off.add("proj")


def bucket_not_ours(world: World) -> None:
    world.it.server.objects.denied.add("bkt")


def bucket_absent(world: World) -> None:
    world.it.server.objects.delete_bucket("bkt")


def ends(*fates: Stub) -> Callable[[World], None]:
    return lambda world: world.fate(*fates)


def storm(status: int) -> Callable[[World], None]:
    return lambda world: world.fails(".", Fault("status", status), times=6)


def one(pattern: str, fault: Fault) -> Callable[[World], None]:
    return lambda world: world.fails(pattern, fault)


def late_and_twice(world: World) -> None:
    world.fate(Stub(1, 1, 10, lines=(Said(1, "step 1", times=2), Said(9.9, "step 2", late=20))))


def gone(world: World) -> None:
    def delete() -> None:
        (job,) = world.vertex._jobs.values()
        world.vertex.remove(job.number)

    world.fate(Stub(1, 1, 300))
    world.clock.after(30, delete)


def asleep(*fates: Stub) -> Callable[[World], None]:
    """The lid is closed while the job runs, and opened a day later."""

    def befalls(world: World) -> None:
        world.fate(*fates)
        world.clock.after(20, partial(ManualClock.sleep, world.clock, _DAY))

    return befalls


def two_laptops(world: World) -> None:
    """Another machine that reaches the same artifacts begins to drive, and is refused."""

    def other() -> None:
        there = replace(world.it.env, home=world.folder / "other")
        mine, theirs = (home.folder(h, world.run_id) for h in (world.it.home, there.home))
        theirs.mkdir(parents=True)
        shutil.copy(mine / "run.json", theirs)
        with pytest.raises(HeldElsewhere, match="is driven by") as caught:
            engine.drive(world.run_id, there, load)
        world.seen.append(caught.value.code)

    world.clock.after(30, other)


def interrupted(world: World) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    world.clock.after(30, interrupt)


@dataclass(frozen=True)
class Row:
    """`jobs`: how many jobs were created; `says`: in the run's one line, "" when it ends well."""

    befalls: Callable[[World], None]
    code: Exit
    says: str = ""
    jobs: int = 0
    given: Optional[dict[str, Any]] = None


_WAIT = {"budget": Budget(wait="30m"), "retry": Retry(5, 999, 2, 0)}
_FEW = {"retry": Retry(5, 3, 2, 0)}
FAULTS = {
    "no credentials": Row(no_credentials, Exit.ACCESS, "no Google credentials on this machine"),
    "expired credentials": Row(expired_credentials, Exit.ACCESS, "not accepted any more"),
    "wrong project": Row(
        refused(404, "The project {project} does not exist."), Exit.USAGE, "proj does not exist"
    ),
    "API off": Row(api_off, Exit.ACCESS, "aiplatform.googleapis.com is off"),
    "quota zero": Row(
        refused(429, NO_QUOTA), Exit.CAPACITY, f"quota {L4} is used up in us-west1 (4 times; "
        "retry.capacity: 3)", given=_FEW,
    ),
    "stock-out everywhere": Row(
        refused(429, "Resources are insufficient in region: {place}."), Exit.CAPACITY,
        "no capacity within budget.wait (30m): no capacity in us-", given=_WAIT,
    ),
    "image missing": Row(ends(Stub(1, 1, 0, NO_IMAGE)), Exit.USAGE, "trainer:1 not found", 1),
    "bucket not ours": Row(bucket_not_ours, Exit.ACCESS, "gs://bkt: "),
    "bucket absent": Row(bucket_absent, Exit.USAGE, "artifacts: there is no bucket gs://bkt"),
    "secret missing or denied": Row(
        ends(Stub(1, 1, 5, exited(78))), Exit.JOB,
        "status of 78", 1, {"retry": Retry(5, 20, 2, 9)},
    ),
    "429 storm": Row(storm(429), Exit.OK, jobs=1),
    "503s": Row(storm(503), Exit.OK, jobs=1),
    "reply lost": Row(one(_CREATE, Fault("cut_after")), Exit.OK, jobs=1),
    "upload cut": Row(one("^POST /upload/", Fault("cut_upload", at_bytes=40)), Exit.OK, jobs=1),
    "log lines late and twice": Row(late_and_twice, Exit.OK, jobs=1),
    "job gone behind our back": Row(gone, Exit.OK, jobs=2),
    "asleep for a day, job done": Row(
        asleep(Stub(1, 1, 60)), Exit.OK, jobs=1, given={"budget": Budget(hours=1)}
    ),
    "asleep for a day, job failed": Row(
        asleep(Stub(1, 1, 60, exited(65))), Exit.JOB, "status of 65", 1,
        {"budget": Budget(hours=1)},
    ),
    "asleep for a day, job preempted": Row(
        asleep(Stub(1, 1, 60, PREEMPTED)), Exit.OK, jobs=2, given={"budget": Budget(hours=1)}
    ),
    "two laptops": Row(two_laptops, Exit.OK, jobs=1),
    "Ctrl-C": Row(interrupted, Exit.OK, jobs=1),
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    clock = Turning()
    with scene(tmp_path / "home", clock) as made:
        made.home.mkdir()
        yield World(made, clock, tmp_path, monkeypatch)
    google._forget()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_one_outcome_and_leaves_nothing(world: World, name: str) -> None:
    row = FAULTS[name]
    given: dict[str, Any] = row.given or {}
    world.run_id = begin(world.it, recipe(**given))
    environ = world.it.env.environ
    row.befalls(world)
    try:
        run = world.drive()
    except KeyboardInterrupt:
        run = world.drive()  # `launch attach`, later
    world.it.env = replace(world.it.env, environ=environ)  # credentials are there again
    assert (run.exit_code, run.phase is Phase.SUCCEEDED) == (row.code, row.code is Exit.OK)
    assert row.says in run.why and "\n" not in run.why and bool(run.why) == bool(row.says)
    assert run.held in (Held.NONE, Held.GONE) and run.ended is not None
    names = [job["displayName"] for job in world.vertex.created]
    assert len(names) == len(set(names)) == row.jobs
    world.vertex.off.clear()
    world.vertex.refusals.clear()
    assert nothing_is_left(world.it)
    assert not world.clock.at, "the fault has happened"


def test_lines_that_come_late_and_twice_are_shown_once_and_in_order(world: World) -> None:
    world.run_id = begin(world.it)
    late_and_twice(world)
    run = world.drive()
    assert [line.text for line in follow(lambda: run, world.it.env)] == ["step 1", "step 2"]


def test_a_second_laptop_is_told_who_drives(world: World) -> None:
    world.run_id = begin(world.it)
    two_laptops(world)
    world.drive()
    assert world.seen == [Exit.HELD]


@pytest.mark.parametrize("instant", [4, 9, 14])
def test_kill_9_of_the_process_leaves_the_job_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: int
) -> None:
    with scene(tmp_path / "home", SharedClock()) as it:
        it.home.mkdir()
        run_id = begin(it)
        act = partial(engine.drive, run_id, it.env, load)
        assert runs.killed_at(instant, act) == instant
        assert act().phase is Phase.SUCCEEDED
        assert len(it.server.vertex.created) == 1 and nothing_is_left(it)


# Time and money, by the service's clock.


def spending(**budget: Any) -> Recipe:
    """On a machine in a place whose price is known."""
    (stage,) = recipe().stages
    machine = replace(HARDWARE, accelerator="A100-40GB:1", places=("us-central1",))
    return recipe(stages=(replace(stage, hardware=machine),), budget=Budget(**budget))


def test_a_day_of_sleep_is_not_billed(world: World) -> None:
    world.run_id = begin(world.it, spending())
    asleep(Stub(1, 1, 60))(world)
    run = world.drive()
    (attempt,) = run.jobs[0].attempts
    assert world.clock.now() - run.created > _DAY
    assert attempt.began is not None and attempt.ended is not None
    assert attempt.ended - attempt.began == 60
    assert attempt.usd_per_hour is not None
    assert run.spent_usd == pytest.approx(attempt.usd_per_hour * 60 / 3600)


def test_a_queue_costs_nothing_of_the_budget_of_hours(world: World) -> None:
    world.run_id = begin(world.it, spending(hours=1))
    world.fate(Stub(queued=7_200, pending=1, running=600))
    run = world.drive()
    assert run.phase is Phase.SUCCEEDED
    rate = run.jobs[0].attempts[0].usd_per_hour
    assert rate is not None and run.spent_usd == pytest.approx(rate * 600 / 3600)


def test_hours_are_counted_over_all_attempts(world: World) -> None:
    world.run_id = begin(world.it, spending(hours=1))
    world.fate(Stub(1, 1, 3_000, PREEMPTED), Stub(1, 1, 3_000))
    run = world.drive()
    assert (run.phase, run.exit_code) == (Phase.CANCELLED, Exit.BUDGET)
    assert "budget.hours: 1" in run.why and nothing_is_left(world.it)
    bodies = [job["jobSpec"]["scheduling"]["timeout"] for job in world.vertex.created]
    assert bodies[0] == "3600s" and 590 <= int(bodies[1][:-1]) <= 600, "what is left, told to it"


def test_what_a_job_kept_to_save_in_starts_no_other_one(world: World) -> None:
    """It left by itself, a tenth of its time before the end (75, so that it would go on)."""
    world.run_id = begin(world.it, spending(hours=1))
    world.fate(Stub(1, 1, 3_300, PREEMPTED), Stub(1, 1, 600))
    run = world.drive()
    assert (run.phase, run.exit_code) == (Phase.CANCELLED, Exit.BUDGET)
    assert len(world.vertex.created) == 1 and nothing_is_left(world.it)


def test_dollars_are_counted_at_the_price_of_each_offer(world: World) -> None:
    world.run_id = begin(world.it, spending(usd=5))
    world.fate(Stub(1, 1, 1_800, PREEMPTED), Stub(1, 1, 86_400))
    run = world.drive()
    assert run.exit_code == Exit.BUDGET and "budget.usd: 5" in run.why
    assert len(world.vertex.created) == 2 and nothing_is_left(world.it)
    assert run.spent_usd == pytest.approx(5, abs=0.1)


def test_a_clock_that_is_set_back_makes_no_negative_bill(world: World) -> None:
    world.run_id = begin(world.it, spending(hours=1))
    world.fate(Stub(1, 1, 60))
    world.clock.after(20, partial(ManualClock.sleep, world.clock, -10.0))
    run = world.drive()
    assert run.phase is Phase.SUCCEEDED and (run.spent_usd or 0.0) >= 0.0
