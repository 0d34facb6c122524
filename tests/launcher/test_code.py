"""The user's own code: what of it travels, under which name, and that jobs import it."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from launcher import amend, api, bundle, code
from launcher.backends.base import Phase
from launcher.bundle import Bundle
from launcher.clock import SystemClock
from launcher.errors import RecipeErrors, UsageError
from launcher.recipe import load
from launcher.spec import Code
from tests import stub_jobs
from tests.launcher.fake_backend import World
from tests.launcher.rehearsed import Scene, scene
from tests.launcher.runs import plugged_in

from launcher.rehearsal.vertex import Real  # isort: skip

RECIPE = """
launch: 1
name: thing
stage: smoke
smoke: {epochs: 1, samples: 256}
code: {path: mine, include: [rewards/**]}
hardware: {backend: BACKEND}
"""
#: A trainer that needs the user's module.
SOURCE = """
if sys.argv[1] == "inputs":
    sys.exit(0)
from rewards.short import reward
import trainer
say(reward("abc"), "bundle" in trainer.__file__)
write(0, completed=True)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's folder: two modules, and much that is not to travel."""
    for name in (
        "rewards/short.py", "rewards/deep/words.py", "rewards/notes.txt", "rewards/.env",
        "rewards/server.pem", "rewards/credentials.json", "rewards/__pycache__/short.pyc",
        "rewards/Server.PEM", "rewards/application_default_credentials.json", "rewards/prod.env",
        "rewards/old/gone.py", "data/x.py", ".git/config.py", ".venv/lib.py", "main.py",
    ):  # fmt: skip
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    write_reward(tmp_path / "mine", "-len(text)")
    (tmp_path / "mine" / ".launchignore").write_text("# what is old\nold/\n*.txt\n\n")
    return tmp_path / "mine"


def write_reward(folder: Path, value: str) -> None:
    text = f"def reward(text: str) -> float:\n    return {value}\n"
    (folder / "rewards" / "short.py").write_text(text)


def recipe(folder: Path, backend: str = "local") -> Path:
    path = folder / "thing.yaml"
    path.write_text(RECIPE.replace("BACKEND", backend))
    return path


@pytest.mark.parametrize(
    ("include", "names"),
    [
        (("rewards/**",), ["rewards/deep/words.py", "rewards/short.py"]),
        (("rewards",), ["rewards/deep/words.py", "rewards/short.py"]),
        (("rewards/*.py",), ["rewards/short.py"]),
        (("**/words.py", "main.py"), ["main.py", "rewards/deep/words.py"]),
        (("**",), ["data/x.py", "main.py", "rewards/deep/words.py", "rewards/short.py"]),
        (("**/*.py",), ["data/x.py", "main.py", "rewards/deep/words.py", "rewards/short.py"]),
    ],
)
def test_what_is_included_travels_and_nothing_that_is_hidden_secret_or_ignored(
    mine: Path, include: tuple[str, ...], names: list[str]
) -> None:
    assert list(code.files(Code(str(mine), include))) == names
    with tarfile.open(fileobj=BytesIO(code.archive(Code(str(mine), include)))) as tar:
        assert tar.getnames() == names
        assert {(m.mtime, m.uid, m.mode) for m in tar} == {(0, 0, 0o644)}


def test_a_path_in_launchignore_counts_from_its_folder(mine: Path) -> None:
    (mine / ".launchignore").write_text("/rewards/deep\nold\n*.txt\n")
    assert list(code.files(Code(str(mine), ("rewards/**",)))) == ["rewards/short.py"]
    (mine / ".launchignore").write_text("!rewards\n")
    with pytest.raises(code.Wrong, match="nothing is taken back in"):
        code.files(Code(str(mine)))
    # A name at any depth, and that name in the folder itself alone.
    (mine / "deep").mkdir()
    (mine / "deep" / "top.py").touch()
    (mine / ".launchignore").write_text("deep\nold\n")
    found = code.files(Code(str(mine)))
    assert not {"deep/top.py", "rewards/deep/words.py"} & found.keys()
    (mine / ".launchignore").write_text("/deep\nold\n")
    found = code.files(Code(str(mine)))
    assert "deep/top.py" not in found and "rewards/deep/words.py" in found


