"""The engine, over a fake backend that is a real implementation of the protocol."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import console, home
from launcher.backends.base import Held, Phase
from launcher.claim import claimed
from launcher.clock import ManualClock
from launcher.errors import Denied, Exit, HeldElsewhere, Leaked
from launcher.spec import Budget, Gate, Retry
from tests.launcher.runs import Scene, killed_at, load, recipe, scene

LATER = 1_700_100_000.0


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a file system: these tests write ten thousand records, and
    what they show has nothing to do with how long a disk takes to sync."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def attempts(it: Scene, job: int = 0) -> list[tuple[str, str]]:
    return [(a.phase.value, a.place) for a in it.run().jobs[job].attempts]


def intents(it: Scene) -> list[dict[str, Any]]:
    return [r["intent"] for r in it.records() if r["kind"] == "intent"]


def test_a_run_succeeds_and_leaves_nothing(tmp_path: Path) -> None:
    it = scene(tmp_path, recipe(stages=2))
    run = it.drive()
    assert (run.phase, run.exit_code, run.held) == (Phase.SUCCEEDED, Exit.OK, Held.GONE)
    assert [stage.phase for stage in run.stages] == [Phase.SUCCEEDED, Phase.SUCCEEDED]
    assert it.world.alive() == []
    assert it.world.lines("begun.log") == [f"{run.name}-j0-a1", f"{run.name}-j1-a1"]
    summaries = [json.loads((f / "summary.json").read_text()) for f in (it.root, it.place)]
    assert summaries[0] == summaries[1] == json.loads(json.dumps(run.to_json()))


def test_every_intent_is_recorded_before_its_act_with_its_holes_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TWO_INTENTS", "1")
    it = scene(tmp_path, create=["ok", "no_capacity"])
    it.drive()
    kinds = [kind for kind in it.kinds() if kind in ("intent", "ref", "gone", "end")]
    first, second = kinds[:4], kinds[4:]
    assert first == ["intent", "ref", "intent", "gone"]
    assert second == ["intent", "ref", "intent", "ref", "gone", "gone", "end"]
    disk, machine = intents(it)[2:]
    assert machine["request"]["disk"] == disk["name"]
    assert machine["request"]["boot"]["attempt"] == 2


def test_killed_at_any_instant_it_ends_with_the_same_resources(tmp_path: Path) -> None:
    gate = Gate("loss", max=3.0)
    script: dict[str, Any] = {
        "jobs": [{"end": "preempted"}, {"evaluation": {"loss": 1.0}}, {}],
        "create": ["ok", "lost_reply"],
    }
    undisturbed = scene(tmp_path / "all", recipe(2, gate=gate), **script)
    instants = killed_at(0, undisturbed.drive)
    assert instants > 40
    begun = [name.split("-j")[1] for name in undisturbed.world.lines("begun.log")]
    assert begun == ["0-a1", "0-a2", "1-a1"]
    for instant in range(1, instants + 1):
        it = scene(tmp_path / str(instant), recipe(2, gate=gate), **script)
        assert killed_at(instant, it.drive) == instant
        run = it.drive(ManualClock(LATER))
        assert run.phase is Phase.SUCCEEDED, instant
        names = [name.split("-j")[1] for name in it.world.lines("begun.log")]
        assert names == begun, instant
        assert it.world.alive() == [], instant
        assert sorted(it.world.lines("deleted.log")) == sorted(it.world.lines("begun.log"))
        refs = [r["ref"]["name"] for r in it.records() if r["kind"] == "ref"]
        assert len(refs) == len(set(refs)) == 3, instant


def test_killed_at_any_instant_a_teardown_finds_everything(tmp_path: Path) -> None:
    instants = killed_at(0, scene(tmp_path / "all").drive)
    for instant in range(1, instants):
        it = scene(tmp_path / str(instant))
        killed_at(instant, it.drive)
        run = it.teardown(ManualClock(LATER))
        assert it.world.alive() == [], instant
        assert run.held in (Held.NONE, Held.GONE) and run.ended is not None, instant


def test_a_teardown_killed_at_any_instant_goes_on_when_asked_again(tmp_path: Path) -> None:
    def torn(folder: Path) -> Scene:
        it = scene(folder, jobs=[{"looks": None}])
        killed_at(8, it.drive)
        assert it.world.alive() != []
        return it

    instants = killed_at(0, torn(tmp_path / "all").teardown)
    for instant in range(1, instants + 1):
        it = torn(tmp_path / str(instant))
        killed_at(instant, it.teardown)
        run = it.teardown(ManualClock(LATER))
        assert (it.world.alive(), run.phase) == ([], Phase.CANCELLED), instant


def test_without_capacity_the_offers_are_walked_in_order_then_again_later(tmp_path: Path) -> None:
    offers = [
        {"place": place, "capacity": capacity, "usd_per_hour": 1.0}
        for capacity in ("spot", "standard")
        for place in ("a", "b")
    ]
    it = scene(tmp_path, offers=offers, create=["no_capacity", "quota", "no_capacity", "quota"])
    clock = ManualClock()
    run = it.drive(clock)
    tried = [(r["offer"]["capacity"], r["offer"]["place"])
             for r in it.records() if r["kind"] == "intent"]  # fmt: skip
    assert tried == [("spot", "a"), ("spot", "b"), ("standard", "a"), ("standard", "b"),
                     ("spot", "a")]  # fmt: skip
    assert run.phase is Phase.SUCCEEDED
    times = [r["time"] for r in it.records() if r["kind"] == "intent"]
    assert times[3] - times[0] < 1 and times[4] - times[3] >= 30


def test_capacity_is_asked_for_no_oftener_than_the_recipe_says(tmp_path: Path) -> None:
    it = scene(tmp_path, recipe(retry=Retry(capacity=2)), create=["no_capacity"] * 9)
    run = it.drive()
    assert (run.phase, run.exit_code) == (Phase.FAILED, Exit.CAPACITY)
    assert "no capacity in here (3 times; retry.capacity: 2)" in run.why
    assert len(intents(it)) == 3


def test_waiting_for_capacity_ends_with_budget_wait(tmp_path: Path) -> None:
    it = scene(tmp_path, recipe(budget=Budget(wait="5m")), create=["no_capacity"] * 99)
    clock = ManualClock()
    run = it.drive(clock)
    assert (run.exit_code, run.why) == (
        Exit.CAPACITY, "no capacity within budget.wait (5m): no capacity in here"
    )  # fmt: skip
    assert 300 <= clock.now() - run.created < 310


def test_a_job_that_only_queues_is_given_up_after_budget_wait(tmp_path: Path) -> None:
    it = scene(tmp_path, recipe(budget=Budget(wait="5m")), jobs=[{"queued": 10**9}])
    run = it.drive()
    assert run.exit_code == Exit.CAPACITY and it.world.alive() == []
    assert "budget.wait" in run.why


def test_a_preempted_job_goes_to_another_place_of_the_same_capacity(tmp_path: Path) -> None:
    offers = [
        {"place": "a", "capacity": "spot", "usd_per_hour": 1.0},
        {"place": "b", "capacity": "spot", "usd_per_hour": 1.0},
        {"place": "a", "capacity": "standard", "usd_per_hour": 3.0},
    ]
    preempted = {"end": "preempted"}
    it = scene(tmp_path, offers=offers, jobs=[preempted, preempted, {}])
    run = it.drive()
    assert run.phase is Phase.SUCCEEDED
    assert attempts(it) == [("preempted", "a"), ("preempted", "b"), ("succeeded", "a")]
    assert [a.capacity for a in run.jobs[0].attempts] == ["spot"] * 3


@pytest.mark.parametrize(
    ("end", "retry", "times", "phase", "exit_code"),
    [
        ("preempted", Retry(preempted=2), 3, Phase.FAILED, Exit.CAPACITY),
        ("lost", Retry(infrastructure=1), 2, Phase.LOST, Exit.JOB),
        ("failed", Retry(job=2), 3, Phase.FAILED, Exit.JOB),
        ("failed", Retry(), 1, Phase.FAILED, Exit.JOB),
        ("incomplete", Retry(), 1, Phase.FAILED, Exit.JOB),
    ],
)
def test_each_cause_has_its_own_count(
    tmp_path: Path, end: str, retry: Retry, times: int, phase: Phase, exit_code: int
) -> None:
    it = scene(tmp_path, recipe(retry=retry), jobs=[{"end": end}] * 9)
    run = it.drive()
    assert (run.phase, run.exit_code, len(it.world.lines("begun.log"))) == (phase, exit_code, times)
    assert it.world.alive() == []


@pytest.mark.parametrize("exit_code", [64, 65, 78])
def test_what_trying_again_cannot_change_is_not_tried_again(tmp_path: Path, exit_code: int) -> None:
    jobs = [{"end": "failed", "exit_code": exit_code, "why": "no such file"}] * 9
    it = scene(tmp_path, recipe(retry=Retry(job=5)), jobs=jobs)
    run = it.drive()
    assert (run.exit_code, len(it.world.lines("begun.log"))) == (Exit.JOB, 1)
    assert run.why.startswith("no such file (not tried again")


def test_a_lost_reply_is_adopted_and_a_deaf_backend_waited_for(tmp_path: Path) -> None:
    it = scene(
        tmp_path,
        create=["transient", "lost_reply", "ok"],
        observe=["ok", *["transient"] * 30],
        delete=["transient", "slow", "slow"],
    )
    run = it.drive()
    assert run.phase is Phase.SUCCEEDED
    assert (len(it.world.lines("begun.log")), len(run.jobs[0].attempts)) == (1, 1)


def test_replies_lost_for_good_leave_no_orphan(tmp_path: Path) -> None:
    retry = Retry(infrastructure=0)
    it = scene(tmp_path, recipe(retry=retry), create=["lost_reply"] * 99)
    run = it.drive()
    assert (run.phase, run.exit_code) == (Phase.FAILED, Exit.JOB)
    assert it.world.alive() == [] and len(it.world.lines("begun.log")) == 1


@pytest.mark.parametrize(("step", "code"), [("denied", Exit.ACCESS), ("bad", Exit.USAGE)])
def test_a_refusal_ends_the_run_with_its_own_exit_code(
    tmp_path: Path, step: str, code: Exit
) -> None:
    it = scene(tmp_path, create=[step])
    run = it.drive()
    assert (run.phase, run.exit_code, len(intents(it))) == (Phase.FAILED, code, 1)


def test_a_refusal_after_a_lost_reply_is_not_taken_for_nothing_made(tmp_path: Path) -> None:
    it = scene(tmp_path, create=["lost_reply", "denied"])
    run = it.drive()
    assert (run.phase, run.exit_code) == (Phase.FAILED, Exit.ACCESS)
    assert len(it.world.lines("begun.log")) == 1 and it.world.alive() == []


def test_a_refusal_is_believed_only_by_the_driver_that_asked(tmp_path: Path) -> None:
    """The one before it may have made what this one is refused."""
    it = scene(tmp_path, create=["ok", "denied"])
    for instant in range(1, 30):
        killed_at(instant, it.drive)
        if it.world.lines("begun.log"):
            break
    run = it.drive(ManualClock(LATER))
    assert run.ended is not None and it.world.alive() == []


def test_a_driver_that_may_not_look_leaves_the_job_alone(tmp_path: Path) -> None:
    it = scene(tmp_path, observe=["ok", "denied"])
    with pytest.raises(Denied):
        it.drive()
    assert len(it.world.alive()) == 1 and it.run().ended is None
    assert it.drive(ManualClock(LATER)).phase is Phase.SUCCEEDED


def test_what_cannot_be_deleted_is_leaked_and_nothing_else_is_started(tmp_path: Path) -> None:
    it = scene(tmp_path, jobs=[{"end": "preempted"}], delete=["denied"])
    run = it.drive()
    assert (run.exit_code, run.held, run.live) == (Exit.LEAKED, Held.LEAKED, True)
    assert len(it.world.lines("begun.log")) == 1 and "may still bill" in run.why
    assert not (it.place / "summary.json").exists()
    done = it.teardown(ManualClock(LATER))
    assert (done.held, it.world.alive()) == (Held.GONE, [])
    assert (it.place / "summary.json").exists()


def test_a_deletion_that_never_ends_is_leaked_with_the_command_to_go_on(tmp_path: Path) -> None:
    it = scene(tmp_path, jobs=[{"looks": None}], delete=["slow"] * 10**4)
    killed_at(8, it.drive)
    with pytest.raises(Leaked) as caught:
        it.teardown()
    assert caught.value.code == 7
    assert f"launch teardown {it.run().name}" in caught.value.hint


def test_a_teardown_sweeps_what_no_record_knows(tmp_path: Path) -> None:
    it = scene(tmp_path)
    it.drive()
    stray = {"kind": "machine", "place": "here", "run": it.run_id, "looks": 0}
    it.world.resource("stray").write_text(json.dumps(stray))
    other = {**stray, "run": "another"}
    it.world.resource("other").write_text(json.dumps(other))
    it.teardown(ManualClock(LATER))
    assert it.world.alive() == ["other"]


def test_a_request_to_stop_ends_the_run_and_resume_goes_on(tmp_path: Path) -> None:
    it = scene(tmp_path, recipe(stages=2), jobs=[{"looks": None}])
    killed_at(8, it.drive)
    it.stop()
    run = it.drive(ManualClock(LATER))
    assert (run.phase, run.exit_code, it.world.alive()) == (Phase.CANCELLED, Exit.OK, [])
    assert run.why == "stopped: enough"
    it.resume()
    assert not (it.root / "control" / "stop.json").exists()
    assert it.run().ended is None and not (it.place / "summary.json").exists()
    run = it.drive(ManualClock(LATER + 1e5))
    assert run.phase is Phase.SUCCEEDED
    assert [a.number for a in run.jobs[0].attempts] == [1, 2]
    assert run.stages[0].phase is Phase.SUCCEEDED


def test_a_job_that_does_not_stop_is_deleted_after_its_grace(tmp_path: Path) -> None:
    it = scene(tmp_path, jobs=[{"looks": None, "stubborn": True}])
    killed_at(8, it.drive)
    it.stop()
    clock = ManualClock(LATER)
    run = it.drive(clock)
    assert (run.phase, run.exit_code, it.world.alive()) == (Phase.CANCELLED, Exit.OK, [])
    assert 630 < clock.now() - LATER < 700 and "600 s" in run.why
    assert it.world.lines("stopped.log") == [f"{run.name}-j0-a1 600"]


def test_a_stop_before_anything_was_created_creates_nothing(tmp_path: Path) -> None:
    it = scene(tmp_path)
    it.stop()
    run = it.drive()
    assert (run.phase, run.why, it.world.lines("begun.log")) == (
        Phase.CANCELLED, "stopped: enough", []
    )  # fmt: skip


def test_the_budget_of_hours_counts_all_attempts(tmp_path: Path) -> None:
    jobs = [{"looks": 100, "end": "preempted"}, {"looks": None}]
    it = scene(tmp_path, recipe(budget=Budget(hours=1.0)), jobs=jobs)
    run = it.drive()
    assert (run.phase, run.exit_code) == (Phase.CANCELLED, Exit.BUDGET)
    first, second = run.jobs[0].attempts
    lasted = [(a.ended or 0) - (a.started or 0) for a in (first, second)]
    assert 3600 <= sum(lasted) < 3640
    deadlines = [i["request"]["boot"]["deadline_seconds"] for i in intents(it)]
    assert deadlines[0] == 3600 and deadlines[1] == pytest.approx(3600 - lasted[0], abs=2)


def test_the_budget_in_dollars_holds_at_the_price_of_the_offer(tmp_path: Path) -> None:
    offers = [{"place": "a", "capacity": "spot", "usd_per_hour": 4.0}]
    it = scene(tmp_path, recipe(budget=Budget(usd=2.0)), offers=offers, jobs=[{"looks": None}])
    run = it.drive()
    assert run.exit_code == Exit.BUDGET
    assert run.spent_usd == pytest.approx(2.0, abs=0.05)


def test_a_resumed_run_has_its_unfinished_stages_before_it(tmp_path: Path) -> None:
    it = scene(tmp_path, recipe(stages=2), jobs=[{}, {"end": "failed", "exit_code": 1}, {}])
    assert [stage.phase for stage in it.drive().stages] == [Phase.SUCCEEDED, Phase.FAILED]
    it.resume()
    run = it.run()
    assert run.phase is Phase.PLANNED
    assert [stage.phase for stage in run.stages] == [Phase.SUCCEEDED, Phase.PLANNED]
    assert [stage.phase for stage in it.drive().stages] == [Phase.SUCCEEDED] * 2


def test_an_unknown_price_does_not_switch_the_budget_in_dollars_off(tmp_path: Path) -> None:
    offers = [
        {"place": place, "capacity": "spot", "usd_per_hour": price}
        for place, price in (("a", None), ("b", 4.0))
    ]
    jobs = [{"looks": 100, "end": "preempted"}, {"looks": None}]
    it = scene(tmp_path, recipe(budget=Budget(usd=2.0)), offers=offers, jobs=jobs)
    run = it.drive()
    assert [a.usd_per_hour for a in run.jobs[0].attempts] == [None, 4.0]
    assert (run.exit_code, run.unpriced) == (Exit.BUDGET, True)
    assert run.spent_usd == pytest.approx(2.0, abs=0.05)
    assert console.spent(run).startswith("at least $2.0")
    with claimed(it.run_id, it.at(None), load, None, take_over=True) as claim:
        assert (claim.budget_left(None) or 0) <= 0 and (claim.budget_left(4.0) or 0) <= 0
        assert claim.budget_left(0.0) is None, "what is free goes on"


def test_what_costs_an_unknown_price_alone_is_unknown(tmp_path: Path) -> None:
    offers = [{"place": "a", "capacity": "spot", "usd_per_hour": None}]
    run = scene(tmp_path, offers=offers, jobs=[{"looks": 9}]).drive()
    assert (run.spent_usd, run.unpriced, console.spent(run)) == (None, True, "price unknown")


def test_offers_above_the_hourly_budget_are_not_taken(tmp_path: Path) -> None:
    dear = {"place": "a", "capacity": "standard", "usd_per_hour": 4.0}
    it = scene(tmp_path, recipe(budget=Budget(usd_per_hour=3.0)), offers=[dear])
    run = it.drive()
    assert (run.exit_code, intents(it)) == (Exit.BUDGET, [])
    assert "4.00 USD" in run.why and "3" in run.why


def test_a_gate_that_does_not_pass_ends_the_run_before_the_next_job(tmp_path: Path) -> None:
    gate = Gate("loss", max=3.0)
    it = scene(tmp_path, recipe(2, gate=gate), jobs=[{"evaluation": {"loss": 4.0}}])
    run = it.drive()
    assert (run.phase, run.exit_code, len(it.world.lines("begun.log"))) == (Phase.FAILED, 6, 1)
    assert "the gate after 's0'" in run.why and run.stages[0].gate != "passed"


def test_a_gate_without_evidence_fails(tmp_path: Path) -> None:
    it = scene(tmp_path, recipe(2, gate=Gate("loss", max=3.0)))
    assert it.drive().exit_code == Exit.JOB


def test_a_job_that_paused_by_itself_is_cancelled_and_resumable(tmp_path: Path) -> None:
    it = scene(tmp_path, jobs=[{"end": "until"}])
    run = it.drive()
    assert (run.phase, run.exit_code) == (Phase.CANCELLED, Exit.OK)
    assert run.why == "stage 's0' paused at step 10"
    it.resume()
    assert it.drive(ManualClock(LATER)).phase is Phase.SUCCEEDED


def test_resuming_gives_every_cause_its_count_again(tmp_path: Path) -> None:
    it = scene(tmp_path, recipe(retry=Retry(job=1)), jobs=[{"end": "failed"}] * 3)
    assert it.drive().exit_code == Exit.JOB
    it.resume()
    assert it.drive(ManualClock(LATER)).phase is Phase.SUCCEEDED
    assert len(it.world.lines("begun.log")) == 4


def test_a_second_driver_on_this_host_is_refused(tmp_path: Path) -> None:
    it = scene(tmp_path)
    held = home.DriverLock.acquire(it.place)
    assert held is not None
    held.claim(os.getpid(), 1_700_000_000.0)
    with pytest.raises(HeldElsewhere, match=rf"process {os.getpid()}.*since 2023-11-14 22:13") as e:
        it.drive()
    assert e.value.code == Exit.HELD
    held.close()
    assert it.drive().phase is Phase.SUCCEEDED


def test_the_old_driver_loses_once_another_has_taken_over(tmp_path: Path) -> None:
    it = scene(tmp_path)
    old = it.journal()
    old.read()
    killed_at(8, it.drive)
    with pytest.raises(HeldElsewhere, match="is driven by"):
        old.append("phase")
    newest = it.journal()
    newest.read()
    assert it.drive(take_over=True).phase is Phase.SUCCEEDED
    with pytest.raises(HeldElsewhere):
        newest.append("phase")
    assert it.run().driver is not None and it.run().driver.epoch == 2


def test_a_claim_from_another_launch_home_holds_until_it_is_taken_over(tmp_path: Path) -> None:
    it = scene(tmp_path)
    killed_at(8, it.drive)
    claim = next(r["seq"] for r in it.records() if r["kind"] == "driver")
    (it.place / "journal" / f"{claim:08d}.json").unlink()
    (it.place / "claim.json").unlink()
    with pytest.raises(HeldElsewhere, match="driven by"):
        it.drive()
    assert it.drive(ManualClock(LATER), take_over=True).phase is Phase.SUCCEEDED


def test_a_run_that_is_over_is_returned_as_it_is(tmp_path: Path) -> None:
    it = scene(tmp_path)
    it.drive()
    before = len(it.records())
    assert it.drive(ManualClock(LATER)).phase is Phase.SUCCEEDED
    assert len(it.records()) == before


def test_a_stop_before_the_trainer_could_say_anything_is_no_failure(tmp_path: Path) -> None:
    """Boot, asked while it still prepares, leaves with 0; no stage has written its record."""
    it = scene(tmp_path, jobs=[{"end": "incomplete", "stubborn": True}])
    killed_at(8, it.drive)
    it.stop()
    run = it.drive(ManualClock(LATER))
    assert (run.phase, run.exit_code) == (Phase.CANCELLED, Exit.OK)
    assert (run.why, it.world.alive()) == ("stage 's0' stopped: enough", [])
