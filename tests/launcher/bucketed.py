"""Runs whose artifacts lie in the bucket of a loopback server, driven with a virtual clock."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Optional

import pytest

from launcher import start
from launcher.backends.base import Backend, Env, JobHandle, Phase, Seen
from launcher.backends.vertex import VertexBackend
from launcher.bundle import Bundle
from launcher.clock import Clock
from launcher.recipe import Loaded
from launcher.spec import Gate, Hardware, Recipe, Retry, Vertex
from tests.launcher import runs
from tests.launcher.rehearsed import Scene, scene
from tests.trainer.remote import QUICK
from trainer.config import to_dict
from trainer.store import open_store
from trainer.store_gcs import GcsStore
from trainer.store_remote import Patience

HARDWARE = Hardware(
    "vertex", "L4:1", capacity=("spot", "standard"), places=("us-central1",),
    vertex=Vertex("proj", "own/trainer:1"),
)  # fmt: skip
LISTS = "/storage/v1/b/bkt/o?"


class Mirrored(VertexBackend):
    """The backend, whose stub jobs leave in the store what boot and a mirror would."""

    checkpoints: Sequence[int] = (40, 120)

    def observe(self, job: JobHandle, env: Env) -> Seen:
        seen = super().observe(job, env)
        store = GcsStore(job.root, Patience(**QUICK))
        if seen.phase is Phase.SUCCEEDED:
            done = b'{"v": 1, "completed": true, "global_step": 200}'
            stage = f"s{job.name.rpartition('-j')[2]}"  # of a pipeline
            for name in ("run_meta.json", f"{stage}/run_meta.json"):
                store.put_bytes(name, done)
            store.put_bytes(f"{stage}/evaluation.json", b'{"val_loss": 2.0}')
        elif seen.phase is Phase.PREEMPTED:
            for step in self.checkpoints:
                store.put_bytes(f"checkpoints/step-{step}/MANIFEST.json", b'{"v": 1, "files": {}}')
            # One that was cut off: it has no manifest.
            store.put_bytes("checkpoints/step-160/model.safetensors", b"half")
        return seen


def load(name: str) -> Backend:
    assert name == "vertex"
    return Mirrored()


def recipe(stages: int = 1, gate: Optional[Gate] = None) -> Recipe:
    made = runs.recipe(stages, gate=gate)
    return replace(
        made, stages=tuple(replace(stage, hardware=HARDWARE) for stage in made.stages),
        retry=Retry(5, 20, 2, 0), artifacts="gs://bkt/runs/{run}",
    )  # fmt: skip


def begin(it: Scene, made: Optional[Recipe] = None) -> str:
    """The id of a run whose first record is written."""
    made = made or recipe()
    it.home.mkdir(parents=True, exist_ok=True)
    bundle = Bundle(it.home / "b.tar.gz", "ab" * 32, 7)
    bundle.path.write_bytes(b"trainer")
    return str(start.create(Loaded(made, to_dict(made), "f" * 64, it.home), bundle, it.env)["id"])


def laptop(it: Scene, home: Path, owner: str = "ann") -> Env:
    """Another machine's view of the same cloud."""
    return Env(home, it.env.environ, it.clock, owner, sys.executable)


def journal(it: Scene, run_id: str) -> list[str]:
    """The kinds of the run's records, as the bucket has them; their numbers have no gap."""
    root, objects = f"runs/thing-{run_id[-6:]}", it.server.objects
    names = open_store(f"gs://bkt/{root}").list("journal/")
    assert names == [f"journal/{n + 1:08d}.json" for n in range(len(names))]
    return [json.loads(objects.content("bkt", f"{root}/{name}"))["kind"] for name in names]


def lists(it: Scene, since: int = 0) -> int:
    """How many list calls the bucket has seen after the first `since` requests."""
    asked = list(it.server.log)[since:]
    return sum(method == "GET" and target.startswith(LISTS) for method, target, _ in asked)


@contextmanager
def bucket(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Optional[Clock] = None
) -> Iterator[Scene]:
    with scene(folder / "home", clock) as it:
        for name, value in it.server.environ().items():
            monkeypatch.setenv(name, value)
        yield it
