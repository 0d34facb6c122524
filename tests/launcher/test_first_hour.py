"""What a new user meets in the first hour: wrong names, no login, a home that takes nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli, doctor, google
from launcher.backends.base import Phase
from launcher.commands.live import draw
from launcher.errors import Denied
from launcher.run import Run, StageState
from trainer.store import Denied as StoreDenied
from trainer.store import StoreError, no_answer, open_store


@pytest.mark.parametrize("bucket", ["gs://Other_Bucket!/x", "gs://my bucket/x", "gs://-/x"])
def test_a_misspelt_bucket_is_an_error_of_the_recipe_and_of_a_run_s_name(
    bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    assert cli.run(["validate", "kd-l4", "--set", f"artifacts={bucket}"]) == 2
    assert "artifacts: '" in (said := capsys.readouterr().err) and "lower-case letters" in said
    assert cli.run(["status", bucket]) == 2
    assert "cannot name a bucket: lower-case letters" in capsys.readouterr().err
    for scheme in ("gs", "s3"):
        with pytest.raises(StoreError, match="cannot name a bucket"):
            open_store(bucket.replace("gs", scheme, 1))


def test_validate_and_doctor_tell_of_variables_that_are_not_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BUCKET", raising=False)
    note = "BUCKET is not set; the recipe says 'my-bucket'"
    for command in ("validate", "doctor"):
        cli.run([command, "kd-l4"])
        assert note in capsys.readouterr().out
    monkeypatch.setenv("BUCKET", "mine")
    cli.run(["validate", "kd-l4"])
    assert "BUCKET" not in capsys.readouterr().out


def test_doctor_tries_whether_the_home_takes_a_file(tmp_path: Path) -> None:
    assert doctor._home(tmp_path / "not" / "yet").result == "pass"
    assert list(tmp_path.iterdir()) == []
    row = doctor._home(Path("/proc/self/home"))  # whoever asks, even root, writes nothing there
    assert row.result == "fail" and "cannot be written (" in row.detail


@pytest.mark.parametrize(("text", "wrong"), [(None, "does not exist"), ("{}", "is no cred")])
def test_a_login_that_names_a_wrong_file_names_it(
    text: str | None, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "key.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("CLOUDSDK_AUTH_DISABLE_CREDENTIALS", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    google._forget()
    with pytest.raises(Denied, match=f"GOOGLE_APPLICATION_CREDENTIALS: {file} {wrong}"):
        google.credentials({})
    with pytest.raises(StoreError, match=f"GOOGLE_APPLICATION_CREDENTIALS: {file} {wrong}"):
        open_store("gs://bkt/x").exists("y")


def test_a_login_that_names_a_folder_is_no_access(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("CLOUDSDK_AUTH_DISABLE_CREDENTIALS", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    google._forget()
    with pytest.raises(Denied, match=f"Google credentials: {tmp_path}: Is a directory"):
        google.credentials({})
    with pytest.raises(StoreDenied, match=f"no Google credentials: {tmp_path}: Is a directory"):
        open_store("gs://bkt/x").exists("y")


def test_servers_that_cannot_start_say_why_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for given, words in (
            (["--port", port], f"127.0.0.1:{port}: Address already in use"),
            (["--port", "70000"], "from 0"),
            (["--bucket", "Bad!"], "'Bad!' cannot name a bucket"),
            (["--project", "A b"], "'A b' cannot name a project"),
        ):
            argv = [sys.executable, "-m", "launcher.rehearsal", *given]
            ended = subprocess.run(argv, capture_output=True, text=True, timeout=120)
            assert ended.returncode == 2 and words in ended.stderr
            assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("HTTPConnectionPool(host='127.0.0.1', port=9): Max retries exceeded with url: /b "
         "(Caused by NewConnectionError('[Errno 111] Connection refused'))",
         "127.0.0.1:9 does not answer (connection refused)"),
        ("HTTPSConnectionPool(host='storage.googleapis.com', port=443): Read timed out.",
         "storage.googleapis.com does not answer (no answer in time)"),
        ("HTTPSConnectionPool(host='x.y', port=443): Max retries exceeded (Caused by "
         "NameResolutionError(\"Failed to resolve 'x.y' ([Errno -2] Name or service not known)\"))",
         "x.y does not answer (its name is not known here)"),
        ("('Connection aborted.', RemoteDisconnected('Remote end closed connection'))",
         "the service does not answer (connection cut)"),
        ("400 something else", ""),
    ],
)  # fmt: skip
def test_a_connection_that_fails_is_told_in_plain_words(text: str, told: str) -> None:
    assert no_answer(ConnectionError(text)) == told


def test_the_clock_of_a_run_that_is_over_shows_what_is_waited_for() -> None:
    from rich.console import Console

    run = Run("1" * 16, "thing-111111", "thing", "f", "ann", "gs://b/r", created=1000.0)
    run.stages = [StageState("s0", "kd", 0, "gs://b/r", Phase.SUCCEEDED)]
    run.ended, run.phase = 1100.0, Phase.SUCCEEDED

    def shown(now: float, late: float) -> str:
        console = Console(width=100)
        with console.capture() as taken:
            console.print(draw(run, now, 100, late=late))
        return taken.get()

    waiting = shown(1104.0, 26.0)
    assert "waiting for the last log lines: 26 s" in waiting and "1m40s" not in waiting
    over = shown(1131.0, 0.0)
    assert "waiting" not in over and "1m40s" in over
