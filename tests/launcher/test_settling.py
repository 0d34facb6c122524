"""What a service has applied, or forgotten, may show late: no job is made twice for that, none is
left behind, and no time of this machine is taken for time of the job. All on a virtual clock."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launcher import engine, google, home, retry
from launcher.adopt import adopt
from launcher.artifacts import open_artifacts
from launcher.backends.base import CanFind, Env, Held, Intent, JobHandle, Phase, Ref, Seen
from launcher.backends.vertex import jobs
from launcher.claim import write_marker
from launcher.clock import ManualClock
from launcher.errors import Exit, HeldElsewhere
from launcher.retry import settling
from launcher.spec import Budget
from tests.launcher import runs
from tests.launcher.bucketed import Mirrored, begin, bucket, journal, laptop, load, recipe
from tests.launcher.rehearsed import Scene
from tests.launcher.test_faults import Turning
from trainer.store import open_store

from launcher.rehearsal.faults import Fault, Script  # isort: skip
from launcher.rehearsal.http import HttpError  # isort: skip
from launcher.rehearsal.routes import Method, routes  # isort: skip
from launcher.rehearsal import vertex  # isort: skip

STOCK_OUT, Stub = vertex.STOCK_OUT, vertex.Stub
_CREATE = r"^POST [^?]*customJobs(\?|$)"


@pytest.fixture
def clock() -> Turning:
    return Turning()


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Turning) -> Iterator[Scene]:
    with bucket(tmp_path, monkeypatch, clock) as made:
        made.server.vertex.fate = Stub(2, 5, 300)
        yield made
    google._forget()


def answers(it: Scene, name: str, act: Callable[[Any], Any]) -> None:
    """Let the service answer a method otherwise."""
    service = it.server.vertex
    service.methods = [
        Method(m.name, m.message, service._locked(act)) if m.name == name else m
        for m in service.methods
    ]
    service._routes = routes(vertex._TRANSPORT, service.methods)


def lists_lag(it: Scene, seconds: float) -> None:
    """A job is missing in listings until it is `seconds` old."""

    def lagging(asked: Any) -> Any:
        old = it.clock.now() - seconds
        found = it.server.vertex._list(asked).custom_jobs
        shown = [job for job in found if job.create_time.timestamp() <= old]
        return vertex.types.ListCustomJobsResponse(custom_jobs=shown)

    answers(it, "ListCustomJobs", lagging)


def reads_lag(it: Scene, seconds: float) -> None:
    """A job is missing in reads until it is `seconds` old."""

    def lagging(asked: Any) -> Any:
        found = it.server.vertex._get(asked)
        if found.create_time.timestamp() > it.clock.now() - seconds:
            raise HttpError(404, f"The resource {asked.name} is not found.")
        return found

    answers(it, "GetCustomJob", lagging)


def fails(it: Scene, pattern: str, fault: Fault, times: int = 1) -> None:
    it.server.faults = Script([(pattern, fault)] * times)


def created(it: Scene) -> int:
    return len(it.server.vertex.created)


def left(it: Scene) -> dict[str, str]:
    states: dict[str, str] = it.server.vertex.states()
    return states


def test_the_looks_for_what_may_not_show_yet_span_the_whole_time() -> None:
    assert [list(settling(s)) for s in (0, 3, 60)] == [[], [0.25, 2.75], [5, 55]]


@pytest.mark.parametrize(("lag", "jobs_made"), [(5, 1), (100, 2)])
def test_a_job_whose_reply_was_lost_and_that_lists_late_is_never_left(
    it: Scene, lag: float, jobs_made: int
) -> None:
    """Within the settle time it is adopted. Later than that there are two, and the second, too, is
    written down and deleted before the run ends."""
    run_id = begin(it)
    lists_lag(it, lag)
    fails(it, _CREATE, Fault("cut_after"))
    run = engine.drive(run_id, it.env, load)
    (attempt,) = run.jobs[0].attempts
    assert (run.phase, run.held, created(it)) == (Phase.SUCCEEDED, Held.GONE, jobs_made)
    assert left(it) == {} and not attempt.holding
    assert len([ref for ref in attempt.refs if ref.kind == "custom_job"]) == jobs_made


def made_twice(it: Scene, run_id: str, second: Stub) -> None:
    """The reply of the first request is lost, and its job lists too late. The second job finds the
    attempt taken by the first, as boot notes it in the store, and leaves."""
    it.server.vertex.fates.extend([Stub(2, 5, 900), second])
    lists_lag(it, 3000)
    fails(it, _CREATE, Fault("cut_after"))
    note_job(run_id, str(it.server.vertex._next))


def note_job(run_id: str, number: str) -> None:
    """What boot leaves: the service's job that the first attempt is."""
    record = {"v": 1, "job": 0, "attempt": 1, "restart": 0, "service_job": number}
    store = open_store(f"gs://bkt/runs/thing-{run_id[-6:]}")
    store.put_bytes("attempts/00-0001.json", json.dumps(record).encode())


