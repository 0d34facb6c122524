"""The containers of a rehearsed job: its command as processes of this machine, one a replica, with
the environment that a worker of Vertex AI has. Their output goes to the log, line by line."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

#: Seconds between SIGTERM and SIGKILL, as on a machine that is taken back.
_NOTICE = 30.0
#: Seconds that a descendant of a worker may hold its output open.
_LAST_LINES = 5.0


class Processes:
    """The replicas of one job, each with the thread that carries its output."""

    def __init__(
        self, children: list[subprocess.Popen[str]], pumps: list[threading.Thread], folder: Path
    ) -> None:
        self._children, self._pumps, self._folder = children, pumps, folder
        self._asked: Optional[float] = None

    def code(self) -> Optional[int]:
        """The first exit code that is not 0, once all have ended and their output is in the log; a
        signal is 128 + its number. None: some still run."""
        if self._asked is not None and time.monotonic() - self._asked > _NOTICE:
            self.kill()
        codes = [child.poll() for child in self._children]
        if any(code is None for code in codes):
            if any(code not in (None, 0) for code in codes):
                self.ask()  # one replica that fails ends the job
            return None
        for pump in self._pumps:
            pump.join(timeout=_LAST_LINES)
        worst = [code for code in codes if code]
        return 0 if not worst else (worst[0] if worst[0] > 0 else 128 - worst[0])

    def ask(self) -> None:
        """SIGTERM, once."""
        if self._asked is None:
            self._asked = time.monotonic()
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End what still runs, and remove what they left on this machine."""
        self._signal(signal.SIGKILL)
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: int) -> None:
        for child in self._children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, number)


def spawn(
    job: Any, project: str, region: str, environ: Mapping[str, str],
    write: Callable[[str, str], None],
) -> Processes:  # fmt: skip
    """Start the container command of every replica. `environ` is what the rehearsal adds; of this
    process's own environment the workers get little. `write(task, line)` takes what they print."""
    folder = Path(tempfile.mkdtemp(prefix="rehearsed-job-"))
    specs = list(job.job_spec.worker_pool_specs)
    cluster = _cluster([int(pool.replica_count) for pool in specs])
    children, pumps = [], []
    for number, pool in enumerate(specs):
        for index in range(int(pool.replica_count)):
            task = {"type": f"workerpool{number}", "index": index}
            place = folder / f"workerpool{number}-{index}"  # a container's own disk
            place.mkdir()
            given = {**_machine(place), **environ, **_worker(job, project, region, cluster, task)}
            given.update({entry.name: entry.value for entry in pool.container_spec.env})
            argv = [*pool.container_spec.command, *pool.container_spec.args]
            child = subprocess.Popen(
                argv, cwd=place, env=given, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            children.append(child)
            told = (child, f"workerpool{number}-{index}", write)
            pumps.append(threading.Thread(target=_pump, args=told, daemon=True))
            pumps[-1].start()
    return Processes(children, pumps, folder)


def _pump(child: subprocess.Popen[str], task: str, write: Callable[[str, str], None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        write(task, line.rstrip("\n"))


def _machine(folder: Path) -> dict[str, str]:
    """What an image would bring: a `python3`, which is this one."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    python = tools / "python3"
    if not python.exists():
        # A script, not a link: an interpreter looks for its packages beside the path of its call.
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
    path = f"{tools}:{os.environ.get('PATH', os.defpath)}"
    (folder / "tmp").mkdir(exist_ok=True)
    given = {"PATH": path, "HOME": str(folder), "TMPDIR": str(folder / "tmp")}
    kept = {name: os.environ[name] for name in ("LANG", "OMP_NUM_THREADS") if name in os.environ}
    return {**given, "PYTHONUNBUFFERED": "1", **kept}


def _worker(
    job: Any, project: str, place: str, cluster: Mapping[str, Any], task: Mapping[str, Any]
) -> dict[str, str]:
    number = job.name.rpartition("/")[2]
    spec = {"cluster": cluster, "environment": "cloud", "task": {**task, "trial": ""}, "job": "{}"}
    given = {
        "CLUSTER_SPEC": json.dumps(spec), "CLOUD_ML_JOB_ID": number, "CLOUD_ML_PROJECT_ID": project,
        "CLOUD_ML_REGION": place,
    }  # fmt: skip
    output = job.job_spec.base_output_directory.output_uri_prefix.rstrip("/")
    if output:
        given.update(AIP_MODEL_DIR=f"{output}/model/", AIP_CHECKPOINT_DIR=f"{output}/checkpoints/",
                     AIP_TENSORBOARD_LOG_DIR=f"{output}/logs/")  # fmt: skip
    return given


def _cluster(replicas: list[int]) -> dict[str, list[str]]:
    """Every replica as host:port; here all are this machine, each with a port of its own."""
    return {
        f"workerpool{pool}": [f"127.0.0.1:{_free_port()}" for _ in range(count)]
        for pool, count in enumerate(replicas)
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
