"""What goes wrong around a local job: crashes, a full disk, a trainer that prints its secrets."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import pytest

from launcher.backends.base import (
    Env,
    Held,
    Intent,
    JobHandle,
    JobSpec,
    LogQuery,
    Offer,
    Phase,
    Ref,
    Seen,
)
from launcher.backends.local import LocalBackend
from launcher.backends.local_logs import read_parts
from launcher.clock import ManualClock
from launcher.plan import fill
from launcher.spec import Hardware
from tests.stub_jobs import eventually, log, read, specification

RUN, NAME = "0123456789abcdef", "thing-abcdef-j0"
SECRET = "s3cr3t-value-of-the-token"
OFFER = Offer("local", "this machine", "cpu:1", usd_per_hour=0.0)


class Scene:
    """One home, one job, and the backend that knows both only by what lies on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.backend, self.clock = folder, LocalBackend(), ManualClock()
        self.work = folder / "home" / "local" / f"{NAME}-a1"
        self.refs: tuple[Ref, ...] = ()

    def env(self, owner: str = "me", **environ: str) -> Env:
        return Env(self.folder / "home", {**os.environ, **environ}, self.clock, owner,
                   sys.executable)  # fmt: skip

    def spec(self, source: str = "", **changes: Any) -> JobSpec:
        work = str(self.folder / "home" / "local" / (NAME + "-a${attempt}"))
        raw = {"work": work, "attempt": "${attempt}", **changes}
        boot = specification(self.folder, source, **raw)
        labels = {"launch-run": RUN, "launch-owner": "me"}
        return JobSpec(RUN, NAME, Hardware(), boot, labels, {}, boot["secrets"])

    def intent(self, source: str = "", **changes: Any) -> Intent:
        """What the engine sends: the planned request with its holes filled."""
        (planned,) = self.backend.plan(self.spec(source, **changes), OFFER).intents
        holes = {"attempt": 1}
        return replace(
            planned, name=fill(planned.name, holes), request=fill(planned.request, holes)
        )

    def create(
        self, source: str = "", environ: Optional[dict[str, str]] = None, **changes: Any
    ) -> Ref:
        ref = self.backend.create(self.intent(source, **changes), self.env(**(environ or {})))
        self.refs = (ref,)
        return ref

    @property
    def job(self) -> JobHandle:
        return JobHandle(RUN, NAME, 1, str(self.folder / "root"), self.refs)

    def observe(self) -> Seen:
        return self.backend.observe(self.job, self.env())

    def held(self) -> Held:
        return self.observe().held[0][1]

    def over(self) -> Seen:
        """Wait until boot has let go; the last look."""
        eventually(lambda: self.observe().phase.over and self.held() is Held.GONE, "the end")
        return self.observe()

    def said(self, *lines: str) -> None:
        eventually(lambda: log(self.folder) == list(lines), f"the lines {lines}")

    def boot_pid(self) -> int:
        return int(read(self.work / "process.json")["pid"])

    def swept(self, owner: str = "me") -> list[str]:
        return [ref.name for ref in self.backend.sweep(self.env(owner))]

    def end(self) -> None:
        """Nothing outlives its test."""
        deadline = time.monotonic() + 20
        while self.swept():
            assert time.monotonic() < deadline, "it cannot be ended"
            for ref in self.backend.sweep(self.env()):
                self.backend.delete(ref, self.env())
            self.clock.sleep(100)
            time.sleep(0.02)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.end()


# Crashes.


def test_a_reply_lost_in_a_crash_is_adopted(scene: Scene) -> None:
    source = "say('began'); wait_until_asked()"
    intent = scene.intent(source)
    child = os.fork()
    if child == 0:
        scene.backend.create(intent, scene.env())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    scene.create(source)
    scene.said("began", "ready")
    assert len(_boots(scene.work)) == 1


def test_a_crash_before_the_process_was_started_leaves_nothing_in_the_way(scene: Scene) -> None:
    scene.work.mkdir(parents=True)
    (scene.work / "lock").touch()
    (scene.work / "boot.json").write_text('{"half a')
    scene.create("say('began'); write(0, completed=True)")
    assert scene.over().phase is Phase.SUCCEEDED
    assert log(scene.folder) == ["began"]


def test_a_killed_boot_is_lost_with_its_trainer_and_a_zombie_does_not_live(scene: Scene) -> None:
    ref = scene.create("say(os.getpid()); time.sleep(300)")
    eventually(lambda: log(scene.folder), "the trainer")
    eventually(lambda: scene.observe().phase is Phase.RUNNING, "running")
    pid, trainer = scene.boot_pid(), int(log(scene.folder)[0])
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: _state(pid) in ("Z", ""), "boot's end")
    assert _state(pid) == "Z"  # this process started it and has not asked how it ended
    eventually(lambda: _state(trainer) in ("Z", ""), "the trainer's end")
    seen = scene.over()
    assert (seen.phase, seen.held[0][1]) == (Phase.LOST, Held.GONE)
    assert seen.why == "boot was killed before it could say how the job ended"
    assert scene.backend.delete(ref, scene.env()) is Held.GONE
    assert scene.swept() == []
    scene.create("say(os.getpid()); time.sleep(300)")
    assert scene.observe().phase is Phase.LOST  # the attempt is over; the next has its own name