def test_of_an_attempt_that_was_created_twice_the_one_that_works_is_followed(
    it: Scene, clock: Turning
) -> None:
    run_id, began = begin(it), clock.now()
    made_twice(it, run_id, Stub(2, 5, 10, vertex.exited(64)))
    run = engine.drive(run_id, it.env, load)
    (attempt,) = run.jobs[0].attempts
    assert (run.phase, run.exit_code, created(it)) == (Phase.SUCCEEDED, Exit.OK, 2)
    assert clock.now() - began > 900, "the first job was seen to its end"
    assert left(it) == {} and not attempt.holding
    assert [r.name[-2:] for r in attempt.refs if r.kind == "custom_job"] == ["a1", "~2"]


@pytest.mark.parametrize("told", ["own", "another", "../../x", ""])
def test_a_wrong_configuration_is_not_taken_for_a_second_job(it: Scene, told: str) -> None:
    """The record names the job itself, a job of another run, or what is no job at all."""
    run_id, service = begin(it), it.server.vertex
    number = str(service._next)
    if told == "another":
        service.fates.append(Stub(1, 1, None))
        message = vertex.types.CustomJob(
            display_name=f"thing-{run_id[-6:]}-j0-a1", labels={"launch-run": "f" * 16}
        )
        parent = "projects/proj/locations/us-central1"
        service._create(types.SimpleNamespace(parent=parent, custom_job=message))
    service.fates.append(Stub(2, 5, 10, vertex.exited(64)))
    note_job(run_id, number if told in ("own", "another") else told)
    run = engine.drive(run_id, it.env, load)
    assert (run.phase, run.exit_code) == (Phase.FAILED, Exit.JOB)
    assert [*left(it).values()] == (["RUNNING"] if told == "another" else [])


def test_a_teardown_ends_both_jobs_of_an_attempt(it: Scene, clock: Turning) -> None:
    run_id = begin(it)
    made_twice(it, run_id, Stub(2, 5, 10, vertex.exited(64)))

    def killed() -> None:
        raise KeyboardInterrupt

    clock.after(200, killed)
    with pytest.raises(KeyboardInterrupt):
        engine.drive(run_id, it.env, load)
    jobs_made = it.server.vertex._jobs.values()
    assert [vertex._state(job) for job in jobs_made] == ["RUNNING", "FAILED"]
    assert engine.teardown(run_id, it.env, load).held is Held.GONE
    assert left(it) == {}


def test_the_last_listing_looks_where_every_reply_was_lost(it: Scene) -> None:
    """Eight requests are applied and not answered, and their jobs list only later; the next attempt
    finds no quota there, and the one after it runs elsewhere."""
    lost, service = retry.REQUESTS, it.server.vertex
    places = ("us-central1", "europe-west4")
    made = recipe()
    (stage,) = made.stages
    hardware = replace(stage.hardware, places=places, capacity=("spot",))
    run_id = begin(it, replace(made, stages=(replace(stage, hardware=hardware),)))
    tries: list[str] = []

    def create(asked: Any) -> Any:
        tries.append(asked.parent)
        if len(tries) <= lost:
            service._create(asked)
            raise HttpError(503, "in flight")
        if asked.parent.endswith(places[0]):
            raise HttpError(429, vertex.QUOTA.message)
        return service._create(asked)

    service.fate = Stub(2, 5, 5000)
    answers(it, "CreateCustomJob", create)
    lists_lag(it, 3000)
    run = engine.drive(run_id, it.env, load)
    assert [a.place for a in run.jobs[0].attempts] == [places[0], places[0], places[1]]
    assert (run.phase, run.held, created(it)) == (Phase.SUCCEEDED, Held.GONE, lost + 1)
    assert left(it) == {}


