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
from trainer.config import (
    Architecture,
    Data,
    Distill,
    KeepLogits,
    Model,
    Preference,
    Sdce,
    Source,
    Targets,
)
from trainer.data.chat import view_of
from trainer.data.pairs import build_pairs
from trainer.data.stream import Rows, Stream, build_rows
from trainer.data.tokenizer import train_tokenizer
from trainer.models import load_model, load_tokenizer
from trainer.objectives.distill import DistillOnline
from trainer.objectives.distill_stored import DistillStored
from trainer.objectives.keep_logits import StayNear
from trainer.objectives.next_token import NextToken
from trainer.objectives.preference import Prefer
from trainer.objectives.sdce import SurrogateGuided
from trainer.reference import precompute
from trainer.runtime import Runtime
from trainer.step import backward, normalisers, prepare
from trainer.surrogate import Surrogate, Vocabularies
from trainer.teacher import StoredAnswers
from trainer.teacher_pass import write_targets

CPU = Runtime(torch.device("cpu"), "fp32")


def model(tokenizer: str, dtype: torch.dtype, seed: int, hidden: int = 32) -> Any:
    architecture = Architecture(hidden_size=hidden, layers=2, heads=4, kv_heads=2)
    plan = Model(init="random", tokenizer=tokenizer, architecture=architecture)
    return load_model(plan, load_tokenizer(tokenizer), CPU, seed).to(dtype)


def gpt_oss(dtype: torch.dtype, seed: int) -> Any:
    """A small model in which the documents of a row see each other."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    # Grouped products have no float64.
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype)


def pairs(tokenizer: str, texts: str, packing: bool) -> Rows:
    """Pairs of answers cut out of the texts: of each its second and its last part."""
    lines = []
    for line in Path(texts).read_text().splitlines():
        text = json.loads(line)["text"]
        one, two = len(text) // 4, len(text) // 2
        parts = {"prompt": text[:one], "chosen": text[one:two], "rejected": text[two:]}
        lines.append(json.dumps(parts) + "\n")
    path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    path.write_text("".join(lines))
    tokens = load_tokenizer(tokenizer)
    view = view_of(Data(), "dpo", tokens)
    sources = (Source(path=str(path)),)
    return build_pairs(sources, tokens, sequence_length=192, packing=packing, view=view)


def prefer(kind: Any, reference: Any, data: Rows, runtime: Runtime) -> Prefer:
    """The objective, with the answers of `reference`."""
    folder = Path(tempfile.mkdtemp())
    known = precompute(
        folder, [data], lambda: reference, runtime, about={}, micro_batch=3, say=lambda line: None
    )
    return Prefer(kind, Preference(beta=0.3, sft_weight=0.2), runtime, known)


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
    preferred, grows = name in ("dpo", "ipo", *APART), name in grpo_cases.NORMALISE
    if grows:
        data = grpo_cases.prompts(tokenizer, texts)
    else:
        data = (pairs if preferred else rows)(tokenizer, texts, packing and name not in APART)
    data.apart = name in APART
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
    student, other = (
        gpt_oss(dtype, seed) if "gpt_oss" in name else model(tokenizer, dtype, seed)
        for seed in (1, 2)
    )
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
    if preferred:
        objective = prefer(name[:3], other, data, runtime)
    if name in GUIDED:
        objective = guided(GUIDED[name], tokenizer, texts, dtype, runtime)
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


#: Both answers of a pair in one row of the stream, each in a row of its own for the model.
APART = ("ipo apart", "ipo gpt_oss")
#: Of a surrogate that has learned nothing, and so holds all of its 300 tokens about alike.
GUIDED = {
    "soft": Sdce("s", form="soft", k=8, threshold=0.0035, weight=0.7),
    "parity": Sdce("s", form="parity", k=8, threshold=0.0035, weight=0.7),
    "kl": Sdce("s", loss="kl", weight=0.7),
}


def guided(
    config: Sdce, tokenizer: str, texts: str, dtype: torch.dtype, runtime: Runtime = CPU
) -> SurrogateGuided:
    """With a surrogate whose tokenizer was trained on `texts`; with `kl`, the model's own."""
    own = tokenizer
    if config.loss != "kl":
        own = tempfile.mkdtemp()
        train_tokenizer([Path(texts).read_text()], 300, 2, own)
    words = Vocabularies(load_tokenizer(tokenizer), load_tokenizer(own))
    return SurrogateGuided(config, Surrogate(model(own, dtype, 2, hidden=64), words, runtime))


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


#: What two ranks are asked for.
TWO_RANKS = ("next_token", "distill", "top_k", "dpo", "ipo gpt_oss", "soft", "parity", "grpo")


def main(tokenizer: str, texts: str, out: str) -> None:
    with runtimes.start() as runtime:
        for dtype in (torch.float64, torch.float32):
            for name in TWO_RANKS:
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
