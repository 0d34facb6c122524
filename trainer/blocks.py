"""What a model's blocks are told: to recompute their activations, and to be compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Union

import torch
from torch import nn

from trainer.config import ConfigError

#: What `selective` keeps of a block, by the names of torch's operators: products with weights, and
#: the result of a fused attention. Not the products of attention that is not fused (`bmm`): its
#: scores take more memory than all the rest, and less time to compute again.
KEPT = (
    "aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm", "aten::_scaled_grouped_mm",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn", "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
)  # fmt: skip
#: Compiled versions of a block's code that may exist: all layers share one code, and it has
#: versions for training and reading, for a first block whose input learns nothing, for shapes.
_VERSIONS = 64


def recompute(model: Any, how: Union[Literal["selective"], bool]) -> None:
    """Have every block compute again in the backward pass what it does not keep: nothing but its
    input (True), or beside that what `KEPT` names (`selective`). False: all is kept."""
    if not how:
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.x on
    (enable or model.gradient_checkpointing_enable)(settings)


def compile_blocks(model: Any, *, packing: bool) -> None:
    """Compile each block of the decoder in place, with what it recomputes: names of parameters and
    checkpoints stay. `packing`: rows have one length; else shapes are dynamic from the first. Torch
    compiles when a block first runs; what its compiler says then is raised as a `ConfigError`.
    Errors: `ConfigError` for a decoder without a list of blocks."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _VERSIONS)
    found = blocks(model)
    if not found:
        kind = type(model).__name__
        raise ConfigError(f"model.compile: {kind} has no list of blocks; set model.compile: false")
    for block in found:
        block.compile(dynamic=None if packing else True)
        compiled: Any = block._compiled_call_impl
        block._compiled_call_impl = _explained(compiled)


def blocks(model: Any) -> list[nn.Module]:
    """The repeated blocks of the part that reads text, in order; none where it has none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def _explained(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, whose compiler's errors are one line."""
    from torch._dynamo.exc import TorchDynamoException

    @functools.wraps(call)
    def run(*arguments: Any, **named: Any) -> Any:
        try:
            return call(*arguments, **named)
        except TorchDynamoException as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                raise error.__cause__ from None
            said = next((line for line in str(error).splitlines() if line.strip()), "")
            raise ConfigError(
                f"model.compile: torch could not compile a block ({type(error).__name__}:"
                f" {said.strip()[:300]}); set model.compile: false, or make its compiler work here"
                " (a CPU needs a C++ compiler, a GPU needs Triton)"
            ) from error

    return run


def _policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    del context, arguments, named
    if operator.name() in KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
