"""A container of Vertex AI from its first command to what it leaves: real boot, stub trainer."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends.base import Phase
from launcher.bundle import Bundle
from launcher.clock import SystemClock
from tests import stub_jobs
from tests.launcher.rehearsed import Scene, scene

from launcher.rehearsal.vertex import Real  # isort: skip

FOLDER = "runs/kd-l4-0000ff"
SECRET = "hf_s3cr3t-value-of-the-token"
SOURCE = """
if sys.argv[1] == "inputs":
    sys.exit(0)
say("rank", rank, "with", os.environ["HF_TOKEN"])
write(0, completed=True) if rank == 0 else None
"""


class Booted(Scene):
    """A scene whose bundle is a whole one, and whose runs have names of their own: a machine of the
    rehearsal is this one, and keeps its disk."""

    run = ""

    def bundle(self) -> Bundle:
        made = stub_jobs.bundle(self.home, SOURCE)
        return Bundle(Path(made["url"]), made["sha256"], made["bytes"])


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Booted]:
    run = secrets.token_hex(8)
    with scene(tmp_path, SystemClock()) as plain:
        plain.server.vertex.fate = Real(queued=0, pending=0)
        plain.server.secrets.values["proj/hf-token"] = SECRET
        made = Booted(plain.server, tmp_path, plain.clock)
        made.run = run
        yield made
    shutil.rmtree(Path("/tmp/launch") / f"kd-l4-{run[-6:]}-j0-a1", ignore_errors=True)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_runs_from_its_bundle_to_its_artifacts(it: Booted, nodes: int) -> None:
    handle = it.attempt(f"hardware.nodes={nodes}", run=it.run)
    handle = replace(handle, run=it.run, name=f"kd-l4-{it.run[-6:]}-j0")
    deadline = time.monotonic() + 120
    while not (seen := it.see(handle, 0.05)).phase.over:
        assert time.monotonic() < deadline, seen
    printed = [(entry.task, entry.text) for entry in it.server.logging._entries]
    assert seen.phase is Phase.SUCCEEDED, printed
    objects = it.server.objects
    assert json.loads(objects.content("bkt", f"{FOLDER}/run_meta.json")) == {"completed": True}
    record = json.loads(objects.content("bkt", f"{FOLDER}/attempts/00-0001.json"))
    assert (record["exit_code"], record["ranks"]) == (0, {"0": 0})
    tasks = ["workerpool0-0", "workerpool1-0"][:nodes]
    for rank, task in enumerate(tasks):
        mark = f"[worker {rank}] " if nodes > 1 else ""  # among several, the line names its rank
        assert printed.count((task, f"{mark}rank {rank} with ***")) == 1
    assert not [text for _, text in printed if SECRET in text]
    written = [
        name for name in objects.names("bkt") if SECRET.encode() in objects.content("bkt", name)
    ]
    assert not written
