"""What each tensor of a GGUF file is made of: most of one stored tensor as it is; of experts one
tensor [experts, out, in] for each projection of a block, however they are stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Optional

import torch
from torch import Tensor

Shape = tuple[int, ...]

#: Numbers of a group of MXFP4, which share a scale.
_GROUP = 32
#: Experts of gpt-oss, all in one tensor; `blocks` and `scales` where they are MXFP4.
_TOGETHER = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|_scales)?")
#: Those of Qwen and Mixtral, each in a tensor of its own.
_APART = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
#: Where the outputs of a projection of gpt-oss lie in the stored one.
_OUTPUTS = {
    "gate_up_proj": {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)},
    "down_proj": {"down_proj": slice(None)},
}


@dataclass(frozen=True)
class Part:
    """`stored`: the names of the tensors that it is made of, `make`: how, in their dtype; `shape`:
    of what comes out, in numbers. `packed`: that is llama.cpp's bytes of MXFP4."""

    stored: tuple[str, ...]
    shape: Shape
    make: Callable[[list[Tensor]], Tensor]
    packed: bool = False


def parts(shapes: Mapping[str, Shape]) -> dict[str, Part]:
    """Of all stored tensors (name -> shape): their names in the library's table of names -> what
    is made of them."""
    found: dict[str, Part] = {}
    apart: dict[str, dict[int, str]] = {}
    for name, shape in shapes.items():
        if match := _TOGETHER.fullmatch(name):
            found.update(_together(name, shape, *match.groups()))
        elif match := _APART.fullmatch(name):
            apart.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = name
        else:
            table = f"{name}.weight" if name.endswith(".self_attn.sinks") else name
            found[table] = Part((name,), shape, _same)
    for table, experts in apart.items():
        stored = tuple(experts[number] for number in sorted(experts))
        found[table] = Part(stored, (len(stored), *shapes[stored[0]]), torch.stack)
    return found


def _together(
    name: str, shape: Shape, prefix: str, projection: str, form: Optional[str]
) -> Iterator[tuple[str, Part]]:
    """Weights of gpt-oss are stored as [experts, in, out], in MXFP4 as [experts, out, groups, 16
    bytes], with the outputs of gate and up in turn."""
    outputs = _OUTPUTS[projection]
    made: Shape
    for out, which in outputs.items():
        weight = f"{prefix}.{out}.weight"
        if form is None:
            made = (shape[0], shape[2] // len(outputs), shape[1])
            yield weight, Part((name,), made, partial(_weight, which))
        elif form == "_bias":
            made = (shape[0], shape[1] // len(outputs))
            yield f"{prefix}.{out}.bias", Part((name,), made, partial(_bias, which))
        elif form == "_blocks":
            scales = f"{prefix}.{projection}_scales"
            made = (shape[0], shape[1] // len(outputs), shape[2] * _GROUP)
            yield weight, Part((name, scales), made, partial(_packed, which), packed=True)


def _same(stored: list[Tensor]) -> Tensor:
    return stored[0]


def _weight(which: slice, stored: list[Tensor]) -> Tensor:
    return stored[0][..., which].transpose(1, 2).contiguous()


def _bias(which: slice, stored: list[Tensor]) -> Tensor:
    return stored[0][:, which].contiguous()


def _packed(which: slice, stored: list[Tensor]) -> Tensor:
    """Bytes [experts, out, 17 for each group]: its scale, then byte j with the numbers j and
    j + 16, where the stored byte j has 2 j and 2 j + 1; the lower half of a byte comes first."""
    blocks, scales = (tensor[:, which] for tensor in stored)
    numbers = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    half = _GROUP // 2
    codes = numbers[..., :half] | numbers[..., half:] << 4
    return torch.cat([scales.unsqueeze(-1), codes], dim=-1).flatten(-2)
