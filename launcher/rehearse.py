"""A rehearsal's own world: servers on this machine, a home beside the user's, a recipe made small.

    with Rehearsal(loaded, home, keep=False) as world:
        with world.environment():
            api.up(world.recipe) ...

The run itself is not known here: it goes the ordinary way (`commands/rehearse.py`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Optional

from launcher import hardware
from launcher.drafts import BLOCKS
from launcher.errors import Denied, JobFailed, UsageError
from launcher.recipe import Loaded
from launcher.spec import Hardware, Recipe, Stage, Vertex
from trainer.config import Job, StageConfig, load_job, to_dict

#: Backends whose service is served on this machine.
BACKENDS = ("vertex",)
#: The machine of a job is taken when an object with such a URI is written: the first whole
#: checkpoint is there then, or the first whole shard of stored targets.
PREEMPT_ON = r"/checkpoints/step-\d+/MANIFEST\.json$"
PREEMPT_ON_SHARD = r"/targets/shard-\d+/meta\.json$"
_PACKAGES = {
    "google.cloud.aiplatform_v1": "rehearse", "google.cloud.logging_v2": "rehearse",
    "google.cloud.secretmanager_v1": "rehearse", "google.cloud.storage": "google",
    "torch": "train", "transformers": "train", "tokenizers": "train",
}  # fmt: skip
_BUCKET = re.compile(r"gs://([a-z0-9._-]+)")
_SECRET = re.compile(r"secret-manager://([^/]+/[^/]+)")
_EXPORT, _READY = "export ", "# serving"
#: Ports that nobody serves: what would leave this machine fails at once.
_NOWHERE = "http://127.0.0.1:9"
_PROXIES = {
    **dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"), _NOWHERE),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
}
_MOST_WORKERS, _MOST_NODES = 2, 2
_CONFIGURATION = (64, 65)
_PATIENCE = 30.0


class Rehearsal:
    """Servers, stand-ins and the recipe of one rehearsal. On leaving, the servers and all jobs end;
    the folder goes too, unless `keep` is true by then.

    `recipe`: the file to run; `notes`: what was changed, one line each; `url`: the servers'."""

    def __init__(self, loaded: Loaded, home: Path, keep: bool = False) -> None:
        self.loaded, self.keep = loaded, keep
        self.notes: list[str] = []
        self.environ: dict[str, str] = {}
        self.project = _project(loaded.recipe)
        (home / "rehearsals").mkdir(parents=True, exist_ok=True)
        self.folder = _fresh(home / "rehearsals", loaded.recipe.name)
        self.recipe = self.folder / f"{loaded.recipe.name}.yaml"
        self._server: Optional[subprocess.Popen[str]] = None

    @property
    def url(self) -> str:
        return self.environ["STORAGE_EMULATOR_HOST"]

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def __enter__(self) -> Rehearsal:
        try:
            self._start()
            small = self._stand_ins()
            assert self._server is not None
            self.environ = _announced(self._server, self.folder / "server.log")
            with self.environment():
                self._upload()
            self.recipe.write_text(small)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if self._server is not None:
            _end(self._server)
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """The environment in which the ordinary commands meet the servers, and no other host."""
        before = dict(os.environ)
        os.environ.pop("GOOGLE_APPLICATION_CREDENTIALS", None)
        os.environ.update(_PROXIES, **self.environ, LAUNCH_HOME=str(self.home))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def writes(self, pattern: str) -> list[int]:
        """Bytes of each object that was written so far under a URI like `pattern`."""
        with suppress(FileNotFoundError):
            lines = (self.folder / "cloud" / "writes.jsonl").read_text().splitlines()
            wrote = [json.loads(line) for line in lines]
            return [int(one["bytes"]) for one in wrote if re.search(pattern, one["uri"])]
        return []

    def _start(self) -> None:
        text = json.dumps(self.loaded.canonical)
        named = (_SECRET.match(text) for text in self.loaded.recipe.secrets.values())
        secrets = sorted({found[1] for found in named if found})
        buckets = sorted(set(_BUCKET.findall(text)))
        argv = [sys.executable, "-m", "launcher.rehearsal", "--while-open",
                "--folder", str(self.folder / "cloud"), "--home", str(self.home),
                "--project", self.project]  # fmt: skip
        argv += [word for on in _preemptions(self.loaded.recipe) for word in ("--preempt-on", on)]
        for option, values in (("--bucket", buckets), ("--secret", secrets)):
            argv += [word for value in values for word in (option, value)]
        argv += [word for each in _PROXIES.items() for word in ("--env", "=".join(each))]
        log = (self.folder / "server.log").open("w")
        with log:
            # A session of its own: Ctrl-C is for us, who end it in its turn.
            self._server = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
        self.notes += [f"bucket gs://{name}: created here" for name in buckets]
        self.notes += [f"secret {name}: a random value" for name in secrets]

    def _stand_ins(self) -> str:
        """Have the trainer make them, while the servers start; the recipe for them."""
        from launcher.start import as_yaml

        recipe, made = self.loaded.recipe, self.folder / "stand-ins"
        made.mkdir()
        bucket = _BUCKET.match(str(recipe.artifacts))
        place = f"gs://{bucket[1] if bucket else 'rehearsal'}/rehearsal"
        asked = self.folder / "job.json"
        asked.write_text(json.dumps(to_dict(Job(run="rehearsal", stages=configs_of(recipe)))))
        _trainer(["stand-ins", str(asked), str(made), place])
        self.notes += (made / "notes.txt").read_text().splitlines()
        small, notes = shrunk(recipe, load_job(made / "job.json").stages, self.project)
        self.notes += notes
        return f"# {recipe.name}, as it is rehearsed.\n{as_yaml(small)}"

    def _upload(self) -> None:
        from trainer.store import open_store

        for folder in sorted((self.folder / "stand-ins" / "objects").glob("*")):
            store = open_store(f"gs://{folder.name}")
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                store.put_file(file.relative_to(folder).as_posix(), file)


