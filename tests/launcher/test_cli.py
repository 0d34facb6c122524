"""The command line: what it prints where, its exit codes, and its manners."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import api, cli, shipped
from tests.launcher.recorded import GATE_LINE, Recorder, quickstart

_LAUNCH = [sys.executable, "-m", "launcher"]
Invoke = Callable[..., "Outcome"]


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


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
        assert "Traceback" not in err
        return Outcome(code, out, err)

    return invoke


def test_help_lists_every_command_and_every_option_is_explained(launch: Invoke) -> None:
    import typer

    group = typer.main.get_command(cli.app)
    named = [name for names in cli._SECTIONS.values() for name in names]

    assert sorted(named) == sorted(group.commands)  # type: ignore[attr-defined]
    shown = launch("--help").out
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert re.search(rf"^  {name} +\S", shown, re.MULTILINE), name
        assert command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"
    assert launch().out == shown


def test_version_is_one_line_on_stdout(launch: Invoke) -> None:
    outcome = launch("--version")

    assert (outcome.code, outcome.err) == (0, "")
    assert re.fullmatch(r"launch \d+\.\d+\.\d+\n", outcome.out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["statsu"], "Did you mean 'status'"),
        (["logs", "x", "--worer", "1"], "--worker"),
        (["logs"], "Missing argument 'RUN'"),
        (["status", "--limit", "0"], "--limit"),
        (["status", "--watch", "--json"], "--json does not go with --watch"),
        (["logs", "x", "--since", "yesterday"], "--since 'yesterday': not a time"),
        (["teardown"], "a RUN, or --all"),
        (["teardown", "x", "--all"], "a RUN, or --all"),
        (["teardown", "--all"], "there is no terminal to ask on"),
        (["up", "quickstart", "--dry-run", "--json"], "--json does not go with --dry-run"),
        (["up", "quickstrat"], "did you mean 'quickstart'?"),
        (["plan", "nowhere/x.yaml"], "nowhere/x.yaml"),
        (["init", "quickstrat"], "did you mean 'quickstart'?"),
    ],
)
def test_wrong_usage_is_one_clear_line_and_exit_code_2(
    words: list[str], said: str, launch: Invoke
) -> None:
    outcome = launch(*words)

    assert outcome.code == 2 and bool(outcome.out) == ("--json" in words)
    assert said in outcome.err
    assert sum(line.startswith("error: ") for line in outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    ["status", "logs", "stop", "resume", "attach", "teardown", "pull", "report", "tensorboard",
     "drive"],
)  # fmt: skip
def test_every_command_about_a_run_names_the_near_one(
    command: str, launch: Invoke, home: Path
) -> None:
    name = quickstart(home).name

    outcome = launch(command, name[:-1] + "x")

    assert (outcome.code, outcome.out) == (2, "")
    assert f"did you mean '{name}'?" in outcome.err


def test_every_problem_of_a_recipe_is_a_line_with_its_place(launch: Invoke, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("launch: 1\nname: Bad Name\nstage: kdd\nbudgt: {}\n")

    outcome = launch("validate", str(recipe))

    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert len(lines) >= 3
    assert all(re.match(rf"error: {re.escape(str(recipe))}:\d+:\d+: ", line) for line in lines)


def test_a_bug_of_ours_is_one_line_and_exit_code_1(
    launch: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("division by zero\nsecond line")

    monkeypatch.setattr(api, "list_runs", broken)

    outcome = launch("status")

    assert outcome.code == 1
    assert outcome.err == (
        "error: internal error: ZeroDivisionError: division by zero"
        " (LAUNCH_DEBUG=1 shows the traceback)\n"
    )
    monkeypatch.setenv("LAUNCH_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        launch("status")


def test_an_interrupt_is_130_and_a_refusal_of_the_disk_is_3(
    launch: Invoke, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quickstart(home)
    refused = launch("report", made.name, "-o", "/proc/nowhere/report.html")
    assert (refused.code, refused.err.count("\n")) == (3, 2)
    assert refused.err.startswith("error: cannot write /proc/nowhere/report.html: ")
    assert refused.err.endswith("  name another file: -o FILE\n")

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "list_runs", interrupted)
    assert launch("status").code == 130


def test_status_lists_newest_first_and_limits_finished_runs(launch: Invoke, home: Path) -> None:
    made = [quickstart(home, number=n) for n in range(5)]

    names = [line.split()[0] for line in launch("status", "--limit", "2").out.splitlines()]
    everything = launch("status", "--all", "--json").json

    assert names == ["NAME", made[4].name, made[3].name]
    assert everything["v"] == 1
    assert [run["name"] for run in everything["runs"]] == [run.name for run in reversed(made)]
    assert everything["runs"][0]["phase"] == "succeeded"


def test_status_of_one_run_by_prefix_and_as_json(launch: Invoke, home: Path) -> None:
    made = quickstart(home)

    shown = launch("status", made.name)
    facts = launch("status", made.id, "--json").json

    assert shown.code == 0 and made.name in shown.out and "compare" in shown.out
    assert (facts["v"], facts["id"], facts["exit_code"]) == (1, made.id, 0)


def test_a_run_without_its_driver_is_warned_about_on_stderr(launch: Invoke, home: Path) -> None:
    made = Recorder(home)
    made.begin()
    made.journal.append("driver")

    outcome = launch("status", made.name)

    assert outcome.code == 0
    assert "no driver since" in outcome.err and f"launch resume {made.name}" in outcome.err
    assert "no driver" not in outcome.out


def test_watching_a_run_that_is_over_prints_it_once_and_ends(launch: Invoke, home: Path) -> None:
    made = quickstart(home)

    assert launch("status", made.name, "--watch").out == f"{made.name}: succeeded\n"


def test_logs_by_worker_tail_time_and_as_json_lines(launch: Invoke, home: Path) -> None:
    made = quickstart(home)
    made.log(0, ["alpha", "beta", "gamma"])
    made.log(1, ["one", "two", "three"])
    name = made.name

    assert launch("logs", name, "--worker", "0").out.split() == ["alpha", "beta", "gamma"]
    assert launch("logs", name, "--tail", "1").out == "[1] three\n"
    assert launch("logs", name, "--worker", "2").out == ""
    stamped = launch("logs", name, "-t", "-n", "1", "--worker", "0").out
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z gamma\n", stamped)
    lines = [json.loads(line) for line in launch("logs", name, "--json").out.splitlines()]
    assert [(x["v"], x["worker"]) for x in lines] == [(1, w) for w in (0, 1, 0, 1, 0, 1)]
    assert launch("logs", name, "--since", "2030-01-01T00:00:00Z").out == ""
    assert launch("logs", name, "-f", "--worker", "1").out.split() == ["one", "two", "three"]


def test_a_reader_that_leaves_is_no_error(home: Path) -> None:
    made = quickstart(home)
    made.log(0, [f"line {n}" for n in range(50_000)], every=0.0001)
    process = subprocess.Popen(
        [*_LAUNCH, "logs", made.name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()

    assert process.stderr.read() == ""
    assert process.wait(30) == 0
    process.stderr.close()


def test_attaching_to_a_finished_run_shows_how_it_ended(launch: Invoke, home: Path) -> None:
    made = quickstart(home)
    made.log(0, ["the last words"])

    outcome = launch("attach", made.name)

    assert outcome.code == 0
    for fact in ("the last words", "student-kd", "5.2000", "gate of compare: passed", GATE_LINE,
                 "succeeded after 1m35s", f"artifacts: {made.root}", "report.html"):  # fmt: skip
        assert fact in outcome.out, fact
    facts = launch("attach", made.name, "--json").json
    assert facts["tables"][0]["rows"][0]["model"] == "student-kd"
    assert facts["gates"] == [{"stage": "compare", "passed": True, "lines": [GATE_LINE]}]
    assert Path(facts["report"]).is_file()


def test_a_failed_run_passes_its_exit_code_on(launch: Invoke, home: Path) -> None:
    made = Recorder(home)
    made.begin()
    made.end("failed", 6, why="the trainer ended with 1: no such file")

    outcome = launch("attach", made.name)

    assert outcome.code == 6
    assert "failed after" in outcome.out and "no such file" in outcome.out
    assert f"launch resume {made.name}" in outcome.out


def test_report_and_pull_print_where(launch: Invoke, home: Path, tmp_path: Path) -> None:
    made = quickstart(home)

    assert launch("report", made.name).out == f"{made.root}/report.html\n"
    assert launch("report", made.name, "-o", "mine.html", "--json").json["path"] == "mine.html"
    pulled = launch("pull", made.name, "--to", "copy")
    assert pulled.out.strip() == str(tmp_path / "copy")
    assert (tmp_path / "copy" / "kd" / "metrics.jsonl").is_file()


def test_shipped_recipes_are_listed_and_copies_of_them_stand_alone(
    launch: Invoke, tmp_path: Path
) -> None:
    listed = {entry["name"]: entry for entry in launch("recipes", "--json").json["recipes"]}
    assert {"quickstart", "kd-l4"} <= listed.keys()
    for name, entry in listed.items():
        assert entry["does"] and entry["needs"] and entry["costs"], name
        assert name in launch("recipes").out
        written = launch("init", name, f"copies-of-{name}/")
        assert written.code == 0
        copy = tmp_path / f"copies-of-{name}" / Path(entry["path"]).name
        assert copy.is_file()
        assert launch("validate", str(copy)).code == 0, name


def test_init_speaks_json(launch: Invoke, tmp_path: Path) -> None:
    outcome = launch("init", "quickstart", "mine.yaml", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.json == {"v": 1, "recipe": "mine.yaml", "written": ["mine.yaml"]}


def test_init_never_overwrites(launch: Invoke, tmp_path: Path) -> None:
    assert launch("init", "kd_l4", "mine.yaml").out == "wrote mine.yaml\n"
    (tmp_path / "mine.yaml").write_text("precious")

    outcome = launch("init", "kd-l4", "mine.yaml")

    assert outcome.code == 2 and "mine.yaml exists already" in outcome.err
    assert (tmp_path / "mine.yaml").read_text() == "precious"


def test_init_says_a_next_command_that_can_be_pasted(launch: Invoke) -> None:
    assert launch("init", "quickstart", "my own.yaml").err == "next: launch plan 'my own.yaml'\n"


def test_init_puts_recipes_that_share_a_base_into_one_folder(
    launch: Invoke, tmp_path: Path
) -> None:
    assert launch("init", "kd-a100").out == "wrote kd_a100.yaml\nwrote kd_l4.yaml\n"
    assert launch("init", "kd-h100").out == "wrote kd_h100.yaml\n"

    (tmp_path / "kd_l4.yaml").write_text("changed")
    outcome = launch("init", "kd-l4-precompute")

    assert outcome.code == 2
    assert "kd_l4.yaml exists already, and is not the one" in outcome.err
    assert "launch init kd-l4-precompute FOLDER/" in outcome.err
    assert not (tmp_path / "kd_l4_precompute.yaml").exists()
    assert (tmp_path / "kd_l4.yaml").read_text() == "changed"


def test_init_does_not_name_a_recipe_like_the_file_it_builds_on(
    launch: Invoke, tmp_path: Path
) -> None:
    outcome = launch("init", "kd-a100", "new/kd_l4.yaml")

    assert outcome.code == 2 and "builds on a file named kd_l4.yaml" in outcome.err
    assert not (tmp_path / "new").exists()


def test_recipes_are_found_in_a_wheel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "launcher"
    (package / "recipes").mkdir(parents=True)
    (package / "recipes" / "some_thing.yaml").write_text("description: x\n")
    monkeypatch.setattr(shipped, "_PACKAGE", package)

    assert shipped.names() == ["some-thing"]
    assert shipped.find("some-thing") == package / "recipes" / "some_thing.yaml"


def test_init_copies_what_a_recipe_builds_on_too(
    launch: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "launcher"
    (package / "recipes").mkdir(parents=True)
    for name, text in {
        "both": "extends: base.yaml  # shared\npipeline:\n  - {id: a, recipe: part.yaml}\n",
        "base": "name: base\n# extends: unused.yaml\n",
        "part": "name: part\n",
        "unused": "name: unused\n",
    }.items():
        (package / "recipes" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(shipped, "_PACKAGE", package)

    assert launch("init", "both", "mine/").code == 0

    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "base.yaml", "both.yaml", "part.yaml",
    ]  # fmt: skip


def test_schema_plan_and_validate_speak_json(launch: Invoke) -> None:
    assert launch("schema").json["$schema"].startswith("https://json-schema.org/")
    assert launch("plan", "quickstart", "--json").json["v"] == 1
    facts = launch("validate", "quickstart", "--json").json
    assert (facts["v"], facts["recipe"]["name"]) == (1, "quickstart")


def test_doctor_fails_with_3_when_something_is_missing(
    launch: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = launch("doctor", "quickstart", "--json")
    assert healthy.code == 0 and healthy.json["ok"] is True
    names = [row["name"] for row in healthy.json["checks"]]
    assert {"python", "launch home", "disk", "extra train", "recipe"} <= set(names)
    assert any(name.startswith("local: ") for name in names)

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path / "file" / "home"))
    (tmp_path / "bad.yaml").write_text("launch: 1\n")
    sick = launch("doctor", "bad.yaml")
    assert sick.code == 3
    rows = {line.split("  ")[0]: line for line in sick.out.splitlines()}
    assert "fail" in rows["launch home"] and "is not a folder" in rows["launch home"]
    assert "fail" in rows["recipe"]
    assert "fix: set LAUNCH_HOME" in sick.out


def test_the_doctor_names_a_package_that_one_stage_needs(
    launch: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )

    sick = launch("doctor", "qlora-local")

    assert sick.code == 3
    wanted = "adapter: model.adapter.quantization: nf4 needs bitsandbytes: not installed"
    assert re.search(rf"^package +fail +{wanted}\n  fix: pip install 'launch-llm\[quantize\]'",
                     sick.out, re.MULTILINE)  # fmt: skip
    assert not re.search("^package ", launch("doctor", "lora-local").out, re.MULTILINE)


def test_a_shell_completes_commands_runs_and_recipes(home: Path) -> None:
    made = quickstart(home)

    def completed(words: str) -> list[str]:
        environ = {**os.environ, "_LAUNCH_COMPLETE": "complete_bash", "COMP_WORDS": words,
                   "COMP_CWORD": str(words.count(" "))}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", "from launcher.cli import main; main()"],
            env=environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.split()

    assert completed("launch sta") == ["status"]
    assert completed("launch logs qui") == [made.name]
    assert completed("launch up quick") == ["quickstart"]
