"""The engine drives jobs of Vertex AI on the loopback servers: fail-over, preemption, lost
replies."""

from __future__ import annotations

import mmap
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from launcher import engine, start
from launcher.backends.base import Env, JobHandle, Phase, Seen
from launcher.backends.vertex.logs import DRAIN
from launcher.bundle import Bundle
from launcher.errors import Exit
from launcher.logs import follow
from launcher.recipe import Loaded
from launcher.run import Run
from launcher.spec import Budget, Hardware, Recipe, Retry, Vertex
from tests.launcher import runs
from tests.launcher.on_bucket import OnBucket, load
from tests.launcher.rehearsed import Scene, scene
from trainer.config import to_dict

from launcher.rehearsal.faults import Fault, Script, Seeded  # isort: skip
from launcher.rehearsal.vertex import (  # isort: skip
    DENIED, NO_IMAGE, PREEMPTED, STOCK_OUT, Refusal, Said, Stub,
)  # fmt: skip

HARDWARE = Hardware(
    "vertex", "L4:1", capacity=("spot", "standard"), places=("us-central1", "us-west1"),
    vertex=Vertex("proj", "own/trainer:1"),
)  # fmt: skip


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path / "home") as made:
        made.home.mkdir()
        yield made


def recipe(**given: object) -> Recipe:
    (stage,) = runs.recipe().stages
    made = Recipe("thing", (replace(stage, hardware=HARDWARE),), retry=Retry(5, 20, 2, 0))
    return replace(made, **given)  # type: ignore[arg-type]


class SharedClock:
    """A virtual clock that a forked child and the server in its parent have in common."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self._set(1_795_000_000.0)

    def now(self) -> float:
        return float(struct.unpack("d", self._memory[:])[0])

    def sleep(self, seconds: float) -> None:
        self._set(self.now() + seconds)

    def _set(self, now: float) -> None:
        self._memory[:] = struct.pack("d", now)


def drive(it: Scene, made: Recipe | None = None) -> Run:
    return engine.drive(begin(it, made), it.env, load)


def begin(it: Scene, made: Recipe | None = None) -> str:
    """The id of a run whose first record is written."""
    made = made or recipe()
    bundle = Bundle(it.home / "b.tar.gz", "ab" * 32, 7)
    bundle.path.write_bytes(b"trainer")
    env = Env(it.home, {**it.server.environ(), **os.environ}, it.clock, "ann", sys.executable)
    it.env = env
    return str(start.create(Loaded(made, to_dict(made), "f" * 64, it.home), bundle, env)["id"])


def attempts(run: Run) -> list[tuple[str, str, str]]:
    return [(a.place, a.capacity, a.cause) for a in run.jobs[0].attempts]


def nothing_is_left(it: Scene) -> bool:
    return it.server.vertex.states() == {} and list(it.backend.sweep(it.env)) == []


def test_no_capacity_then_preempted_then_done_and_nothing_is_left(it: Scene) -> None:
    it.server.vertex.refusals["us-central1"] = Refusal(429, "Resources are insufficient in region")
    it.server.vertex.fates.append(Stub(5, 5, 60, PREEMPTED))
    run = drive(it)
    assert run.phase is Phase.SUCCEEDED and run.exit_code == 0
    assert attempts(run) == [
        ("us-central1", "spot", "capacity"),
        ("us-west1", "spot", "preempted"),
        ("us-central1", "spot", "capacity"),
        ("us-west1", "spot", ""),
    ], "the place that preempted has machines of that capacity; standard costs twice as much"
    whys = [attempt.why for attempt in run.jobs[0].attempts]
    assert whys[0] == "no capacity in us-central1: Resources are insufficient in region"
    assert "STOCKOUT" in whys[1]
    assert nothing_is_left(it)
    assert len(it.server.vertex.created) == 2


def test_stock_out_of_spot_everywhere_moves_on_to_standard(it: Scene) -> None:
    it.server.vertex.fates.extend([Stub(1, 1, 0, STOCK_OUT)] * 2)
    run = drive(it)
    assert [a[:2] for a in attempts(run)] == [
        ("us-central1", "spot"), ("us-west1", "spot"), ("us-central1", "standard"),
    ]  # fmt: skip
    assert run.phase is Phase.SUCCEEDED and nothing_is_left(it)


@pytest.mark.parametrize(("end", "code"), [(NO_IMAGE, Exit.USAGE), (DENIED, Exit.ACCESS)])
def test_what_trying_again_cannot_change_is_tried_once(it: Scene, end: object, code: Exit) -> None:
    it.server.vertex.fates.append(Stub(1, 1, 0, end))  # type: ignore[arg-type]
    run = drive(it)
    assert (run.phase, run.exit_code, len(attempts(run))) == (Phase.FAILED, code, 1)
    assert nothing_is_left(it)


def test_a_job_that_waits_longer_than_the_budget_allows_is_given_up(it: Scene) -> None:
    it.server.vertex.fate = Stub(queued=1e6)
    run = drive(it, recipe(budget=Budget(wait="30m")))
    assert (run.phase, run.exit_code) == (Phase.FAILED, Exit.CAPACITY)
    assert "within budget.wait" in run.why and nothing_is_left(it)


class StartedAgain(OnBucket):
    """The service makes new machines for a job that has run for two hours."""

    def observe(self, job: JobHandle, env: Env) -> Seen:
        seen = super().observe(job, env)
        since = env.clock.now() - (seen.began or env.clock.now())
        if seen.phase is Phase.RUNNING and 7200 < since < 7500:
            return replace(seen, phase=Phase.PROVISIONING)
        return seen


def test_what_bounds_the_waiting_ends_no_job_that_has_begun(it: Scene) -> None:
    it.server.vertex.fate = Stub(running=9000)
    run_id = begin(it, recipe(budget=Budget(wait="1h")))
    run = engine.drive(run_id, it.env, lambda name: StartedAgain())
    assert (run.phase, run.why, len(attempts(run))) == (Phase.SUCCEEDED, "", 1)


def test_an_outage_while_it_runs_does_not_disturb_the_job(it: Scene) -> None:
    storm = [("GET .*customJobs/", Fault("status", status)) for status in (429, 503, 500) * 4]
    it.server.faults = Script(storm)
    run = drive(it)
    assert run.phase is Phase.SUCCEEDED and len(attempts(run)) == 1
    assert it.server.faults.left == [] and nothing_is_left(it)


PAGED = ["POST [^?]*customJobs(\\?|$)", "GET [^?]*customJobs\\?", "GET [^?]*customJobs/",
         "DELETE .*customJobs/", "POST /upload"]  # fmt: skip


def test_a_page_in_place_of_an_answer_is_an_outage(
    it: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a proxy, or the login page of a network, answers with 200 to the requests of a run."""
    it.server.faults = Script([(pattern, Fault("page")) for pattern in PAGED * 2])
    run = drive(it)
    assert run.phase is Phase.SUCCEEDED and len(attempts(run)) == 1, run.why
    assert it.server.faults.left == []
    assert len(it.server.vertex.created) == 1 and nothing_is_left(it)
    said = capsys.readouterr().err
    assert said.count("not the service has answered") == 2 * len(PAGED) and "Traceback" not in said


