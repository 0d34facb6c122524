"""`launch up` with a real driver and a scripted world: asking, following, leaving, stopping."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.fake_backend import World
from tests.launcher.runs import plugged_in

_LAUNCH = [sys.executable, "-m", "launcher"]
_RECIPE = """
launch: 1
name: thing
stage: tokenizer
hardware: {backend: fake, accelerator: "cpu:1"}
data: {train: [{builtin: python-reference}]}
tokenizer: {vocab_size: 512}
budget: {hours: 1}
"""


class Terminal:
    """A command on a terminal of its own: what it shows, and what is typed."""

    def __init__(self, *words: str) -> None:
        self.shown = ""
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            # A shell's job in the background ignores Ctrl-C, and so would this.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ["TERM"] = "xterm-256color"
            os.execv(sys.executable, [*_LAUNCH, *words])

    def until(self, text: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no '{text}' in: {self.shown}"
            assert self._read(0.2) or text in self.shown, f"ended without '{text}': {self.shown}"

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def exit_code(self) -> int:
        while self._read(5.0):
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.descriptor], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self.descriptor, 65536)
        except OSError:  # the other side is gone
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path / "world")
    plugged_in(monkeypatch, tmp_path, made)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thing.yaml").write_text(_RECIPE)
    return made


def _launch(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_LAUNCH, *words], capture_output=True, text=True, timeout=60)


def _script(world: World, **script: Any) -> None:
    (world.folder / "script.json").write_text(json.dumps(script))


def test_money_is_asked_about_then_ctrl_c_detaches_and_stop_stops(world: World) -> None:
    _script(world, jobs=[{"looks": None}])
    screen = Terminal("up", "thing.yaml")
    screen.until("Start it? [y/N]")
    assert not world.alive()
    screen.type("y\n")
    screen.until("Ctrl-C detaches")
    screen.until("running")
    screen.type("\x03")

    assert screen.exit_code() == 0
    assert "detached: thing-" in screen.shown and "launch attach thing-" in screen.shown
    (alive,) = world.alive()
    again = _launch("up", "thing.yaml", "--yes", "-d")
    assert again.returncode == 0 and "live already" in again.stderr
    name = again.stdout.strip()
    assert alive == f"{name}-j0-a1"

    stopped = _launch("stop", name)
    assert (stopped.returncode, stopped.stdout.split(":")[0]) == (0, name)
    assert "cancelled" in stopped.stdout
    assert world.alive() == []


def test_no_on_the_terminal_starts_nothing(world: World) -> None:
    screen = Terminal("up", "thing.yaml")
    screen.until("Start it? [y/N]")
    screen.type("\n")

    assert screen.exit_code() == 0
    assert "nothing was started" in screen.shown
    assert world.alive() == [] and world.lines("begun.log") == []


def test_ctrl_c_at_the_question_is_130(world: World) -> None:
    screen = Terminal("up", "thing.yaml")
    screen.until("Start it? [y/N]")
    screen.type("\x03")

    assert screen.exit_code() == 130
    assert world.lines("begun.log") == []


def test_a_pipe_gets_phases_on_stderr_results_on_stdout_and_the_exit_code(world: World) -> None:
    _script(world, jobs=[{"looks": 1}, {"looks": 1, "end": "failed", "why": "out of luck"}])

    good = _launch("up", "thing.yaml", "--yes")
    bad = _launch("up", "thing.yaml", "--yes", "--new")

    assert good.returncode == 0, good.stderr
    assert "started thing-" in good.stderr and "succeeded" in good.stderr
    assert "report:" in good.stdout and "\x1b" not in good.stdout + good.stderr
    assert bad.returncode == 6
    assert "out of luck" in bad.stdout


def test_json_is_one_document_whatever_happens_beside_it(world: World) -> None:
    _script(world, jobs=[{"looks": 1}])

    done = _launch("up", "thing.yaml", "--yes", "--json")

    facts = json.loads(done.stdout)
    assert (facts["v"], facts["phase"], facts["exit_code"]) == (1, "succeeded", 0)
    torn_down = _launch("teardown", facts["name"], "--json")
    assert json.loads(torn_down.stdout)["runs"][0]["id"] == facts["id"]
    assert world.alive() == []
