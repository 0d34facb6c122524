"""A value on its way to Secret Manager: from where it may come, and that it is told to nobody."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")

from launcher import secrets
from launcher.clock import ManualClock
from launcher.errors import Denied, LaunchError, Transient, UsageError
from launcher.rehearsal.faults import Fault, Script
from launcher.rehearsal.google import Google
from launcher.rehearsal.http import HttpError, Request, Response, Server, answer
from trainer import secret_manager

GCLOUD = shutil.which("gcloud")
VALUE = "hf_0123456789abcdef"
PATH = "/v1/projects/proj/secrets/hf-token:addVersion"


@pytest.fixture
def server() -> Iterator[Google]:
    with Google(ManualClock(), project="proj") as server:
        server.secrets.empty.add("proj/hf-token")
        yield server


def _environ(server: Server) -> dict[str, str]:
    return {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER": server.url,
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
    }


def test_a_value_becomes_the_newest_version_and_is_what_a_job_reads(
    server: Google, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert secrets.set_value("proj", "hf-token", VALUE, server.environ()) == "1"
    assert secrets.set_value("proj", "hf-token", f"{VALUE}é", server.environ()) == "2"

    for name, value in server.environ().items():
        monkeypatch.setenv(name, value)
    assert secret_manager.read("HF_TOKEN", "proj/hf-token") == f"{VALUE}é"


def test_googles_own_client_gives_a_value_the_same_way(
    server: Google, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environ().items():
        monkeypatch.setenv(name, value)
    client, payload = secret_manager._client(), {"data": VALUE.encode()}
    asked = {"parent": "projects/proj/secrets/hf-token", "payload": payload}

    version = client.add_secret_version(request=asked)

    assert (version.name, version.state.name) == (
        "projects/proj/secrets/hf-token/versions/1", "ENABLED",
    )  # fmt: skip
    assert server.secrets.values["proj/hf-token"] == VALUE
    with pytest.raises(Exception, match="checksum"):
        client.add_secret_version(request={**asked, "payload": {**payload, "data_crc32c": 1}})
    assert secrets.set_value("proj", "hf-token", VALUE, server.environ()) == "2"


def test_a_version_whose_checksum_nobody_looked_at_is_told() -> None:
    made = answer({"name": "projects/1/secrets/t/versions/7"})
    told = "version 7 was made unchecked; give the value again"
    with Server(lambda request: made) as server, pytest.raises(Transient, match=told):
        secrets.set_value("proj", "t", VALUE, _environ(server))


@pytest.mark.skipif(GCLOUD is None, reason="needs gcloud")
def test_the_official_command_line_gives_a_value_the_same_way(
    server: Google, tmp_path: Path
) -> None:
    environ = {
        **os.environ,
        **server.environ(),
        "CLOUDSDK_CONFIG": str(tmp_path),
        "CLOUDSDK_CORE_PROJECT": "proj",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
    done = subprocess.run(
        [str(GCLOUD), "secrets", "versions", "add", "hf-token", "--data-file=-"],
        input=VALUE, env=environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert server.secrets.values["proj/hf-token"] == VALUE


def test_a_secret_that_is_not_there_is_not_made(server: Google) -> None:
    with pytest.raises(UsageError, match="project proj has no secret other") as caught:
        secrets.set_value("proj", "other", VALUE, server.environ())

    assert "launch infra up" in caught.value.hint
    assert "proj/other" not in server.secrets.values


def test_a_person_without_the_role_is_told(server: Google) -> None:
    server.secrets.denied.add("proj/hf-token")

    with pytest.raises(Denied, match=r"Permission 'secretmanager\.versions\.add' denied"):
        secrets.set_value("proj", "hf-token", VALUE, server.environ())


@pytest.mark.parametrize("fault", [Fault("status", 400), Fault("status"), Fault("cut_before")])
def test_a_request_that_fails_is_not_sent_again(fault: Fault) -> None:
    faults = Script([(f"POST {PATH}", fault)])
    with Google(ManualClock(), project="proj", faults=faults) as server:
        server.secrets.empty.add("proj/hf-token")
        with pytest.raises((UsageError, Transient), match="secret hf-token of project proj"):
            secrets.set_value("proj", "hf-token", VALUE, server.environ())

    assert not faults.left
    assert "proj/hf-token" not in server.secrets.values


def test_an_answer_that_repeats_what_was_sent_is_not_repeated() -> None:
    def echo(request: Request) -> Response:
        raise HttpError(400, f"Invalid payload: {request.body.decode()} {VALUE}")

    with Server(echo) as server, pytest.raises(UsageError) as caught:
        secrets.set_value("proj", "hf-token", VALUE, _environ(server))

    told = "".join(traceback.format_exception(caught.value))
    assert "the service does not take the value (400)" in told
    assert VALUE not in told and base64.b64encode(VALUE.encode()).decode() not in told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("a\0b", "holds a zero byte"),
        ("x" * 65537, "is larger than 65536 bytes"),
        ("\udcff", "is not text in UTF-8"),
    ],
)
def test_what_no_job_could_use_is_refused_before_a_request(value: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        secrets.set_value("proj", "hf-token", value, {})

    assert str(caught.value).startswith("secret hf-token: the value")


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="secret proj/a/b: is no name of a secret"):
        secrets.set_value("proj", "a/b", VALUE, {})


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_one_newline_at_the_end_is_not_of_the_value(tmp_path: Path, end: str) -> None:
    (tmp_path / "token").write_bytes(f"{VALUE}{end}".encode())

    assert secrets.from_file(tmp_path / "token", "t") == VALUE
    assert secrets.from_stream(io.BytesIO(f" a\nb\n{end}".encode()), "t").startswith(" a\nb")


def test_a_source_that_cannot_be_read_is_told_without_a_value(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    failed: list[LaunchError] = []
    for read in (
        lambda: secrets.from_file(tmp_path / "absent", "t"),
        lambda: secrets.from_file(tmp_path / "binary", "t"),
        lambda: secrets.from_variable("TOKEN", "t", {}),
    ):
        with pytest.raises(UsageError) as caught:
            read()
        failed.append(caught.value)

    assert [str(error).replace(str(tmp_path), "F") for error in failed] == [
        "secret t: F/absent: No such file or directory",
        "secret t: the value is not text in UTF-8",
        "secret t: the variable TOKEN is not set",
    ]
    assert secrets.from_variable("TOKEN", "t", {"TOKEN": VALUE}) == VALUE
