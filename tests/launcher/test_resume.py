"""`launch resume` of a run that is over, on a backend that costs money: it says so, and asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import amount, api, cli, console
from launcher.backends.base import Phase
from launcher.errors import BudgetSpent, LaunchError
from launcher.fold import Fold
from launcher.spec import Budget, Hardware, Recipe, Stage
from tests.launcher.runs import Scene, killed_at, plugged_in, recipe, scene
from trainer.config import Data, Model, Source, Train


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


def training(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Scene:
    """A run of 100 steps that has failed."""
    given: dict[str, Any] = {
        "model": Model(name="meta-llama/Llama-3.2-1B", precision="bf16"),
        "hardware": Hardware(backend="fake", accelerator="cpu:1"),
        "train": Train(steps=100), **changes,
    }  # fmt: skip
    data = Data(train=(Source(builtin="python-reference"),))
    one = Stage(id="pretrain", stage="pretrain", data=data, **given)
    made = scene(
        folder,
        Recipe("small", (one,), budget=Budget(hours=10)),
        jobs=[{"looks": 60, "end": "failed"}],
    )
    plugged_in(monkeypatch, folder, made.world)
    made.drive()
    return made


def test_what_is_forecast_are_the_steps_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = training(tmp_path, monkeypatch)
    before = api.resume_plan(it.run_id)
    assert before is not None
    (whole,) = before.jobs[0].forecasts
    assert whole.hours is not None and before.forecast is not None
    for step, name in ((20, "MANIFEST.json"), (60, "MANIFEST.json"), (80, "half.safetensors")):
        file = it.root / "checkpoints" / f"step-{step:08d}" / name
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    after = api.resume_plan(it.run_id)
    assert after is not None
    (rest,) = after.jobs[0].forecasts
    assert rest.hours is not None and after.forecast is not None
    assert rest.hours[1] == pytest.approx(0.4 * whole.hours[1])
    assert after.forecast.hours == rest.hours and (rest.steps, rest.done) == (100, 60)
    assert "from the checkpoint of step 60 on: 40 of 100 steps" in rest.explain


def test_where_the_steps_are_not_known_all_is_counted_and_that_is_said() -> None:
    said = amount.left(amount.Amount(tokens=5.0, how=("a",)), 60)
    assert said.tokens == 5.0
    assert said.how == ("a", "all of it is counted: of how many steps 60 is one is not known")
    assert amount.left(amount.Amount(tokens=5.0, steps=50), 60).tokens == 0


def test_the_budget_of_a_resumed_run_is_what_is_left_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = training(tmp_path, monkeypatch, train=Train(steps=10_000_000))
    file = it.root / "checkpoints" / "step-05000000" / "MANIFEST.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    plan = api.resume_plan(it.run_id, ["budget.hours=0.5"])
    assert plan is not None and plan.forecast is not None
    (note,) = plan.forecast.notes
    assert plan.hours is not None and plan.hours < 0.49  # its first attempt took some
    left = f"{round(plan.hours, 2):g}"
    assert note.startswith(f"budget.hours ({left}) ends pretrain at step ~5,000,000 of 10,000,000")


def test_weights_that_exceed_the_device_are_refused_and_nothing_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = Model(name="meta-llama/Llama-3.1-70B", precision="bf16")
    it = training(tmp_path, monkeypatch, model=large,
                  hardware=Hardware(backend="fake", accelerator="L4:1"))  # fmt: skip
    before = it.kinds()
    assert cli.run(["resume", it.run().name, "--yes", "--detach"]) == 2
    assert "pretrain: the weights alone are" in capsys.readouterr().err
    with pytest.raises(LaunchError, match="the weights alone are"):
        api.resume(it.run_id)
    assert it.kinds() == before and it.run().ended is not None


def test_what_does_not_fit_is_in_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    it = training(tmp_path, monkeypatch, train=Train(steps=100, micro_batch=64),
                  hardware=Hardware(backend="fake", accelerator="L4:1"))  # fmt: skip
    asked: list[str] = []
    monkeypatch.setattr(console, "confirm", lambda question, refusal: asked.append(question))
    assert cli.run(["resume", it.run().name]) == 0
    assert asked == ["pretrain does not fit, by the forecast. Go on with it?"]
    assert "memory: " in capsys.readouterr().err


def test_the_time_in_which_a_run_was_over_is_not_its_own(it: Scene) -> None:
    run = it.run()
    assert run.ended is not None
    lasted = run.lasted(run.ended)
    again = Fold(it.records())
    who = {"host": "here", "pid": 1}
    again.apply({"kind": "resumed", "time": run.ended + 500, "driver": who})
    assert again.run.lasted(run.ended + 510) == pytest.approx(lasted + 10)
