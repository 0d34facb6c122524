"""boot with its artifacts in gs://: real processes, and servers on loopback that may be down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.stub_jobs import eventually
from tests.trainer.cloud_jobs import ROOT, SAVES, Cloud, cloud, ended
from trainer.manifest import seal
from trainer.remote_root import RemoteRoot
from trainer.store import FileStore, atomic_write

SECRET = "s3cr3t-value-of-the-token"


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Cloud]:
    with cloud(tmp_path) as made:
        yield made


def test_what_a_job_leaves_is_in_the_store_and_its_lines_once_on_stdout(it: Cloud) -> None:
    source = (
        SAVES
        + """
say("hello from", out); say(job["control"], job.get("restart", 0)); save(7)
(out / "metrics").mkdir(); (out / "metrics" / "0001.jsonl").write_text('{"a": 1}\\n')
write(0, completed=True); say("bye")
"""
    )
    code, said = it.run(it.spec(source))
    assert code == 0, said
    folder = it.folder / "m0" / "work" / "artifacts"
    lines = [f"hello from {folder}/s", f"{folder}/control 0", "bye"]
    assert said.splitlines() == [*lines, "exit code 0: ended"]
    assert it.log() == lines
    assert it.json("s/run_meta.json") == {"completed": True}
    assert it.read("s/metrics/0001-00000.jsonl") == '{"a": 1}\n'
    assert "s/checkpoints/step-7/MANIFEST.json" in it.names()
    record = it.json("attempts/00-0001.json")
    assert record["started"] < record["ended"] <= time.time()
    wanted = {"v": 1, "job": 0, "attempt": 1, "restart": 0, "exit_code": 0, "ranks": {"0": 0}}
    assert wanted.items() <= record.items()
    assert it.read("logs/boot/00-0001-00000.log").endswith("exit code 0: ended\n")


def test_a_killed_boot_goes_on_as_restart_1_on_another_disk(it: Cloud) -> None:
    source = (
        SAVES
        + """
say("found", *found(), "restart", job.get("restart", 0))
(out / "metrics").mkdir(parents=True, exist_ok=True)
if not found():
    save(3)
    wait_until_asked()
