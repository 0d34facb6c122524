"""A run whose artifacts lie in a bucket: journal, marker, status and pull, through its faults."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import pytest

from launcher import api, cli, console, engine, home, logs, records, start, view
from launcher.adopt import adopt
from launcher.artifacts import EVENTS, LOGS, Artifacts, Bucket, here, journals, open_artifacts
from launcher.backends.base import Env, Held, Phase
from launcher.claim import write_marker
from launcher.clock import ManualClock
from launcher.errors import Damaged, Denied, Exit, HeldElsewhere, LaunchError, Transient, UsageError
from launcher.journal import Fold, Journal
from launcher.pulling import pull
from launcher.run import Run
from launcher.spec import Gate
from tests.launcher import runs
from tests.launcher.bucketed import Mirrored, begin, bucket, journal, laptop, lists, load, recipe
from tests.launcher.rehearsed import Scene
from tests.launcher.test_vertex_engine import SharedClock
from trainer.store import open_store

from launcher.rehearsal.faults import Fault, Script, Seeded  # isort: skip
from launcher.rehearsal.vertex import PREEMPTED, Said, Stub, exited  # isort: skip


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with bucket(tmp_path, monkeypatch) as made:
        yield made


def place(it: Scene, run_id: str) -> Path:
    return home.folder(it.home, run_id)


def root(run_id: str) -> str:
    return f"gs://bkt/runs/thing-{run_id[-6:]}"


def opened(it: Scene, run_id: str) -> Bucket:
    found = open_artifacts(root(run_id), place(it, run_id), it.env.environ, it.clock)
    assert isinstance(found, Bucket)
    return found


def drive(it: Scene, run_id: str) -> Run:
    return engine.drive(run_id, it.env, load)


def look(it: Scene, run_id: str) -> Run:
    return view.look(it.env, home.find(it.home, run_id))


def nothing_is_left(it: Scene) -> bool:
    return it.server.vertex.states() == {} and list(it.backend.sweep(it.env)) == []


def test_a_run_on_a_bucket_leaves_its_journal_there_and_a_copy_here(it: Scene) -> None:
    run_id = begin(it)
    run = drive(it, run_id)
    assert (run.phase, run.exit_code) == (Phase.SUCCEEDED, 0) and nothing_is_left(it)
    kinds = journal(it, run_id)
    assert kinds[0] == "created" and kinds[-1] == "end"
    store = open_store(root(run_id))
    for file in (place(it, run_id) / "journal").iterdir():
        assert store.get_bytes(f"journal/{file.name}") == file.read_bytes()
    assert {"recipe.yaml", "summary.json"} <= set(store.list())
    seen = len(it.server.log)
    assert [r.phase for r in view.listed(it.env, 5)] == [Phase.SUCCEEDED]
    assert len(it.server.log) == seen, "a list takes what is over as it is known here"
    assert look(it, run_id).phase is Phase.SUCCEEDED
    assert len(it.server.log) == seen + 1 and lists(it, seen) == 1, "one run is asked about"


def test_a_relaunch_names_the_newest_whole_checkpoint(
    it: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    it.server.vertex.fates.append(Stub(2, 2, 20, PREEMPTED))
    run = drive(it, run_id := begin(it))
    assert [a.from_step for a in run.jobs[0].attempts] == [None, 120]
    assert (
        f"thing-{run_id[-6:]}-j0 attempt 2: stage s0, newest checkpoint: step 120"
        in capfd.readouterr().err
    )
    records_ = [json.loads(f.read_bytes()) for f in (place(it, run_id) / "journal").iterdir()]
    told = [r["from"] for r in records_ if "from" in r]
    assert told == [{"stage": "s0", "step": 120}]


def test_without_a_checkpoint_it_begins_at_the_beginning(
    it: Scene, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Mirrored, "checkpoints", ())
    it.server.vertex.fates.append(Stub(2, 2, 20, PREEMPTED))
    assert [a.from_step for a in drive(it, begin(it)).jobs[0].attempts] == [None, 0]
    assert "attempt 2: stage s0, no checkpoint yet" in capfd.readouterr().err


@pytest.mark.parametrize(("most", "phase"), [(2.5, Phase.SUCCEEDED), (1.5, Phase.FAILED)])
def test_a_gate_of_a_pipeline_reads_the_evaluation_in_the_bucket(
    it: Scene, most: float, phase: Phase
) -> None:
    run = drive(it, begin(it, recipe(2, Gate(metric="val_loss", max=most))))
    assert run.phase is phase and nothing_is_left(it)
    assert len(it.server.vertex.created) == (2 if phase is Phase.SUCCEEDED else 1)
    recorded = records.gates(*journals(look(it, run.id)))
    assert [(r["id"], r["passed"]) for r in recorded] == [("s0", phase is Phase.SUCCEEDED)]


def test_access_lost_in_the_middle_ends_the_driver_and_not_the_job(it: Scene) -> None:
    it.server.vertex.fates.append(Stub(2, 2, 60))
    run_id = begin(it)
    well = [("/b/bkt/o", Fault("slow"))] * 20
    it.server.faults = Script([*well, *[("/b/bkt/o", Fault("status", 403))] * 3])
    with pytest.raises(Denied, match="access denied"):
        drive(it, run_id)
    it.server.faults = Script()
    assert list(it.server.vertex.states().values()) != []
    assert drive(it, run_id).phase is Phase.SUCCEEDED
    assert len(it.server.vertex.created) == 1


@pytest.mark.parametrize("before", [0, 1, 4, 9])
@pytest.mark.parametrize("fault", ["cut_after", "cut_before", "cut_upload"])
def test_a_reply_that_was_lost_does_not_fork_the_journal(
    it: Scene, before: int, fault: Any
) -> None:
    run_id = begin(it)
    well = [("POST .*/upload/", Fault("slow"))] * before
    it.server.faults = Script([*well, ("POST .*/upload/", Fault(fault, at_bytes=40))])
    run = drive(it, run_id)
    assert it.server.faults.left == []
    assert run.phase is Phase.SUCCEEDED and nothing_is_left(it)
    assert journal(it, run_id).count("driver") == 1
    assert len(it.server.vertex.created) == 1


@pytest.mark.parametrize("well", [0, 4, 6, 12, 20])
def test_an_outage_of_the_bucket_is_waited_for_and_nothing_is_created_meanwhile(
    it: Scene, well: int
) -> None:
    run_id = begin(it)
    seen, before = len(it.server.log), it.clock.now()
    storm = [("/b/bkt/o", Fault("status", status)) for status in (503, 429, 500) * 2]
    it.server.faults = Script([*[("/b/bkt/o", Fault("slow"))] * well, *storm])
    run = drive(it, run_id)
    assert it.server.faults.left == []
    assert run.phase is Phase.SUCCEEDED and nothing_is_left(it)
    assert len(run.jobs[0].attempts) == len(it.server.vertex.created) == 1
    assert it.clock.now() - before > 1 + 2 + 4 + 8, "it waited longer each time"
    log = list(it.server.log)[seen:]
    stormy = [i for i, (_, target, code) in enumerate(log) if "/b/bkt/o" in target and code >= 429]
    made = [i for i, (how, target, _) in enumerate(log) if how == "POST" and "Jobs" in target]
    assert len(stormy) == 6 and not [i for i in made if stormy[0] < i < stormy[-1]]


def test_a_command_does_not_wait_for_a_bucket_for_ever(it: Scene) -> None:
    run_id = begin(it)
    artifacts = opened(it, run_id)
    it.server.faults = Script([("/b/bkt/o", Fault("status", 503))] * 50)
    before = it.clock.now()
    with pytest.raises(Transient, match="does not answer as it should") as caught:
        write_marker(artifacts, it.clock.now(), "ann", "")
    assert "\n" not in str(caught.value)
    assert 0 < it.clock.now() - before <= artifacts.patience


@pytest.mark.parametrize(
    ("bad", "kind", "code"),
    [("absent", UsageError, Exit.USAGE), ("denied", Denied, Exit.ACCESS),
     ("away", Transient, Exit.ACCESS)],
)  # fmt: skip
def test_a_bucket_that_takes_nothing_stops_a_run_before_anything_is_made(
    it: Scene, bad: str, kind: type[LaunchError], code: Exit
) -> None:
    if bad == "absent":
        del it.server.objects.buckets["bkt"]
    status = {"denied": 403, "away": 503}.get(bad)
    if status:
        it.server.faults = Script([("/b/bkt/o", Fault("status", status))] * 50)
    with pytest.raises(kind) as caught:
        begin(it)
    assert caught.value.code == code and "\n" not in str(caught.value)
    assert not (it.home / "runs").exists()
    assert it.server.vertex.created == []


def test_the_driver_sees_the_marker_within_seconds_and_asks_for_it_seldom(it: Scene) -> None:
    it.server.vertex.fates.append(Stub(2, 2, None))
    run_id = begin(it)
    artifacts, asked = opened(it, run_id), it.clock.now() + 1000

    class Stopping(ManualClock):
        """Somebody asks at 1000 s."""

        done = False

        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            it.clock.sleep(seconds)
            if self.now() >= asked and not self.done:
                self.done = True
                write_marker(artifacts, self.now(), "bob", "enough")

    env = Env(it.home, it.env.environ, Stopping(it.clock.now()), "ann", "python3")
    run = engine.drive(run_id, env, load)
    assert run.phase is Phase.CANCELLED and nothing_is_left(it)
    records_ = [json.loads(f.read_bytes()) for f in (place(it, run_id) / "journal").iterdir()]
    (stop,) = [r for r in records_ if r["kind"] == "stop"]
    assert stop["by"] == "bob" and 0 <= stop["time"] - asked <= 8
    looks = sum("control%2Fstop.json" in target for _, target, _ in it.server.log)
    assert looks <= 1000 / 5 + 20


def test_status_is_one_list_call_and_what_changed(it: Scene) -> None:
    run_id = begin(it)
    store = open_store(root(run_id))
    store.put_bytes("metrics/0001-00000.jsonl", line(1, 10))
    store.put_bytes("metrics/0001-00001.jsonl", line(1, 20))
    store.put_bytes("checkpoints/step-10/model.safetensors", b"weights")
    store.put_bytes("checkpoints/step-10/MANIFEST.json", b"{}")
    store.put_bytes("attempts/00-0001r2.json", b"{}")
    seen = len(it.server.log)
    assert look(it, run_id).progress["global_step"] == 20
    assert lists(it, seen) == 1
    got = [target for _, target, _ in list(it.server.log)[seen:]]
    assert not any("safetensors" in target for target in got)
    seen = len(it.server.log)
    assert look(it, run_id).progress["global_step"] == 20
    assert len(it.server.log) == seen, "it is new enough"
    it.clock.sleep(5)
    store.put_bytes("metrics/0001-00001.jsonl", line(1, 20) + line(1, 30))
    seen = len(it.server.log)
    assert look(it, run_id).progress["global_step"] == 30
    asked = list(it.server.log)[seen:]
    assert lists(it, seen) == 1 and len(asked) == 2, asked


def test_a_store_that_does_not_answer_leaves_a_warning_and_what_is_known(it: Scene) -> None:
    run_id = begin(it)
    open_store(root(run_id)).put_bytes("metrics/0001-00000.jsonl", line(1, 10))
    assert look(it, run_id).progress["global_step"] == 10
    it.clock.sleep(60)
    before = it.clock.now()
    it.server.faults = Script([("/b/bkt/o", Fault("status", 503))] * 9)
    seen = look(it, run_id)
    assert seen.progress["global_step"] == 10 and it.clock.now() == before
    (warning,) = [text for text in seen.warnings if "as last known" in text]
    assert "503" in warning or "does not answer" in warning


def test_status_of_many_runs_is_one_round_of_calls(it: Scene) -> None:
    ids = []
    for _ in range(24):
        ids.append(begin(it))
        it.clock.sleep(0.01)
    for run_id in ids[:12]:
        open_store(root(run_id)).put_bytes("metrics/0001-00000.jsonl", line(1, 10))
    it.clock.sleep(10)
    seen = len(it.server.log)
    listed = view.listed(it.env, 5)
    assert sorted(run.id for run in listed) == sorted(ids)
    assert lists(it, seen) == 24
    assert sum(run.progress.get("global_step") == 10 for run in listed) == 12
    seen = len(it.server.log)
    view.listed(it.env, 5)
    assert len(it.server.log) == seen


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_cut_or_lost_the_journal_is_whole_and_no_job_is_doubled(
    it: Scene, seed: int
) -> None:
    run_id = begin(it)
    rates = {Fault("cut_after"): 0.15, Fault("cut_before"): 0.1, Fault("status", 503): 0.1,
             Fault("status", 429): 0.05, Fault("cut_download", at_bytes=30): 0.05}  # fmt: skip
    it.server.faults = Seeded(seed, rates)
    it.server.vertex.fates.append(Stub(2, 2, 20, PREEMPTED))
    run = drive(it, run_id)
    it.server.faults = Script()
    assert run.phase is Phase.SUCCEEDED, run.why
    names = [job["displayName"] for job in it.server.vertex.created]
    assert len(names) == len(set(names)) == 2 and nothing_is_left(it)
    assert journal(it, run_id)[-1] == "end"


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_instant_the_next_driver_ends_it_with_the_same_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(runs, "FakeBackend", Mirrored)  # whose answers are instants of danger

    def killed(instant: int) -> int:
        with bucket(tmp_path / str(instant), monkeypatch, SharedClock()) as it:
            it.server.vertex.fates.append(Stub(2, 2, 20, PREEMPTED))
            run_id = begin(it)
            lived = runs.killed_at(instant, partial(engine.drive, run_id, it.env, load))
            run = drive(it, run_id)
            assert run.phase is Phase.SUCCEEDED, (instant, run.why)
            names = [job["displayName"] for job in it.server.vertex.created]
            assert len(names) == len(set(names)) == 2, (instant, names)
            assert nothing_is_left(it) and journal(it, run_id)[-1] == "end", instant
            return lived

    instants = killed(0)
    assert instants > 30
    for instant in range(1, instants + 1, step):
        assert killed(instant) == instant


def line(attempt: int, step: int, **facts: Any) -> bytes:
    made = {"v": 1, "kind": "step", "attempt": attempt, "global_step": step, **facts}
    return json.dumps(made).encode() + b"\n"


def manifest(files: dict[str, bytes]) -> bytes:
    facts = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
             for n, d in files.items()}  # fmt: skip
    return json.dumps({"v": 1, "step": 10, "files": facts}).encode()


def finished(it: Scene) -> tuple[Run, Any]:
    """A run that is over, with all that a mirror leaves."""
    run_id = begin(it)
    store = open_store(root(run_id))
    files = {"model.safetensors": b"w" * 5000, "state/__0_0.distcp": b"s" * 3000}
    for name, data in files.items():
        store.put_bytes(f"checkpoints/step-10/{name}", data)
    store.put_bytes("checkpoints/step-10/MANIFEST.json", manifest(files))
    store.put_bytes("checkpoints/step-20/model.safetensors", b"half")
    store.put_bytes("checkpoints/last.json", b'{"v": 1, "step": 10, "path": "step-10"}')
    for name, data in {
        "metrics/0001-00000.jsonl": line(1, 10), "metrics/0001-00001.jsonl": line(1, 20),
        "metrics/0001r1-00000.jsonl": line(1, 20, restart=1, train_loss=2.0),
        "logs/worker-0/00-0001-00000.log": b"2026-11-21T08:32:46.123456Z one\n",
        "logs/worker-0/00-0001-00001.log": b"2026-11-21T08:32:47.123456Z two\n",
        "logs/worker-0/00-0001r10-00000.log": b"2026-11-21T08:32:49.123456Z four\n",
        "logs/worker-0/00-0001r2-00000.log": b"2026-11-21T08:32:48.123456Z three\n",
        "boot/x-j0-a1.json": b"{}", "evaluation.json": b'{"val_loss": 2.5}',
    }.items():  # fmt: skip
        store.put_bytes(name, data)
    return drive(it, run_id), store


def test_pull_brings_whole_checkpoints_and_one_file_of_each_growing_one(
    it: Scene, tmp_path: Path
) -> None:
    run, store = finished(it)
    to = pull(run, tmp_path / "pulled", opened(it, run.id))
    found = {f.relative_to(to).as_posix() for f in to.rglob("*") if f.is_file()}
    assert found == {
        ".versions.json", "pulled.json", "checkpoints/last.json", "evaluation.json",
        "checkpoints/step-10/MANIFEST.json", "checkpoints/step-10/model.safetensors",
        "checkpoints/step-10/state/__0_0.distcp", "logs/worker-0.log", "metrics.jsonl",
        "recipe.yaml", "run_meta.json", "s0/evaluation.json", "s0/run_meta.json", "summary.json",
    }  # fmt: skip
    assert [text.split()[1] for text in (to / "logs/worker-0.log").read_text().splitlines()] == [
        "one", "two", "three", "four",
    ]  # fmt: skip
    steps = [json.loads(x) for x in (to / "metrics.jsonl").read_text().splitlines()]
    assert [(x["global_step"], x.get("restart")) for x in steps] == [(10, None), (20, 1)]
    it.clock.sleep(60)
    seen = len(it.server.log)
    pull(run, to, opened(it, run.id))
    assert not [t for _, t, _ in list(it.server.log)[seen:] if "alt=media" in t]
    store.delete("checkpoints/step-10/MANIFEST.json")
    it.clock.sleep(60)
    pull(run, to, opened(it, run.id))
    assert not (to / "checkpoints/step-10").exists(), "it was pruned there"


def test_an_interrupted_pull_goes_on_where_it_was(it: Scene, tmp_path: Path) -> None:
    run, store = finished(it)
    store.put_bytes("checkpoints/step-10/state/__0_0.distcp", b"damaged")
    with pytest.raises(Damaged, match="is not what its manifest says"):
        pull(run, tmp_path / "to", opened(it, run.id))
    assert not (tmp_path / "to/checkpoints/step-10").exists()
    it.clock.sleep(60)
    store.put_bytes("checkpoints/step-10/state/__0_0.distcp", b"s" * 3000)
    seen = len(it.server.log)
    pull(run, tmp_path / "to", opened(it, run.id))
    assert (tmp_path / "to/checkpoints/step-10/state/__0_0.distcp").read_bytes() == b"s" * 3000
    got = [target for _, target, _ in list(it.server.log)[seen:]]
    assert not any("model.safetensors" in target for target in got), "it was there already"


def test_a_damaged_checkpoint_costs_a_pull_that_one_alone(it: Scene, tmp_path: Path) -> None:
    run, store = finished(it)
    sound = store.get_bytes("checkpoints/step-10/MANIFEST.json")
    for name in ("model.safetensors", "state/__0_0.distcp"):
        store.put_bytes(
            f"checkpoints/step-30/{name}", store.get_bytes(f"checkpoints/step-10/{name}")
        )
    store.put_bytes("checkpoints/step-30/MANIFEST.json", sound)
    store.put_bytes("checkpoints/step-20/model.safetensors", b"damaged")
    store.put_bytes("checkpoints/step-20/MANIFEST.json", sound)
    store.put_bytes("checkpoints/step-5/MANIFEST.json", b"{")
    with pytest.raises(Damaged) as caught:
        pull(run, to := tmp_path / "to", opened(it, run.id))
    assert str(caught.value) == (
        f"{run.root}/checkpoints/step-20 is damaged: model.safetensors is not what its manifest "
        f"says; {run.root}/checkpoints/step-5 is damaged: MANIFEST.json cannot be read"
    )
    assert (caught.value.code, caught.value.hint) == (Exit.JOB, f"everything else is in {to}")
    whole = sorted(place.name for place in (to / "checkpoints").glob("step-*"))
    assert whole == ["step-10", "step-30"]
    assert {"evaluation.json", "metrics.jsonl", "run_meta.json"} <= {f.name for f in to.iterdir()}
    assert (to / "logs/worker-0.log").exists()


def test_logs_come_from_the_service_and_from_the_store_where_it_has_none(it: Scene) -> None:
    run, _ = finished(it)
    assert [x.text for x in logs.read(run, it.env)] == ["one", "two", "three", "four"]
    assert [x.text for x in logs.read(run, it.env, tail=1)] == ["four"]
    assert logs.workers(run) == [0]
    it.server.vertex.fates.append(Stub(1, 1, 10, lines=(Said(1, "from the service"),)))
    run = drive(it, begin(it))
    it.clock.sleep(60)
    assert [x.text for x in logs.read(run, it.env)] == ["from the service"]


def test_the_last_lines_are_waited_for_whatever_clock_noted_the_end(it: Scene) -> None:
    """The driver is another machine, an hour behind; the end was seen from here."""
    lines = (Said(1, "first"), Said(9, "the last line", late=20))
    it.server.vertex.fates.append(Stub(1, 1, 10, lines=lines))
    run = drive(it, begin(it))
    assert run.ended is not None
    seen = iter([replace(run, ended=None), replace(run, ended=run.ended - 3600)])
    texts = [x.text for x in logs.follow(lambda: next(seen), it.env)]
    assert texts == ["first", "the last line"]


def test_the_only_words_of_a_job_that_failed_at_once_are_shown(it: Scene) -> None:
    """They can be read only when the job is over; the store has nothing to show in their place."""
    line = Said(2.5, "cannot read gs://bkt/launch/bundles", late=10)
    it.server.vertex.fates.append(Stub(1, 1, 3, exited(1), lines=(line,)))
    run_id = begin(it)
    assert drive(it, run_id).exit_code == Exit.JOB
    followed = logs.follow(lambda: look(it, run_id), it.env)
    assert [line.text for line in followed] == ["cannot read gs://bkt/launch/bundles"]


def test_logs_that_may_not_be_read_from_the_service_come_from_the_store(it: Scene) -> None:
    run, _ = finished(it)
    it.server.faults = Script([("entries:list", Fault("status", 403))])
    assert [x.text for x in logs.read(run, it.env)] == ["one", "two", "three", "four"]
    assert it.server.faults.left == []


def test_lines_of_a_part_that_grows_come_once(it: Scene) -> None:
    run, store = finished(it)
    reader = logs.Reader(it.env)
    assert len(list(reader.new(run))) == 4
    part = "logs/worker-0/00-0001r10-00000.log"
    store.put_bytes(part, store.get_bytes(part) + b"2026-11-21T08:32:50.123456Z five\n")
    store.put_bytes("logs/worker-0/00-0001r10-00001.log", b"2026-11-21T08:32:51.123456Z six\n")
    assert list(reader.new(run)) == [], "a look just before is new enough"
    it.clock.sleep(5)
    assert [x.text for x in reader.new(run)] == ["five", "six"]


def test_restarts_by_the_service_are_shown_with_the_attempt(it: Scene) -> None:
    it.server.vertex.fates.append(Stub(2, 2, 20, PREEMPTED))
    run_id = begin(it)
    store = open_store(root(run_id))
    for name in ("00-0001", "00-0001r1", "00-0001r2", "00-0002", "01-0002r7"):
        store.put_bytes(f"attempts/{name}.json", b"{}")
    run = drive(it, run_id)
    assert [a.restarts for a in run.jobs[0].attempts] == [2, 0]
    shown = "\n".join(console.run_lines(look(it, run_id), it.clock.now()))
    assert "the beginning, 2 restarts" in shown and "step 120" in shown


def test_a_run_that_was_stopped_is_resumed_on_the_bucket(
    it: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = begin(it)
    artifacts = opened(it, run_id)
    write_marker(artifacts, it.clock.now(), "ann", "lunch")
    assert drive(it, run_id).phase is Phase.CANCELLED
    assert "summary.json" in artifacts.names()
    monkeypatch.setattr(api, "env", lambda: it.env)
    monkeypatch.setattr("launcher.driver.spawn", lambda run, env, lock: lock.close())
    assert api.resume(run_id).ended is None
    assert artifacts.names("control/") == ["control/stop-1.json"]
    assert "summary.json" not in artifacts.names()
    run = drive(it, run_id)
    assert run.phase is Phase.SUCCEEDED and journal(it, run_id).count("resumed") == 1


def test_resuming_what_another_laptop_has_resumed_changes_nothing(
    it: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = begin(it)
    write_marker(opened(it, run_id), it.clock.now(), "ann", "lunch")
    drive(it, run_id)
    other = laptop(it, tmp_path / "other")
    adopt(root(run_id), other)
    monkeypatch.setattr("launcher.driver.spawn", lambda run, env, lock: lock.close())
    monkeypatch.setattr(api, "env", lambda: other)
    api.resume(run_id)
    records_ = journal(it, run_id)
    monkeypatch.setattr(api, "env", lambda: it.env)
    with pytest.raises(HeldElsewhere):
        api.resume(run_id)  # the summary here still says that it is over
    assert journal(it, run_id) == records_


def test_of_two_laptops_that_resume_a_run_the_slower_one_takes_no_request_to_stop_away(
    it: Scene,
) -> None:
    """The faster one's run was asked to stop in the meantime."""
    run_id = begin(it)
    artifacts = opened(it, run_id)
    write_marker(artifacts, it.clock.now(), "ann", "lunch")
    drive(it, run_id)
    at = place(it, run_id)
    slow, fast = (Journal(at, artifacts, it.clock) for _ in range(2))
    stale, fresh = (Fold(one.read()) for one in (slow, fast))
    start.reopen(fresh, fast, at, (), it.env)
    write_marker(artifacts, it.clock.now(), "ann", "enough")
    it.clock.sleep(1.0)
    with pytest.raises(HeldElsewhere):
        start.reopen(stale, slow, at, (), it.env)
    run = drive(it, run_id)
    assert (run.why, it.server.vertex.created) == ("stopped: enough", [])


