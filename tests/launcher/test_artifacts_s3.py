"""The same seam over s3://: journal, marker, refresh, adoption, against a server that speaks it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("boto3", reason="needs the extra `s3`")
pytest.importorskip("moto", reason="needs moto[server]")

from launcher import home
from launcher.adopt import adopt
from launcher.artifacts import Bucket, open_artifacts
from launcher.backends.base import Env
from launcher.clock import ManualClock
from launcher.errors import HeldElsewhere, UsageError
from launcher.journal import Journal
from tests.trainer.remote import environment, moto_server

RUN = "00000000000000ff"
ROOT = "s3://bkt/runs/thing-0000ff"


@pytest.fixture
def env(tmp_path: Path) -> Iterator[Env]:
    with moto_server() as url, environment(
        AWS_ENDPOINT_URL_S3=url, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b",
        AWS_DEFAULT_REGION="us-east-1",
    ):  # fmt: skip
        import boto3

        boto3.session.Session().client("s3").create_bucket(Bucket="bkt")
        yield Env(tmp_path / "home", {}, ManualClock(), "me", sys.executable)


def journal(env: Env) -> Journal:
    place = home.folder(env.home, RUN)
    return Journal(place, open_artifacts(ROOT, place, {}, env.clock), env.clock)


def test_a_run_on_s3_is_written_fenced_refreshed_and_adopted(env: Env, tmp_path: Path) -> None:
    one, other = journal(env), journal(env)
    assert one.read() == [] and other.read() == []
    facts = {"id": RUN, "name": "thing-0000ff", "fingerprint": "f" * 64, "owner": "me",
             "root": ROOT, "created": 1.0}  # fmt: skip
    one.append("created", **facts, recipe={"name": "thing"}, stages=[], jobs=[],
               bundle={"path": "", "sha256": "", "bytes": 0})  # fmt: skip
    with pytest.raises(HeldElsewhere):
        other.append("driver")
    one.append("driver")
    artifacts = one.artifacts
    assert isinstance(artifacts, Bucket)
    assert artifacts.create_once("control/stop.json", "{}")
    assert not artifacts.create_once("control/stop.json", "{ }")
    artifacts.write("evaluation.json", '{"a": 1}')
    artifacts.refresh()
    assert json.loads((artifacts.folder / "evaluation.json").read_bytes()) == {"a": 1}
    artifacts.write("evaluation.json", '{"a": 2}')
    env.clock.sleep(5)
    artifacts.refresh()
    assert json.loads((artifacts.folder / "evaluation.json").read_bytes()) == {"a": 2}
    artifacts.move("control/stop.json", "control/stop-1.json")
    assert artifacts.names("control/") == ["control/stop-1.json"]
    elsewhere = Env(tmp_path / "other", {}, env.clock, "me", sys.executable)
    assert adopt(ROOT, elsewhere)["id"] == RUN
    with pytest.raises(UsageError, match="there is no bucket nowhere"):
        adopt("s3://nowhere/run", elsewhere)
