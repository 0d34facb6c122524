"""What a live run has spent, and what ended it: in changes of its budget, in `status`, `notify` and
`resume`; and whom a recipe's `notify` could not tell."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import api, bundle, cli, console, doctor, money, report, start
from launcher.backends.base import Held, Phase
from launcher.changes import last
from launcher.clock import ManualClock
from launcher.errors import Exit, UsageError
from launcher.fold import Fold
from launcher.recipe import load
from launcher.spec import Budget, Retry
from tests.launcher.fake_backend import World
from tests.launcher.runs import DEADLINE, Scene, killed_at, plugged_in, recipe, scene
from tests.launcher.test_budget import NOW
from tests.launcher.test_budget import live as hour_old
from tests.launcher.test_costs import costs
from tests.launcher.test_difference import (
    TRAINING,
    Live,
    Meddling,
    loaded,
    raised,
    said,
    world,
)
from tests.launcher.test_notify import Hook, hook, told

__all__ = ["hook", "world"]  # fixtures

#: A run that was resumed with 12 dollars, whose file still says 1.5.
FILE = TRAINING.replace("{hours: 5, usd: 30}", "{usd: 1.5}")
OFFERS = [{"place": "here", "capacity": "spot", "usd_per_hour": 60.0}]


class OfThisTrainer(Live):
    """Begun with the trainer that `launch up` would send now, in the time of this machine."""

    def __init__(self, folder: Path, text: str, world: World, **script: Any) -> None:
        self.folder, self.text = folder, text
        (world.folder / "script.json").write_text(json.dumps(script))
        env = api.env()
        self.packed = bundle.build(env.home)
        run_id = start.create(loaded(folder, text), self.packed, env)["id"]
        self.scene = Scene(env, world, run_id)


@pytest.fixture
def live(tmp_path: Path, world: World) -> Live:
    """It has worked for as long as costs 5.81 dollars."""
    made = OfThisTrainer(tmp_path, FILE.replace("usd: 1.5", "usd: 12"), world, offers=OFFERS)
    loaded(tmp_path, FILE)
    made.begun("pretrain")
    running(made, hours=5.81)
    return made


def running(it: Live, hours: float) -> None:
    """Its machine, a dollar an hour, began to work so many hours ago."""
    facts = {"job": 0, "attempt": 1, "phase": "running", "held": "live", "why": ""}
    it.record("phase", **facts, exit_code=None, cause="", began=time.time() - hours * 3600)


# Changes that would end a live run.


def test_a_budget_below_what_is_spent_is_said_and_refused(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    file, name = str(live.folder / "recipe.yaml"), api.status(live.scene.run_id).name
    assert cli.run(["plan", file]) == 0
    shown = said(capsys)
    line = "budget.usd: 12 -> 1.5  1.5 is less than the 5.81 spent: this stops the run"
    assert line in shown and "in place, now" not in shown and "makes these changes" not in shown
    for text in (f"`launch attach {name}`", f"`launch stop {name}`", "raise budget.usd"):
        assert text in shown

    before = live.scene.kinds()
    assert cli.run(["up", file, "--yes", "-d"]) == Exit.USAGE
    shown = said(capsys)
    assert f"this would stop {name}, which goes on: budget.usd: 1.5 is less than" in shown
    assert f"`launch attach {name}` follows it as it is" in shown
    assert f"to stop it: `launch stop {name}`" in shown
    with pytest.raises(UsageError, match="this would stop"):
        api.up(file)
    assert last(live.scene.place) == 0 and live.scene.kinds() == before
    assert [run.id for run in api.list_runs()] == [live.scene.run_id]


def test_what_stays_above_the_spent_is_lowered_in_place(live: Live) -> None:
    for text, effect in (("budget.usd=7", "now"), ("budget.usd=5.82", "stop")):
        found = live.against(text, text=FILE)
        assert [(c.path, c.effect) for c in found.changes] == [("budget.usd", effect)]
        assert found.in_place == (effect == "now") and bool(found.stops) == (effect == "stop")
    (change,) = live.against("budget.usd=5.82", text=FILE).stops
    assert change.why.startswith("5.82 leaves ") and change.why.endswith("after the 5.81 spent")
    (change,) = live.against("budget.usd=12", "budget.hours=2", text=FILE).stops
    assert (change.path, change.why) == ("budget.hours", "2 is less than the 5.81 hours worked")


def test_with_what_needs_a_stop_anyway_nothing_is_refused(live: Live) -> None:
    """Such a recipe starts another run, and the live one keeps its budget."""
    found = live.against("train.steps=40", text=FILE)
    assert not found.stops and not found.in_place
    assert found.overrides() == ["train.steps=40"], "a resume with 1.5 would be refused"


@pytest.mark.parametrize(
    ("usd", "timeout", "ends"),
    [(1.5, False, False), (1.05, True, True), (1.05, False, False), (1.01, False, True)],
)
def test_too_little_is_what_would_end_it_at_once(usd: float, timeout: bool, ends: bool) -> None:
    """A dollar is spent, at a dollar an hour; a service has a tenth of all kept for saving."""
    found = money.too_little(hour_old(), Budget(usd=usd), NOW, timeout)
    assert list(found) == (["budget.usd"] if ends else [])


def test_a_price_cap_below_every_offer_is_told_in_one_line(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(live.folder / "recipe.yaml")
    cap = ["--set", "budget.usd=12", "--set", "budget.usd_per_hour=10"]
    assert cli.run(["plan", file, *cap]) == 0, "`up` takes it up, and the run goes on"
    lines = said(capsys).splitlines()
    (line,) = [text for text in lines if "usd_per_hour" in text and "~" in text]
    assert line.endswith(
        "in place, from the next attempt on: the cheapest offer costs 60.00 USD an hour, so the "
        "next attempt would find no place; the one that runs goes on"
    )
    for word in ("price unknown", "cannot start", "request "):
        assert not [text for text in lines if word in text], word
    # Without a run the same is still refused.
    assert cli.run(["plan", file, *cap, "--set", "name=other"]) == Exit.BUDGET
    assert "cannot start: job 0: the cheapest offer is 60.00 USD an hour" in said(capsys)


def test_a_price_cap_ends_a_run_that_waits_for_its_next_attempt(live: Live) -> None:
    facts = {"job": 0, "attempt": 1, "phase": "preempted", "held": "gone", "why": "taken"}
    live.record("phase", **facts, exit_code=75, cause="preempted")
    found = live.against("budget.usd=12", "budget.usd_per_hour=10", text=FILE)
    assert [change.path for change in found.stops] == ["budget.usd_per_hour"]


def test_a_price_cap_that_comes_while_a_run_waits_holds_for_its_next_attempt(
    tmp_path: Path,
) -> None:
    """The place of that attempt was chosen before the wait."""
    places = [{"place": place, "capacity": "spot", "usd_per_hour": usd}
              for place, usd in (("cheap", 1.0), ("dear", 60.0))]  # fmt: skip
    it = scene(tmp_path, offers=places, jobs=[{"end": "preempted"}])

    class BetweenTwo(ManualClock):
        def sleep(self, seconds: float) -> None:
            (first, *others) = it.run().jobs[0].attempts
            if first.phase.over and not first.holding and not others and not last(it.place):
                raised(it, usd_per_hour=10)()
            super().sleep(seconds)

    run = it.drive(BetweenTwo())
    assert "changed" in it.kinds()
    assert [attempt.place for attempt in run.jobs[0].attempts] == ["cheap", "cheap"]


# What a deadline ends.


def test_a_deadline_is_no_preemption(tmp_path: Path, hook: Hook) -> None:
    ends = [{"looks": 3, "end": "preempted", **DEADLINE}, {}]
    what: dict[str, Any] = {"budget": Budget(hours=0.05), "retry": Retry(preempted=0)}
    it = told(tmp_path, hook, script={"jobs": ends}, **what)
    run = it.drive(Meddling(raised(it, hours=5)))
    assert (run.phase, len(run.jobs[0].attempts)) == (Phase.SUCCEEDED, 2)
    first = run.jobs[0].attempts[0]
    assert (first.phase, first.cause, first.why) == (Phase.CANCELLED, "deadline", "deadline")
    assert "preempted" not in hook.events()
    (text,) = [said["text"] for said in hook.got if "deadline" in said["text"]]
    assert "attempt 1 was ended by the deadline that its budget had set; attempt 2 goes" in text

    records = it.records()
    phases = [r["phase"] for r in records if r["kind"] in ("phase", "stage", "end")]
    assert "preempted" not in phases
    end = next(n for n, r in enumerate(records) if r.get("cause") == "deadline")
    assert Fold(records[: end + 1]).run.phase is Phase.STOPPING
    lines = "\n".join(console.run_lines(run, it.env.clock.now()))
    assert "ended by the deadline that its budget had set" in lines and "preempted" not in lines
    assert "ended by the deadline that its budget had set" in report.write(run).read_text()


def test_it_still_counts_as_one_where_nobody_has_raised_the_budget(tmp_path: Path) -> None:
    ends = [{"looks": 3, "end": "preempted", **how} for how in ({"why": "taken"}, DEADLINE)]
    it = scene(tmp_path, recipe(budget=Budget(hours=5), retry=Retry(preempted=1)), jobs=ends)
    run = it.drive()
    assert (run.phase, run.exit_code) == (Phase.FAILED, Exit.CAPACITY)
    assert run.why == "deadline (2 times; retry.preempted: 1)"


def test_words_make_no_deadline(tmp_path: Path) -> None:
    ends = [{"looks": 3, "end": "preempted", "why": "deadline of the spot machine: taken"}, {}]
    it = scene(tmp_path, recipe(budget=Budget(hours=5), retry=Retry(preempted=1)), jobs=ends)
    first = it.drive().jobs[0].attempts[0]
    assert (first.phase, first.cause) == (Phase.PREEMPTED, "preempted")


def test_one_that_was_not_seen_to_work_has_cost_all_its_time(tmp_path: Path) -> None:
    """A driver that comes back late finds a job that was cut off before anybody saw it run."""
    it = scene(tmp_path, jobs=[{"looks": None}])
    killed_at(6, it.drive)
    journal = it.journal()
    journal.read()
    facts = {"job": 0, "attempt": 1, "held": "gone", "why": "deadline", "exit_code": 75}
    (start,) = [a.started for a in it.run().jobs[0].attempts]
    assert start is not None and it.run().jobs[0].attempts[0].phase is Phase.PROVISIONING
    journal.append("phase", **facts, phase="cancelled", cause="deadline", ended=start + 3600)
    run = it.run()
    assert money.limits(run, Budget(hours=2), start + 7200, 1.0)[0].used == pytest.approx(1)


# A run that nobody drives, and whose job has ended.


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Its driver was killed while its job ran; boot has left since, at the deadline."""
    jobs = [{"looks": 0, "end": "preempted", **DEADLINE}]
    made = scene(tmp_path, recipe(stages=2, budget=Budget(usd=0.5)), jobs=jobs, offers=OFFERS)
    plugged_in(monkeypatch, tmp_path, made.world)
    killed_at(5, made.drive)
    journal = made.journal()
    journal.read()
    facts = {"job": 0, "attempt": 1, "phase": "running", "held": "live", "why": ""}
    began = time.time() - 90
    journal.append("phase", **facts, exit_code=None, cause="", began=began)
    journal.append("stage", id="s0", phase="running")
    noted = {"ended": began + 30, "exit_code": 75, "why": "deadline"}
    (made.root / "attempts").mkdir(parents=True)
    (made.root / "attempts" / "00-0001.json").write_text(json.dumps(noted))
    return made


