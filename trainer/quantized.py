"""Weights of few bits: the frozen base of an adapter in NF4, and MXFP4 files, which are widened.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the linear layers that an adapter can reach are held
as 4-bit normal floats, 64 to a block, whose scales are quantised again; embeddings, norms, routers
and the head stay as they are, and products are made in the runtime's precision. bitsandbytes does
the arithmetic and is imported on use.
"""

from __future__ import annotations

import logging
from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer import adapters
from trainer.config import ConfigError

#: What Transformers calls the format of gpt-oss's experts.
MXFP4 = "mxfp4"
_KEY = "model.adapter.quantization"
# It warns, once imported, of a kernel for inference on CPUs that training does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def method(configuration: Any) -> Optional[str]:
    """How a model's files are quantised, by its configuration; None: they are not."""
    found = getattr(configuration, "quantization_config", None)
    if found is None:
        return None
    name = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(name, "value", name) or "an unknown method")


def nf4_options(reference: str, configuration: Any, runtime: Any) -> dict[str, Any]:
    """What `from_pretrained` is told so that the model at `reference` comes with its base in NF4,
    on the runtime's device. Errors: `ConfigError` for a model that is quantised already, and for
    one whose experts are one tensor, which bitsandbytes passes over."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    known = method(configuration)
    if known is not None and known != MXFP4:
        raise ConfigError(
            f"{_KEY}: '{reference}' is quantised already ({known}); name the full-precision model"
            " that it was made from"
        )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(configuration)
    _refuse_experts(reference, empty)
    reached = adapters.projections(empty)
    kept = [name for name, part in empty.named_modules() if adapters.is_linear(part)]
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=runtime.dtype,
            llm_int8_skip_modules=[name for name in kept if name not in reached],
        ),
        "device_map": {"": runtime.device},
    }


def settle(model: nn.Module) -> str:
    """Make NF4 layers compute the same in training and in evaluation, and say how many there are:
    on some CPUs bitsandbytes repacks a layer that is evaluated, with 16-bit scales."""
    count, held = 0, 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if is_nf4(getattr(module, "weight", None)):
            count += elements(module.weight)
            held += _bytes(module.weight)
    whole = sum(elements(parameter) for parameter in model.parameters())
    return (
        f"nf4: {count:,} of {whole:,} parameters in 4 bits, {held:,} bytes with their scales; the"
        " adapter belongs to the full-precision model"
    )


def mxfp4_options() -> dict[str, Any]:
    """What `from_pretrained` is told so that MXFP4 experts are widened, which is exact (values of 4
    bits times powers of two): no gradient passes their packed form."""
    from transformers import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}


def forget(model: Any) -> None:
    """Let a widened model be saved under its own names: Transformers 5.23 would give its tensors
    those of the packed ones, under which nothing reads them back."""
    model._weight_conversions = None
    model.was_mxfp4 = True


def was_widened(model: Any) -> bool:
    """Whether the files of a model that has been loaded were MXFP4."""
    return getattr(model, "was_mxfp4", False) is True


def is_nf4(parameter: Any) -> bool:
    """Whether a parameter holds several weights in an element."""
    return getattr(parameter, "quant_state", None) is not None


def elements(parameter: Tensor) -> int:
    """The number of weights of a parameter; of a packed one, those that it stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def _bytes(parameter: Any) -> int:
    """Bytes of a packed parameter with its scales, and theirs; not of the tables of values."""
    state = parameter.quant_state
    nested = state.state2.absmax.nbytes + 4 if state.nested else 0  # 4: the mean of the scales
    return int(parameter.nbytes + state.absmax.nbytes + nested)


def _refuse_experts(reference: str, empty: nn.Module) -> None:
    fused = adapters.fused_experts(empty)
    if not fused:
        return
    beyond = sum(experts * inputs * outputs for experts, inputs, outputs in fused.values())
    share = beyond / sum(parameter.numel() for parameter in empty.parameters())
    raise ConfigError(
        f"{_KEY}: bitsandbytes does not reach experts that are one tensor: {beyond:,} parameters"
        f" ({share:.0%}) of '{reference}' would stay as they are; leave it out"
    )
