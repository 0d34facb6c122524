"""A stand-in for the engine's command line: it speaks the contract, it is not the engine.

`install` puts an executable `pulumi` into a folder. It takes the arguments that the Automation API
of 3.272 gives, runs the inline program against a resource monitor of its own over gRPC, sends
engine events, keeps a state file with locks and pending operations, and stores resources in a
pretended cloud (a JSON file). What it decides about differences, replacement, order, encryption and
providers is our reading, kept as small as the tests need: green tests show that our wiring is
right, and nothing about the engine or about Google.
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class StandIn:
    """Its folder: `bin/pulumi`, `cloud.json`, `faults.json`, `calls.jsonl` (arguments, and names
    of variables, that it was given)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        executable = self.bin / "pulumi"
        places = [str(HERE), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        executable.write_text(
            f"#!{sys.executable} -SE\nimport sys\nsys.path += {places!r}\n"  # half the start-up
            f"import engine_stand_in\nsys.exit(engine_stand_in.main({str(folder)!r}))\n"
        )
        executable.chmod(0o755)
        self.faults()

    def copy(self, made: StandIn, home: Path, into: Path) -> None:
        """Take over the cloud of `made`, and its state and all else below `home`."""
        self.cloud = made.cloud
        shutil.copytree(home, into)

    def faults(self, **faults: Any) -> None:
        """`fail`: {name: message}; `die_after`: name (killed when the cloud has it and the state
        does not); `pause_at`: name (waits for SIGINT, or `folder/go`)."""
        (self.folder / "faults.json").write_text(json.dumps(faults))

    def calls(self) -> list[dict[str, Any]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def commands(self) -> list[str]:
        """The first two words of every call but `version`."""
        words = [[w for w in call["argv"] if w != "--non-interactive"] for call in self.calls()]
        return [" ".join(w[:2]) if w[0] in ("stack",) else w[0] for w in words if w != ["version"]]

    @property
    def cloud(self) -> dict[str, Any]:
        file = self.folder / "cloud.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    @cloud.setter
    def cloud(self, resources: dict[str, Any]) -> None:
        (self.folder / "cloud.json").write_text(json.dumps(resources))

    def state(self, home: Path) -> dict[str, Any]:
        """The one state below `home`/state."""
        (file,) = (home / "state").rglob("stacks/*/*.json")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def hold(self, state: Path, stack: str, host: str, pid: int) -> None:
        """Leave the lock file of an update by `pid` on `host` in the folder of a state."""
        folder = state / ".pulumi" / "locks" / "organization" / "launch" / stack
        folder.mkdir(parents=True, exist_ok=True)
        since = "2026-11-21T10:00:00Z"
        facts = {"pid": pid, "hostname": host, "username": "ann", "timestamp": since}
        (folder / "1.json").write_text(json.dumps(facts))
