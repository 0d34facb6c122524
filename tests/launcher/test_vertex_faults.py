"""Every fault of the services becomes one signal with one clear line, through the real clients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import google, retry
from launcher.backends.base import Phase
from launcher.errors import BadRequest, Denied, NoCapacity, QuotaFull, Signal, Transient
from tests.launcher.rehearsed import Scene, scene

from launcher.rehearsal.faults import Fault, Script  # isort: skip
from launcher.rehearsal.vertex import (  # isort: skip
    DENIED, INTERNAL, NO_IMAGE, PREEMPTED, QUOTA, STOCK_OUT, End, Refusal, Stub, exited,
)  # fmt: skip

L4 = "custom_model_training_nvidia_l4_gpus"
NO_QUOTA = f"The following quota metrics exceed quota limits: aiplatform.googleapis.com/{L4}"


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as made:
        yield made


def refused(it: Scene, *overrides: str) -> Signal:
    with pytest.raises(Signal) as caught:
        it.attempt(*overrides)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not it.server.vertex.states(), "nothing was created"
    return caught.value


REFUSALS = [
    (Refusal(429, "Resources are insufficient in region: {place}."), NoCapacity, "us-central1"),
    (Refusal(429, NO_QUOTA), QuotaFull, L4),
    (Refusal(400, "Machine type g2-standard-8 is not supported in region {place}."), NoCapacity,
     "not supported"),
    (Refusal(403, "Permission 'aiplatform.customJobs.create' denied on resource {project}."),
     Denied, "customJobs.create"),
    (Refusal(400, "You do not have permission to act as service account t@p."), Denied, "act as"),
    (Refusal(401, "Invalid authentication credentials."), Denied, "no Google credentials"),
    (Refusal(429, "Quota exceeded for quota metric 'Resource management requests' and limit "
             "'Resource management requests per minute per region'"), Transient, "per minute"),
    (Refusal(404, "The project {project} does not exist."), BadRequest, "does not exist"),
    (Refusal(400, "Unsupported container image."), BadRequest, "Unsupported container"),
    (Refusal(409, "The operation was aborted."), Transient, "aborted"),
]  # fmt: skip


@pytest.mark.parametrize(("refusal", "kind", "said"), REFUSALS)
def test_a_refusal_of_a_job_is_one_signal(
    it: Scene, refusal: Refusal, kind: type[Signal], said: str
) -> None:
    it.server.vertex.refusals["us-central1"] = refusal
    signal = refused(it)
    assert type(signal) is kind and said in str(signal)


def test_a_stock_out_in_one_place_leaves_the_next_one(it: Scene) -> None:
    it.server.vertex.refusals["us-central1"] = REFUSALS[0][0]
    assert isinstance(refused(it), NoCapacity)
    assert it.attempt(offer=1).refs[-1].place == "us-west1"


def test_an_api_that_is_off_names_the_command_that_turns_it_on(it: Scene) -> None:
    it.server.vertex.off.add("proj")
    signal = refused(it)
    assert isinstance(signal, Denied) and "aiplatform.googleapis.com is off" in str(signal)
    assert signal.hint == "gcloud services enable aiplatform.googleapis.com"


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", ["customJobs", "/upload/"])
def test_storms_and_outages_pass(it: Scene, status: int, path: str) -> None:
    it.server.faults = Script([(path, Fault("status", status))])
    signal = refused(it)
    assert isinstance(signal, Transient) and signal.after >= 1.0
    assert it.attempt().refs[-1].name == "kd-l4-0000ff-j0-a1"


@pytest.mark.parametrize("kind", ["cut_before", "cut_upload"])
def test_a_cut_connection_passes_and_leaves_nothing_by_halves(it: Scene, kind: str) -> None:
    it.server.faults = Script([(r"^POST /upload/", Fault(kind, at_bytes=40))])  # type: ignore[arg-type]
    assert isinstance(refused(it), Transient)
    job = it.attempt()
    name = job.refs[0].name.removeprefix("gs://bkt/")
    stored = it.server.objects._objects["bkt"][name].read()
    assert stored == (it.home / "b.tar.gz").read_bytes()


def test_a_server_that_is_not_there_is_transient(it: Scene) -> None:
    job = it.attempt()
    it.server.stop()
    with pytest.raises(Transient, match=r"127\.0\.0\.1:\d+ does not answer \("):
        it.see(job)
    with pytest.raises(Transient):
        list(it.backend.sweep(it.env))


def test_a_bucket_that_is_absent_or_not_ours_is_told_apart(it: Scene) -> None:
    it.server.objects.denied.add("bkt")
    assert isinstance(refused(it), Denied)
    it.server.objects.denied.clear()
    bundle, *_ = it.intents()
    there = replace(bundle, name=bundle.name.replace("gs://bkt/", "gs://other/"))
    with pytest.raises(BadRequest, match="artifacts: there is no bucket gs://other") as caught:
        it.backend.create(there, it.env)
    assert "buckets create gs://other" in caught.value.hint


def test_the_right_to_read_the_buckets_own_settings_is_not_needed(it: Scene) -> None:
    """The client asks for them by itself, to put them into traces."""
    faults = Script()
    faults.add(r"^GET /storage/v1/b/bkt\?", Fault("status", 403), times=9)
    it.server.faults = faults
    assert it.attempt().refs


def test_a_project_that_nobody_named_is_told_before_a_request(it: Scene) -> None:
    it.env = replace(it.env, environ={k: v for k, v in it.env.environ.items()
                                      if k != "GOOGLE_CLOUD_PROJECT"})  # fmt: skip
    before = len(it.server.log)
    with pytest.raises(BadRequest, match=r"hardware\.vertex\.project: is unset"):
        it.intents("hardware.vertex.project=null")
    assert len(it.server.log) == before


def test_a_field_that_the_service_does_not_know_never_leaves_this_machine(it: Scene) -> None:
    (*_, job) = it.intents()
    body = {**job.request["body"], "jobSpek": {}}
    with pytest.raises(BadRequest, match="jobSpek"):
        it.backend.create(replace(job, request={**job.request, "body": body}), it.env)
    assert not it.server.vertex.created


ENDS = [
    (STOCK_OUT, 0, Phase.FAILED, retry.CAPACITY),
    (QUOTA, 0, Phase.FAILED, retry.CAPACITY),
    (NO_IMAGE, 0, Phase.FAILED, retry.REQUEST),
    (DENIED, 0, Phase.FAILED, retry.ACCESS),
    (INTERNAL, 5, Phase.FAILED, retry.INFRASTRUCTURE),
    (PREEMPTED, 5, Phase.PREEMPTED, retry.PREEMPTED),
    (exited(75), 5, Phase.PREEMPTED, retry.PREEMPTED),
    (exited(65), 5, Phase.FAILED, retry.JOB),
    (End("EXPIRED"), 0, Phase.FAILED, retry.CAPACITY),
    (End("PARTIALLY_SUCCEEDED"), 5, Phase.FAILED, retry.JOB),
]


@pytest.mark.parametrize(("end", "running", "phase", "cause"), ENDS)
def test_the_end_of_a_job_has_one_cause(
    it: Scene, end: End, running: float, phase: Phase, cause: str
) -> None:
    it.server.vertex.fates.append(Stub(queued=1, pending=1, running=running, end=end))
    seen = it.see(it.attempt(), 10)
    assert (seen.phase, seen.cause) == (phase, cause)
    assert seen.why and "\n" not in seen.why


def credentials(monkeypatch: pytest.MonkeyPatch, it: Scene, home: Path) -> None:
    """A machine on which nobody has logged in, and which is none of Google's."""
    google._forget()
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG", "GCE_METADATA_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(home / "gcloud"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    environ = {**it.env.environ, "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": ""}
    it.env = replace(it.env, environ=environ)


def test_without_credentials_it_says_how_to_log_in(
    it: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials(monkeypatch, it, tmp_path)
    signal = refused(it)
    assert isinstance(signal, Denied) and "no Google credentials" in str(signal)
    assert "gcloud auth application-default login" in signal.hint
    row, *rest = it.backend.check(it.env)
    assert (row.name, row.result) == ("credentials", "fail") and "log in" in row.fix
    assert {other.result for other in rest} == {"skip"}


def test_credentials_that_ended_are_refused_and_read_again_after_a_new_login(
    it: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's login whose refresh token is refused, then, after a new login, accepted."""
    from launcher.rehearsal.http import Request, Response, Server, answer

    replies = [answer({"error": "invalid_grant", "error_description": "Token has been expired"},
                      400)]  # fmt: skip

    def token(request: Request) -> Response:
        return replies[0] if replies else answer({"access_token": "new", "expires_in": 3600})

    with Server(token) as login:
        credentials(monkeypatch, it, tmp_path)
        file = tmp_path / "adc.json"
        file.write_text(
            '{"type": "external_account_authorized_user", "client_id": "a", "client_secret": "b", '
            f'"refresh_token": "c", "token_url": "{login.url}/token", "audience": "us"}}'
        )
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        signal = refused(it)
        assert isinstance(signal, Denied) and "not accepted any more" in str(signal)
        assert "login" in signal.hint
        replies.clear()
        assert it.attempt().refs
        rows = list(it.backend.check(it.env))
        assert rows[0].result == "warn" and "a user's login" in rows[0].detail
    google._forget()
