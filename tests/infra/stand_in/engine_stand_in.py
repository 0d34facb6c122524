"""The stand-in executable: arguments, state, locks. What updates do is in `update.py` beside it."""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any, Optional

VERSION = "v3.272.0"
#: Options of ours that take a value in the next word.
_VALUED = {
    "--stack", "--exec-kind", "--event-log", "--secrets-provider", "--color", "--page",
    "--page-size", "--message",
}  # fmt: skip


class Refused(Exception):
    """An error of the command line: its text goes to stderr, the exit code is 255."""


class Call:
    """One call: its words and options."""

    def __init__(self, words: list[str]) -> None:
        self.words: list[str] = []
        self.options: dict[str, str] = {}
        rest = iter(words)
        for word in rest:
            if not word.startswith("--"):
                self.words.append(word)
            elif "=" in word:
                key, _, value = word.partition("=")
                self.options[key] = value
            else:
                self.options[word] = next(rest) if word in _VALUED else "true"


class State:
    """A state file of the kind that a folder as a backend holds, with its locks and history; that
    of a bucket lies in the stand-in's own folder."""

    def __init__(self, project: str, stack: str, folder: Path) -> None:
        url = os.environ["PULUMI_BACKEND_URL"]
        scheme, _, path = url.partition("://")
        if scheme not in ("file", "gs"):
            raise Refused(f"error: the stand-in keeps no state in {url}")
        root = (Path(path) if scheme == "file" else folder / "buckets" / path) / ".pulumi"
        self.stack = stack
        self.file = root / "stacks" / project / f"{stack}.json"
        self.locks = root / "locks" / "organization" / project / stack
        self.past = root / "history" / project / stack
        self.deployment: dict[str, Any] = {}
        if self.file.exists():
            self.deployment = json.loads(self.file.read_text())["checkpoint"]["latest"]

    def require(self) -> None:
        if not self.file.exists():
            raise Refused(f"error: no stack named '{self.stack}' found")

    def init(self) -> None:
        if self.file.exists():
            raise Refused(f"error: stack '{self.stack}' already exists")
        salt = os.urandom(8).hex()
        sealed = {"salt": f"v1:{salt}:{_seal(_passphrase(), salt)}"}
        self.deployment = {
            "manifest": {"version": VERSION}, "resources": [], "pending_operations": [],
            "secrets_providers": {"type": "passphrase", "state": sealed},
        }  # fmt: skip
        self.save()

    def decrypt(self) -> None:
        _, salt, seal = self.deployment["secrets_providers"]["state"]["salt"].split(":")
        if _seal(_passphrase(), salt) != seal:
            raise Refused(
                "error: getting secrets manager: incorrect passphrase, please set "
                "PULUMI_CONFIG_PASSPHRASE to the correct passphrase"
            )

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(json.dumps({"version": 3, "checkpoint": {"latest": self.deployment}}))
        scratch.replace(self.file)

    def lock(self) -> Path:
        held = sorted(self.locks.glob("*.json"))
        if held:
            lines = [f"\n  file://{path}: {_holder(path)}" for path in held]
            raise Refused(
                f"error: the stack is currently locked by {len(held)} lock(s). Either wait for the "
                "other process(es) to end or delete the lock file with `pulumi cancel`."
                + "".join(lines)
            )
        self.locks.mkdir(parents=True, exist_ok=True)
        file = self.locks / f"{os.urandom(8).hex()}.json"
        facts = {"pid": os.getpid(), "username": "tester", "hostname": os.uname().nodename,
                 "timestamp": _time(time.time())}  # fmt: skip
        file.write_text(json.dumps(facts))
        return file

    def record(self, kind: str, started: float, result: str) -> None:
        self.past.mkdir(parents=True, exist_ok=True)
        entry = {
            "kind": kind, "message": "", "environment": {}, "config": {}, "result": result,
            "startTime": _time(started), "endTime": _time(time.time()),
        }  # fmt: skip
        (self.past / f"{time.time_ns()}.json").write_text(json.dumps(entry))


def main(folder: str) -> int:
    words = [word for word in sys.argv[1:] if word != "--non-interactive"]
    with (Path(folder) / "calls.jsonl").open("a") as log:
        names = sorted(name for name in os.environ if name.startswith(("PULUMI", "GRPC")))
        log.write(json.dumps({"argv": sys.argv[1:], "variables": names}) + "\n")
    try:
        sys.stdout.write(_answer(Call(words), Path(folder)))
        return 0
    except Refused as error:
        sys.stderr.write(f"{error}\n")
        return 255


def _answer(call: Call, folder: Path) -> str:
    if call.words == ["version"]:
        return VERSION + "\n"
    stack = call.options.get("--stack", call.words[-1])
    state = State(_project(), stack, folder)
    if call.words[:2] == ["stack", "init"]:
        state.init()
        return ""
    state.require()
    answer = _about_the_state(call, state)
    if answer is not None:
        return answer
    state.decrypt()
    import update

    return update.run(call, state, folder)


def _about_the_state(call: Call, state: State) -> Optional[str]:
    if call.words[0] == "cancel":
        for file in state.locks.glob("*.json"):
            file.unlink()
        return ""
    if call.words[0] != "stack":
        return None
    verb = call.words[1]
    if verb == "export":
        return json.dumps({"version": 3, "deployment": state.deployment})
    if verb == "output":
        state.decrypt()
        (root, *_) = [*(r for r in state.deployment["resources"] if _is_root(r)), {}]
        return json.dumps(root.get("outputs", {}))
    if verb == "history":
        past = sorted(state.past.glob("*.json"), reverse=True)
        size = int(call.options.get("--page-size", len(past)))
        return json.dumps([json.loads(file.read_text()) for file in past[:size]])
    if verb == "rm":
        if state.deployment["resources"]:
            raise Refused(f"error: '{state.stack}' still has resources; removal rejected")
        state.file.unlink()
    return ""


def _is_root(resource: dict[str, Any]) -> bool:
    return bool(resource["type"] == "pulumi:pulumi:Stack")


def _project() -> str:
    """The name in the Pulumi.yaml of the working directory."""
    for line in Path("Pulumi.yaml").read_text().splitlines():
        if line.startswith("name:"):
            return line.partition(":")[2].strip()
    raise Refused("error: no Pulumi.yaml")


def _passphrase() -> str:
    word = os.environ.get("PULUMI_CONFIG_PASSPHRASE")
    file = os.environ.get("PULUMI_CONFIG_PASSPHRASE_FILE")
    if word is None and file is None:
        raise Refused(
            "error: passphrase must be set with PULUMI_CONFIG_PASSPHRASE or "
            "PULUMI_CONFIG_PASSPHRASE_FILE environment variables"
        )
    return word if word is not None else Path(str(file)).read_text().strip()


def _seal(passphrase: str, salt: str) -> str:
    return str(zlib.crc32(f"{salt}{passphrase}".encode()))  # enough to tell two apart


def _holder(path: Path) -> str:
    facts = json.loads(path.read_text())
    return (
        f"created by {facts['username']}@{facts['hostname']} (pid {facts['pid']}) "
        f"at {facts['timestamp']}"
    )


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))
