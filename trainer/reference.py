"""What the model that a stage began with says of answers: the log-probs that preference is measured
against. They are computed once, before the first step, and kept in `reference.npz` of the stage's
folder, so that training needs no second model and a resumed run finds the same numbers.

An answer is found by a key of its own tokens and targets, as a teacher's are (teacher.py): packing,
order and the number of workers do not matter.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn

from trainer import parallel
from trainer.batch import IGNORE, Batch
from trainer.config import ConfigError
from trainer.data.stream import Rows
from trainer.evaluate import Left
from trainer.losses.linear import token_logprobs
from trainer.models import head_weight, hidden_states, reading
from trainer.runtime import Runtime
from trainer.step import cut, unless_out_of_memory
from trainer.store import atomic_write
from trainer.teacher import segments

NAME = "reference.npz"
#: Micro-batches of a rank between two looks at the others, and seconds between two saves.
_BLOCK, _SAVE_EVERY = 16, 60.0
_WHERE = "preference.reference"


@dataclass(frozen=True)
class Known:
    """The sum of an answer's log-probs (nats) by its key."""

    values: dict[int, float]

    def of(self, host: Batch) -> Tensor:
        """Those of the answers of a batch on the CPU, in order [answers], float64."""
        found = [self.values[segment.key] for segment in segments(host)]
        return torch.tensor(found, dtype=torch.float64)


def number_answers(batch: Batch) -> Tensor:
    """Tell the answers of a batch apart: the number of tokens of each [answers], float64, on the
    CPU. A segment of a row begins where positions do, and those without targets are no answers.
    `batch.extra` gets, on the device, `answer` [n], that of each supervised token, and `tokens`."""
    assert batch.host is not None, "call `to` first"
    segment = (batch.host.position_ids.flatten() == 0).cumsum(0)
    of_tokens = segment[batch.host.targets.flatten() != IGNORE]
    answer = torch.unique_consecutive(of_tokens, return_inverse=True)[1]
    tokens, device = torch.bincount(answer).double(), batch.input_ids.device
    batch.extra.update(answer=answer.to(device), tokens=tokens.to(device))
    return tokens


