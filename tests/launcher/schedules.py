"""Seeded schedules: a run on the loopback server whose `launch` is killed again and again.

A schedule is a function of its seed alone: what becomes of each job, which requests fail, at which
instants the process dies, what is asked for in between. Time is virtual; requests are real HTTP
through the real clients. One process keeps one server and its clients for all its schedules.
"""

from __future__ import annotations

import gc
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import requests

from launcher import engine, home, start
from launcher.backends.base import Env, Held, Phase
from launcher.bundle import Bundle
from launcher.claim import write_marker
from launcher.clock import ManualClock
from launcher.errors import Exit
from launcher.journal import Fold, Journal
from launcher.recipe import Loaded
from launcher.spec import Hardware, Recipe, Retry, Vertex
from tests.launcher import runs
from tests.launcher.on_bucket import OnBucket, load
from trainer.config import to_dict

from launcher.rehearsal.faults import Fault, Script, Seeded  # isort: skip
from launcher.rehearsal.google import Google  # isort: skip
from launcher.rehearsal.vertex import (  # isort: skip
    DENIED, INTERNAL, NO_IMAGE, PREEMPTED, QUOTA, STOCK_OUT, SUCCEEDED, End, Refusal, Stub,
    Vertex as Jobs, exited,
)  # fmt: skip

PLACES = ("us-central1", "us-west1")
HARDWARE = Hardware(
    "vertex", "L4:1", capacity=("spot", "standard"), places=PLACES,
    vertex=Vertex("proj", "own/trainer:1"),
)  # fmt: skip
#: Counts that no schedule can use up: what ends a run is then the fate of a job.
GENEROUS = Retry(99, 99, 99, 0)
#: The environment variable that names one schedule.
SEED = "LAUNCH_SEED"
#: What ends a run, and how; every other end of a job is followed by another job.
LAST = {
    SUCCEEDED: (Phase.SUCCEEDED, Exit.OK),
    NO_IMAGE: (Phase.FAILED, Exit.USAGE),
    DENIED: (Phase.FAILED, Exit.ACCESS),
    exited(65): (Phase.FAILED, Exit.JOB),
}
#: Objects between two collections of garbage.
_GARBAGE = 200_000
_IDENTITY = ("id", "name", "fingerprint", "owner", "root", "created")
_AGAIN = (PREEMPTED, PREEMPTED, STOCK_OUT, QUOTA, INTERNAL, exited(75), End("EXPIRED"))
_ENDS = (SUCCEEDED, SUCCEEDED, SUCCEEDED, NO_IMAGE, DENIED, exited(65))
_RATES = {
    Fault("cut_after"): 0.06, Fault("cut_before"): 0.04, Fault("status", 503): 0.04,
    Fault("status", 429): 0.03, Fault("status", 500): 0.02,
    Fault("cut_download", at_bytes=30): 0.03,
}  # fmt: skip


class Killed(BaseException):
    """`kill -9`: nothing that catches errors may live through it."""


@dataclass
class Instants:
    """The process dies at the instant whose turn it is: after a journal record, or after a request
    was answered and before the answer is looked at."""

    deadly: list[int] = field(default_factory=list)
    passed: int = 0

    def __call__(self) -> None:
        self.passed += 1
        if self.deadly and self.passed >= self.deadly[0]:
            del self.deadly[0]
            raise Killed


class Clock(ManualClock):
    def set(self, now: float) -> None:
        self._now = now