write(0, completed=True)
"""
    )
    spec = it.spec(source)
    first = it.start(spec)
    eventually(lambda: "s/checkpoints/last.json" in it.names(), "the checkpoint in the store")
    eventually(lambda: it.log() == ["found restart 0", "ready"], "its lines")
    first.kill()
    first.communicate()
    assert "ended" not in it.json("attempts/00-0001.json")
    code, said = it.run({**spec, "work": str(it.folder / "m1" / "work")}, "m1")
    assert code == 0, said
    assert f"restored s/checkpoints/step-3 from {ROOT}" in said
    assert it.log(part="00-0001r1") == ["found step-3 restart 1"]
    assert it.log() == ["found restart 0", "ready"], "the first's lines stand"
    record = it.json("attempts/00-0001r1.json")
    assert (record["restart"], record["exit_code"]) == (1, 0)
    assert "ended" not in it.json("attempts/00-0001.json")
    again, _ = it.run({**spec, "work": str(it.folder / "m2" / "work")}, "m2")
    assert again == 0
    assert it.json("attempts/00-0001r2.json")["restart"] == 2


def test_of_two_jobs_for_one_attempt_the_second_leaves_at_once(it: Cloud) -> None:
    """A job that was created twice has two ids at the service; one that it restarts keeps its."""
    spec = it.spec(SAVES + "save(len(found()) + 1); sys.exit(75)")
    assert it.run(spec, CLOUD_ML_JOB_ID="111")[0] == 75
    before = {name: it.read(name) for name in it.names()}
    code, said = it.run({**spec, "work": str(it.folder / "m1" / "work")}, "m1",
                        CLOUD_ML_JOB_ID="222")  # fmt: skip
    assert code == 64, said
    assert said.splitlines() == [
        "exit code 64: attempt 1 is job 111, and this is job 222: it was created twice; nothing "
        "was done here"
    ]
    assert {name: it.read(name) for name in it.names()} == before
    assert it.run(spec, CLOUD_ML_JOB_ID="111")[0] == 75
    assert it.json("attempts/00-0001r1.json")["service_job"] == "111"


def test_a_container_started_again_on_its_old_disk_goes_on(it: Cloud) -> None:
    source = SAVES + "say('found', *found()); save(len(found()) + 1); sys.exit(75)"
    spec = it.spec(source)
    assert [it.run(spec)[0] for _ in range(2)] == [75, 75]
    assert [it.log(part=part) for part in ("00-0001", "00-0001r1")] == [
        ["found"], ["found step-1"],
    ]  # fmt: skip
    assert {f"s/checkpoints/step-{step}/MANIFEST.json" for step in (1, 2)} <= set(it.names())


def test_what_no_restart_can_change_is_not_tried_again(it: Cloud) -> None:
    spec = it.spec("say('error: no such column'); sys.exit(65)")
    assert [it.run(spec)[0] for _ in range(2)] == [65, 65]
    assert it.log() == ["error: no such column"] and it.log(part="00-0001r1") == []
    assert it.json("attempts/00-0001r1.json")["why"] == "worker 0: no such column"


def test_a_signal_saves_and_what_was_saved_is_sent(it: Cloud) -> None:
    process = it.start(it.spec(SAVES + "wait_until_asked(); save(5); sys.exit(75)"))
    eventually(lambda: it.log() == ["ready"], "the trainer")
    process.terminate()
    code, said = ended(process)
    assert (code, it.result()["why"]) == (75, "signal"), said
    assert "s/checkpoints/step-5/MANIFEST.json" in it.names()
    assert it.json("attempts/00-0001.json")["why"] == "signal"
    assert "cause" not in it.result() and "cause" not in it.json("attempts/00-0001.json")


def test_a_marker_in_the_store_stops_the_job(it: Cloud) -> None:
    process = it.start(it.spec(SAVES + "wait_until_asked(); save(5); sys.exit(75)"))
    eventually(lambda: it.log() == ["ready"], "the trainer")
    it.put("control/stop.json", b"{}")
    code, said = ended(process)
    assert (code, it.result()["why"]) == (0, "stopped"), said
    assert "s/checkpoints/step-5/MANIFEST.json" in it.names()


def test_a_job_with_a_marker_in_the_store_never_begins(it: Cloud) -> None:
    it.put("control/stop.json", b"{}")
    assert it.run(it.spec("say('began')"))[0] == 0
    assert it.result()["why"] == "stopped"
    assert it.log() == []


def test_an_outage_of_the_store_does_not_end_the_job(it: Cloud) -> None:
    source = """
