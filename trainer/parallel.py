"""How several workers share a model: each holds all of it (ddp), or a part of each tensor (fsdp).

Sharding is FSDP2 (torch.distributed.fsdp.fully_shard): the tensors of a block are gathered where
they are used, and their gradients summed into the parts. What lies outside the blocks, embeddings,
last norm and head, is gathered at the beginning of a forward pass and kept to the end of the
backward pass, so that the losses have the head's weight [V, H] as they have that of a whole model.
Only the model that is trained is sharded; teachers and other frozen models stay whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, Optional, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.blocks import blocks
from trainer.config import ConfigError
from trainer.guard import Guard, Retry
from trainer.runtime import Runtime
from trainer.smaller import Leave
from trainer.step import unless_out_of_memory

Parallel = Literal["auto", "ddp", "fsdp"]
#: The share of a device's memory from which on weights, gradients and moments are sharded.
SHARE = 0.4
#: The method of a sharded model that gives its last hidden states.
DECODE = "decode_sharded"
_REACHED = "_reached_parameters"  # where it keeps which of them got a gradient on this rank
_Result = TypeVar("_Result")


def choose(model: nn.Module, runtime: Runtime, wanted: Parallel) -> tuple[str, str]:
    """`ddp` or `fsdp`, and why, in a few words."""
    if wanted != "auto":
        return wanted, f"train.parallel: {wanted}"
    if runtime.world_size == 1:
        return "ddp", "one worker"
    if runtime.device.type != "cuda":
        return "ddp", "no GPU"
    if _quantised(model):
        return "ddp", "quantised weights"
    total = torch.cuda.get_device_properties(runtime.device).total_memory
    share = replicated_bytes(model) / total
    what = f"weights, gradients and moments take {share:.0%} of a GPU"
    return ("fsdp", what) if share > SHARE else ("ddp", what)


def replicated_bytes(model: nn.Module) -> int:
    """Of the weights, and where they learn, of fp32 gradients and AdamW's two moments, in bytes."""
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(int(p.nbytes) for p in model.parameters()) + 12 * int(learning)


def place(
    model: Any, runtime: Runtime, wanted: Parallel, say: Callable[[str], None] = lambda line: None
) -> None:
    """Put `model` on the runtime's device, whole or sharded, with the values of rank 0. All ranks
    must call it."""
    how, why = choose(model, runtime, wanted)
    if how == "fsdp":
        shard(model, runtime)
    else:
        model.to(runtime.device)
        runtime.broadcast([*model.parameters(), *model.buffers()])
    if runtime.world_size > 1 or how == "fsdp":
        many = f"{runtime.world_size} worker{'' if runtime.world_size == 1 else 's'}"
        say(f"parallel: {how}, {many} ({why})")


def shard(model: Any, runtime: Runtime) -> None:
    """Shard `model`, a causal language model that may be on the CPU, over all ranks, in place: each
    block a unit of its own, the rest another. Parameters keep their precision; blocks compute in
    the runtime's. Gradients are summed over the ranks, not averaged: the losses are shares of the
    global batch. One block at a time is whole on the device. All ranks must call it. Errors:
    `ConfigError` for quantised weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if name := _quantised(model):
        raise ConfigError(
            f"train.parallel: fsdp cannot share quantised weights ({name}); use ddp, or leave them"
            " as they are"
        )
    if not dist.is_initialized():  # one process, asked to shard all the same
        backend = "nccl" if runtime.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    # Autocast alone would keep a copy of each block in 16 bits from its forward to its backward.
    narrow = None if runtime.precision == "fp32" else runtime.dtype
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    placed: set[int] = set()

    def put(tensors: Iterator[Tensor]) -> None:
        new = [tensor for tensor in tensors if id(tensor) not in placed]
        for tensor in new:
            tensor.data = tensor.data.to(runtime.device)
        runtime.broadcast(new)

    for block in blocks(model):
        put(_tensors(block))
        fully_shard(block, mesh=mesh, mp_policy=policy)
        placed.update(id(tensor) for tensor in _tensors(block))
    put(_tensors(model))
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # What a rank's rows do not use, such as an expert, others may; torch 2.13 has it.
            if hasattr(module, "set_reduce_scatter_unused_params"):
                module.set_reduce_scatter_unused_params(True)

    _note_gradients(model)

    def decode(**inputs: Any) -> Tensor:
        hidden: Tensor = model.get_decoder()(**inputs).last_hidden_state
        return hidden

    setattr(model, DECODE, decode)
    register_fsdp_forward_method(model, DECODE)


def is_sharded(model: nn.Module) -> bool:
    return DECODE in vars(model)


def settle(model: Any) -> None:
    """After passes without gradients: keep of the parameters what is this rank's."""
    if is_sharded(model):
        model.reshard()


