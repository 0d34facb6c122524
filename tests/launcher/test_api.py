"""The verbs, as a notebook calls them: over real drivers where one is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import api, bundle, cli, console, home, start
from launcher.backends.base import Held, Phase
from launcher.bundle import Bundle
from launcher.clock import ManualClock
from launcher.errors import Exit, HeldElsewhere, Leaked, RecipeErrors, UsageError
from launcher.plan import PREVIEW, fill
from launcher.recipe import Loaded, load
from launcher.spec import Recipe
from tests.launcher.fake_backend import World
from tests.launcher.runs import Scene, killed_at, plugged_in, recipe, scene
from trainer.config import to_dict

RECIPE = """
launch: 1
name: thing
stage: tokenizer
tokenizer: {vocab_size: 300}
data: {train: [{builtin: python-reference}]}
hardware: {backend: fake}
"""


TRAINING = """
launch: 1
name: small
stage: pretrain
model: {init: random, tokenizer: org/tok, architecture: {hidden_size: 64, heads: 4}}
data: {train: [{builtin: python-reference}]}
train: {steps: 20, until: 10}
hardware: {backend: fake}
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path / "world")
    plugged_in(monkeypatch, tmp_path, made)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "thing.yaml"
    path.write_text(RECIPE)
    return path


def script(world: World, **steps: object) -> None:
    (world.folder / "script.json").write_text(json.dumps(steps))


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def finish(world: World) -> None:
    (world.folder / "finish").touch()


def test_up_twice_is_one_run_and_up_after_its_end_another(world: World, file: Path) -> None:
    script(world, jobs=[{"looks": None}])
    first = api.up(file)
    assert first.driver is not None and first.driver.alive
    assert api.up(file).id == first.id
    assert api.up(file, overrides=["tokenizer.vocab_size=301"]).id != first.id
    finish(world)
    done = api.wait(first, timeout=30)
    assert (done.phase, done.exit_code, done.held) == (Phase.SUCCEEDED, Exit.OK, Held.GONE)
    again = api.up(file)
    assert again.id != first.id
    assert api.wait(again, timeout=30).phase is Phase.SUCCEEDED
    assert sum(name.startswith(first.name) for name in world.lines("begun.log")) == 1


def test_new_insists_on_another_run(world: World, file: Path) -> None:
    script(world, jobs=[{"looks": None}] * 2)
    one, other = api.up(file), api.up(file, new=True)
    assert one.id != other.id
    finish(world)
    assert {api.wait(run, timeout=30).phase for run in (one, other)} == {Phase.SUCCEEDED}


def test_a_run_that_cannot_be_read_is_not_doubled(world: World, file: Path) -> None:
    """Its job may be running. Another run of the recipe that goes on is still attached to."""
    script(world, jobs=[{"looks": None}] * 3)
    first = api.up(file)
    until(lambda: len(world.lines("begun.log")) == 1)
    place = home.folder(api.env().home, first.id)
    record = "00000002.json"
    for journal in (place / "journal", home.local_root(first.root) / "journal"):
        whole = (journal / record).read_text()
        (journal / record).write_text("{")
    with pytest.raises(HeldElsewhere) as caught:
        api.up(file)
    assert str(caught.value).startswith(f"{first.name}, a run of the same recipe, may be live")
    assert caught.value.code == Exit.HELD and "launch up --new" in caught.value.hint
    assert len(api.list_runs()) == 1
    second = api.up(file, new=True)
    assert api.up(file).id == second.id
    for journal in (place / "journal", home.local_root(first.root) / "journal"):
        (journal / record).write_text(whole)
    finish(world)
    assert {api.wait(run, timeout=30).phase for run in (first, second)} == {Phase.SUCCEEDED}


def test_two_ups_at_once_make_one_run(world: World, file: Path) -> None:
    script(world, jobs=[{"looks": None}])
    code = f"from launcher import api; print(api.up({str(file)!r}).id)"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ids = [process.communicate(timeout=60)[0] for process in both]
    assert ids[0] == ids[1] and len(ids[0]) == 17
    finish(world)
    assert api.wait(ids[0].strip(), timeout=30).phase is Phase.SUCCEEDED
    assert len(world.lines("begun.log")) == 1


