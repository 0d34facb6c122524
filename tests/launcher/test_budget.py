"""A budget holds: by the engine, by boot alone, over attempts; and what it has left is shown."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import launcher.plan as planning
from launcher import backends, console, engine, home, money, recipe, records, view
from launcher.backends.base import Env, Held, Phase
from launcher.bundle import Bundle
from launcher.clock import ManualClock
from launcher.commands.live import draw
from launcher.errors import Exit
from launcher.fold import Fold
from launcher.run import Attempt, JobState, Run, StageState
from launcher.spec import Budget, Hardware, Retry
from tests.launcher import rehearsed, runs
from tests.launcher import test_vertex_engine as vertex
from tests.launcher.runs import Scene, killed_at, scene
from tests.test_end_to_end import Shell, live_processes, until
from trainer.boot import Spec
from trainer.supervise import _Watch

from launcher.rehearsal.vertex import PREEMPTED, Stub  # isort: skip

KD_L4 = Path(__file__).resolve().parents[2] / "recipes" / "kd_l4.yaml"
NOW = 1_795_000_000.0
#: What may be spent beyond a cap: a minute to save in, the margin before a job is deleted, a look.
TOLERANCE = 120.0

TINY = """\
launch: 1
name: cap
hardware: {backend: local, accelerator: "cpu:1", usd_per_hour: 3600}
budget: {usd: 25}
data:
  train: [{builtin: python-reference, split: train, share: 0.1}]
  sequence_length: 64
train: {steps: 1000000, micro_batch: 2, lr: 3.0e-3, log_every: 20, save_every: 1000000}
pipeline:
  - {id: tokenizer, stage: tokenizer, tokenizer: {vocab_size: 300}}
  - id: model
    stage: pretrain
    model:
      init: random
      tokenizer: ${stage:tokenizer}
      architecture: {hidden_size: 32, layers: 2, heads: 4}
