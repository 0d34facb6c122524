"""Matrix products of the decoder's layers in float8: which layers, whether it pays, and by whom
(torchao, Transformer Engine). Weights stay what they were, under their names; what changes is how
a layer multiplies. Both libraries are imported on use.

Order: load, attach an adapter, `convert`, compile by block, shard. The trial (`trial.check`) runs
on `plain` products: float8 rounds more than its bounds allow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.adapters import ROUTERS
from trainer.config import ConfigError, Data, Model, Train
from trainer.packages import source_of
from trainer.runtime import Runtime

#: Compute capability from which a GPU multiplies in float8 (Ada).
CAPABILITY = (8, 9)
#: The gain in the converted layers from which `auto` turns float8 on: products are half or more of
#: a step, so that this is about 1.15 of the whole.
LEAST_GAIN = 1.3
#: Sides of a weight, and tokens, must be multiples of this: a rule of the hardware.
MULTIPLE = 16
#: An H100, as far as products and memory of these sizes come near its data sheet: operations a
#: second in bf16 and float8, bytes a second.
_BF16, _FLOAT8, _BYTES = 700e12, 1300e12, 2.5e12
_LAYERS = "_float8_layers"  # where a model keeps the names of those that were converted


def convert(
    model: Any,
    plan: Model,
    runtime: Runtime,
    *,
    tokens: int,
    steady: bool,
    compiled: bool = False,
    emulate: bool = False,
) -> list[str]:
    """Let the linear layers of the decoder's blocks multiply in float8, in place, as
    `plan.float8` says; returns lines about it. `tokens`: of a micro-batch; `steady`: every
    micro-batch has a multiple of 16 tokens; `compiled`: the blocks will be compiled. `emulate`:
    torchao's own arithmetic in wider numbers instead of the hardware's, on any device, for
    comparisons. Errors: `ConfigError` when what is asked for cannot run here."""
    wanted = plan.float8
    if wanted == "off":
        return []
    lacks = "" if emulate else _lacks(runtime)
    if wanted == "auto":
        off = lacks or _not_worth(model, plan, tokens, compiled)
        if off:
            return [f"float8 off: {off}"]
        wanted = "torchao"
    if lacks:
        raise ConfigError(f"model.float8: {wanted} cannot run here: {lacks}; set it to off or auto")
    if importlib.util.find_spec(wanted) is None:
        raise ConfigError(f"model.float8: {wanted} is not installed; {_install(wanted)}")
    layers = convertible(model)
    if wanted == "torchao":
        layers = [name for name in layers if not slow(*_sides(model, name))] or layers
    if not layers:
        raise ConfigError(
            f"model.float8: no linear layer of this model has sides that are multiples of"
            f" {MULTIPLE}; set it to off"
        )
    if wanted == "torchao":
        _to_torchao(model, layers, steady, emulate)
    else:
        _to_transformer_engine(model, layers, steady)
    vars(model)[_LAYERS] = tuple(layers)
    lines = [f"float8: {len(layers)} linear layers multiply in it, by {wanted}"]
    if not compiled and not emulate and wanted == "torchao":
        lines.append("float8 without model.compile is slower than bf16: its casts run one by one")
    return lines


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """Within it, the layers that `convert` changed multiply as they did before."""
    layers = [model.get_submodule(name) for name in vars(model).get(_LAYERS, ())]
    for layer in layers:
        layer.forward = partial(_as_before, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def convertible(model: Any) -> list[str]:
    """Names of the linear layers that may multiply in float8: plain ones in the decoder's blocks
    with sides that are multiples of 16; no head, router, adapter or quantised layer."""
    decoder = model.get_decoder()
    inside = {id(module) for name, module in decoder.named_modules() if _in_block(name)}
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and id(module) in inside
        and ".lora_" not in name
        and _plain_end(name) not in ROUTERS
        and not module.in_features % MULTIPLE
        and not module.out_features % MULTIPLE
    ]


def slow(inputs: int, outputs: int) -> bool:
    """Whether a layer is slower in float8 whatever the tokens, by torchao's measurements on an
    H100 (0.18, `_auto_filter_for_tensorwise`; the tables are in its documentation of training)."""
    return inputs <= 4096 and outputs <= 1024


def gain(sides: Iterable[tuple[int, int]], tokens: int) -> float:
    """Time of layers of (inputs, outputs) in bf16 over that in float8, for `tokens` at a time:
    three products each, against what it costs to look for the largest number of input, weight and
    gradient and to cast them (twice 2 bytes read, 2 written each). After the derivation in
    torchao's documentation (M, K, N); of its two examples, 0.80 and 1.39, it gives 0.82 and 1.52.
    """
    plain = narrow = 0.0
    for inputs, outputs in sides:
        operations = 6.0 * tokens * inputs * outputs
        moved = 6.0 * (tokens * inputs + inputs * outputs + tokens * outputs)
        plain += operations / _BF16
        narrow += operations / _FLOAT8 + moved / _BYTES
    return plain / narrow if narrow else 0.0


def micro_batch_tokens(train: Train, data: Data) -> tuple[int, bool]:
    """(tokens of a micro-batch, whether they are a multiple of 16 every time); with `micro_batch:
    auto` those of one row."""
    rows = 1 if isinstance(train.micro_batch, str) else train.micro_batch
    lengths = (data.sequence_length, *(phase.sequence_length for phase in data.curriculum))
    steady = data.packing and not any(length % MULTIPLE for length in lengths)
    return rows * data.sequence_length, steady


def _as_before(layer: Any, given: Tensor) -> Tensor:
    bias = layer.bias if layer.bias is not None and layer.bias.numel() else None
    return functional.linear(given, layer.weight, bias)


def _lacks(runtime: Runtime) -> str:
    if runtime.device.type != "cuda":
        return "there is no GPU"
    found = torch.cuda.get_device_capability(runtime.device)
    if found < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        return f"this GPU has compute capability {found[0]}.{found[1]}, float8 needs {least}"
    if runtime.precision != "bf16":
        return f"precision is {runtime.precision}, not bf16"
    return ""


def _not_worth(model: Any, plan: Model, tokens: int, compiled: bool) -> str:
    """Why `auto` leaves float8 off; empty: it is expected to pay."""
    if plan.adapter is not None:
        return "the base of an adapter learns nothing, a third of the gain is lost"
    if not compiled:
        return "it is slower than bf16 without model.compile"
    if importlib.util.find_spec("torchao") is None:
        return f"torchao is not installed; {_install('torchao')}"
    sides = [_sides(model, name) for name in convertible(model)]
    expected = gain([pair for pair in sides if not slow(*pair)], tokens)
    if expected < LEAST_GAIN:
        return (
            f"layers of this size would gain {expected:.2f}x at {tokens} tokens a micro-batch,"
            f" it pays from {LEAST_GAIN:g}x"
        )
    return ""


def _install(module: str) -> str:
    return f'pip install "{source_of(module.replace("_", "-"))}"'


def _to_torchao(model: nn.Module, layers: list[str], steady: bool, emulate: bool) -> None:
    """One scale a tensor, found anew each time: torchao's fastest recipe."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = set(layers)
    convert_to_float8_training(
        model,
        config=Float8LinearConfig(emulate=emulate, pad_inner_dim=not steady),
        module_filter_fn=lambda module, name: name in chosen,
    )


