"""The local backend: real boots, real processes, stub trainers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.backends.base import (
    CanExec,
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
from launcher.backends.local import PLACE, LocalBackend
from launcher.backends.local_logs import read_parts
from launcher.clock import ManualClock
from launcher.errors import BadRequest, NoCapacity
from launcher.plan import fill
from launcher.spec import Hardware
from tests.stub_jobs import eventually, log, specification
from trainer import boot

BACKEND = LocalBackend()
STAYS = "wait_until_asked(); sys.exit(75)"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('ready'); time.sleep(300)"


@dataclass
class Job:
    """One job in a home of its own."""

    folder: Path
    spec: dict[str, Any]
    refs: tuple[Ref, ...] = ()
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def __post_init__(self) -> None:
        self.clock = ManualClock()
        self.work = Path(self.spec["work"])

    @property
    def env(self) -> Env:
        return Env(self.folder / "home", self.environ, self.clock, "me", sys.executable)

    @property
    def handle(self) -> JobHandle:
        return JobHandle(self.spec["run"], self.spec["name"], 1, self.spec["root"], self.refs)

    @property
    def intent(self) -> Intent:
        labels = {"launch-run": self.spec["run"], "launch-owner": "me"}
        raw = {**self.spec, "attempt": "${attempt}"}
        what = JobSpec(self.spec["run"], self.spec["name"], Hardware(), raw, labels, {}, {})
        (intent,) = BACKEND.plan(what, Offer("local", PLACE, "cpu:1")).intents
        return Intent(**fill(asdict(intent), {"attempt": 1}))

    def create(self) -> Ref:
        self.refs = (BACKEND.create(self.intent, self.env),)
        return self.refs[0]

    def observe(self) -> Seen:
        return BACKEND.observe(self.handle, self.env)

    def ended(self) -> Seen:
        eventually(lambda: self.observe().phase.over, "the end of the job")
        return self.observe()

    def ready(self, lines: int = 1) -> None:
        eventually(lambda: len(log(self.folder)) >= lines, "the trainer")

    def gone(self) -> None:
        eventually(lambda: BACKEND.delete(self.refs[0], self.env) is Held.GONE, "gone")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Any]:
    """Makes jobs, and leaves no process of theirs behind."""
    made: list[Job] = []

    def make(source: str = "", **changes: Any) -> Job:
        work = tmp_path / "home" / "local" / "thing-abcdef-j0-a1"
        made.append(
            Job(tmp_path, specification(tmp_path, source, **{"work": str(work), **changes}))
        )
        return made[-1]

    yield make
    for one in made:
        for pid in _pids(one.work):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# Offers and plans.


def offers(accelerator: str, **changes: Any) -> list[Offer]:
    env = Env(Path("/nowhere"), {}, ManualClock(), "me", sys.executable)
    return list(BACKEND.offers(Hardware(accelerator=accelerator, **changes), env))


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this machine have GPUs: the driver's tool is what tells."""

    def have(*names: str) -> None:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        lines = [f"GPU {n}: {name} (UUID: GPU-{n}a-b)" for n, name in enumerate(names)]
        tool.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)

    return have


def test_the_cpu_is_one_free_offer() -> None:
    assert offers("cpu:4") == [Offer("local", "this machine", "cpu:4", usd_per_hour=0.0)]


def test_an_accelerator_that_is_not_here_is_no_capacity(gpus: Any) -> None:
    gpus()
    with pytest.raises(NoCapacity, match=r"no capacity in this machine: it has no GPU; .* L4:1"):
        offers("L4:1")