def test_what_a_report_reads_lies_here_after_a_refresh(it: Scene) -> None:
    run, store = finished(it)
    assert records.evaluation(here(run)) == {"val_loss": 2.5}
    assert not list(here(run).rglob("*.safetensors"))
    opened(it, run.id).refresh(LOGS)
    assert len(list(here(run).glob("logs/worker-0/*.log"))) == 4
    store.put_bytes("tensorboard/events.1", b"curve")
    opened(it, run.id).refresh(EVENTS)
    assert (here(run) / "tensorboard/events.1").read_bytes() == b"curve"


@pytest.mark.parametrize("board", [None, "gs://bkt/curves"])
def test_event_files_come_here_from_wherever_they_go(
    it: Scene, monkeypatch: pytest.MonkeyPatch, board: str | None
) -> None:
    run_id = begin(it, replace(recipe(), tensorboard=board))
    at = f"{root(run_id)}/tensorboard" if board is None else f"{board}/thing-{run_id[-6:]}"
    store = open_store(at)
    store.put_bytes("s0/events.1", b"curve")
    monkeypatch.setattr(api, "env", lambda: it.env)
    uri, folder = api.event_files(run_id)
    assert at.startswith(uri)
    (found,) = folder.rglob("events.*")
    assert found.read_bytes() == b"curve"
    store.put_bytes("s0/events.1", b"curve, longer")
    api.event_files(run_id)
    assert found.read_bytes() == b"curve, longer"


