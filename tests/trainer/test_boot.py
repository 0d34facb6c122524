"""boot: what it starts, what it writes, how it ends a job, and what it refuses."""

from __future__ import annotations

import bz2
import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stub_jobs import eventually, finish, log, read, specification, start
from trainer import boot
from trainer.workers import verdict, worst

SECRET = "s3cr3t-value-of-the-token"


def run(folder: Path, spec: dict[str, Any], **environ: str) -> tuple[int, str]:
    return finish(start(folder, spec, environ))


# One worker.


@pytest.mark.parametrize("code", [0, 1, 64, 65, 75, 78])
def test_the_trainers_exit_code_is_boots_and_is_recorded(tmp_path: Path, code: int) -> None:
    source = f"say('working'); say('error: the reason') if {code} else 0; sys.exit({code})"
    assert run(tmp_path, specification(tmp_path, source))[0] == code
    why = "worker 0: the reason" if code else "ended"
    result = read(tmp_path / "work" / "result.json")
    assert (result["exit_code"], result["why"]) == (code, why)
    assert read(tmp_path / "work" / "exit-0.json")["code"] == code
    attempt = read(tmp_path / "root" / "attempts" / "00-0001.json")
    assert attempt["started"] <= attempt["ended"] <= time.time()
    assert {k: attempt[k] for k in ("v", "job", "attempt", "exit_code", "why", "ranks")} == {
        "v": 1, "job": 0, "attempt": 1, "exit_code": code, "why": why, "ranks": {"0": code},
    }  # fmt: skip


def test_a_trainer_killed_by_a_signal_exits_as_128_and_the_signal(tmp_path: Path) -> None:
    source = "say('last words'); os.kill(os.getpid(), signal.SIGKILL)"
    assert run(tmp_path, specification(tmp_path, source))[0] == 137
    assert read(tmp_path / "work" / "result.json")["why"] == "worker 0: last words"


def test_the_trainer_runs_from_the_bundle_and_not_from_an_installation(tmp_path: Path) -> None:
    """This very project is installed for `sys.executable`, so `trainer` could come from there."""
    source = "import trainer; say(trainer.__file__); say(os.getcwd()); say(*sys.path[:2])"
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    assert run(tmp_path, specification(tmp_path, source), PYTHONPATH=str(elsewhere)) == (0, "")
    code = tmp_path / "work" / "bundle"
    where, folder, paths = log(tmp_path)
    assert where == str(code / "trainer" / "__init__.py")
    assert folder == str(code)
    assert paths.split()[0] == str(code)


def test_a_module_missing_from_the_bundle_is_not_found_elsewhere(tmp_path: Path) -> None:
    """`trainer.loop` exists in this project; the bundle has none."""
    assert run(tmp_path, specification(tmp_path, "import trainer.loop"))[0] == 1
    assert "No module named 'trainer.loop'" in log(tmp_path)[-1]


def test_the_trainer_gets_its_environment_and_its_job(tmp_path: Path) -> None:
    source = """
os.environ["HF_TOKEN"] = os.environ["HF_TOKEN"][::-1]  # as it is, the log would not show it
say(json.dumps(dict(os.environ))); say(json.dumps(job))
"""
    spec = specification(
        tmp_path, source, env={"NCCL_DEBUG": "WARN", "PYTHONUNBUFFERED": "0"},
        secrets={"HF_TOKEN": "env://MY_TOKEN"},
    )  # fmt: skip
    assert run(tmp_path, spec, MY_TOKEN=SECRET, NCCL_DEBUG="INFO") == (0, "")
    given, job = map(json.loads, log(tmp_path))
    assert job == spec["job"]
    wanted = {
        "NCCL_DEBUG": "WARN", "HF_TOKEN": SECRET[::-1], "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false", "LAUNCH_RUN": spec["run"], "LAUNCH_ATTEMPT": "1",
    }  # fmt: skip
    assert {key: given.get(key) for key in wanted} == wanted