class Hand:
    """Time as `launcher.home` sees it: a second passes with every nap; after five, `then`."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.now, self.then = 0.0, then

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 1.0
        if self.now == 5.0:
            self.then()


def test_a_driver_on_its_way_out_is_waited_for(
    world: World, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last record is written, and it still holds its lock: a store takes a summary slowly."""
    script(world, jobs=[{"end": "failed", "exit_code": 1}, {}])
    run = api.wait(api.up(file), timeout=30)
    assert run.phase is Phase.FAILED
    place = home.folder(api.env().home, run.id)
    until(lambda: home.holder(place) is None)
    lock = home.DriverLock.acquire(place)
    assert lock is not None
    with monkeypatch.context() as patch:
        patch.setattr(home, "time", Hand(lock.close))
        assert api.resume(run).id == run.id
    assert api.wait(run, timeout=30).phase is Phase.SUCCEEDED


def test_stop_then_resume_goes_on_in_the_same_run(world: World, file: Path) -> None:
    script(world, jobs=[{"looks": None}])
    run = api.up(file)
    until(lambda: api.status(run).phase is Phase.RUNNING)
    with pytest.raises(UsageError, match="is not over"):
        api.resume(run, ["tokenizer.vocab_size=400"])
    api.stop(run, "lunch")
    stopped = api.wait(run, timeout=30)
    assert (stopped.phase, stopped.exit_code, stopped.why) == (Phase.CANCELLED, 0, "stopped: lunch")
    assert api.stop(run).phase is Phase.CANCELLED, "asking again changes nothing"
    resumed = api.resume(run.name, ["tokenizer.vocab_size=400"])
    assert resumed.id == run.id
    assert "vocab_size: 400" in (Path(run.root) / "recipe.yaml").read_text()
    assert api.wait(run, timeout=30).phase is Phase.SUCCEEDED
    with pytest.raises(UsageError, match="is complete"):
        api.resume(run)


def test_a_recipe_that_is_wrong_starts_nothing(world: World, file: Path) -> None:
    file.write_text(RECIPE.replace("vocab_size", "vocab_sise"))
    with pytest.raises(RecipeErrors, match="vocab_size"):
        api.up(file)
    assert api.list_runs() == []


def test_artifacts_in_no_store_that_we_know_are_refused_before_anything_is_made(
    world: World, file: Path
) -> None:
    file.write_text(RECIPE + "artifacts: ftp://bucket/{run}\n")
    with pytest.raises(UsageError, match="no store for ftp://"):
        api.up(file)
    assert api.list_runs() == [] and not (api.env().home / "runs").exists()


def test_teardown_of_a_running_run_leaves_nothing(world: World, file: Path) -> None:
    script(world, jobs=[{"looks": None}])
    run = api.up(file)
    until(lambda: world.alive() != [])
    torn = api.teardown(run)
    assert (torn.phase, torn.held, torn.live, world.alive()) == (
        Phase.CANCELLED, Held.GONE, False, []
    )  # fmt: skip
    assert home.holder(home.folder(api.env().home, run.id)) is None


def test_teardown_that_cannot_be_confirmed_says_what_may_still_bill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = scene(tmp_path, jobs=[{"looks": None}], delete=["denied", "ok"])
    plugged_in(monkeypatch, tmp_path, it.world)
    killed_at(8, it.drive)
    with pytest.raises(Leaked) as caught:
        api.teardown(it.run_id)
    name = it.run().name
    assert caught.value.code == Exit.LEAKED and caught.value.hint == f"launch teardown {name}"
    seen = api.status(it.run_id)
    assert seen.held is Held.LEAKED and seen.live
    assert seen.warnings == [f"may still bill: {name}-j0-a1: `launch teardown {name}`"]
    assert [run.id for run in api.list_runs(0)] == [it.run_id], "always shown"
    assert api.teardown(it.run_id).held is Held.GONE


def test_teardown_of_everything_reaches_what_damaged_journals_hide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = scene(tmp_path, jobs=[{"looks": None}] * 2)
    second = another(it)
    plugged_in(monkeypatch, tmp_path, it.world)
    for one in (it, second):
        killed_at(8, one.drive)
    for place in (it.root, it.place):
        (place / "journal" / "00000002.json").write_text("{")
    assert len(it.world.alive()) == 2
    done = api.teardown_all()
    assert it.world.alive() == []
    assert [bool(run.warnings) for run in done] == [False, True]


