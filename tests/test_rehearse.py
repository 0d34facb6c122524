"""`launch up RECIPE --rehearse`, as a user gives it: a whole cloud run on this machine, its machine
taken in the middle, and the weights those of a run that nobody disturbed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("google.cloud.aiplatform_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.storage", reason="needs the extra `google`")

from launcher import plan, recipe, rehearse
from launcher.backends.base import Env
from launcher.clock import ManualClock
from launcher.start import as_yaml
from trainer.config import Job, load_job
from trainer.stand_ins import write

from launcher.rehearsal.gcs_state import Objects  # isort: skip

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
KD_L4 = RECIPES / "kd_l4.yaml"
VERTEX = sorted(
    path for path in RECIPES.glob("*.yaml")
    if recipe.load(path, environ={}).recipe.stages[0].hardware.backend == "vertex"
)  # fmt: skip
BUCKET, RUNS = "my-bucket", "gs://my-bucket/runs/"
#: The random values that the rehearsal gives to secrets.
SECRET = re.compile(rb"rehearsal-[0-9a-f]{24}")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "launcher", "up", *arguments, "--rehearse"]


def environment(home: Path) -> dict[str, str]:
    unset = ("PROJECT", "BUCKET", "IMAGE")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {**kept, "LAUNCH_HOME": str(home), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def rehearsed(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(home), timeout=400
    )


def processes(home: Path) -> list[str]:
    """Command lines of processes that carry the home in their arguments or environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if str(home) in line or str(home).encode() in (folder / "environ").read_bytes():
                found.append(line)
    return found