def test_a_record_that_vanished_from_the_store_is_restored_from_its_copy(it: Scene) -> None:
    run_id = begin(it)
    ours = Journal(place(it, run_id), opened(it, run_id), it.clock)
    ours.read()
    for number in range(3):
        ours.append("driver", number=number)
    before = ours.read()
    open_store(root(run_id)).delete("journal/00000002.json")
    assert ours.read(heal=True) == before and "is missing" in ours.warnings[0]
    assert journal(it, run_id) == ["created", *["driver"] * 3]


def test_stop_and_status_through_the_api_write_to_the_bucket(
    it: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(it.home))
    run_id = begin(it)
    found: Artifacts = opened(it, run_id)
    assert api.status(run_id).warnings[0].startswith("no driver since")
    monkeypatch.setattr("launcher.driver.spawn", lambda run, env, lock: lock.close())
    api.stop(run_id, "lunch")
    marker = json.loads(found.read("control/stop.json") or b"")
    assert marker["reason"] == "lunch"
    run = engine.drive(run_id, it.env, load)
    assert (run.phase, run.why) == (Phase.CANCELLED, "stopped: lunch")
    assert it.server.vertex.created == []


@pytest.mark.parametrize(
    ("code", "noted", "phase"),
    [(78, "secret HF_TOKEN: cannot read projects/p/secrets/t", Phase.FAILED),
     (75, "the bucket did not answer for 600 s", Phase.PREEMPTED)],
)  # fmt: skip
def test_why_a_job_failed_is_what_boot_noted_where_the_service_has_only_a_code(
    it: Scene, code: int, noted: str, phase: Phase
) -> None:
    it.server.vertex.fates.append(Stub(2, 2, 20, exited(code)))
    run_id = begin(it)
    store = open_store(root(run_id))
    for name, why in (("00-0001", "before"), ("00-0001r2", "before"), ("00-0001r10", noted)):
        record = {"v": 1, "exit_code": code, "why": why}
        store.put_bytes(f"attempts/{name}.json", json.dumps(record).encode())
    run = drive(it, run_id)
    attempt = run.jobs[0].attempts[0]
    assert (attempt.phase, attempt.exit_code, attempt.why) == (phase, code, noted)
    if phase is Phase.FAILED:
        assert run.why.startswith(noted) and len(run.jobs[0].attempts) == 1


