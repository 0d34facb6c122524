"""`launch` is killed again and again while a real trainer works, and another driver goes on: one
job an attempt, none left. (The crash matrix plays this against stub jobs, thousands of times.)"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("google.cloud.aiplatform_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.logging_v2", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.storage", reason="needs the extra `google`")

from launcher import api, home
from launcher.backends.base import Held, Phase
from launcher.backends.vertex import VertexBackend
from trainer.store import open_store

from launcher.rehearsal.google import Google  # isort: skip
from launcher.rehearsal.vertex import Real  # isort: skip

RECIPE = """
launch: 1
name: tiny
stage: smoke
smoke: {epochs: 2, batch: 64, samples: 512, features: 16, classes: 2, lr: 1.0e-2, seed: 42}
artifacts: "gs://bkt/runs/{run}"
hardware:
  backend: vertex
  accelerator: L4:1
  places: [us-central1]
  vertex: {project: proj, image: own/trainer:1}
"""
#: Records of the journal after which a driver dies: one of each third. The first is not a driver's,
#: and such a run has at least as many as are named here.
THIRDS = ((2, 5), (6, 9), (10, 13))
SEEDS, MORE = 2, 20
_ASKED = "LAUNCH_SLOW" in os.environ


def until(true: Callable[[], object], log: Path, seconds: float = 120.0) -> None:
    """Poll what real processes do, with a deadline."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


class Cloud:
    """A server whose jobs really run. It kills the driver as soon as it has stored one of the
    records `deadly` of the journal, before it answers."""

    def __init__(self, server: Google, launch_home: Path, deadly: list[int]) -> None:
        self.home = launch_home
        self.killed: list[int] = []
        self._deadly = [f"/journal/{number:08d}.json" for number in deadly]
        server.objects.create_bucket("bkt", {})
        server.objects.finalized.append(self._written)
        server.vertex.fate = Real(queued=0.3, pending=0.3)

    def _written(self, bucket: str, name: str, size: int) -> None:
        if name.endswith(tuple(self._deadly[:1])):
            (run_id,) = home.ids(self.home)
            who = home.holder(home.folder(self.home, run_id))
            assert who is not None, "a record without a driver"
            del self._deadly[0]
            os.kill(who["pid"], signal.SIGKILL)
            self.killed.append(who["pid"])


def killed_and_taken_over(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    recipe, launch_home = folder / "tiny.yaml", folder / "home"
    recipe.write_text(RECIPE)
    with Google(folder=folder / "cloud", project="proj") as server:
        dice = random.Random(seed)
        deadly = [dice.randint(*third) for third in THIRDS]
        cloud = Cloud(server, launch_home, deadly)
        given = {"LAUNCH_HOME": str(launch_home), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        for name, value in {**server.environ(), **given}.items():
            monkeypatch.setenv(name, value)
        run = api.up(recipe)
        place = home.folder(launch_home, run.id)
        log = place / "driver.log"
        for times in range(1, len(deadly) + 1):
            until(lambda: len(cloud.killed) == times and home.holder(place) is None, log)  # noqa: B023
            assert api.status(run.id).ended is None, log.read_text()
            assert api.attach(run.id).id == run.id
        until(lambda: api.status(run.id).ended is not None, log)
        ended = api.status(run.id)
        assert (ended.phase, ended.held, ended.exit_code) == (Phase.SUCCEEDED, Held.GONE, 0), (
            log.read_text()
        )
        names = Counter(job["displayName"] for job in server.vertex.created)
        assert names == {f"{run.name}-j0-a1": 1}, "one attempt, one job"
        assert server.vertex.states() == {} and list(VertexBackend().sweep(api.env())) == []
        store = open_store(run.root)
        assert len(set(cloud.killed)) == len(deadly), cloud.killed
        assert {"run_meta.json", "summary.json"} <= set(store.list())
        until(lambda: home.holder(place) is None, log)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_three_times_it_ends_with_the_same_job_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    killed_and_taken_over(tmp_path, monkeypatch, seed)


@pytest.mark.slow
@pytest.mark.skipif(not _ASKED, reason="LAUNCH_SLOW=1 (`make slow`) kills more drivers")
@pytest.mark.parametrize("seed", range(SEEDS, MORE) if _ASKED else [SEEDS])
def test_more_killed_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    killed_and_taken_over(tmp_path, monkeypatch, seed)
