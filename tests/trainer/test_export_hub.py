"""Exporting to the Hub, against a server on this machine that speaks its protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.trainer.conftest import in_folder
from trainer.checkpoint import resolve
from trainer.config import Adapter, Export, Job, Merge, Model, StageConfig, to_dict

TOKEN = "hf_secret_of_a_test"


class Hub(ThreadingHTTPServer):
    """Repositories in memory. What the client may send is what it says in `preupload`: everything
    goes inside the commit, base64, as small files do."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.authorised() or self.server.refuses:
            return self.answer(403, {"error": "You do not have the rights"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}"
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        if self.path.startswith("/api/models/me/tiny/preupload/"):
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": f["path"], **regular} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if self.path.startswith("/api/models/me/tiny/commit/"):
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    self.server.files[item["value"]["path"]] = content
            url = f"{self.server.url}/me/tiny/commit/abc"
            return self.answer(200, {"commitUrl": url, "commitOid": "abc"})
        return self.answer(404, {"error": self.path})

    def do_GET(self) -> None:
        if not self.authorised():
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.path.startswith("/api/whoami"):
            return self.answer(200, {"type": "user", "name": "me"})
        self.answer(200, {"id": "me/tiny", "modelId": "me/tiny", "sha": "abc", "siblings": []})

    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        del format, arguments


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def job(stage: StageConfig, run_stage: Any, tmp_path: Path) -> Job:
    base = in_folder(stage, tmp_path / "base", steps=1)
    run_stage(base)
    settings = Export(model=base.output, to="hub:tiny", precision="bf16")
    asked = StageConfig(id="e", stage="export", output=str(tmp_path / "out"), export=settings)
    return Job(run="r", stages=(asked,))


def trainer(job: Job, folder: Path, hub: Hub, token: str) -> subprocess.CompletedProcess[str]:
    file = folder / "job.json"
    file.write_text(json.dumps(to_dict(job)))
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(folder)}
    for offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # a developer may work so
        environ.pop(offline, None)
    return subprocess.run(
        [sys.executable, "-m", "trainer", "run", str(file)],
        capture_output=True, text=True, timeout=120, env=environ,
    )  # fmt: skip


def test_the_hub_gets_the_model_and_nothing_else(job: Job, hub: Hub, tmp_path: Path) -> None:
    done = trainer(job, tmp_path, hub, TOKEN)
    assert done.returncode == 0, done.stderr
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "tiny")
    assert created.get("private") is True or created.get("visibility") == "private"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert not {"trainer_state.pt", "MANIFEST.json", "run_meta.json"} & set(hub.files)
    sent = load(hub.files["model.safetensors"])
    assert {tensor.dtype for tensor in sent.values()} == {torch.bfloat16}
    kept = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert kept == hub.files["model.safetensors"]
    weights, told = (tmp_path / "out" / name for name in ("model.safetensors", "run_meta.json"))
    assert weights.stat().st_mode == told.stat().st_mode
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert TOKEN.encode() not in written and TOKEN not in done.stdout + done.stderr


def test_the_hub_gets_a_gguf_file(job: Job, hub: Hub, tmp_path: Path) -> None:
    (asked,) = job.stages
    assert asked.export is not None
    settings = Export(model=asked.export.model, to="hub:tiny", format="gguf", quantize="q8_0")
    done = trainer(replace(job, stages=(replace(asked, export=settings),)), tmp_path, hub, TOKEN)
    assert done.returncode == 0, done.stderr
    assert list(hub.files) == ["tiny-Q8_0.gguf"]
    assert hub.files["tiny-Q8_0.gguf"] == (tmp_path / "out" / "tiny-Q8_0.gguf").read_bytes()


@pytest.mark.parametrize(
    ("token", "said"),
    [(TOKEN, "403 Forbidden"), ("hf_of_somebody_else", "Invalid user token")],
)
def test_a_refusal_of_the_hub_is_one_line(
    token: str, said: str, job: Job, hub: Hub, tmp_path: Path
) -> None:
    hub.refuses = True
    done = trainer(job, tmp_path, hub, token)
    assert done.returncode == 78
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "the Hub did not take tiny: " in errors[0]
    assert said in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_adapter_of_the_hub_is_merged(
    stage: StageConfig, run_stage: Any, tmp_path: Path
) -> None:
    """Offline, from the cache that the Hub's client keeps."""
    base = in_folder(stage, tmp_path / "base", steps=1)
    run_stage(base)
    model = Model(name=base.output, adapter=Adapter(rank=2))
    lora = in_folder(replace(stage, model=model), tmp_path / "lora", steps=2)
    run_stage(lora)
    cached = tmp_path / "hub" / "models--me--lora"
    shutil.copytree(resolve(lora.output), cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    asked = StageConfig(
        id="m", stage="merge", output=str(tmp_path / "out"), merge=Merge(adapter="me/lora")
    )
    wrong = replace(asked, output=str(tmp_path / "none"), merge=Merge(adapter="me/nothing"))
    file = tmp_path / "job.json"
    file.write_text(json.dumps(to_dict(Job(run="r", stages=(asked, wrong)))))
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "run", str(file)],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert "tensors; logits differ" in done.stdout
    assert (tmp_path / "out" / "config.json").exists()
    assert done.returncode == 64 and "Traceback" not in done.stderr
    assert "error: cannot fetch the adapter 'me/nothing'" in done.stderr


def test_a_dry_run_sends_nothing(job: Job, hub: Hub, tmp_path: Path) -> None:
    done = trainer(replace(job, dry_run=True), tmp_path, hub, TOKEN)
    assert done.returncode == 0, done.stderr
    assert "to a scratch folder instead of hub:tiny" in done.stdout
    assert not hub.created and not hub.files
