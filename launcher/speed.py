"""How fast a stage will be: the arithmetic of a step, and what part of a device's peak it reaches.

The arithmetic follows from the shapes of the models. What part of its peak a device reaches cannot
be computed: data/efficiency.csv holds what was measured or published, with source and date, and
where there is neither, what is assumed, marked as such. A processor has no useful peak: there a
step costs the sum of what its kinds of work cost (`Costs`), which benchmarks/forecast.py measures.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any, Optional

from launcher.hardware import Kind
from launcher.shapes import Shape
from trainer import phases

#: A row of the table that is for a whole maker's devices is that many doublings further away than
#: one for this device, one for another task half as many.
_OTHER_KIND, _OTHER_TASK = 2.0, 1.0


@dataclass(frozen=True)
class Work:
    """What one worker does in one optimizer step (of `targets`: in one forward pass)."""

    tokens: float
    flops: float  # of matrix products and attention, recomputed ones too
    elements: float  # of activations, that are read and written between them
    calls: float  # blocks entered: what each of them costs however small it is

    def shared(self, workers: int) -> Work:
        """A worker's part of work that was counted for all of them."""
        return Work(
            self.tokens / workers, self.flops / workers, self.elements / workers, self.calls
        )


@dataclass(frozen=True)
class Costs:
    """Seconds on one core: of a FLOP, of an element, of a call."""

    flop: float
    element: float
    call: float

    def seconds(self, work: Work) -> float:
        costs = (self.flop, self.element, self.call)
        return sum(cost * amount for cost, amount in zip(costs, _amounts(work)))


#: benchmarks/forecast.py on one core of an AMD EPYC (AVX2), torch 2.13, fp32, 2026-11-21.
CORE = Costs(flop=1.16e-11, element=8.6e-10, call=4.4e-4)
CORE_SOURCE = "benchmarks/forecast.py on one core of an AMD EPYC, 2026-11-21"


@dataclass(frozen=True)
class Efficiency:
    """The part of a device's peak that a step reaches. `basis`: of the nearest row, or `assumed`
    where assumed ones count for more than half; `source`: of the nearest row."""

    value: float
    basis: str  # measured, published or assumed
    source: str


def work(config: Any, model: Optional[Shape], teacher: Optional[Shape] = None) -> Work:
    """The work of a stage that trains (`config`: `model`, `train`, `data` and `kd` of a recipe's or
    a job's stage) or of `targets`, on rows that are full. `micro_batch: auto` counts as one
    micro-batch a step. Errors: ValueError where a shape that is needed is missing."""
    length = config.data.sequence_length
    if config.targets is not None:
        if teacher is None:
            raise ValueError("the teacher's shape is not known")
        tokens = config.targets.micro_batch * length
        forward = forward_flops(teacher, length)
        elements = _elements(teacher) + teacher.vocabulary
        return Work(tokens, forward * tokens, elements * tokens, teacher.layers)
    asks = config.kd is not None and config.kd.mode == "online"
    guided = config.sdce is not None and config.sdce.surrogate is not None
    if model is None or (teacher is None and (asks or guided)):
        missing = "model" if model is None else "surrogate" if guided else "teacher"
        raise ValueError(f"the {missing}'s shape is not known")
    rows, micro_batches = rows_of_step(config.train)
    tokens = rows * length  # of a step, whatever length its rows have
    context = phases.mean_length(config.data, config.train.steps)
    recomputed = config.model.gradient_checkpointing
    flops = training_flops(model, config.model, context)
    passes = 4 if recomputed else 3  # a backward counts as two
    elements = (_elements(model) + _adapted(model, config.model)) * passes + 2 * model.vocabulary
    calls = model.layers * passes * (2 if config.model.adapter is not None else 1)
    if recomputed is True:  # a selective one computes no product again
        flops += forward_flops(model, context, head=False)
    flops += passes * micro_batches * _expert_sums(model, config.model) / tokens
    if config.preference is not None and config.preference.reference == "adapter":
        flops += forward_flops(model, context)  # the same model once more, its adapter off
        elements += _elements(model) + model.vocabulary
        calls += model.layers
    if teacher is not None:
        flops += forward_flops(teacher, context)
        elements += _elements(teacher) + 3 * model.vocabulary
        calls += teacher.layers
    return Work(tokens, flops * tokens, elements * tokens, calls * micro_batches)


