"""A recipe against a run: what each key takes, and what a live run takes up without a stop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml

from launcher import amend, api, bundle, changes, cli, console, engine, home, start
from launcher.backends.base import Phase
from launcher.clock import ManualClock
from launcher.difference import RULES, WORDS, Change, Difference, rule
from launcher.errors import HeldElsewhere
from launcher.fold import Fold
from launcher.plan import make
from launcher.recipe import Loaded, load
from launcher.run import Run
from launcher.spec import Budget, Recipe, Retry, Stage
from tests.launcher import bucketed
from tests.launcher.fake_backend import World
from tests.launcher.runs import DEADLINE, Scene, killed_at, plugged_in, recipe, scene
from tests.test_docs import ROOT, _table
from trainer.config import Train, to_dict

TRAINING = """
launch: 1
name: small
stage: pretrain
model: {init: random, tokenizer: org/tok, architecture: {hidden_size: 64, heads: 4}}
data:
  train: [{builtin: python-reference}]
  validation: [{builtin: python-reference}]
train: {steps: 20, lr: 1e-4}
hardware: {backend: fake, accelerator: "cpu:1"}
budget: {hours: 5, usd: 30}
"""
PIPELINE = """
launch: 1
name: three
data: {train: [{builtin: python-reference}]}
hardware: {backend: fake}
tokenizer: {vocab_size: 300}
pipeline:
  - {id: one, stage: tokenizer}
  - {id: two, stage: tokenizer}
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path / "world")
    plugged_in(monkeypatch, tmp_path, made)
    return made