def test_boot_writes_no_secret(tmp_path: Path) -> None:
    spec = specification(tmp_path, "say(len(os.environ['T']))", secrets={"T": "env://MY_TOKEN"})
    assert run(tmp_path, spec, MY_TOKEN=SECRET) == (0, "")
    assert log(tmp_path) == [str(len(SECRET))]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("secret", "said", "shown"),
    [
        (" s3c\n", "say(value, [value])", "*** [' ***\\n']"),
        ("a/b+c d", "say(quote(value, safe=''), quote(value), quote_plus(value))", "*** *** ***"),
        ("it's\\", "say([value], [value + '\"'], json.dumps(value))", '["***"] [\'***"\'] "***"'),
        ('{\n "k": "x\\ny"\n}\n', "say(value.split()); say(json.dumps(value))", None),
        ("-----BEGIN-----\nMIIE\n-----END-----\n", "say(value); say({'K': value})", None),
        ("caf\udce9", "say('x'); os.write(1, os.environb[b'T'] + bytes([10]))", "x ***"),
    ],
)  # fmt: skip
def test_a_secret_is_hidden_however_it_is_written(
    tmp_path: Path, secret: str, said: str, shown: str | None
) -> None:
    source = f"from urllib.parse import quote, quote_plus; value = os.environ['T']\n{said}"
    spec = specification(tmp_path, source, secrets={"T": "env://MY_TOKEN"})
    assert run(tmp_path, spec, MY_TOKEN=secret) == (0, "")
    text = " ".join(line.strip() for line in log(tmp_path))
    assert "***" in text and not [part for part in ("MIIE", "BEGIN", "s3c") if part in text]
    assert shown is None or text == shown


def test_a_line_that_is_cut_is_not_cut_through_a_secret(tmp_path: Path) -> None:
    source = "say(os.environ['T'] * 100_000)"
    spec = specification(tmp_path, source, secrets={"T": "env://MY_TOKEN"})
    assert run(tmp_path, spec, MY_TOKEN=SECRET) == (0, "")
    lines = log(tmp_path)
    assert len(lines) > 1 and set("".join(lines)) == {"*"}


@pytest.mark.parametrize(
    ("secrets", "line"),
    [
        ({"T": "env://NOT_SET_ANYWHERE"}, "secret T: the variable NOT_SET_ANYWHERE is not set"),
        (
            {"T": "vault://x"},
            "secret T: vault:// is not known; allowed: env://NAME, "
            "secret-manager://PROJECT/NAME[/VERSION]",
        ),
    ],
)
def test_a_secret_that_is_not_there_is_one_line_and_78(
    tmp_path: Path, secrets: dict[str, str], line: str
) -> None:
    assert run(tmp_path, specification(tmp_path, secrets=secrets)) == (78, "")
    assert read(tmp_path / "work" / "result.json")["why"] == line
    assert not log(tmp_path)


def test_a_relative_work_folder_lies_in_the_machines_temporary_folder(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    spec = specification(tmp_path, work="launch/x-a1")
    assert run(tmp_path, spec, TMPDIR=str(tmp_path / "tmp")) == (0, "")
    assert read(tmp_path / "tmp" / "launch" / "x-a1" / "result.json")["exit_code"] == 0


# The log.


def test_lines_are_stamped_and_nothing_of_them_is_lost(tmp_path: Path) -> None:
    source = r"""
out = sys.stdout.buffer
out.write(b"plain\n\nbad \xff\xc3 bytes\nf\xc3\xa4hrt\r\n10%\r 20%\r 30%\n"); out.flush()
sys.stderr.write("on stderr\n"); sys.stderr.flush()
out.write(b"caf\xc3"); out.flush(); time.sleep(0.1)
out.write(b"\xa9 without end"); out.flush()
"""
    before = time.time()
    assert run(tmp_path, specification(tmp_path, source))[0] == 0
    assert log(tmp_path) == [
        "plain", "", "bad �� bytes", "fährt", " 30%", "on stderr", "café without end",
    ]  # fmt: skip
    raw = (tmp_path / "root" / "logs" / "worker-0" / "00-0001.log").read_text()
    stamps = [line.partition(" ")[0] for line in raw.splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp) for stamp in stamps)
    times = [datetime.fromisoformat(stamp[:-1] + "+00:00").timestamp() for stamp in stamps]
    assert times == sorted(times)
    assert before - 1 < times[0] <= times[-1] < time.time() + 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_local_boot_says_on_stdout_what_it_has_to_say_itself(
    tmp_path: Path, workers: int
) -> None:
    process = start(tmp_path, specification(tmp_path, "say('hello')", workers=workers))
    assert process.communicate(timeout=90)[0] == "exit code 0: ended\n"
    assert [log(tmp_path, rank) for rank in range(workers)] == [["hello"]] * workers


