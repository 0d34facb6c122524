"""The smoke test: does this machine, and this process group, train at all?

It names the device, checks and times an all-reduce, then trains a small network on separable data
with the runtime that every stage uses. What is wrong is said in words, with what to do about it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import ConfigError, FieldErrors, Smoke
from trainer.runtime import Runtime

FAILED = 6  # exit code
#: What is reduced to measure the bandwidth, in bytes.
_MESSAGE = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
_TIMED = 5
_MARGIN = 4.0  # distance of a class from the origin, in standard deviations of its samples
_WIDTH = 64


class SmokeFailed(RuntimeError):
    """The test ran and found something wrong; the message says what to do (exit code 6)."""


class GroupError(RuntimeError):
    """The processes cannot find each other, or their devices (exit code 78)."""


@dataclass(frozen=True)
class Report:
    """Mean cross-entropy of all samples before and after training, in nat; `bandwidth` of the
    all-reduce in GB/s, None with one process."""

    first: float
    last: float
    steps: int
    seconds: float
    bandwidth: Optional[float]


def parse(arguments: Sequence[str]) -> Smoke:
    """The flags of `python -m trainer smoke`. Errors: `ConfigError`, one line a problem."""
    parser = _Parser(prog="python -m trainer smoke", description=__doc__, allow_abbrev=False)
    for field in dataclasses.fields(Smoke):
        default: Any = field.default
        parser.add_argument(
            f"--{field.name}", type=type(default), default=default, help=f"default: {default}"
        )
    given = vars(parser.parse_args(arguments))
    try:
        return Smoke(**given)
    except FieldErrors as error:
        raise ConfigError("\n".join(f"--{name}: {what}" for name, what in error.problems)) from None


def preflight(environ: Mapping[str, str]) -> None:
    """What would make the process group fail, found before it is asked for. Errors: `GroupError`;
    `ConfigError` for variables that are no numbers."""
    world = _number(environ, "WORLD_SIZE", 1)
    rank = _number(environ, "RANK", 0)
    local = _number(environ, "LOCAL_RANK", 0)
    if world > 1:
        lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if lacking:
            raise GroupError(
                f"WORLD_SIZE is {world}, but {', '.join(lacking)} is not set: start the processes"
                " with torchrun, which sets all of them, or unset WORLD_SIZE to test one process"
            )
    if not 0 <= rank < world:
        raise GroupError(f"RANK is {rank} of WORLD_SIZE {world}: ranks count from 0; use torchrun")
    if not torch.cuda.is_available():
        return
    devices = torch.cuda.device_count()
    if local >= devices:
        raise GroupError(
            f"LOCAL_RANK is {local}, but this node shows {devices} GPU(s): start as many workers as"
            " GPUs (torchrun --nproc-per-node), or ask for more (resources.limits nvidia.com/gpu);"
            " CUDA_VISIBLE_DEVICES may hide some"
        )
    if world > 1 and not dist.is_nccl_available():
        raise GroupError("this torch has no NCCL: install the CUDA build of torch for Linux")


def run(config: Smoke, runtime: Runtime, say: Callable[[str], None]) -> Report:
    """The whole test; every rank calls it. Errors: `ConfigError` when there are fewer samples than
    processes; `SmokeFailed`."""
    if config.samples < runtime.world_size:
        raise ConfigError(
            f"smoke.samples: {config.samples} for {runtime.world_size} processes; give each one"
        )
    for line in _describe(runtime):
        say(line)
    bandwidth = _all_reduce(runtime, say)
    started = time.perf_counter()
    first, last, steps = _train(config, runtime, say)
    seconds = time.perf_counter() - started
    say(f"loss {first:.4f} -> {last:.4f} in {steps} steps, {seconds:.1f} s")
    if not (math.isfinite(last) and last < first):
        raise SmokeFailed(
            f"the loss did not fall ({first:.4f} -> {last:.4f}): with the default flags the data is"
            f" easy, so either --lr {config.lr:g} does not suit it, or the device computes wrongly:"
            " try the defaults; if they fail too, take another machine"
        )
    say(f"smoke test passed on {runtime.world_size} process(es)")
    return Report(first, last, steps, seconds, bandwidth)


class _Parser(argparse.ArgumentParser):
    """argparse exits with 2; here a bad flag is a configuration like any other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(environ.get(name, default))
    except ValueError:
        raise ConfigError(f"{name}={environ[name]}: expected a whole number") from None


def _describe(runtime: Runtime) -> list[str]:
    """The device and the backend, and why there is no GPU where one seems to be."""
    cuda = runtime.device.type == "cuda"
    backend = dist.get_backend() if runtime.world_size > 1 else "none (one process)"
    name = torch.cuda.get_device_name(runtime.device) if cuda else "CPU"
    lines = [
        f"device {name} x {runtime.world_size}, torch {torch.__version__}, backend {backend}"
        + (f", CUDA {torch.version.cuda}" if cuda else f", {torch.get_num_threads()} thread(s)")
    ]
    # Collective: what rank 0 sees of its own node would hide that another node differs.
    kinds = sorted(set(runtime.gather(name)))
    if len(kinds) > 1:
        lines.append(f"warning: unequal devices: {', '.join(kinds)}; the slowest sets the pace")
    if not cuda and Path("/proc/driver/nvidia/version").exists():
        lines.append(f"warning: this machine has an NVIDIA driver, but {_no_gpu()}")
    return lines


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install its CUDA build"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides its GPUs: unset it"
    return (
        f"CUDA {torch.version.cuda} of torch finds no GPU: ask for one (in Kubernetes"
        " resources.limits nvidia.com/gpu), or update the driver (nvidia-smi shows its CUDA)"
    )


