"""What the command line refuses, and how it says so: plans without a place, wrong words, folders
that are taken, errors for programs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import api, cli, console, doctor
from launcher.backends.base import Held, Phase
from launcher.backends.vertex import VertexBackend
from launcher.commands import follow
from launcher.errors import LaunchError
from launcher.run import Attempt, Driver, JobState, Run, StageState
from tests.launcher.fake_backend import World
from tests.launcher.recorded import Recorder, quickstart
from tests.launcher.runs import plugged_in
from tests.launcher.test_cli import Invoke, Outcome

_FAKE = """
launch: 1
name: thing
stage: tokenizer
hardware: {backend: fake, accelerator: "cpu:1"}
data: {train: [{builtin: python-reference}]}
tokenizer: {vocab_size: 512}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LAUNCH_OWNER", "me")
    monkeypatch.delenv("LAUNCH_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def launch(home: Path, capsys: pytest.CaptureFixture[str]) -> Invoke:
    def invoke(*words: str) -> Outcome:
        code = cli.run(words)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return invoke


# Plans that cannot be carried out.


@pytest.mark.parametrize("machine", ["g2-standard-8", "g2-standard-12"])
def test_a_machine_known_for_another_accelerator_is_refused(launch: Invoke, machine: str) -> None:
    words = ["plan", "kd-l4", "--set", f"hardware.vertex.machine={machine}"]

    outcome = launch(*words, "--set", "hardware.accelerator=A100-80GB:1")

    assert outcome.code == 2
    for fact in (f"{machine} carries L4", "A100-80GB:1", "leave it out (a2-ultragpu-1g"):
        assert fact in outcome.err, fact
    assert launch(*words).code == 0  # an L4, as that machine has
    assert launch("plan", "kd-l4", "--set", "hardware.vertex.machine=n1-own-8").code == 0


@pytest.mark.parametrize(
    ("asked", "meant", "machine"),
    [("H100", "H100:1", "a3-highgpu-1g"), ("a100:1", "A100-40GB:1", "a2-highgpu-1g")],
)
def test_a_plan_names_the_accelerator_that_was_understood(
    launch: Invoke, asked: str, meant: str, machine: str
) -> None:
    shown = launch("plan", "kd-l4", "--set", f"hardware.accelerator={asked}").out

    assert f"needs {meant} (vertex)" in shown and machine in shown
    assert f"hardware.accelerator {asked} means {meant}" in shown
    assert " means " not in launch("plan", "kd-l4").out


def test_a_count_that_no_machine_has_is_told_with_those_there_are(launch: Invoke) -> None:
    outcome = launch("plan", "kd-l4", "--set", "hardware.accelerator=H200")

    assert outcome.code == 2 and "holds H200:1; allowed: H200:8" in outcome.err


def test_without_any_place_plan_and_up_end_with_4_and_create_nothing(
    launch: Invoke, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.backends.local._gpus", lambda: [])
    words = ("quickstart", "--set", "hardware.accelerator=L4:1")

    planned, started = launch("plan", *words), launch("up", *words, "-d")
    facts = launch("plan", *words, "--json")

    assert (planned.code, started.code, facts.code) == (4, 4, 4)
    assert "cannot start: job 0: no capacity in this machine" in planned.out
    assert facts.json["refusal"]["exit_code"] == 4
    assert "no GPU" in started.err and started.out == ""
    with pytest.raises(LaunchError) as caught:
        api.up(Path(cli.__file__).parents[1] / "recipes" / "quickstart.yaml", overrides=words[2:])
    assert caught.value.code == 4
    assert not (home / "runs").exists()


def test_a_backend_that_only_plans_says_so_before_it_asks(
    launch: Invoke, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "confirm", lambda *words: pytest.fail("asked"))
    monkeypatch.setattr(VertexBackend, "can", replace(VertexBackend.can, create=False))

    outcome = launch("up", "kd-l4")

    assert (outcome.code, outcome.out) == (2, "")
    first, hint = outcome.err.splitlines()
    assert first == "error: backend 'vertex' only plans in this version: nothing was started"
    assert "--dry-run" in hint and "launch plan" in hint
    assert launch("up", "kd-l4", "--yes").code == 2
    assert not (home / "runs").exists()


def test_a_plan_says_which_defaults_stood_in_for_variables(
    launch: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", "mine")
    monkeypatch.delenv("PROJECT", raising=False)

    shown = launch("plan", "kd-l4").out

    assert shown.count("note: PROJECT is not set; the recipe says 'my-project'") == 1
    assert "BUCKET is not set" not in shown


# Asking, and what is refused without an answer.


@pytest.fixture
def world(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path / "world")
    plugged_in(monkeypatch, tmp_path, made)
    (tmp_path / "thing.yaml").write_text(_FAKE)
    return made


def test_what_costs_money_is_not_started_without_an_answer(
    launch: Invoke, home: Path, world: World
) -> None:
    outcome = launch("up", "thing.yaml")

    assert outcome.code == 2 and "--yes" in outcome.err and "costs money" in outcome.err
    assert not (home / "runs").exists()


def test_teardown_of_a_live_run_needs_an_answer_too(
    launch: Invoke, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, over = Recorder(home), quickstart(home, number=2)
    live.begin()
    torn: list[str] = []

    def torn_down(run: str, timeout: float | None) -> Run:
        torn.append(run)
        return api.status(run)

    monkeypatch.setattr(api, "teardown", torn_down)

    refused = launch("teardown", live.name)

    assert (refused.code, refused.out, torn) == (2, "", [])
    assert f"{live.name} is running" in refused.err and "--yes" in refused.err
    assert launch("teardown", over.name).code == 0
    assert launch("teardown", live.name, "--yes").code == 0
    assert torn == [over.name, live.name]


# Pulling.


def test_a_folder_takes_the_files_of_one_run_only(launch: Invoke, home: Path) -> None:
    one, other = quickstart(home, number=1), quickstart(home, number=2)

    assert launch("pull", one.name, "--to", "res").code == 0
    refused = launch("pull", other.name, "--to", "res")

    assert refused.code == 2
    assert one.name in refused.err and "--to" in refused.err
    assert launch("pull", one.name, "--to", "res").code == 0
    assert json.loads(Path("res/pulled.json").read_text())["id"] == one.id
    shutil.copy(one.place / "summary.json", "summary.json")  # of a version without pulled.json
    assert launch("pull", other.name, "--to", ".").code == 2


def test_a_disk_that_refuses_is_one_line_with_the_option_that_helps(
    launch: Invoke, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quickstart(home)
    pulled = launch("pull", made.name, "--to", "/proc/x")
    monkeypatch.setenv("LAUNCH_HOME", "/proc/x")
    started = launch("up", "quickstart", "-d")

    for outcome, option in ((pulled, "--to"), (started, "LAUNCH_HOME")):
        told, hint = outcome.err.splitlines()[-2:]
        assert outcome.code == 3 and "cannot write /proc/x" in told and "Errno" not in told
        assert option in hint
    assert "LAUNCH_HOME" not in pulled.err


# Words.


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("run", "launch up RECIPE"), ("cancel", "launch stop RUN"), ("ps", "launch status"),
        ("list", "launch status"), ("ls", "launch status"), ("down", "launch teardown RUN"),
        ("quickstart", "launch up quickstart"), ("pretrain_local", "launch up pretrain_local"),
        ("my.yaml", "launch up my.yaml"),
    ],
)  # fmt: skip
def test_a_word_of_another_tool_gets_our_verb(launch: Invoke, word: str, meant: str) -> None:
    outcome = launch(word, "x")

    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: no command '{word}'; did you mean `{meant}`?\n"


def test_an_option_without_its_value_leads_to_the_help_of_its_command(launch: Invoke) -> None:
    outcome = launch("up", "my.yaml", "--set")

    assert outcome.code == 2 and "`launch up --help`" in outcome.err


@pytest.mark.parametrize(
    "words",
    [
        ["status", "nobody", "--json"],
        ["up", "nothing.yaml", "--json"],
        ["plan", "quickstart", "--set", "a.b=1", "--json"],
        ["logs", "nobody", "--json"],
        ["teardown", "--all", "--json"],
        ["status", "--nope", "--json"],
    ],
)
def test_an_error_is_a_document_for_who_asked_for_json(launch: Invoke, words: list[str]) -> None:
    outcome = launch(*words)

    facts = outcome.json
    assert outcome.code == 2 and facts["v"] == 1
    assert set(facts["error"]) == {"message", "hint", "exit_code"}
    assert facts["error"]["exit_code"] == 2
    assert facts["error"]["message"].splitlines()[0] in outcome.err


def test_a_bug_is_a_document_too_and_without_json_there_is_none(
    launch: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "list_runs", lambda **options: 1 / 0)

    assert launch("status", "--json").json["error"]["exit_code"] == 1
    assert launch("status").out == ""
    assert launch("tensorboard", "x", "--json").out == ""  # it has no such option


def test_doctor_of_a_wrong_recipe_alone_is_2(launch: Invoke, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("launch: 1\n")

    assert launch("doctor", "bad.yaml").code == 2


# Logs.


def test_logs_of_a_worker_that_does_not_exist_name_those_that_do(
    launch: Invoke, home: Path
) -> None:
    made = quickstart(home)
    made.log(0, ["alpha"])
    made.log(1, ["beta"])

    outcome = launch("logs", made.name, "--worker", "5")

    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: {made.name} has no worker 5; there are: 0, 1\n"


def test_logs_of_a_run_that_has_none_yet_say_so_on_stderr(launch: Invoke, home: Path) -> None:
    made = quickstart(home)

    outcome = launch("logs", made.name, "--worker", "5")

    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == f"{made.name} has logged nothing yet\n"


# What a run is said to be.


def _run(alive: bool | None = True) -> Run:
    return Run(
        id="0" * 16, name="thing-1", recipe="thing", fingerprint="", owner="me", root="/r",
        created=0.0, phase=Phase.RUNNING, held=Held.LIVE, driver=Driver("box", 7, 0.0, 1, alive),
    )  # fmt: skip


def test_a_dead_driver_is_not_shown_as_one_that_lives() -> None:
    shown = {
        alive: console.run_lines(_run(alive), 1.0)[-1].strip() for alive in (True, False, None)
    }

    assert shown[True] == "driver     box, process 7"
    assert shown[False] == "driver     none; process 7 on box has died"
    assert "not known" in shown[None]


def test_after_a_failure_resume_promises_only_what_it_does(tmp_path: Path) -> None:
    from launcher.commands.follow import ending

    run = _run()
    run.phase, run.root = Phase.FAILED, str(tmp_path)
    run.stages = [
        StageState("a", "pretrain", 0, str(tmp_path / "a"), Phase.FAILED),
        StageState("b", "kd", 0, str(tmp_path / "b")),
    ]
    assert (
        ending(run, None)[-1] == "`launch resume thing-1` starts it again: there is no checkpoint"
    )
    run.stages[0].phase, run.stages[1].phase = Phase.SUCCEEDED, Phase.FAILED
    assert "starts stage b again: it has no checkpoint" in ending(run, None)[-1]
    whole = tmp_path / "b" / "checkpoints" / "step-5" / "MANIFEST.json"
    whole.parent.mkdir(parents=True)
    whole.touch()
    assert ending(run, None)[-1] == "`launch resume thing-1` goes on from the last checkpoint"


@pytest.mark.parametrize(
    ("exit_code", "first", "last"),
    [
        (64, "the recipe is at fault", "`launch resume thing-1 --set KEY=VALUE` (without"),
        (65, "the data is at fault: fix it first", "then `launch resume thing-1` starts it again"),
        (78, "the environment is at fault: fix it first", "then `launch resume thing-1` starts"),
        (1, "`launch resume thing-1` starts it again", "there is no checkpoint"),
    ],
)
def test_what_would_fail_again_is_to_be_put_right_first(
    tmp_path: Path, exit_code: int, first: str, last: str
) -> None:
    from launcher.commands.follow import ending

    run = _run()
    run.phase, run.root = Phase.FAILED, str(tmp_path)
    run.stages = [StageState("a", "pretrain", 0, str(tmp_path / "a"), Phase.FAILED)]
    attempts = [Attempt(1, Phase.PREEMPTED, exit_code=75), Attempt(2, exit_code=exit_code)]
    run.jobs = [JobState(0, "thing-1-j0", "local", ["a"], attempts), JobState(1, "j1", "local")]

    advice = [line for line in ending(run, None) if "launch" in line or "fault" in line]

    assert advice[0].startswith(first) and last in advice[-1]
    assert len(advice) == (2 if exit_code == 64 else 1)


def test_what_was_logged_before_a_resume_is_marked(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Recorder(home)
    made.begin()
    made.log(0, [f"old {number}" for number in range(30)])
    made.clock.sleep(100)
    began = made.clock.now()
    made.log(0, ["new 0", "new 1"], attempt=2)
    made.begin(attempt=2)
    made.end()

    assert follow.follow(made.run(), made.env, since=began, as_json=False) == 0

    shown = capsys.readouterr().out.splitlines()
    first, last = shown.index("--- the last lines logged before this command ---"), 21
    assert shown[first + 1 : first + last] == [f"old {number}" for number in range(10, 30)]
    assert shown[first + last : first + last + 3] == ["--- logged since ---", "new 0", "new 1"]

    assert follow.follow(made.run(), made.env, since=0.0, as_json=False) == 0
    assert "---" not in capsys.readouterr().out


def test_the_doctor_knows_every_extra() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    block = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = dict(re.findall(r"^(\w+) = \[(.*?)\]", block, re.MULTILINE | re.DOTALL))
    brought = {extra: set(re.findall(r'"([a-z0-9-]+)', text)) for extra, text in extras.items()}
    del brought["dev"]
    brought["train"].remove("nvidia-ml-py")  # doctor.py says why

    known = {extra: {name for _, name in packages} for extra, packages in doctor._EXTRAS.items()}
    assert known == brought


def test_a_dry_run_ends_with_one_verdict(launch: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from subprocess import CompletedProcess

    from launcher import dry_run

    monkeypatch.setattr(dry_run.subprocess, "run", lambda *a, **k: CompletedProcess(a, 0))

    outcome = launch("up", "quickstart", "--dry-run")

    assert outcome.code == 0
    assert outcome.out == "dry run of quickstart passed: 6 stages in 0 s; nothing was provisioned\n"