def shrunk(
    recipe: Recipe, configs: tuple[StageConfig, ...], project: str
) -> tuple[Recipe, list[str]]:
    """The recipe with the stages that the stand-ins are for, few workers and no network, and what
    was changed."""
    notes: list[str] = []
    stages = []
    for stage, config in zip(recipe.stages, configs, strict=True):
        blocks = {name: getattr(config, name) for name in BLOCKS}
        few = _few_workers(stage.hardware, project, notes)
        stages.append(replace(stage, **blocks, hardware=few))
    notes.append("env.HF_HUB_OFFLINE: 1, since no other host can be reached")
    env = {**recipe.env, "HF_HUB_OFFLINE": "1"}
    if recipe.notify:
        notes.append("notify: left out, a rehearsal tells nobody")
    small = replace(recipe, stages=tuple(stages), env=env, notify=())
    return small, list(dict.fromkeys(notes))


def configs_of(recipe: Recipe) -> tuple[StageConfig, ...]:
    """The stages as the trainer reads them, references to other stages left as they are written."""
    return tuple(_config(stage) for stage in recipe.stages)


def refuse(recipe: Recipe) -> None:
    """Errors: `UsageError` for what cannot be rehearsed or needs no rehearsal; `Denied` where
    packages are missing."""
    used = sorted({stage.hardware.backend for stage in recipe.stages})
    allowed = ", ".join(BACKENDS)
    if used == ["local"]:
        raise UsageError(
            f"{recipe.name} runs on this machine: there is no cloud to rehearse",
            "`launch up RECIPE --dry-run` tries it in seconds; a recipe for a cloud can be "
            f"rehearsed ({allowed})",
        )
    if other := [name for name in used if name not in BACKENDS]:
        raise UsageError(
            f"backend '{other[0]}' cannot be rehearsed; those that can: {allowed}",
            "`launch up RECIPE --dry-run` tries the recipe here, without a cloud",
        )
    missing = {name: extra for name, extra in _PACKAGES.items() if not _installed(name)}
    if missing:
        extras = ",".join(sorted({"google", *missing.values()}))
        raise Denied(
            f"a rehearsal needs {', '.join(missing)}",
            f"install them: pip install 'launch-llm[{extras}]'",
        )


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _preemptions(recipe: Recipe) -> list[str]:
    """What the machines of the first jobs are taken at, one after the other."""
    stores = any(stage.stage == "targets" for stage in recipe.stages)
    trains = any(stage.stage != "targets" for stage in recipe.stages)
    return [PREEMPT_ON_SHARD] * stores + [PREEMPT_ON] * trains


