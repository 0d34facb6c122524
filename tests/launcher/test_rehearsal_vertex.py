"""The loopback servers themselves: real containers' commands, secrets, state that outlives the
process, what they refuse, and the official command line as a second opinion."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import google
from launcher.backends.base import Held, JobHandle, LogQuery, Phase, Seen
from launcher.clock import SystemClock
from tests.launcher.rehearsed import Scene, scene
from trainer.cluster import vertex_node

from launcher.rehearsal.google import Google  # isort: skip
from launcher.rehearsal.http import HttpError  # isort: skip
from launcher.rehearsal.logging import compile_filter  # isort: skip
from launcher.rehearsal.secrets import TOKEN  # isort: skip
from launcher.rehearsal.vertex import INTERNAL, Real, Said, Stub  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
GCLOUD = shutil.which("gcloud")


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Scene]:
    """Jobs run as processes, on the clock of this machine."""
    with scene(tmp_path, SystemClock()) as made:
        made.server.vertex.fate = Real(queued=0, pending=0)
        yield made


def until(it: Scene, job: JobHandle, done: Callable[[Seen], bool]) -> Seen:
    """Look until `done`, for at most a minute of real time: a process of this machine runs."""
    deadline = time.monotonic() + 60
    while not done(seen := it.see(job, 0.02)):
        assert time.monotonic() < deadline, seen
    return seen


def ended(it: Scene, job: JobHandle) -> Seen:
    return until(it, job, lambda seen: seen.phase.over)


def printed(it: Scene) -> list[tuple[str, str]]:
    return [(entry.task, entry.text) for entry in it.server.logging._entries]


def get(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


# Real containers.


def test_the_container_starts_the_bundles_boot_with_its_specification(real: Scene) -> None:
    real.boot = b"""
import json, os, sys
spec = json.load(open(sys.argv[2]))
print(sys.argv[1], spec["name"], spec["attempt"])
print(*sorted(k for k in os.environ if k.startswith(("CLOUD_ML", "CLUSTER"))))
"""
    job = real.attempt(attempt=2)
    assert ended(real, job).phase is Phase.SUCCEEDED
    assert printed(real) == [
        ("workerpool0-0", "run kd-l4-0000ff-j0 2"),
        ("workerpool0-0", "CLOUD_ML_JOB_ID CLOUD_ML_PROJECT_ID CLOUD_ML_REGION CLUSTER_SPEC"),
    ]
    reads = [path for verb, path, _ in real.server.log if "alt=media" in path]
    assert len(reads) == 2, "the bundle and the specification, over loopback"


def test_a_damaged_bundle_is_not_run(real: Scene) -> None:
    *objects, job = real.intents()
    container = job.request["body"]["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]
    container["args"][1] = "0" * 64
    refs = [real.backend.create(intent, real.env) for intent in (*objects, job)]
    seen = ended(real, real.handle(refs))
    assert (seen.phase, seen.exit_code) == (Phase.FAILED, 1)
    assert any("is damaged: its sha256 differs" in text for _, text in printed(real))


def test_a_bundle_that_may_not_be_read_is_one_line_in_the_log(real: Scene) -> None:
    *objects, job = real.intents()
    refs = [real.backend.create(intent, real.env) for intent in objects]
    real.server.objects.denied.add("bkt")
    refs.append(real.backend.create(job, real.env))
    assert ended(real, real.handle(refs)).phase is Phase.FAILED
    ((_, line),) = printed(real)
    assert line.startswith("cannot read http") and "403" in line


def test_every_node_learns_its_rank_and_the_chief(real: Scene) -> None:
    real.boot = b"import os; print(os.environ['CLUSTER_SPEC'])"
    job = real.attempt("hardware.nodes=3")
    assert ended(real, job).phase is Phase.SUCCEEDED
    nodes = {task: vertex_node(text) for task, text in printed(real)}
    assert {task: node.rank for task, node in nodes.items()} == {
        "workerpool0-0": 0, "workerpool1-0": 1, "workerpool1-1": 2,
    }  # fmt: skip
    assert len({(node.nodes, node.address, node.port) for node in nodes.values()}) == 1


def test_a_preempted_machine_gives_notice_and_boots_code_says_so(real: Scene) -> None:
    real.boot = b"""
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
signal.pause()
"""
    real.server.vertex.fate = Real(queued=0, pending=0, preempted=None)
    job = real.attempt()
    until(real, job, lambda _: ("workerpool0-0", "ready") in printed(real))
    for made in real.server.vertex._jobs.values():
        made.fate = Real(queued=0, pending=0, preempted=0.0)  # now
    seen = ended(real, job)
    assert (seen.phase, seen.exit_code, seen.cause) == (Phase.PREEMPTED, 75, "preempted")


def test_a_machine_is_taken_when_an_object_is_written(real: Scene) -> None:
    real.boot = b"""
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
signal.pause()
"""
    store = google.storage(real.env.environ).bucket("bkt")
    real.server.vertex.fates.append(Real(queued=0, pending=0, preempted_on=r"/MANIFEST\.json$"))
    job = real.attempt()
    until(real, job, lambda _: ("workerpool0-0", "ready") in printed(real))
    store.blob("runs/step-4/model.safetensors").upload_from_string(b"weights")
    assert real.see(job, 0.1).phase is Phase.RUNNING
    store.blob("runs/step-4/MANIFEST.json").upload_from_string(b"{}")
    seen = ended(real, job)
    assert (seen.phase, seen.exit_code, seen.cause) == (Phase.PREEMPTED, 75, "preempted")


def test_a_machine_that_is_taken_without_a_word_of_its_job_is_a_preemption(real: Scene) -> None:
    real.boot = b"print('ready', flush=True); import signal; signal.pause()"
    real.server.vertex.fates.append(Real(queued=0, pending=0, preempted_on="gone"))
    job = real.attempt()
    until(real, job, lambda _: ("workerpool0-0", "ready") in printed(real))
    google.storage(real.env.environ).bucket("bkt").blob("gone").upload_from_string(b"")
    seen = ended(real, job)
    assert (seen.phase, seen.cause) == (Phase.PREEMPTED, "preempted")


def test_a_worker_that_fails_is_started_again_within_the_same_job(real: Scene) -> None:
    count = real.home / "count"
    real.boot = f"""