def test_status_lists_live_runs_and_the_newest_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = scene(tmp_path)
    plugged_in(monkeypatch, tmp_path, it.world)
    summary = json.dumps(it.run().to_json() | {"ended": 1.0, "phase": "succeeded"})
    runs = it.place.parent
    newer = [f"f{index:015x}" for index in range(300)]
    for run_id in newer:
        (runs / run_id).mkdir()
        facts = {"id": run_id, "name": f"thing-{run_id[-6:]}", "root": str(it.root)}
        (runs / run_id / "run.json").write_text(json.dumps(facts))
        shown = run_id in newer[-20:]
        text = summary.replace(it.run_id, run_id) if shown else "opening this would fail"
        (runs / run_id / "summary.json").write_text(text)
    listed = api.list_runs(20)
    assert [run.id for run in listed] == [*newer[:-21:-1], it.run_id]
    assert [run.live for run in listed] == [False] * 20 + [True]
    assert [run.id for run in api.list_runs(0)] == [it.run_id]


def test_a_lost_summary_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = scene(tmp_path)
    plugged_in(monkeypatch, tmp_path, it.world)
    it.drive()
    file = it.place / "summary.json"
    before = file.read_text()
    file.unlink()
    assert api.list_runs()[0].phase is Phase.SUCCEEDED
    assert json.loads(file.read_text()) == json.loads(before)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"x"', '{"stages": 1}', '{"stages": [], '
                                  '"jobs": [{"attempts": [{"refs": 1}]}]}'])  # fmt: skip
def test_a_summary_that_is_none_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    it = scene(tmp_path)
    plugged_in(monkeypatch, tmp_path, it.world)
    it.drive()
    file = it.place / "summary.json"
    before = json.loads(file.read_text())
    file.write_text(text)
    assert [run.phase for run in api.list_runs()] == [Phase.SUCCEEDED]
    assert json.loads(file.read_text()) == before


def test_progress_comes_from_the_newest_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = scene(tmp_path, jobs=[{"looks": None}])
    plugged_in(monkeypatch, tmp_path, it.world)
    killed_at(10, it.drive)
    write_metrics(it.root, 1, range(1, 6))
    progress = api.status(it.run_id).progress
    assert (progress["global_step"], progress["train_loss"]) == (5, 0.5)


def test_a_run_is_found_by_name_id_and_prefix_and_not_by_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = scene(tmp_path)
    plugged_in(monkeypatch, tmp_path, it.world)
    run = it.run()
    for text in (run.name, run.id, run.id[:12], run.name[:-1]):
        assert api.status(text).id == run.id
    with pytest.raises(UsageError, match=f"did you mean '{run.name}'") as caught:
        api.status(run.name.replace("thing", "thong"))
    assert "`launch status` lists" in caught.value.hint
    another(it)
    with pytest.raises(UsageError, match="could be any of 2 runs"):
        api.status("thing")
    with pytest.raises(UsageError):
        api.status("")


def test_pull_joins_parts_and_leaves_the_journal_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = scene(tmp_path)
    plugged_in(monkeypatch, tmp_path, it.world)
    it.drive()
    write_metrics(it.root, 1, range(1, 5))
    write_metrics(it.root, 2, range(3, 7))
    for part, text in (("00-0001", "one\n"), ("00-0002", "two\n")):
        log = it.root / "logs" / "worker-0" / f"{part}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text)
    for step, whole in ((2, True), (4, False)):
        checkpoint = it.root / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        if whole:
            (checkpoint / "MANIFEST.json").write_text("{}")
    to = api.pull(it.run_id, tmp_path / "here")
    lines = [json.loads(line) for line in (to / "metrics.jsonl").read_text().splitlines()]
    assert [(line["global_step"], line["attempt"]) for line in lines] == [
        (1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2)
    ]  # fmt: skip
    assert (to / "logs" / "worker-0.log").read_text() == "one\ntwo\n"
    assert [item.name for item in (to / "checkpoints").iterdir()] == ["step-2"]
    assert not (to / "journal").exists() and (to / "recipe.yaml").exists()
    assert api.pull(it.run_id, to) == to, "again is no error"
    with pytest.raises(UsageError, match="inside the artifacts"):
        api.pull(it.run_id, it.root / "copy")
    with pytest.raises(UsageError, match="not a folder"):
        api.pull(it.run_id, to / "recipe.yaml")