def test_a_refused_request_is_sent_again_without_a_long_look(it: Scene, clock: Turning) -> None:
    run_id, began = begin(it), clock.now()
    it.server.vertex.fate = Stub(0, 0, 10)
    fails(it, _CREATE, Fault("status", 429))
    assert engine.drive(run_id, it.env, load).phase is Phase.SUCCEEDED
    assert clock.now() - began < jobs.SETTLE and created(it) == 1


@pytest.mark.parametrize("lag", [1, 5, 20, 59])
def test_a_job_that_reads_do_not_show_yet_is_not_lost(it: Scene, lag: float) -> None:
    run_id = begin(it)
    reads_lag(it, lag)
    run = engine.drive(run_id, it.env, load)
    assert [a.phase for a in run.jobs[0].attempts] == [Phase.SUCCEEDED]
    assert created(it) == 1 and left(it) == {}


def test_a_teardown_does_not_take_a_new_job_for_a_deleted_one(it: Scene, clock: Turning) -> None:
    run_id = begin(it)

    def killed() -> None:
        raise KeyboardInterrupt

    clock.after(0.2, killed)
    with pytest.raises(KeyboardInterrupt):
        engine.drive(run_id, it.env, load)
    reads_lag(it, 50)
    assert engine.teardown(run_id, it.env, load).held is Held.GONE
    assert created(it) == 1 and left(it) == {}


def test_a_teardown_waits_for_a_request_that_is_applied_late(it: Scene, clock: Turning) -> None:
    run_id, service = begin(it), it.server.vertex

    def slow(asked: Any) -> Any:
        clock.after(30, partial(service._locked(service._create), asked))
        raise HttpError(503, "in flight")

    def killed() -> None:
        raise KeyboardInterrupt

    answers(it, "CreateCustomJob", slow)
    clock.after(0.5, killed)
    with pytest.raises(KeyboardInterrupt):
        engine.drive(run_id, it.env, load)
    run = engine.teardown(run_id, it.env, load)
    clock.sleep(3600)
    assert (run.held, created(it), left(it)) == (Held.GONE, 1, {})
    assert journal(it, run_id).count("gone") == 3, "two objects and the job"


@pytest.mark.parametrize("marked", [True, False])
def test_a_driver_that_was_relieved_sends_nothing(
    it: Scene, clock: Turning, tmp_path: Path, marked: bool
) -> None:
    """It waits to send its request again; meanwhile another machine tears the run down."""
    run_id = begin(it)
    fails(it, _CREATE, Fault("status", 429))

    def other() -> None:
        there = laptop(it, tmp_path / "other")
        root = adopt(f"gs://bkt/runs/thing-{run_id[-6:]}", there)["root"]
        if marked:
            place = home.folder(there.home, run_id)
            artifacts = open_artifacts(root, place, there.environ, clock)
            write_marker(artifacts, clock.now(), "ann", "teardown")
        assert engine.teardown(run_id, there, load).held is Held.GONE

    clock.after(0.5, other)
    with pytest.raises(HeldElsewhere):
        engine.drive(run_id, it.env, load)
    assert created(it) == 0 and left(it) == {}
    assert journal(it, run_id)[-1] == "end"


def test_a_stop_before_the_request_creates_nothing(it: Scene) -> None:
    run_id = begin(it)

    class Asked(Mirrored):
        def create(self, intent: Intent, env: Env) -> Ref:
            root = f"gs://bkt/runs/thing-{run_id[-6:]}"
            artifacts = open_artifacts(root, it.home / "x", env.environ, it.clock)
            write_marker(artifacts, it.clock.now(), "ann", "enough")
            return super().create(intent, env)

    run = engine.drive(run_id, it.env, lambda _: Asked())
    assert (run.phase, run.exit_code, created(it)) == (Phase.CANCELLED, Exit.OK, 0)


def test_sleep_while_clearing_costs_a_run_nothing(it: Scene, clock: Turning) -> None:
    run_id = begin(it)
    slept: list[str] = []

    class Asleep(Mirrored):
        def delete(self, ref: Ref, env: Env) -> Held:
            if ref.billable and not slept:
                slept.append(ref.name)
                fails(it, "customJobs", Fault("cut_before"), 3)
                clock.after(0.01, partial(ManualClock.sleep, clock, 86_400.0))
            return super().delete(ref, env)

    run = engine.drive(run_id, it.env, lambda _: Asleep())
    assert slept and (run.phase, run.exit_code) == (Phase.SUCCEEDED, Exit.OK)
    assert left(it) == {}


