"""`launch doctor RECIPE`: what it asks, and what it makes of the answers. Services are loopback
servers; credentials are real objects of google-auth, with the fields that decide."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest

pytest.importorskip("google.cloud.aiplatform_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.logging_v2", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.storage", reason="needs the extra `google`")

from infra.google import OBJECTS
from launcher import (
    abreast,
    cli,
    doctor,
    doctor_disk,
    doctor_memory,
    doctor_tools,
    google,
    recipe,
    shapes,
)
from launcher.backends.base import Check, Env
from launcher.backends.vertex import VertexBackend, asking, checks, checks_project
from launcher.clock import ManualClock
from launcher.rehearsal.access import NUMBER
from launcher.rehearsal.faults import Fault, Script
from launcher.rehearsal.google import Google
from launcher.spec import Stage

KD_L4 = Path(__file__).resolve().parents[2] / "recipes" / "kd_l4.yaml"
NOW = 1_795_000_000.0  # 2026-11-18
EMAIL = "trainer@proj.iam.gserviceaccount.com"
IMAGE = "us-central1-docker.pkg.dev/proj/launch/trainer:1"
SPOT = "aiplatform.googleapis.com/custom_model_training_preemptible_nvidia_l4_gpus"
STANDARD = "aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus"


@dataclass
class Cloud:
    """A project in which a recipe has all that it needs; `look` is the doctor's."""

    server: Google
    home: Path
    values: dict[str, str]

    def look(self, *overrides: str, **environ: str) -> list[Check]:
        given = {**self.values, **environ}
        loaded = recipe.load(KD_L4, overrides, environ=given)
        env = Env(self.home, {**self.server.environ(), **environ}, ManualClock(NOW), "ann",
                  sys.executable)  # fmt: skip
        return list(VertexBackend().examine(loaded.recipe, env))

    def row(self, name: str, *overrides: str, **environ: str) -> Check:
        found = [row for row in self.look(*overrides, **environ) if row.name == name]
        return next((row for row in found if row.result != "pass"), found[0])


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Google(ManualClock(NOW), project="proj", faults=Script()) as server:
        server.objects.create_bucket("bkt", {"location": "US"})
        server.secrets.values["proj/hf-token"] = "hf_0123456789"
        member = f"serviceAccount:{EMAIL}"
        server.secrets.readers["proj/hf-token"] = [member]
        bound = {"role": "roles/storage.objectAdmin", "members": [member]}
        server.objects.policies["bkt"] = [bound]
        values = {"PROJECT": "proj", "BUCKET": "bkt", "IMAGE": IMAGE, "SERVICE_ACCOUNT": EMAIL}
        yield Cloud(server, tmp_path, values)


def test_a_project_that_has_everything_passes_everything(cloud: Cloud) -> None:
    rows = cloud.look()
    assert [row.name for row in rows if row.result != "pass"] == ["credentials"]  # switched off
    assert {
        "project", "permissions", "apis", "quota", "jobs", "bucket", "bucket place",
        "bucket rules", "service account", "its bucket", "secrets", "image",
    } <= {row.name for row in rows}  # fmt: skip
    assert all(method in ("GET", "POST") for method, _, _ in cloud.server.log)
    sent = [target for method, target, _ in cloud.server.log if method == "POST"]
    assert all(target.endswith(":testIamPermissions") for target in sent)  # nothing is changed


def test_no_row_shows_a_secret(cloud: Cloud) -> None:
    assert "hf_0123456789" not in str(cloud.look())


