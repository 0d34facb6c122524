"""A hundred runs at once on one machine, many of them followed: no job doubled, every line once,
and no more reads of logs than a project allows."""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest

from launcher import engine, home, view
from launcher.backends.base import Phase
from launcher.logs import follow
from launcher.run import Run
from tests.launcher.on_bucket import load
from tests.launcher.rehearsed import scene
from tests.launcher.test_vertex_engine import begin, nothing_is_left

from launcher.rehearsal.vertex import PREEMPTED, Said, Stub  # isort: skip

RUNS, FOLLOWED = 100, 30


class Together:
    """A virtual clock of several threads: time moves on when all of them sleep, to the moment at
    which the first of them wakes."""

    def __init__(self) -> None:
        self._now, self._awake = 1_795_000_000.0, 0
        self._wake: list[tuple[float, int, threading.Event]] = []
        self._lock = threading.Lock()

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        woken = threading.Event()
        with self._lock:
            if not self._awake:  # nobody else lives on this clock yet
                self._now += seconds
                return
            heapq.heappush(self._wake, (self._now + seconds, threading.get_ident(), woken))
            self._awake -= 1
            self._move()
        woken.wait()

    def run(self, acts: list[Callable[[], None]]) -> None:
        """Run all acts, each in a thread of this clock; raises what the first failed one raised."""
        errors: list[BaseException] = []
        self._awake = len(acts)

        def live(act: Callable[[], None]) -> None:
            try:
                act()
            except BaseException as error:
                errors.append(error)
            finally:
                with self._lock:
                    self._awake -= 1
                    self._move()

        threads = [threading.Thread(target=live, args=(act,), daemon=True) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "somebody hangs"
        self._awake = 0
        if errors:
            raise errors[0]

    def _move(self) -> None:
        """With nobody awake, the next one wakes; those of the same moment together."""
        if self._awake or not self._wake:
            return
        self._now = max(self._now, self._wake[0][0])
        while self._wake and self._wake[0][0] <= self._now:
            heapq.heappop(self._wake)[2].set()
            self._awake += 1


def test_a_hundred_runs_keep_every_limit(tmp_path: Path) -> None:
    clock, runs, lines = Together(), dict[str, Run](), dict[str, list[str]]()
    with scene(tmp_path / "home", clock) as it, redirect_stderr(StringIO()):
        it.home.mkdir()
        for number in range(RUNS):
            says = tuple(Said(5 + 10 * n, f"step {n}", times=2) for n in range(5))
            lost = number % 10 == 0
            it.server.vertex.fates.append(Stub(5, 20, 60, PREEMPTED) if lost else
                                          Stub(5, 20, 60, lines=says))  # fmt: skip
        it.server.vertex.fate = Stub(5, 20, 60, lines=says)
        ids = [begin(it) for _ in range(RUNS)]
        env = it.env

        def driven(run_id: str) -> None:
            runs[run_id] = engine.drive(run_id, env, load)

        def followed(run_id: str) -> None:
            facts = home.identity(env.home, run_id) or {}
            seen = (0.0, view.look(env, facts))

            def look() -> Run:
                nonlocal seen
                if seen[1].ended is None and clock.now() >= seen[0] + 10:
                    seen = (clock.now(), view.look(env, facts))
                return seen[1]

            found = follow(look, env)
            lines[run_id] = [line.text for line in found]

        acts: list[Callable[[], None]] = []
        for run_id in ids:
            acts.append(lambda i=run_id: driven(i))  # type: ignore[misc]
        for run_id in ids[:FOLLOWED]:
            acts.append(lambda i=run_id: followed(i))  # type: ignore[misc]
        clock.run(acts)

        assert all(runs[run_id].phase is Phase.SUCCEEDED for run_id in ids)
        names = Counter(job["displayName"] for job in it.server.vertex.created)
        assert set(names.values()) == {1} and len(names) == RUNS + RUNS // 10
        assert all(lines[run_id] == [f"step {n}" for n in range(5)] for run_id in ids[:FOLLOWED])
        times = sorted(it.server.logging.lists)
        busiest = max(bisect_right(times, at + 60 - 1e-6) - n for n, at in enumerate(times))
        assert 1 < busiest <= 60, "reads of logs in one minute of one project"
        assert nothing_is_left(it)


def test_the_status_of_a_hundred_live_runs_takes_no_call_a_run(tmp_path: Path) -> None:
    with scene(tmp_path / "home") as it, redirect_stderr(StringIO()):
        it.home.mkdir()
        it.server.vertex.fate = Stub(0, 0, None)
        for _ in range(RUNS):
            begin(it)
        before = len(it.server.log)
        seen = view.listed(it.env, None)
        assert len(seen) == RUNS and len(it.server.log) - before <= 1


def test_the_clock_of_several_threads_moves_to_the_first_that_wakes() -> None:
    clock, order = Together(), list[tuple[str, float]]()
    start = clock.now()

    def sleeper(name: str, *naps: float) -> Callable[[], None]:
        def act() -> None:
            for nap in naps:
                clock.sleep(nap)
                order.append((name, clock.now() - start))

        return act

    clock.run([sleeper("a", 3, 3), sleeper("b", 5)])
    assert order == [("a", 3), ("b", 5), ("a", 6)]
    with pytest.raises(ZeroDivisionError):
        clock.run([lambda: [][0 // 0]])