class Laboratory:
    """One server, its clients and the hooks; `run` plays one schedule."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, Clock()
        self.server = Google(self.clock, project="proj")
        self.server.objects.create_bucket("bkt", {})
        self.instants = Instants()
        self.server.start()
        self.created = self._created()
        self.play(0)  # imports and makes all clients
        # What lives now lives to the end, and a schedule leaves little behind: walking it all again
        # and again took a fifth of the time.
        gc.collect()
        gc.freeze()
        self._thresholds = gc.get_threshold()
        gc.set_threshold(_GARBAGE)

    def close(self) -> None:
        self.server.stop()
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()

    def _created(self) -> dict[str, Any]:
        """The first record of a run, as `up` writes it; every schedule begins with its own copy."""
        place = self.folder / "first"
        place.mkdir()
        (stage,) = runs.recipe().stages
        made = Recipe("thing", (replace(stage, hardware=HARDWARE),), retry=GENEROUS)
        bundle = Bundle(place / "b.tar.gz", "0" * 64, 7)
        env = Env(place, self.server.environ(), self.clock, "ann", "python3")
        facts = start.create(Loaded(made, to_dict(made), "f" * 64, place), bundle, env)
        journal = Journal(home.folder(place, facts["id"]), Path(facts["root"]), self.clock)
        (record,) = journal.read()
        envelope = ("v", "seq", "epoch", "time", "driver", "kind")
        return {key: value for key, value in record.items() if key not in envelope}

    def play(self, seed: int) -> Schedule:
        """Play the schedule of `seed` to its end, and check it. Errors: `AssertionError`, with how
        to play it alone."""
        schedule = Schedule(self, seed)
        try:
            with redirect_stderr(schedule.said), self._hooked():
                schedule.play()
                schedule.check()
        except (Exception, Killed) as error:
            story = "\n".join([*schedule.story, schedule.said.getvalue()])
            raise AssertionError(f"{error!r}\n{story}\n{alone(seed)}") from error
        return schedule

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Instants after each record and each reply."""
        append, send = Journal.append, requests.Session.send

        def recorded(*args: Any, **given: Any) -> Any:
            record = append(*args, **given)
            self.instants()
            return record

        def answered(*args: Any, **given: Any) -> Any:
            answer = send(*args, **given)
            self.instants()
            return answer

        Journal.append, requests.Session.send = recorded, answered  # type: ignore[method-assign]
        try:
            yield
        finally:
            Journal.append, requests.Session.send = append, send  # type: ignore[method-assign]


def alone(seed: int) -> str:
    """How to play one schedule by itself."""
    file = "tests/launcher/test_crash_matrix.py"
    return f"play it alone: {SEED}={seed} python -m pytest {file} -k one_schedule_alone"


