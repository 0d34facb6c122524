"""Runs jobs of the trainer in forked processes, with a fault on one rank. As a script: torch is
imported once; each line of stdin, {"job", "ranks", "fault", "log"}, is answered with the exit codes
of the ranks. Faults come through torch's own hooks, on the calls of an embedding: the first module
of a forward pass, and the only one that is given token ids.

A process that hangs is ended by its alarm clock, and shows as the code -14.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Optional

#: Seconds after which a process counts as hanging.
LIMIT = 60


class Faults:
    """The script, as a process to be asked."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.faults"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ,
        )  # fmt: skip

    def run(self, job: Path, ranks: int, fault: Optional[dict[str, Any]], log: Path) -> list[int]:
        """The exit code of every rank; what they wrote is in `log`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        asked = {"job": str(job), "ranks": ranks, "fault": fault, "log": str(log)}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        codes: list[int] = json.loads(self.process.stdout.readline())
        return codes

    def close(self) -> None:
        self.process.communicate(timeout=LIMIT)


def inject(kind: str, *, hidden: int, learning: bool, calls: list[int], rows: int = 0) -> None:
    """`calls`: which passes of the model of size `hidden` go wrong, counted from 0, in training
    (`learning`) or else in passes without gradients, the trial of the model at the start of a stage
    not among them; empty: all. `rows`: that many still fit."""
    import torch
    from torch import nn

    from trainer.trial import LENGTH

    count = -1

    def concerned(module: Any, inputs: Any) -> bool:
        alike = isinstance(module, nn.Embedding) and module.embedding_dim == hidden
        return alike and torch.is_grad_enabled() == learning and inputs[0].shape[1] > 2 * LENGTH

    def before(module: Any, inputs: Any) -> None:
        nonlocal count
        if not concerned(module, inputs):
            return
        count += 1
        now = not calls or count in calls
        if kind == "oom" and now and inputs[0].shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        if kind == "term" and now:
            os.kill(os.getpid(), signal.SIGTERM)

    def after(module: Any, inputs: Any, output: Any) -> Any:
        if concerned(module, inputs) and count in calls:
            if kind == "nan":
                return output * float("nan")
            if kind == "overflow":
                output.register_hook(lambda gradient: gradient * float("inf"))
        return None

    nn.modules.module.register_module_forward_pre_hook(before)
    nn.modules.module.register_module_forward_hook(after)


def starve(whole: list[int], host: bool = False) -> None:
    """Of the tensors of which each rank has a part, those that are gathered with these numbers,
    from 0, find no memory on the device, or on the host."""
    import torch
    from torch.distributed.tensor import DTensor

    full_tensor, count = DTensor.full_tensor, -1

    def gather(tensor: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count in whole and host:
            raise RuntimeError("not enough memory (injected)")
        if count in whole:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return full_tensor(tensor, **options)

    DTensor.full_tensor = gather


def undo(steps: list[int]) -> None:
    """Take the updates of these steps, counted from 0, back as a whole."""
    import torch
    from torch.optim import optimizer as optimizers

    kept: list[Any] = []
    count = -1

    def before(optimizer: Any, *_: Any) -> None:
        nonlocal count
        count += 1
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
        kept[:] = [(p, p.detach().clone(), state) for p, state in zip(parameters, states)]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def after(optimizer: Any, *_: Any) -> None:
        for parameter, value, state in kept if count in steps else []:
            parameter.copy_(value)
            for name, old in state.items():
                optimizer.state[parameter][name].copy_(old)

    optimizers.register_optimizer_step_pre_hook(before)
    optimizers.register_optimizer_step_post_hook(after)


def answer(asked: dict[str, Any]) -> list[int]:
    """Fork the ranks of a job and wait for all of them."""
    _import_for(json.loads(Path(asked["job"]).read_text()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(asked["ranks"]):
        child = os.fork()
        if child == 0:
            _be_rank(rank, port, asked)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _import_for(job: dict[str, Any]) -> None:
    """What the ranks will need, once and not in each of them."""
    for stage in job["stages"]:
        if (stage.get("train") or {}).get("parallel") == "fsdp":
            import torch.distributed.checkpoint
            import torch.distributed.fsdp
            import torch.distributed.tensor  # noqa: F401
        if (stage.get("model") or {}).get("adapter"):
            import peft  # noqa: F401


def _be_rank(rank: int, port: int, asked: dict[str, Any]) -> None:
    """This process from here on; it does not return."""
    code = 1
    try:
        signal.alarm(LIMIT)
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(asked["ranks"]),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        from trainer import __main__

        fault = asked["fault"] or {}
        if "undo" in fault:
            undo(fault["undo"])
        elif fault and rank == asked["ranks"] - 1:
            starve(**fault) if "whole" in fault else inject(**fault)
        code = __main__.main(["run", asked["job"]])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from trainer import stages  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()
