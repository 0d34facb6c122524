"""What two workers agree on, and one worker beside them; prints what happened as JSON. Run as a
script, like sharded_runs.py."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.trainer.sharded_runs import losses, run, stage, workers
from trainer import parallel
from trainer import runtime as runtimes
from trainer.checkpoint import Checkpoints
from trainer.config import Grpo, Source, Train
from trainer.models import head_weight
from trainer.optimizer import clip, make_optimizer, unscale

#: Seconds after which a worker counts as hanging; its result is then the number of the signal.
LIMIT = 60


class NoRoom(TorchFunctionMode):
    """The first buffer of at least so many bytes cannot be had; `sizes` of those asked for."""

    def __init__(self, fails: bool, least: int = 1) -> None:
        super().__init__()
        self.fails, self.least, self.sizes = fails, least, list[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = func is torch.empty and kwargs.get("dtype") is torch.uint8
        if wanted and isinstance(args[0], int) and args[0] >= self.least:
            self.sizes.append(args[0])
            if self.fails and len(self.sizes) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return func(*args, **kwargs)


class Parts(nn.Module):
    """Parameters that all rows use, the second row alone, and none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all, self.second = (nn.Linear(8, 4) for _ in range(2))
        self.none, self.last = nn.Linear(8, 4), nn.Linear(8, 4)

    def loss(self, rows: range) -> torch.Tensor:
        x = torch.linspace(-1, 1, 16).view(2, 8)
        total = x.new_zeros(())
        for row in rows:
            parts = [self.all, self.last] + ([self.second] if row == 1 else [])
            total = total + sum(part(x[row]).square().sum() for part in parts)
        return total


