"""The engine's side of the foundations, against the stand-in for its command line (see there for
what such a test can show)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pulumi_gcp", reason="needs the extra `infra`")

from infra import engine_cli, google, passphrase
from infra.changes import Change, Step
from infra.errors import EngineError, Failed, Locked, Passphrase
from infra.google import Foundations
from infra.stack import Stack, name
from tests.infra.stand_in import StandIn

BUCKET = "tuna-models"
DEMO = Foundations(
    "demo", "proj-1", "us-central1",
    services=("storage.googleapis.com",), bucket=BUCKET, labels={"launch-recipe": "demo"},
)  # fmt: skip
DECLARED = google.program(DEMO)
Open = Callable[..., Stack]


@pytest.fixture
def cli(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path / "stand-in")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def opened(cli: StandIn, home: Path, said: list[str]) -> Open:
    """The stack of `DEMO`, in this or another environment."""

    def make(**environ: str) -> Stack:
        return _stack(cli, home, environ, said.append)

    return make


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[StandIn, Path]:
    """A stand-in and a home after one `up` of `DEMO`, for the tests that start there."""
    folder = tmp_path_factory.mktemp("template")
    cli, home = StandIn(folder / "stand-in"), folder / "home"
    _stack(cli, home, {}, [].append).up(DECLARED)
    return cli, home


@pytest.fixture
def made(template: tuple[StandIn, Path], cli: StandIn, home: Path) -> StandIn:
    """The stand-in after an `up` of `DEMO`."""
    cli.copy(*template, home)
    return cli


def _stack(
    cli: StandIn,
    home: Path,
    environ: dict[str, str],
    say: Callable[[str], None],
    tell: Callable[[Step], None] = lambda step: None,
) -> Stack:
    given = {"PATH": f"{cli.bin}:{os.environ['PATH']}", **environ}
    found = engine_cli.find(home, given)
    assert found is not None
    assert found.path == cli.bin / "pulumi"
    return Stack(name(DEMO.project, BUCKET), found, home, given, say=say, tell=tell)


def _answering(folder: Path, home: Path, script: str) -> Stack:
    """The stack of `DEMO` with an engine that tells its version, and else does as `script` says."""
    (folder / "bin").mkdir()
    engine = folder / "bin" / "pulumi"
    version = engine_cli.wanted()
    engine.write_text(f'#!/bin/sh\n[ "$*" = version ] && echo v{version} && exit\n{script}\n')
    engine.chmod(0o755)
    environ = {"PATH": f"{engine.parent}:{os.environ['PATH']}", passphrase.WORD: "of-the-test"}
    found = engine_cli.find(home, environ)
    assert found is not None
    return Stack(name(DEMO.project, BUCKET), found, home, environ, say=[].append)


def _words(changes: tuple[Change, ...]) -> dict[str, str]:
    return {change.name: change.change for change in changes}


def test_a_preview_tells_everything_and_makes_nothing(opened: Open, cli: StandIn) -> None:
    changes = opened().preview(DECLARED)

    assert _words(changes) == {"service-storage": "create", "bucket": "create"}
    assert {change.kind for change in changes} == {"projects.Service", "storage.Bucket"}
    assert cli.cloud == {}


def test_what_is_made_once_is_the_same_the_second_time(opened: Open, cli: StandIn) -> None:
    stack = opened()
    assert stack.status() is None

    made, again = stack.up(DECLARED), stack.up(DECLARED)

    assert set(_words(made).values()) == {"create"}
    assert set(_words(again).values()) == {"same"}
    assert len(cli.cloud) == 2
    status = stack.status()
    assert status is not None
    assert sorted(status.resources) == ["bucket", "service-storage"]
    assert status.pending == ()
    assert status.outputs["bucket"] == f"gs://{BUCKET}"
    updated = stack.last_update()
    assert updated is not None
    assert (updated["kind"], updated["result"]) == ("up", "succeeded")


def test_a_change_says_which_input_differs_and_whether_it_replaces(
    opened: Open, made: StandIn
) -> None:
    labelled = opened().preview(google.program(replace(DEMO, labels={"launch-recipe": "other"})))
    moved = opened().preview(google.program(replace(DEMO, bucket_location="europe-west4")))
    fewer = opened().preview(google.program(replace(DEMO, services=())))

    assert Change("bucket", "storage.Bucket", "update", ("labels",)) in labelled
    assert Change("bucket", "storage.Bucket", "replace", ("location",)) in moved
    assert _words(fewer)["service-storage"] == "leave"  # the API stays on


def test_drift_is_what_the_cloud_has_otherwise(opened: Open, made: StandIn) -> None:
    stack = opened()
    cloud = made.cloud
    for key, inputs in cloud.items():
        if "storage/bucket" in key:
            inputs["labels"] = {}
    made.cloud = {key: value for key, value in cloud.items() if "projects/service" not in key}

    drift = stack.drift()

    assert Change("bucket", "storage.Bucket", "update", ("labels",)) in drift
    assert _words(drift)["service-storage"] == "delete"
    status = stack.status()
    assert status is not None
    assert len(status.resources) == 2  # it was only looked at


def test_a_destroy_deletes_a_bucket_that_is_not_to_stay_and_the_state(
    opened: Open, cli: StandIn
) -> None:
    stack = opened()
    stack.up(google.program(replace(DEMO, retain_bucket=False)))

    shown = stack.preview(None)
    stack.destroy()

    assert _words(shown) == {"bucket": "delete", "service-storage": "leave"}
    assert not [key for key in cli.cloud if "storage/bucket" in key]
    assert stack.status() is None


@pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
def test_a_lock_of_another_is_told_with_who_and_since_and_stays(
    opened: Open, made: StandIn, home: Path, host: str
) -> None:
    stack = opened()
    made.hold(home / "state", stack.name, host, os.getpid())

    with pytest.raises(Locked) as locked:
        stack.up(DECLARED)

    assert f"ann@{host} (process {os.getpid()}) holds the state" in str(locked.value)
    assert "since 2026-11-21T10:00:00Z" in str(locked.value)
    assert not locked.value.stale
    assert "cancel" not in made.commands()


def test_the_passphrase_is_made_once_at_random_for_nobody_else(
    opened: Open, made: StandIn, home: Path, tmp_path: Path
) -> None:
    kept = passphrase.place(home)
    word = kept.read_text()

    opened().up(DECLARED)

    assert len(word) >= 32
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.read_text() == word
    passphrase.ensure(tmp_path / "second", {}, shared=False)
    assert passphrase.place(tmp_path / "second").read_text() != word


def test_a_missing_passphrase_is_asked_for_and_never_made_anew(
    opened: Open, made: StandIn, home: Path
) -> None:
    kept = passphrase.place(home)
    word = kept.read_text()
    kept.unlink()

    with pytest.raises(Passphrase) as missing:
        opened().up(DECLARED)

    assert f"{kept} is missing" in str(missing.value)
    assert "PULUMI_CONFIG_PASSPHRASE" in missing.value.hint
    assert not kept.exists()
    assert opened(PULUMI_CONFIG_PASSPHRASE=word).up(DECLARED)


def test_a_wrong_or_an_empty_passphrase_is_told_in_one_line(
    opened: Open, made: StandIn, home: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")

    with pytest.raises(Passphrase, match="is not the one that the state of"):
        opened(PULUMI_CONFIG_PASSPHRASE="another").up(DECLARED)
    with pytest.raises(Passphrase, match="PULUMI_CONFIG_PASSPHRASE is empty"):
        opened(PULUMI_CONFIG_PASSPHRASE="").up(DECLARED)
    with pytest.raises(Passphrase, match="empty is empty"):
        opened(PULUMI_CONFIG_PASSPHRASE_FILE=str(empty)).up(DECLARED)
    passphrase.place(home).chmod(0o644)
    with pytest.raises(Passphrase, match="others can read it"):
        opened().up(DECLARED)


def test_the_environments_passphrase_wins_and_is_written_nowhere(
    opened: Open, cli: StandIn, home: Path, said: list[str]
) -> None:
    word = "correct-horse-battery"
    stack = opened(PULUMI_CONFIG_PASSPHRASE=word)
    changes = stack.up(DECLARED)

    assert not passphrase.place(home).exists()
    _nowhere(word, changes, said, home, cli.folder)


def test_the_kept_passphrase_is_in_its_file_and_nowhere_else(
    opened: Open, made: StandIn, home: Path, said: list[str]
) -> None:
    changes = opened().preview(DECLARED)
    kept = passphrase.place(home)
    word = kept.read_text()
    kept.unlink()

    _nowhere(word, changes, said, home, made.folder)


def _nowhere(word: str, changes: Any, said: list[str], *folders: Path) -> None:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert any(file.name == "calls.jsonl" for file in files)  # every argument of every call
    assert not [file for file in files if word in file.read_text(errors="replace")]
    assert word not in repr(changes) + "".join(said)


def test_the_engine_gets_a_home_and_a_state_of_its_own(
    opened: Open, cli: StandIn, home: Path
) -> None:
    opened().preview(DECLARED)

    called = {name for call in cli.calls() for name in call["variables"]}
    assert {"PULUMI_HOME", "PULUMI_BACKEND_URL", "PULUMI_SKIP_UPDATE_CHECK"} <= called
    assert opened().state == f"file://{home / 'state'}"
    assert opened(PULUMI_BACKEND_URL="gs://team/state").state == "gs://team/state"


def test_a_state_that_cannot_be_reached_is_an_error_with_the_engines_reason(opened: Open) -> None:
    with pytest.raises(EngineError, match="keeps no state in s3://team/state"):
        opened(PULUMI_BACKEND_URL="s3://team/state").preview(DECLARED)


ODD = ["true", "echo garbage", "echo '[]'", "echo '{}'", "echo '[3]'", "echo 3"]


@pytest.mark.parametrize("script", ODD)
def test_an_engine_that_ends_well_with_odd_words_is_an_error_of_one_line(
    tmp_path: Path, home: Path, script: str
) -> None:
    """Of a state without any history or resources, `[]` and `{}` are what the engine says."""
    stack = _answering(tmp_path, home, script)
    ways = [lambda: stack.preview(DECLARED), lambda: stack.preview(None), stack.drift,
            lambda: stack.up(DECLARED), stack.destroy]  # fmt: skip
    if script != "echo '{}'":
        ways += [stack.status, stack.settle]
    if script not in ("echo '[]'", "echo '{}'"):
        ways.append(stack.last_update)
    for way in ways:
        with pytest.raises(EngineError) as odd:
            way()
        assert "\n" not in str(odd.value) and str(odd.value).startswith("pulumi ")
        assert isinstance(odd.value, Failed) == (way == stack.destroy)
        assert isinstance(odd.value, Failed) or str(tmp_path / "bin") in odd.value.hint


@pytest.mark.parametrize(
    "deployment",
    [[], "text", {"resources": 3}, {"resources": [3]}, {"resources": [{"type": "gcp:a/b:C"}]},
     {"pending_operations": {"a": 1}}, {"pending_operations": ["creating"]},
     {"pending_operations": [{}]}, {"pending_operations": [{"resource": {"urn": 3}}]}],
)  # fmt: skip
def test_a_damaged_state_is_told_and_never_taken_for_an_empty_one(
    opened: Open, made: StandIn, home: Path, deployment: Any
) -> None:
    (file,) = (home / "state").rglob("stacks/*/*.json")
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "checkpoint": {"latest": deployment}}))
    before = file.read_text()

    for way in (opened().status, opened().settle):
        with pytest.raises(EngineError, match="the state is damaged: ") as damaged:
            way()
        assert "\n" not in str(damaged.value) and damaged.value.hint
    assert file.read_text() == before


def test_a_shared_state_needs_a_passphrase_that_others_have_too(
    opened: Open, cli: StandIn, home: Path
) -> None:
    shared = {"PULUMI_BACKEND_URL": "gs://team/state"}

    with pytest.raises(Passphrase, match="there is no passphrase for it") as missing:
        opened(**shared).preview(DECLARED)

    assert "PULUMI_CONFIG_PASSPHRASE_FILE" in missing.value.hint
    assert not passphrase.place(home).exists()
    known = {**shared, "PULUMI_CONFIG_PASSPHRASE": "of-the-team"}
    opened(**known).up(DECLARED)
    elsewhere = _stack(cli, home.with_name("other"), known, [].append)
    assert set(_words(elsewhere.preview(DECLARED)).values()) == {"same"}


def test_in_a_shared_state_only_the_lock_of_what_we_started_is_stale(
    opened: Open, cli: StandIn
) -> None:
    stack = opened(PULUMI_BACKEND_URL="gs://team/state", PULUMI_CONFIG_PASSPHRASE="of-the-team")
    stack.preview(DECLARED)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    state = cli.folder / "buckets" / "team" / "state"
    cli.hold(state, stack.name, socket.gethostname(), dead.pid)

    with pytest.raises(Locked, match="which has died") as locked:
        stack.up(DECLARED)

    assert not locked.value.stale


def test_of_a_shared_state_an_update_from_here_is_known_to_run_until_it_ends(
    opened: Open, cli: StandIn, home: Path
) -> None:
    shared = {"PULUMI_BACKEND_URL": "gs://team/state", "PULUMI_CONFIG_PASSPHRASE": "of-the-team"}
    seen: list[Any] = []

    def look(step: Step) -> None:
        if not seen:
            status = opened(**shared).status()
            assert status is not None and status.running is not None
            seen.append((status.running.host, status.running.dead))

    _stack(cli, home, shared, [].append, look).up(DECLARED)

    assert seen == [(socket.gethostname(), False)]
    ended = opened(**shared).status()
    assert ended is not None and ended.running is None


def test_what_the_library_warns_of_when_its_engine_is_killed_is_not_shown(
    opened: Open, cli: StandIn
) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")  # as who runs us may have it
        opened()
        warnings.warn("Error in event stream: it ended", UserWarning, stacklevel=1)
        unawaited = "coroutine 'Output.apply.<locals>.run' was never awaited"
        warnings.warn(unawaited, RuntimeWarning, stacklevel=1)
        warnings.warn("something else", RuntimeWarning, stacklevel=1)
    assert [str(one.message) for one in shown] == ["something else"]


_project = st.from_regex(r"([a-z][a-z.]{0,8}:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", fullmatch=True)
_bucket = st.from_regex(r"[a-z0-9][a-z0-9._-]{1,110}[a-z0-9]", fullmatch=True)


@settings(max_examples=50)
@given(_project, _bucket, _project, _bucket)
def test_a_stack_has_a_name_of_its_own_that_the_engine_takes(
    project: str, bucket: str, other_project: str, other_bucket: str
) -> None:
    mine, other = name(project, bucket), name(other_project, other_bucket)
    assert 0 < len(mine) <= 100
    assert set(mine) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.")
    assert (mine == other) == ((project, bucket) == (other_project, other_bucket))