class Schedule:
    """One run and what befalls it."""

    def __init__(self, laboratory: Laboratory, seed: int) -> None:
        self.seed, self.dice = seed, random.Random(seed)
        self.laboratory, self.server = laboratory, laboratory.server
        self.clock, self.instants = laboratory.clock, laboratory.instants
        self.said, self.story = io.StringIO(), [f"seed {seed}"]
        self.home = laboratory.folder / "home"
        self.removed: set[str] = set()
        self.asked_to_end = False
        self._set_up()

    # The run and its world.

    def _set_up(self) -> None:
        dice, server = self.dice, self.server
        self.clock.set(1_795_000_000.0)
        server.log.clear()
        server.objects._objects["bkt"].clear()
        server.faults = Script()
        self.jobs = server.vertex = Jobs(self.clock, server.logging)
        self.fates = [self._fate(_AGAIN) for _ in range(dice.choice((0, 0, 0, 1, 1, 2)))]
        self.fates.append(self._fate(_ENDS))
        # A job that is deleted behind our back takes its fate with it: one more for the next.
        self.jobs.fates.extend(self.fates)
        self.jobs.fate = self.fates[-1]
        self._toggle_stock()
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        self.env = Env(self.home, server.environ(), self.clock, "ann", "python3")
        self._begin()
        severity = dice.choice((0.0, 0.5, 1.0, 2.0))
        rates = {fault: rate * severity for fault, rate in _RATES.items()}
        server.faults = self._faults = Seeded(self.seed, rates)

    def _begin(self) -> None:
        """The run's first record. Its id is the seed's, so that every path of its requests is."""
        bundle = self.home / "b.tar.gz"
        bundle.write_bytes(b"trainer")
        self.id = f"{int(self.clock.now() * 100):010x}{self.seed & 0xFFFFFF:06x}"
        name, place = home.run_name("thing", self.id), home.folder(self.home, self.id)
        self.root = place / "artifacts"
        raw = self.laboratory.created
        facts = {
            **raw, "id": self.id, "name": name, "root": str(self.root),
            "created": self.clock.now(),
            "stages": [{**stage, "folder": str(self.root)} for stage in raw["stages"]],
            "jobs": [{**job, "name": f"{name}-j0"} for job in raw["jobs"]],
            "bundle": {"path": str(bundle), "sha256": f"{self.seed:064x}", "bytes": 7},
        }  # fmt: skip
        self.instants.deadly.clear()
        self.journal = Journal(place, self.root, self.clock)
        self.journal.append("created", **facts)
        identity = {"v": 1, **{key: facts[key] for key in raw if key in _IDENTITY}}
        (place / "run.json").write_text(json.dumps({**identity, "recipe": "thing"}))

    def _fate(self, ends: tuple[End, ...]) -> Stub:
        dice, end = self.dice, self.dice.choice(ends)
        queued, pending = dice.choice((0.0, 0.5)), dice.choice((0.0, 1.0))
        never_ran = end in (STOCK_OUT, QUOTA, NO_IMAGE, DENIED, End("EXPIRED"))
        return Stub(queued, pending, 0.0 if never_ran else dice.choice((0.2, 2.0, 10.0)), end)

    def _toggle_stock(self) -> None:
        """One place has no machines for a while; never both, so that a run can end."""
        self.jobs.refusals.clear()
        if self.dice.random() < 0.3:
            text = "Resources are insufficient in region: {place}."
            self.jobs.refusals[self.dice.choice(PLACES)] = Refusal(429, text)

    # What is done to it.

    def play(self) -> None:
        for _ in range(self.dice.choice((0, 1, 1, 2, 2, 3, 4))):
            self.instants.passed = 0
            self.instants.deadly[:] = [self.dice.randint(1, 45)]
            try:
                self._act()
            except Killed:
                self.story.append(f"killed at instant {self.instants.passed}")
            self.instants.deadly.clear()
            self.books_agree()
            self._meanwhile()
        self._finish()

    def _act(self) -> None:
        chance = self.dice.random()
        if chance < 0.08:
            self._teardown()
        else:
            if chance < 0.16:
                self._ask_to_stop()
            self.story.append("drive")
            engine.drive(self.id, self.env, load)

    def _teardown(self) -> None:
        self.story.append("teardown")
        self.asked_to_end = True
        write_marker(self.journal.artifacts, self.clock.now(), "ann", "teardown")
        engine.teardown(self.id, self.env, load)

    def _ask_to_stop(self) -> None:
        self.story.append("asked to stop")
        self.asked_to_end = True
        write_marker(self.journal.artifacts, self.clock.now(), "ann", "enough")

    def _meanwhile(self) -> None:
        """Nobody drives: time passes, machines come and go, somebody deletes a job."""
        self.clock.sleep(self.dice.choice((0.0, 1.0, 20.0, 3600.0, 86_400.0)))
        self._toggle_stock()
        alive = sorted(self.jobs.states())
        if alive and self.dice.random() < 0.1:
            self.story.append(f"somebody deletes {alive[0]}")
            self.removed.add(alive[0])
            self.jobs.remove(number_of(self.jobs, alive[0]))
        self.story.append(f"at {self.clock.now():.0f}: {self.jobs.states()}")

    def _finish(self) -> None:
        self.jobs.refusals.clear()
        self.story.append("drive to the end")
        self.run = engine.drive(self.id, self.env, load)

    # What has to hold.

    def books_agree(self) -> None:
        """Every job that exists stands in the journal, and none was created twice (or only after
        somebody had deleted it, before its reply was read)."""
        twice = [n for n, times in Counter(self.created).items() if times > 1 + (n in self.removed)]
        assert not twice, f"created twice: {twice}"
        there = set(self.jobs.states())
        if not there:
            return
        fold = Fold(self.journal.read())
        expected = {
            f"{job.name}-a{attempt.number}"
            for job in fold.run.jobs for attempt in job.attempts
            if not fold.closed(job.index, attempt)
        }  # fmt: skip
        assert there <= expected, f"not in the journal: {there - expected}"

    @property
    def met(self) -> list[tuple[str, Fault]]:
        """The requests that failed, and how."""
        return self._faults.met

    @property
    def created(self) -> list[str]:
        return [job["displayName"] for job in self.jobs.created]

    def check(self) -> None:
        run, server = self.run, self.server
        self.books_agree()
        server.faults = Script()
        assert run.ended is not None and run.held in (Held.NONE, Held.GONE), run.held
        assert self.jobs.states() == {}, "left behind"
        assert (run.phase, Exit(run.exit_code or 0)) in self.possible(), (run.phase, run.why)
        if self.seed % 5 == 0:  # two requests that an empty server makes dull
            assert list(OnBucket().sweep(self.env)) == [], "sweep finds something"

    def possible(self) -> set[tuple[Phase, Exit]]:
        """How the run may end, from what became of its jobs."""
        created, fates = self.created, self.fates
        ends = [fates[min(n, len(fates) - 1)].end for n in range(len(created))]
        went_on = [n for n, end in zip(created[:-1], ends) if end in LAST and n not in self.removed]
        assert not went_on, f"another job after the end of {went_on}"
        found = {LAST[ends[-1]]} if ends and ends[-1] in LAST else set()
        return found | ({(Phase.CANCELLED, Exit.OK)} if self.asked_to_end else set())


def number_of(jobs: Jobs, name: str) -> str:
    """The service's number of a job."""
    found = [job.message for job in jobs._jobs.values() if job.message.display_name == name]
    return str(found[0].name.rpartition("/")[2])
