"""Several workers on this machine that save and resume; prints what happened as JSON.

Run as a script: one process imports torch and the rest, its children are forked as the workers of
one scenario after the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint  # here once, not in every worker
import transformers

from tests.trainer.disk import file_size_limit
from trainer import interrupts, runtime, stages
from trainer.checkpoint import Checkpoints, load_state
from trainer.config import Architecture, Data, Job, Model, Source, StageConfig, Train
from trainer.optimizer import make_optimizer
from trainer.shards import optimizer_state

#: Rows of a step, however many workers there are.
ROWS = 8


def stage(folder: Path, tokenizer: str, texts: str, workers: int, **train: Any) -> StageConfig:
    """Ten steps of a tiny model without dropout, the same training on any number of workers."""
    shape = Architecture(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64)
    settings = {"steps": 10, "micro_batch": ROWS // workers, "lr": 3e-3, "log_every": 1}
    settings.update(report_to=(), **train)
    return StageConfig(
        id="tiny",
        stage="pretrain",
        output=str(folder),
        model=Model(init="random", tokenizer=tokenizer, architecture=shape),
        data=Data(train=(Source(path=texts),), sequence_length=128),
        train=Train(**settings),
    )


def run(config: StageConfig) -> list[str]:
    """Run a stage as this worker; what it said."""
    lines: list[str] = []
    with interrupts.listening() as signalled, runtime.start() as process:
        job = Job(run="r", stages=(config,))
        stages.run_stage(config, job, process, lines.append, signalled)
    return lines


def workers(count: int, act: Callable[[int], Any]) -> list[Any]:
    """What `act(rank)` returns in each of `count` forked workers: plain data, `error: ...` for what
    it raised, or the number of the signal that killed it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    os.environ["WORLD_SIZE"] = str(count)
    started = []
    for rank in range(count):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            try:
                result = act(rank)
            except BaseException as error:
                result = f"error: {type(error).__name__}: {error}"
            with os.fdopen(writer, "w") as out:
                out.write(json.dumps(result))
            os._exit(0)
        os.close(writer)
        started.append((pid, reader))
    results = []
    for pid, reader in started:
        with os.fdopen(reader) as said:
            text = said.read()
        _, status = os.waitpid(pid, 0)
        results.append(os.WTERMSIG(status) if os.WIFSIGNALED(status) else json.loads(text))
    return results


def losses(folder: Path) -> list[float]:
    parts = sorted((folder / "metrics").glob("*.jsonl"))
    found = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    return [line["train_loss"] for line in found if line["kind"] == "step"]


def optimizer_digest(found: Path) -> str:
    """sha256 of all that the optimizer keeps, read as a resume would."""
    model = transformers.AutoModelForCausalLM.from_pretrained(found, dtype="float32")
    optimizer = make_optimizer(model, Train(steps=1))
    state = optimizer_state(found, load_state(found), model, optimizer)["state"]
    digest = hashlib.sha256()
    for number in sorted(state):
        for key in sorted(state[number]):
            value = state[number][key]
            digest.update(f"{number}{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def resumed(out: Path, tokenizer: str, texts: str, begin: Path, count: int, **train: Any) -> Any:
    """Go on with a copy of `begin` on `count` workers."""
    folder = out / f"{begin.name}-{count}"
    shutil.copytree(begin, folder)
    found = folder / "checkpoints" / "step-5"

    def act(rank: int) -> Any:
        digest = optimizer_digest(found)
        return [digest, run(stage(folder, tokenizer, texts, count, **train))]

    results = workers(count, act)
    return {
        "digests": [digest for digest, _ in results],
        "losses": losses(folder),
        "said": results[0][1],
    }


def killed(out: Path, tokenizer: str, texts: str, ranks: tuple[int, ...], name: str) -> Any:
    """Saves of two workers, `ranks` dying as they open the file `name` of the second one."""
    folder = out / f"killed-{ranks}"

    def act(own: int) -> Any:
        def die(event: str, arguments: tuple[Any, ...]) -> None:
            path = str(arguments[0]) if event == "open" else ""
            if "tmp-step-4" in path and path.endswith(name):
                os.kill(os.getpid(), signal.SIGKILL)

        if own in ranks:
            sys.addaudithook(die)
        return run(stage(folder, tokenizer, texts, 2, save_every=2, sharded=True))

    results = workers(2, act)
    newest = Checkpoints(folder / "checkpoints", keep=3).newest()
    return {"results": results, "newest": newest.name if newest else None}


def main(out: Path, tokenizer: str, texts: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def begun(name: str, count: int, **train: Any) -> Path:
        workers(count, lambda rank: run(stage(out / name, tokenizer, texts, count, **train)))
        return out / name

    found["whole"] = losses(begun("whole", 1))
    plain = begun("plain", 2, until=5, save_every=2, save_async=False)
    shards = begun("shards", 2, until=5, save_every=5, sharded=True)
    found["plain"] = optimizer_digest(plain / "checkpoints" / "step-5")
    state = shards / "checkpoints" / "step-5" / "state"
    found["files"] = {path.name: path.stat().st_size for path in state.iterdir()}
    context = (out, tokenizer, texts)
    found["shards to 1"] = resumed(*context, shards, 1)
    found["shards to 4"] = resumed(*context, shards, 4, sharded=True, save_async=False)
    found["plain to 2"] = resumed(*context, plain, 2, sharded=True)
    found["more rows"] = resumed(*context, plain, 1, micro_batch=16)

    found["killed 1"] = killed(*context, (1,), "__1_0.distcp")
    found["killed 0"] = killed(*context, (0,), ".metadata.tmp")
    found["killed both"] = killed(*context, (0, 1), ".distcp")

    def blind(rank: int) -> Any:
        return run(stage(out / f"own-{rank}", tokenizer, texts, 2, sharded=True))

    found["two folders"] = workers(2, blind)

    for sharded, writer in ((True, 1), (False, 0)):

        def full(rank: int, sharded: bool = sharded, writer: int = writer) -> Any:
            config = stage(
                out / f"full-{sharded}", tokenizer, texts, 2, save_every=2, sharded=sharded
            )
            with file_size_limit(30_000) if rank == writer else contextlib.nullcontext():
                return run(config)

        left = out / f"full-{sharded}" / "checkpoints"
        results = workers(2, full)
        found[f"full {sharded}"] = [results, sorted(path.name for path in left.iterdir())]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
