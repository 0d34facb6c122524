"""Which parameters learn: patterns that freeze some, and a record of what is really frozen.

Names are those of the model without the wrapping of an adapter: what PEFT calls
`base_model.model.model.norm.weight` is `model.norm.weight`, an adapted weight drops `.base_layer`,
and the adapter's own are `...up_proj.lora_A.weight` and `...up_proj.lora_B.weight`; so are those of
experts, `...mlp.experts.down_proj.lora_A.weight`, which PEFT names by how its modules are nested.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Optional

from torch import nn

from trainer.config import ConfigError
from trainer.quantized import elements


class StandIn(str):
    """A pattern in the place of the one that was `written`, which errors quote."""

    written: str

    def __new__(cls, pattern: str, written: Optional[str] = None) -> StandIn:
        made = super().__new__(cls, pattern)
        made.written = pattern if written is None else written
        return made


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Freeze the parameters whose names match any of `patterns` (fnmatch); one line for every
    parameter that is frozen under another name because two layers share it. Errors: `ConfigError`
    for a pattern that matches nothing, and when nothing would be left to train."""
    shared, notes = _names(model), []
    for pattern in patterns:
        matched = 0
        for names, parameter in shared:
            hits = [name for name in names if fnmatchcase(name, pattern)]
            matched += len(hits)
            if not hits:
                continue
            parameter.requires_grad_(False)
            others = [name for name in names if name not in hits]
            if others:
                notes.append(f"freezing {hits[0]} freezes {', '.join(others)}: they are tied")
        if not matched:
            near = _near(pattern, [name for names, _ in shared for name in names])
            written = pattern.written if isinstance(pattern, StandIn) else pattern
            raise ConfigError(f"model.freeze: '{written}' matches no parameter; there is {near}")
    if not any(parameter.requires_grad for _, parameter in shared):
        raise ConfigError("model.freeze: nothing is left to train; freeze less")
    return list(dict.fromkeys(notes))


def frozen_mask(model: nn.Module) -> dict[str, Any]:
    """What `requires_grad` says, for `frozen_mask.json`: names, numbers and shares of the
    parameters that learn and of those that do not; tied ones count once, under their first name."""
    shared = _names(model)
    total = sum(elements(parameter) for _, parameter in shared)

    def part(learns: bool) -> dict[str, Any]:
        chosen = [(names, p) for names, p in shared if p.requires_grad is learns]
        count = sum(elements(parameter) for _, parameter in chosen)
        return {
            "names": [names[0] for names, _ in chosen],
            "tensors": len(chosen),
            "parameters": count,
            "share": count / max(total, 1),
        }

    tied = [names for names, _ in shared if len(names) > 1]
    return {
        "v": 1, "parameters": total, "trainable": part(True), "frozen": part(False), "tied": tied,
    }  # fmt: skip


def _names(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Every parameter once, with all the names that it has."""
    names: dict[int, list[str]] = defaultdict(list)
    parameters: dict[int, nn.Parameter] = {}
    fused = _adapted_parameters(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        at, mark, rest = name.partition(".lora_")
        of = f".{fused[at]}" if mark and at in fused else ""
        names[id(parameter)].append(_plain(at + of + mark + rest))
        parameters[id(parameter)] = parameter
    return [(names[key], parameter) for key, parameter in parameters.items()]


def _adapted_parameters(model: nn.Module) -> dict[str, str]:
    """Of the modules that PEFT puts around one parameter of another: the name of that parameter.
    Where several are adapted they are nested, so that their own names do not tell."""
    return {
        path: str(module.parameter_name)
        for path, module in model.named_modules()
        if hasattr(module, "parameter_name") and hasattr(module, "lora_A")
    }


def _plain(name: str) -> str:
    name = re.sub(r"(?:\.base_layer)+(?=\.)", "", name.removeprefix("base_model.model."))
    return re.sub(r"\.(lora_\w+)\.default\b", r".\1", name)


def _near(pattern: str, names: list[str]) -> str:
    """Up to three names or patterns like `pattern`; layers of all numbers count as one."""
    known: dict[str, None] = {}
    for name in names:
        parts = re.sub(r"\.\d+\.", ".*.", name).split(".")
        for length in range(1, len(parts)):
            known[".".join(parts[:length]) + ".*"] = None
        known[".".join(parts)] = None
    known.pop("model.*", None)
    close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    return ", ".join(close or names[:3])