@pytest.mark.parametrize(
    "name", ["kd_l4", "quickstart", "pretrain_local", "kd_local", "kd_local_precompute"]
)
def test_the_recipe_beside_the_artifacts_loads_to_the_same_run(name: str, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    before = load(shipped, ["env.ODD=${USER:-x} $${KEPT}", "env.NUMBER='1e-4'"])
    assert before.recipe.env["ODD"].endswith("${KEPT}")
    copy = tmp_path / "recipe.yaml"
    copy.write_text(start.as_yaml(before.recipe))
    after = load(copy, environ={})
    assert after.recipe == before.recipe and after.fingerprint == before.fingerprint


@pytest.mark.usefixtures("world")
def test_resuming_drops_an_until_that_was_reached_but_not_a_new_one(tmp_path: Path) -> None:
    it = scene(tmp_path, load_text(tmp_path, TRAINING))
    meta = it.root / "run_meta.json"
    meta.write_text('{"global_step": 10, "stopped": "until"}')
    it.resume("train.until=15")
    assert train_of(it)["until"] == 15
    it.resume()
    assert train_of(it)["until"] == 15, "not reached yet"
    meta.write_text('{"global_step": 15, "stopped": "until"}')
    it.resume("train.lr=0.5")
    assert (train_of(it)["until"], train_of(it)["lr"]) == (None, 0.5)


PIPELINE = """
launch: 1
name: pair
data: {train: [{builtin: python-reference}]}
tokenizer: {vocab_size: 300}
hardware: {backend: fake}
pipeline:
  - {id: one, stage: tokenizer, gate: {metric: one.loss, max: 3}}
  - {id: two, stage: tokenizer, needs: [one]}
  - {id: three, stage: tokenizer, needs: [two]}
"""


@pytest.mark.usefixtures("world")
def test_resuming_says_that_a_completed_stage_cannot_change(tmp_path: Path) -> None:
    it = scene(tmp_path, load_text(tmp_path, PIPELINE))
    for stage in ("one", "two"):
        (it.root / stage).mkdir(parents=True)
        (it.root / stage / "run_meta.json").write_text('{"completed": true}')
    before = it.kinds()
    for change, stage in (("pipeline.one.tokenizer.vocab_size=400", "one"),
                          ("pipeline.two.tokenizer.vocab_size=400", "two"),
                          ("pipeline.one.hardware.accelerator=cpu:2", "one")):  # fmt: skip
        with pytest.raises(UsageError, match=f"stage '{stage}' is completed"):
            it.resume(change)
    assert it.kinds() == before
    it.resume("pipeline.three.tokenizer.vocab_size=400")
    it.resume("pipeline.one.gate={metric: one.loss, max: 4}")  # asked again until it has passed
    share = [f"pipeline.{stage}.hardware.accelerator=cpu:2" for stage in ("two", "three")]
    it.resume(*share)  # of the job that is not done
    it.resume("budget.hours=3")
    newest = it.records()[-1]["recipe"]
    assert [s["tokenizer"]["vocab_size"] for s in newest["stages"]] == [300, 300, 400]
    assert [s["hardware"]["accelerator"] for s in newest["stages"]] == ["cpu:1", "cpu:2", "cpu:2"]
    assert (newest["budget"]["hours"], newest["stages"][0]["gate"][0]["max"]) == (3, 4)


@pytest.mark.usefixtures("world")
def test_the_project_of_a_cloud_tells_runs_apart(tmp_path: Path) -> None:
    packed = Bundle(tmp_path / "b", "0" * 64, 7)

    def prints(text: str, **environ: str) -> str:
        (tmp_path / "r.yaml").write_text(text)
        env = replace(api.env(), environ=environ)
        return start.fingerprint(load(tmp_path / "r.yaml", environ={}), packed, env)

    one, other = {"GOOGLE_CLOUD_PROJECT": "one"}, {"GOOGLE_CLOUD_PROJECT": "other"}
    assert prints(RECIPE, **one) == prints(RECIPE, **one) != prints(RECIPE, **other)
    local = RECIPE.replace("fake", "local")
    assert prints(local, **one) == prints(local, **other) == prints(local)
    vertex = RECIPE.replace("{backend: fake}", "{backend: vertex, accelerator: L4, VERTEX}")
    vertex = vertex.replace("{builtin: python-reference}", "{path: gs://b/x}")
    vertex += "artifacts: gs://b/{run}\n"
    named = vertex.replace("VERTEX", "vertex: {project: mine}")
    unnamed = vertex.replace("VERTEX", "nodes: 1")
    assert prints(named, **one) == prints(named, **other), "the recipe's own goes first"
    assert prints(unnamed, **one) != prints(unnamed, **other)


@pytest.mark.parametrize("hours", ["hours: 2", "usd: 4", ""])
def test_a_preview_equals_what_is_sent(world: World, tmp_path: Path, hours: str) -> None:
    """Two jobs, the first preempted once: every journalled intent is the preview's, with the run's
    ids in it and its holes filled."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@here"]
    file = tmp_path / "pair.yaml"
    file.write_text(PIPELINE.replace("hardware", f"budget: {{{hours}}}\nhardware"))
    for command in (["init", "-q"], ["add", "pair.yaml"], ["commit", "-q", "-m", "a recipe"]):
        subprocess.run([*git, *command], check=True)
    script(world, jobs=[{"looks": 40, "end": "preempted"}, {"evaluation": {"loss": 1}}])
    preview = api.plan(file).to_json()["jobs"]
    env = replace(api.env(), clock=ManualClock())
    run_id = start.create(load(file), bundle.build(env.home), env)["id"]
    it = Scene(env, world, run_id)
    run = it.drive()
    assert run.phase is Phase.SUCCEEDED and len(preview) == 2
    sent = [record for record in it.records() if record["kind"] == "intent"]
    assert [(r["job"], r["attempt"]) for r in sent] == [(0, 1), (0, 2), (1, 1)]
    assert len(it.records()[0]["commit"]) == 40
    started = {(job.index, a.number): a for job in run.jobs for a in job.attempts}
    spent = 0.0
    for record in sent:
        at = (record["job"], record["attempt"])
        left = None if not hours else max(1, int((2 if "hours" in hours else 4) * 3600 - spent))
        holes = {"attempt": at[1], "resume": at[1] > 1, "deadline": left}
        (intent,) = fill(preview[at[0]]["intents"], holes)
        ours = json.dumps(intent).replace(PREVIEW, run_id)
        ours = ours.replace(f"pair-{PREVIEW[-6:]}", run.name)
        assert record["intent"] == json.loads(ours), at
        assert record["intent"]["request"]["boot"]["job"]["commit"] == it.records()[0]["commit"]
        spent += (started[at].ended or 0.0) - (started[at].started or 0.0)
    assert spent > 60, "so that the deadlines differ"


def test_what_was_shown_is_what_is_started(
    world: World, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit while the question stands on the screen counts for the next `up`."""

    def edited(question: str, refusal: str) -> bool:
        file.write_text(RECIPE.replace("vocab_size: 300", "vocab_size: 301"))
        return True

    monkeypatch.setattr(console, "confirm", edited)
    assert cli.run(["up", str(file), "--detach"]) == Exit.OK
    (run,) = api.list_runs()
    first = home.folder(api.env().home, run.id) / "journal" / "00000001.json"
    created = json.loads(first.read_text())["recipe"]["stages"][0]
    assert created["tokenizer"]["vocab_size"] == 300
    assert api.wait(run, timeout=30).phase is Phase.SUCCEEDED


@pytest.mark.usefixtures("world")
def test_what_was_read_already_takes_no_changes(file: Path) -> None:
    ready = api.Prepared(file)
    for change in ({"overrides": ["tokenizer.vocab_size=301"]}, {"on": "local"}):
        with pytest.raises(UsageError, match="takes no `overrides` and no `on`"):
            api.up(ready, **change)  # type: ignore[arg-type]
    assert api.list_runs() == []


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("change", ["name=other", "hardware.backend=local", "artifacts=/else"])
def test_resuming_cannot_move_a_run(tmp_path: Path, change: str) -> None:
    it = scene(tmp_path, load_text(tmp_path, TRAINING))
    before = it.kinds()
    with pytest.raises(UsageError, match="of a run cannot change"):
        it.resume(change)
    assert it.kinds() == before


def load_text(folder: Path, text: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return load(file, environ={}).recipe


def train_of(it: Scene) -> dict[str, object]:
    newest = [record for record in it.records() if "recipe" in record][-1]
    train: dict[str, object] = newest["recipe"]["stages"][0]["train"]
    return train


def another(it: Scene) -> Scene:
    """A second run of the same recipe in the same home."""
    what = recipe()
    loaded = Loaded(what, to_dict(what), "e" * 64, it.place)
    raw = it.records()[0]["bundle"]
    packed = Bundle(Path(raw["path"]), raw["sha256"], raw["bytes"])
    env = it.at(ManualClock(1_700_000_001.0))
    return Scene(env, it.world, start.create(loaded, packed, env)["id"])


def write_metrics(stage: Path, attempt: int, steps: range) -> None:
    lines = [
        {"v": 1, "kind": "step", "attempt": attempt, "stage": "s0", "time": 1e9 + step,
         "global_step": step, "train_loss": step / 10, "steps": 10}
        for step in steps
    ]  # fmt: skip
    file = stage / "metrics" / f"{attempt:04d}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
