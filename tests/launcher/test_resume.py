"""`launch resume` of a run that is over, on a backend that costs money: it says so, and asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import api, cli, console
from launcher.backends.base import Phase
from launcher.errors import BudgetSpent
from launcher.fold import Fold
from launcher.spec import Budget
from tests.launcher.runs import Scene, killed_at, plugged_in, recipe, scene


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Two jobs; the first has succeeded, the second has failed."""
    made = scene(tmp_path, recipe(stages=2, budget=Budget(hours=10)), jobs=[{}, {"end": "failed"}])
    plugged_in(monkeypatch, tmp_path, made.world)
    made.drive()
    yield made


def test_without_a_terminal_it_refuses_and_starts_nothing(
    it: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    before = it.kinds()
    assert cli.run(["resume", it.run().name]) == 2
    said = capsys.readouterr().err
    assert "costs money, and there is no terminal to ask on" in said and "add --yes" in said
    assert it.kinds() == before and it.run().ended is not None


def test_it_shows_what_is_left_to_do_and_what_that_costs(
    it: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    name = it.run().name
    cli.run(["resume", name])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "thing: 1 stage in 1 job"
    assert lines[1:4] == [
        "job 1: s1", "  needs cpu:2 (fake)", "  place here, standard: 1.00 USD/h",
    ]  # fmt: skip
    assert lines[4] == f"  creates machine {name}-j1-a2 (bills)"
    assert lines[5].startswith("cost: 1.00 USD/h, at most 10.00 USD (9.99")


def test_a_no_leaves_it_as_it_was(
    it: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = it.kinds()
    monkeypatch.setattr(console, "confirm", lambda question, refusal: False)
    assert cli.run(["resume", it.run().name]) == 0
    assert "nothing was started" in capsys.readouterr().err and it.kinds() == before


def test_yes_goes_on_with_the_job_that_failed(it: Scene) -> None:
    name = it.run().name
    assert cli.run(["resume", name, "--yes", "--detach"]) == 0
    run = api.wait(name, timeout=60)
    assert run.phase is Phase.SUCCEEDED
    assert [len(job.attempts) for job in run.jobs] == [1, 2]


def test_what_the_run_has_spent_is_taken_off(tmp_path: Path, it: Scene) -> None:
    plan = api.resume_plan(it.run().id, ["budget.usd=5"])
    assert plan is not None and plan.usd_total is not None
    assert plan.usd_total == pytest.approx(5 - (it.run().spent_usd or 0.0))
    assert it.run().spent_usd and any("USD are spent already" in note for note in plan.notes)


def test_a_run_that_only_lost_its_driver_is_not_asked_about_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = scene(tmp_path, jobs=[{"looks": None}])
    plugged_in(monkeypatch, tmp_path, it.world)
    killed_at(8, it.drive)
    assert api.resume_plan(it.run_id) is None


def test_a_spent_budget_opens_nothing_until_it_is_raised(
    it: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    before, name = it.kinds(), it.run().name
    little = ["--set", "budget.hours=0.01", "--set", "budget.usd=3"]
    assert cli.run(["resume", name, "--yes", "--detach", *little]) == 5
    said = capsys.readouterr().err
    assert "the budget is spent (budget.hours: 0.01, budget.usd: 3)" in said
    assert f"launch resume {name} --set budget.hours=MORE" in said
    with pytest.raises(BudgetSpent):
        api.resume(name, ["budget.hours=0.01"])
    assert it.kinds() == before and it.run().ended is not None
    assert api.resume_plan(name, ["budget.hours=5"]) is not None


def test_the_time_in_which_a_run_was_over_is_not_its_own(it: Scene) -> None:
    run = it.run()
    assert run.ended is not None
    lasted = run.lasted(run.ended)
    again = Fold(it.records())
    who = {"host": "here", "pid": 1}
    again.apply({"kind": "resumed", "time": run.ended + 500, "driver": who})
    assert again.run.lasted(run.ended + 510) == pytest.approx(lasted + 10)