def test_ten_thousand_lines_a_second_pass(tmp_path: Path) -> None:
    source = """
for start in range(0, 200_000, 100):
    sys.stdout.write("".join(f"line {n} of a chatty trainer\\n" for n in range(start, start + 100)))
    sys.stdout.flush()
"""
    assert run(tmp_path, specification(tmp_path, source))[0] == 0
    attempt = read(tmp_path / "root" / "attempts" / "00-0001.json")
    assert log(tmp_path) == [f"line {n} of a chatty trainer" for n in range(200_000)]
    assert 200_000 / (attempt["ended"] - attempt["started"]) > 10_000


def test_output_without_a_line_end_does_not_pile_up(tmp_path: Path) -> None:
    source = "sys.stdout.write('x' * 50_000_000); sys.stdout.flush(); say(); say('after')"
    assert run(tmp_path, specification(tmp_path, source))[0] == 0
    lines = log(tmp_path)
    assert lines[-1] == "after"
    assert "".join(lines[:-1]) == "x" * 50_000_000
    assert max(map(len, lines)) < 2_000_000


def test_lines_are_in_the_log_while_the_trainer_runs(tmp_path: Path) -> None:
    process = start(tmp_path, specification(tmp_path, "wait_until_asked()"))
    eventually(lambda: log(tmp_path) == ["ready"], "the line")
    assert (tmp_path / "work" / "heartbeat").exists()
    state = read(tmp_path / "work" / "process.json")
    assert (state["pid"], state["state"]) == (process.pid, "running")
    process.terminate()
    finish(process)


# How a job is ended.

LEAVES = "wait_until_asked(); say('saving'); sys.exit(75)"


def marker(folder: Path, process: Any) -> None:
    (folder / "root" / "control").mkdir()
    (folder / "root" / "control" / "stop.json").write_text("{}")


def sigterm(folder: Path, process: Any) -> None:
    process.terminate()


@pytest.mark.parametrize(
    ("ask", "trainer_code", "code", "why"),
    [
        (marker, 75, 0, "stopped"),
        (marker, 0, 0, "stopped"),
        (sigterm, 75, 75, "signal"),
        (sigterm, 0, 0, "ended"),  # it was at its last step
        (sigterm, 65, 65, "worker 0: saving"),
    ],
)
def test_the_trainer_is_asked_to_save_and_leave(
    tmp_path: Path, ask: Callable[..., None], trainer_code: int, code: int, why: str
) -> None:
    source = LEAVES.replace("75", str(trainer_code))
    process = start(tmp_path, specification(tmp_path, source))
    eventually(lambda: log(tmp_path) == ["ready"], "the trainer")
    ask(tmp_path, process)
    assert finish(process)[0] == code
    assert log(tmp_path) == ["ready", "saving"]
    assert read(tmp_path / "work" / "result.json")["why"] == why


def test_the_deadline_ends_the_job_to_be_continued(tmp_path: Path) -> None:
    assert run(tmp_path, specification(tmp_path, LEAVES, deadline_seconds=0.5))[0] == 75
    result = read(tmp_path / "work" / "result.json")
    assert (result["why"], result["cause"]) == ("deadline", "deadline")


@pytest.mark.parametrize(("given", "asked"), [(40, 36), (6000, 5400), (43200, 42600)])
def test_the_job_leaves_before_its_service_ends_it(
    tmp_path: Path, given: int, asked: float
) -> None:
    """A service that was told the same number started counting before boot did."""
    file = tmp_path / "boot.json"
    file.write_text(json.dumps(specification(tmp_path, deadline_seconds=given)))
    assert boot.Spec(str(file)).deadline == asked