def test_what_outlives_a_killed_boot_is_held_and_deleted(scene: Scene) -> None:
    """A helper in a session of its own, such as a data loader that lost its parent."""
    source = """
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"],
                          start_new_session=True, stdout=subprocess.DEVNULL)
say(helper.pid); time.sleep(300)
"""
    ref = scene.create(source)
    eventually(lambda: log(scene.folder), "the helper")
    eventually(lambda: scene.observe().phase is Phase.RUNNING, "running")
    helper, pid = int(log(scene.folder)[0]), scene.boot_pid()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: scene.observe().phase is Phase.LOST, "boot's end")
    assert scene.held() is Held.LIVE
    assert scene.swept() == [ref.name]
    assert scene.backend.delete(ref, scene.env()) is Held.DELETING
    eventually(lambda: scene.backend.delete(ref, scene.env()) is Held.GONE, "gone")
    assert _state(helper) in ("Z", "")


# What must not be written, and what cannot be.


def test_a_secret_is_in_no_file_even_when_the_trainer_prints_it(scene: Scene) -> None:
    source = """
say("Bearer " + os.environ["TOKEN"])
say("error: refused " + os.environ["TOKEN"].splitlines()[1])
sys.exit(78)
"""
    scene.create(source, {"SOURCE": SECRET + "\nsecond-line"}, secrets={"TOKEN": "env://SOURCE"})
    assert scene.over().why == "worker 0: refused *** (environment)"
    assert log(scene.folder) == ["Bearer ***", "***", "error: refused ***"]
    files = [path for path in scene.folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    leaks = [path for path in files for part in (SECRET, "second-line")
             if part.encode() in path.read_bytes()]  # fmt: skip
    assert leaks == []


def test_a_disk_too_full_for_boots_own_output_does_not_hide_how_the_job_ended(
    scene: Scene,
) -> None:
    scene.work.mkdir(parents=True)
    (scene.work / "boot.out").symlink_to("/dev/full")
    scene.create("say('error: no rows'); sys.exit(65)")
    seen = scene.over()
    assert (seen.phase, seen.why) == (Phase.FAILED, "worker 0: no rows (data)")


def test_the_recipes_own_pythonpath_comes_after_the_bundle(scene: Scene) -> None:
    (scene.folder / "extra").mkdir()
    (scene.folder / "extra" / "mine.py").write_text("word = 'found'")
    scene.create("import mine; say(mine.word); write(0, completed=True)",
                 env={"PYTHONPATH": str(scene.folder / "extra")})  # fmt: skip
    assert scene.over().phase is Phase.SUCCEEDED
    assert log(scene.folder) == ["found"]


def test_a_bad_specification_is_a_failed_job_with_boots_own_line(scene: Scene) -> None:
    scene.create(workers="two")
    seen = scene.over()
    assert seen.phase is Phase.FAILED
    assert seen.why.endswith("workers: expected int, got 'two'")


# Logs.


def test_a_jobs_lines_with_their_times_also_from_a_file_uri(scene: Scene) -> None:
    before = time.time()
    scene.create("say('one'); say('two'); write(0, completed=True)")
    scene.over()
    job = replace(scene.job, root=f"file://{scene.folder}/root")
    lines = list(scene.backend.logs(job, LogQuery(), scene.env()))
    assert [(line.worker, line.text) for line in lines] == [(0, "one"), (0, "two")]
    assert before - 1 <= lines[0].time <= lines[1].time <= time.time()
    rest = scene.backend.logs(job, LogQuery(cursor=lines[0].cursor), scene.env())
    assert [line.text for line in rest] == ["two"]


def test_workers_can_be_asked_for_alone_and_foreign_folders_are_passed_over(tmp_path: Path) -> None:
    times = {0: [1.0, 3.0, 5.0], 1: [2.0, 3.0, 4.0]}
    for number, stamps in times.items():
        _part(tmp_path, number, [(at, f"{number}@{at:g}") for at in stamps])
    (tmp_path / "worker-0.old").mkdir()  # not ours
    assert _texts(tmp_path) == ["0@1", "1@2", "0@3", "1@3", "1@4", "0@5"]
    assert _texts(tmp_path, worker=1) == ["1@2", "1@3", "1@4"]
    assert _texts(tmp_path, since=4.0) == ["1@4", "0@5"]
    assert _texts(tmp_path, worker=7) == []


def test_ten_thousand_lines_are_read_in_under_a_second(tmp_path: Path) -> None:
    _part(tmp_path, 0, [(1_700_000_000 + k / 1000, f"line {k}") for k in range(10_000)])
    started = time.process_time()
    lines = _texts(tmp_path)
    assert time.process_time() - started < 1.0
    assert lines[-1] == "line 9999" and len(lines) == 10_000


def _handle(folder: Path) -> JobHandle:
    return JobHandle(RUN, NAME, 1, str(folder), ())


def _texts(folder: Path, **query: Any) -> list[str]:
    return [line.text for line in read_parts(folder, _handle(folder), LogQuery(**query))]


def _part(folder: Path, worker: int, lines: list[tuple[float, str]]) -> None:
    path = folder / f"worker-{worker}" / "00-0001.log"
    path.parent.mkdir()
    path.write_bytes(b"".join(_stamp(at) + f" {text}\n".encode() for at, text in lines))


def _stamp(seconds: float) -> bytes:
    when = datetime.fromtimestamp(seconds, timezone.utc)
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()


def _state(pid: int) -> str:
    """The kernel's letter for a process; empty: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _boots(work: Path) -> list[int]:
    """Pids of the boots of a work folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            argv = path.read_bytes().decode(errors="replace").split("\0")
            folder = os.readlink(path.parent / "cwd")  # noqa: PTH115
            if "boot.py" in argv and folder == str(work):
                found.append(int(path.parent.name))
    return found
