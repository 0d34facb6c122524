"""A teacher's pass over data: stage `targets`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor, nn

from trainer import copies
from trainer.batch import Batch
from trainer.config import ConfigError, Targets
from trainer.data import DataError
from trainer.data.stream import Rows
from trainer.guard import Guard, Retry
from trainer.losses.heads import head_for
from trainer.models import head_weight, hidden_states
from trainer.runtime import Runtime
from trainer.step import cut, unless_out_of_memory
from trainer.teacher import Answer, Shard, ShardWriter, segments, tokenizer_hash

#: Rows of a shard, the unit of what an interrupted stage need not do again.
SHARD_ROWS = 256
#: Bytes of one buffer of logits.
_BUFFER = 64 * 2**20
#: Bytes of an element -> whole numbers of that size; how many are added up at once.
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DIGESTED = 1 << 24


def write_targets(
    folder: Path,
    settings: Targets,
    rows: Rows,
    teacher: nn.Module,
    tokenizer: Any,
    runtime: Runtime,
    say: Callable[[str], None],
    dtype: DTypeLike = np.float16,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Store the teacher's answers for `rows` below `folder`, one shard after the other; ranks share
    them. Shards that are there already, for the same data, weights and settings, are kept. `stop`
    is asked before each shard. Returns the chunks, tokens and entries of this rank's shards, how
    many shards it kept, and how many it left undone."""
    count = -(-len(rows) // SHARD_ROWS)
    common = {
        "v": 1,
        "teacher": copies.origin(settings.teacher),  # the same on every machine
        "weights": weights_digest(teacher),
        "precision": runtime.precision,
        "tokenizer": tokenizer_hash(tokenizer),
        "vocabulary": min(len(tokenizer), len(teacher.get_output_embeddings().weight)),
        "sequence_length": rows.sequence_length,
        "temperature": settings.temperature,
        "sampler": settings.sampler,
        "top_k": settings.top_k if settings.sampler == "top_k" else None,
        "samples": settings.samples if settings.sampler == "sample" else None,
        "seed": settings.seed if settings.sampler == "sample" else None,
    }
    if runtime.main:
        for path in folder.glob("shard-*"):
            if path.name not in {_name(shard) for shard in range(count)}:
                shutil.rmtree(path)
    totals = dict.fromkeys(("chunks", "tokens", "entries", "kept", "left"), 0.0)
    for shard in range(runtime.rank, count, runtime.world_size):
        indices = range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, len(rows)))
        target = folder / _name(shard)
        meta = {**common, "data": _fingerprint(rows, indices)}
        done = _finished(target, meta)
        if stop():
            totals["left"] += 1
            continue
        if done is None:
            (target / "meta.json").unlink(missing_ok=True)
            counts = settings.sampler == "sample"
            writer = ShardWriter(target, meta, np.uint16 if counts else dtype)
            # Its own generator: a shard is the same whoever writes it, and when.
            generator = torch.Generator(runtime.device).manual_seed(
                settings.seed * 1_000_003 + shard
            )
            for first in range(0, len(indices), settings.micro_batch):
                waiting = [rows.batch(indices[first : first + settings.micro_batch])]
                while waiting:
                    drawn = generator.get_state()
                    found = unless_out_of_memory(
                        _one_batch, waiting[0], settings, teacher, runtime,
                        generator, common["vocabulary"],
                    )  # fmt: skip
                    if found is None:
                        generator.set_state(drawn)
                        waiting = _smaller(waiting, runtime, say)
                        continue
                    for key, answer in found:
                        writer.add(key, answer)
                    del waiting[0]
            done = writer.close()
            say(f"targets: shard {shard + 1}/{count}, {done['tokens']:,} tokens")
        else:
            totals["kept"] += 1
            say(f"targets: shard {shard + 1}/{count} is there already")
        for key in ("chunks", "tokens", "entries"):
            totals[key] += done[key]
    return totals


@torch.no_grad()  # type: ignore[untyped-decorator]
def _one_batch(
    host: Batch,
    settings: Targets,
    teacher: nn.Module,
    runtime: Runtime,
    generator: torch.Generator,
    vocabulary: int,
) -> list[tuple[int, Answer]]:
    """The chunks of a batch: their keys and the answers for them."""
    batch = host.to(runtime.device)
    with runtime.autocast():
        hidden = hidden_states(teacher, batch)
    answer = answers(hidden, head_weight(teacher)[:vocabulary], settings, generator)
    borders = np.cumsum(np.concatenate([[0], answer.counts]))
    found = []
    for segment in segments(host):
        entries = slice(int(borders[segment.begin]), int(borders[segment.end]))
        part = Answer(
            answer.counts[segment.begin : segment.end], answer.ids[entries], answer.p[entries]
        )
        found.append((segment.key, part))
    return found