def test_a_trainer_asked_before_it_could_listen_was_stopped(tmp_path: Path) -> None:
    source = "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n" + LEAVES
    process = start(tmp_path, specification(tmp_path, source))
    eventually(lambda: log(tmp_path) == ["ready"], "the trainer")
    marker(tmp_path, process)
    assert finish(process)[0] == 0
    assert read(tmp_path / "work" / "exit-0.json")["code"] == 143


def test_a_job_asked_to_stop_before_it_began_never_begins(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    marker(tmp_path, None)
    assert run(tmp_path, specification(tmp_path, "say('began')"))[0] == 0
    assert read(tmp_path / "work" / "result.json")["why"] == "stopped"
    assert not log(tmp_path)


def test_a_trainer_that_stays_is_killed_with_its_group_after_the_grace(tmp_path: Path) -> None:
    source = """
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
say(helper.pid)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(300)
"""
    process = start(tmp_path, specification(tmp_path, source, grace_seconds=0.3))
    eventually(lambda: log(tmp_path), "the trainer")
    marker(tmp_path, process)
    assert finish(process)[0] == 137
    why = read(tmp_path / "work" / "result.json")["why"]
    assert why == "stopped, and killed because it had not left in time"
    eventually(lambda: _dead(int(log(tmp_path)[0])), "the helper's end")


def test_a_killed_boot_takes_the_trainer_with_it_and_lets_go_of_the_lock(tmp_path: Path) -> None:
    process = start(tmp_path, specification(tmp_path, "say(os.getpid()); time.sleep(300)"))
    eventually(lambda: log(tmp_path), "the trainer")
    process.kill()
    finish(process)
    eventually(lambda: _dead(int(log(tmp_path)[0])), "the trainer's end")
    assert not (tmp_path / "work" / "result.json").exists()
    with (tmp_path / "work" / "lock").open() as lock:
        assert not boot.is_locked(lock.fileno())


def test_a_second_boot_leaves_at_once_and_the_job_runs_once(tmp_path: Path) -> None:
    spec = specification(tmp_path, "say('began'); wait_until_asked(); sys.exit(75)")
    first = start(tmp_path, spec)
    eventually(lambda: log(tmp_path) == ["began", "ready"], "the trainer")
    assert run(tmp_path, spec) == (0, "")
    assert first.poll() is None
    first.terminate()
    assert finish(first)[0] == 75
    assert run(tmp_path, spec) == (75, "")  # its result stands
    assert log(tmp_path) == ["began", "ready"]


def test_a_boot_after_one_that_was_killed_is_a_restart_of_the_attempt(tmp_path: Path) -> None:
    """It keeps the first's log, says so to the trainer, and has what is left of the deadline."""
    source = "say('restart', job.get('restart', 0)); wait_until_asked(); sys.exit(75)"
    spec = specification(tmp_path, source, deadline_seconds=112)  # 100.8 to work in
    first = start(tmp_path, spec)
    eventually(lambda: log(tmp_path) == ["restart 0", "ready"], "the trainer")
    first.kill()
    finish(first)
    path = tmp_path / "root" / "attempts" / "00-0001.json"
    record = read(path)
    assert {"restart", "started"} <= record.keys() and "ended" not in record
    path.write_text(json.dumps({**record, "started": time.time() - 98}))
    assert run(tmp_path, spec)[0] == 75
    assert log(tmp_path) == ["restart 0", "ready"]
    again = (tmp_path / "root" / "logs" / "worker-0" / "00-0001r1.log").read_text()
    assert [line.partition(" ")[2] for line in again.splitlines()] == ["restart 1", "ready"]
    ended = read(tmp_path / "root" / "attempts" / "00-0001r1.json")
    assert (ended["restart"], ended["why"], ended["exit_code"]) == (1, "deadline", 75)


def test_who_only_looks_at_the_lock_is_in_nobodys_way(tmp_path: Path) -> None:
    """Looking shares the lock for an instant; who wants it waits that long and then has it."""
    taken: list[Any] = []
    with (tmp_path / "lock").open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        taker = threading.Thread(target=lambda: taken.append(boot.take_lock(tmp_path)))
        taker.start()
        taker.join(0.05)
        assert taken == []
        with (tmp_path / "lock").open() as another:
            assert not boot.is_locked(another.fileno())
    taker.join(20)
    assert isinstance(taken[0], int)
    assert boot.take_lock(tmp_path) is None
    os.close(taken[0])


# What is refused.


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"attempt": "one"}, "attempt: expected int, got 'one'"),
        ({"workers": True}, "workers: expected int, got True"),
        ({"job": None}, "job: expected dict, got None"),
        ({"env": ["A"]}, "env: expected dict | None, got ['A']"),
        ({"bundle": {"url": "/x", "bytes": 1}}, "bundle.sha256: expected str, got None"),
        ({"schema": 2}, "schema: 2; this boot reads 1"),
        ({"nodes": 0}, "1 workers on 0 nodes; allowed: 1 or more of each"),
        ({"workers": 0}, "0 workers on 1 nodes; allowed: 1 or more of each"),
        ({"nodes": 2}, "the variable CLUSTER_SPEC does not say which one this is"),
        ({"root": "ftp://b/r"}, "root: ftp://b/r; allowed: a path, file://, gs://, s3://"),
        ({"wheels": {}}, "wheels: expected list | None, got {}"),
    ],
)
def test_a_bad_specification_is_one_line_and_64(
    tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    code, said = run(tmp_path, specification(tmp_path, **changes))
    assert code == 64
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    assert said.endswith(line + "\n")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"bundle": 1}', "\ufffd"])
def test_a_specification_that_cannot_be_read_is_one_line_and_64(
    tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "spec.json"
    if text is not None:
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, boot.__file__, "run", str(path)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 64
    assert re.fullmatch(r"error: .*spec\.json: .+\n", done.stderr)


def test_a_missing_python_is_one_line_and_78(tmp_path: Path) -> None:
    assert run(tmp_path, specification(tmp_path, python="/no/such/python"))[0] == 78
    why = read(tmp_path / "work" / "result.json")["why"]
    assert why == "cannot start /no/such/python: No such file or directory"


def test_a_work_folder_that_cannot_be_made_is_one_line_and_78(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, said = run(tmp_path, specification(tmp_path, work=str(tmp_path / "file" / "work")))
    assert (code, said) == (78, f"error: {tmp_path}/file/work: Not a directory\n")


def test_a_full_disk_is_one_line_and_78_and_leaves_a_result(tmp_path: Path) -> None:
    spec = specification(tmp_path, "# " + "x" * 30_000)
    process = start(tmp_path, spec)  # stopped before the limit, so that only boot has it
    os.kill(process.pid, signal.SIGSTOP)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, 8192))
    os.kill(process.pid, signal.SIGCONT)
    assert finish(process)[0] == 78
    assert "File too large" in read(tmp_path / "work" / "result.json")["why"]


