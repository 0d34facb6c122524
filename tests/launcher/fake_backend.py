"""A second, real implementation of the backend protocol, for tests of the engine.

Its world is a folder of JSON files ($FAKE_WORLD), so it outlives any driver, as a cloud does. What
happens to whom is written in `script.json`:

    {"offers": [{"place", "capacity", "usd_per_hour"}], "two_intents": true,
     "create": ["ok" | "no_capacity" | "quota" | "transient" | "lost_reply" | "denied" | "bad"],
     "delete": ["gone" | "slow" | "transient" | "denied"],
     "observe": ["ok" | "transient" | "denied"],
     "jobs": [{"queued": 0, "looks": 2, "end": "succeeded", "exit_code": 0, "stubborn": false,
               "why": "deadline", "cause": "deadline"}]}

The lists are consumed by calls, in order; after their end everything goes well. `jobs` is consumed
by jobs that are really begun. A job whose `looks` is null runs until `finish` lies in the world.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from launcher.backends.base import (
    Capabilities,
    Check,
    Env,
    Held,
    Intent,
    JobHandle,
    JobSpec,
    Line,
    LogQuery,
    Offer,
    Phase,
    Plan,
    Ref,
    Seen,
)
from launcher.errors import BadRequest, Denied, NoCapacity, QuotaFull, Transient
from launcher.spec import Hardware

_ENDS = {
    "succeeded": (Phase.SUCCEEDED, 0),
    "incomplete": (Phase.SUCCEEDED, 0),
    "until": (Phase.SUCCEEDED, 0),
    "failed": (Phase.FAILED, 1),
    "preempted": (Phase.PREEMPTED, 75),
    "lost": (Phase.LOST, None),
}


class World:
    """The folder, and the little arithmetic on its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "resources").mkdir(parents=True, exist_ok=True)

    def script(self) -> dict[str, Any]:
        file = self.folder / "script.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def next(self, name: str, default: Any) -> Any:
        """The next entry of the list `name` of the script."""
        file = self.folder / f"{name}.count"
        taken = int(file.read_text()) if file.exists() else 0
        _write(file, str(taken + 1))
        steps = self.script().get(name, [])
        return steps[taken] if taken < len(steps) else default

    def log(self, name: str, line: str) -> None:
        with (self.folder / name).open("a") as out:
            out.write(line + "\n")

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().split("\n")[:-1] if file.exists() else []

    def resource(self, name: str) -> Path:
        return self.folder / "resources" / f"{name}.json"

    def alive(self) -> list[str]:
        return sorted(file.stem for file in (self.folder / "resources").glob("*.json"))