wait_until_asked(); write(0, completed=True); sys.exit(0)
"""
    process = it.start(it.spec("say('one'); " + source.strip()))
    eventually(lambda: it.log() == ["one", "ready"], "the trainer")
    it.faults.down = True
    before = len(it.server.log)
    process.send_signal(signal.SIGTERM)
    eventually(lambda: len(it.server.log) > before + 1, "requests that fail")
    it.faults.down = False
    code, said = ended(process)
    assert (code, it.result()["why"]) == (0, "ended"), said
    assert it.json("s/run_meta.json") == {"completed": True}


def test_a_success_that_the_store_does_not_hold_is_none(it: Cloud) -> None:
    source = "wait_until_asked(); write(0, completed=True); sys.exit(0)"
    process = it.start(it.spec(source, grace_seconds=2))
    eventually(lambda: it.log() == ["ready"], "the trainer")
    it.faults.down = True
    process.terminate()
    code, said = ended(process)
    assert code == 75
    assert it.result()["why"].startswith(f"ended, but {ROOT} lacks ")
    assert f"s/run_meta.json: not copied to {ROOT}/" in said.splitlines()
    assert "s/run_meta.json" not in it.names()


def test_a_store_that_does_not_answer_at_the_start_keeps_no_one_here(it: Cloud) -> None:
    it.faults.down = True
    process = it.start(it.spec("say('began')", grace_seconds=1))
    eventually(lambda: it.server.log, "a request")
    process.terminate()
    assert ended(process, 20)[0] == 75
    assert it.result()["why"] == "signal"


def test_a_bucket_that_is_not_ours_is_one_line_and_78(it: Cloud) -> None:
    it.server.objects.denied.add("bkt")
    code, said = it.run(it.spec("say('began')", grace_seconds=1))
    assert code == 78
    assert "access denied" in it.result()["why"]
    assert "\n" not in it.result()["why"]
    assert "began" not in said


def test_a_root_without_a_bucket_is_one_line_and_64(it: Cloud) -> None:
    assert it.run(it.spec(root="gs:///runs"))[0] == 64
    assert it.result()["why"] == "gs:///runs: names no bucket; write gs://BUCKET/FOLDER"


def test_the_deadline_counts_from_the_attempts_first_start(it: Cloud) -> None:
    """An attempt that began 90 s ago has 2 s left of 102, less what it saves in."""
    record = {"v": 1, "job": 0, "attempt": 1, "restart": 0, "started": time.time() - 90}
    it.put("attempts/00-0001.json", json.dumps(record).encode())
    begun = time.monotonic()
    code, said = it.run(it.spec("wait_until_asked(); sys.exit(75)", deadline_seconds=102))
    assert (code, it.result()["why"]) == (75, "deadline"), said
    assert time.monotonic() - begun < 30
    noted = it.json("attempts/00-0001r1.json")
    assert (noted["why"], noted["cause"]) == ("deadline", "deadline")


def test_inputs_in_a_store_are_fetched_before_the_trainer_starts(it: Cloud) -> None:
    """The bundle's own `inputs` command here is a stand-in that rewrites the job."""
    source = """
if sys.argv[1] == "inputs":
    say("fetching into", sys.argv[3]); job["data"] = sys.argv[3] + "/x.jsonl"
    Path(sys.argv[2]).write_text(json.dumps(job)); sys.exit(0)
say("reads", job["data"])
"""
    spec = it.spec(source)
    spec["job"]["data"] = "gs://other/x.jsonl"
    code, said = it.run(spec)
    folder = it.folder / "m0" / "work" / "inputs"
    assert code == 0, said
    assert said.splitlines()[:2] == [f"fetching into {folder}", f"reads {folder}/x.jsonl"]
    assert it.log() == [f"reads {folder}/x.jsonl"]


@pytest.mark.parametrize(("given", "code"), [(64, 64), (65, 65), (75, 75), (3, 1)])
def test_inputs_that_cannot_be_had_end_the_job(it: Cloud, given: int, code: int) -> None:
    source = f"""if sys.argv[1] == "inputs":
    print('error: gs://other/x.jsonl: no'); sys.exit({given})"""
    spec = it.spec(source)
    spec["job"]["data"] = ["gs://other/x.jsonl"]
    assert it.run(spec)[0] == code
    assert it.result()["why"] == "inputs: gs://other/x.jsonl: no"
    for noted in (it.result(), it.json("attempts/00-0001.json")):
        assert noted.get("cause") == ("infrastructure" if code == 75 else None)


# Secrets.


def secret_spec(
    it: Cloud, source: str = "say(len(os.environ['T']))", **more: Any
) -> dict[str, Any]:
    return it.spec(source, secrets={"T": "secret-manager://proj/token"}, **more)


def test_a_secret_is_read_with_the_jobs_identity_and_written_nowhere(it: Cloud) -> None:
    it.server.secrets.values["proj/token"] = SECRET
    spec = secret_spec(it, "say('it is', os.environ['T'])")
    code, said = it.run(
        spec, CLOUDSDK_AUTH_DISABLE_CREDENTIALS="false", GOOGLE_APPLICATION_CREDENTIALS="",
        HOME=str(it.folder), CLOUDSDK_CONFIG=str(it.folder),
    )  # fmt: skip
    assert code == 0, said
    assert any("service-accounts/default" in path for _, path, _ in it.server.log)
    assert it.log() == ["it is ***"]
    assert SECRET not in said
    files = [path for path in it.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert not [name for name in it.names() if SECRET in it.read(name)]


@pytest.mark.parametrize("denied", [False, True])
def test_a_secret_that_cannot_be_read_is_one_line_and_78(it: Cloud, denied: bool) -> None:
    if denied:
        it.server.secrets.values["proj/token"] = SECRET
        it.server.secrets.denied.add("proj/token")
    code, said = it.run(secret_spec(it))
    assert code == 78
    why = it.result()["why"]
    assert why.startswith("secret T: cannot read projects/proj/secrets/token/versions/latest: ")
    word = "roles/secretmanager.secretAccessor" if denied else "does not exist"
    assert word in why and "\n" not in why
    assert SECRET not in said


def test_a_reference_that_is_none_is_one_line_and_64(it: Cloud) -> None:
    assert it.run(it.spec(secrets={"T": "secret-manager://token"}))[0] == 64
    assert "write secret-manager://PROJECT/NAME" in it.result()["why"]


# Wheels.


def wheel(folder: Path, source: str) -> dict[str, str]:
    """A wheel `tiny` whose module is `source`."""
    path = folder / "tiny-1.0-py3-none-any.whl"
    info = "tiny-1.0.dist-info"
    files = {
        "tiny/__init__.py": source,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
                         "Tag: py3-none-any\n",
    }  # fmt: skip
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files))
    return {"name": "tiny", "url": str(path), "sha256": sha256(path.read_bytes()).hexdigest()}


