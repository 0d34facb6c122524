"""A trial of a loaded model, at the start of a stage: what we ask of models, and what architectures
break without an error, is tried with a few tokens on the model itself.

Three things are asked. Documents that share a row must not see each other: recurrent and
convolution layers know no position ids, and some models build their masks without them. The logits
must be the product of the last hidden states and the output embedding: the losses compute them so,
and a model that scales or caps its logits would be given wrong ones. And whatever attention runs on
must give what eager attention gives: a kernel may pass over what a model asks for (sinks, a cap, a
scale) without a word. A window is not tried: documents of the trial are shorter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer import float8, parallel
from trainer.attention import kind_of, needs_16_bits
from trainer.batch import Batch
from trainer.config import ConfigError
from trainer.models import head_weight, hidden_states
from trainer.runtime import Runtime

#: Tokens of a document of the trial.
LENGTH = 8
#: Relative differences of hidden states that rounding explains, with a margin: in 16 bits that of
#: 80 layers, or of a token that goes to another expert. In a trained model a document that sees
#: another is off by about 1, in a fresh one (fp32) by down to 4e-4: its layers hardly matter yet.
APART = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.1}
#: The same without packing, where only flash-attn's flat row can mix: convolutions may run in TF32.
APART_UNPACKED = 0.1
#: Differences of logits, relative to the largest.
RESCALED = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
#: The trial's logits are raised to this size: a cap leaves small ones nearly as they are.
_LARGE = 1000.0


def check(model: nn.Module, runtime: Runtime, name: str, *, packing: bool) -> None:
    """Errors: `ConfigError` when `model` (called `name` there) rescales its logits, gets another
    result from its attention than from eager attention, or lets the documents of a row see each
    other, or without `packing` those of other rows. The model, its mode and the random states are
    as before."""
    with _undisturbed(model, runtime.device):
        dtype = torch.float32 if _exact(model, runtime) else runtime.dtype
        off = logits_off(model, runtime)
        if off > RESCALED[dtype]:
            raise ConfigError(
                f"'{name}' rescales its logits: they differ by {off:.1g} from hidden states times"
                " output embedding, which the losses compute; not supported"
            )
        apart = from_eager(model, runtime)
        if apart > APART[dtype]:
            raise ConfigError(
                f"'{name}': attention on {kind_of(model)} is not what the model means (a hidden"
                f" state differs by {apart:.1g} from that of eager attention); set model.attention:"
                " eager"
            )
        seen = leak(model, runtime, packing=packing)
        if seen <= (APART[dtype] if packing else APART_UNPACKED):
            return
    if packing:
        raise ConfigError(
            f"'{name}': in packed rows its documents would see each other (a hidden state differs"
            f" by {seen:.1g} from that of the document alone); set data.packing: false"
        )
    raise ConfigError(
        f"'{name}': its rows would see each other, or their padding (a hidden state differs by"
        f" {seen:.1g} from that of the document alone); set model.attention: sdpa, or eager"
    )


def may_share_rows(model: nn.Module, runtime: Runtime) -> bool:
    """Whether the documents of a row do not see each other in `model`. All ranks must call it."""
    with _undisturbed(model, runtime.device):
        dtype = torch.float32 if _exact(model, runtime) else runtime.dtype
        seen = leak(model, runtime, packing=True)
    return not runtime.any(seen > APART[dtype])[0]


def leak(model: nn.Module, runtime: Runtime, *, packing: bool) -> float:
    """The largest relative difference, over positions, between the hidden states of a document in
    company and alone, |x - y| / |y|. With `packing`, two documents share a row, in either order;
    without, each has a row, and the shorter is followed by padding, a segment of its own."""
    one, other = documents(model)
    other = other[: LENGTH - 2]
    first, second = (_hidden(model, runtime, [[document]]) for document in (one, other))
    if packing:
        rows, alone = [[one, other], [other, one]], torch.cat([first, second, second, first])
    else:
        rows, alone = [[one], [other, other.new_zeros(2)]], torch.cat([first, second])
    together = _hidden(model, runtime, rows)[: len(alone)]  # without the padding at the end
    gaps = (together - alone).norm(dim=1) / alone.norm(dim=1).clamp(min=1e-30)
    return float(gaps.nan_to_num(nan=math.inf).max())


def from_eager(model: Any, runtime: Runtime) -> float:
    """The largest relative difference, over positions, between the hidden states of a document as
    the model computes them and on eager attention, |x - y| / |y|; 0 where that is the same."""
    if kind_of(model) == "eager":
        return 0.0
    rows = [[document] for document in documents(model)]
    found = _hidden(model, runtime, rows)
    settings = model.get_decoder().config
    before = settings._attn_implementation
    settings._attn_implementation = "eager"
    try:
        wanted = _hidden(model, runtime, rows)
    finally:
        settings._attn_implementation = before
    gaps = (found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)
    return float(gaps.nan_to_num(nan=math.inf).max())


def logits_off(model: Any, runtime: Runtime) -> float:
    """max |z - h W^T| / max |h W^T| over a document, with z the model's logits and h its last
    hidden states. What the head gives is made large on the way, so that a cap on it shows."""
    ids = documents(model)[0]
    hidden, factor = _hidden(model, runtime, [[ids]]), 1.0
    weight = head_weight(model)
    wanted = functional.linear(hidden.to(weight.dtype), weight).float()

    def enlarge(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        nonlocal factor
        factor = _LARGE / max(float(output.abs().max()), 1e-30)
        return output.float() * factor

    handle = model.get_output_embeddings().register_forward_hook(enlarge)
    try:
        with _precision(model, runtime):
            found = model(input_ids=ids.unsqueeze(0).to(runtime.device), use_cache=False).logits
    finally:
        handle.remove()
    wanted = wanted * factor
    off = float((found[0].float() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    return math.inf if math.isnan(off) else off


def documents(model: Any) -> tuple[Tensor, Tensor]:
    """Two documents of `LENGTH` ids, all different, from the lower half of the vocabulary: marks
    and the places of images are seldom there."""
    size = head_weight(model).shape[0]
    ids = torch.linspace(size // 16, max(size // 2, 2 * LENGTH), 2 * LENGTH).long() % size
    return ids[::2], ids[1::2].flip(0)


def _hidden(model: nn.Module, runtime: Runtime, rows: list[list[Tensor]]) -> Tensor:
    """Hidden states [tokens, hidden] of `rows` of documents, as the losses get them, in fp32 or
    as precise as they come."""
    ids = torch.stack([torch.cat(row) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(len(part)) for part in row]) for row in rows])
    batch = Batch(ids, positions, torch.zeros_like(ids)).to(runtime.device)
    with _precision(model, runtime):
        return hidden_states(model, batch).float()


def _precision(model: nn.Module, runtime: Runtime) -> contextlib.AbstractContextManager[Any]:
    """That of training only where it is needed: fp32 shows smaller leaks."""
    return contextlib.nullcontext() if _exact(model, runtime) else runtime.autocast()


def _exact(model: Any, runtime: Runtime) -> bool:
    """Whether the trial can run in fp32: flash-attn and varlen cannot, nor what is sharded for 16
    bits."""
    exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    narrow = parallel.is_sharded(model) and runtime.precision != "fp32"
    return exact and not narrow and not needs_16_bits(model)


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients, no compiler and plain products; mode and random states are
    restored."""
    training = model.training
    cards = [device] if device.type == "cuda" else []
    uncompiled = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(cards), torch.no_grad(), uncompiled, float8.plain(model):
        model.eval()
        try:
            yield
        finally:
            parallel.settle(model)
            model.train(training)