def _project(recipe: Recipe) -> str:
    named = (stage.hardware.vertex and stage.hardware.vertex.project for stage in recipe.stages)
    return next((project for project in named if project), "rehearsal")


def _fresh(folder: Path, name: str) -> Path:
    """A new folder, numbered."""
    number = 1
    while True:
        made = folder / f"{name}-{number}"
        try:
            made.mkdir()
        except FileExistsError:
            number += 1
        else:
            return made


def _config(stage: Stage) -> StageConfig:
    blocks = {name: getattr(stage, name) for name in BLOCKS}
    return StageConfig(stage.id, stage.stage, f"${{stage:{stage.id}}}", **blocks)


def _few_workers(asked: Hardware, project: str, notes: list[str]) -> Hardware:
    """Every worker is a process of this machine, so there are few."""
    accelerator = hardware.parse(asked.accelerator)
    vertex = replace(asked.vertex or Vertex(), project=project)
    if not vertex.image:
        vertex = replace(vertex, image="rehearsal/trainer:1")
        notes.append("hardware.vertex.image: none is needed")
    few = replace(asked, vertex=vertex)
    if asked.environment is not None:
        few = replace(few, environment=None)
        notes.append("hardware.environment: left out, since this machine is not of that image")
    counts = [n for n in hardware.counts(accelerator.kind, "gcp") if n <= _MOST_WORKERS]
    if accelerator.count > _MOST_WORKERS and counts:
        name = f"{accelerator.kind.name}:{max(counts)}"
        few = replace(few, accelerator=name, vertex=replace(vertex, machine=None))
        notes.append(f"hardware.accelerator: {name} instead of {asked.accelerator}")
    if asked.nodes > _MOST_NODES:
        few = replace(few, nodes=_MOST_NODES)
        notes.append(f"hardware.nodes: {_MOST_NODES} instead of {asked.nodes}")
    return few


def _trainer(arguments: list[str]) -> None:
    """Run the trainer; its last error line is ours. Errors: `UsageError`, `JobFailed`."""
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    why = said[-1].removeprefix("error: ") if said else (done.stderr.strip() or "no word why")
    if done.returncode in _CONFIGURATION:
        raise UsageError(f"cannot be rehearsed: {why}")
    raise JobFailed(f"making stand-ins failed with exit code {done.returncode}: {why}")


def _announced(server: subprocess.Popen[str], log: Path) -> dict[str, str]:
    """The variables that the servers print before they serve. Errors: `JobFailed`."""
    assert server.stdout is not None
    found: dict[str, str] = {}
    for line in server.stdout:
        if line.startswith(_READY):
            return found
        if line.startswith(_EXPORT):
            name, _, value = line.removeprefix(_EXPORT).strip().partition("=")
            found[name] = shlex.split(value)[0] if value else ""
    words = log.read_text().strip().splitlines()
    raise JobFailed(f"the servers did not start: {words[-1] if words else 'no word why'}")


def _end(server: subprocess.Popen[str]) -> None:
    """The servers end their jobs, then themselves."""
    server.terminate()
    for pipe in (server.stdin, server.stdout):
        if pipe is not None:
            pipe.close()
    try:
        server.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
