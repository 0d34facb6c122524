"""Nothing but the endpoint variables of the official tools points `launch` at a server: the whole
life of a run, each command a process, against servers that are a process, too. The official
command line, pointed there by the same variables, sees the same."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.served import RECIPE, ROOT, VERTEX, Launch, package
from tests.stub_jobs import eventually

pytest.importorskip("google.cloud.aiplatform_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.logging_v2", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.storage", reason="needs the extra `google`")

GCLOUD = shutil.which("gcloud")
#: What design section 6 names, and what those variables need: no credentials, a project.
ENDPOINTS = {
    *(f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}"
      for name in ("AIPLATFORM", "ARTIFACTREGISTRY", "CLOUDRESOURCEMANAGER", "IAM", "LOGGING",
                   "SECRETMANAGER", "SERVICEUSAGE", "STORAGE")),
    "STORAGE_EMULATOR_HOST", "GCE_METADATA_HOST", "GCE_METADATA_IP",
    "CLOUDSDK_AUTH_DISABLE_CREDENTIALS", "GOOGLE_CLOUD_PROJECT",
}  # fmt: skip
#: Waits until it is told to end, by the stop marker and nothing else.
TRAINER = """
import json, os, signal, sys
from pathlib import Path

if sys.argv[1] == "inputs":
    sys.exit(0)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(stage,) = json.loads(Path(sys.argv[2]).read_text())["stages"]
folder = Path(stage["output"])
folder.mkdir(parents=True, exist_ok=True)
meta = {"v": 1, "stage": "tokenizer", "id": stage["id"], "completed": False}
(folder / "run_meta.json").write_text(json.dumps(meta))
print("begun with a token of", len(os.environ["HF_TOKEN"]), flush=True)
while not told:
    signal.pause()
sys.exit(75)
"""


@contextmanager
def served(folder: Path) -> Iterator[dict[str, str]]:
    """`python -m launcher.rehearsal`; the variables that it prints."""
    argv = [sys.executable, "-m", "launcher.rehearsal", "--folder", str(folder), "--project",
            "proj", "--bucket", "bkt", "--secret", "proj/hf-token"]  # fmt: skip
    process = subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    given = {}
    try:
        for line in process.stdout:
            if line.startswith("# serving"):
                break
            name, _, value = line.removeprefix("export ").strip().partition("=")
            given[name] = shlex.split(value)[0]
        yield given
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    packages = package(tmp_path, TRAINER)
    with served(tmp_path / "cloud") as given:
        assert set(given) == ENDPOINTS
        made = Launch(tmp_path / "laptop", packages, given)
        made.folder.mkdir()
        secret = "secrets: {HF_TOKEN: secret-manager://proj/hf-token}\n"
        (made.folder / "thing.yaml").write_text(f"{RECIPE}{VERTEX}{secret}")
        yield made


def the_run(launch: Launch) -> dict[str, Any]:
    (run,) = json.loads(launch("status", "--json"))["runs"]
    assert isinstance(run, dict)
    return run


def running(launch: Launch) -> str:
    """The name of a run whose trainer has begun."""
    launch("up", "thing.yaml", "-d", "--yes")
    name = str(the_run(launch)["name"])
    eventually(lambda: "begun with a token of 34" in launch("logs", name), "its line", 120)
    return name


@pytest.mark.slow
def test_the_endpoint_variables_are_enough_for_a_whole_run(launch: Launch) -> None:
    name = running(launch)
    seen = the_run(launch)
    assert (seen["phase"], seen["held"]) == ("running", "live")
    assert seen["root"] == f"gs://bkt/runs/{name}"
    assert "already" in launch("up", "thing.yaml", "-d", "--yes"), "it is one run"
    assert f"{name}-j0-a1" not in launch("sweep", "--yes"), "it has a live owner"
    said = launch("teardown", name, "--yes")
    assert name in said
    seen = the_run(launch)
    assert (seen["phase"], seen["held"]) == ("cancelled", "gone")
    assert f"{name}-j0-a1" not in launch("sweep", "--yes")


@pytest.mark.slow
@pytest.mark.skipif(GCLOUD is None, reason="the gcloud command line is not on PATH")
def test_the_official_command_line_sees_a_run_of_launch(launch: Launch) -> None:
    name = running(launch)
    environ = {
        **launch.environ, "CLOUDSDK_CONFIG": str(launch.folder / "gcloud"),
        "CLOUDSDK_CORE_PROJECT": "proj", "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true", "PYTHONPATH": "",
    }  # fmt: skip

    def gcloud(*words: str) -> str:
        done = subprocess.run(
            [str(GCLOUD), *words], env=environ, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    jobs = ("ai", "custom-jobs")
    (job,) = json.loads(gcloud(*jobs, "list", "--region=us-central1", "--format=json"))
    assert (job["displayName"], job["state"]) == (f"{name}-j0-a1", "JOB_STATE_RUNNING")
    number = os.path.basename(job["name"])  # noqa: PTH119
    shown = gcloud(*jobs, "describe", number, "--region=us-central1", "--format=json")
    (pool,) = json.loads(shown)["jobSpec"]["workerPoolSpecs"]
    assert pool["machineSpec"]["acceleratorType"] == "NVIDIA_L4"
    token = gcloud("secrets", "versions", "access", "latest", "--secret=hf-token")
    assert token.startswith("rehearsal-") and token not in shown
    root = f"gs://bkt/runs/{name}"
    assert f"{root}/journal/00000001.json" in gcloud("storage", "ls", f"{root}/**").splitlines()
    record = json.loads(gcloud("storage", "cat", f"{root}/journal/00000001.json"))
    assert (record["kind"], record["name"]) == ("created", name)
    wanted = f'resource.type="ml_job" AND resource.labels.job_id="{number}"'
    entries = gcloud("logging", "read", wanted, "--format=value(jsonPayload.message)")
    assert "begun with a token of 34" in entries.splitlines()
    launch("teardown", name, "--yes")
    assert json.loads(gcloud(*jobs, "list", "--region=us-central1", "--format=json")) == []