@pytest.mark.parametrize(
    ("spot", "standard", "results"),
    [
        ({"us-central1": 8, "us-west1": 8}, {"us-central1": 8, "us-west1": 8}, ["pass", "pass"]),
        ({"us-central1": 1}, {"us-central1": 8, "us-west1": 8}, ["warn", "pass"]),  # one place
        ({}, {"us-central1": 8, "us-west1": 8}, ["warn", "pass"]),  # the other capacity is there
        ({}, {}, ["fail", "fail"]),
        ({"us-central1": -1, "us-west1": 1}, {}, ["pass", "warn"]),  # -1: no limit
    ],
)
def test_a_quota_is_that_of_accelerator_capacity_and_place(
    cloud: Cloud, spot: dict[str, int], standard: dict[str, int], results: list[str]
) -> None:
    cloud.server.access.quotas = {SPOT: spot, STANDARD: standard}
    found = [row for row in cloud.look() if row.name == "quota"]
    assert [row.result for row in found] == results
    assert "us-central1: " in found[0].detail and "preemptible" in found[0].detail
    assert all(
        "custom_model_training" in row.fix for row in found if row.result in ("warn", "fail")
    )


def test_a_quota_counts_the_gpus_of_all_nodes(cloud: Cloud) -> None:
    assert cloud.row("quota", "hardware.accelerator=L4:4", "hardware.nodes=2").result == "pass"
    over = cloud.row("quota", "hardware.accelerator=L4:4", "hardware.nodes=3")
    assert (over.result, over.detail[:5]) == ("fail", "12 L4")


def test_a_quota_whose_name_is_not_known_is_skipped_and_not_guessed(cloud: Cloud) -> None:
    row = cloud.row("quota", "hardware.accelerator=B200:8")
    assert row.result == "skip" and "console.cloud.google.com/iam-admin/quotas?project=proj" in (
        row.detail
    )
    asked = [target for _, target, _ in cloud.server.log if "consumerQuotaMetrics" in target]
    assert asked == []


def test_limits_are_those_of_the_bucket_that_names_the_place() -> None:
    def answer(*buckets: dict[str, Any]) -> dict[str, Any]:
        return {"consumerQuotaLimits": [{"quotaBuckets": list(buckets)}]}

    other = {"effectiveLimit": "9", "dimensions": {"region": "europe-west4"}}
    own = {"effectiveLimit": "2", "dimensions": {"region": "us-central1"}}
    usual = {"effectiveLimit": "1", "dimensions": {}}
    where = ("us-central1", "us-west1")
    assert checks_project.limits(answer(usual, other, own), where) == {
        "us-central1": 2, "us-west1": 1,
    }  # fmt: skip
    assert checks_project.limits(answer(other), where) == dict.fromkeys(where)
    assert checks_project.limits(answer({"dimensions": {}}), where) == dict.fromkeys(where, 0)


@pytest.mark.parametrize(
    ("facts", "name", "result", "words"),
    [
        ({"location": "EUROPE-WEST4"}, "bucket place", "warn", "not beside us-central1, us-west1"),
        ({"location": "US-CENTRAL1"}, "bucket place", "warn", "not beside us-west1"),
        ({"location": "NAM4"}, "bucket place", "warn", "not beside us-west1"),
        ({"location": "NEW9"}, "bucket place", "skip", "not known"),
        ({"retentionPolicy": {"retentionPeriod": "604800"}}, "bucket rules", "fail", "7 days"),
        ({"defaultEventBasedHold": True}, "bucket rules", "fail", "holds every new object"),
        ({"versioning": {"enabled": True}}, "bucket rules", "warn", "keeps versions"),
        ({"lifecycle": {"rule": [{"action": {"type": "Delete"}, "condition": {"age": 3}}]}},
         "bucket rules", "warn", "after 3 days"),
        ({"lifecycle": {"rule": [{"action": {"type": "Delete"},
                                  "condition": {"age": 3, "matchesPrefix": ["tmp/"]}}]}},
         "bucket rules", "pass", "no retention"),
        ({"billing": {"requesterPays": True}}, "bucket rules", "fail", "requester pays"),
        ({"softDeletePolicy": {"retentionDurationSeconds": "604800"}}, "bucket rules", "pass",
         "7 days more"),
    ],
)  # fmt: skip
def test_a_bucket_is_near_and_lets_a_run_replace_what_it_wrote(
    cloud: Cloud, facts: dict[str, Any], name: str, result: str, words: str
) -> None:
    cloud.server.objects.buckets["bkt"].update(facts)
    row = cloud.row(name)
    assert row.result == result and words in row.detail