def _all_reduce(runtime: Runtime, say: Callable[[str], None]) -> Optional[float]:
    """Check an all-reduce exactly, then time it. Bus bandwidth as nccl-tests define it: an
    all-reduce moves 2 (n - 1) / n of its bytes over every link."""
    n = runtime.world_size
    if n == 1:
        say("all-reduce: one process, nothing to reduce")
        return None
    size = _MESSAGE[runtime.device.type]
    # Small whole numbers: their sum is exact, in any order.
    pattern = torch.arange(size // 4, device=runtime.device).remainder_(251).float()
    message = pattern * (runtime.rank + 1)
    dist.all_reduce(message)
    right = bool(torch.equal(message, pattern * (n * (n + 1) // 2)))
    wrong = [rank for rank, is_right in enumerate(runtime.gather(right)) if not is_right]
    if wrong:
        raise SmokeFailed(
            f"all-reduce gave a wrong sum on rank {', '.join(map(str, wrong))}: do not train here;"
            " with NCCL try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 to find the faulty path"
        )
    message.zero_()  # sums of sums would overflow
    _finish(runtime)
    started = time.perf_counter()
    for _ in range(_TIMED):
        dist.all_reduce(message)
    _finish(runtime)
    seconds = runtime.largest((time.perf_counter() - started) / _TIMED)
    bandwidth = 2 * (n - 1) / n * size / seconds / 1e9
    say(f"all-reduce: right on {n} processes; {size >> 20} MiB at {bandwidth:.2f} GB/s (bus)")
    return bandwidth


def _finish(runtime: Runtime) -> None:
    runtime.finish()
    runtime.barrier()


def _train(config: Smoke, runtime: Runtime, say: Callable[[str], None]) -> tuple[float, float, int]:
    """The loss before and after, and the steps."""
    generator = torch.Generator().manual_seed(config.seed)
    inputs, labels = _samples(config, generator)
    # Every rank has the same number of samples, so that all of them take equally many steps.
    share = config.samples // runtime.world_size
    torch.manual_seed(config.seed)
    model = nn.Sequential(
        nn.Linear(config.features, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, config.classes)
    ).to(runtime.device)
    runtime.broadcast(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    first = _mean_loss(model, inputs, labels, runtime)
    steps = 0
    for epoch in range(config.epochs):
        order = torch.randperm(config.samples, generator=generator)
        mine = order[runtime.rank * share : (runtime.rank + 1) * share]
        for part in mine.split(config.batch):
            x, y = inputs[part].to(runtime.device), labels[part].to(runtime.device)
            loss = nn.functional.cross_entropy(model(x), y) / runtime.world_size
            loss.backward()
            if not runtime.reduce_gradients(model.parameters()):
                raise SmokeFailed("a process has no memory for 64 MiB: end what else runs there")
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        now = _mean_loss(model, inputs, labels, runtime)
        say(f"epoch {epoch + 1}/{config.epochs}  loss {now:.4f}")
    _same_everywhere(model, runtime)
    return first, now, steps


def _samples(config: Smoke, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs [samples, features] and labels [samples]: unit noise around one centre per class."""
    centres = torch.randn(config.classes, config.features, generator=generator)
    centres = _MARGIN * nn.functional.normalize(centres, dim=1)
    labels = torch.randint(config.classes, (config.samples,), generator=generator)
    noise = torch.randn(config.samples, config.features, generator=generator)
    return centres[labels] + noise, labels


def _mean_loss(model: nn.Module, inputs: Tensor, labels: Tensor, runtime: Runtime) -> float:
    """Over all samples, each rank its part."""
    x, y = (t[runtime.rank :: runtime.world_size].to(runtime.device) for t in (inputs, labels))
    with torch.no_grad():
        total = nn.functional.cross_entropy(model(x), y, reduction="sum")
    return float(runtime.all_sum({"loss": total})["loss"]) / len(inputs)


def _same_everywhere(model: nn.Module, runtime: Runtime) -> None:
    """Replicas that saw the same gradients hold the same weights, to the last bit."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()
    sums = runtime.gather([float(weights.double().sum()), float(weights.double().square().sum())])
    # As text: NaN, which the loss will report, equals itself there.
    apart = [rank for rank, value in enumerate(sums) if str(value) != str(sums[0])]
    if apart:
        raise SmokeFailed(
            f"after training, the weights of rank {', '.join(map(str, apart))} differ from those of"
            " rank 0: gradients were not reduced alike; do not train here"
        )