@pytest.mark.parametrize(
    ("accelerator", "here", "enough"),
    [
        ("L4", ["NVIDIA L4"], True),
        ("L4:2", ["NVIDIA L4"], False),
        ("L4:2", ["NVIDIA L4", "NVIDIA L4"], True),
        ("L4:2", ["NVIDIA L4", "NVIDIA H200"], False),
        ("L4", ["NVIDIA L40S"], False),
        ("H100", ["NVIDIA H100 80GB HBM3"], True),
        ("H100-NVL", ["NVIDIA H100 80GB HBM3"], False),
        ("A100-80GB", ["NVIDIA A100-SXM4-80GB"], True),
        ("A100-80GB", ["NVIDIA A100-SXM4-40GB"], False),
        ("RTX4090", ["NVIDIA GeForce RTX 4090"], True),
        ("RTX-4090", ["NVIDIA RTX A4090"], False),
        ("v4-8", ["NVIDIA L4"], False),
    ],
)
def test_gpus_are_counted_by_their_names(
    gpus: Any, accelerator: str, here: list[str], enough: bool
) -> None:
    gpus(*here)
    if enough:
        assert len(offers(accelerator)) == 1
    else:
        with pytest.raises(NoCapacity):
            offers(accelerator)


def test_several_nodes_and_unknown_accelerators_are_bad_requests() -> None:
    with pytest.raises(BadRequest, match=r"hardware\.nodes: the local backend has one machine"):
        offers("cpu:1", nodes=2)
    with pytest.raises(BadRequest, match=r"hardware\.accelerator: no accelerator 'H10'"):
        offers("H10")


def test_a_plan_holds_the_request_and_no_secret(job: Any) -> None:
    one = job(secrets={"HF_TOKEN": "env://MY_TOKEN"})
    one.environ["MY_TOKEN"] = "s3cr3t"
    intent = one.intent
    assert (intent.kind, intent.name, intent.billable) == ("process", "thing-abcdef-j0-a1", False)
    assert intent.request["argv"] == [sys.executable, "boot.py", "run", "boot.json"]
    assert intent.request["boot"] == one.spec
    assert "s3cr3t" not in json.dumps(asdict(intent))
    assert one.intent == intent
    assert not one.work.exists()


# From create to the end.


def test_a_job_succeeds_when_every_stage_is_completed(job: Any) -> None:
    one = job("write(0, completed=True, global_step=20)")
    ref = one.create()
    assert ref == Ref("local", "process", "thing-abcdef-j0-a1", PLACE, one.spec["run"], False,
                      {"work": str(one.work)})  # fmt: skip
    seen = one.ended()
    assert (seen.phase, seen.exit_code, seen.why) == (Phase.SUCCEEDED, 0, "")
    eventually(lambda: one.observe().held == ((ref, Held.GONE),), "its process to be gone")


