"""The gradient of one global batch, cut in different ways; torchrun runs this for two ranks."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import torch

from tests.trainer import grpo_cases
from trainer import runtime as runtimes
from trainer.config import Architecture, Distill, KeepLogits, Model, Source, Targets
from trainer.data.stream import Rows, Stream, build_rows
from trainer.models import load_model, load_tokenizer
from trainer.objectives.distill import DistillOnline
from trainer.objectives.distill_stored import DistillStored
from trainer.objectives.keep_logits import StayNear
from trainer.objectives.next_token import NextToken
from trainer.runtime import Runtime
from trainer.step import backward, normalisers, prepare
from trainer.teacher import StoredAnswers
from trainer.teacher_pass import write_targets

CPU = Runtime(torch.device("cpu"), "fp32")


def model(tokenizer: str, dtype: torch.dtype, seed: int, hidden: int = 32) -> Any:
    architecture = Architecture(hidden_size=hidden, layers=2, heads=4, kv_heads=2)
    plan = Model(init="random", tokenizer=tokenizer, architecture=architecture)
    return load_model(plan, load_tokenizer(tokenizer), CPU, seed).to(dtype)


def rows(tokenizer: str, texts: str, packing: bool) -> Rows:
    sources = (Source(path=texts),)
    return build_rows(sources, load_tokenizer(tokenizer), sequence_length=128, packing=packing)


def of(
    name: str,
    tokenizer: str,
    texts: str,
    dtype: torch.dtype,
    *,
    micro_batch: Optional[int],
    accumulate: int = 1,
    packing: bool = True,
    resized: Optional[int] = None,
    wrong: bool = False,
    runtime: Runtime = CPU,
    scale: float = 1.0,
) -> torch.Tensor:
    """The flat gradient, with `scale` taken out again. `micro_batch` None: all rows at once.
    `wrong`: mean of means."""
    grows = name in grpo_cases.NORMALISE
    data = grpo_cases.prompts(tokenizer, texts) if grows else rows(tokenizer, texts, packing)
    stream = Stream(
        data,
        micro_batch=micro_batch or len(data),
        accumulate=accumulate,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=0,
    )
    if resized:
        stream.resize(resized)
    student = model(tokenizer, dtype, seed=1)
    objective: Any = NextToken()
    if name == "distill":
        teacher = model(tokenizer, dtype, seed=2, hidden=64)
        objective = DistillOnline(Distill("t", temperature=2.0, alpha=0.3), teacher, runtime)
    if name == "kept":
        teacher, start = (model(tokenizer, dtype, seed=s, hidden=h) for s, h in ((2, 64), (3, 32)))
        keep = StayNear(KeepLogits(weight=0.5), start, runtime)
        objective = DistillOnline(Distill("t", temperature=2.0, alpha=0.3), teacher, runtime, keep)
    if name in ("top_k", "sample"):
        objective = stored(tokenizer, data, dtype, runtime, sampler=name, top_k=8)
    if grows:
        others = [model(tokenizer, dtype, seed=seed) for seed in (2, 3)]
        normalise = grpo_cases.NORMALISE[name]
        objective = grpo_cases.objective(*others, runtime, packing, normalise=normalise)
    group = stream.next_group()
    batches = prepare(objective, group, runtime, 0)
    norm = normalisers(batches, runtime)
    if wrong:
        for batch in batches:
            own = {term: weight * len(batches) for term, weight in batch.weights.items()}
            backward(student, objective, [batch], own, runtime)
    else:
        backward(student, objective, batches, norm, runtime, scale=scale)
    runtime.reduce_gradients(student.parameters())
    return torch.cat([p.grad.flatten().double() / scale for p in student.parameters()])


def stored(
    tokenizer: str,
    data: Rows,
    dtype: torch.dtype,
    runtime: Runtime = CPU,
    *,
    alpha: float = 0.3,
    values: Any = "float64",
    **settings: Any,
) -> DistillStored:
    """The objective on the stored answers of the teacher of `of`, for the rows `data`."""
    tokens, folder = load_tokenizer(tokenizer), tempfile.mkdtemp()
    teacher = model(tokenizer, dtype, seed=2, hidden=64).eval()
    plan = Targets("t", temperature=2.0, **settings)
    write_targets(Path(folder), plan, data, teacher, tokens, CPU, lambda line: None, dtype=values)
    kd = Distill(mode="precompute", targets=folder, temperature=2.0, alpha=alpha)
    return DistillStored(kd, StoredAnswers(folder, tokens, 2.0), runtime)


def main(tokenizer: str, texts: str, out: str) -> None:
    with runtimes.start() as runtime:
        for dtype in (torch.float64, torch.float32):
            for name in ("next_token", "distill", "top_k", "grpo"):
                gradient = of(
                    name, tokenizer, texts, dtype, micro_batch=1, accumulate=4, runtime=runtime
                )
                torch.save(gradient, Path(out) / f"{name}-{dtype}-{runtime.rank}.pt")
        flags = runtime.any(runtime.rank == 1, False)
        facts = {"any": flags, "largest": runtime.largest(float(runtime.rank))}
        (Path(out) / f"flags-{runtime.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
    runtimes.leave(0)
