"""A job on the loopback servers, through the real clients: what the tests of Vertex AI share."""

from __future__ import annotations

import gc
import gzip
import hashlib
import io
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest

pytest.importorskip("google.cloud.aiplatform_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.logging_v2", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.storage", reason="needs the extra `google`")

import launcher.plan as planning
from launcher import recipe
from launcher.backends.base import Env, Intent, JobHandle, Ref, Seen
from launcher.backends.vertex import VertexBackend
from launcher.bundle import Bundle
from launcher.clock import Clock, ManualClock
from launcher.rehearsal.google import Google

KD_L4 = Path(__file__).resolve().parents[2] / "recipes" / "kd_l4.yaml"
RUN = "00000000000000ff"
ROOT = "gs://bkt/runs/kd-l4-0000ff"


class Scene:
    """One server, one machine of a user, one recipe. `attempt` is what an engine would do."""

    def __init__(self, server: Google, home: Path, clock: Clock, owner: str = "ann") -> None:
        self.server, self.clock, self.home = server, clock, home
        self.backend = VertexBackend()
        self.env = Env(home, server.environ(), clock, owner, sys.executable)
        self.boot = b"import sys; print('boot', sys.argv[1])"

    def bundle(self) -> Bundle:
        """A trainer whose boot.py is `boot`."""
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            member = tarfile.TarInfo("trainer/boot.py")
            member.size = len(self.boot)
            archive.addfile(member, io.BytesIO(self.boot))
        data = file.getvalue()
        path = self.home / "b.tar.gz"
        path.write_bytes(gzip.compress(data))
        return Bundle(path, hashlib.sha256(data).hexdigest(), len(data))

    def intents(
        self, *overrides: str, attempt: int = 1, offer: int = 0, run: str = RUN
    ) -> list[Intent]:
        given = {"PROJECT": self.server.project, "BUCKET": "bkt", "IMAGE": "own/trainer:1"}
        made = recipe.load(KD_L4, overrides, environ=given).recipe
        spec = planning.job_spec(
            made, run, f"kd-l4-{run[-6:]}", 0, ROOT, self.home, self.bundle(), self.env.owner,
            self.env,
        )  # fmt: skip
        place = list(self.backend.offers(spec.hardware, self.env))[offer]
        spec = planning.placed(spec, made.budget, place)
        holes = {"attempt": attempt, "deadline": spec.hours and round(spec.hours * 3600)}
        intents = self.backend.plan(spec, place).intents
        return [replace(i, **planning.fill({"name": i.name, "request": i.request}, holes))
                for i in intents]  # fmt: skip

    def attempt(self, *overrides: str, attempt: int = 1, **given: Any) -> JobHandle:
        refs = [self.backend.create(intent, self.env)
                for intent in self.intents(*overrides, attempt=attempt, **given)]  # fmt: skip
        return self.handle(refs, attempt)

    def handle(self, refs: list[Ref], attempt: int = 1, run: str = RUN) -> JobHandle:
        return JobHandle(run, f"kd-l4-{run[-6:]}-j0", attempt, ROOT, tuple(refs))

    def see(self, job: JobHandle, after: float = 0.0) -> Seen:
        self.clock.sleep(after)
        return self.backend.observe(job, self.env)

    def gone(self, ref: Ref, looks: int = 10) -> bool:
        """Delete until it is gone; the clock moves between two calls."""
        for _ in range(looks):
            if self.backend.delete(ref, self.env).value == "gone":
                return True
            self.clock.sleep(2.0)
        return False


@contextmanager
def scene(home: Path, clock: Optional[Clock] = None, **given: Any) -> Iterator[Scene]:
    clock, usual = clock or ManualClock(1_795_000_000.0), gc.get_threshold()
    gc.set_threshold(100_000)  # else a fifth of the time goes into walking the clients' modules
    with pytest.MonkeyPatch.context() as patch, Google(clock, project="proj", **given) as server:
        patch.setenv("NO_PROXY", "127.0.0.1")  # else each request looks at the whole environment
        server.objects.create_bucket("bkt", {})
        try:
            yield Scene(server, home, clock)
        finally:
            gc.set_threshold(*usual)
