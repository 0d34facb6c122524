"""Whom a run's driver tells what: real webhooks on this machine, real commands, and no secret."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher import changes, cli, engine, notify, view
from launcher.backends.base import Env, Phase
from launcher.claim import claimed
from launcher.clock import ManualClock
from launcher.errors import Exit, RecipeErrors
from launcher.journal import Journal
from launcher.notify import deliver
from launcher.recipe import load as load_recipe
from launcher.spec import Budget, Gate, Notify, Recipe
from tests.launcher import rehearsed
from tests.launcher.runs import Scene, killed_at, load, recipe, scene
from tests.stub_jobs import eventually

SECRET = "T0KEN-of-the-webhook"
ALL = ("ended", "failed", "budget", "preempted", "leaked", "gate")


class Hook:
    """A chat tool: it answers `answers` in turn, then 200; None: it does not answer at all."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.answers: list[int | None] = []
        self.tries = 0
        self.done = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.tries += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = hook.answers.pop(0) if hook.answers else 200
                if answer is None:
                    hook.done.wait(30)
                    return
                if answer == 200:
                    assert self.path == f"/services/{SECRET}"
                    hook.got.append(json.loads(body))
                self.send_response(answer)
                if answer == 302:
                    self.send_header("Location", f"{hook.url}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                hook.got.append({"event": "a redirect was followed"})

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/{SECRET}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def events(self) -> list[str]:
        return [told["event"] for told in self.got]


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Hook()
    yield made
    made.done.set()
    made.server.shutdown()
    made.server.server_close()


def told(folder: Path, hook: Hook, *, on: tuple[Any, ...] = ALL, **given: Any) -> Scene:
    """A run whose webhook is the hook."""
    script = given.pop("script", {})
    stages = given.pop("stages", 1)
    made = recipe(stages, **given)
    made = Recipe(**{**vars(made), "notify": (Notify(webhook="env://SLACK_URL", on=on),)})
    it = scene(folder, made, **script)
    environ = {**it.env.environ, "SLACK_URL": hook.url}
    return Scene(Env(it.env.home, environ, it.env.clock, "me", sys.executable), it.world, it.run_id)


def test_the_end_is_told_once_with_everything_a_reader_needs(tmp_path: Path, hook: Hook) -> None:
    it = told(tmp_path, hook)
    run = it.drive()
    (said,) = hook.got
    assert {key: said[key] for key in ("v", "event", "run", "recipe", "phase", "exit_code")} == {
        "v": 1, "event": "ended", "run": run.name, "recipe": "thing", "phase": "succeeded",
        "exit_code": 0,
    }  # fmt: skip
    assert said["spent_usd"] == pytest.approx(run.spent_usd) and said["root"] == run.root
    assert said["text"].startswith(f"{run.name} succeeded after ") and "\n" not in said["text"]
    it.drive()
    assert len(hook.got) == 1
    kinds = it.kinds()
    assert kinds.index("end") < kinds.index("notified"), "first the record, then the word"


def test_preempted_then_almost_spent_then_stopped_by_the_budget(tmp_path: Path, hook: Hook) -> None:
    jobs = [{"looks": 3, "end": "preempted"}, {"looks": None}]
    it = told(tmp_path, hook, budget=Budget(usd=2.0), script={"jobs": jobs})
    run = it.drive()
    assert run.exit_code == Exit.BUDGET
    by_exit = sorted((said["event"], said["exit_code"]) for said in hook.got if said["exit_code"])
    assert by_exit == [("budget", 5)]
    assert sorted(hook.events()) == ["budget", "budget", "preempted"]
    almost = next(s for s in hook.got if s["event"] == "budget" and s["exit_code"] is None)
    assert "budget.usd: 1.6" in almost["text"] and "of 2.00 USD are used" in almost["text"]
    (again,) = [said["text"] for said in hook.got if said["event"] == "preempted"]
    assert "attempt 2 goes on from the beginning" in again


def test_of_a_budget_that_was_raised_it_is_told_once_more(tmp_path: Path, hook: Hook) -> None:
    it = told(tmp_path, hook, budget=Budget(hours=1.0), script={"jobs": [{"looks": None}]})

    class Raising(ManualClock):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if "notified" in it.kinds() and not changes.last(it.place):
                changes.leave(it.place, 0.0, "me", {"budget": {"hours": 2.0}})

    env = Env(it.env.home, it.env.environ, Raising(), "me", sys.executable)
    assert engine.drive(it.run_id, env, load).exit_code == Exit.BUDGET
    almost = sorted(said["text"] for said in hook.got if said["exit_code"] is None)
    assert ["0.80 of 1.00 h" in almost[0], "1.60 of 2.00 h" in almost[1]] == [True, True]


@pytest.mark.parametrize(
    ("script", "gate", "on", "event"),
    [
        ({"jobs": [{"end": "failed"}]}, None, ALL, "failed"),
        ({"jobs": [{"evaluation": {"loss": 4.0}}]}, Gate("loss", max=3.0), ALL, "gate"),
        ({"jobs": [{"evaluation": {"loss": 4.0}}]}, Gate("loss", max=3.0), ("failed",), "failed"),
        ({"delete": ["denied"] * 9}, None, ALL, "leaked"),
        ({"jobs": [{"end": "failed"}]}, None, ("ended", "budget"), None),
    ],
)
def test_what_an_end_is_called(
    tmp_path: Path, hook: Hook, script: Any, gate: Any, on: Any, event: Any
) -> None:
    told(tmp_path, hook, on=on, gate=gate, script=script).drive()
    assert hook.events() == ([event] if event else [])


def test_a_hook_that_fails_is_tried_three_times_and_said_once(
    tmp_path: Path, hook: Hook, capfd: pytest.CaptureFixture[str]
) -> None:
    hook.answers = [500, 503, 429, 500]
    it = told(tmp_path, hook)
    run = it.drive()
    assert (run.phase, run.exit_code, hook.tries) == (Phase.SUCCEEDED, 0, 3)
    line = "'ended' could not be told to webhook env://SLACK_URL: it answers 429"
    assert capfd.readouterr().err.count(line) == 1
    facts = {"id": run.id, "name": run.name, "root": run.root}
    seen = view.look(it.env, facts)
    assert seen.warnings == [line], "status says it, from the summary"


@pytest.mark.parametrize(
    ("answers", "why", "tries"),
    [
        ([404], "it answers 404", 1),
        ([302], "it answers 302", 1),
        ([500, 200], "", 2),
        ([None] * 3, "it does not answer (TimeoutError)", 2),
    ],
)
def test_answers(hook: Hook, answers: list[int | None], why: str, tries: int) -> None:
    hook.answers = answers
    clock = ManualClock()
    env = Env(Path("/nowhere"), {"SLACK_URL": hook.url}, clock, "me", sys.executable)
    patience = 0.4 if None in answers else 10.0
    said = {"event": "ended", "run": "thing-1"}
    assert deliver(Notify(webhook="env://SLACK_URL"), said, env, patience) == why
    assert hook.tries == tries or (tries == 2 and hook.tries == 1)  # a slow machine: one was enough


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("", "SLACK_URL is not set where the driver runs"),
        ("http://hooks.example.com/x", "its address does not begin with https://"),
        ("file:///etc/passwd", "its address does not begin with https://"),
        (f"https://127.0.0.1:1/{SECRET} two words", "it does not answer (InvalidURL)"),
        (f"https://127.0.0.1:1/{SECRET}", "it cannot be reached: Connection refused"),
        (f"https://[{SECRET}", "it is no address"),
    ],
)
def test_an_address_that_cannot_be_used_is_not_repeated(
    address: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    env = Env(Path("/nowhere"), {"SLACK_URL": address}, ManualClock(), "me", sys.executable)
    said = {"event": "ended", "run": "thing-1"}
    assert deliver(Notify(webhook="env://SLACK_URL"), said, env) == why


def test_an_address_in_secret_manager_is_read_when_it_is_used(tmp_path: Path, hook: Hook) -> None:
    webhook = Notify(webhook="secret-manager://proj/hook")
    said = {"event": "ended", "run": "thing-1"}
    with rehearsed.scene(tmp_path) as it:
        it.server.secrets.values["proj/hook"] = hook.url
        assert deliver(webhook, said, it.env) == "" and hook.events() == ["ended"]
        it.server.secrets.denied.add("proj/hook")
        why = deliver(webhook, said, it.env)
        assert "denied" in why.lower() and SECRET not in why
        del it.server.secrets.values["proj/hook"]
        it.server.secrets.denied.clear()
        assert "hook" in deliver(webhook, said, it.env)
    assert hook.tries == 1


def test_a_deaf_hook_does_not_hold_the_run_up(tmp_path: Path, hook: Hook) -> None:
    """It is told of a preemption and never answers; the second attempt runs to its end."""
    hook.answers = [None] * 3
    it = told(tmp_path, hook, on=("preempted",), script={"jobs": [{"end": "preempted"}, {}]})
    with claimed(it.run_id, it.at(None), load, None, take_over=False) as claim:
        claim.env = Env(it.env.home, it.env.environ, claim.clock, "me", sys.executable)
        driven = engine.Engine(claim)
        driven.herald.patience = 0.3
        run = driven.drive()
    assert (run.phase, len(run.jobs[0].attempts)) == (Phase.SUCCEEDED, 2)
    assert any("'preempted' could not be told" in warning for warning in run.warnings)


def test_a_command_gets_the_message_and_its_failure_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "told.json"
    script = (
        "import json, os, sys; told = json.load(sys.stdin);"
        "told['env'] = [os.environ['LAUNCH_EVENT'], os.environ['LAUNCH_RUN']];"
        f"open({str(out)!r}, 'w').write(json.dumps(told))"
    )
    good = Notify(command=(sys.executable, "-c", script))
    bad = Notify(command=(sys.executable, "-c", "raise SystemExit(3)"))
    absent = Notify(command=("no-such-program-here",))
    it = scene(tmp_path, Recipe(**{**vars(recipe()), "notify": (good, bad, absent)}))
    run = it.drive()
    said = json.loads(out.read_text())
    assert said["env"] == ["ended", run.name] and said["text"].startswith(run.name)
    assert run.exit_code == 0 and sorted(run.warnings) == [
        f"'ended' could not be told to command {sys.executable}: it ended with exit code 3",
        "'ended' could not be told to command no-such-program-here: it cannot be started: "
        "No such file or directory",
    ]


class Dripping:
    """A server that sends `first` at once, then one byte every 50 ms until it is hung up on."""

    def __init__(self, first: bytes) -> None:
        self.first, self.hung_up = first, threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/{SECRET}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            threading.Thread(target=self._drip, args=(connection,), daemon=True).start()

    def _drip(self, connection: socket.socket) -> None:
        pause = threading.Event()
        with connection:
            connection.recv(65536)
            connection.send(self.first)
            try:
                while not pause.wait(0.05):
                    connection.send(b"y")
            except OSError:
                self.hung_up.set()


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", "it does not answer (TimeoutError)"),
        (b"HTTP/1.1 200", "it does not answer (TimeoutError)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n", ""),  # it has answered
        (b"HTTP/1.1 500 No\r\nContent-Length: 10000\r\n\r\n", "it answers 500"),
    ],
)
def test_an_answer_that_drips_is_cut_at_the_end_of_the_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bytes, why: str
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    slow = Dripping(first)
    env = Env(tmp_path, {"SLACK_URL": slow.url}, ManualClock(), "me", sys.executable)
    begun = time.monotonic()
    assert deliver(Notify(webhook="env://SLACK_URL"), {"event": "ended"}, env, 0.6) == why
    assert time.monotonic() - begun < 5
    assert slow.hung_up.wait(10)