"""


# The whole way: the command line, a driver, boot and a real trainer.


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Shell]:
    file = tmp_path / "cap.yaml"
    file.write_text(TINY)
    shell = Shell(tmp_path / "home", file)
    yield shell
    shell("teardown", "--all", "--yes")
    assert live_processes(shell.home) == []


def test_at_its_cap_a_run_saves_and_ends_also_when_its_driver_is_gone(launch: Shell) -> None:
    """A dollar a second. The second run loses its driver as soon as its job runs. What a slow
    machine does not even begin within a cap leaves no checkpoint: then the cap is a larger one."""
    for cap in (20, 60, 100):
        driven, alone = _both_at_their_cap(launch, cap)
        if _trained(launch, driven) and _trained(launch, alone):
            break
    ended = launch.over(driven)
    _at_its_cap(ended, cap)
    launch("attach", driven, code=Exit.BUDGET)

    lost = launch.run(alone)
    assert lost["ended"] is None and lost["spent_usd"] < cap + TOLERANCE
    (said,) = [text for text in lost["warnings"] if "its job ended at" in text]
    assert said.endswith("deadline (exit code 75)")
    before = lost["spent_usd"]
    assert launch.run(alone)["spent_usd"] == before, "nothing bills any more"
    told = launch("resume", alone, "--yes", code=Exit.BUDGET)
    assert f"raise it: launch resume {alone} --set budget.usd={2 * cap}" in told
    ended = launch.over(alone)
    _at_its_cap(ended, cap)
    assert ended["spent_usd"] == pytest.approx(before, abs=1), "however late somebody looks"
    assert "the budget is spent" in launch("resume", alone, "--yes", code=Exit.BUDGET)


def _both_at_their_cap(launch: Shell, cap: int) -> tuple[str, str]:
    """The names of a run whose driver has ended it, and of one that boot alone has ended."""
    usd = f"budget.usd={cap}"
    driven = launch.start("--new", "--set", usd)
    alone = launch.start("--new", "--set", usd, "--set", "name=alone")
    until(lambda: launch.boot(alone)["state"] == "running")
    who = home.holder(home.folder(launch.home, launch.run(alone)["id"]))
    assert who is not None
    os.kill(who["pid"], signal.SIGKILL)
    launch.over(driven)
    until(lambda: not live_processes(launch.home), 2 * cap + 60)
    return driven, alone


def _trained(launch: Shell, name: str) -> bool:
    return bool(records.progress(Path(launch.run(name)["root"]) / "model"))


def _at_its_cap(run: dict[str, Any], cap: int) -> None:
    assert (run["phase"], run["exit_code"], run["held"]) == ("cancelled", Exit.BUDGET, "gone")
    assert run["why"].startswith("stopped at budget.usd: ") and f" of {cap}.00 USD" in run["why"]
    assert 0.9 * cap - 1 < run["spent_usd"] < cap + TOLERANCE
    folder = Path(run["root"]) / "model" / "checkpoints"
    last = json.loads((folder / "last.json").read_text())["path"]
    assert (folder / last / "MANIFEST.json").exists()
    assert f" at step {last.removeprefix('step-')};" in run["why"]
    (attempt,) = run["jobs"][0]["attempts"]
    assert (attempt["why"], attempt["usd_per_hour"]) == ("deadline", 3600)


# On the virtual clock: how far beyond a cap a run may go, and what it says.


def drive(folder: Path, usd_per_hour: float, *jobs: Any, **budget: Any) -> tuple[Scene, Run]:
    offers = [{"place": "a", "capacity": "spot", "usd_per_hour": usd_per_hour}]
    made = runs.recipe(budget=Budget(**budget), retry=Retry(infrastructure=0))
    it = scene(folder, made, offers=offers, jobs=[*jobs])
    return it, it.drive()


def test_a_job_that_does_not_listen_costs_no_more_than_the_tolerance(tmp_path: Path) -> None:
    it, run = drive(tmp_path, 3600.0, {"looks": None, "stubborn": True}, usd=3600)
    assert (run.phase, run.exit_code, run.held) == (Phase.CANCELLED, Exit.BUDGET, Held.GONE)
    assert run.spent_usd is not None and 3600 <= run.spent_usd <= 3600 + TOLERANCE
    assert it.world.alive() == []


def test_one_that_listens_ends_a_look_after_the_cap(tmp_path: Path) -> None:
    _, run = drive(tmp_path, 3600.0, {"looks": None}, usd=3600)
    assert run.spent_usd is not None and 3600 <= run.spent_usd <= 3600 + 35
    assert run.why == (
        f"stopped at budget.usd: {run.spent_usd:.2f} of 3600.00 USD after 1h00m; "
        f"raise it: launch resume {run.name} --set budget.usd=7200"
    )


def test_of_a_budget_lowered_below_what_was_spent_the_advice_is_enough(tmp_path: Path) -> None:
    _, run = drive(tmp_path, 3600.0, {"looks": None}, usd=3600)
    said = money.stopped(run, Budget(usd=600), NOW, 3600.0, None)
    advised = float(said.rpartition("=")[2])
    assert advised == pytest.approx(2 * (run.spent_usd or 0.0), abs=0.01)


@pytest.mark.parametrize(
    ("budget", "said"),
    [({"hours": 0.0001}, "--set budget.hours=0.1"), ({"usd": 0.001}, "--set budget.usd=0.01")],
)
def test_the_advice_after_a_budget_of_seconds_is_one_that_a_recipe_takes(
    tmp_path: Path, budget: dict[str, float], said: str
) -> None:
    _, run = drive(tmp_path, 1.0, {"looks": None}, **budget)
    advised = money.stopped(run, Budget(**budget), NOW, 1.0, None)
    assert advised.endswith(said)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"usd": 2.0, "hours": 3.0}, ("budget.usd: 2.0", "of 2.00 USD", "budget.usd=4")),
        ({"usd": 9.0, "hours": 0.5}, ("budget.hours: 0.5", "of 0.50 h", "budget.hours=1")),
    ],
)
def test_the_limit_that_woke_first_is_the_one_that_is_named(
    tmp_path: Path, budget: dict[str, float], said: tuple[str, ...]
) -> None:
    _, run = drive(tmp_path, 4.0, {"looks": None}, **budget)
    assert run.exit_code == Exit.BUDGET and all(word in run.why for word in said), run.why
    assert run.why.startswith(f"stopped at {said[0]}") and "after 30m" in run.why


def test_a_second_attempt_has_what_the_first_has_left(tmp_path: Path) -> None:
    it, run = drive(tmp_path, 3600.0, {"looks": 200, "end": "preempted"}, {"looks": None}, usd=3600)
    first, _ = run.jobs[0].attempts
    assert first.ended is not None and first.began is not None
    deadlines = [
        record["intent"]["request"]["boot"]["deadline_seconds"]
        for record in it.records()
        if record["kind"] == "intent"
    ]
    assert deadlines == [3600, pytest.approx(3600 - (first.ended - first.began), abs=35)]
    assert run.spent_usd is not None and run.spent_usd <= 3600 + 35


def test_a_job_in_the_cloud_is_told_what_is_left_of_the_dollars(tmp_path: Path) -> None:
    """Twenty minutes of the hour that the dollars pay for are gone when it is taken away."""
    with rehearsed.scene(tmp_path / "home") as it:
        it.home.mkdir()
        (stage,) = vertex.recipe().stages
        machine = replace(stage.hardware, usd_per_hour=12.0)
        made = vertex.recipe(stages=(replace(stage, hardware=machine),), budget=Budget(usd=12))
        it.server.vertex.fates.extend([Stub(600, 1, 1200, PREEMPTED), Stub(900, 1, 86_400)])
        run = vertex.drive(it, made)
        timeouts = [job["jobSpec"]["scheduling"]["timeout"] for job in it.server.vertex.created]
        assert timeouts == ["3600s", "2400s"] and vertex.nothing_is_left(it)
    assert (run.phase, run.exit_code) == (Phase.CANCELLED, Exit.BUDGET)
    assert run.spent_usd is not None and 12 <= run.spent_usd <= 12 + 12 * TOLERANCE / 3600
    assert run.why.startswith("stopped at budget.usd: 12.0") and "after 1h00m" in run.why


def test_a_service_that_ends_jobs_itself_is_not_waited_for(tmp_path: Path) -> None:
    """Of an hour the job gets six minutes to save in, however late its boot began."""
    with rehearsed.scene(tmp_path / "home") as it:
        it.home.mkdir()
        it.server.vertex.fates.append(Stub(5, 5, 86_400))
        run_id = vertex.begin(it, vertex.recipe(budget=Budget(hours=1)))
        run = engine.drive(run_id, it.env, vertex.load)
        place = home.folder(it.env.home, run_id)
        written = [json.loads(file.read_text()) for file in sorted((place / "journal").iterdir())]
    (attempt,) = run.jobs[0].attempts
    (asked,) = [record["time"] for record in written if record["kind"] == "stop"]
    assert attempt.began is not None and attempt.ended is not None
    assert asked - attempt.began == pytest.approx(3600 - 360, abs=20)
    assert attempt.ended - attempt.began == pytest.approx(3600, abs=20), "it did not listen"
    assert run.exit_code == Exit.BUDGET


def test_boot_keeps_to_the_time_that_was_kept_for_saving(tmp_path: Path) -> None:
    """Of a deadline it gives the trainer its reserve, of a short one a minute; else the grace."""
    for deadline, kept in ((6000.0, 600.0), (1200.0, 120.0), (25.0, 60.0)):
        watch = _Watch(_boot(tmp_path, deadline_seconds=deadline), [])
        assert watch.grace == 600.0
        watch.reason = "deadline"
        assert watch.grace == kept
    strict = _Watch(_boot(tmp_path, deadline_seconds=6000.0, grace_seconds=30.0), [])
    strict.reason = "deadline"
    assert strict.grace == 30.0


def _boot(folder: Path, **given: Any) -> Spec:
    raw = {
        "schema": 1, "run": "r", "job": {}, "bundle": {"url": "b", "sha256": "0", "bytes": 1},
        "root": str(folder), "work": str(folder), "job_index": 0, "attempt": 1, "workers": 1,
        "nodes": 1, "grace_seconds": 600, **given,
    }  # fmt: skip
    (folder / "boot.json").write_text(json.dumps(raw))
    return Spec(str(folder / "boot.json"))


# Prices of the recipe's own.


def test_the_price_of_the_recipe_counts_instead_of_every_table(tmp_path: Path) -> None:
    env = Env(tmp_path, {}, ManualClock(), "me", "python3")
    own = {"usd_per_hour": 2.5}
    (here,) = backends.load("local").offers(Hardware(**own), env)  # type: ignore[arg-type]
    assert (here.usd_per_hour, here.price_source) == (2.5, "the recipe")
    (free,) = backends.load("local").offers(Hardware(), env)
    assert (free.usd_per_hour, free.price_source) == (0.0, "")
    cloud = Hardware("vertex", "L4:1", 2, ("spot", "flex"), ("us-central1", "nowhere1"), **own)  # type: ignore[arg-type]
    offers = list(backends.load("vertex").offers(cloud, env))
    assert [(o.usd_per_hour, o.price_source) for o in offers] == [(5.0, "the recipe")] * 4
    dated = list(backends.load("vertex").offers(replace(cloud, usd_per_hour=None), env))
    assert [o.usd_per_hour is None for o in dated] == [False, True, True, True]


def test_a_local_plan_with_a_price_is_capped_and_one_without_is_free(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(TINY)
    env = Env(tmp_path, {}, ManualClock(), "me", "python3")
    bundle = Bundle(Path("/b.tar.gz"), "ab" * 32, 1000)
    plan = planning.make(recipe.load(file, environ={}).recipe, env, bundle)
    assert (plan.usd_per_hour, plan.usd_total) == (3600, 25)
    assert any("3600.00 USD/h (the recipe)" in line for line in plan.lines())
    deadline = plan.jobs[0].intents[0].request["boot"]["deadline_seconds"]
    assert deadline == "${deadline}"
    free = recipe.load(file, ["hardware.usd_per_hour=null"], environ={}).recipe
    assert planning.make(free, env, bundle).usd_total == 0
    dear = recipe.load(file, ["budget.usd_per_hour=3000"], environ={}).recipe
    refused = planning.make(dear, env, bundle).refusal
    assert refused is not None and refused.exit_code == Exit.BUDGET
    stays = recipe.load(file, [], "local", environ={}).recipe
    assert stays.stages[0].hardware.usd_per_hour == 3600
    (tmp_path / "cloud.yaml").write_text(f"extends: {KD_L4}\nhardware: {{usd_per_hour: 3}}\n")
    for on, price in ((None, 3), ("local", None)):
        moved = recipe.load(tmp_path / "cloud.yaml", [], on, environ={}).recipe
        assert moved.stages[0].hardware.usd_per_hour == price, "another machine, another price"
    with pytest.raises(recipe.RecipeErrors, match=r"hardware\.usd_per_hour: must be greater than"):
        recipe.load(file, ["hardware.usd_per_hour=0"], environ={})


# What is to come.


def live(progress: Any = None, rate: Any = 1.0, **budget: Any) -> Run:
    """A run that has worked for an hour."""
    attempt = Attempt(
        1, Phase.RUNNING, Held.LIVE, place="a", started=NOW - 3700, began=NOW - 3600,
        usd_per_hour=rate, capacity="spot",
    )  # fmt: skip
    return Run(
        id="1", name="thing-1", recipe="thing", fingerprint="f", owner="me", root="/r",
        created=NOW - 4000, stages=[StageState("s", "kd", 0, "/r"), StageState("t", "kd", 0, "/r")],
        jobs=[JobState(0, "thing-1-j0", "fake", ["s", "t"], [attempt])], budget=budget,
        progress=progress or {},
    )  # fmt: skip


def shown(run: Run) -> str:
    run.money = money.outlook(run, NOW)
    return console.outlook(run)


def test_the_cap_comes_before_the_end() -> None:
    run = live({"eta_seconds": 4 * 3600.0, "stage": "t"}, usd=3.0)
    assert shown(run) == (
        "$1.00 per hour now · budget.usd 1.00 of 3.00 USD, reached in 2h00m, before its end in "
        "4h00m · about $5.00 at its end, in 4h00m"
    )
    assert run.money["limit_first"] is True and run.to_json()["money"]["end_usd"] == 5.0


def test_the_live_view_shows_it() -> None:
    from rich.console import Console

    run = live({"eta_seconds": 1800.0, "stage": "t"}, usd=3.0)
    run.money = money.outlook(run, NOW)
    screen = Console(width=120, record=True, file=io.StringIO())
    screen.print(draw(run, NOW, 120))
    drawn = screen.export_text()
    assert "budget.usd 1.00 of 3.00 USD, reached in 2h00m" in drawn
    assert "$1.00 per hour now" in drawn and "about $1.50 at its end" in drawn


def test_the_end_comes_before_the_cap_and_other_stages_are_not_counted() -> None:
    run = live({"eta_seconds": 1800.0, "stage": "s"}, usd=3.0, hours=9)
    assert shown(run) == (
        "$1.00 per hour now · budget.usd 1.00 of 3.00 USD, reached in 2h00m · "
        "about $1.50 at the end of stage s, in 30m00s"
    )


@pytest.mark.parametrize(("eta", "first"), [(6500.0, False), (6700.0, True)])
def test_what_is_kept_for_saving_counts_as_the_cap(eta: float, first: bool) -> None:
    """Two hours are left, of which the job keeps ten minutes."""
    run = live({"eta_seconds": eta, "stage": "t"}, usd=3.0)
    assert money.outlook(run, NOW)["limit_first"] is first


def test_hours_alone_and_prices_that_nobody_knows() -> None:
    assert shown(live(hours=3, rate=0.0)).endswith("budget.hours 1.00 of 3.00 h, reached in 2h00m")
    run = live(usd=3.0, rate=None)
    assert shown(run) == "price unknown"
    assert run.money["uncapped"].startswith("the price of spot in a is unknown: budget.usd does")
    assert shown(live(rate=0.0)) == ""


def test_what_waits_for_machines_burns_nothing() -> None:
    run = live(usd=3.0)
    run.jobs[0].attempts[0].phase, run.jobs[0].attempts[0].began = Phase.QUEUED, None
    assert money.burn(run) == 0.0
    run.jobs[0].attempts[0].phase, run.jobs[0].attempts[0].ended = Phase.PREEMPTED, NOW
    assert money.burn(run) == 0.0 and "limit" not in money.outlook(run, NOW)


def test_status_shows_it_and_warns_where_a_price_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offers = [{"place": "a", "capacity": "spot", "usd_per_hour": None}]
    made = runs.recipe(budget=Budget(usd=2.0))
    it = scene(tmp_path, made, offers=offers, jobs=[{"looks": None}])
    killed_at(9, it.drive)  # when its job was seen to run
    run = Fold(it.records()).run
    assert run.budget == {"usd": 2.0} and run.ended is None
    seen = view.look(it.env, {"id": run.id, "name": run.name, "root": run.root})
    assert any("budget.usd does not cap it" in text for text in seen.warnings)
    assert any("price unknown" in line for line in console.run_lines(seen, it.env.clock.now()))