def test_status_and_costs_agree_on_what_boot_has_ended(alone: Scene) -> None:
    seen = api.status(alone.run_id)
    assert seen.ended is None and seen.driver is not None and seen.driver.alive is False
    lines = console.run_lines(seen, time.time())
    assert lines[0].split("  ")[1:] == ["ended", "by its own word; a driver is still to confirm it"]
    text = "\n".join(lines)
    assert "per hour" not in text and "spent $0.50" in text and "holds live" in text
    assert "running" not in text
    (row,) = costs.costs([seen], time.time()).rows
    assert row.usd_per_hour == 0 and row.usd == pytest.approx(0.5)
    assert console.runs([seen], time.time())[1].split()[1] == "ended"


def test_it_is_brought_to_its_end_and_resumed_with_more(
    alone: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    name, before = api.status(alone.run_id).name, alone.kinds()
    assert cli.run(["resume", name, "--set", "budget.usd=0.4", "--yes", "-d"]) == Exit.BUDGET
    assert cli.run(["resume", name, "--set", "budget.usdd=12", "--yes", "-d"]) == Exit.USAGE
    assert cli.run(["resume", name, "--set", "budget.usd=12", "-d"]) == Exit.USAGE
    assert "costs money, and there is no terminal to ask on" in said(capsys)
    assert alone.kinds() == before, "what is refused leaves it as it is"

    assert cli.run(["resume", name, "--set", "budget.usd=12", "--yes", "-d"]) == 0
    ended = api.wait(name, timeout=60)
    assert (ended.phase, [len(job.attempts) for job in ended.jobs]) == (Phase.SUCCEEDED, [2, 1])
    assert alone.kinds().count("resumed") == 1 and ended.budget["usd"] == 12
    assert alone.world.alive() == []


def test_one_whose_job_works_is_not_changed(tmp_path: Path, alone: Scene) -> None:
    (alone.root / "attempts" / "00-0001.json").unlink()
    assert api.resume_plan(alone.run_id, ["budget.usd=12"]) is None
    with pytest.raises(UsageError, match="is not over"):
        api.resume(alone.run_id, ["budget.usd=12"])
    assert "resumed" not in alone.kinds()


def test_what_costs_nothing_now_has_no_price_per_hour() -> None:
    run = hour_old()
    run.usd_per_hour = 1.0
    assert "$1.00 per hour" in console.run_lines(run, NOW)[1]
    (attempt,) = run.jobs[0].attempts
    attempt.phase, attempt.held, attempt.ended = Phase.CANCELLED, Held.GONE, NOW
    run.phase, run.ended, run.exit_code = Phase.CANCELLED, NOW, 5
    assert "per hour" not in "\n".join(console.run_lines(run, NOW))


# Whom nobody would tell.


def test_a_notify_that_could_tell_nobody_is_said_beforehand(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = tmp_path / "told.yaml"
    file.write_text(
        FILE + "notify:\n  - {webhook: env://HOOK_OF_MINE}\n  - {command: [nosuchprogram, x]}\n"
        "  - {command: [sh]}\n  - {webhook: secret-manager://proj/hook}\n"
    )
    webhook = "webhook env://HOOK_OF_MINE would tell nobody: "
    unset = f"{webhook}HOOK_OF_MINE is not set where the driver runs"
    program = "command nosuchprogram would tell nobody: there is no program nosuchprogram here"
    for command in ("plan", "validate"):
        assert cli.run([command, str(file)]) == 0
        notes = [line for line in said(capsys).splitlines() if line.startswith("note: notify")]
        assert notes == [f"note: notify: {unset}", f"note: notify: {program}"]
    what = load(file)
    rows = [row for row in doctor._of_recipe(what, api.env()) if row.name == "notify"]
    assert [(row.result, row.detail) for row in rows] == [("warn", unset), ("warn", program)]
    assert all(row.fix for row in rows)

    monkeypatch.setenv("HOOK_OF_MINE", "ftp://s3cret.example")
    (first, _) = api.untold(what, api.env())
    assert first == f"notify: {webhook}its address does not begin with https://"
    monkeypatch.setenv("HOOK_OF_MINE", "https://hooks.example/s3cret")
    assert api.untold(what, api.env()) == [f"notify: {program}"]