def until(true: Callable[[], Any], seconds: float = 180.0) -> None:
    """Poll a real process's doing, with a deadline."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def undisturbed(spec: dict[str, Any], folder: Path, objects: Path, bundles: Path) -> Path:
    """The job of a boot specification, run by its own boot on this disk; its artifacts."""
    root = folder / "artifacts"
    text = json.dumps(spec["job"]).replace(spec["root"], str(root))
    job = text.replace("gs://", f"{objects}/")
    bundle = bundles / f"{spec['bundle']['sha256']}.tar.bz2"
    here = {
        **spec, "job": json.loads(job), "root": str(root), "work": str(folder / "work"),
        "bundle": {**spec["bundle"], "url": str(bundle)}, "python": sys.executable, "secrets": {},
    }  # fmt: skip
    folder.mkdir()
    file = folder / "spec.json"
    file.write_text(json.dumps(here))
    boot = Path(plan.__file__).parents[1] / "trainer" / "boot.py"
    environ = {**environment(folder), **spec["env"]}
    done = subprocess.run([sys.executable, str(boot), "run", str(file)], env=environ, timeout=400)
    assert done.returncode == 0
    return root


@pytest.mark.slow
def test_the_whole_way_of_a_cloud_run_and_its_weights(tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = rehearsed(home, str(KD_L4), "--yes", "--json", "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    show = told["rehearsal"]
    assert (told["phase"], told["held"], told["exit_code"]) == ("succeeded", "gone", 0)
    assert [attempt["phase"] for attempt in show["attempts"]] == ["preempted", "succeeded"]
    (resumed,) = show["resumed_at"]
    assert resumed in show["checkpoints"] and 4 <= resumed < 24
    assert (show["bundle_uploads"], show["second_up"]["bundle_bytes"]) == (1, 0)
    assert show["second_up"]["phase"] == "cancelled" and show["second_up"]["held"] == "gone"
    assert show["leftovers"] == []
    assert len(show["gone"]) == 2
    assert processes(home) == []

    folder = Path(show["folder"])
    bucket = Objects(folder / "cloud" / "gcs")
    root = told["root"].removeprefix(f"gs://{BUCKET}/")
    meta = json.loads(bucket.content(BUCKET, f"{root}/run_meta.json"))
    assert meta["completed"] is True and meta["hf_token_present"] is True
    said = bucket.content(BUCKET, f"{root}/logs/worker-0/00-0002-00000.log").decode()
    assert f"resumed at step {resumed} from {told['root']}/checkpoints/step-{resumed}\n" in said
    assert str(folder) not in said, "a folder of that machine says nothing to a reader"
    spec = json.loads(bucket.content(BUCKET, f"{root}/boot/{told['name']}-j0-a1.json"))
    bundles, objects = folder / "home" / "bundles", folder / "stand-ins" / "objects"
    alone = undisturbed(spec, tmp_path / "alone", objects, bundles)
    name = "checkpoints/step-24/model.safetensors"
    theirs = hashlib.sha256(bucket.content(BUCKET, f"{root}/{name}")).hexdigest()
    assert theirs == hashlib.sha256((alone / name).read_bytes()).hexdigest()

    leaks = [p for p in folder.rglob("*") if p.is_file() and SECRET.search(p.read_bytes())]
    assert leaks == [], "a secret was written"
    assert not SECRET.search(done.stdout.encode() + done.stderr.encode())


@pytest.mark.slow
def test_a_machine_that_is_lost_while_targets_are_stored_costs_no_whole_shard(
    tmp_path: Path,
) -> None:
    """The first machine goes after the first whole shard, the second after a checkpoint."""
    home = tmp_path / "home"
    done = rehearsed(home, str(RECIPES / "kd_l4_precompute.yaml"), "--yes", "--json", "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    show = told["rehearsal"]
    phases = [attempt["phase"] for attempt in show["attempts"]]
    assert phases == ["preempted", "preempted", "succeeded"]
    bucket = Objects(Path(show["folder"]) / "cloud" / "gcs")
    root = told["root"].removeprefix(f"gs://{BUCKET}/")

    def said(attempt: int, pattern: str) -> list[int]:
        start = f"{root}/logs/worker-0/00-{attempt:04d}-"
        names = sorted(name for name in bucket.names(BUCKET) if name.startswith(start))
        text = b"".join(bucket.content(BUCKET, name) for name in names).decode()
        return [int(shard) for shard in re.findall(rf"targets: shard (\d+)/\d+{pattern}", text)]

    there, made = " is there already", ", [0-9,]+ tokens"
    before, after = said(1, made), said(2, made)
    assert before and after, "the machine went in the middle"
    assert said(1, there) == [] and said(2, there) == before
    assert before + after == list(range(1, len(before + after) + 1)), "each was made once"
    assert said(3, made) == [] and show["leftovers"] == [] and processes(home) == []


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    home, said = tmp_path / "home", tmp_path / "said"
    with said.open("w") as out:
        process = subprocess.Popen(
            command(str(KD_L4), "--yes"), stdout=out, stderr=out, env=environment(home)
        )
    try:
        until(lambda: process.poll() is not None or "running" in said.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=90) == 130, said.read_text()
    finally:
        process.kill()
    assert processes(home) == []
    assert [*(home / "rehearsals").iterdir()] == []


@pytest.mark.slow
def test_no_process_outlives_a_rehearsal_that_is_killed(tmp_path: Path) -> None:
    home, said = tmp_path / "home", tmp_path / "said"
    with said.open("w") as out:
        process = subprocess.Popen(
            command(str(KD_L4), "--yes"), stdout=out, stderr=out, env=environment(home)
        )
    try:
        until(lambda: process.poll() is not None or "running" in said.read_text())
        assert any("launcher.driver" in line for line in processes(home)), said.read_text()
    finally:
        process.kill()
        process.wait()
    until(lambda: processes(home) == [], seconds=60)


@pytest.mark.parametrize("path", VERTEX, ids=lambda path: path.stem)
def test_every_recipe_for_vertex_can_be_rehearsed(path: Path, tmp_path: Path) -> None:
    loaded = recipe.load(path, environ={})
    rehearse.refuse(loaded.recipe)
    job = Job(run="r", stages=rehearse.configs_of(loaded.recipe))
    write(job, tmp_path, f"gs://{BUCKET}/rehearsal")
    stages = load_job(tmp_path / "job.json").stages
    small, notes = rehearse.shrunk(loaded.recipe, stages, "demo")
    file = tmp_path / "small.yaml"
    file.write_text(as_yaml(small))
    again = recipe.load(file, environ={}).recipe
    assert again == small
    env = Env(tmp_path, {}, ManualClock(0.0), "ann", sys.executable)
    made = plan.make(again, env)
    assert made.refusal is None and made.root.startswith(RUNS)
    bodies = [i.request["body"] for j in made.jobs for i in j.intents if i.kind == "custom_job"]
    for body in bodies:
        pools = body["jobSpec"]["workerPoolSpecs"]
        assert sum(int(pool["replicaCount"]) for pool in pools) <= 2
        assert all(int(pool["machineSpec"]["acceleratorCount"]) <= 2 for pool in pools)
    assert any("HF_HUB_OFFLINE" in note for note in notes)


def test_few_workers_stand_for_many(tmp_path: Path) -> None:
    values = ["hardware.accelerator=H100:8", "hardware.nodes=4", "hardware.vertex.image=null"]
    wheel = "{name: flash-attn, source: gs://b/wheels/}"
    values.append(
        f"hardware.environment={{python: '3.12', torch: '2.13', cuda: '12.8', wheels: [{wheel}]}}"
    )
    loaded = recipe.load(KD_L4, values, environ={}).recipe
    small, notes = rehearse.shrunk(loaded, rehearse.configs_of(loaded), "demo")
    hardware = small.stages[0].hardware
    assert (hardware.accelerator, hardware.nodes) == ("H100:2", 2)
    assert (
        hardware.vertex is not None and hardware.vertex.image and hardware.vertex.project == "demo"
    )
    said = "\n".join(notes)
    assert "H100:2 instead of H100:8" in said and "2 instead of 4" in said and "environment" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((str(RECIPES / "kd_local.yaml"),), "runs on this machine"),
        ((str(KD_L4), "--detach"), "--detach does not go with --rehearse"),
        ((str(KD_L4), "--dry-run"), "--dry-run does not go with --rehearse"),
        ((str(KD_L4), "--set", "kd={mode: precompute, logits_dir: gs://b/l}", "--yes"),
         "kd.logits_dir"),
    ],
)  # fmt: skip
def test_what_cannot_be_rehearsed_is_said(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    done = rehearsed(tmp_path, *arguments)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert not [*tmp_path.glob("rehearsals/*")] and processes(tmp_path) == []


def test_without_a_terminal_it_asks_for_yes(tmp_path: Path) -> None:
    done = rehearsed(tmp_path, str(KD_L4))
    assert done.returncode == 2 and "--yes" in done.stderr
    assert not [*tmp_path.glob("rehearsals/*")] and processes(tmp_path) == []