BUNDLE_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "not an archive": lambda data: b"hello",
    "another bundle": lambda data: bz2.compress(b"x" * 10240),
    "longer": lambda data: bz2.compress(bz2.decompress(data) + b"x"),
}


@pytest.mark.parametrize("damage", BUNDLE_DAMAGE)
def test_a_damaged_bundle_is_one_line_and_78(tmp_path: Path, damage: str) -> None:
    spec = specification(tmp_path, "say('ran')")
    path = Path(spec["bundle"]["url"])
    path.write_bytes(BUNDLE_DAMAGE[damage](path.read_bytes()))
    assert run(tmp_path, spec) == (78, "")
    why = read(tmp_path / "work" / "result.json")["why"]
    assert why.startswith(f"bundle {path}: damaged")
    assert "\n" not in why
    assert not (tmp_path / "work" / "bundle").exists()


def test_a_bundle_that_is_not_there_is_one_line_and_78(tmp_path: Path) -> None:
    spec = specification(tmp_path)
    Path(spec["bundle"]["url"]).unlink()
    assert run(tmp_path, spec)[0] == 78
    why = read(tmp_path / "work" / "result.json")["why"]
    assert why == f"bundle {spec['bundle']['url']}: No such file or directory"


def test_a_bundle_is_read_from_a_file_uri(tmp_path: Path) -> None:
    spec = specification(tmp_path / "with space", "say('ran')")
    spec["bundle"]["url"] = Path(spec["bundle"]["url"]).as_uri()
    assert run(tmp_path / "with space", spec)[0] == 0
    assert log(tmp_path / "with space") == ["ran"]