import pathlib, sys
count = pathlib.Path({str(count)!r})
count.write_text(count.read_text() + "x" if count.exists() else "x")
sys.exit(0 if count.read_text() == "xxx" else 1)
""".encode()
    real.server.vertex.fate = Real(queued=0, pending=0, restarts=2)
    assert ended(real, real.attempt()).phase is Phase.SUCCEEDED
    assert count.read_text() == "xxx"
    count.unlink()
    real.server.vertex.fate = Real(queued=0, pending=0, restarts=1)
    seen = ended(real, real.attempt(attempt=2))
    assert (seen.phase, seen.exit_code, count.read_text()) == (Phase.FAILED, 1, "xx")


def test_a_cancelled_job_leaves_no_process(real: Scene) -> None:
    real.boot = b"import os, signal; print(os.getpid(), flush=True); signal.pause()"
    job = real.attempt()
    until(real, job, lambda _: bool(printed(real)))
    pid = int(printed(real)[0][1])
    assert real.backend.delete(job.refs[-1], real.env) is Held.DELETING
    assert ended(real, job).phase is Phase.CANCELLED
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# What they refuse, and what they serve to a machine.


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as made:
        yield made


def post(url: str, body: Any) -> tuple[int, dict[str, Any]]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_field_or_a_value_that_the_api_does_not_have_is_refused(it: Scene) -> None:
    url = f"{it.server.url}/v1/projects/proj/locations/us-central1/customJobs"
    wrong: list[dict[str, Any]] = [
        {"displayName": "x", "jobSpek": {}},
        {"displayName": "x", "jobSpec": {"scheduling": {"strategy": "CHEAP"}}},
        {"displayName": "x", "jobSpec": {"workerPoolSpecs": [{"replicaCount": "many"}]}},
        {"displayName": "x", "labels": {"a": "Not Allowed"}},
        {},
    ]
    for body in wrong:
        status, answer = post(url, body)
        assert (status, answer["error"]["status"]) == (400, "INVALID_ARGUMENT"), body
    assert get(f"{url}?filter=colour%3Dred")[0] == 400
    assert get(f"{url}?colour=red")[0] == 400
    assert get(f"{url}/1")[0] == 404
    assert not it.server.vertex.created


def test_a_job_that_is_over_cannot_be_cancelled_nor_a_running_one_deleted(it: Scene) -> None:
    it.server.vertex.fates.append(Stub(0, 0, 10))
    ref = it.attempt().refs[-1]
    url = f"{it.server.url}/v1/{ref.data['resource']}"
    it.clock.sleep(1)
    request = urllib.request.Request(url, method="DELETE")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=30)
    it.clock.sleep(20)
    assert post(f"{url}:cancel", {})[0] == 400


def test_a_job_ends_at_its_timeout(it: Scene) -> None:
    it.server.vertex.fates.append(Stub(0, 0, None))
    job = it.attempt("budget.hours=1")
    assert it.see(job, 3590).phase is Phase.RUNNING
    seen = it.see(job, 20)
    assert seen.phase is Phase.FAILED and "timeout of 3600s" in seen.why


@pytest.mark.parametrize("text", ["colour=red", "a=1 OR", "(a=1", "timestamp >< 3", "AND", "a b"])
def test_a_filter_that_makes_no_sense_is_refused(it: Scene, text: str) -> None:
    it.server.logging.write("proj", "1", "service", "line")
    entry = it.server.logging._entries[0]
    with pytest.raises(HttpError):
        compile_filter(text)(entry)


def test_filters_compare_and_combine(it: Scene) -> None:
    it.server.logging.write("proj", "7", "service", "line", time=1_700_000_000.25)
    entry = it.server.logging._entries[0]
    yes = [
        "", 'resource.labels.job_id="7"', "resource.labels.job_id=7 resource.type=ml_job",
        'timestamp>="2023-11-14T22:13:20Z" AND timestamp<"2023-11-14T22:13:20.3Z"',
        '(resource.labels.job_id="8" OR resource.labels.task_name="service")',
    ]  # fmt: skip
    no = ['resource.labels.job_id="8"', 'timestamp>"2023-11-14T22:13:20.25Z"',
          'resource.labels.job_id="7" AND resource.labels.task_name="workerpool0-0"']  # fmt: skip
    assert all(compile_filter(text)(entry) for text in yes)
    assert not any(compile_filter(text)(entry) for text in no)


def test_a_machine_reads_its_token_and_a_secret(it: Scene) -> None:
    pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.secretmanager_v1 import SecretManagerServiceClient

    url = f"{it.server.url}/computeMetadata/v1/instance/service-accounts/default/token"
    assert get(url)[0] == 403, "without the header"
    assert json.loads(get(url, **{"Metadata-Flavor": "Google"})[1])["access_token"] == TOKEN
    it.server.secrets.values["proj/hf-token"] = "hf_x"
    client = SecretManagerServiceClient(
        credentials=AnonymousCredentials(), transport="rest",
        client_options={"api_endpoint": it.server.url},
    )  # fmt: skip
    name = "projects/proj/secrets/hf-token/versions/latest"
    assert client.access_secret_version(name=name).payload.data == b"hf_x"
    it.server.secrets.denied.add("proj/hf-token")
    for secret, status in (("hf-token", "403"), ("none", "404")):
        with pytest.raises(Exception, match=status):
            client.access_secret_version(name=f"projects/proj/secrets/{secret}/versions/1")


# State, and a process of its own.


def test_the_state_in_a_folder_outlives_the_server(it: Scene, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    lines = (Said(1, "before"), Said(50, "after"))
    with Google(it.clock, folder=folder, project="proj") as first:
        first.objects.create_bucket("bkt", {})
        first.vertex.fates.extend([Stub(0, 0, 100, lines=lines), Real(queued=50)])
        one = Scene(first, it.home, it.clock)
        job, unborn = one.attempt(), one.attempt(attempt=2)
        assert one.see(job, 10).phase is Phase.RUNNING
    with Google(it.clock, folder=folder, project="proj") as second:
        two = Scene(second, it.home, it.clock)
        assert two.see(job).phase is Phase.RUNNING
        lost = two.see(unborn)
        assert (lost.phase, INTERNAL.message in lost.why) == (Phase.FAILED, True)
        it.clock.sleep(60)
        texts = [line.text for line in two.backend.logs(job, LogQuery(), two.env)]
        assert texts == ["before", "after"]
        assert two.see(job, 60).phase is Phase.SUCCEEDED
        assert two.gone(job.refs[-1])
        two.attempt(attempt=3)
        assert [*second.vertex.states()] == ["kd-l4-0000ff-j0-a2", "kd-l4-0000ff-j0-a3"]


def test_as_a_process_it_prints_the_variables_and_ends_when_asked(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "launcher.rehearsal", "--bucket", "bkt", "--project", "proj"]
    process = subprocess.Popen(
        [*argv, "--folder", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(14)]
        assert lines.pop().startswith("# serving; jobs, logs and secrets over gRPC at 127.0.0.1:")
        given = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
        assert given["GOOGLE_CLOUD_PROJECT"] == "proj"
        base = given["STORAGE_EMULATOR_HOST"]
        assert (
            given["GCE_METADATA_IP"] == given["GCE_METADATA_HOST"] == base.removeprefix("http://")
        )
        assert given["CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"] == f"{base}/"
        assert get(f"{base}/v1/projects/proj/locations/x/customJobs") == (200, b"{}")
        assert get(f"{base}/storage/v1/b/bkt")[0] == 200
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.mark.skipif(GCLOUD is None, reason="the gcloud command line is not on PATH")
def test_the_official_command_line_sees_what_was_created(it: Scene, tmp_path: Path) -> None:
    it.server.vertex.fates.append(Stub(0, 0, 30, lines=(Said(1, "step 1 loss 2.0"),)))
    job = it.attempt()
    it.clock.sleep(60)
    number = job.refs[-1].data["job_id"]
    environ = {
        **{k: v for k, v in os.environ.items() if not k.startswith("CLOUDSDK")},
        **it.server.environ(), "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_PROJECT": "proj", "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
    }  # fmt: skip

    def gcloud(*words: str) -> Any:
        argv = [str(GCLOUD), *words, "--format=json"]
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    (listed,) = gcloud("ai", "custom-jobs", "list", "--region=us-central1")
    assert listed["displayName"] == "kd-l4-0000ff-j0-a1"
    shown = gcloud("ai", "custom-jobs", "describe", number, "--region=us-central1")
    assert shown["state"] == "JOB_STATE_SUCCEEDED"
    assert shown["labels"]["launch-run"] == "00000000000000ff"
    assert shown["jobSpec"]["scheduling"] == {"strategy": "SPOT", "timeout": "43200s"}
    wanted = f'resource.type="ml_job" AND resource.labels.job_id="{number}"'
    (entry,) = gcloud("logging", "read", wanted, "--freshness=36500d")
    assert entry["jsonPayload"]["message"] == "step 1 loss 2.0"