def test_a_job_is_starting_until_the_trainer_runs(job: Any, tmp_path: Path) -> None:
    """A slow interpreter: what counts as alive must not wait for boot's first line."""
    gate = tmp_path / "gate"
    slow = tmp_path / "slow-python"
    slow.write_text(
        f'#!/bin/sh\nwhile [ ! -e {gate} ]; do sleep 0.02; done\nexec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    one = job(STAYS, python=str(slow))
    ref = one.create()
    for _ in range(20):
        assert one.observe() == Seen(Phase.STARTING, ((ref, Held.LIVE),))
    gate.touch()
    one.ready()
    assert one.observe() == Seen(Phase.RUNNING, ((ref, Held.LIVE),))


@pytest.mark.parametrize(
    ("source", "phase", "code", "why"),
    [
        ("say('error: no such key'); sys.exit(65)", Phase.FAILED, 65,
         "worker 0: no such key (data)"),
        ("raise RuntimeError('out of luck')", Phase.FAILED, 1,
         "worker 0: RuntimeError: out of luck"),
        ("sys.exit(75)", Phase.PREEMPTED, 75, "worker 0: exit code 75"),
        ("write(0, completed=False, stopped='until', global_step=10)", Phase.CANCELLED, 0,
         "s: paused at step 10 (train.until)"),
        ("write(0, completed=False, global_step=7)", Phase.FAILED, 0,
         "exit code 0, but s is not completed at step 7"),
    ],
)  # fmt: skip
def test_how_a_job_ends_is_its_phase(
    job: Any, source: str, phase: Phase, code: int, why: str
) -> None:
    one = job(source)
    one.create()
    seen = one.ended()
    assert (seen.phase, seen.exit_code, seen.why) == (phase, code, why)


def test_an_outage_before_the_workers_began_is_no_preemption(job: Any) -> None:
    one = job("""if sys.argv[1] == "inputs":
    print('error: gs://other/x.jsonl: no answer'); sys.exit(75)""")
    one.spec["job"]["data"] = ["gs://other/x.jsonl"]
    one.create()
    seen = one.ended()
    assert (seen.phase, seen.exit_code, seen.cause) == (Phase.FAILED, 75, "infrastructure")
    assert seen.why == "inputs: gs://other/x.jsonl: no answer"


def test_a_stopped_job_is_cancelled_and_says_where(job: Any) -> None:
    source = STAYS.replace("sys", "write(0, completed=False, stopped='signal', global_step=3); sys")
    one = job(source)
    one.create()
    one.ready()
    (Path(one.spec["root"]) / "control").mkdir()
    (Path(one.spec["root"]) / "control" / "stop.json").write_text("{}")
    BACKEND.stop(one.handle, one.env, 600)
    seen = one.ended()
    assert (seen.phase, seen.exit_code, seen.why) == (Phase.CANCELLED, 0, "s: stopped at step 3")


def test_a_signal_without_the_marker_is_a_preemption(job: Any) -> None:
    one = job(STAYS)
    one.create()
    one.ready()
    BACKEND.stop(one.handle, one.env, 600)
    seen = one.ended()
    assert (seen.phase, seen.exit_code, seen.why) == (Phase.PREEMPTED, 75, "signal")


def test_a_killed_boot_is_lost_and_its_trainer_gone(job: Any) -> None:
    one = job("say(os.getpid()); wait_until_asked()")
    ref = one.create()
    one.ready(2)
    os.kill(_boot(one), signal.SIGKILL)
    eventually(lambda: one.observe().phase.over, "the loss to be seen")
    seen = one.observe()
    assert seen.why == "boot was killed before it could say how the job ended"
    assert (seen.phase, seen.exit_code, seen.held) == (Phase.LOST, None, ((ref, Held.GONE),))
    assert _pids(one.work) == []


def test_a_boot_that_cannot_start_has_failed_with_its_last_words(job: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken-python"
    broken.write_text("#!/bin/sh\necho 'libpython3.so: cannot open shared object file' >&2\nexit 1")
    broken.chmod(0o755)
    one = job(python=str(broken))
    one.create()
    seen = one.ended()
    assert (seen.phase, seen.exit_code) == (Phase.FAILED, 78)
    assert seen.why == "boot could not start: libpython3.so: cannot open shared object file"


def test_an_interpreter_that_is_not_there_is_a_bad_request(job: Any) -> None:
    one = job(python="/no/such/python")
    with pytest.raises(BadRequest, match="cannot start /no/such/python") as caught:
        one.create()
    assert "\n" not in str(caught.value)
    assert boot.take_lock(one.work) is not None  # it is not taken for alive


def test_a_job_outlives_the_process_that_made_it(job: Any, tmp_path: Path) -> None:
    one = job(STAYS)
    _in_child(lambda: one.create())
    one.refs = (Ref("local", "process", "x", PLACE, "r", False, {"work": str(one.work)}),)
    one.ready()
    assert one.observe().phase is Phase.RUNNING
    assert os.getsid(_boot(one)) == _boot(one) != os.getsid(0)


def test_observing_nothing_is_lost_and_no_error(job: Any) -> None:
    one = job()
    assert one.observe().phase is Phase.LOST
    one.refs = (Ref("local", "process", "x", PLACE, "r", False, {"work": str(one.work)}),)
    assert one.observe().phase is Phase.LOST
    assert BACKEND.delete(one.refs[0], one.env) is Held.GONE


def test_no_secret_is_written_anywhere(job: Any, tmp_path: Path) -> None:
    one = job("say(len(os.environ['HF_TOKEN']))", secrets={"HF_TOKEN": "env://MY_TOKEN"})
    one.environ["MY_TOKEN"] = "s3cr3t-value-of-the-token"
    one.create()
    one.ended()
    assert log(tmp_path) == ["25"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if b"s3cr3t" in path.read_bytes()]


# Once only.


def test_creating_twice_runs_the_job_once(job: Any, tmp_path: Path) -> None:
    one = job("say('began'); " + STAYS)
    ref = one.create()
    one.ready(2)
    assert one.create() == ref
    os.kill(_boot(one), signal.SIGTERM)
    one.ended()
    assert one.create() == ref
    assert one.observe().phase is Phase.PREEMPTED
    assert log(tmp_path) == ["began", "ready"]


def test_creating_from_many_processes_at_once_runs_the_job_once(job: Any, tmp_path: Path) -> None:
    one = job("say('began'); write(0, completed=True)")
    intent, env, gate = one.intent, one.env, tmp_path / "gate"

    def create() -> None:
        while not gate.exists():
            time.sleep(0.001)
        BACKEND.create(intent, env)

    children = [_fork(create) for _ in range(6)]
    gate.touch()
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    one.create()
    assert one.ended().phase is Phase.SUCCEEDED
    assert log(tmp_path) == ["began"]


def test_a_job_that_was_killed_is_not_begun_again_by_create(job: Any, tmp_path: Path) -> None:
    one = job("say('began'); " + STAYS)
    one.create()
    one.ready(2)
    os.kill(_boot(one), signal.SIGKILL)
    one.ended()
    one.create()
    assert one.observe().phase is Phase.LOST
    assert log(tmp_path) == ["began", "ready"]


# Stop, delete, sweep.


def test_a_reused_pid_is_left_alone(job: Any) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        one = job()
        one.refs = (Ref("local", "process", "x", PLACE, "r", False, {"work": str(one.work)}),)
        boot.write_json(one.work / "process.json", {"pid": stranger.pid, "state": "running"})
        BACKEND.stop(one.handle, one.env, 600)
        assert BACKEND.delete(one.refs[0], one.env) is Held.GONE
        assert one.observe().phase is Phase.LOST
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_deleting_lets_the_trainer_save_first(job: Any, tmp_path: Path) -> None:
    one = job("wait_until_asked(); time.sleep(0.3); say('saved'); sys.exit(75)")
    ref = one.create()
    one.ready()
    assert BACKEND.delete(ref, one.env) is Held.DELETING
    one.gone()
    assert log(tmp_path) == ["ready", "saved"]


def test_deleting_kills_what_stays_a_minute_on(job: Any) -> None:
    helper = "import time; time.sleep(300)"
    one = job(f"subprocess.Popen([sys.executable, '-c', {helper!r}], start_new_session=True)\n"
              + STUBBORN)  # fmt: skip
    ref = one.create()
    one.ready()
    assert len(_pids(one.work)) == 3
    for _ in range(6):
        assert BACKEND.delete(ref, one.env) is Held.DELETING
        one.clock.sleep(10)
        assert len(_pids(one.work)) == 3
    one.clock.sleep(1)
    assert BACKEND.delete(ref, one.env) is Held.DELETING
    one.gone()
    assert _pids(one.work) == []


def test_a_job_deleted_before_boot_could_listen_is_killed_at_once(job: Any, tmp_path: Path) -> None:
    """Gone may only be said when nothing can come to life any more."""
    slow = tmp_path / "slow-python"
    slow.write_text("#!/bin/sh\nsleep 300\n")
    slow.chmod(0o755)
    one = job(python=str(slow))
    ref = one.create()
    assert BACKEND.delete(ref, one.env) is Held.DELETING
    one.gone()
    assert _pids(one.work) == []


def test_a_helper_that_outlives_boot_is_still_held(job: Any) -> None:
    helper = "import time; time.sleep(300)"
    one = job(f"subprocess.Popen([sys.executable, '-c', {helper!r}], start_new_session=True,"
              " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); say('ready')")  # fmt: skip
    ref = one.create()
    seen = one.ended()
    eventually(lambda: len(_pids(one.work)) == 1, "boot's end")
    assert (one.observe().phase, one.observe().held) == (seen.phase, ((ref, Held.LIVE),))
    assert BACKEND.delete(ref, one.env) is Held.DELETING
    one.gone()


def test_sweep_finds_what_lives_and_is_ours(job: Any) -> None:
    one = job(STAYS)
    ref = one.create()
    one.ready()
    assert list(BACKEND.sweep(one.env)) == [ref]
    other = Env(one.env.home, {}, one.clock, "somebody else", sys.executable)
    assert list(BACKEND.sweep(other)) == []
    elsewhere = Env(one.folder / "another home", {}, one.clock, "me", sys.executable)
    assert list(BACKEND.sweep(elsewhere)) == []
    BACKEND.delete(ref, one.env)
    one.gone()
    assert list(BACKEND.sweep(one.env)) == []


def test_a_job_whose_folder_was_removed_is_found_and_deleted(job: Any) -> None:
    one = job(STUBBORN)
    ref = one.create()
    one.ready()
    one.work.rename(one.work.parent.parent / "moved away")
    assert list(BACKEND.sweep(one.env)) == [ref]
    assert BACKEND.delete(ref, one.env) is Held.DELETING
    one.gone()
    assert _pids(one.work) == []


# Commands in the job's place.


def test_a_command_runs_in_the_jobs_folder_and_environment(job: Any, tmp_path: Path) -> None:
    assert isinstance(BACKEND, CanExec)
    one = job(STAYS, env={"NCCL_DEBUG": "WARN"}, secrets={"T": "env://MY_TOKEN"})
    one.environ["MY_TOKEN"] = "abc"
    one.create()
    one.ready()
    out = tmp_path / "out"
    script = (
        "import os, sys, trainer, pathlib; pathlib.Path(sys.argv[1]).write_text(' '.join(["
        "os.getcwd(), trainer.__file__, os.environ['NCCL_DEBUG'], os.environ['T']])); sys.exit(7)"
    )
    assert BACKEND.exec(one.handle, 0, [sys.executable, "-c", script, str(out)], one.env) == 7
    code = one.work / "bundle"
    assert out.read_text() == f"{code} {code}/trainer/__init__.py WARN abc"


def test_a_command_that_cannot_run_is_a_bad_request(job: Any) -> None:
    one = job(STAYS)
    with pytest.raises(BadRequest, match="was not started"):
        BACKEND.exec(one.handle, 0, ["true"], one.env)
    one.create()
    one.ready()
    with pytest.raises(BadRequest, match="one machine, worker 0"):
        BACKEND.exec(one.handle, 1, ["true"], one.env)
    with pytest.raises(BadRequest, match="/no/such: No such file"):
        BACKEND.exec(one.handle, 0, ["/no/such"], one.env)


# Logs.


def test_logs_come_in_order_each_line_once_across_looks(job: Any) -> None:
    source = """
for n in range(300):
    say("line", n)
    time.sleep(0.002)
"""
    one = job(source)
    one.create()
    lines: list[str] = []
    cursor: Any = {}
    while True:
        over = one.observe().phase.over
        for line in BACKEND.logs(one.handle, LogQuery(cursor=cursor), one.env):
            assert line.worker == 0
            lines.append(line.text)
            cursor = line.cursor
        if over:
            break
    assert lines == [f"line {n}" for n in range(300)]


HANDLE = JobHandle("r", "thing-abcdef-j3", 2, "", ())


def part(folder: Path, worker: int, *lines: str, end: str = "\n") -> Path:
    path = folder / f"worker-{worker}" / "03-0002.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + end)
    return path


def stamp(second: int) -> str:
    return f"2026-11-21T08:32:{second:02d}.000000Z"


def test_workers_are_merged_by_time(tmp_path: Path) -> None:
    part(tmp_path, 0, f"{stamp(1)} a", f"{stamp(4)} d")
    part(tmp_path, 10, f"{stamp(2)} b", "no time of its own", f"{stamp(3)} c")
    (tmp_path / "worker-0" / "03-0001.log").write_text(f"{stamp(0)} of another attempt\n")
    lines = list(read_parts(tmp_path, HANDLE, LogQuery()))
    texts = [(line.worker, line.text) for line in lines]
    assert texts == [(0, "a"), (10, "b"), (10, "no time of its own"), (10, "c"), (0, "d")]
    assert lines[0].time == 1795249921.0
    only = read_parts(tmp_path, HANDLE, LogQuery(worker=10, since=lines[3].time))
    assert [line.text for line in only] == ["c"]


def test_a_torn_last_line_is_left_for_later(tmp_path: Path) -> None:
    path = part(tmp_path, 0, f"{stamp(1)} whole", f"{stamp(2)} to", end="")
    (first,) = read_parts(tmp_path, HANDLE, LogQuery())
    with path.open("a") as file:
        file.write("rn\n")
    (second,) = read_parts(tmp_path, HANDLE, LogQuery(cursor=first.cursor))
    assert (first.text, second.text) == ("whole", "torn")


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 59)), max_size=30),
    cuts=st.lists(st.integers(0, 4000), max_size=5),
    stops=st.lists(st.integers(0, 5), min_size=6, max_size=6),
)
def test_however_the_reading_is_cut_every_line_comes_once_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[int, int]],
    cuts: list[int],
    stops: list[int],
) -> None:
    """The parts grow to byte `cut` between looks; a look may break off after a few lines."""
    folder = tmp_path_factory.mktemp("logs")
    wanted: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for number, (worker, second) in enumerate(sorted(entries, key=lambda entry: entry[1])):
        wanted[worker].append(f"{stamp(second)} line {number} é")
    whole = {worker: "".join(f"{line}\n" for line in lines).encode()
             for worker, lines in wanted.items()}  # fmt: skip
    found: dict[int, list[str]] = {0: [], 1: [], 2: []}
    cursor: Any = {}
    looks: list[Optional[int]] = [*sorted(cuts), None]
    for index, cut in enumerate(looks):
        for worker, data in whole.items():
            part(folder, worker, end="").write_bytes(data[:cut])
        for number, line in enumerate(read_parts(folder, HANDLE, LogQuery(cursor=cursor))):
            found[line.worker].append(line.text)
            cursor = line.cursor
            if cut is not None and number == stops[index]:
                break
    assert found == {w: [line.partition(" ")[2] for line in lines] for w, lines in wanted.items()}