def test_a_teardown_keeps_the_outcome_of_a_run_that_leaked(tmp_path: Path) -> None:
    for end, phase, code in (
        ("succeeded", Phase.SUCCEEDED, Exit.OK), ("failed", Phase.FAILED, Exit.JOB),
    ):  # fmt: skip
        (tmp_path / end).mkdir()
        it = runs.scene(tmp_path / end, jobs=[{"end": end}], delete=["denied"])
        assert it.drive().exit_code == Exit.LEAKED
        run = it.teardown()
        assert (run.phase, run.exit_code, run.held) == (phase, code, Held.GONE)


# Time.


def test_machines_that_never_came_cost_nothing(it: Scene) -> None:
    run_id = begin(it, replace(recipe(), budget=Budget(hours=0.25)))
    it.server.vertex.fates.append(Stub(2, 1200, 0, STOCK_OUT))
    run = engine.drive(run_id, it.env, load)
    assert [a.cause for a in run.jobs[0].attempts] == ["capacity", ""]
    assert run.phase is Phase.SUCCEEDED


def test_a_run_without_a_driver_before_its_request_spends_nothing(
    it: Scene, clock: Turning
) -> None:
    run_id = begin(it, replace(recipe(), budget=Budget(hours=12)))
    dead: list[str] = []

    class Dies(Mirrored):
        def create(self, intent: Intent, env: Env) -> Ref:
            if intent.billable and not dead:
                dead.append(intent.name)
                raise KeyboardInterrupt
            return super().create(intent, env)

    with pytest.raises(KeyboardInterrupt):
        engine.drive(run_id, it.env, lambda _: Dies())
    clock.sleep(13 * 3600)
    it.server.vertex.fate = Stub(0, 30, 60)
    run = engine.drive(run_id, it.env, lambda _: Dies())
    assert run.phase is Phase.SUCCEEDED and dead


def test_a_clock_that_is_set_back_delays_no_look(it: Scene, clock: Turning) -> None:
    run_id, waited, at = begin(it), [0.0], []
    sleep = clock.sleep

    def counted(seconds: float) -> None:
        waited[0] += seconds
        sleep(seconds)

    class Looked(Mirrored):
        def observe(self, job: JobHandle, env: Env) -> Seen:
            at.append(waited[0])
            return super().observe(job, env)

    clock.sleep = counted  # type: ignore[method-assign]
    clock.after(100, lambda: setattr(clock, "_now", clock.now() - 3600))
    it.server.vertex.fate = Stub(1, 1, 300)
    engine.drive(run_id, it.env, lambda _: Looked())
    assert max(b - a for a, b in pairwise(at)) <= 20


# A server that knows no filter.


def test_jobs_of_others_are_not_ours_whatever_a_list_returns(it: Scene) -> None:
    """Neither adopted, nor deleted, nor told of."""
    run_id, service = begin(it), it.server.vertex
    mine = {"launch-run": run_id, "launch-owner": "ann"}
    for name, labels in (
        ("other", mine),
        (f"thing-{run_id[-6:]}-j0-a1", {**mine, "launch-run": "f" * 16}),
        (f"thing-{run_id[-6:]}-j0-a1", {**mine, "launch-owner": "bob"}),
    ):
        asked = types.SimpleNamespace(
            parent="projects/proj/locations/us-central1",
            custom_job=vertex.types.CustomJob(display_name=name, labels=labels),
        )
        service._create(asked)
    answers(it, "ListCustomJobs", lambda asked: service._list(replaced(asked)))
    backend, place = Mirrored(), "us-central1"
    ref = Ref("vertex", "custom_job", "other", place, run_id, True, {"project": "proj"})
    parent = f"projects/proj/locations/{place}"
    assert jobs._find(it.env, parent, run_id, "nobody") is None
    assert jobs._find(it.env, parent, run_id, f"thing-{run_id[-6:]}-j0-a1") is None
    assert isinstance(backend, CanFind)
    assert [r.name for r in backend.of_run(run_id, [ref], it.env)] == ["other"]
    owners = {found.owner for found in backend.labelled(it.env, everyone=False)}
    assert owners <= {"ann"}


def replaced(asked: Any) -> Any:
    """The same question without its filter."""
    return vertex.types.ListCustomJobsRequest(parent=asked.parent, page_size=asked.page_size)