def test_following_a_run_that_is_over_waits_for_its_last_lines(it: Scene) -> None:
    lines = (Said(1, "step 1"), Said(9.9, "step 2", late=20))
    it.server.vertex.fates.append(Stub(1, 1, 10, lines=lines))
    run = drive(it)
    assert run.ended is not None and nothing_is_left(it)
    followed = [line.text for line in follow(lambda: run, it.env)]
    assert followed == ["step 1", "step 2"]
    assert it.clock.now() - run.ended == pytest.approx(DRAIN)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_cut_or_lost_no_job_is_doubled_and_none_is_left(it: Scene, seed: int) -> None:
    rates = {Fault("cut_after"): 0.15, Fault("cut_before"): 0.1, Fault("status", 503): 0.1,
             Fault("status", 429): 0.05, Fault("cut_download", at_bytes=30): 0.05}  # fmt: skip
    it.server.faults = Seeded(seed, rates)
    it.server.vertex.fates.append(Stub(2, 2, 20, PREEMPTED))
    run = drive(it)
    it.server.faults = Script()
    assert run.phase is Phase.SUCCEEDED, run.why
    names = Counter(job["displayName"] for job in it.server.vertex.created)
    assert set(names.values()) == {1} and len(names) == 2
    assert nothing_is_left(it)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_instant_it_ends_with_the_same_jobs_and_no_orphan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The driver is killed before and after each record, and between each reply and its record."""
    monkeypatch.setattr(runs, "FakeBackend", OnBucket)  # whose answers are instants of danger

    def killed(instant: int) -> int:
        with scene(tmp_path / str(instant), SharedClock()) as it:
            it.home.mkdir()
            it.server.vertex.fates.append(Stub(2, 2, 20, PREEMPTED))
            run_id = begin(it)
            act = partial(engine.drive, run_id, it.env, load)
            lived = runs.killed_at(instant, act)
            run = act()
            assert run.phase is Phase.SUCCEEDED, (instant, run.why)
            names = Counter(job["displayName"] for job in it.server.vertex.created)
            assert set(names.values()) == {1} and len(names) == 2, (instant, names)
            assert nothing_is_left(it), instant
            return lived

    instants = killed(0)
    assert instants > 30
    for instant in range(1, instants + 1, step):
        assert killed(instant) == instant
