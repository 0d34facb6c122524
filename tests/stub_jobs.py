"""Jobs whose trainer is a few lines of the standard library, in a real bundle, under the real boot.

A stub's source runs after `_BEGIN`: it has `job`, `rank`, `say`, and `asked`, which SIGTERM fills.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import trainer.boot
from launcher.bundle import build

BOOT = Path(trainer.boot.__file__)
#: A stub that does not speak of inputs reads none.
_NO_INPUTS = 'if sys.argv[1] == "inputs": sys.exit(0)\n'
_BEGIN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
job = json.loads(Path(sys.argv[2]).read_text())
rank = int(os.environ.get("RANK", 0))

def say(*words):
    print(*words, flush=True)

def wait_until_asked():
    say("ready")
    while not asked:
        time.sleep(0.01)

def write(stage, **meta):
    folder = Path(job["stages"][stage]["output"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_meta.json").write_text(json.dumps(meta))

"""


#: What boot itself needs of the bundle.
BOOTS = (
    "attempts", "boot", "cluster", "environment", "manifest", "mirror", "mirror_parts",
    "packages", "remote_root", "restore", "secret_manager", "secret_words", "smaller", "store",
    "store_gcs", "store_remote", "store_s3", "supervise", "workers",
)  # fmt: skip


def bundle(folder: Path, source: str) -> dict[str, Any]:
    """The `bundle` block of a boot specification, for a trainer that is `source`."""
    package = folder / "source" / "trainer"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    shutil.copytree(BOOT.with_name("locks"), package / "locks", dirs_exist_ok=True)
    for name in BOOTS:
        shutil.copyfile(BOOT.with_name(f"{name}.py"), package / f"{name}.py")
    nothing = "" if '"inputs"' in source else _NO_INPUTS
    (package / "__main__.py").write_text(_BEGIN + nothing + source)
    made = build(folder / "home", package)
    return {"url": str(made.path), "sha256": made.sha256, "bytes": made.bytes}


def specification(folder: Path, source: str = "", **changes: Any) -> dict[str, Any]:
    """A boot specification with everything below `folder`; one stage, `s`."""
    return {
        "schema": 1, "run": "0123456789abcdef", "name": "thing-abcdef-j0", "job_index": 0,
        "attempt": 1, "owner": "me", "bundle": bundle(folder, source),
        "job": {"stages": [{"id": "s", "output": str(folder / "root" / "s")}]},
        "root": str(folder / "root"), "work": str(folder / "work"), "python": sys.executable,
        "workers": 1, "nodes": 1, "env": {}, "secrets": {},
        "deadline_seconds": None, "grace_seconds": 600, **changes,
    }  # fmt: skip


def start(
    folder: Path, spec: dict[str, Any], environ: Optional[dict[str, str]] = None
) -> subprocess.Popen[str]:
    """boot, copied out of the project and started as a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "boot.json").write_text(json.dumps(spec))
    (folder / "boot.py").write_bytes(BOOT.read_bytes())
    return subprocess.Popen(
        [sys.executable, "boot.py", "run", "boot.json"], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(environ or {})},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    """Exit code and stderr."""
    return process.wait(seconds), process.communicate()[1]


def log(folder: Path, worker: int = 0) -> list[str]:
    """A worker's lines, without their times."""
    path = folder / "root" / "logs" / f"worker-{worker}" / "00-0001.log"
    text = path.read_bytes().decode() if path.exists() else ""
    return [line.partition(" ")[2] for line in text.splitlines()]


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def eventually(holds: Callable[[], Any], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """Pids of the living processes below `pid`, in whatever session."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found = children.get(pid, [])
    for child in found:  # it grows at its end
        found += children.get(child, [])
    return found
