"""preview, up, refresh and destroy of the stand-in: a resource monitor over gRPC and a loop of
steps. Each step writes down what it is about to do before the pretended cloud does it."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent import futures
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import grpc
from engine_stand_in import Call, Refused, State
from google.protobuf import empty_pb2, json_format, struct_pb2

# The messages alone: the package itself takes half of the time of a call.
_spec = find_spec("pulumi")
assert _spec is not None
for _name in ("pulumi", "pulumi.runtime"):
    _package = types.ModuleType(_name)
    _parts = _name.split(".")[1:]
    _package.__path__ = [str(Path(str(_spec.origin)).parent.joinpath(*_parts))]
    sys.modules[_name] = _package

from pulumi.runtime.proto import (  # noqa: E402
    engine_pb2,
    engine_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    language_pb2,
    language_pb2_grpc,
    resource_pb2,
    resource_pb2_grpc,
)

_SIGNATURE = "4dabf18193072939515e22adb298388d"
#: Inputs that say which thing in the cloud a resource is: another value of one is another thing.
_IDENTITY = (
    "project", "location", "region", "name", "accountId", "secretId", "repositoryId", "service",
    "bucket", "role", "member", "serviceAccountId", "repository",
)  # fmt: skip
_LIMIT = 60.0


def run(call: Call, state: State, folder: Path) -> str:
    """One operation; the text for stdout. Errors: `Refused` once anything has failed."""
    kind = call.words[0]
    dry = kind == "preview" or "--preview-only" in call.options
    lock = None if dry else state.lock()
    engine = Engine(state, folder, dry, Events(call.options.get("--event-log")))
    started = time.time()
    signal.signal(signal.SIGINT, engine.interrupted)
    try:
        if kind == "refresh":
            engine.refresh("--clear-pending-creates" in call.options)
        elif kind == "destroy":
            engine.destroy()
        else:
            _program(call, engine)
            engine.delete_the_rest()
    finally:
        engine.keep_outputs()
        engine.events.end(engine.counts)
        failed = bool(engine.failures) or engine.stop.is_set()
        if lock is not None:
            state.record(kind, started, "failed" if failed else "succeeded")
            lock.unlink()
    if engine.stop.is_set():
        raise Refused("error: update canceled")
    if engine.failures:
        raise Refused(f"error: {kind} failed")
    return f"{kind}: done\n"


class Events:
    """Engine events as JSON over the stream that the caller listens on."""

    def __init__(self, address: Optional[str]) -> None:
        self._queue: queue.Queue[Optional[dict[str, Any]]] = queue.Queue()
        self._number = 0
        self._call: Any = None
        if address is not None:
            self._channel = grpc.insecure_channel(address.removeprefix("tcp://"))
            stub = events_pb2_grpc.EventsStub(self._channel)
            self._call = stub.StreamEvents.future(self._requests())

    def send(self, **event: Any) -> None:
        self._number += 1
        self._queue.put({"sequence": self._number, "timestamp": int(time.time()), **event})

    def end(self, counts: dict[str, int]) -> None:
        summary = {"maybeCorrupt": False, "durationSeconds": 0, "resourceChanges": counts}
        self.send(summaryEvent=summary)
        self.send(cancelEvent={})
        self._queue.put(None)
        if self._call is not None:
            self._call.result(timeout=_LIMIT)

    def _requests(self) -> Iterator[events_pb2.EventRequest]:
        while (event := self._queue.get()) is not None:
            yield events_pb2.EventRequest(event=json.dumps(event))


class Engine(resource_pb2_grpc.ResourceMonitorServicer, engine_pb2_grpc.EngineServicer):
    """The monitor that the program registers its resources with."""

    def __init__(self, state: State, folder: Path, dry: bool, events: Events) -> None:
        self.state, self.folder, self.dry, self.events = state, folder, dry, events
        self.known = {r["urn"]: r for r in state.deployment["resources"]}
        self.faults = json.loads((folder / "faults.json").read_text())
        self.counts: dict[str, int] = {}
        self.failures: list[str] = []
        self.seen: set[str] = set()
        self.stop = threading.Event()
        self._one = threading.Lock()
        self._root = ""
        self._outputs: tuple[str, dict[str, Any]] = ("", {})

    def interrupted(self, number: int, frame: Any) -> None:
        self.stop.set()

    # What the program asks for.

    def SupportsFeature(self, request: Any, context: Any) -> Any:  # noqa: N802
        known = request.id in ("secrets", "resourceReferences")
        return resource_pb2.SupportsFeatureResponse(hasSupport=known)

    def RegisterResource(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._one:
            urn = f"urn:pulumi:{self.state.stack}::launch::{request.type}::{request.name}"
            self.seen.add(urn)
            inputs = _opened(json_format.MessageToDict(request.object))
            if request.type == "pulumi:pulumi:Stack":
                before = self.known.get(urn, {}).get("outputs", {})
                self._keep({"urn": urn, "type": request.type, "outputs": before})
                return resource_pb2.RegisterResourceResponse(urn=urn)
            try:
                outputs = self._step(urn, request, inputs)
            except Refused as error:
                if not self.stop.is_set():
                    self.failures.append(urn)
                context.abort(grpc.StatusCode.UNKNOWN, str(error))
            made = struct_pb2.Struct()
            made.update(outputs)
            return resource_pb2.RegisterResourceResponse(
                urn=urn, id="" if self.dry else _key(request.type, inputs), object=made
            )

    def RegisterResourceOutputs(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._outputs = (request.urn, _opened(json_format.MessageToDict(request.outputs)))
        return empty_pb2.Empty()

    def SignalAndWaitForShutdown(self, request: Any, context: Any) -> Any:  # noqa: N802
        return empty_pb2.Empty()

    def Log(self, request: Any, context: Any) -> Any:  # noqa: N802
        severity = engine_pb2.LogSeverity.Name(request.severity).lower()
        if severity == "error" and not self.failures:
            self._diagnose(request.urn, request.message)
            self.failures.append(request.urn)
        return empty_pb2.Empty()

    def SetRootResource(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._root = request.urn
        return engine_pb2.SetRootResourceResponse()

    def GetRootResource(self, request: Any, context: Any) -> Any:  # noqa: N802
        return engine_pb2.GetRootResourceResponse(urn=self._root)

    def RequirePulumiVersion(self, request: Any, context: Any) -> Any:  # noqa: N802
        return engine_pb2.RequirePulumiVersionResponse()

    # What is done.

    def _step(self, urn: str, request: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        old = self.known.get(urn)
        if old is not None:
            ignored = set(request.ignoreChanges)
            was = {k: v for k, v in old["inputs"].items() if k in ignored}
            inputs = {**{k: v for k, v in inputs.items() if k not in ignored}, **was}
        key = _key(request.type, inputs)
        outputs = {**inputs, **_computed(request.type, inputs)}
        entry = {
            "urn": urn, "type": request.type, "custom": True, "id": key, "inputs": inputs,
            "outputs": outputs, "protect": bool(request.protect),
            "retainOnDelete": bool(request.retainOnDelete),
        }  # fmt: skip
        changed = [] if old is None else _differences(old["inputs"], inputs)
        replaces = [name for name in changed if name in _IDENTITY]
        if old is None:
            op = "import" if request.importId else "create"
        else:
            op = "replace" if replaces else "update" if changed else "same"
        facts = {"op": op, "urn": urn, "type": request.type, "provider": ""}
        facts.update({"keys": replaces, "diffs": changed} if old is not None else {})
        self._go_on()
        if op != "same" and not self.dry:
            self._act(facts, entry, old)
        else:
            self._begin(facts)
            self._keep(entry)
        self._done(facts)
        return outputs

    def _act(
        self, facts: dict[str, Any], entry: dict[str, Any], old: Optional[dict[str, Any]]
    ) -> None:
        name = entry["urn"].rpartition("::")[2]
        doing = {"create": "creating", "import": "importing", "delete": "deleting"}
        operation = {"resource": entry, "type": doing.get(facts["op"], "updating")}
        self.state.deployment["pending_operations"].append(operation)
        self._save()
        self._begin(facts)
        self._pause(name)
        problem = self.faults.get("fail", {}).get(name) or self._problem(facts["op"], entry)
        if problem is None:
            cloud = _cloud(self.folder)
            if old is not None:
                cloud.pop(old["id"], None)
            if facts["op"] != "delete":
                cloud[entry["id"]] = entry["inputs"]
            (self.folder / "cloud.json").write_text(json.dumps(cloud))
            if self.faults.get("die_after") == name:
                os.kill(os.getpid(), signal.SIGKILL)
        self.state.deployment["pending_operations"].remove(operation)
        if problem is not None:
            self._save()
            self._diagnose(entry["urn"], problem)
            self.events.send(resOpFailedEvent={"metadata": facts, "status": 1, "steps": 1})
            raise Refused(problem)
        if facts["op"] == "delete":
            self.known.pop(entry["urn"])
            self._save()
        else:
            self._keep(entry)

    def _problem(self, op: str, entry: dict[str, Any]) -> Optional[str]:
        there = entry["id"] in _cloud(self.folder)
        # A grant that is there is taken without a word: the policy has the member already.
        if op == "create" and there and "IamMember" not in entry["type"].replace("IAM", "Iam"):
            return (
                f"1 error occurred:\n\t* Error creating {entry['type']}: googleapi: Error 409: "
                "Requested entity already exists, alreadyExists\n\n"
            )
        if op == "import" and not there:
            return "Preview failed: importing: resource does not exist"
        return None

    def _pause(self, name: str) -> None:
        """Where the test says: until SIGINT, or until it lets go. What had begun is finished."""
        if self.faults.get("pause_at") != name:
            return
        deadline = time.monotonic() + _LIMIT
        while not (self.folder / "go").exists():
            if self.stop.wait(0.02) and not self.faults.get("deaf"):
                return
            if time.monotonic() > deadline:
                raise Refused("error: nobody let go of the stand-in")

    def delete_the_rest(self) -> None:
        """What the state has and the program has not."""
        for urn, entry in list(self.known.items()):
            if not self.failures and urn not in self.seen:
                self._delete(entry)

    def keep_outputs(self) -> None:
        """Those of the stack, at the end; after a failure the old ones stay beside the new."""
        urn, outputs = self._outputs
        if self.dry or urn not in self.known:
            return
        failed = self.failures or self.stop.is_set()
        before = self.known[urn].get("outputs", {}) if failed else {}
        self.known[urn]["outputs"] = {**before, **outputs}
        self._save()

    def destroy(self) -> None:
        for entry in list(self.known.values())[::-1]:
            if entry["type"] == "pulumi:pulumi:Stack":
                continue
            self._delete(entry)
            if self.failures or self.stop.is_set():
                return
        if not self.dry:
            self.known.clear()
            self._save()

    def _delete(self, entry: dict[str, Any]) -> None:
        old = {"urn": entry["urn"], "inputs": entry["inputs"],
               "retainOnDelete": bool(entry.get("retainOnDelete"))}  # fmt: skip
        op = {"op": "delete", "urn": entry["urn"], "type": entry["type"], "provider": "",
              "old": old}  # fmt: skip
        self._go_on()
        if entry.get("protect"):
            self._diagnose(entry["urn"], "resource cannot be deleted because it is protected")
            self.failures.append(entry["urn"])
            return
        stays = entry.get("retainOnDelete") or entry["inputs"].get("disableOnDestroy") is False
        if self.dry or stays:
            self._begin(op)
            if not self.dry:
                self.known.pop(entry["urn"])
                self._save()
        else:
            try:
                self._act(op, entry, entry)
            except Refused:
                self.failures.append(entry["urn"])
                return
        self._done(op)

    def refresh(self, clear: bool) -> None:
        cloud = _cloud(self.folder)
        for urn, entry in list(self.known.items()):
            if entry["type"] == "pulumi:pulumi:Stack":
                continue
            facts = {"op": "refresh", "urn": urn, "type": entry["type"], "provider": ""}
            self._begin(facts)
            if entry["id"] not in cloud:
                facts["op"] = "delete"
                if not self.dry:
                    self.known.pop(urn)
            elif changed := _differences(entry["inputs"], cloud[entry["id"]]):
                facts.update(op="update", diffs=changed)
            else:
                facts["op"] = "same"
            self._done(facts)
        if clear and not self.dry:
            self.state.deployment["pending_operations"] = []
        if not self.dry:
            self._save()

    def _go_on(self) -> None:
        if self.stop.is_set() and not self.dry:
            raise Refused("canceled")

    def _begin(self, facts: dict[str, Any]) -> None:
        self.events.send(resourcePreEvent={"metadata": dict(facts), "planning": self.dry})

    def _done(self, facts: dict[str, Any]) -> None:
        self.counts[facts["op"]] = self.counts.get(facts["op"], 0) + 1
        self.events.send(resOutputsEvent={"metadata": dict(facts), "planning": self.dry})

    def _diagnose(self, urn: str, message: str) -> None:
        self.events.send(
            diagnosticEvent={
                "urn": urn, "message": f"<{{%reset%}}>{message}<{{%reset%}}>\n", "color": "raw",
                "severity": "error",
            }
        )  # fmt: skip

    def _keep(self, entry: dict[str, Any]) -> None:
        if not self.dry:
            self.known[entry["urn"]] = {**self.known.get(entry["urn"], {}), **entry}
            self._save()

    def _save(self) -> None:
        self.state.deployment["resources"] = list(self.known.values())
        self.state.save()


def _program(call: Call, engine: Engine) -> None:
    """Serve the monitor and have the caller run its program against it."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    resource_pb2_grpc.add_ResourceMonitorServicer_to_server(engine, server)
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with grpc.insecure_channel(call.options["--client"]) as channel:
            answer = language_pb2_grpc.LanguageRuntimeStub(channel).Run(
                language_pb2.RunRequest(
                    project="launch", stack=engine.state.stack, dryRun=engine.dry, parallel=4,
                    monitor_address=address, args=[address], organization="organization",
                )
            )  # fmt: skip
        if answer.error and not engine.failures and not engine.stop.is_set():
            engine._diagnose("", answer.error)
            engine.failures.append("")
    finally:
        server.stop(0)


def _key(kind: str, inputs: dict[str, Any]) -> str:
    return "/".join([kind, *(str(inputs[name]) for name in _IDENTITY if name in inputs)])


def _computed(kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs that programs read and nobody gives."""
    found: dict[str, Any] = {"name": inputs.get("name", _key(kind, inputs))}
    if "accountId" in inputs:
        email = f"{inputs['accountId']}@{inputs.get('project', 'none')}.iam.gserviceaccount.com"
        found |= {"email": email, "member": f"serviceAccount:{email}"}
    return found


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]


def _opened(value: Any) -> Any:
    """Secrets as a mark that hides them: the stand-in stores none."""
    if isinstance(value, dict):
        if _SIGNATURE in value:
            return {_SIGNATURE: value[_SIGNATURE], "ciphertext": "hidden"}
        return {key: _opened(item) for key, item in value.items()}
    return [_opened(item) for item in value] if isinstance(value, list) else value


def _cloud(folder: Path) -> dict[str, Any]:
    file = folder / "cloud.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found