class FakeBackend:
    name = "fake"
    can = Capabilities(spot=True, nodes=True, idempotent_create=True)

    def check(self, env: Env) -> Iterable[Check]:
        return [Check("fake", "pass", "always")]

    def offers(self, spec: Hardware, env: Env) -> Iterable[Offer]:
        default = [{"place": "here", "capacity": "standard", "usd_per_hour": 1.0}]
        rows = _world(env).script().get("offers", default)
        return [Offer("fake", accelerator=spec.accelerator, **row) for row in rows]

    def plan(self, spec: JobSpec, offer: Offer) -> Plan:
        disk = Intent(
            "disk", f"{spec.name}-a${{attempt}}-disk", offer.place, {"run": spec.run}, False
        )
        request = {"run": spec.run, "boot": spec.boot, "disk": "${ref:disk}"}
        machine = Intent("machine", f"{spec.name}-a${{attempt}}", offer.place, request)
        two = os.environ.get("FAKE_TWO_INTENTS") == "1"
        return Plan(offer, (disk, machine) if two else (machine,))

    def create(self, intent: Intent, env: Env) -> Ref:
        world = _world(env)
        step = world.next("create", "ok")
        if step == "no_capacity":
            raise NoCapacity(intent.place)
        if step == "quota":
            raise QuotaFull(intent.place, "GPUS")
        if step == "transient":
            raise Transient("503 from the fake", after=2.0)
        if step == "denied":
            raise Denied("the fake says no", "ask it nicely")
        if step == "bad":
            raise BadRequest("machine", "no such machine")
        run = str(intent.request["run"])
        facts = {"kind": intent.kind, "place": intent.place, "looks": 0, "run": run}
        file = world.resource(intent.name)
        if not file.exists():  # else it is ours already: adopted
            if intent.kind == "machine":
                facts["job"] = world.next("jobs", {})
                facts["boot"] = intent.request["boot"]
                world.log("begun.log", intent.name)
            _write(file, json.dumps(facts))
        if step == "lost_reply":
            raise Transient("connection reset", after=1.0)
        return Ref("fake", intent.kind, intent.name, intent.place, run)

    def observe(self, job: JobHandle, env: Env) -> Seen:
        world = _world(env)
        step = world.next("observe", "ok")
        if step == "transient":
            raise Transient("503 from the fake", after=2.0)
        if step == "denied":
            raise Denied("the token is over", "log in again")
        name = f"{job.name}-a{job.attempt}"
        file = world.resource(name)
        if not file.exists():
            return Seen(Phase.LOST, why="there is no such machine")
        facts = json.loads(file.read_text())
        facts["looks"] += 1
        held = ((Ref("fake", "machine", name, facts["place"], job.run), Held.LIVE),)
        seen = _seen(facts, held, world, Path(job.root))
        _write(file, json.dumps(facts))
        return seen

    def logs(self, job: JobHandle, query: LogQuery, env: Env) -> Iterator[Line]:
        return iter(())

    def stop(self, job: JobHandle, env: Env, grace: float) -> None:
        _world(env).log("stopped.log", f"{job.name}-a{job.attempt} {grace:.0f}")

    def delete(self, ref: Ref, env: Env) -> Held:
        world = _world(env)
        step = world.next("delete", "gone")
        if step == "transient":
            raise Transient("503 from the fake", after=2.0)
        if step == "denied":
            raise Denied("the fake says no")
        if step == "slow":
            return Held.DELETING
        if world.resource(ref.name).exists():
            world.resource(ref.name).unlink()
            world.log("deleted.log", ref.name)
        return Held.GONE

    def sweep(self, env: Env) -> Iterator[Ref]:
        for file in sorted((_world(env).folder / "resources").glob("*.json")):
            facts = json.loads(file.read_text())
            yield Ref("fake", facts["kind"], file.stem, facts["place"], facts["run"])


def _seen(facts: dict[str, Any], held: Any, world: World, root: Path) -> Seen:
    job, looks = facts["job"], facts["looks"]
    queued, needed = job.get("queued", 0), job.get("looks", 2)
    asked = (root / "control" / "stop.json").exists() and not job.get("stubborn")
    if "over" in facts:
        return Seen(Phase(facts["over"]), held, facts["why"], facts["exit_code"],
                    cause=facts["cause"])  # fmt: skip
    if asked and looks > queued:
        return _over(facts, held, Phase.CANCELLED, 0, "stopped")
    if looks <= queued:
        return Seen(Phase.QUEUED, held, "in the queue")
    finished = (world.folder / "finish").exists() if needed is None else looks > queued + needed
    if not finished:
        return Seen(Phase.RUNNING, held)
    end = job.get("end", "succeeded")
    phase, exit_code = _ENDS[end]
    exit_code = job.get("exit_code", exit_code)
    if end in ("succeeded", "until"):
        for stage in facts["boot"]["job"]["stages"]:
            _finish_stage(Path(stage["output"]), end, job.get("evaluation", {}))
    return _over(facts, held, phase, exit_code, job.get("why", f"it {end}"), job.get("cause", ""))


def _over(
    facts: dict[str, Any], held: Any, phase: Phase, exit_code: Optional[int], why: str,
    cause: str = "",
) -> Seen:  # fmt: skip
    facts.update(over=phase.value, exit_code=exit_code, why=why, cause=cause)
    return Seen(phase, held, why, exit_code, cause=cause)


def _finish_stage(folder: Path, end: str, evaluation: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    meta: dict[str, Any] = {"v": 1, "completed": end == "succeeded", "global_step": 10}
    if end == "until":
        meta["stopped"] = "until"
    _write(folder / "run_meta.json", json.dumps(meta))
    _write(folder / "evaluation.json", json.dumps(evaluation))


def _world(env: Env) -> World:
    return World(Path(env.environ["FAKE_WORLD"]))


def _write(file: Path, text: str) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(file)