def _smaller(waiting: list[Batch], runtime: Runtime, say: Callable[[str], None]) -> list[Batch]:
    """The same rows after an out-of-memory, the first batch in halves."""
    runtime.release_memory()
    tried = waiting[0].rows
    decision = Guard().out_of_memory(tried)
    if not isinstance(decision, Retry):
        raise ConfigError(
            "targets: one row does not fit in the device's memory: lower data.sequence_length, or"
            " take a larger accelerator"
        )
    say(f"targets: out of memory with {tried} rows: {decision.micro_batch} at a time")
    return [*cut(waiting[:1], decision.micro_batch), *waiting[1:]]


def answers(
    hidden: Tensor, weight: Tensor, settings: Targets, generator: torch.Generator
) -> Answer:
    """What softmax(hidden @ weight.T / T) gives for every row of hidden [n, H], with weight [V, H]:
    the `top_k` largest probabilities, largest first, or how often each token was drawn in
    `samples` independent draws (`p` then holds counts). Logits exist for a chunk of rows only."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    chunk = max(16, _BUFFER // (4 * len(weight)))
    head = head_for(hidden, weight, dtype, min(chunk, len(hidden)))
    counts, ids, values = [], [], []
    for first in range(0, len(hidden), chunk):
        rows = hidden[first : first + chunk]
        every = torch.ones_like(rows[:, :1], dtype=torch.bool)
        p = torch.softmax(head.logits(head.operand(rows, every)) / settings.temperature, dim=1)
        if settings.sampler == "top_k":
            top = p.topk(min(settings.top_k, p.shape[1]), dim=1)
            counts.append(np.full(len(p), top.values.shape[1]))
            ids.append(top.indices.cpu().numpy().ravel())
            values.append(top.values.cpu().numpy().ravel())
            continue
        drawn = draw(p, settings.samples, generator)
        row = torch.arange(len(p), device=p.device).unsqueeze(1)
        distinct, often = torch.unique(row * p.shape[1] + drawn, return_counts=True)
        flat = distinct.cpu().numpy()
        counts.append(np.bincount(flat // p.shape[1], minlength=len(p)))
        ids.append(flat % p.shape[1])
        values.append(often.cpu().numpy())
    return Answer(*(np.concatenate(parts) for parts in (counts, ids, values)))


def draw(p: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Token ids [n, samples] from distributions p [n, V]: each token comes samples * p times on
    average, and never a whole time more or less. Systematic sampling (Madow and Madow 1944): evenly
    spaced points, from one uniform draw a row, on the sums of p. Unbiased as independent draws are,
    with less variance: only what p leaves of a whole time is left to chance."""
    sums = p.double().cumsum(dim=1)
    first = torch.rand(len(p), 1, generator=generator, dtype=torch.float64, device=p.device)
    points = (first + torch.arange(samples, device=p.device)) * (sums[:, -1:] / samples)
    # What rounding puts at the very end still belongs to the last token that has a share.
    return torch.searchsorted(sums, points, right=True).clamp_(max=p.shape[1] - 1)


def weights_digest(model: nn.Module) -> str:
    """Tells weights apart, whatever they are called and wherever they come from. The bits of every
    parameter are added up as whole numbers: exact, so equal on any device, and quick there."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        bits = parameter.detach().contiguous().view(_WHOLE[parameter.element_size()]).flatten()
        # In parts: the sum converts what it adds to 8 bytes each.
        sums = torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_DIGESTED)])
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)} {sums.tolist()};".encode())
    return digest.hexdigest()


def _name(shard: int) -> str:
    return f"shard-{shard:05d}"


def _fingerprint(rows: Rows, indices: range) -> str:
    digest = hashlib.sha256()
    for index in indices:
        for segment in segments(rows.batch([index])):
            digest.update(segment.key.to_bytes(8, "little"))
    return digest.hexdigest()


def _finished(folder: Path, meta: dict[str, Any]) -> Any:
    """The meta data of a whole shard that was made for `meta`, else None. A copy of one, brought
    from a store, may lack arrays."""
    try:
        found = json.loads((folder / "meta.json").read_text())
        if {key: found.get(key) for key in meta} != meta:
            return None
        Shard(folder)
    except (OSError, json.JSONDecodeError, DataError):
        return None
    return found