def test_a_bundle_of_an_older_run_is_read(tmp_path: Path) -> None:
    spec = specification(tmp_path, "say('ran')")
    path = Path(spec["bundle"]["url"])
    path.write_bytes(gzip.compress(bz2.decompress(path.read_bytes())))
    assert run(tmp_path, spec)[0] == 0
    assert log(tmp_path) == ["ran"]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(position=st.floats(0, 0.999), flip=st.integers(1, 255))
def test_no_flipped_byte_gets_past_the_checks(
    tmp_path_factory: pytest.TempPathFactory, position: float, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    spec = specification(folder, "say('ran')")
    path = Path(spec["bundle"]["url"])
    data = bytearray(path.read_bytes())
    whole = bz2.decompress(bytes(data))
    data[int(position * len(data))] ^= flip
    path.write_bytes(data)
    (folder / "boot.json").write_text(json.dumps(spec))
    try:
        boot.fetch(boot.Spec(str(folder / "boot.json")))
    except boot.BootError as error:
        assert error.code == 78
        assert not (folder / "work" / "bundle").exists()
    else:  # a byte of the header that means little, such as the size of its blocks
        assert bz2.decompress(bytes(data)) == whole


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("/etc/passwd", tarfile.REGTYPE),
        ("../outside", tarfile.REGTYPE),
        ("trainer/../../outside", tarfile.REGTYPE),
        ("..", tarfile.DIRTYPE),
        ("trainer/link", tarfile.SYMTYPE),
        ("trainer/hard", tarfile.LNKTYPE),
        ("trainer/device", tarfile.CHRTYPE),
        ("trainer/pipe", tarfile.FIFOTYPE),
    ],
)
def test_an_archive_that_reaches_outside_is_refused_whole(
    tmp_path: Path, name: str, kind: bytes
) -> None:
    data = _tar(("trainer/__main__.py", tarfile.REGTYPE), (name, kind))
    with pytest.raises(boot.BootError) as caught:
        boot.unpack(data, tmp_path / "inside" / "bundle")
    assert caught.value.code == 78
    assert str(caught.value) == f"bundle: refused entry {name!r}"
    assert list(tmp_path.iterdir()) == []


def test_a_refused_archive_ends_boot_with_78(tmp_path: Path) -> None:
    spec = specification(tmp_path)
    data = _tar(("../outside", tarfile.REGTYPE))
    Path(spec["bundle"]["url"]).write_bytes(bz2.compress(data))
    spec["bundle"].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    assert run(tmp_path, spec) == (78, "")
    assert read(tmp_path / "work" / "result.json")["why"] == "bundle: refused entry '../outside'"