def test_a_delivery_that_nothing_ends_is_given_up_while_the_run_goes_on(
    tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a look-up of a name is, which has no limit of its own."""
    it, stuck = told(tmp_path, hook, on=("leaked",)), threading.Event()
    it.drive()
    env = Env(tmp_path, {"SLACK_URL": hook.url}, ManualClock(), "me", sys.executable)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: stuck.wait(30) and [])
    with claimed(it.run_id, it.at(None), load, None, take_over=False) as claim:
        herald = notify.Herald(claim)
        to = Notify(webhook="env://SLACK_URL")
        told_now = {"event": "ended", "run": "thing-1"}
        herald._under_way = [notify._Delivery(to, told_now, env, patience=0.1)]

        def given_up() -> bool:
            herald.tell()
            return not herald._under_way

        eventually(given_up, "the delivery is given up")
    stuck.set()
    (said,) = [record for record in it.records() if record["kind"] == "undelivered"]
    assert said["why"] == "not done within 0.1 s"


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {note}; wait"
    env = Env(tmp_path, dict(os.environ), ManualClock(), "me", sys.executable)
    said = {"event": "ended", "run": "thing-1"}
    why = deliver(Notify(command=("sh", "-c", script)), said, env, patience=1.0)
    assert why.endswith("killed")
    eventually(lambda: not _lives(int(note.read_text())), "the end of its child")


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_killed_at_any_instant_no_event_is_told_twice(tmp_path: Path, hook: Hook) -> None:
    def lived(instant: int) -> int:
        folder = tmp_path / str(instant)
        folder.mkdir()
        hook.got.clear()
        it = told(folder, hook, script={"jobs": [{"end": "preempted"}, {}]})
        count = killed_at(instant, lambda: engine.drive(it.run_id, it.env, load))
        engine.drive(it.run_id, it.env, load)
        events = hook.events()
        assert len(events) == len(set(events)) and set(events) <= {"preempted", "ended"}, instant
        ids = [r["id"] for r in it.records() if r["kind"] == "notified"]
        assert len(ids) == len(set(ids))
        return count

    instants = lived(0)
    assert sorted(hook.events()) == ["ended", "preempted"], "a driver that lives tells everything"
    for instant in range(1, instants + 1, 5):
        assert lived(instant) == instant


def test_a_recipe_of_another_machine_tells_nobody_and_runs_nothing_here(
    tmp_path: Path, hook: Hook, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "ran"
    it = told(tmp_path, hook)
    with claimed(it.run_id, it.env, load, None, take_over=True) as claim:
        both = (*claim.recipe.notify, Notify(command=("touch", str(mark))))
        claim.recipe = Recipe(**{**vars(claim.recipe), "notify": both})
        claim.foreign = True
        herald = notify.Herald(claim)
        claim.record("end", phase=Phase.FAILED, why="it broke", exit_code=6)
        herald.finish()
        herald.finish()
        assert "notified" not in it.kinds()
        claim.foreign = False
        notify.Herald(claim).finish()
    assert mark.exists() and hook.events() == ["failed"], "by the same call, where it is ours"
    assert capfd.readouterr().err.count("nobody is told") == 1


def test_a_journal_that_another_driver_has_taken_tells_nobody_and_fails_nothing(
    tmp_path: Path, hook: Hook, capfd: pytest.CaptureFixture[str]
) -> None:
    it = told(tmp_path, hook)
    with claimed(it.run_id, it.env, load, None, take_over=True) as claim:
        claim.record("end", phase=Phase.FAILED, why="it broke", exit_code=6)
        other = Journal(tmp_path / "elsewhere", it.root, ManualClock())
        other.read()
        other.append("driver")
        notify.Herald(claim).finish()
    assert hook.tries == 0 and "notify: " in capfd.readouterr().err


def test_no_address_in_anything_that_is_written(
    tmp_path: Path, hook: Hook, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hook.answers = [500] * 3
    it = told(tmp_path, hook, budget=Budget(usd=1.0), script={"jobs": [{"looks": None}]})
    run = it.drive()
    assert any("could not be told" in warning for warning in run.warnings)
    monkeypatch.setenv("LAUNCH_HOME", str(it.env.home))
    for words in (["status", run.name], ["status", run.name, "--json"], ["costs", "--json"]):
        assert cli.run(words) == 0
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


RECIPE = """\
launch: 1
name: one
stage: tokenizer
data: {train: [{builtin: python-reference}]}
tokenizer: {vocab_size: 300}
"""


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (f"[{{webhook: https://hooks.example.com/{SECRET}}}]", "webhook: must be a reference"),
        (f"[{{webhook: [{SECRET}]}}]", "webhook: expected env://NAME"),
        ("[{webhook: env://A, command: [b]}]", "give either this or `command`"),
        ("[{on: [ended]}]", "give either this or `command`"),
        ("[{command: [./tell.sh]}]", "must begin with a program on PATH or an absolute path"),
        ("[{command: [tell], on: [end]}]", "did you mean 'ended'?"),
        ("[{command: [tell], on: []}]", "must name at least one event"),
    ],
)
def test_what_is_refused_in_a_recipe_and_without_the_address(
    tmp_path: Path, block: str, problem: str
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"{RECIPE}notify: {block}\n")
    with pytest.raises(RecipeErrors) as refused:
        load_recipe(file, environ={})
    assert problem in str(refused.value) and f"{file}:6:" in str(refused.value)
    assert SECRET not in str(refused.value)


def test_a_recipe_with_both_kinds_is_recorded_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        f"{RECIPE}notify: [{{webhook: secret-manager://p/hook}}, {{command: [a, b], on: [gate]}}]\n"
    )
    made = load_recipe(file, environ={}).recipe
    assert made.notify == (
        Notify(webhook="secret-manager://p/hook"), Notify(command=("a", "b"), on=("gate",)),
    )  # fmt: skip
    it = scene(tmp_path, made)
    again = Journal(it.place, it.root, ManualClock()).read()[0]["recipe"]["notify"]
    assert again[0]["webhook"] == "secret-manager://p/hook" and again[1]["on"] == ["gate"]