def reading(model: Shape, context: float, tokens: float, head: bool = True) -> Work:
    """The work of `tokens` in one forward pass, each attending to about `context` of them."""
    elements = _elements(model) + (model.vocabulary if head else 0)
    flops = forward_flops(model, context, head)
    return Work(tokens, flops * tokens, elements * tokens, model.layers)


def reference_share(config: Any, model: Optional[Shape]) -> float:
    """What a token costs in the pass with which the reference of `dpo` and `ipo` reads all pairs
    before the first step, by what it costs in a step; 0: there is no such pass."""
    if config.stage not in ("dpo", "ipo") or model is None:
        return 0.0
    if config.preference is not None and config.preference.reference == "adapter":
        return 0.0
    each = work(config, model)
    return forward_flops(model, config.data.sequence_length) * each.tokens / each.flops


def rows_of_step(train: Any) -> tuple[int, int]:
    """Rows that one worker reads in an optimizer step, and in how many micro-batches; with
    `micro_batch: auto` the rows of all workers, as one."""
    if isinstance(train.micro_batch, str):
        return int(train.global_batch), 1
    return int(train.micro_batch * train.accumulate), int(train.accumulate)


def training_flops(shape: Shape, model: Any, context: float) -> float:
    """FLOPs of one token's forward and backward, nothing recomputed: 6 for each weight of a matrix
    product that learns, 4 for one that is frozen, and 12 L H Q T for attention over a `context` of
    T tokens (Chowdhery et al. 2022, arXiv 2204.02311, appendix B; `trainer.throughput` says the
    same of a model that is there). An embedding is looked up, unless it is the head too."""
    products = 0.0
    experts = tuple(shape.expert_tensors) if _has_experts(model) else ()
    for name, weights in _products(shape).items():
        frozen = model.adapter is not None or _frozen(name, shape, model)
        if experts and name.endswith(experts):  # adapters are added to them: they have a gradient
            frozen = False
        products += (4 if frozen else 6) * weights
    if model.adapter is not None:
        products += (
            6 * model.adapter.rank * sum(map(sum, _targets(shape, model.adapter))) * (shape.layers)
        )
    return products + 12.0 * shape.layers * shape.heads * shape.head_dim * context


def forward_flops(shape: Shape, context: float, head: bool = True) -> float:
    """FLOPs of one token's forward pass: 2 for each weight of a matrix product, 4 L H Q T."""
    products = _products(shape)
    outside = ("lm_head.weight", "model.embed_tokens.weight")
    weights = sum(n for name, n in products.items() if head or name not in outside)
    return 2.0 * weights + 4.0 * shape.layers * shape.heads * shape.head_dim * context


def learned(shape: Shape, model: Any) -> float:
    """Parameters that learn: those of the adapter, else all that `freeze` leaves."""
    if model.adapter is None:
        return float(
            sum(math.prod(d) for n, d in shape.tensors().items() if not _frozen(n, shape, model))
        )
    each = sum(map(sum, _targets(shape, model.adapter)))
    if model.adapter.experts:
        each += sum(n * (one + other) for n, one, other in shape.expert_tensors.values())
    return float(model.adapter.rank * each * shape.layers)


def efficiency(kind: Kind, task: str, parameters: float, tokens: float) -> Optional[Efficiency]:
    """What part of `kind`'s bf16 peak a step of `task` (full, lora, kd, targets) reaches with a
    model of that many `parameters` and that many `tokens` in a micro-batch: rows of the table,
    weighted by the inverse square of their distance in doublings. None: no row is for it."""
    found: list[tuple[float, dict[str, str]]] = []
    for row in _table():
        if row["kind"] not in (kind.name, kind.vendor):
            continue
        size = abs(math.log2(parameters / float(row["parameters"])))
        flight = abs(math.log2(tokens / float(row["tokens"])))
        away = size + flight / 2 + _OTHER_KIND * (row["kind"] != kind.name)
        away += _OTHER_TASK * (row["task"] not in (task, "*"))
        found.append((1 / max(away, 1e-3) ** 2, row))
    if not found:
        return None
    total = sum(weight for weight, _ in found)
    value = sum(weight * float(row["efficiency"]) for weight, row in found) / total
    _, nearest = max(found, key=lambda pair: pair[0])
    assumed = sum(weight for weight, row in found if row["basis"] == "assumed") > total / 2
    basis = "assumed" if assumed else nearest["basis"]
    return Efficiency(value, basis, f"{nearest['source']}, {nearest['date']}")


