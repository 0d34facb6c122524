"""The objective of stage `sdce`, and its surrogate, which is looked at before anything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

import torch
from torch import nn

from trainer import adapters, copies, models, quantized, trial
from trainer.checkpoint import resolve
from trainer.config import ConfigError, Model
from trainer.context import Context
from trainer.objective import Objective
from trainer.objectives.next_token import NextToken
from trainer.objectives.sdce import SurrogateGuided
from trainer.runtime import Runtime
from trainer.surrogate import Surrogate, Vocabularies

_WHOLE = ("float64", "float32", "bfloat16", "float16", "None")
_TEXT = "A short text that any model can read, 1 + 1 = 2.\n"


def before(context: Context, tokens: Any) -> Optional[Surrogate]:
    """The surrogate, on the CPU and found fit to be asked; None with `loss: standard`. Errors:
    `ConfigError` for one that is not there or is quantised, whose vocabulary has nothing in common
    with `tokens` (with `loss: kl`, is another), or whose logits are not finite."""
    config, runtime = context.config, context.runtime
    assert config.sdce is not None
    name = config.sdce.surrogate
    if name is None:
        return None
    _refuse_quantised(name)
    own = models.load_tokenizer(name)
    facts = models.configuration(Model(name=_base(name)), None)
    words = Vocabularies(tokens, own, getattr(facts, "max_position_embeddings", None))
    if config.sdce.loss == "kl" and not words.same:
        raise ConfigError(
            f"sdce.surrogate: '{name}' has another tokenizer than the model, and `loss: kl` needs"
            " the model's own; take `loss: surrogate`, which matches tokens by their bytes"
        )
    here = replace(runtime, device=torch.device("cpu"))
    # Never flash-attn, which cannot run on a CPU: this one is to be tried there.
    model = models.load_frozen(name, here, models.PLAIN_ATTENTION)
    if len(words.to_ours) > len(models.head_weight(model)):
        raise ConfigError(
            f"sdce.surrogate: '{name}' has {len(models.head_weight(model))} output tokens, its"
            f" tokenizer {len(words.to_ours)}; they do not belong together"
        )
    _try(model, own, name, here)
    matched = (
        "the model's own tokenizer"
        if words.same
        else f"{words.matched:,} of its {len(own):,} tokens are among the model's {len(tokens):,}"
    )
    context.say(
        f"surrogate: {copies.origin(name)}, {models.parameter_count(model):,} parameters, {matched}"
    )
    return Surrogate(model, words, runtime)


def make(context: Context, tokens: Any) -> Objective:
    """Cross-entropy beside what the surrogate holds likely. Errors: `ConfigError` for a surrogate
    in which the documents of a row would see each other."""
    config, surrogate = context.config, context.ready
    assert config.sdce is not None
    if not isinstance(surrogate, Surrogate):
        return NextToken()
    surrogate.move()
    name = str(config.sdce.surrogate)
    trial.check(surrogate.model, context.runtime, name, packing=config.data.packing)
    return SurrogateGuided(config.sdce, surrogate)


def _base(name: str) -> str:
    """The model itself, or that which an adapter belongs to."""
    folder = resolve(name)
    return adapters.base_of(folder) if adapters.is_adapter(folder) else name


def _refuse_quantised(name: str) -> None:
    facts = models.configuration(Model(name=_base(name)), None)
    dtype = str(getattr(facts, "dtype", None)).removeprefix("torch.")
    # MXFP4 is widened as it is loaded, without a loss.
    if quantized.method(facts) in (None, quantized.MXFP4) and dtype in _WHOLE:
        return
    raise ConfigError(
        f"sdce.surrogate: '{name}' is quantised, which changes what it holds likely; take its"
        " weights in fp32, bf16 or fp16"
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def _try(model: nn.Module, own: Any, name: str, here: Runtime) -> None:
    ids = own(_TEXT, return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise ConfigError(
            f"sdce.surrogate: '{name}' gives logits that are not finite, in {here.precision} on the"
            " CPU; its files may be damaged, or set model.precision to bf16 or fp32"
        )