def answer_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the log-probs of each answer [answers], nats, differentiable. float64: margins are
    small differences of large sums. `number_answers` comes before."""
    logprobs = token_logprobs(hidden_states(model, batch), head_weight(model), batch.labels)
    sums = torch.zeros_like(batch.extra["tokens"])
    return sums.index_add(0, batch.extra["answer"], logprobs.double())


def without_adapter(model: Any, batch: Batch) -> Tensor:
    """`answer_logprobs` of the base of a model with an adapter, without gradients or dropout."""
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter(), reading(model):
            return answer_logprobs(model, batch)
    finally:
        for parameter, learned in learns:  # PEFT lets all of an adapter learn afterwards
            parameter.requires_grad_(learned)


def precompute(
    folder: Path,
    parts: Sequence[Rows],
    start: Callable[[], nn.Module],
    runtime: Runtime,
    *,
    about: dict[str, Any],
    micro_batch: int,
    say: Callable[[str], None],
    leave: Callable[[], bool] = lambda: False,
) -> Known:
    """The log-probs of all answers in `parts` by the model that `start` gives, which is called
    only where some are missing. Ranks share the rows; all must call it. What `folder` holds of the
    same `about` is kept, and what is found is saved there.

    Out of memory, a rank goes on with halves. Errors: `ConfigError`, on all ranks, when one row
    does not fit; `Left` when some rank was asked to `leave`: what was found until then is saved;
    `Leave` when a rank runs out of memory and the model is sharded."""
    path, wanted = folder / NAME, [_digest(rows) for rows in parts]
    # Nodes may have disks of their own: what counts is what the first rank has.
    found = runtime.gather(_load(path, about, say) if runtime.main else None)[0]
    values: dict[int, float] = found[0]
    if found[1] == wanted:
        say(f"reference: {len(values):,} answers, from {NAME}")
        return Known(values)
    everything = [(rows, index) for rows in parts for index in range(len(rows))]
    mine = [at for at in everything[runtime.rank :: runtime.world_size] if _lacks(values, *at)]
    began = saved = time.monotonic()
    say(f"reference: the starting model reads {len(everything):,} rows once")
    model, block, fitting = start(), micro_batch * _BLOCK, micro_batch

    def save(complete: bool) -> None:
        if runtime.main:
            _save(path, values, about, wanted if complete else [])

    for first in range(0, int(runtime.largest(float(len(mine)))), block):
        if runtime.any(leave())[0]:
            save(complete=False)
            raise Left
        here = mine[first : first + block]
        if parallel.is_sharded(model):
            fresh = _read_together(model, here, everything[0], runtime, fitting)
        else:
            fresh, fitting = _read(model, here, runtime, fitting, say)
        if runtime.any(fitting == 0)[0]:
            raise ConfigError(
                f"{_WHERE}: one row does not fit in the device's memory: lower"
                " data.sequence_length, or take a larger accelerator"
            )
        for part in runtime.gather(fresh):
            values.update(part)
        if time.monotonic() - saved > _SAVE_EVERY:
            save(complete=False)
            say(f"reference: {len(values):,} answers so far")
            saved = time.monotonic()
    save(complete=True)
    say(f"reference: {len(values):,} answers in {time.monotonic() - began:.1f} s, kept in {NAME}")
    return Known(values)


def _read(
    model: nn.Module,
    places: Sequence[tuple[Rows, int]],
    runtime: Runtime,
    fitting: int,
    say: Callable[[str], None],
) -> tuple[dict[int, float], int]:
    """The answers of these rows, and how many rows at a time fitted: 0, not even one."""
    found: dict[int, float] = {}
    size = fitting
    for first in range(0, len(places), size):
        waiting = list(_batches(places[first : first + size]))
        while waiting:
            waiting = cut(waiting, fitting)
            fresh = unless_out_of_memory(_batch, model, waiting[0], runtime)
            if fresh is not None:
                found.update(fresh)
                del waiting[0]
                continue
            runtime.release_memory()
            fitting = waiting[0].rows // 2
            if fitting == 0:
                return found, 0
            say(f"reference: out of memory: {fitting} rows at a time")
    return found, fitting


def _read_together(
    model: nn.Module,
    places: Sequence[tuple[Rows, int]],
    other: tuple[Rows, int],
    runtime: Runtime,
    size: int,
) -> dict[int, float]:
    """The answers of these rows, by a model of which each rank has a part: it runs equally often on
    every rank, in the end on the row `other`, whose answers are not kept."""
    parts = [places[i : i + size] for i in range(0, len(places), size)]
    waiting = [batch for part in parts for batch in _batches(part)]
    found: dict[int, float] = {}
    try:
        for turn in range(int(runtime.largest(float(len(waiting))))):
            mine = turn < len(waiting)
            batch = waiting[turn] if mine else next(_batches([other]))
            fresh = parallel.attempt(model, batch.rows, _batch, model, batch, runtime)
            if mine and fresh is not None:
                found.update(fresh)
    finally:
        parallel.settle(model)
    return found


def _batches(places: Sequence[tuple[Rows, int]]) -> Iterator[Batch]:
    """One batch for the rows of each source of rows."""
    for rows in dict.fromkeys(rows for rows, _ in places):
        yield rows.batch([index for owner, index in places if owner is rows])


def _batch(model: nn.Module, host: Batch, runtime: Runtime) -> dict[int, float]:
    batch = host.to(runtime.device)
    number_answers(batch)
    with reading(model), runtime.autocast():
        sums = answer_logprobs(model, batch).tolist()
    return dict(zip((segment.key for segment in segments(host)), sums))


def _lacks(values: dict[int, float], rows: Rows, index: int) -> bool:
    return not values or any(s.key not in values for s in segments(rows.batch([index])))


def _digest(rows: Rows) -> str:
    """Tells rows apart by every token and target in them."""
    digest = hashlib.sha256(rows.digest.encode())
    digest.update(rows.chunks.tokens.tobytes())
    if rows.chunks.learned is not None:
        digest.update(rows.chunks.learned.tobytes())
    return digest.hexdigest()


def _load(
    path: Path, about: dict[str, Any], say: Callable[[str], None]
) -> tuple[dict[int, float], Optional[list[str]]]:
    """What is kept of the same `about`, and the digests of the rows that it is complete for."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            if changed := [key for key in about if meta["about"].get(key) != about[key]]:
                say(f"reference: {NAME} is of another {', '.join(changed)}: computed again")
                return {}, None
            return dict(zip(file["keys"].tolist(), file["logprobs"].tolist())), meta["rows"]
    except FileNotFoundError:
        return {}, None
    except Exception as error:  # numpy and zipfile raise many kinds
        say(f"WARNING: {NAME} cannot be read ({error}): computed again")
        return {}, None


def _save(path: Path, values: dict[int, float], about: dict[str, Any], rows: list[str]) -> None:
    meta = np.frombuffer(json.dumps({"about": about, "rows": rows}).encode(), dtype=np.uint8)
    keys = np.fromiter(values.keys(), dtype=np.uint64, count=len(values))
    logprobs = np.fromiter(values.values(), dtype=np.float64, count=len(values))
    buffer = io.BytesIO()
    np.savez(buffer, meta=meta, keys=keys, logprobs=logprobs)
    atomic_write(path, buffer.getvalue())
