"""The crash matrix: `launch` dies after any record and between any request and its reply, crossed
with what services and people do meanwhile. Wherever it dies, the run ends as its jobs did, no job
is made twice, and nothing is left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("google.cloud.aiplatform_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.logging_v2", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.storage", reason="needs the extra `google`")

from launcher import clear, engine
from launcher.backends.base import Intent, Ref
from launcher.backends.vertex import jobs
from launcher.run import Attempt, JobState
from tests.launcher.schedules import SEED, Laboratory

#: Schedules of one test, and how many tests share them: workers take one test after the other.
EACH, TESTS, SLOW = 50, 40, 400
_ASKED = "LAUNCH_SLOW" in os.environ


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    """One server and its clients for all schedules of this process, its files in memory where
    there is such a file system: what is shown here has nothing to do with a disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(dir=memory))
    with pytest.MonkeyPatch.context() as patch, _one_core():
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("NETRC", str(folder / "netrc"))  # which is looked for at every request
        made = Laboratory(folder)
        yield made
        made.close()
    shutil.rmtree(folder)


@contextmanager
def _one_core() -> Iterator[None]:
    """The client and the server of a worker of xdist on one core: their threads hand each other one
    lock, and between two cores that is a sixth slower."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(cores)[worker % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("part", range(TESTS))
def test_wherever_it_dies_it_ends_as_its_jobs_did(laboratory: Laboratory, part: int) -> None:
    for seed in range(part * EACH, (part + 1) * EACH):
        laboratory.play(seed)


@pytest.mark.slow
@pytest.mark.skipif(not _ASKED, reason="LAUNCH_SLOW=1 (`make slow`) plays 18,000 more schedules")
@pytest.mark.parametrize("part", range(TESTS, SLOW) if _ASKED else [TESTS])
def test_wherever_it_dies_in_the_other_18000_schedules(laboratory: Laboratory, part: int) -> None:
    for seed in range(part * EACH, (part + 1) * EACH):
        laboratory.play(seed)


@pytest.mark.skipif(SEED not in os.environ, reason=f"{SEED} names one schedule to play alone")
def test_one_schedule_alone(laboratory: Laboratory) -> None:
    laboratory.play(int(os.environ[SEED]))


def test_the_schedules_meet_what_they_are_meant_to_meet(laboratory: Laboratory) -> None:
    """Of the first hundred: deaths, failed requests, deletions, stops, and more than one job."""
    told, faults, several = "", set(), 0
    for seed in range(100):
        schedule = laboratory.play(seed)
        told += "\n".join(schedule.story)
        faults |= {fault.kind for _, fault in schedule.met}
        several += len(schedule.created) > 1
    for words in ("killed at instant", "somebody deletes", "asked to stop", "teardown"):
        assert words in told
    assert faults == {"cut_after", "cut_before", "cut_download", "status"} and several > 30


def test_a_schedule_is_the_same_every_time(laboratory: Laboratory) -> None:
    def played(seed: int) -> tuple[list[str], list[tuple[str, str, int]]]:
        return laboratory.play(seed).story, list(laboratory.server.log)

    for seed in (3, 7, 11):
        assert played(seed) == played(seed)


# The matrix can fail: three ways to break the engine, each of which it has to notice within 200
# schedules. The third matters only where a stop or a teardown meets a request without a reply.


def _never_adopts(*_: object) -> None:
    return None


def _creates_before_it_records(
    self: engine.Engine, job: JobState, number: int, intent: Intent, *given: object
) -> None:
    if intent.kind == "custom_job":
        self.claim.backend(job.backend).create(intent, self.claim.env)
    _INTEND(self, job, number, intent, *given)  # type: ignore[arg-type]


def _forgets_requests_without_a_reply(
    claim: object, job: JobState, attempt: Attempt, found: Iterable[Ref]
) -> None:
    return None


_INTEND = engine.Engine._intend
MUTANTS = [
    (jobs, "_find", _never_adopts, "created twice", 1_000_000),
    (engine.Engine, "_intend", _creates_before_it_records, "not in the journal", 1_000_000),
    (clear, "_record", _forgets_requests_without_a_reply, "not in the journal", 1_001_200),
]


@pytest.mark.parametrize(("owner", "name", "mutant", "said", "first"), MUTANTS)
def test_an_engine_that_is_broken_does_not_get_through(
    laboratory: Laboratory, owner: object, name: str, mutant: object, said: str, first: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, mutant)
        with pytest.raises(AssertionError, match=said) as caught:
            for seed in range(first, first + 200):
                laboratory.play(seed)
    assert f"{SEED}=" in str(caught.value), "how to play it alone"