def test_a_bucket_that_is_absent_or_not_ours(cloud: Cloud) -> None:
    row = cloud.row("bucket", BUCKET="other")
    assert row.result == "fail" and "buckets create gs://other --location=us-central1" in row.fix
    cloud.server.objects.lacking["bkt"] = {"storage.objects.create"}
    row = cloud.row("bucket")
    assert row.result == "fail" and "you lack storage.objects.create" in row.detail
    assert f"--role={OBJECTS} " in row.fix  # as `launch infra` grants it
    cloud.server.objects.denied.add("bkt")
    assert cloud.row("bucket").result == "fail"


def test_a_bucket_that_is_only_read_is_looked_at_for_reading(cloud: Cloud) -> None:
    cloud.server.objects.create_bucket("texts", {"location": "US"})
    cloud.server.objects.lacking["texts"] = {"storage.objects.create", "storage.objects.delete"}
    change = 'data.train=[{path: "gs://texts/train.jsonl"}]'
    assert cloud.row("input bucket", change).result == "pass"
    cloud.server.objects.lacking["texts"] = {"storage.objects.get"}
    assert "its own account" in cloud.row("input bucket", change).detail
    assert cloud.row("input bucket", change.replace("texts", "absent")).result == "fail"


def test_a_project_is_active_seen_and_given_by_its_id(cloud: Cloud) -> None:
    access = cloud.server.access
    row = cloud.row("project", f"hardware.vertex.project='{NUMBER}'")
    assert row.result == "warn" and "write the id, rehearsal" in row.fix
    access.states["proj"] = "DELETE_REQUESTED"
    assert cloud.row("project").result == "fail"
    access.missing.add("proj")
    assert "does not exist, or may not be seen" in cloud.row("project").detail
    access.missing.clear()
    access.lacking.add("aiplatform.customJobs.create")
    row = cloud.row("permissions")
    assert row.result == "fail" and "roles/aiplatform.user" in row.fix


def test_apis_that_are_off_are_named_together(cloud: Cloud) -> None:
    cloud.server.access.off |= {"aiplatform.googleapis.com", "secretmanager.googleapis.com"}
    row = cloud.row("apis")
    command = "gcloud services enable aiplatform.googleapis.com secretmanager.googleapis.com"
    assert row.result == "fail" and row.fix == f"{command} --project=proj"
    asked = [target for _, target, _ in cloud.server.log if "batchGet" in target]
    assert len(asked) == 1


def test_an_api_that_the_doctor_itself_needs_is_named(cloud: Cloud) -> None:
    cloud.server.access.off |= {
        "cloudresourcemanager.googleapis.com", "serviceusage.googleapis.com", "iam.googleapis.com",
        "artifactregistry.googleapis.com",
    }  # fmt: skip
    found = {row.name: row for row in cloud.look()}
    for name, service in (("project", "cloudresourcemanager"), ("apis", "serviceusage"),
                          ("service account", "iam")):  # fmt: skip
        assert found[name].result == "warn"
        assert found[name].fix == f"gcloud services enable {service}.googleapis.com"
    assert found["quota"].result == found["image"].result == "skip"


def test_the_job_s_account_is_there_and_may_be_used(cloud: Cloud) -> None:
    access = cloud.server.access
    access.lacking.add("iam.serviceAccounts.actAs")
    row = cloud.row("service account")
    assert row.result == "fail" and "roles/iam.serviceAccountUser" in row.fix
    access.lacking.clear()
    access.disabled.add(EMAIL)
    assert "is disabled" in cloud.row("service account").detail
    access.missing.add(EMAIL)
    assert "service-accounts create trainer" in cloud.row("service account").fix
    row = cloud.row("service account", "hardware.vertex.service_account=null")
    assert row.result == "warn" and "cannot read secrets" in row.detail