@settings(max_examples=100, derandomize=True, deadline=None)
@given(parts=st.lists(st.sampled_from(["a", "b", "..", ".", "", "/", "trainer"]), max_size=5))
def test_whatever_its_names_nothing_is_written_outside_the_folder(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("unpack")
    with contextlib.suppress(boot.BootError, OSError):
        boot.unpack(_tar(("/".join(parts), tarfile.REGTYPE)), folder / "in" / "side")
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert all((folder / "in" / "side") in path.parents for path in written)


# The verdict over several workers.


@settings(max_examples=200, derandomize=True)
@given(st.lists(st.sampled_from([0, 1, 2, 64, 65, 75, 78, 137, 143]), min_size=1, max_size=8))
def test_the_worst_code_wins_in_the_documented_order(codes: list[int]) -> None:
    rank = {65: 0, 64: 1, 78: 2, 1: 3, 2: 4, 137: 5, 143: 6, 75: 7, 0: 8}
    assert worst(codes) == min(codes, key=lambda code: rank[code])


@pytest.mark.parametrize(
    ("codes", "workers", "reason", "killed", "expected"),
    [
        ([0, 0], 2, "", False, (0, "ended")),
        ([75, 75], 2, "", False, (75, "worker 0: e75")),
        ([75, 65], 2, "", False, (65, "worker 1: e65")),
        ([0], 2, "", False, (1, "a worker left without a word")),
        ([65], 2, "", False, (65, "worker 0: e65")),
        ([75, 75], 2, "stopped", False, (0, "stopped")),
        ([75, 75], 2, "deadline", False, (75, "deadline")),
        ([75], 2, "signal", False, (75, "signal")),  # the other had not begun
        ([], 2, "stopped", False, (0, "stopped")),
        ([143, 1], 2, "stopped", False, (0, "stopped")),  # it stumbled over its peer's end
        ([1, 1], 2, "stopped", False, (1, "worker 0: e1")),
        ([143, 64], 2, "stopped", False, (64, "worker 1: e64")),
        ([0], 2, "stopped", True, (137, "stopped, and killed because it had not left in time")),
    ],
)
def test_how_the_ranks_ended_decides(
    codes: list[int], workers: int, reason: str, killed: bool, expected: tuple[int, str]
) -> None:
    ranks = {str(rank): {"code": code, "error": f"e{code}"} for rank, code in enumerate(codes)}
    assert verdict(ranks, workers, reason, killed) == expected


# Several workers: torchrun, which itself returns 1 whatever they return.


@pytest.mark.parametrize("code", [0, 1, 64, 65, 75, 78])
def test_each_exit_code_comes_through_torchrun_as_itself(tmp_path: Path, code: int) -> None:
    """Rank 1 says what is wrong; rank 0 is told to go, saves, and leaves with 75."""
    source = f"""
say("rank", rank, "of", os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"] != "")
if rank == 1 and {code} != 0:
    say("error: it was me"); sys.exit({code})
while {code} != 0 and not asked:
    time.sleep(0.01)
sys.exit({75 if code else 0})
"""
    process = start(tmp_path, specification(tmp_path, source, workers=2))
    assert process.wait(90) == code
    assert [log(tmp_path, rank)[0] for rank in (0, 1)] == ["rank 0 of 2 True", "rank 1 of 2 True"]
    attempt = read(tmp_path / "root" / "attempts" / "00-0001.json")
    assert attempt["ranks"] == {"0": 75 if code else 0, "1": code}
    if code not in (0, 75):
        assert attempt["why"] == "worker 1: it was me"


@pytest.mark.slow
def test_a_checkpoint_that_takes_40_s_after_the_signal_is_whole(tmp_path: Path) -> None:
    """Rank 1 leaves at once, and torchrun would kill its peer 30 s later."""
    source = """
wait_until_asked()
if rank == 0:
    with open("checkpoint", "w") as file:
        for part in range(40):
            file.write(f"{part}\\n"); file.flush(); time.sleep(1)
    say("saved")
sys.exit(75)
"""
    process = start(tmp_path, specification(tmp_path, source, workers=2))
    eventually(lambda: [log(tmp_path, rank) for rank in (0, 1)] == [["ready"]] * 2, "both", 90)
    process.terminate()
    assert process.wait(90) == 75
    saved = (tmp_path / "work" / "bundle" / "checkpoint").read_text().split()
    assert saved == [str(part) for part in range(40)]
    attempt = read(tmp_path / "root" / "attempts" / "00-0001.json")
    assert (attempt["why"], attempt["ranks"]) == ("signal", {"0": 75, "1": 75})
    assert attempt["ended"] - attempt["started"] > 40


def test_several_workers_stopped_before_they_began_were_stopped(tmp_path: Path) -> None:
    """torchrun takes seconds to import torch; it is asked in the middle of that."""
    process = start(tmp_path, specification(tmp_path, "say('began')", workers=2))
    running = tmp_path / "work" / "process.json"
    eventually(lambda: running.exists() and read(running)["state"] == "running", "torchrun")
    marker(tmp_path, process)
    assert process.wait(60) == 0
    assert read(tmp_path / "work" / "result.json")["why"] == "stopped"


def test_several_workers_without_torch_are_one_line_and_78(tmp_path: Path) -> None:
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: nothing installed
    bare.chmod(0o755)
    spec = specification(tmp_path, workers=2, python=str(bare))
    assert run(tmp_path, spec, PYTHONPATH="")[0] == 78
    why = read(tmp_path / "work" / "result.json")["why"]
    assert why.startswith("torchrun: ")
    assert "No module named 'torch'" in why


def _tar(*entries: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in entries:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            entry.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            entry.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(b"evil"[: entry.size]))
    return buffer.getvalue()


def _dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