def _to_transformer_engine(model: nn.Module, layers: list[str], steady: bool) -> None:
    """Its linear layers in place of torch's, around the same parameters. Each opens its own
    context: with scales found anew each time there is no state between layers or steps."""
    if not steady:
        raise ConfigError(
            f"model.float8: transformer_engine needs rows of one length, a multiple of {MULTIPLE}:"
            " set data.packing: true and such a data.sequence_length, or take torchao"
        )
    import transformer_engine.pytorch as engine
    from transformer_engine.common.recipe import Float8CurrentScaling

    recipe = Float8CurrentScaling()

    class Linear(engine.Linear):  # type: ignore[misc]
        # A checkpoint holds weights alone: this recipe has no state that would be worth keeping.
        get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state

        def forward(self, *given: Any, **options: Any) -> Any:
            if hasattr(engine, "autocast"):  # its name in later versions
                context = engine.autocast(enabled=True, recipe=recipe)
            else:
                context = engine.fp8_autocast(enabled=True, fp8_recipe=recipe)
            with context:
                return super().forward(*given, **options)

    for name in layers:
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        with torch.random.fork_rng([plain.weight.device]):  # it draws weights of its own
            made = Linear(
                plain.in_features, plain.out_features, bias=plain.bias is not None,
                params_dtype=plain.weight.dtype, device=plain.weight.device,
            )  # fmt: skip
        made.weight = plain.weight
        if plain.bias is not None:
            made.bias = plain.bias
        model.set_submodule(name, made)


def _in_block(name: str) -> bool:
    """Whether a module lies in a list of modules: `layers.0.mlp.up_proj`."""
    return any(part.isdigit() for part in name.split("."))


def _plain_end(name: str) -> str:
    """The layer's own name, also where an adapter has wrapped it."""
    return name.removesuffix(".base_layer").rpartition(".")[2]


def _sides(model: nn.Module, name: str) -> tuple[int, int]:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features