def test_what_cannot_be_known_of_the_job_s_account_is_said_not_failed(cloud: Cloud) -> None:
    cloud.server.objects.policies.clear()
    cloud.server.secrets.readers.clear()
    row = cloud.row("its bucket")
    assert row.result == "skip" and "cannot be seen from here" in row.detail
    assert "cannot be seen from here" in cloud.row("secrets").detail
    assert cloud.row("secrets").result == "pass"


def test_secrets_are_there_and_enabled(cloud: Cloud) -> None:
    secrets = cloud.server.secrets
    secrets.hidden.add("proj/hf-token")
    assert cloud.row("secrets").result == "skip"
    secrets.hidden.clear()
    secrets.disabled.add("proj/hf-token")
    assert "is disabled" in cloud.row("secrets").detail
    secrets.values.clear()
    row = cloud.row("secrets")
    assert row.result == "fail" and "gcloud secrets create hf-token --project=proj" in row.fix
    assert not any(":access" in target for _, target, _ in cloud.server.log)  # no value is read


def test_an_image_is_looked_for_in_artifact_registry_alone(cloud: Cloud) -> None:
    digest = f"{IMAGE.rpartition(':')[0]}@sha256:{'0' * 64}"
    assert cloud.row("image", IMAGE=digest).result == "pass"
    assert cloud.row("image", IMAGE="docker.io/me/trainer:1").result == "skip"
    cloud.server.access.missing.add(IMAGE)
    assert cloud.row("image").result == "fail"
    old = "us-docker.pkg.dev/vertex-ai/training/pytorch-gpu.2-4.py310:latest"
    row = cloud.row("image", IMAGE=old)
    assert row.result == "warn" and "2026-07-24" in row.detail


def test_a_service_that_does_not_answer_is_one_row(cloud: Cloud) -> None:
    faults = cloud.server.faults
    assert isinstance(faults, Script)
    faults.add(r"services:batchGet|consumerQuotaMetrics", Fault("status", status=503), times=99)
    rows = cloud.look()
    assert [(row.name, row.result) for row in rows if row.result == "warn"] == [
        ("credentials", "warn"), ("serviceusage", "warn"),
    ]  # fmt: skip
    assert not [row for row in rows if row.name in ("apis", "quota")]


