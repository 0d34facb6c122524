"""The first command of a container: it takes the bundle from the bucket, or says why not."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.backends.vertex.request import FETCH
from tests.launcher.rehearsed import Scene, scene

from launcher.rehearsal.faults import Fault, Script  # isort: skip


class Handed(Exception):
    """The arguments with which boot was started."""


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as made:
        yield made


@pytest.fixture
def waits(it: Scene, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the command waited; nothing else passes."""
    seconds: list[float] = []

    def execv(path: str, arguments: list[str]) -> None:
        raise Handed(*arguments)

    monkeypatch.setattr(time, "sleep", seconds.append)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(tempfile, "tempdir", str(it.home))
    for name, value in it.server.environ().items():
        monkeypatch.setenv(name, value)
    job = it.intents()[-1]
    it.attempt()
    (pool,) = job.request["body"]["jobSpec"]["workerPoolSpecs"]
    monkeypatch.setattr(sys, "argv", ["-c", *pool["containerSpec"]["args"]])
    return seconds


def run_command() -> tuple[str, ...]:
    with pytest.raises(Handed) as caught:
        exec(FETCH, {"__name__": "__main__"})
    arguments: tuple[str, ...] = caught.value.args
    return arguments


@pytest.mark.parametrize(
    "fault", [Fault("cut_download", at_bytes=20), Fault("cut_before"), Fault("status", 503)]
)
def test_a_connection_that_is_cut_is_tried_again(
    it: Scene, waits: list[float], fault: Fault
) -> None:
    it.server.faults = faults = Script()
    faults.add("bundles", fault)
    faults.add(r"boot/.*\.json", fault)
    _, boot, mode, spec, bundle = run_command()
    assert mode == "run" and waits == [1, 1] and not faults.left
    assert Path(boot).read_bytes() == it.boot
    assert Path(spec).read_bytes().startswith(b"{") and Path(bundle).stat().st_size > 0


@pytest.mark.parametrize(
    ("fault", "code", "waited", "said"),
    [
        (Fault("cut_download", at_bytes=20), 75, [1, 2, 4, 8], "IncompleteRead"),
        (Fault("cut_before"), 75, [1, 2, 4, 8], "closed connection"),
        (Fault("status", 503), 75, [1, 2, 4, 8], "503"),
        (Fault("status", 403), 1, [], "403"),
    ],
)
def test_what_the_network_does_not_give_is_no_fault_of_the_job(
    it: Scene, waits: list[float], capsys: pytest.CaptureFixture[str],
    fault: Fault, code: int, waited: list[float], said: str,
) -> None:  # fmt: skip
    """75 asks for another attempt; a refusal would only come again."""
    it.server.faults = faults = Script()
    faults.add("bundles", fault, times=5)
    with pytest.raises(SystemExit) as caught:
        exec(FETCH, {"__name__": "__main__"})
    assert (caught.value.code, waits) == (code, waited)
    line = capsys.readouterr().err
    assert line.startswith("cannot read http://127.0.0.1:") and line.count("\n") == 1
    assert "launch%2Fbundles%2F" in line and said in line
