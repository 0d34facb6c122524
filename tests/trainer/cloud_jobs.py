"""Stub jobs with artifacts in gs:// on loopback servers: what the tests of boot there share."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import pytest

pytest.importorskip("google.cloud.storage", reason="gs:// needs the extra `google`")
pytest.importorskip("google.cloud.aiplatform_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.logging_v2", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")

from launcher.rehearsal.faults import Fault
from launcher.rehearsal.gcs_state import Conditions
from launcher.rehearsal.google import Google
from tests import stub_jobs

ROOT = "gs://bkt/runs/thing"
#: What a stub may do besides: save a whole checkpoint, and append a metrics line.
SAVES = """
from trainer.manifest import seal
out = Path(job["stages"][0]["output"])

def save(step):
    folder = out / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.pt"):
        (folder / name).write_text(f"of step {step}")
    seal(folder, step)
    pointer = {"v": 1, "step": step, "path": f"step-{step}", "val_loss": None}
    (out / "checkpoints" / "last.json").write_text(json.dumps(pointer))

def found():
    return sorted(path.name for path in out.glob("checkpoints/step-*"))

"""


def ended(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    """Exit code and standard output of a boot that has nothing to say on the other one."""
    try:
        said, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # its workers die with it
        raise AssertionError(f"still running: {process.communicate()[0]}") from None
    assert errors == ""
    return process.returncode, said


class Down:
    """A schedule of faults: while `down`, no request is served."""

    down = False

    def next(self, request: str) -> Optional[Fault]:
        return Fault("status", 503) if self.down else None


class Cloud:
    """The servers, and one folder for each machine of a job."""

    def __init__(self, server: Google, folder: Path) -> None:
        self.server, self.folder, self.faults = server, folder, Down()
        server.faults = self.faults
        server.objects.create_bucket("bkt", {})

    def spec(self, source: str = "", machine: str = "m0", **changes: Any) -> dict[str, Any]:
        """A specification for a job of one stage, `s`, on a machine with an empty disk."""
        stages = [{"id": "s", "output": f"{ROOT}/s"}]
        job = {"stages": stages, "control": f"{ROOT}/control"}
        given = {"root": ROOT, "job": job, "grace_seconds": 30, **changes}
        return stub_jobs.specification(self.folder / machine, source, **given)

    def start(
        self, spec: dict[str, Any], machine: str = "m0", **environ: str
    ) -> subprocess.Popen[str]:
        given = {"OMP_NUM_THREADS": "1", **self.server.environ(), **environ}
        return stub_jobs.start(self.folder / machine, spec, given)

    def run(self, spec: dict[str, Any], machine: str = "m0", **environ: str) -> tuple[int, str]:
        """Exit code and standard output."""
        return ended(self.start(spec, machine, **environ))

    def names(self, below: str = "") -> list[str]:
        names = [name.partition("runs/thing/") for name in self.server.objects.names("bkt")]
        return [name for _, found, name in names if found and name.startswith(below)]

    def read(self, name: str) -> str:
        return self.server.objects.content("bkt", f"runs/thing/{name}").decode()

    def json(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.read(name))
        return value

    def put(self, name: str, data: bytes) -> str:
        """The URI of an object below the root, as the launcher would write it."""
        self.server.objects.insert("bkt", f"runs/thing/{name}", data, {}, Conditions())
        return f"{ROOT}/{name}"

    def log(self, worker: int = 0, part: str = "00-0001") -> list[str]:
        """A worker's lines in the store, without their times."""
        names = [n for n in self.names(f"logs/worker-{worker}/{part}-")]
        text = "".join(self.read(name) for name in names)
        return [line.partition(" ")[2] for line in text.splitlines()]

    def result(self, machine: str = "m0", node: str = "") -> dict[str, Any]:
        return stub_jobs.read(self.folder / machine / "work" / node / "result.json")


@contextmanager
def cloud(folder: Path) -> Iterator[Cloud]:
    with Google(project="proj") as server:
        yield Cloud(server, folder)