def test_a_service_that_is_silent_is_left_after_its_seconds(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        rows = cloud.look(CLOUDSDK_API_ENDPOINT_OVERRIDES_SERVICEUSAGE=address)
        assert time.monotonic() - begun < asking.SECONDS + 5
    (row,) = [row for row in rows if row.name == "serviceusage"]
    assert row.result == "warn" and "not looked at" in row.detail
    assert {row.result for row in rows if row.name in ("bucket", "secrets", "image")} == {"pass"}


@pytest.mark.parametrize(
    "body", [b"[]", b"null", b'"x"', b'{"permissions": null}', b'{"state": 5}']
)
def test_a_service_whose_answers_are_strange_is_one_row(cloud: Cloud, body: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        rows = cloud.look(CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDRESOURCEMANAGER=address)
        server.shutdown()
    own = [row for row in rows if row.name in ("project", "permissions", "cloudresourcemanager")]
    assert own and all(row.result in ("warn", "fail") for row in own)
    assert {row.result for row in rows if row.name in ("bucket", "secrets", "image")} == {"pass"}


def test_a_network_that_is_away_is_one_row(cloud: Cloud) -> None:
    cloud.server.stop()
    rows = cloud.look()
    assert [row.name for row in rows] == ["credentials", "network"]
    assert rows[1].result == "fail"


def test_without_a_project_the_rest_is_skipped(tmp_path: Path) -> None:
    off = {"CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true"}
    env = Env(tmp_path, off, ManualClock(NOW), "ann", sys.executable)
    rows = list(checks.rows(env))
    assert [row.result for row in rows[:2]] == ["warn", "warn"]
    assert {row.result for row in rows[2:]} == {"skip"} and len(rows) > 5


def test_without_credentials_there_is_one_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    google._default_credentials.cache_clear()
    rows = list(checks.rows(Env(tmp_path, {}, ManualClock(NOW), "ann", sys.executable)))
    assert [row.name for row in rows if row.result == "fail"] == ["credentials"]
    assert "absent.json does not exist" in rows[0].detail
    assert {row.result for row in rows[1:]} == {"skip"}


def user(left: Optional[float], renewed: bool, account: str = "") -> Any:
    """A user's credentials, whose token ends in `left` hours."""
    kind = google.library("google.oauth2.credentials").Credentials
    end = None
    if left is not None:
        moment = datetime.datetime.fromtimestamp(NOW + left * 3600, datetime.timezone.utc)
        end = moment.replace(tzinfo=None)
    return kind("token", refresh_token="r" if renewed else None, expiry=end, account=account)


@pytest.mark.parametrize(
    ("found", "hours", "result", "words"),
    [
        (user(40 / 60, False), 12, "fail", "40 minutes left, which nobody renews; a driver needs "
         "it for the 12 hours of budget.hours"),
        (user(13, False), 12, "pass", "780 minutes left"),
        (user(40 / 60, False), None, "fail", "a run of many hours"),
        (user(None, False), 12, "warn", "a time unknown"),
        (user(1, True, "ann@example.com"), 12, "warn", "a user's login (ann@example.com), which "
         "policy may end before the 12 hours"),
        (user(1, True), 1, "pass", "a user's login"),
    ],
)  # fmt: skip
def test_credentials_are_judged_by_how_long_they_last(
    found: Any, hours: Optional[float], result: str, words: str
) -> None:
    row = checks.lifetime(found, hours, NOW)
    assert row.result == result and words in row.detail
    assert "service account" in row.fix or result == "pass"


def test_credentials_that_renew_themselves_last() -> None:
    machine = google.library("google.auth.compute_engine.credentials").Credentials(
        service_account_email=EMAIL
    )
    row = checks.lifetime(machine, 100, NOW)
    assert row.result == "pass" and f"this machine's own identity ({EMAIL})" in row.detail
    borrowed = google.library("google.auth.impersonated_credentials").Credentials(
        user(1, True, "ann@example.com"), EMAIL, ["scope"]
    )
    row = checks.lifetime(borrowed, 12, NOW)
    assert row.result == "warn" and row.detail.startswith(f"{EMAIL} by impersonation, from a user")


def test_questions_are_asked_at_once_and_left_when_the_time_is_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = silent.getsockname()

        def wait() -> str:
            with socket.create_connection(address) as connection:
                return connection.recv(1).decode()

        def fail() -> str:
            raise ValueError("no")

        begun = time.monotonic()
        found = abreast.ask({"a": wait, "b": fail, "c": lambda: "yes"}, 0.2)
        assert time.monotonic() - begun < 5
    assert list(found) == ["a", "b", "c"]
    assert isinstance(found["a"], abreast.Late) and isinstance(found["b"], ValueError)
    assert found["c"] == "yes"


def stages_of(*overrides: str) -> tuple[recipe.Loaded, Stage]:
    loaded = recipe.load(KD_L4, overrides, environ={})
    return loaded, loaded.recipe.stages[0]


def test_checkpoints_are_counted_as_they_are_kept() -> None:
    assert doctor_disk.kept(stages_of()[1]) == 4  # keep: 2, the best one, the one being written
    assert doctor_disk.kept(stages_of("train.save_every=0")[1]) == 1
    assert doctor_disk.kept(stages_of("train.save_every=1000")[1]) == 3  # it saves thrice in all


def test_the_disk_holds_the_checkpoints_to_come(tmp_path: Path) -> None:
    env = Env(tmp_path, {}, ManualClock(NOW), "ann", sys.executable)
    loaded, stage = stages_of()
    known = shapes.of_stage(stage, loaded.recipe.stages, tmp_path)
    one = doctor_disk.fit.checkpoint_bytes(stage, known)
    assert one is not None and 10e9 < one < 16e9  # 1.24 billion: weights, and moments of 0.97
    (row,) = doctor_disk.rows(loaded.recipe, tmp_path, env)
    assert row.result in ("warn", "fail") and f"4 x {one / 1e9:.1f} GB" in row.detail
    assert "of 80.0 GB on a boot disk of 100 GB" in row.detail
    (enough,) = re.findall(r"set hardware.vertex.disk_gb to (\d+) or more", row.fix)
    loaded, _ = stages_of(f"hardware.vertex.disk_gb={enough}")
    (row,) = doctor_disk.rows(loaded.recipe, tmp_path, env)
    assert row.result == "pass", row
    loaded, _ = stages_of(f"hardware.vertex.disk_gb={int(enough) - 10}")
    (row,) = doctor_disk.rows(loaded.recipe, tmp_path, env)
    assert row.result == "warn", row
    loaded, _ = stages_of("hardware.vertex.disk_gb=300")
    (row,) = doctor_disk.rows(loaded.recipe, tmp_path, env)
    assert row.result == "pass"
    loaded, _ = stages_of("model.name=nobody/knows")
    (row,) = doctor_disk.rows(loaded.recipe, tmp_path, env)
    assert row.result == "skip" and "not known" in row.detail


def test_the_memory_of_a_stage_fits_or_comes_with_what_makes_it_fit(tmp_path: Path) -> None:
    def row(*overrides: str) -> Check:
        (found,) = doctor_memory.rows(stages_of(*overrides)[0].recipe, tmp_path)
        return found

    over = row()
    assert (over.result, over.name) == ("warn", "memory")  # `up` would try it
    assert over.detail.endswith("of 22.0 GiB: does not fit")
    change = over.fix.partition(" makes it")[0]
    overrides = [word for word in shlex.split(change) if word != "--set"]
    assert overrides and "free" in row(*overrides).detail
    assert row(*overrides).result == "pass"
    huge = row("kd.teacher=meta-llama/Llama-3.1-70B")
    assert huge.result == "fail" and huge.fix  # `up` refuses it
    assert row("model.name=nobody/knows").result == "skip"
    local = recipe.load(KD_L4.with_name("quickstart.yaml"), environ={}).recipe
    rows = list(doctor_memory.rows(local, tmp_path))
    assert [one.name for one in rows][:2] == ["memory of tokenizer", "memory of teacher"]
    assert {one.result for one in rows} == {"skip"}


def test_the_doctor_takes_overrides_and_another_backend_as_a_plan_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    for name in ("PROJECT", "BUCKET", "SERVICE_ACCOUNT", "IMAGE"):
        monkeypatch.delenv(name, raising=False)
    words = ["doctor", "kd-l4", "--on", "local", "--set", "artifacts=runs", "--json"]
    words += ["--set", "secrets={}"]
    cli.run(words)
    rows = json.loads(capsys.readouterr().out)["checks"]
    told = " ".join(one["detail"] for one in rows if one["name"] == "recipe")
    assert "PROJECT" not in told
    assert "BUCKET is not set" in told  # data still names it
    assert not [one for one in rows if one["name"].startswith("vertex")]
    capsys.readouterr()
    assert cli.run(["doctor", "kd-l4", "--set", "train.lr=much"]) in (2, 3)
    assert "--set train.lr: " in capsys.readouterr().out
    assert cli.run(["doctor", "--set", "train.lr=1"]) == 2
    assert "none is given" in capsys.readouterr().err


def test_tools_are_needed_by_the_recipes_that_use_them(tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path)}
    rows = {row.name: row for row in doctor_tools.rows({"vertex"}, nowhere)}
    assert {row.result for row in rows.values()} == {"skip"}
    rows = {row.name: row for row in doctor_tools.rows({"kubernetes"}, nowhere)}
    assert (rows["kubectl"].result, rows["gcloud"].result) == ("fail", "skip")


def test_tools_tell_their_versions(tmp_path: Path) -> None:
    for name, text in (
        ("kubectl", json.dumps({"clientVersion": {"gitVersion": "v1.34.1"}})),
        ("pulumi", "v3.250.0"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / name).chmod(0o755)
    sdk = tmp_path / "google-cloud-sdk" / "bin"
    sdk.mkdir(parents=True)
    (sdk / "gcloud").write_text("#!/bin/sh\nexit 1\n")
    (sdk / "gcloud").chmod(0o755)
    (sdk.parent / "VERSION").write_text("545.0.0\n")
    path = {"PATH": f"{tmp_path}:{sdk}"}
    rows = {row.name: row for row in doctor_tools.rows(set(), path)}
    assert {row.result for row in rows.values()} == {"pass"}
    assert [rows[name].detail.split(" at ")[0] for name in ("gcloud", "kubectl", "pulumi")] == [
        "545.0.0", "v1.34.1", "3.250.0",
    ]  # fmt: skip
    (tmp_path / "pulumi").write_text("#!/bin/sh\nexit 1\n")
    rows = {row.name: row for row in doctor_tools.rows(set(), path)}
    assert rows["pulumi"].result == "warn"


def test_wheels_are_looked_up_and_judged(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    wheel = mirror / "flash_attn-2.8.3+cu12torch2.9cxx11abiTRUE-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"x")
    image = "{python: '3.11', torch: '2.9', cuda: '12.8', wheels: [{name: flash-attn, source: "
    change = f"hardware.environment={image}'{mirror}'}}]}}"
    loaded = recipe.load(KD_L4, [change], environ={})
    assert doctor._wheels(loaded).result == "pass"
    loaded = recipe.load(KD_L4, [change.replace("'3.11'", "'3.12'")], environ={})
    row = doctor._wheels(loaded)
    assert row.result == "fail" and "no wheel of flash-attn for Python 3.12" in row.detail


def test_a_secret_from_a_variable_that_is_not_set_fails(tmp_path: Path) -> None:
    change = "secrets.HF_TOKEN=env://NOT_SET_ANYWHERE"
    loaded = recipe.load(KD_L4, [change], on="local", environ={})
    env = Env(tmp_path, {}, ManualClock(NOW), "ann", sys.executable)
    (row,) = [row for row in doctor._of_recipe(loaded, env) if row.name == "secret"]
    assert row.result == "fail" and "NOT_SET_ANYWHERE, which is not set" in row.detail
    seeing = replace(env, environ={"NOT_SET_ANYWHERE": "x"})
    assert not [row for row in doctor._of_recipe(loaded, seeing) if row.name == "secret"]


def test_the_command_ends_with_3_and_a_failed_up_names_it(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {**cloud.server.environ(), **cloud.values, "LAUNCH_HOME": str(cloud.home / "home")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.run(["doctor", "kd-l4"]) == 0, capsys.readouterr().out
    capsys.readouterr()
    cloud.server.objects.denied.add("bkt")
    assert cli.run(["doctor", "kd-l4"]) == 3
    capsys.readouterr()
    assert cli.run(["up", "kd-l4", "--yes"]) == 3
    assert "`launch doctor kd-l4` looks at everything" in capsys.readouterr().err


def test_the_disk_of_the_home_is_told_in_gb_as_are_those_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SimpleNamespace(free=69 * 10**9)
    monkeypatch.setattr("launcher.doctor.shutil.disk_usage", lambda place: sizes)
    row = doctor._disk(tmp_path)
    assert (row.result, row.detail) == ("pass", f"69.0 GB free on the disk of {tmp_path}")
