"""What the tests of journal, engine, driver and api share: a home, a fake world, a run in it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import pytest

from launcher import engine, home, start
from launcher.artifacts import Bucket
from launcher.backends.base import Backend, Env
from launcher.bundle import Bundle
from launcher.clock import Clock, ManualClock
from launcher.journal import Fold, Journal
from launcher.recipe import Loaded
from launcher.run import Run
from launcher.spec import Budget, Gate, Hardware, Recipe, Retry, Stage
from tests.launcher.fake_backend import FakeBackend, World
from trainer.config import Data, Source, Tokenizer, to_dict

#: How a job ends that reaches its own limit of time.
DEADLINE = {"why": "deadline", "cause": "deadline"}


def load(name: str) -> Backend:
    assert name == "fake"
    return FakeBackend()


def recipe(
    stages: int = 1,
    retry: Optional[Retry] = None,
    budget: Optional[Budget] = None,
    gate: Optional[Gate] = None,
) -> Recipe:
    """`stages` tokenizer stages on `fake`, each a job of its own; `gate` stands after the first."""
    data = Data(train=(Source(builtin="python-reference"),))
    made = [
        Stage(
            id=f"s{index}",
            stage="tokenizer",
            data=data,
            tokenizer=Tokenizer(),
            hardware=Hardware(backend="fake", accelerator=f"cpu:{index + 1}"),
            gate=(gate,) if gate is not None and index == 0 else (),
        )
        for index in range(stages)
    ]
    return Recipe("thing", tuple(made), budget=budget or Budget(), retry=retry or Retry())


@dataclass
class Scene:
    """One run in a home and a world of its own."""

    env: Env
    world: World
    run_id: str

    def drive(self, clock: Optional[Clock] = None, **options: Any) -> Run:
        return engine.drive(self.run_id, self.at(clock), load, **options)

    def teardown(self, clock: Optional[Clock] = None) -> Run:
        return engine.teardown(self.run_id, self.at(clock), load)

    def at(self, clock: Optional[Clock]) -> Env:
        return Env(self.env.home, self.env.environ, clock or ManualClock(), "me", sys.executable)

    @property
    def place(self) -> Path:
        return home.folder(self.env.home, self.run_id)

    @property
    def root(self) -> Path:
        return self.place / "artifacts"

    def journal(self) -> Journal:
        return Journal(self.place, self.root, ManualClock())

    def records(self) -> list[dict[str, Any]]:
        return self.journal().read()

    def kinds(self) -> list[str]:
        return [record["kind"] for record in self.records()]

    def run(self) -> Run:
        return Fold(self.records()).run

    def stop(self) -> None:
        home.write(self.root / "control" / "stop.json", '{"by": "me", "reason": "enough"}')

    def resume(self, *overrides: str) -> None:
        journal = self.journal()
        start.reopen(Fold(journal.read()), journal, self.place, overrides, self.env)


def scene(folder: Path, what: Optional[Recipe] = None, **script: Any) -> Scene:
    what = what or recipe()
    world = World(folder / "world")
    (world.folder / "script.json").write_text(json.dumps(script))
    env = Env(folder / "home", {"FAKE_WORLD": str(world.folder)}, ManualClock(), "me",
              sys.executable)  # fmt: skip
    archive = folder / "bundle.tar.gz"
    archive.write_bytes(b"trainer")
    loaded = Loaded(what, to_dict(what), "f" * 64, folder / "recipe.yaml")
    identity = start.create(loaded, Bundle(archive, "0" * 64, 7), env)
    return Scene(env, world, identity["id"])


def killed_at(tick: int, act: Callable[[], object]) -> int:
    """Run `act` in a child that is killed (SIGKILL) at its `tick`-th instant of danger: just
    before and after each journal record, each `create` and each `delete`. Returns how many
    instants it has lived through; it lived to the end if that is fewer than `tick`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
        code = 1
        try:
            _count_instants(tick, writer)
            act()
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        lived = len(pipe.read())
    status = os.waitpid(child, 0)[1]
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert died or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return lived


def _count_instants(last: int, writer: int) -> None:
    lived = 0

    def instant() -> None:
        nonlocal lived
        lived += 1
        os.write(writer, b".")
        if lived == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str, before: bool) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before:
                instant()
            answer = real(*args, **kwargs)
            instant()
            return answer

        setattr(owner, name, wrapped)

    around(Journal, "append", before=True)
    around(Bucket, "create_once", before=False)  # the store has the record, the copy not yet
    around(FakeBackend, "create", before=False)
    around(FakeBackend, "delete", before=False)


def plugged_in(monkeypatch: pytest.MonkeyPatch, folder: Path, world: World) -> None:
    """Make this process and its children see the home and the world in `folder`, and the fake
    backend as what it is to them: an installed plug-in."""
    plugin = folder / "plugin" / "fake_backend-1.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-backend\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text(
        "[launch.backends]\nfake = tests.launcher.fake_backend:FakeBackend\n"
    )
    root = str(Path(__file__).parents[2])
    paths = [str(plugin.parent), root, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.syspath_prepend(str(plugin.parent))
    monkeypatch.setenv("LAUNCH_HOME", str(folder / "home"))
    monkeypatch.setenv("LAUNCH_OWNER", "me")
    monkeypatch.setenv("FAKE_WORLD", str(world.folder))