def attempt(
    model: nn.Module, rows: int, work: Callable[..., _Result], *arguments: Any
) -> Optional[_Result]:
    """The result of `work` on `rows` rows, or None after an out-of-memory. Errors: `Leave`, in
    place of None, where `model` is sharded: the other ranks are in the middle of an exchange, and
    nothing can be said to them there."""
    found = unless_out_of_memory(lambda: (work(*arguments),))
    if found is not None:
        return found[0]
    if not is_sharded(model):
        return None
    decision = Guard().out_of_memory(rows)
    if isinstance(decision, Retry):
        raise Leave(rows, decision.micro_batch)
    raise Leave(rows, 0, getattr(decision, "reason", ""))


@contextlib.contextmanager
def gathering(rows: int) -> Iterator[None]:
    """Within it, all ranks make the tensors of a sharded model whole, for a checkpoint. `rows`: of
    a micro-batch. Errors: `Leave` in place of an out-of-memory, as in `attempt`: smaller steps
    leave more room, in larger pieces."""
    try:
        yield
    except torch.OutOfMemoryError:
        fewer = (rows + 1) // 2 if rows > 1 else 0
        reason = (
            "no memory to gather a checkpoint, even with one row at a time: take a larger"
            " accelerator, or more of them"
        )
        raise Leave(rows, fewer, reason, "while a checkpoint was gathered") from None


def reduce_gradients(model: nn.Module, runtime: Runtime, ready: bool = True) -> bool:
    """`Runtime.reduce_gradients` of `model`. Where it is sharded they are summed already, and what
    no rank's rows reach has zeros by that: they are taken away, as the optimizer would have the
    weight decay with them."""
    if not is_sharded(model):
        return runtime.reduce_gradients(model.parameters(), ready)
    reached: dict[str, bool] = vars(model)[_REACHED]
    missing = [name for name, found in reached.items() if not found]
    if runtime.any(bool(missing))[0]:
        nowhere = set.intersection(*map(set, runtime.gather(missing)))
        for name, parameter in model.named_parameters():
            if name in nowhere:
                parameter.grad = None
    reached.update(dict.fromkeys(reached, False))
    return ready


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; a plain tensor itself. The memory is shared."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def local_parts(value: Any) -> Any:
    """`value` (dicts, lists and tuples) with this rank's part of every tensor in it."""
    if isinstance(value, Tensor):
        return local(value)
    if isinstance(value, dict):
        return {key: local_parts(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(local_parts(item) for item in value)
    return value


def total_norm(norm: Tensor) -> Tensor:
    """The norm [0-dim] of what all ranks hold, of the norm of this rank's part."""
    square = norm.double().square()
    dist.all_reduce(square)
    return square.sqrt().to(norm.dtype)


def whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of `tensors` of a sharded `model` on the host of rank 0, one after the other through
    the device; nothing on other ranks. Tied ones share their memory. All ranks must call it."""
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known = gathered.get(names.get(name, name))
        if known is not None:
            gathered[name] = known
            continue
        gather = getattr(tensor, "full_tensor", None)
        full = (tensor if gather is None else gather()).detach()
        if dist.get_rank() == 0:
            gathered[name] = full.cpu() if full.device.type != "cpu" else full.clone()
        else:
            gathered[name] = full.new_empty(0)
    return gathered if dist.get_rank() == 0 else {}


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, whole, as `parameter` is: where that is sharded, this rank's part of it."""
    if not hasattr(parameter, "to_local") or hasattr(value, "to_local"):
        return value
    if value.shape != parameter.shape or not value.ndim:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    part: Tensor = distribute_tensor(value, mesh, placements, src_data_rank=None)
    return part


def _quantised(model: nn.Module) -> str:
    """The name of the first parameter that holds no numbers of its own; empty where none is."""
    packed = (n for n, p in model.named_parameters() if not p.is_floating_point())
    return next(packed, "")


def _note_gradients(model: Any) -> None:
    """Keep of the parameters of a sharded `model`, by their names, whether a backward pass has
    reached them on this rank. While a pass runs the parameters are others, whole, but each time the
    same ones: they are watched from the first pass of their block on, and those outside the blocks
    from that of the decoder."""
    reached: dict[str, bool] = {}
    vars(model)[_REACHED] = reached

    def watch(at: nn.Module, module: nn.Module, prefix: str) -> None:
        def first(*_: Any) -> None:
            handle.remove()
            for name, parameter in module.named_parameters(prefix):
                if parameter.requires_grad and not hasattr(parameter, "to_local"):
                    reached[name] = False
                    parameter.register_post_accumulate_grad_hook(partial(_note, reached, name))

        handle = at.register_forward_pre_hook(first)

    inside = {id(block) for block in blocks(model)}
    for prefix, module in model.named_modules():
        if id(module) in inside:
            watch(module, module, prefix)
    watch(model.get_decoder(), model, "")


def _note(reached: dict[str, bool], name: str, parameter: Tensor) -> None:
    reached[name] = True


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
