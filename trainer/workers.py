"""The processes of a job on one node: their output, their ends, and what these mean together.

Standard library only. Here too: boot's `worker` mode, which torchrun starts for each worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from trainer.boot import (
    AGAIN,
    CONFIG,
    DATA,
    ENVIRONMENT,
    ERROR,
    OK,
    STAMP,
    STOPPED,
    BootError,
    Spec,
    write_json,
)
from trainer.cluster import Node
from trainer.secret_words import hide, words

#: The worst first: what should not be retried tells more than the peers it took down with it.
_WORST = (DATA, CONFIG, ENVIRONMENT)
_TERMINATED, _KILLED = 128 + signal.SIGTERM, 128 + signal.SIGKILL
POLL = 0.2
_LONGEST_LINE = 1 << 20
#: In front of a worker's lines on their way through torchrun to the container's output.
_PASS_ON = b"\x1e"
#: A pipe takes so many bytes at once or none: lines of several writers stay whole.
_AT_ONCE = 4096


class Pump:
    """A process in the bundle's folder whose output goes line by line, with the time and without
    secrets, into `logs/<name>/`; where the artifact root is remote, to the standard output too,
    with `mark` in front. Errors: `BootError` 78 when it cannot be started."""

    def __init__(
        self, spec: Spec, command: Sequence[str], given: dict[str, str], name: str,
        mark: bytes = b"",
    ) -> None:  # fmt: skip
        self.said, self._explained = "", False  # its last `error:` line, else its last line
        self._told: set[int] = set()
        self._mark = mark if spec.remote else None
        self._secrets = words(given, spec.raw.get("secrets") or {})
        path = spec.log(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab")
            self.child = subprocess.Popen(
                command, env=given, cwd=spec.code, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            what = f"cannot start {error.filename or command[0]}: {error.strerror}"
            raise BootError(ENVIRONMENT, what) from error
        self.thread = threading.Thread(target=self._pump, args=(self.child.stdout,), daemon=True)
        self.thread.start()

    def pids(self) -> set[int]:
        return {self.child.pid}

    def terminate(self) -> None:
        """SIGTERM, once each, to those who can save."""
        for pid in self.pids() - self._told:
            self._told.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)  # torchrun's workers die with it

    def finish(self) -> int:
        """Drain the output; the exit code, 128 + s when signal s ended it."""
        code = self.child.wait()
        self.thread.join(timeout=10)  # a grandchild may still hold the pipe
        return code if code >= 0 else 128 - code

    def _pump(self, pipe: Any) -> None:
        descriptor, rest = pipe.fileno(), b""
        while chunk := os.read(descriptor, 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LONGEST_LINE:
                rest = self._hidden(rest)  # whole: a cut may go through a secret
                keep = len(self._secrets[0].encode()) if self._secrets else 0
                lines, rest = [*lines, rest[: len(rest) - keep]], rest[len(rest) - keep :]
            self._write(lines)
        if rest:
            self._write([rest])

    def _hidden(self, text: bytes) -> bytes:
        known = text.decode("utf-8", "surrogateescape")
        return hide(known, self._secrets).encode("utf-8", "surrogateescape")

    def _write(self, lines: list[bytes]) -> None:
        stamp = datetime.now(timezone.utc).strftime(STAMP)
        out = []
        for line in lines:
            # A progress bar redraws its line: the last state is the line.
            text = line.decode("utf-8", "replace").rstrip("\r").rsplit("\r", 1)[-1]
            text = hide(text, self._secrets)
            out.append(text)
            if text.startswith("error: "):
                self.said, self._explained = text[7:], True
            elif text.strip() and not self._explained:
                self.said = text
        with contextlib.suppress(OSError):  # a full disk must not stop the trainer's pipe
            self.file.write("".join(f"{stamp} {text}\n" for text in out).encode())
            self.file.flush()
        if self._mark is not None:
            _to_stdout((text.encode() for text in out), self._mark)


class Torchrun(Pump):
    """Several workers, on one node or on each of several: torchrun starts boot once for each, as
    `worker`."""

    def __init__(self, spec: Spec, given: dict[str, str], node: Optional[Node]) -> None:
        self.work = spec.work
        where = ["--standalone"]
        if node is not None:
            where = [
                "--nnodes", str(node.nodes), "--node-rank", str(node.rank),
                "--master-addr", node.address, "--master-port", str(node.port),
                # Its own patience is longer than ours: who gave up first can say why.
                "--rdzv-conf", f"timeout={round(spec.join) + 60}",
            ]  # fmt: skip
        command = [
            spec.python, "-m", "torch.distributed.run", *where, "--max-restarts", "0",
            "--nproc-per-node", str(spec.workers), spec.boot, "worker", str(spec.path),
        ]  # fmt: skip
        super().__init__(spec, command, given, "boot")

    def pids(self) -> set[int]:
        """The workers; before they live, torchrun is all there is to tell."""
        found = {json.loads(path.read_text())["pid"] for path in self.work.glob("worker-*.json")}
        return found or super().pids()

    def _write(self, lines: list[bytes]) -> None:
        """Workers log for themselves; what they passed on is for the standard output alone."""
        passed = [line for line in lines if line.startswith(_PASS_ON)]
        _to_stdout((line[len(_PASS_ON) :] for line in passed), b"")
        super()._write([line for line in lines if not line.startswith(_PASS_ON)])


def worker(spec: Spec) -> int:
    """One worker under torchrun: starts the trainer, writes its log and `exit-<rank>.json`."""
    _die_with_parent()
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(1))
    place = json.loads((spec.work / "place.json").read_text())
    spec.logs, spec.part = Path(place["logs"]), place["part"]
    rank, command = int(os.environ.get("RANK", 0)), trainer_command(spec)
    write_json(spec.work / f"worker-{rank}.json", {"pid": os.getpid()})
    mark = _PASS_ON + b"[worker %d] " % rank  # a service knows the node of a line, not the rank
    process = Pump(spec, command, dict(os.environ), f"worker-{rank}", mark)
    while process.child.poll() is None:
        if asked:
            process.terminate()
        time.sleep(POLL)
    code = process.finish()
    note_exit(spec, rank, code, process.said)
    # Whatever its options, torchrun kills the others 30 s after the first has left with a code:
    # where all were asked to leave, each stays until the last has saved.
    while asked and len([*spec.work.glob("exit-*")]) < len([*spec.work.glob("worker-*")]):
        time.sleep(POLL)
    return code


def trainer_command(spec: Spec) -> list[str]:
    """What a worker runs."""
    return spec.trainer("run", str(spec.work / "job.json"))


def note_place(spec: Spec) -> None:
    """`<work>/place.json`: what the workers cannot know from the specification."""
    write_json(spec.work / "place.json", {"logs": str(spec.logs), "part": spec.part})


def note_exit(spec: Spec, rank: int, code: int, error: str) -> None:
    write_json(spec.work / f"exit-{rank}.json", {"rank": rank, "code": code, "error": error})


def ends(spec: Spec) -> dict[str, dict[str, Any]]:
    """How each rank of this node ended, in their order."""
    found = [json.loads(path.read_text()) for path in spec.work.glob("exit-*.json")]
    return {str(end["rank"]): end for end in sorted(found, key=lambda end: int(end["rank"]))}


def verdict(
    ranks: Mapping[str, Mapping[str, Any]], workers: int, reason: str, killed: bool
) -> tuple[int, str]:
    """boot's exit code and why, from how each rank ended (`code`, `error`). `reason`: why they
    were asked to leave, if they were; `killed`: they did not, within the grace."""
    codes = [int(end["code"]) for end in ranks.values()]
    if len(codes) < workers:  # a worker left without a word
        codes.append(_KILLED if killed else _TERMINATED if reason else ERROR)
    code = worst(codes)
    # Terminated: it was asked before it could listen, and had nothing to save; its peers may have
    # stumbled over that.
    gently = code in (OK, AGAIN) or (code not in _WORST and _TERMINATED in codes)
    if reason and gently and not killed:
        if reason == STOPPED:
            return OK, reason
        return (AGAIN, reason) if code else (OK, "ended")
    if code == OK:
        return OK, "ended"
    if killed and code not in _WORST:
        return code, f"{reason}, and killed because it had not left in time"
    for rank, end in ranks.items():
        if end["code"] == code:
            return code, f"worker {rank}: {end['error'] or f'exit code {code}'}"
    return code, "a worker left without a word"


def worst(codes: list[int]) -> int:
    """The code that says most: 65, 64, 78, then any failure (1 first), then 75, then 0."""
    for code in _WORST:
        if code in codes:
            return code
    return min((code for code in codes if code not in (OK, AGAIN)), default=max(codes))


def _to_stdout(lines: Iterable[bytes], mark: bytes) -> None:
    """Whole lines; with a mark, in pieces that several writers of one pipe cannot mix."""
    most = _AT_ONCE - len(mark) - 1
    with contextlib.suppress(OSError):  # nobody reads it (any more)
        if not mark:
            data = b"".join(line + b"\n" for line in lines)
            while data:
                data = data[os.write(1, data) :]
            return
        for line in lines:
            for at in range(0, max(len(line), 1), most):
                os.write(1, mark + line[at : at + most] + b"\n")


#: Found before a fork: another thread may hold the loader's lock then.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """Linux: when the parent is killed, so is this process; nobody would watch it any more. The
    parent is the thread that started it, which has to live as long."""
    if _PRCTL is not None:
        _PRCTL(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