def loaded(folder: Path, text: str, *overrides: str) -> Loaded:
    folder.mkdir(exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(text)
    return load(file, overrides)


class Live:
    """A run of a recipe in a home, as its journal tells; no process drives it."""

    def __init__(self, folder: Path, text: str, **script: Any) -> None:
        self.folder, self.text = folder, text
        self.scene = scene(folder, loaded(folder, text).recipe, **script)
        self.packed = bundle.Bundle(folder / "bundle.tar.gz", "0" * 64, 7)

    def against(self, *overrides: str, text: str = "") -> Difference:
        env = self.scene.env
        run = api.status(self.scene.run_id)
        return amend.differ(env, run, loaded(self.folder, text or self.text, *overrides),
                            self.packed)  # fmt: skip

    def effects(self, *overrides: str, text: str = "") -> dict[str, str]:
        return {c.path: c.effect for c in self.against(*overrides, text=text).changes}

    def record(self, kind: str, **facts: Any) -> None:
        journal = self.scene.journal()
        journal.read()
        journal.append(kind, **facts)

    def begun(self, stage: str) -> None:
        """The stage runs: an attempt was placed for it, and it was seen."""
        offer = {"backend": "fake", "place": "here", "accelerator": "cpu:1", "capacity": "standard",
                 "usd_per_hour": 1.0}  # fmt: skip
        intent = {"kind": "machine", "name": "m", "place": "here", "request": {}, "billable": True}
        self.record("intent", job=0, attempt=1, intent=intent, offer=offer)
        self.record("stage", id=stage, phase="running")


@pytest.fixture
def live(tmp_path: Path, world: World) -> Live:
    made = Live(tmp_path, TRAINING)
    made.begun("pretrain")
    return made


# The table.


def test_every_key_of_a_recipe_has_a_row_of_its_own_or_of_its_block() -> None:
    top = {field.name for field in dataclasses.fields(Recipe)} - {"stages"}
    stage = {field.name for field in dataclasses.fields(Stage)}
    assert top | stage <= RULES.keys()
    names = {f"train.{field.name}" for field in dataclasses.fields(Train)}
    assert {key for key in RULES if key.startswith("train.")} <= names
    assert rule("train.lr") == RULES["train"] and rule("train.seed") == RULES["train.seed"]
    assert rule("budget.usd")[0] == "now" and rule("budget.usd_per_hour")[0] == "next attempt"
    assert rule("model.adapter.rank")[0] == "new run" and rule("a.block.of.later")[0] == "resume"


def test_the_page_has_the_same_table() -> None:
    page = ROOT / "docs" / "run.md"
    assert _table(page, "Changing a live run") == {
        key: WORDS[effect] for key, (effect, _) in RULES.items()
    }
    text = page.read_text()
    for key, (_, why) in RULES.items():
        assert f"| `{key}` |" in text and f"| {why} |" in text


# What differs.


def test_the_same_recipe_differs_in_nothing(live: Live) -> None:
    found = live.against()
    assert found.changes == () and found.unchanged > 50
    assert found.lines("r.yaml")[0].endswith(": the same recipe")
    assert found.ours == found.theirs


@pytest.mark.parametrize(
    ("override", "effect"),
    [
        ("budget.usd=60", "now"),
        ("budget.wait=2h", "now"),
        ("budget.usd_per_hour=3", "next attempt"),
        ("retry.preempted=3", "now"),
        ("description=words", "none"),
        ("train.lr=2e-4", "resume"),
        ("train.steps=40", "resume"),
        ("train.accumulate=2", "resume"),
        ("train.save_every=5", "resume"),
        ("train.weight_decay=0.2", "new run"),
        ("train.seed=1", "new run"),
        ("model.precision=bf16", "resume"),
        ("model.freeze=[model.embed_tokens.weight]", "new run"),
        ("data.sequence_length=512", "new run"),
        ("data.validation=[]", "resume"),
        ("data.train.0.weight=2", "new run"),
        ("env.NCCL_DEBUG=WARN", "resume"),
        ("hardware.accelerator=cpu:2", "resume"),
        ("artifacts=/elsewhere", "new run"),
    ],
)
def test_a_key_takes_what_its_row_says(live: Live, override: str, effect: str) -> None:
    path = override.partition("=")[0]
    assert live.effects(override) == {path: effect}


def test_another_backend_needs_another_run(live: Live) -> None:
    moved = TRAINING.replace("backend: fake", "backend: local")
    assert set(live.effects(text=moved).values()) == {"new run"}


def test_a_stage_that_has_not_begun_may_still_change_what_its_checkpoints_would_hold(
    tmp_path: Path, world: World
) -> None:
    live = Live(tmp_path, TRAINING)
    assert live.effects("data.sequence_length=512") == {"data.sequence_length": "resume"}
    manifest = live.scene.root / "checkpoints" / "step-5" / "MANIFEST.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    assert live.effects("data.sequence_length=512") == {"data.sequence_length": "new run"}


def test_stages_of_a_pipeline_are_compared_by_their_ids(tmp_path: Path, world: World) -> None:
    live = Live(tmp_path, PIPELINE)
    at = "pipeline.two.tokenizer.vocab_size"
    assert live.effects(f"{at}=400") == {at: "resume"}
    assert live.against(f"{at}=400").overrides() == [f"{at}=400"]
    more = PIPELINE + "  - {id: three, stage: tokenizer}\n"
    assert live.effects(text=more) == {"pipeline.three": "new run"}
    # A machine of its own for one of the stages cuts the jobs otherwise.
    assert live.effects("pipeline.two.hardware.accelerator=cpu:2") == {
        "pipeline.two.hardware.accelerator": "new run"
    }
    live.record("stage", id="one", phase="succeeded")
    (change,) = live.against("pipeline.one.tokenizer.vocab_size=400").changes
    assert (change.effect, change.why) == ("new run", "stage 'one' is completed")


def test_a_run_that_is_over_changes_when_it_is_resumed_and_a_complete_one_not(
    tmp_path: Path, world: World
) -> None:
    live = Live(tmp_path, TRAINING, jobs=[{"end": "failed"}])
    live.scene.drive()
    found = live.against("budget.usd=60", "train.lr=2e-4")
    assert {c.effect for c in found.changes} == {"resume"} and not found.in_place
    advice = found.lines("r.yaml")[-1]
    name = live.scene.run().name
    assert advice == f"  `launch resume {name} --set budget.usd=60 --set train.lr=0.0002`"
    done = Live(tmp_path / "done", TRAINING)
    done.scene.drive()
    env = done.scene.env
    run = amend.view.look(env, home.find(env.home, done.scene.run_id))
    found = amend.differ(env, run, loaded(tmp_path, TRAINING, "budget.usd=60"), done.packed)
    assert [c.why for c in found.changes] == ["the run is complete"]


@pytest.mark.parametrize(
    "override",
    ["train.lr=1e-5", "train.report_to=[wandb, tensorboard]", "env.A='b: c # \"d\" $${e}'",
     "env.A=no", "env.A='12'", "env={A: b c, D: -1e-5x}", "train.until=10", "budget.wait=90s"],
)  # fmt: skip
def test_the_resume_that_is_advised_makes_the_recipe_that_was_compared(
    live: Live, override: str
) -> None:
    live.record("end", phase="cancelled", why="stopped", exit_code=0)
    found = live.against(override)
    wanted = loaded(live.folder, TRAINING, override).canonical
    assert found.changes
    live.scene.resume(*found.overrides())
    assert Fold(live.scene.records()).recipe == wanted


def test_another_trainer_is_told_and_a_resume_keeps_the_old_one(live: Live) -> None:
    live.packed = bundle.Bundle(live.packed.path, "1" * 64, 7)
    (change,) = live.against().changes
    assert (change.path, change.before, change.effect) == ("bundle", "0" * 12, "new run")
    live.record("end", phase="cancelled", why="stopped", exit_code=0)
    live.scene.resume()
    assert Fold(live.scene.records()).bundle["sha256"] == "0" * 64


def test_the_requests_of_both_are_told_exactly(live: Live) -> None:
    told = live.against("hardware.places=[x]", "train.lr=2e-4").to_json()
    name = live.scene.run().name
    ours, theirs = told["requests"]["run"], told["requests"]["recipe"]
    assert [i["name"] for i in ours] == [i["name"] for i in theirs] == [f"{name}-j0-a${{attempt}}"]
    lr = [i[0]["request"]["boot"]["job"]["stages"][0]["train"]["lr"] for i in (ours, theirs)]
    assert lr == [1e-4, 2e-4]
    assert told["requests"]["sent"][0]["name"] == "m"
    change = next(c for c in told["changes"] if c["path"] == "train.lr")
    assert change == {"path": "train.lr", "from": 1e-4, "to": 2e-4, "effect": "resume",
                      "why": RULES["train"][1]}  # fmt: skip
    json.dumps(told)


def test_a_line_says_the_key_the_values_and_what_it_takes() -> None:
    line = Change("train.lr", 1e-4, 2e-4, *RULES["train"]).line()
    assert line == "! train.lr: 0.0001 -> 0.0002  at a resume: from the last checkpoint on"
    long = Change("env.A", None, "x" * 90 + "y", "new run", "why").line()
    assert long == f"x env.A: none -> {'x' * 28}...{'x' * 28}y  needs a new run: why"


def test_the_request_of_a_job_is_compared_value_by_value(live: Live, tmp_path: Path) -> None:
    file, env = ROOT / "recipes" / "kd_l4.yaml", live.scene.env
    plans = [
        make(load(file, overrides).recipe, env, live.packed, live.scene.run_id).jobs[0]
        for overrides in ([], ["hardware.vertex.image=europe-docker.pkg.dev/p/r/other:2",
                               "hardware.vertex.disk_gb=500", "train.lr=0.5"])
    ]  # fmt: skip
    ours, theirs = ({plan.name: plan.intents} for plan in plans)
    found = dataclasses.replace(live.against(), ours=ours, theirs=theirs)
    told = [line for line in found.lines("r.yaml") if line.startswith("  request ")]
    at = f"  request {plans[0].name}-aN: body.jobSpec.workerPoolSpecs.0."
    assert [line.removeprefix(at).partition(" -> ")[0] for line in told if "Pool" in line] == [
        "containerSpec.imageUri: us-central1-docker.pkg.dev/my-project/launch/trainer:1",
        "diskSpec: none",
    ]
    many = {plans[0].name: [dataclasses.replace(plans[0].intents[-1], request={
        str(n): n for n in range(20)})]}  # fmt: skip
    lines = dataclasses.replace(found, theirs=many).lines("r.yaml")
    assert sum(line.startswith("  request ") for line in lines) == 8
    assert any("more values of requests: --json" in line for line in lines)


# Which run.


def test_it_is_compared_with_the_newest_live_run_of_its_name_owner_and_project(
    tmp_path: Path, world: World
) -> None:
    what = loaded(tmp_path, TRAINING)
    env, packed = api.env(), bundle.Bundle(tmp_path / "b", "0" * 64, 7)
    assert amend.find(env, what, packed) is None

    def made(at: float, owner: str = "me", text: str = TRAINING) -> str:
        theirs = dataclasses.replace(env, owner=owner, clock=ManualClock(at))
        run_id: str = start.create(loaded(tmp_path, text, "train.lr=0.5"), packed, theirs)["id"]
        return run_id

    older, newer = made(1.7e9), made(1.8e9)
    made(1.81e9, owner="you")
    made(1.82e9, text=TRAINING.replace("name: small", "name: smaller"))
    found = amend.find(env, what, packed)
    assert found is not None and found.run.id == newer and not found.same
    (home.folder(env.home, newer) / "artifacts" / "control").mkdir(parents=True)
    (home.folder(env.home, newer) / "artifacts" / "control" / "stop.json").write_text("{}")
    found = amend.find(env, what, packed)
    assert found is not None and found.run.id == older
    same = amend.find(env, loaded(tmp_path, TRAINING, "train.lr=0.5"), packed)
    assert same is not None and same.same and same.run.id == older
    cloud = dataclasses.replace(env, environ={**env.environ, "GOOGLE_CLOUD_PROJECT": "another"})
    assert amend.find(cloud, what, packed) is None


# In place.


class Meddling(ManualClock):
    """A clock on which something happens once, while somebody waits."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act: Optional[Callable[[], object]] = act

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        act, self.act = self.act, None
        if act is not None:
            act()


def raised(it: Scene, **budget: Any) -> Callable[[], object]:
    blocks = {"budget": to_dict(Budget(**budget))}
    return lambda: changes.leave(it.place, 0.0, "me", blocks)


def test_a_driver_records_a_change_and_goes_by_it(tmp_path: Path) -> None:
    # Looks every few seconds: without the change the budget would end the run.
    it = scene(tmp_path, recipe(budget=Budget(hours=0.01)), jobs=[{"looks": 40}])
    run = it.drive(Meddling(raised(it, hours=5)))
    assert run.phase is Phase.SUCCEEDED
    told = [record for record in it.records() if record["kind"] == "changed"]
    assert [(r["number"], r["blocks"]) for r in told] == [(1, ["budget"])]
    assert Fold(it.records()).recipe["budget"]["hours"] == 5
    assert yaml.safe_load((it.root / "recipe.yaml").read_text())["budget"]["hours"] == 5
    other = scene(tmp_path / "other", recipe(budget=Budget(hours=0.01)), jobs=[{"looks": 40}])
    assert other.drive().exit_code == 5


def test_a_lowered_budget_ends_a_run_that_has_spent_it(tmp_path: Path) -> None:
    it = scene(tmp_path, recipe(budget=Budget(hours=5)), jobs=[{"looks": 40}])
    assert it.drive(Meddling(raised(it, hours=0.01))).exit_code == 5


def test_a_job_that_reaches_its_old_deadline_goes_on_under_a_raised_budget(tmp_path: Path) -> None:
    ends = [{"looks": 3, "end": "preempted", **DEADLINE}, {}]
    what = recipe(budget=Budget(hours=0.05), retry=Retry(preempted=0))
    it = scene(tmp_path, what, jobs=ends)
    run = it.drive(Meddling(raised(it, hours=5)))
    assert (run.phase, len(run.jobs[0].attempts)) == (Phase.SUCCEEDED, 2)
    # Without more budget the same end counts as what it looks like.
    other = scene(tmp_path / "other", what, jobs=ends)
    run = other.drive()
    assert (run.phase, len(run.jobs[0].attempts)) == (Phase.FAILED, 1)


def test_a_budget_that_is_raised_while_the_job_leaves_is_not_the_one_that_ended_it(
    tmp_path: Path,
) -> None:
    it = scene(tmp_path, recipe(budget=Budget(hours=1.0)), jobs=[{"looks": None, "stubborn": 1}])

    class LastMoment(ManualClock):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if (it.root / "control" / "stop.json").exists() and not changes.last(it.place):
                raised(it, hours=20)()

    run = it.drive(LastMoment())
    assert run.exit_code == 5 and "changed" in it.kinds()
    assert run.why.startswith("stopped at budget.hours: 1.00 of 1.00 h")
    assert run.why.endswith(f"changed after that: launch resume {run.name}")
    it.resume()
    assert Fold(it.records()).recipe["budget"]["hours"] == 20


def test_a_run_that_was_taken_over_hears_changes_of_its_new_home(live: Live) -> None:
    """Its journal tells of three changes, whose files are in the folder of the home before."""
    it = live.scene
    live.record("changed", number=3, refused="it was no recipe")
    amend.leave(it.env, live.against("budget.hours=9"), {"budget": {"hours": 9.0}})
    waiting = changes.waiting(it.place, Fold(it.records()).taken)
    assert waiting == (4, {"budget": {"hours": 9.0}})


def test_a_change_is_told_against_those_that_wait_for_the_driver(live: Live) -> None:
    """The second replaces the whole block: that it takes back the first has to be seen."""
    it = live.scene
    first = live.against("budget.usd=50")
    amend.leave(it.env, first, loaded(live.folder, TRAINING, "budget.usd=50").canonical)
    changes.leave(it.place, 0.0, "me", {"budget": {"hours": -1}})  # of which nothing comes
    second = live.against("budget.hours=9")
    told = {change.path: (change.before, change.after) for change in second.changes}
    assert told == {"budget.usd": (50.0, 30.0), "budget.hours": (5.0, 9.0)}
    back = live.against()
    assert [(c.path, c.before, c.after) for c in back.changes] == [("budget.usd", 50.0, 30.0)]
    assert back.in_place and back.blocks() == ["budget"]
    assert live.against("budget.usd=50").changes == ()


def test_changes_of_other_blocks_and_damaged_ones_change_nothing(tmp_path: Path) -> None:
    it = scene(tmp_path)
    before = Fold(it.records()).recipe
    changes.leave(it.place, 0.0, "me", {"budget": {"hours": -1}})
    changes.leave(it.place, 0.0, "me", {"stages": [], "name": "other", "env": {"A": "b"}})
    (it.place / "changes" / "0003.json").write_text("{")
    assert it.drive().phase is Phase.SUCCEEDED
    told = [record for record in it.records() if record["kind"] == "changed"]
    assert [record["number"] for record in told] == [1, 2, 3]
    assert "must be greater than 0" in told[0]["refused"]
    assert Fold(it.records()).recipe == before


def test_only_this_home_is_heard(tmp_path: Path) -> None:
    it = scene(tmp_path)
    for place in ("control/changes/0001.json", "changes/0001.json"):
        file = it.root / place
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"v": 1, "set": {"budget": {"hours": 9}}}))
    it.drive()
    assert "changed" not in it.kinds()


def test_a_change_outlives_a_driver_that_is_killed_and_is_recorded_once(tmp_path: Path) -> None:
    for tick in range(1, 30):
        it = scene(tmp_path / str(tick), jobs=[{"looks": 2}])
        raised(it, hours=7)()
        lived = killed_at(tick, it.drive)
        run = it.drive()
        assert run.phase is Phase.SUCCEEDED
        assert it.kinds().count("changed") == 1
        assert Fold(it.records()).recipe["budget"]["hours"] == 7
        if lived < tick:
            return
    raise AssertionError("the driver was killed each time")


def test_what_no_driver_took_up_is_not_of_the_run_that_is_resumed(tmp_path: Path) -> None:
    it = scene(tmp_path, jobs=[{"end": "failed"}, {}])
    it.drive()
    raised(it, hours=7)()
    it.resume()
    assert it.drive().phase is Phase.SUCCEEDED
    assert "changed" not in it.kinds() and Fold(it.records()).recipe["budget"]["hours"] is None


def test_a_run_in_a_bucket_is_compared_by_its_journal_there_and_changed_from_its_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bucketed.bucket(tmp_path, monkeypatch) as it:
        run_id, before = bucketed.begin(it), bucketed.recipe()
        after = dataclasses.replace(before, budget=Budget(hours=9))
        wanted = Loaded(after, to_dict(after), "e" * 64, tmp_path / "recipe.yaml")
        packed = bundle.Bundle(it.home / "b.tar.gz", "ab" * 32, 7)
        found = amend.find(it.env, wanted, packed)
        assert found is not None and found.in_place and found.run.id == run_id
        assert [(c.path, c.before, c.after) for c in found.changes] == [("budget.hours", None, 9)]
        (line,) = (x for x in found.lines("r.yaml") if x.startswith("  request "))
        assert line.endswith('body.jobSpec.scheduling.timeout: none -> "${deadline}s"')
        amend.leave(it.env, found, wanted.canonical)
        assert engine.drive(run_id, it.env, bucketed.load).phase is Phase.SUCCEEDED
        assert bucketed.journal(it, run_id).count("changed") == 1
        written = it.server.objects.content("bkt", f"runs/{found.run.name}/recipe.yaml")
        assert yaml.safe_load(written)["budget"] == {"hours": 9}
        assert amend.find(it.env, wanted, packed) is None, "it is over"


# The commands.


@pytest.fixture
def running(tmp_path: Path, world: World) -> tuple[Path, Run]:
    """A run with a driver of its own, whose job goes on until it is told to end."""
    (world.folder / "script.json").write_text(json.dumps({"jobs": [{"looks": None}]}))
    file = tmp_path / "small.yaml"
    file.write_text(TRAINING)
    return file, api.up(file)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    both = capsys.readouterr()
    return both.out + both.err


def test_a_budget_is_changed_in_place_and_what_needs_more_is_said_before_a_second_run(
    running: tuple[Path, Run],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    world: World,
) -> None:
    file, run = running
    more = ["--set", "budget.usd=60"]
    assert cli.run(["plan", str(file), *more]) == 0
    shown = said(capsys)
    assert f"against {run.name} (" in shown and "~ budget.usd: 30 -> 60  in place, now" in shown
    assert f"`launch up {file} --set budget.usd=60` makes these changes" in shown

    assert cli.run(["up", str(file), *more, "-d"]) == 2, "there is no terminal to ask on"
    assert "costs money" in said(capsys)
    monkeypatch.setattr(console, "confirm", lambda question, refusal: False)
    assert cli.run(["up", str(file), *more, "-d"]) == 0
    assert "nothing was changed" in said(capsys)
    assert changes.last(home.folder(api.env().home, run.id)) == 0

    assert cli.run(["up", str(file), *more, "-d", "--yes"]) == 0
    assert f"{run.name}: its driver takes up budget; attached to it" in said(capsys)
    assert [found.id for found in api.list_runs()] == [run.id]

    # The recipe as it was differs now; a length needs a stop; --new asks nothing about that.
    questions: list[str] = []
    monkeypatch.setattr(console, "confirm", lambda question, refusal: questions.append(question))
    assert cli.run(["up", str(file), "--set", "train.steps=40", "-d"]) == 0
    assert questions == [f"Start it beside {run.name}, which goes on?"]
    assert f"{run.name} goes on: this starts a second run beside it" in said(capsys)
    assert cli.run(["up", str(file), "--set", "train.steps=40", "-d", "--new"]) == 0
    assert questions[1:] == ["Start it?"] and "beside" not in said(capsys)

    (world.folder / "finish").touch()
    ended = api.wait(run, timeout=60)
    assert ended.phase is Phase.SUCCEEDED
    told = api.difference(file, against=run.id)
    assert told is not None and told.changes[0].before == 60

    assert cli.run(["plan", str(file), "--against", run.name, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["against"] == run.name and document["jobs"]
    assert [c["path"] for c in document["changes"]] == ["budget.usd"]
    assert cli.run(["plan", str(file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["against"], document["changes"]) == (None, [])


def test_a_run_that_another_machine_drives_is_not_changed_from_here(live: Live) -> None:
    found = live.against("budget.usd=60")
    live.record("driver")
    run = found.run
    run.driver = Fold(live.scene.records()).run.driver
    assert found.in_place and run.driver is not None
    with pytest.raises(HeldElsewhere):
        amend.leave(api.env(), found, loaded(live.folder, TRAINING).canonical)
    assert changes.last(live.scene.place) == 0