LOOKS = """
try:
    import tiny; say("tiny", tiny.VALUE, sys.path.index(str(Path(tiny.__file__).parent.parent)))
except ImportError:
    say("no tiny")
"""


def test_a_wheel_comes_first_on_the_path_of_the_trainer(it: Cloud) -> None:
    made = wheel(it.folder, "VALUE = 3")
    path = Path(made["url"])
    made["url"] = it.put(f"wheels/{path.name}", path.read_bytes())
    code, said = it.run(it.spec(LOOKS, wheels=[made]))
    assert (code, it.log()) == (0, ["tiny 3 0"]), said


@pytest.mark.parametrize(
    ("source", "changes", "why"),
    [
        ("raise ImportError('undefined symbol: x')", {}, "cannot be imported: ImportError: undef"),
        ("VALUE = 3", {"sha256": "0" * 64}, "is not the one that was planned"),
        ("VALUE = 3", {"url": "/no/such/tiny.whl"}, "cannot be read from"),
    ],
)
def test_a_wheel_that_fails_is_one_line_and_training_goes_on(
    it: Cloud, source: str, changes: dict[str, str], why: str
) -> None:
    made = {**wheel(it.folder, source), **changes}
    code, said = it.run(it.spec(LOOKS, wheels=[made]))
    assert (code, it.log()) == (0, ["no tiny"]), said
    (line,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: wheel tiny ") and why in line
    assert line.endswith("; training goes on without it")


# The bundle beside boot.


def test_boot_reads_the_bundle_that_lies_beside_it(it: Cloud) -> None:
    spec = it.spec("say('ran')")
    spec["bundle"], local = {**spec["bundle"], "url": "gs://bkt/none.tar.gz"}, spec["bundle"]["url"]
    folder = it.folder / "m0"
    (folder / "boot.json").write_text(json.dumps(spec))
    from tests.stub_jobs import BOOT

    done = subprocess.run(
        [sys.executable, str(BOOT), "run", "boot.json", local], cwd=folder, text=True, check=False,
        capture_output=True, env={**os.environ, **it.server.environ()},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "ran\nexit code 0: ended\n"), done.stderr


@pytest.mark.parametrize("stage", ["", "student/"])
def test_a_new_checkpoint_does_not_wait_for_the_next_look(stage: str, tmp_path: Path) -> None:
    spec: Any = SimpleNamespace(folder=tmp_path / "here", work=tmp_path, node=0, raw={})
    store = FileStore(tmp_path / "store")
    root = RemoteRoot(spec, store, lambda line: None)
    root._mirror.period = 3600.0
    atomic_write(spec.folder / "run_meta.json", "{}")
    root.open()
    eventually(lambda: store.exists("run_meta.json"), "the end of its first look")
    folder = spec.folder / f"{stage}checkpoints/step-3"
    atomic_write(folder / "model.safetensors", "weights")
    seal(folder, 3)
    atomic_write(folder.parent / "last.json", '{"v": 1, "step": 3, "path": "step-3"}')
    name = f"{stage}checkpoints/step-3/MANIFEST.json"
    eventually(lambda: store.exists(name), "the checkpoint in the store")
    assert root.close(30) == []