OUTAGE = {"exit_code": 75, "why": "inputs: gs://b/x: does not answer", "cause": "infrastructure"}
SIGNAL = {"exit_code": 75, "why": "signal"}
TIME_UP = {"exit_code": 75, "why": "deadline", "cause": "deadline"}


@pytest.mark.parametrize(
    ("noted", "cause", "attempts", "code"),
    [(OUTAGE, "infrastructure", 3, Exit.JOB), (None, "infrastructure", 3, Exit.JOB),
     (SIGNAL, "preempted", 4, Exit.OK), ({}, "preempted", 4, Exit.OK),
     (TIME_UP, "deadline", 4, Exit.OK)],
)  # fmt: skip
def test_an_outage_before_the_workers_began_is_no_preemption(
    it: Scene, noted: Optional[dict[str, Any]], cause: str, attempts: int, code: int
) -> None:
    """Each such attempt pays for a machine that does nothing: `retry.infrastructure` counts them.
    Where the store itself was away, boot could note nothing."""
    it.server.vertex.fates.extend([Stub(2, 2, 20, exited(75))] * 3)
    run_id = begin(it)
    for number in range(1, 4):
        if noted is not None:
            record = json.dumps({"v": 1, "job": 0, "attempt": number, **noted}).encode()
            open_store(root(run_id)).put_bytes(f"attempts/00-{number:04d}.json", record)
    run = drive(it, run_id)
    made = run.jobs[0].attempts
    assert ([a.cause for a in made[:3]], len(made)) == ([cause] * 3, attempts)
    assert run.exit_code == code
    if noted is OUTAGE:
        assert run.why == f"{OUTAGE['why']} (3 times; retry.infrastructure: 2)"


def away(it: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing answers, as on a laptop without a network."""
    for name in ("STORAGE_EMULATOR_HOST", "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_what_cannot_be_asked_about_may_still_bill(
    it: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(it.home))
    monkeypatch.setattr("launcher.api.SystemClock", lambda: it.clock)
    it.server.vertex.fates.append(Stub(2, 2, None))
    run_id = begin(it)
    well = [("/b/bkt/o", Fault("slow"))] * 30
    it.server.faults = Script([*well, ("/b/bkt/o", Fault("status", 403))])
    with pytest.raises(Denied):
        drive(it, run_id)
    it.server.faults = Script()
    assert look(it, run_id).held is Held.LIVE
    away(it, monkeypatch)
    for command in (["teardown", run_id, "--yes"], ["sweep", "--yes"]):
        assert cli.run(command) == Exit.LEAKED
        said = capsys.readouterr().err
        assert "may still bill: " in said and "gcloud ai custom-jobs cancel" in said
        assert "127.0.0.1:9 does not answer (connection refused)" in said and "Pool(" not in said