# Doctor.


def test_the_doctor_says_whether_jobs_can_run_here(gpus: Any, tmp_path: Path) -> None:
    gpus("NVIDIA L4")
    env = Env(tmp_path / "not" / "yet", {}, ManualClock(), "me", sys.executable)
    rows = {row.name: row for row in BACKEND.check(env)}
    assert rows["local python"].result == "pass"
    assert (rows["local gpu"].result, rows["local gpu"].detail) == ("pass", "NVIDIA L4")
    assert "GB free" in rows["local disk"].detail


def test_the_doctor_says_what_an_interpreter_lacks(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(bare.stat().st_mode | stat.S_IXUSR)
    row = _python_row(str(bare), tmp_path)
    assert row.result == "fail"
    assert row.detail == f"{bare} lacks torch, transformers, tokenizers, safetensors"
    assert row.fix
    assert _python_row("/no/such", tmp_path).detail == "/no/such: No such file or directory"


def _python_row(python: str, home: Path) -> Any:
    env = Env(home, {}, ManualClock(), "me", python)
    return next(row for row in BACKEND.check(env) if row.name == "local python")


def _boot(job: Job) -> int:
    return int(json.loads((job.work / "process.json").read_text())["pid"])


def _pids(work: Path) -> list[int]:
    """Live processes with the job's folder in their environment, boot among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"LAUNCH_WORK={work}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _in_child(act: Any) -> None:
    assert os.waitpid(_fork(act), 0)[1] == 0


def _fork(act: Any) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return pid