def calibrated(known: Sequence[tuple[Work, float]]) -> Costs:
    """The costs that explain measured (work, seconds of a step) best: least squares of the relative
    errors, none of them negative. Needs at least as many measurements as there are costs."""
    scale = [max(column) for column in zip(*(_amounts(each) for each, _ in known))]
    rows = [
        [amount / unit / seconds for amount, unit in zip(_amounts(each), scale)]
        for each, seconds in known
    ]
    solved = _not_negative(rows, [1.0] * len(rows))
    return Costs(*(value / unit for value, unit in zip(solved, scale)))


def _amounts(each: Work) -> tuple[float, ...]:
    return each.flops, each.elements, each.calls


def _elements(shape: Shape) -> float:
    """Numbers that one token's pass through all blocks writes outside of matrix products: norms,
    rotary embeddings, residuals, and the MLP's gate."""
    attention = shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
    active = shape.experts_per_token or 1
    return shape.layers * (6.0 * shape.hidden + 2 * attention + 3 * active * shape.intermediate)


def _adapted(shape: Shape, model: Any) -> float:
    """The same of an adapter: its output, scaled, and added to what it adapts."""
    if model.adapter is None:
        return 0.0
    return 3.0 * shape.layers * sum(size[0] for size in _targets(shape, model.adapter))


def _expert_sums(shape: Shape, model: Any) -> float:
    """FLOPs of W + B A for all experts, which PEFT makes once in a pass, however many tokens."""
    if not _has_experts(model):
        return 0.0
    weights = sum(map(math.prod, shape.expert_tensors.values()))
    return float(2 * model.adapter.rank * weights * shape.layers)


def _has_experts(model: Any) -> bool:
    return model.adapter is not None and bool(model.adapter.experts)


def _targets(shape: Shape, adapter: Any) -> list[tuple[int, ...]]:
    """Dimensions of the linear layers of one block that `adapter` adapts."""
    layers = {n.removesuffix(".weight"): d for n, d in shape.layer().items() if len(d) == 2}
    return [
        size for name, size in layers.items()
        if name.endswith("_proj") and (adapter.targets == "auto" or _ends(name, adapter.targets))
    ]  # fmt: skip


def _products(shape: Shape) -> dict[str, float]:
    """Matrices that a token is multiplied with -> their weights; of experts those it meets."""
    found = {}
    for name, size in shape.tensors().items():
        looked_up = name == "model.embed_tokens.weight" and not shape.tied
        if len(size) < 2 or looked_up:
            continue
        met = shape.experts_per_token / shape.experts if ".experts." in name else 1.0
        found[name] = math.prod(size) * met
    return found


def _frozen(name: str, shape: Shape, model: Any) -> bool:
    """Whether `freeze` names this parameter; a tied one has two names."""
    tied = shape.tied and name == "model.embed_tokens.weight"
    names = (name, "lm_head.weight") if tied else (name,)
    return any(fnmatchcase(each, pattern) for each in names for pattern in model.freeze)


def _ends(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _not_negative(rows: list[list[float]], wanted: list[float]) -> list[float]:
    """Least squares over non-negative unknowns, by coordinate descent: a handful of unknowns."""
    count = len(rows[0])
    found = [0.0] * count
    gram = [[sum(r[i] * r[j] for r in rows) for j in range(count)] for i in range(count)]
    right = [sum(r[i] * w for r, w in zip(rows, wanted)) for i in range(count)]
    for _ in range(20_000):
        for i in range(count):
            if gram[i][i] > 0:
                rest = sum(gram[i][j] * found[j] for j in range(count) if j != i)
                found[i] = max(0.0, (right[i] - rest) / gram[i][i])
    return found


@functools.cache
def _table() -> tuple[dict[str, str], ...]:
    text = resources.files("launcher").joinpath("data/efficiency.csv").read_text("utf-8")
    return tuple(csv.DictReader(text.splitlines()))
