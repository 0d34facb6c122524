"""A job whose creation nobody saw answered, and that worked while nobody looked: it has cost what
it has cost, however its run ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import engine, google
from launcher.adopt import adopt
from launcher.backends.base import Backend, Env, Held, Intent, JobHandle, Phase, Ref, Seen
from launcher.backends.vertex.jobs import SETTLE
from launcher.claim import write_marker
from launcher.costs import costs
from launcher.errors import HeldElsewhere
from launcher.run import Run
from launcher.spec import Budget
from tests.launcher.bucketed import Mirrored, begin, bucket, laptop, load, recipe
from tests.launcher.rehearsed import Scene
from tests.launcher.test_artifacts import opened, root

from launcher.rehearsal.vertex import Stub  # isort: skip

HOUR, A_DAY = 3600.0, 86_400.0


class Killed(BaseException):
    """`kill -9`."""


class Dying(Mirrored):
    """Its process dies when the service has made the job, before the answer is looked at."""

    def create(self, intent: Intent, env: Env) -> Ref:
        ref = super().create(intent, env)
        if intent.billable:
            raise Killed
        return ref


def dying(name: str) -> Backend:
    return Dying()


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with bucket(tmp_path, monkeypatch) as made:
        made.server.vertex.fate = Stub(2, 2, None)
        yield made
    google._forget()


def stopped(it: Scene, run_id: str) -> Run:
    write_marker(opened(it, run_id), it.clock.now(), "ann", "enough")
    return engine.drive(run_id, it.env, load)


def torn_down(it: Scene, run_id: str) -> Run:
    return engine.teardown(run_id, it.env, load)


@pytest.mark.parametrize("end", [stopped, torn_down])
@pytest.mark.parametrize(("asleep", "least", "most"), [(HOUR, 0.43, 0.6), (A_DAY, 0.99, 1.0)])
def test_what_it_has_cost_is_counted(
    it: Scene, end: Callable[[Scene, str], Run], asleep: float, least: float, most: float
) -> None:
    """After an hour it still works; after a day the service has ended it at the budget."""
    run_id = begin(it, replace(recipe(), budget=Budget(usd=1.0)))
    with pytest.raises(Killed):
        engine.drive(run_id, it.env, dying)
    it.clock.sleep(asleep)
    run = end(it, run_id)
    assert run.ended is not None and it.server.vertex.states() == {}
    assert run.spent_usd is not None and least < run.spent_usd <= most
    assert costs([run], it.clock.now()).total.usd == pytest.approx(run.spent_usd)
    assert len(it.server.vertex.created) == 1 and run.phase is not Phase.SUCCEEDED


@pytest.mark.parametrize("end", [stopped, torn_down])
def test_what_was_never_created_has_cost_nothing(
    it: Scene, end: Callable[[Scene, str], Run]
) -> None:
    class Unsent(Mirrored):
        def create(self, intent: Intent, env: Env) -> Ref:
            if intent.billable:
                raise Killed
            return super().create(intent, env)

    run_id = begin(it)
    with pytest.raises(Killed):
        engine.drive(run_id, it.env, lambda _: Unsent())
    it.clock.sleep(A_DAY)
    before = it.clock.now()
    run = end(it, run_id)
    assert (run.phase, run.spent_usd, it.server.vertex.created) == (Phase.CANCELLED, 0.0, [])
    assert SETTLE <= it.clock.now() - before < 1.5 * SETTLE, "it is looked for, and that once"


def test_a_job_that_a_sleeping_laptop_asks_for_after_the_end_is_deleted_again(
    it: Scene, tmp_path: Path
) -> None:
    """It had looked whether the run was still its own; then it slept, and another one ended it."""
    run_id = begin(it)
    other = laptop(it, tmp_path / "other")
    adopt(root(run_id), other)

    class Sleeping(Mirrored):
        def create(self, intent: Intent, env: Env) -> Ref:
            if intent.billable:
                write_marker(opened(it, run_id), it.clock.now(), "bob", "teardown")
                assert engine.teardown(run_id, other, load).held is Held.GONE
            return super().create(intent, env)

    with pytest.raises(HeldElsewhere):
        engine.drive(run_id, it.env, lambda _: Sleeping())
    assert (len(it.server.vertex.created), it.server.vertex.states()) == (1, {})


def test_while_the_run_goes_on_elsewhere_its_job_is_left_alone(it: Scene, tmp_path: Path) -> None:
    run_id = begin(it)
    other = laptop(it, tmp_path / "other")
    adopt(root(run_id), other)

    class Watching(Mirrored):
        def observe(self, job: JobHandle, env: Env) -> Seen:
            seen = super().observe(job, env)
            if seen.phase is Phase.RUNNING:
                raise Killed
            return seen

    class Late(Mirrored):
        def create(self, intent: Intent, env: Env) -> Ref:
            ref = super().create(intent, env)
            if intent.billable:
                with pytest.raises(Killed):
                    engine.drive(run_id, other, lambda _: Watching(), take_over=True)
            return ref

    with pytest.raises(HeldElsewhere):
        engine.drive(run_id, it.env, lambda _: Late())
    assert [*it.server.vertex.states().values()] == ["RUNNING"]