def test_folders_that_no_pattern_reaches_are_not_looked_into(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may hold millions of files beside the code."""
    seen: list[str] = []
    left_out = code._left_out

    def noted(name: str, ignored: Any) -> bool:
        seen.append(name)
        return left_out(name, ignored)

    monkeypatch.setattr(code, "_left_out", noted)
    wanted = {"rewards/deep/words.py", "rewards/short.py"}
    for include in (("rewards",), ("./rewards/**",), ("rewards/*.py", "rewards/deep/wor?s.py")):
        seen.clear()
        assert set(code.files(Code(str(mine), include))) == wanted
        assert "rewards" in seen and not any(name.startswith("data") for name in seen)


@pytest.mark.parametrize(
    ("do", "key", "said"),
    [
        (lambda m: shutil.rmtree(m), "path", "no such folder: "),
        (lambda m: shutil.rmtree(m / "rewards"), "include", r"fits rewards/\*\*"),
        (lambda m: (m / "rewards/l.py").symlink_to("/etc/passwd"), "include", "l.py is a link"),
        (lambda m: (m / "rewards/l").symlink_to("/etc"), "include", "rewards/l/ is a link"),
        (lambda m: os.mkfifo(m / "rewards/pipe"), "include", "rewards/pipe is no plain file"),
        (lambda m: (m / "rewards/big.bin").write_bytes(b"0" * 5_000_001), "include",
         "in all, at most 5,000,000; the largest is rewards/big.bin"),
    ],
)  # fmt: skip
def test_what_cannot_travel_is_refused_where_the_recipe_says_it(
    mine: Path, tmp_path: Path, do: Any, key: str, said: str
) -> None:
    file = recipe(tmp_path)
    load(file)
    do(mine)
    with pytest.raises(RecipeErrors, match=rf"thing.yaml:6:\d+: code.{key}: .*{said}"):
        load(file)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("random.py",), "random.py would be imported in place of the module `random`"),
        (("torch/__init__.py", "torch/x.py"), "torch/.*in place of the module `torch`"),
        (("numpy/x.py", "rewards/random.py", "test.py"), None),  # hides nothing
    ],
)
def test_a_module_that_would_hide_one_the_trainer_imports_is_refused(
    mine: Path, names: tuple[str, ...], said: str | None
) -> None:
    for name in names:
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).touch()
    if said is None:
        assert set(names) <= code.files(Code(str(mine))).keys()
        return
    with pytest.raises(code.Wrong, match=said):
        code.files(Code(str(mine)))


def test_a_module_called_trainer_is_refused(mine: Path) -> None:
    (mine / "trainer").mkdir()
    (mine / "trainer" / "x.py").touch()
    with pytest.raises(code.Wrong, match="the module `trainer` is launch's own"):
        code.files(Code(str(mine)))


@pytest.mark.parametrize("include", ["/rewards", "../rewards", "a/../b"])
def test_patterns_stay_below_the_folder(mine: Path, tmp_path: Path, include: str) -> None:
    with pytest.raises(RecipeErrors, match=r"code.include: must be patterns below `path`"):
        load(recipe(tmp_path), [f"code.include=[{include}]"])


def test_equal_files_are_one_archive_and_others_another_run(mine: Path, tmp_path: Path) -> None:
    file, home = recipe(tmp_path), tmp_path / "home"
    one = code.resolved(load(file), home)
    assert one.recipe.code is not None and one.recipe.code.sha256 is not None
    assert one.canonical["code"]["sha256"] == one.recipe.code.sha256
    assert code.place(one.recipe.code, home).exists()
    for path in mine.rglob("*"):
        os.utime(path, (1, 1))
    assert code.resolved(load(file), home).fingerprint == one.fingerprint
    (mine / "main.py").write_text("# not included")
    assert code.resolved(load(file), home).fingerprint == one.fingerprint
    write_reward(mine, "len(text)")
    other = code.resolved(load(file), home)
    assert other.fingerprint != one.fingerprint
    # A run that began with the first goes on with it: its recipe names the archive.
    assert code.resolved(one, home).recipe == one.recipe
    code.place(one.recipe.code, home).unlink()
    with pytest.raises(UsageError, match=r"code.sha256: the files of .* are .*, not"):
        code.resolved(one, home)


def test_a_run_that_an_older_version_began_goes_on_with_its_archive(
    mine: Path, tmp_path: Path
) -> None:
    """It is packed by gzip, and cannot be made again: the files are others by now."""
    home = tmp_path / "home"
    one = code.resolved(load(recipe(tmp_path)), home)
    assert one.recipe.code is not None
    made = code.place(one.recipe.code, home)
    older = made.with_name(made.name.replace(".tar.bz2", ".tar.gz"))
    older.write_bytes(gzip.compress(bz2.decompress(made.read_bytes())))
    made.unlink()
    write_reward(mine, "len(text)")
    assert code.resolved(one, home).recipe == one.recipe
    assert code.shipped(one.recipe.code, home)["url"] == str(older)
    # Another machine, which has no archive of it, names the one in the bucket.
    there = code.shipped(one.recipe.code, tmp_path / "other", older.name)
    assert Path(there["url"]).name == older.name
    older.write_bytes(b"\x1f\x8b damaged")
    with pytest.raises(UsageError, match=r"code.sha256: the files of"):
        code.resolved(one, home)


def test_changed_code_is_another_run(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "world")
    plugged_in(monkeypatch, tmp_path, world)
    (world.folder / "script.json").write_text(json.dumps({"jobs": [{"looks": None}] * 2}))
    file = recipe(tmp_path, "fake")
    first = api.up(file)
    assert api.up(file).id == first.id
    write_reward(mine, "len(text)")
    loaded = code.resolved(load(file), api.env().home)
    packed = bundle.build(api.env().home)
    found = amend.differ(api.env(), api.status(first), loaded, packed, False)
    assert [(change.path, change.effect) for change in found.changes] == [
        ("code.sha256", "new run")
    ]
    second = api.up(file)
    assert second.id != first.id
    (world.folder / "finish").touch()
    for run in (first, second):
        assert api.wait(run, timeout=30).phase is Phase.SUCCEEDED


def boot(folder: Path, home: Path, mine: Path, **changes: Any) -> tuple[int, str]:
    """A job of the local kind, with the user's code; its exit code and what it said."""
    asked = code._built(Code(str(mine), ("rewards/**",)), home)
    shipped = {**code.shipped(asked, home), **changes}
    spec = stub_jobs.specification(folder, SOURCE, code=shipped)
    (folder / "boot.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [sys.executable, str(stub_jobs.BOOT), "run", str(folder / "boot.json")],
        capture_output=True, text=True, timeout=60, cwd=folder,
    )  # fmt: skip
    logs = (folder / "root" / "logs").rglob("*.log")
    return done.returncode, "".join(path.read_text() for path in logs)


def test_a_job_imports_the_users_module_after_the_trainer(mine: Path, tmp_path: Path) -> None:
    status, said = boot(tmp_path, tmp_path / "home", mine)
    assert (status, "-3 True" in said) == (0, True), said
    assert not (tmp_path / "work" / "code" / "main.py").exists()


def test_damaged_code_ends_the_job_before_its_trainer(mine: Path, tmp_path: Path) -> None:
    status, said = boot(tmp_path, tmp_path / "home", mine, sha256="0" * 64)
    assert status == 78 and "code " in said and "sha256 000000000000" in said
    assert "-3 True" not in said


def test_code_that_would_leave_its_folder_is_not_unpacked(mine: Path, tmp_path: Path) -> None:
    import gzip
    import hashlib

    data = bundle.packed([("ok.py", b""), ("../../escaped.py", b"x = 1")])
    path = tmp_path / "evil.tar.gz"
    path.write_bytes(gzip.compress(data))
    facts = {"url": str(path), "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    status, said = boot(tmp_path, tmp_path / "home", mine, **facts)
    assert status == 78 and "code: refused entry '../../escaped.py'" in said
    assert not list(tmp_path.rglob("escaped.py")) and not list(tmp_path.rglob("ok.py"))


class Booted(Scene):
    """A machine of the rehearsed Vertex AI: real boot, stub trainer."""

    def bundle(self) -> Bundle:
        made = stub_jobs.bundle(self.home, SOURCE)
        return Bundle(Path(made["url"]), made["sha256"], made["bytes"])


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Booted]:
    with scene(tmp_path, SystemClock()) as plain:
        plain.server.vertex.fate = Real(queued=0, pending=0)
        plain.server.secrets.values["proj/hf-token"] = "none"
        yield Booted(plain.server, tmp_path, plain.clock)


def test_a_vertex_job_takes_the_code_from_the_bucket(
    it: Booted, mine: Path, tmp_path: Path
) -> None:
    made = code._built(Code(str(mine), ("rewards/**",)), tmp_path)
    assert made.sha256 is not None
    run = f"{os.getpid():016x}"
    given = [f"code.{key}={getattr(made, key)}" for key in ("path", "sha256", "bytes")]
    uri = f"gs://bkt/launch/code/{made.sha256}.tar.bz2"
    sent = {intent.name: intent for intent in it.intents(*given, run=run)}
    assert sent[uri].request["sha256"] == made.sha256 and not sent[uri].billable
    handle = replace(it.attempt(*given, run=run), run=run, name=f"kd-l4-{run[-6:]}-j0")
    try:
        deadline = time.monotonic() + 60
        while not (seen := it.see(handle, 0.05)).phase.over:
            assert time.monotonic() < deadline, seen
    finally:
        shutil.rmtree(Path("/tmp/launch") / f"kd-l4-{run[-6:]}-j0-a1", ignore_errors=True)
    printed = [entry.text for entry in it.server.logging._entries]
    assert seen.phase is Phase.SUCCEEDED, printed
    assert "-3 True" in printed and uri.removeprefix("gs://bkt/") in it.server.objects.names("bkt")


def test_a_plan_and_a_dry_run_take_the_code(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sitecustomize` is imported by every Python that finds it: here the trainer's."""
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path / "home"))
    (mine / "sitecustomize.py").write_text(
        "import rewards.short, sys\n"
        "print('own code, reward', rewards.short.reward('ab'), file=sys.stderr)\n"
    )
    file = recipe(tmp_path)
    file.write_text(file.read_text().replace("[rewards/**]", "[rewards/**, sitecustomize.py]"))
    planned = api.plan(file)
    (intent,) = planned.jobs[0].intents
    assert Path(intent.request["boot"]["code"]["url"]).is_file()
    assert any("travels with the run (sha256 " in line for line in planned.lines())
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "up", str(file), "--dry-run"],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("own code, reward -2") == 1


GRPO = """
launch: 1
name: own-reward
stage: grpo
model:
  init: random
  tokenizer: TOKENIZER
  architecture: {hidden_size: 32, layers: 1, heads: 2, kv_heads: 2, intermediate_size: 64}
data: {train: [{builtin: digits}], sequence_length: 32}
train: {steps: 2, micro_batch: 2, log_every: 1, warmup: 1, report_to: []}
grpo: {rewards: ["rewards.short:score"], group: 2, max_new_tokens: 2}
code: {path: mine, include: [rewards/**]}
hardware: {backend: local, accelerator: "cpu:1"}
"""
#: Of every other answer.
SCORE = """
def score(completions: list[str], prompts: list[str]) -> list[float]:
    print("scored", len(prompts), flush=True)
    return [0.25 + i % 2 for i in range(len(completions))]
"""


def test_answers_are_judged_by_a_function_of_the_users_in_a_run_and_in_a_dry_run(
    mine: Path, tmp_path: Path
) -> None:
    from trainer.data.tokenizer import byte_tokenizer

    byte_tokenizer(tmp_path / "tokenizer")
    (mine / "rewards" / "short.py").write_text(SCORE)
    file = tmp_path / "own.yaml"
    file.write_text(GRPO.replace("TOKENIZER", str(tmp_path / "tokenizer")))
    elsewhere, home = tmp_path / "elsewhere", tmp_path / "home"
    elsewhere.mkdir()
    environ = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
        "LAUNCH_HOME": str(home), "NO_COLOR": "1",
    }  # fmt: skip

    def launch(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments], capture_output=True, text=True,
            timeout=240, env=environ, cwd=elsewhere,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "scored 4" in launch("up", str(file), "--dry-run")
    launch("up", str(file), "--yes")
    (metrics,) = home.rglob("metrics/*.jsonl")
    steps = [line for line in map(json.loads, metrics.read_text().splitlines())
             if line["kind"] == "step"]  # fmt: skip
    assert [step["reward"] for step in steps] == [0.75, 0.75]
    (snapshot,) = home.rglob("code/rewards/short.py")
    assert snapshot.read_text() == SCORE
