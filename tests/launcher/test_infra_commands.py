"""`launch infra`, against the stand-in for the engine's command line: what is asked, said and
left, and which exit code follows."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

pytest.importorskip("pulumi_gcp", reason="needs the extra `infra`")
pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")

from launcher import cli
from launcher.clock import ManualClock
from launcher.rehearsal.google import Google
from tests.infra.stand_in import StandIn

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
launch: 1
name: tuna
stage: smoke
smoke: {}
hardware:
  backend: vertex
  accelerator: L4:1
  vertex: {project: proj-1, service_account: trainer@proj-1.iam.gserviceaccount.com}
budget: {usd: 5, hours: 1}
artifacts: gs://tuna-models/runs/{run}
"""
#: Seconds that a process may take until it says what is waited for.
_LIMIT = 60.0


@pytest.fixture
def engine(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path / "stand-in")


@pytest.fixture
def environ(tmp_path: Path, engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{engine.bin}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuna.yaml").write_text(RECIPE)
    for name in [name for name in os.environ if name.startswith("PULUMI")]:
        monkeypatch.delenv(name)
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[StandIn, Path]:
    """A stand-in and a $LAUNCH_HOME after one `up`, for the tests that start there."""
    folder = tmp_path_factory.mktemp("template")
    engine, home = StandIn(folder / "stand-in"), folder / "home"
    (folder / "tuna.yaml").write_text(RECIPE)
    path = f"{engine.bin}:{os.environ['PATH']}"
    subprocess.run(
        [sys.executable, "-m", "launcher", "infra", "up", "tuna.yaml", "--yes"], check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LAUNCH_HOME": str(home), "PATH": path},
        cwd=folder, capture_output=True,
    )  # fmt: skip
    return engine, home


@pytest.fixture
def made(
    template: tuple[StandIn, Path], environ: dict[str, str], engine: StandIn, tmp_path: Path
) -> StandIn:
    """The stand-in after an `up` of the recipe."""
    engine.copy(*template, tmp_path / "home")
    return engine


Told = tuple[int, str, str]
Launch = Callable[..., Told]


@pytest.fixture
def launch(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Launch:
    def run(*words: str) -> Told:
        capsys.readouterr()
        code = cli.run(["infra", *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


class Process:
    """A real `launch infra ...`, whose notices can be waited for."""

    def __init__(self, environ: dict[str, str], *words: str) -> None:
        self.seen: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher", "infra", *words],
            env=environ, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def until(self, text: str) -> None:
        stream: IO[str] | None = self.process.stderr
        assert stream is not None
        for line in stream:
            self.seen.append(line.rstrip())
            if text in line:
                return
        pytest.fail(f"it ended without {text!r}: {self.seen}")

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """The exit code; the rest of what it says is in `seen`."""
        assert self.process.stderr is not None  # not `communicate`: it forgets what is read ahead
        self.seen += self.process.stderr.read().splitlines()
        return self.process.wait(_LIMIT)


@pytest.fixture
def start(environ: dict[str, str]) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def make(*words: str) -> Process:
        started.append(Process(environ, *words))
        return started[-1]

    yield make
    for one in started:
        one.process.kill()
        one.process.wait()


def _locks(home: Path) -> list[Path]:
    return list((home / "infra" / "state").rglob("locks/**/*.json"))


def _state(engine: StandIn, tmp_path: Path) -> dict[str, Any]:
    latest: dict[str, Any] = engine.state(tmp_path / "home" / "infra")["checkpoint"]["latest"]
    return latest


def test_a_plan_lists_every_resource_in_the_order_of_the_declaration(
    launch: Launch, engine: StandIn
) -> None:
    code, out, err = launch("plan", "tuna.yaml")

    assert code == 0, (out, err)
    lines = out.splitlines()
    assert lines[0].split() == ["CHANGE", "KIND", "NAME"]
    names = [line.split()[3] for line in lines[1:-1]]
    assert all(line.startswith("+ create") for line in lines[1:-1])
    services = [name for name in names if name.startswith("service-")]
    assert names[: len(services)] == services
    assert names[len(services) :][:2] == ["bucket", "account-trainer"]
    assert lines[-1] == f"{len(names)} to change, 0 as they should be"
    assert engine.cloud == {}


def test_a_second_up_changes_nothing_and_says_what_recipes_use(
    launch: Launch, made: StandIn
) -> None:
    before = made.cloud

    code, out, err = launch("up", "tuna.yaml", "--json")  # nothing to change: nothing to ask
    assert code == 0, (out, err)
    document = json.loads(out)
    assert {change["change"] for change in document["changes"]} == {"same"}
    assert document["outputs"]["service_accounts"] == ["trainer@proj-1.iam.gserviceaccount.com"]
    assert made.cloud == before

    code, out, err = launch("status", "tuna.yaml", "--refresh")
    assert code == 0, (out, err)
    assert f"proj-1.tuna-models: {len(before)} resources" in out
    assert "bucket: gs://tuna-models\n" in out
    assert "last: up succeeded" in out
    assert "drift: none" in out


def test_without_a_terminal_nothing_is_changed_unless_yes_is_said(
    launch: Launch, engine: StandIn
) -> None:
    for words in (("up", "tuna.yaml"), ("up", "tuna.yaml", "--json")):
        code, out, err = launch(*words)
        assert code == 2, (out, err)
        assert "add --yes" in err
    assert engine.cloud == {}


def test_without_a_terminal_nothing_is_deleted_unless_yes_is_said(
    launch: Launch, made: StandIn
) -> None:
    before = made.cloud

    code, out, err = launch("destroy", "tuna.yaml")

    assert code == 2, (out, err)
    assert "add --yes" in err
    assert made.cloud == before


def test_a_destroy_that_is_agreed_to_leaves_the_bucket_and_says_so(
    launch: Launch, environ: dict[str, str], made: StandIn
) -> None:
    code, told = _typed(environ, "tuna-models")

    assert code == 0
    assert "\n3 to change, 6 that stay" in told.replace("\r", "")
    assert "nothing is left of it" in told
    assert "gs://tuna-models and all in it stay" in told
    assert [key for key in made.cloud if "storage/bucket:" in key]
    assert not [key for key in made.cloud if "serviceaccount" in key]
    assert launch("destroy", "tuna.yaml")[:2] == (0, "proj-1.tuna-models: nothing was made\n")


def test_a_refusal_names_the_resource_and_what_to_do(launch: Launch, engine: StandIn) -> None:
    engine.faults(fail={"bucket": "googleapi: Error 403: storage.buckets.create denied"})
    code, out, err = launch("up", "tuna.yaml", "--yes", "--json")
    assert code == 3, (out, err)
    assert json.loads(out.splitlines()[-1])["error"]["exit_code"] == 3
    assert "error: bucket: googleapi: Error 403: storage.buckets.create denied\n" in err
    assert "launch infra up tuna.yaml" in err

    engine.faults()
    code, out, err = launch("up", "tuna.yaml", "--yes", "--json")
    assert code == 0, (out, err)
    changes = {change["name"]: change["change"] for change in json.loads(out)["changes"]}
    assert changes["service-storage"] == "same"  # what was made before the refusal is recorded
    assert changes["bucket"] == "create"


def test_a_destroy_that_does_not_end_exits_7(launch: Launch, made: StandIn) -> None:
    made.faults(fail={"account-trainer": "googleapi: Error 403: denied"})

    code, out, err = launch("destroy", "tuna.yaml", "--yes")

    assert code == 7, (out, err)
    assert "account-trainer: googleapi: Error 403: denied" in err
    assert "launch infra destroy tuna.yaml" in err


def test_an_update_that_was_killed_is_recovered_by_the_next_one(
    launch: Launch, engine: StandIn, tmp_path: Path
) -> None:
    engine.faults(die_after="bucket")
    code, out, err = launch("up", "tuna.yaml", "--yes")
    assert code != 0, (out, err)
    assert "was ended by signal 9" in err
    engine.faults()
    assert "unknown: creating bucket was interrupted" in launch("status", "tuna.yaml")[1]

    code, out, err = launch("up", "tuna.yaml", "--yes")

    assert code == 0, (out, err)
    assert "which has died" in err
    assert "there already: bucket" in err
    order = [word for word in engine.commands() if word in ("refresh", "cancel")]
    assert order == ["refresh", "cancel", "refresh"]  # the first one met the lock
    assert _state(engine, tmp_path)["pending_operations"] == []
    assert _locks(tmp_path / "home") == []


def test_the_lock_of_another_machine_takes_unlock_and_a_yes(
    launch: Launch, made: StandIn, tmp_path: Path
) -> None:
    (tmp_path / "tuna.yaml").write_text(RECIPE + "infra: {storage_class: NEARLINE}\n")
    made.hold(tmp_path / "home" / "infra" / "state", "proj-1.tuna-models", "elsewhere", 1)

    code, out, err = launch("up", "tuna.yaml", "--yes")

    assert code == 8, (out, err)
    assert "ann@elsewhere (process 1) holds the state of proj-1.tuna-models since 2026" in err
    assert "launch infra up tuna.yaml --unlock" in err
    assert "cancel" not in made.commands()
    code, out, err = launch("up", "tuna.yaml", "--yes", "--unlock")
    assert code == 0, (out, err)
    assert "took away the lock" in err
    assert _locks(tmp_path / "home") == []


def test_ctrl_c_finishes_what_has_begun_records_it_and_stops(
    launch: Launch, start: Callable[..., Process], engine: StandIn, tmp_path: Path
) -> None:
    engine.faults(pause_at="bucket")
    update = start("up", "tuna.yaml", "--yes")
    update.until("creating bucket")

    update.interrupt()

    assert update.end() == 130
    text = "\n".join(update.seen)
    assert "stopping: what has begun is being finished" in text
    assert "interrupted; what was done is recorded" in text
    assert "launch infra up tuna.yaml" in text
    assert "Traceback" not in text
    recorded = [one["type"] for one in _state(engine, tmp_path)["resources"]]
    assert "gcp:storage/bucket:Bucket" in recorded
    assert "gcp:storage/bucketIAMMember:BucketIAMMember" not in recorded
    assert _locks(tmp_path / "home") == []


def test_a_third_ctrl_c_kills_and_the_next_update_recovers(
    launch: Launch, start: Callable[..., Process], engine: StandIn, tmp_path: Path
) -> None:
    engine.faults(pause_at="bucket", deaf=True)
    update = start("up", "tuna.yaml", "--yes")
    update.until("creating bucket")
    for number, said in (
        (signal.SIGINT, "stopping"), (signal.SIGTERM, "aborting"), (signal.SIGINT, "killed"),
    ):  # fmt: skip
        update.interrupt(number)
        update.until(said)

    assert update.end() == 130
    text = "\n".join(update.seen)
    assert "the engine was killed and could not record what was in flight" in text, text
    assert "unlocks the state, asks the cloud what there is" in text
    assert "Traceback" not in text
    assert len(_locks(tmp_path / "home")) == 1
    engine.faults()

    code, out, err = launch("up", "tuna.yaml", "--yes")

    assert code == 0, (out, err)
    assert "which has died" in err
    assert "was interrupted while creating bucket" in err
    assert _locks(tmp_path / "home") == []


def test_a_destroy_on_a_terminal_wants_the_name_typed(
    environ: dict[str, str], made: StandIn
) -> None:
    before = made.cloud

    code, told = _typed(environ, "yes")

    assert code == 0
    assert "nothing was deleted" in told
    assert made.cloud == before


def _typed(environ: dict[str, str], answer: str) -> tuple[int, str]:
    """`launch infra destroy` on a terminal where `answer` is typed when it asks: the exit code,
    and what the terminal shows."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "infra", "destroy", "tuna.yaml"],
        env=environ, stdin=theirs, stderr=theirs, stdout=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while b"Type tuna-models: " not in seen:
            assert select.select([ours], [], [], _LIMIT)[0], seen
            seen += os.read(ours, 4096)
        os.write(ours, f"{answer}\n".encode())
        while select.select([ours], [], [], _LIMIT)[0]:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        return process.wait(_LIMIT), seen.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_wrong_passphrase_is_an_access_error(
    launch: Launch, made: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PULUMI_CONFIG_PASSPHRASE", "another")

    code, out, err = launch("up", "tuna.yaml", "--yes")

    assert code == 3, (out, err)
    assert "the passphrase is not the one" in err
    assert "another" not in err.replace("another update", "")


def test_without_a_command_line_it_says_what_it_would_fetch(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    code, out, err = launch("plan", "tuna.yaml")

    assert code == 2, (out, err)
    assert "is not on this machine" in err
    assert "add --yes" in err


def test_a_plan_without_the_engine_says_what_is_declared_before_anything_is_fetched(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    code, out, err = launch("plan", "tuna.yaml")

    assert code == 2, (out, err)
    assert "storage.Bucket" in out and "account-trainer" in out
    assert "which of them are there is not known yet" in out
    assert "it finds out what of this is there already" in err
    assert "add --yes to have it fetched, once, or put a pulumi of your own on PATH" in err


def test_a_status_without_the_engine_says_what_is_known_without_it(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, made: StandIn, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    code, out, err = launch("status", "tuna.yaml")

    state = f"file://{tmp_path / 'home' / 'infra' / 'state'}"
    assert code == 0, (out, err)
    assert out == f"proj-1.tuna-models: there is a state; state: {state}\n"
    assert "what it holds is not known: pulumi" in err
    _hold(tmp_path, made, os.getpid())
    assert (
        f"an update runs since 2026-11-21T10:00:00Z (process {os.getpid()}"
        in (launch("status", "tuna.yaml")[1])
    )
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path / "empty"))
    code, out, err = launch("status", "tuna.yaml")
    assert (code, err) == (0, "")
    assert "proj-1.tuna-models: nothing was made here yet; " in out
    monkeypatch.setenv("PULUMI_BACKEND_URL", "gs://team/state")
    told = json.loads(launch("status", "tuna.yaml", "--json")[1])
    assert (told["made"], told["state"]) == (None, "gs://team/state")


def test_a_status_during_an_update_says_that_it_runs(
    launch: Launch, made: StandIn, tmp_path: Path
) -> None:
    (file,) = (tmp_path / "home" / "infra" / "state").rglob("stacks/*/*.json")
    state = json.loads(file.read_text())
    (bucket,) = (r for r in state["checkpoint"]["latest"]["resources"]
                 if r["urn"].endswith("::bucket"))  # fmt: skip
    operation = {"resource": bucket, "type": "creating"}
    state["checkpoint"]["latest"]["pending_operations"] = [operation] * 3
    file.write_text(json.dumps(state))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _hold(tmp_path, made, dead.pid)
    for command in ("status", "plan"):
        out = launch(command, "tuna.yaml")[1]
        assert out.count("unknown: creating bucket was interrupted; launch infra up tuna") == 1

    _hold(tmp_path, made, os.getpid())

    for command in ("status", "plan"):
        out = launch(command, "tuna.yaml")[1]
        assert "an update runs since 2026-11-21T10:00:00Z " in out
        assert f"(process {os.getpid()} on {socket.gethostname()})" in out
        assert "interrupted" not in out
    assert json.loads(launch("status", "tuna.yaml", "--json")[1])["running"]["pid"] == os.getpid()


def _hold(tmp_path: Path, engine: StandIn, pid: int) -> None:
    state = tmp_path / "home" / "infra" / "state"
    engine.hold(state, "proj-1.tuna-models", socket.gethostname(), pid)


def test_names_that_stand_in_for_variables_are_told_and_nothing_is_made_of_them(
    launch: Launch, engine: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PROJECT", "BUCKET"):
        monkeypatch.delenv(name, raising=False)
    text = RECIPE.replace("proj-1,", "'${PROJECT:-my-project}',")
    (tmp_path / "tuna.yaml").write_text(text.replace("gs://tuna", "gs://${BUCKET:-tuna}"))
    code, out, err = launch("plan", "tuna.yaml")
    assert code == 0, (out, err)
    assert "note: PROJECT is not set; the recipe says 'my-project'" in err
    (tmp_path / "tuna.yaml").write_text(text.replace("tuna-models", "${BUCKET:-my-bucket}"))

    code, out, err = launch("up", "tuna.yaml", "--yes")

    assert code == 2, (out, err)
    assert (
        "error: PROJECT, BUCKET not set: the recipe says project my-project and gs://my-bu" in err
    )
    assert "set PROJECT, BUCKET in the environment, or give --set" in err
    assert engine.cloud == {}
    given = ("--set", "hardware.vertex.project=proj-1", "--set", "artifacts=gs://own/{run}")
    code, out, err = launch("up", "tuna.yaml", "--yes", *given)
    assert code == 0, (out, err)
    assert "bucket: gs://own" in out
    assert launch("status", "tuna.yaml", *given)[1].startswith("proj-1.own: ")
    monkeypatch.setenv("PROJECT", "proj-1")
    monkeypatch.setenv("BUCKET", "tuna-models")
    assert "not set" not in launch("plan", "tuna.yaml")[2]


def test_a_folder_that_cannot_be_made_is_one_line(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for folder in ("/proc/x", "file/below", "file"):
        code, out, err = launch("export", "tuna.yaml", "--to", folder)
        assert code == 2, (out, err)
        assert f"error: {folder}: cannot be written: " in err
        assert err.splitlines()[-1].strip() == "--to names another folder"


def test_export_writes_a_project_for_the_same_stack(launch: Launch, tmp_path: Path) -> None:
    code, out, err = launch("export", "tuna.yaml", "--to", "own")

    assert code == 0, (out, err)
    assert "wrote own/__main__.py" in out
    assert (tmp_path / "own" / "Pulumi.proj-1.tuna-models.yaml").exists()
    assert "name: launch" in (tmp_path / "own" / "Pulumi.yaml").read_text()
    code, out, err = launch("export", "tuna.yaml", "--to", "own")
    assert code == 2, (out, err)
    assert "--to names another folder" in err


@pytest.mark.parametrize("words", [(), ("--from-file", "token"), ("--from-env", "TOKEN")])
def test_a_secret_gets_its_value_and_nobody_hears_it(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    (tmp_path / "tuna.yaml").write_text(
        RECIPE + "secrets: {HF_TOKEN: 'secret-manager://proj-1/hf-token'}\n"
    )
    (tmp_path / "token").write_text("hf_0123\n")
    monkeypatch.setenv("TOKEN", "hf_0123")
    with Google(ManualClock(), project="proj-1") as server:
        server.secrets.empty.add("proj-1/hf-token")
        for name, value in server.environ().items():
            monkeypatch.setenv(name, value)
        with (tmp_path / "token").open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code, out, err = launch("set-secret", "tuna.yaml", "hf-token", *words)

    assert (code, err) == (0, "")
    assert out == "secret-manager://proj-1/hf-token: version 1\n"
    assert server.secrets.values["proj-1/hf-token"] == "hf_0123"


def test_a_secret_that_the_recipe_does_not_name_is_refused(launch: Launch) -> None:
    code, out, err = launch("set-secret", "tuna.yaml", "hf-token", "--from-env", "HOME")

    assert code == 2, (out, err)
    assert "names no secret 'hf-token'" in err
