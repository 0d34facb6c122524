"""`launch` as a user runs it, with a trainer that is a few lines: real processes, nothing given but
an environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import trainer

ROOT = Path(__file__).resolve().parents[1]
#: Of a test's own environment: what an interpreter needs.
_KEPT = ("PATH", "LANG", "TMPDIR", "OMP_NUM_THREADS", "VIRTUAL_ENV")
RECIPE = """\
launch: 1
name: thing
stage: tokenizer
data: {train: [{builtin: python-reference}]}
tokenizer: {vocab_size: 300}
retry: {preempted: 3}
"""
VERTEX = """\
hardware:
  backend: vertex
  accelerator: L4:1
  capacity: [spot, standard]
  places: [us-central1, us-west1]
  vertex: {project: proj, image: "own/trainer:1"}
artifacts: gs://bkt/runs/{run}
"""
LOCAL = 'hardware: {backend: local, accelerator: "cpu:1"}\n'


def package(folder: Path, source: str) -> Path:
    """A folder for PYTHONPATH: the package `trainer`, whose `__main__` is `source`."""
    made = folder / "packages"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(trainer.__file__).parent, made / "trainer", ignore=ignored)
    (made / "trainer" / "__main__.py").write_text(source)
    return made


class Launch:
    """The command, in `folder`, with the variables `given` and no other of ours."""

    def __init__(self, folder: Path, packages: Path, given: Mapping[str, str]) -> None:
        self.folder, self.home = folder, folder / "home"
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        self.environ = {
            **kept, "HOME": str(folder), "LAUNCH_HOME": str(self.home), "NO_COLOR": "1",
            "COLUMNS": "200", "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", **given,
        }  # fmt: skip

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *words], cwd=self.folder, env=self.environ,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def __call__(self, *words: str, code: int = 0) -> str:
        """What it said on both outputs."""
        process = self.start(*words)
        said = process.communicate(timeout=240)[0]
        assert process.returncode == code, f"launch {' '.join(words)}: {process.returncode}\n{said}"
        return said
