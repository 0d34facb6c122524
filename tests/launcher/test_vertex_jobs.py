"""The life of a job on Vertex AI, against the loopback servers and through the real clients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends.base import Backend, Held, Phase
from launcher.backends.vertex import jobs
from tests.launcher.rehearsed import RUN, Scene, scene

from launcher.rehearsal.faults import Fault, Script  # isort: skip
from launcher.rehearsal.vertex import PREEMPTED, Stub  # isort: skip


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as made:
        yield made


def sent(it: Scene, method: str, part: str) -> int:
    return sum(1 for verb, path, _ in it.server.log if verb == method and part in path)


def test_the_server_receives_exactly_what_the_plan_shows(it: Scene) -> None:
    for overrides in ((), ("hardware.nodes=3",), ("hardware.capacity=[flex]",)):
        (*_, job) = it.intents(*overrides, run=f"{len(it.server.vertex.created):016x}")
        it.backend.create(job, it.env)
        assert it.server.vertex.created[-1] == job.request["body"]


def test_a_job_from_its_creation_to_the_last_confirmation(it: Scene) -> None:
    it.server.vertex.fates.append(Stub(queued=10, pending=20, running=60))
    job = it.attempt()
    looks = [it.see(job), it.see(job, 15), it.see(job, 20), it.see(job, 60)]
    assert [seen.phase for seen in looks] == [
        Phase.QUEUED, Phase.PROVISIONING, Phase.RUNNING, Phase.SUCCEEDED,
    ]  # fmt: skip
    ref = job.refs[-1]
    assert all(seen.held[-1][0] == ref for seen in looks)
    assert [seen.held[-1][1] for seen in looks] == [Held.CREATING, Held.LIVE, Held.LIVE, Held.NONE]
    assert "quota" in looks[0].why
    assert it.gone(ref) and it.server.vertex.states() == {}
    after = it.see(job)
    assert (after.phase, after.held[-1][1]) == (Phase.LOST, Held.GONE)
    assert it.backend.delete(ref, it.env) is Held.GONE


def test_a_running_job_is_cancelled_and_then_deleted(it: Scene) -> None:
    it.server.vertex.fates.append(Stub(queued=0, pending=0, running=None))
    job = it.attempt()
    assert it.see(job, 1).phase is Phase.RUNNING
    ref = job.refs[-1]
    assert it.backend.delete(ref, it.env) is Held.DELETING
    assert it.see(job).phase is Phase.STOPPING
    assert it.backend.delete(ref, it.env) is Held.DELETING
    assert sent(it, "POST", ":cancel") == 1
    assert it.gone(ref) and it.server.vertex.states() == {}


def test_to_stop_cancels_what_waits_and_leaves_what_runs_to_the_marker(it: Scene) -> None:
    it.server.vertex.fates.extend([Stub(queued=99), Stub(queued=0, pending=0, running=None)])
    waiting, running = it.attempt(), it.attempt(attempt=2)
    for job in (waiting, running):
        it.backend.stop(job, it.env, 600.0)
    assert it.see(waiting, 5).phase is Phase.CANCELLED
    assert it.see(running).phase is Phase.RUNNING


def test_a_lost_reply_makes_no_second_job(it: Scene) -> None:
    faults = Script([(r"^POST [^?]*customJobs(\?|$)", Fault("cut_after"))])
    it.server.faults = faults
    with pytest.raises(Exception, match=r"127\.0\.0\.1:\d+ does not answer \(") as caught:
        it.attempt()
    assert type(caught.value).__name__ == "Transient" and not faults.left
    job = it.attempt()
    assert len(it.server.vertex.states()) == 1 and len(it.server.vertex.created) == 1
    assert it.see(job, 10).phase is Phase.RUNNING


def test_a_job_whose_reply_was_lost_is_found_without_its_ref(it: Scene) -> None:
    *objects, job = it.intents()
    refs = [it.backend.create(intent, it.env) for intent in objects]
    assert it.see(it.handle(refs)).phase is Phase.LOST
    ref = it.backend.create(job, it.env)
    seen = it.see(it.handle(refs), 10)
    assert seen.phase is Phase.RUNNING
    assert seen.held[-1] == (ref, Held.LIVE)
    assert it.see(it.handle(refs, attempt=2)).phase is Phase.LOST, "another attempt's job is not it"
    assert it.see(it.handle([])).phase is Phase.LOST


def test_a_bundle_that_is_there_is_not_sent_again(it: Scene) -> None:
    it.attempt()
    before = sent(it, "POST", "/upload/")
    it.attempt(attempt=2, run="00000000000000aa")
    assert (before, sent(it, "POST", "/upload/")) == (2, 3), "the boot specification alone"
    names = list(it.server.objects._objects["bkt"])
    assert len([name for name in names if name.startswith("launch/bundles/")]) == 1


def test_an_upload_whose_reply_is_lost_is_not_sent_twice(it: Scene) -> None:
    it.server.faults = Script([(r"^POST /upload/", Fault("cut_after"))])
    bundle, boot, _ = it.intents()
    with pytest.raises(Exception, match=r"127\.0\.0\.1:\d+ does not answer \("):
        it.backend.create(bundle, it.env)
    it.backend.create(bundle, it.env)
    assert sent(it, "POST", "/upload/") == 1
    assert it.backend.create(boot, it.env) == it.backend.create(boot, it.env), "created once"


def test_objects_hold_no_money_and_stay(it: Scene) -> None:
    job = it.attempt()
    assert [it.backend.delete(ref, it.env) for ref in job.refs[:2]] == [Held.NONE, Held.NONE]
    assert len(it.server.objects._objects["bkt"]) == 2


def test_a_job_that_somebody_deleted_is_lost(it: Scene) -> None:
    job = it.attempt()
    it.server.vertex.remove(job.refs[-1].data["job_id"])
    seen = it.see(job)
    assert (seen.phase, seen.why) == (Phase.LOST, "somebody has deleted the job")
    assert it.gone(job.refs[-1])


def test_a_preempted_spot_job_is_relaunched_under_the_next_number(it: Scene) -> None:
    it.server.vertex.fates.append(Stub(queued=0, pending=0, running=30, end=PREEMPTED))
    first = it.attempt()
    seen = it.see(first, 40)
    assert (seen.phase, seen.cause) == (Phase.PREEMPTED, "preempted")
    second = it.attempt(attempt=2)
    assert it.see(second, 10).phase is Phase.RUNNING
    assert [ref.name for ref in (first.refs[-1], second.refs[-1])] == [
        "kd-l4-0000ff-j0-a1", "kd-l4-0000ff-j0-a2",
    ]  # fmt: skip


def test_sweep_finds_the_owners_jobs_in_every_place_used_and_no_others(it: Scene) -> None:
    mine = [it.attempt(), it.attempt(attempt=2, offer=1)]
    other = Scene(it.server, it.home, it.clock, owner="bob")
    other.attempt(run="00000000000000bb")
    found = list(it.backend.sweep(it.env))
    assert {ref.name for ref in found} == {job.refs[-1].name for job in mine}
    assert {ref.place for ref in found} == {"us-central1", "us-west1"}
    assert {ref.run for ref in found} == {RUN} and all(ref.billable for ref in found)
    assert found[0] in [job.refs[-1] for job in mine], "the ref that create returned"
    for ref in found:
        assert it.gone(ref)
    assert list(it.backend.sweep(it.env)) == []
    assert [*it.server.vertex.states()] == ["kd-l4-0000bb-j0-a1"]


def test_sweep_from_a_machine_that_created_nothing_looks_where_the_environment_says(
    it: Scene, tmp_path: Path
) -> None:
    it.attempt(offer=1)
    fresh = replace(it.env, home=tmp_path / "other")
    assert list(it.backend.sweep(fresh)) == []  # us-central1 only
    west = {**it.env.environ, "CLOUDSDK_AI_REGION": "us-west1"}
    assert [ref.place for ref in it.backend.sweep(replace(fresh, environ=west))] == ["us-west1"]
    nothing = {k: v for k, v in it.env.environ.items() if k != "GOOGLE_CLOUD_PROJECT"}
    assert list(it.backend.sweep(replace(fresh, environ=nothing))) == []


def test_many_jobs_are_listed_page_by_page(it: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PAGE", 3)
    made = [it.attempt(attempt=number).refs[-1] for number in range(1, 9)]
    before = sent(it, "GET", "customJobs")
    assert {ref.name for ref in it.backend.sweep(it.env)} == {ref.name for ref in made}
    assert sent(it, "GET", "customJobs") - before == 3


def test_it_is_a_backend_that_creates(it: Scene) -> None:
    assert isinstance(it.backend, Backend) and it.backend.can.create
    results = {row.name: row.result for row in it.backend.check(it.env)}
    assert results == {
        "credentials": "warn", "project": "pass", "permissions": "pass", "apis": "pass",
        "jobs": "pass", "secrets": "skip", "image": "skip",
    }  # fmt: skip
    it.server.vertex.off.add("proj")
    (row,) = [row for row in it.backend.check(it.env) if row.name == "jobs"]
    assert row.result == "fail"
    assert row.fix == "gcloud services enable aiplatform.googleapis.com"
