"""Drivers as real processes: one at a time, killed, asked to leave, taken over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import api, driver, home
from launcher.backends.base import Phase
from launcher.errors import Exit, LaunchError, UsageError
from launcher.run import Run
from tests.launcher.runs import Scene, plugged_in, recipe, scene


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A run whose job goes on until `finish` lies in the world; nobody drives it yet."""
    made = scene(tmp_path, recipe(), jobs=[{"looks": None}] * 9)
    plugged_in(monkeypatch, tmp_path, made.world)
    return made


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def running(it: Scene) -> Run:
    """Drive it in a process of its own until the job runs."""
    api.attach(it.run_id)
    until(lambda: it.run().phase is Phase.RUNNING)
    return api.status(it.run_id)


def finish(it: Scene) -> None:
    (it.world.folder / "finish").touch()


def pid_of(run: Run) -> int:
    assert run.driver is not None and run.driver.alive
    return run.driver.pid


def test_a_run_outlives_its_driver_and_the_next_one_ends_it(it: Scene) -> None:
    first = pid_of(running(it))
    os.kill(first, signal.SIGKILL)
    until(lambda: home.holder(it.place) is None)
    seen = api.status(it.run_id)
    assert seen.driver is not None and (seen.driver.alive, seen.phase) == (False, Phase.RUNNING)
    assert any(f"`launch resume {seen.name}`" in text for text in seen.warnings)
    assert api.wait(it.run_id).ended is None, "waiting for nobody would never end"
    second = pid_of(api.resume(it.run_id))
    assert second != first
    finish(it)
    done = api.wait(it.run_id, timeout=30)
    assert (done.phase, done.exit_code) == (Phase.SUCCEEDED, Exit.OK)
    assert len(it.world.lines("begun.log")) == 1 and it.world.alive() == []


def test_it_leaves_with_the_servers_of_a_rehearsal_whose_command_was_killed(it: Scene) -> None:
    pytest.importorskip("google.cloud.aiplatform_v1", reason="needs the extra `rehearse`")
    running(it)
    command = [sys.executable, "-m", "launcher.rehearsal", "--while-open",
               "--home", str(it.env.home)]  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as servers:
        assert servers.stdin is not None and servers.stdout is not None
        assert any(line.startswith("# serving") for line in iter(servers.stdout.readline, ""))
        assert home.holder(it.place) is not None
        servers.stdin.close()  # as the kernel does for whoever is killed
        assert servers.wait(60) == 0
    assert home.holder(it.place) is None
    assert it.world.alive() != [], "a job is the servers' business"


def test_a_second_driver_leaves_with_exit_code_8(it: Scene) -> None:
    first = pid_of(running(it))
    second = subprocess.run(
        [sys.executable, "-m", "launcher.driver", it.run_id], capture_output=True, text=True
    )
    assert second.returncode == Exit.HELD
    assert f"is driven by {os.uname().nodename} (process {first}) since 2" in second.stderr
    assert "Traceback" not in second.stderr and second.stderr.count("\n") == 1
    finish(it)
    assert api.wait(it.run_id, timeout=30).phase is Phase.SUCCEEDED


def test_a_driver_asked_to_leave_leaves_and_its_job_goes_on(it: Scene) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.driver", it.run_id], stderr=subprocess.PIPE, text=True
    )
    until(lambda: it.run().phase is Phase.RUNNING)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == Exit.OK
    assert "its job goes on" in said and "Traceback" not in said
    assert len(it.world.alive()) == 1 and it.run().ended is None


def test_taking_over_replaces_the_living_driver(it: Scene) -> None:
    first = running(it)
    second = api.attach(it.run_id, take_over=True)
    assert pid_of(second) != pid_of(first)
    finish(it)
    done = api.wait(it.run_id, timeout=30)
    assert done.phase is Phase.SUCCEEDED and len(it.world.lines("begun.log")) == 1
    epochs = [record["epoch"] for record in it.records()]
    assert epochs == sorted(epochs) and epochs[-1] > (first.driver.epoch if first.driver else 0)


def test_a_driver_that_does_not_leave_is_killed_when_taken_over(it: Scene) -> None:
    pid = pid_of(running(it))
    os.kill(pid, signal.SIGSTOP)
    driver.relieve(it.run_id, it.at(None), patience=0.2).close()
    assert home.holder(it.place) is None
    finish(it)
    assert driver.drive(it.run_id) == Exit.OK


def test_a_process_that_got_the_number_of_a_driver_before_is_left_alone(it: Scene) -> None:
    with subprocess.Popen(["sleep", "60"]) as innocent:
        lock = home.DriverLock.acquire(it.place)
        assert lock is not None
        lock.claim(innocent.pid, 0.0)  # as a driver did that ended; who has the lock now says later
        with pytest.raises(LaunchError, match="cannot be taken over"):
            driver.relieve(it.run_id, it.at(None), patience=0.05)
        assert innocent.poll() is None
        innocent.kill()
        lock.close()


def test_a_driver_does_not_start_again_what_a_teardown_has_deleted(it: Scene) -> None:
    """Although nobody could write down that its run is to end."""
    running(it)
    (it.root / "control").write_text("not a folder")
    with pytest.raises(home.Unwritable, match="holds nothing any more"):
        api.teardown(it.run_id)
    assert home.holder(it.place) is None, "it would take the job for lost"
    assert (len(it.world.lines("begun.log")), it.world.alive()) == (1, [])


def test_the_lock_passes_to_the_driver_without_a_gap(it: Scene) -> None:
    env = api.env()
    lock = home.DriverLock.acquire(it.place)
    assert lock is not None
    pid = driver.spawn(it.run_id, env, lock)
    who = home.holder(it.place)
    assert who is not None and who["pid"] == pid
    assert home.DriverLock.acquire(it.place, wait=0.0) is None
    finish(it)
    assert api.wait(it.run_id, timeout=30).phase is Phase.SUCCEEDED


def test_an_unknown_run_cannot_be_driven(it: Scene) -> None:
    with pytest.raises(UsageError, match="no run 'nobody'"):
        driver.drive("nobody")