def after_two_steps(rows: range, process: runtimes.Runtime) -> dict[str, Any]:
    model = Parts()
    optimizer = make_optimizer(model, Train(steps=1, weight_decay=0.5, lr=0.1))
    norms = []
    for _ in range(2):
        model.loss(rows).backward()
        assert process.reduce_gradients(model.parameters())
        norms.append(unscale(model, 1.0))
        clip(model, norms[-1], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    values = {name: value.flatten().tolist() for name, value in model.named_parameters()}
    return {"values": values, "norms": [float(norm) for norm in norms]}


def without_a_gradient() -> dict[str, Any]:
    def act(rank: int) -> Any:
        with runtimes.start() as process:
            return after_two_steps(range(rank, rank + 1), process)

    start = {name: value.flatten().tolist() for name, value in Parts().named_parameters()}
    one = after_two_steps(range(2), runtimes.Runtime(torch.device("cpu"), "fp32"))
    return {"start": start, "one": one, "two": workers(2, act)}


class Sometimes(nn.Module):
    """An MLP beside which a row may use another layer, and no row ever a third one."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.before, self.second, self.none = before, nn.Linear(8, 8), nn.Linear(8, 8)
        self.busy = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.before(x)
        return found + self.second(x) if self.busy else found


def partly_used() -> Any:
    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2)
    )
    model.model.layers[1].mlp = Sometimes(model.model.layers[1].mlp)
    return model


def shared_without_a_gradient() -> dict[str, Any]:
    """As `without_a_gradient`, by workers that each have a part of the model."""

    def learn(model: Any, rows: range, process: runtimes.Runtime) -> dict[str, Any]:
        optimizer = make_optimizer(model, Train(steps=1, weight_decay=0.5, lr=0.1))
        norms = []
        for _ in range(2):
            for row in rows:
                model.model.layers[1].mlp.busy = row == 1
                ids = torch.arange(6).view(1, 6) + 5 * row
                if parallel.is_sharded(model):
                    hidden = getattr(model, parallel.DECODE)(input_ids=ids)
                else:
                    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
                (hidden @ head_weight(model).T).square().mean().backward()
            assert parallel.reduce_gradients(model, process)
            norms.append(float(unscale(model, 1.0)))
            optimizer.step()
            optimizer.zero_grad()
        found = dict(model.named_parameters())
        found = parallel.whole(model, found) if parallel.is_sharded(model) else found
        values = {name: value.flatten().tolist() for name, value in found.items()}
        return {"values": values, "norms": norms}

    def act(rank: int) -> Any:
        signal.alarm(LIMIT)
        with runtimes.start() as process:
            model = partly_used()
            parallel.shard(model, process)
            return learn(model, range(rank, rank + 1), process)

    start = {name: value.flatten().tolist() for name, value in partly_used().named_parameters()}
    one = learn(partly_used(), range(2), runtimes.Runtime(torch.device("cpu"), "fp32"))
    return {"start": start, "one": one, "two": workers(2, act)}


def without_room() -> list[Any]:
    """Buckets of 64 bytes; a matrix has 128. On the second worker there is no room at first."""

    def act(rank: int) -> Any:
        runtimes.BUCKET_BYTES = 64
        model = Parts()
        with runtimes.start() as process:
            model.loss(range(rank, rank + 1)).backward()
            held = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
            before = float(model.all.weight.grad.sum())
            with NoRoom(fails=rank == 1) as room:
                done = [process.reduce_gradients(model.parameters())]
                same = before == float(model.all.weight.grad.sum())
                done.append(process.reduce_gradients(model.parameters()))
        kept = {p.grad.data_ptr() for p in model.parameters() if p.grad is not None}
        total = float(model.all.weight.grad.sum())
        return {
            "done": done, "untouched": same, "in place": kept.issuperset(held),
            "sizes": room.sizes, "total": total, "before": before,
        }  # fmt: skip

    return workers(2, act)


def loop_without_room(out: Path, tokenizer: str, texts: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, fails in (("calm", False), ("split", True)):

        def act(rank: int, name: str = name, fails: bool = fails) -> Any:
            with NoRoom(fails=fails and rank == 1, least=100_000):
                return run(stage(out / f"room-{name}", tokenizer, texts, 2, until=3))

        said = workers(2, act)
        found[name] = {"said": said[0], "losses": losses(out / f"room-{name}")}
    return found


def failed_saves(out: Path, tokenizer: str, texts: str) -> dict[str, Any]:
    """Something that nothing expects goes wrong in the second save of one worker's thread."""
    import torch.distributed.checkpoint as dcp

    def writer(rank: int) -> None:
        class Broken(dcp.FileSystemWriter):  # type: ignore[misc,name-defined]
            def __init__(self, path: Any, **options: Any) -> None:
                if "tmp-step-4" in str(path):
                    raise RuntimeError("injected")
                super().__init__(path, **options)

        dcp.FileSystemWriter = Broken

    def opening(name: str, mode: str, error: Exception) -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            path, how = map(str, arguments[:2]) if event == "open" else ("", "")
            if "tmp-step-4" in path and path.endswith(name) and mode in how:
                raise error

        sys.addaudithook(hook)

    ways: dict[str, tuple[int, bool, Callable[[int], None]]] = {
        "before, 0": (0, True, writer),
        "before, 1": (1, True, writer),
        "digest, 1": (1, True, lambda _: opening("__1_0.distcp", "r", MemoryError())),
        "model, 0": (0, True, lambda _: opening("/config.json", "w", ValueError("injected"))),
        "plain, 0": (0, False, lambda _: opening("/config.json", "w", ValueError("injected"))),
    }
    found: dict[str, Any] = {}
    for name, (broken, sharded, breaks) in ways.items():

        def act(rank: int, name: str = name) -> Any:
            broken, sharded, breaks = ways[name]
            signal.alarm(LIMIT)
            if rank == broken:
                breaks(rank)
            return run(stage(out / name, tokenizer, texts, 2, save_every=2, sharded=sharded))

        results = workers(2, act)
        newest = Checkpoints(out / name / "checkpoints", keep=3).newest()
        found[name] = {"results": results, "newest": newest.name if newest else None}
    return found


def left_evaluation(out: Path, tokenizer: str, texts: str) -> dict[str, Any]:
    """The second worker is asked to leave in its first batch of the evaluation after step 2."""
    batches = 0

    def act(rank: int) -> Any:
        def before(module: Any, inputs: Any) -> None:
            nonlocal batches
            # The few tokens of the trial at the start are no evaluation.
            learning = torch.is_grad_enabled()
            if isinstance(module, nn.Embedding) and not learning and inputs[0].shape[1] > 16:
                batches += 1
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

        signal.alarm(LIMIT)
        nn.modules.module.register_module_forward_pre_hook(before)
        config = stage(out / "left", tokenizer, texts, 2, evaluate_every=2)
        held_out = replace(config.data, validation=config.data.train)
        return [run(replace(config, data=held_out)), batches]

    return {"results": workers(2, act), "losses": losses(out / "left")}


def own_disks(out: Path, tokenizer: str, texts: str) -> dict[str, Any]:
    """Two nodes, each with a folder of its own, go on from what a job of two has saved."""
    base = out / "base"
    workers(2, lambda rank: run(stage(base, tokenizer, texts, 2, save_every=2, until=4)))
    step = Path("checkpoints") / "step-4"

    def nothing(folders: list[Path]) -> None:
        pass

    def lacks(folders: list[Path]) -> None:
        shutil.rmtree(folders[1] / step)

    def damaged(folders: list[Path]) -> None:
        (folders[0] / step / "model.safetensors").write_bytes(b"")

    def another(folders: list[Path]) -> None:
        manifest = folders[1] / step / "MANIFEST.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text())))

    def empty(folders: list[Path]) -> None:
        shutil.rmtree(folders[1] / "checkpoints")

    ways = {"same": (nothing, False), "lacks": (lacks, False), "damaged": (damaged, False),
            "another": (another, False), "empty": (empty, False), "adopted": (nothing, True),
            "not adopted": (lacks, True)}  # fmt: skip
    found: dict[str, Any] = {}
    for name, (breaks, adopts) in ways.items():
        folders = [out / f"{name}-{rank}" for rank in range(2)]
        for folder in folders:
            shutil.copytree(base, folder)
        breaks(folders)

        def act(rank: int, folders: list[Path] = folders, adopts: bool = adopts) -> Any:
            signal.alarm(LIMIT)
            os.environ["LOCAL_RANK"] = "0"  # the only one of its node
            ours = folders[rank]
            given = {"resume": str(ours)} if adopts else {}
            ours = ours.with_name(f"{ours.name}-new") if adopts else ours
            return run(stage(ours, tokenizer, texts, 2, save_every=2, until=5, **given))

        results = workers(2, act)
        ours = [f.with_name(f"{f.name}-new") if adopts else f for f in folders]
        has = [(f / step).is_dir() for f in ours]
        found[name] = {"results": results, "losses": losses(ours[0]), "has": has}
    return found


def reinforced(out: Path, tokenizer: str, texts: str) -> dict[str, Any]:
    """Two workers that answer and are judged, paused between two steps on the same answers."""

    def plan(name: str, **train: Any) -> Any:
        plain = stage(out / f"reinforced-{name}", tokenizer, texts, 2, steps=4, **train)
        grpo = Grpo(rewards=("trainer.rewards:short",), group=3, max_new_tokens=5, iterations=2)
        data = replace(plain.data, train=(Source(builtin="digits"),))
        return replace(plain, stage="grpo", grpo=grpo, data=data)

    parts: list[tuple[str, dict[str, Any]]] = [
        ("whole", {}),
        ("parts", {"until": 3}),
        ("parts", {}),
    ]
    said = [workers(2, lambda rank, n=name, t=t: run(plan(n, **t))) for name, t in parts]
    found = {name: losses(out / f"reinforced-{name}") for name in ("whole", "parts")}
    sums = [hashes(out / f"reinforced-{name}" / "checkpoints" / "step-4") for name in found]
    return {"said": [lines[0] for lines in said], "losses": found, "weights": sums}


def hashes(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main(out: Path, tokenizer: str, texts: str) -> dict[str, Any]:
    scenarios: dict[str, Callable[[], Any]] = {
        "gradients": without_a_gradient,
        "shared gradients": shared_without_a_gradient,
        "room": without_room,
        "saves": lambda: failed_saves(out, tokenizer, texts),
        "left": lambda: left_evaluation(out, tokenizer, texts),
        "disks": lambda: own_disks(out, tokenizer, texts),
        "reinforced": lambda: reinforced(out, tokenizer, texts),
        "loop room": lambda: loop_without_room(out, tokenizer, texts),
    }
    return {name: scenario() for name, scenario in scenarios.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
