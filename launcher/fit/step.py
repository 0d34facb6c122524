"""The peak of one training step, as the trainer takes it.

What is counted follows trainer/: parameters that learn are fp32, and matrix products run under
autocast, so that every linear layer's weight has a 16-bit copy until its backward pass and the
residual stream is fp32; the base of an adapter is 16-bit throughout. AdamW keeps two fp32 moments.
Logits exist a chunk at a time, and the losses sum the gradients of hidden states and head in the
forward pass. Sizes below are bytes of one token unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Optional

from launcher.fit import sharding
from launcher.fit.activations import (
    layer_activations,
    products_kept,
    stream,
    transient,
)
from launcher.fit.parts import MIB, Part, count
from launcher.shapes import Shape

#: Bytes of one fp32 buffer of logits (trainer/losses/chunks.py), on a CPU and elsewhere.
CPU_BUFFER, DEVICE_BUFFER = 128 * MIB, 512 * MIB
#: The same of a surrogate's (trainer/surrogate.py).
SURROGATE_BUFFER = 64 * MIB
_STAYING = {"weights", "adapter", "optimizer", "teacher", "surrogate", "start", "gradients"}
#: The largest flat piece in which gradients are summed over workers (trainer/runtime.py).
BUCKET = 64 * MIB


@dataclass(frozen=True)
class Step:
    """What of a stage decides its memory. `half`: 16-bit autocast (or an adapter's 16-bit base);
    `masked`: packed rows through SDPA or eager attention, which need a mask; `learns`: the
    dimensions of the parameters that are trained, by name, without an adapter's; `targets`: the
    linear layers of a block that have an adapter of `rank` (0: none); `experts`: fused ones have
    one too; `nf4`: the linear layers of the blocks are 4 bits; `heads`: passes through the head
    whose gradients are held at once; `dense`: one of them compares with another's logits."""

    shape: Shape
    rows: int
    length: int
    half: bool
    checkpointing: bool
    masked: bool
    eager: bool
    learns: Mapping[str, tuple[int, ...]]
    rank: int = 0
    targets: tuple[str, ...] = ()
    experts: bool = False
    nf4: bool = False
    accumulate: int = 1
    workers: int = 1
    heads: int = 1
    dense: bool = False
    teacher: Optional[Shape] = None
    teacher_name: str = "teacher"  # what that model is called: `surrogate` of stage sdce
    opinions: int = 0  # tokens that a surrogate names in place of each; 0: its hidden states count
    start: bool = False  # the model it began as stays beside it (kd.keep_logits, grpo.beta)
    start_states: bool = False  # with its hidden states (kd.keep_logits)
    late: bool = False  # the loss's gradient is made in the backward pass (token_logprobs)
    selective: bool = False  # checkpointing, but for results of products and of attention
    on_cpu: bool = False
    sharded: bool = False  # the workers share weights, gradients and moments (FSDP2)
    float8: bool = False  # products of the blocks

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def wide(self) -> int:
        """Bytes of an activation of a matrix product."""
        return 2 if self.half else 4

    @property
    def adapted(self) -> int:
        """Parameters of the adapters."""
        sizes = self.shape.projections
        each = sum(sum(sizes[name]) for name in self.targets)
        if self.experts:  # an A and a B for each expert
            each += sum(n * (one + other) for n, one, other in self.shape.expert_tensors.values())
        return self.shape.layers * self.rank * each

    @property
    def widened(self) -> float:
        """Bytes of the weights of one block's experts with their adapters added: PEFT makes them
        whole in each pass, and the backward pass needs them."""
        if not self.experts:
            return 0.0
        return self.base_bytes * sum(map(math.prod, self.shape.expert_tensors.values()))

    @property
    def casts(self) -> bool:
        """Whether PEFT casts each adapter's input to its fp32, and autocast back. Where workers
        share the model, A and B are gathered in 16 bits: there it does not."""
        return bool(self.rank) and self.half and not self.sharded

    @property
    def trained(self) -> int:
        return self.adapted + sum(math.prod(size) for size in self.learns.values())

    @property
    def base_bytes(self) -> int:
        """Bytes of a parameter of the model itself."""
        return 2 if self.rank and self.half else 4


def peak(step: Step, slack: float) -> tuple[str, list[Part]]:
    """The moment of a step at which most is taken, with `slack` of `passing` on top, and all that
    is there then."""
    held = _held(step)
    moments = {name: [*held, *parts] for name, parts in _moments(step)}

    def taken(name: str) -> float:
        return sum(part.bytes for part in moments[name]) + slack * passing(moments[name])

    moment = max(moments, key=taken)
    return moment, [part for part in moments[moment] if part.bytes > 0]


def passing(parts: Iterable[Part]) -> float:
    """Bytes of what comes and goes within a step: of what an allocator keeps more than is used."""
    return sum(part.bytes for part in parts if part.name not in _STAYING)


def chunk_buffers(step: Step) -> tuple[float, str]:
    """Bytes of the logits, and what is made of them, that exist together; and why."""
    vocabulary, hidden = step.shape.vocabulary, step.shape.hidden
    budget = CPU_BUFFER if step.on_cpu else DEVICE_BUFFER
    rows = min(max(16, budget // (4 * vocabulary)), step.tokens)
    first, second = (4 * vocabulary * size for size in (rows, min(rows, step.tokens - rows)))
    buffers: float
    if not step.half:
        buffers = (3 if step.dense else 1) * first  # used again by the next chunk
        return buffers + 8 * hidden * rows, _chunks(buffers, first, rows, vocabulary)
    # The last chunk's gradient is still there when the next logits are made; in `first`, the
    # gradient has a 16-bit copy, and that of the hidden states is fp32.
    if step.dense:
        buffers = max(3.0 * first, 2.0 * first + 2 * second)
    else:
        buffers = max(1.5 * first, first + second)
    return buffers + 6 * hidden * rows, _chunks(buffers, first, rows, vocabulary)


def _chunks(buffers: float, one: float, rows: int, vocabulary: int) -> str:
    return f"{buffers / one:.2g} buffers of {rows:,} rows x {count(vocabulary)} tokens x 4 bytes"


def _held(step: Step) -> list[Part]:
    """What is there from the first step to the last."""
    shape, trained = step.shape, step.trained
    size = step.base_bytes
    why = "fp32" if size == 4 else "16 bits: an adapter's base"
    parts = [_product("weights", shape.parameters, size, f"parameters x {size} bytes ({why})")]
    if step.nf4:
        parts = [_packed(shape, size)]
    if step.rank:
        parts.append(_product("adapter", step.adapted, 4, "parameters x 4 bytes (fp32)"))
    parts.append(_product("optimizer", trained, 8, "parameters x 8 bytes (AdamW's moments, fp32)"))
    frozen = 2 if step.half else 4
    beside = ((step.teacher_name, step.teacher, not step.opinions),
              ("start", shape if step.start else None, step.start_states))  # fmt: skip
    for name, other, kept in beside:
        if other is None:
            continue
        parts.append(_product(name, other.parameters, frozen, f"parameters x {frozen} bytes"))
        if not kept:
            continue
        states = step.tokens * other.hidden * frozen * step.accumulate
        how = f"{count(step.tokens * step.accumulate)} tokens x {other.hidden:,} x {frozen} bytes"
        parts.append(Part(f"hidden states of the {name}", states, how))
    if step.opinions:  # a token's id and weight
        tokens = step.tokens * step.accumulate
        how = f"{count(tokens)} tokens x {step.opinions} x 12 bytes"
        parts.append(Part("targets of the surrogate", 12.0 * tokens * step.opinions, how))
    if step.accumulate > 1:
        parts.append(_product("gradients", trained, 4, "parameters x 4 bytes (fp32)"))
    return sharding.shared(parts, step) if step.sharded else parts


def _moments(step: Step) -> Iterable[tuple[str, list[Part]]]:
    """The moments that can be the peak, and what each has beside `_held`."""
    if step.teacher is not None:
        yield f"the {step.teacher_name}'s forward pass", _asked(step, step.teacher)
    if step.sharded:
        yield from _sharded_moments(step)
        return
    layers = step.shape.layers
    kept, copies = _kept(step), _copies(step)
    backward = Part("backward pass", _working(step), "what one block's backward pass has in hand")
    gradients = _gradients(step)
    widened = _widened(step)
    of_all = [] if step.checkpointing else widened
    yield _name_of_loss(step), [kept, *copies, *of_all, *_tail(step), *_loss(step)]
    if step.casts and not step.checkpointing:
        hidden, inner = step.shape.hidden, step.shape.intermediate
        size = step.tokens * (8.5 * hidden + 6.5 * inner) * step.wide / 2
        last = Part("forward pass", size, "of the last block")
        yield "the forward pass", [kept, *copies, *of_all, last]
    if step.checkpointing:
        again = _again(step)
        one = [
            Part(p.name, p.bytes / layers, f"{p.how}, of one block") for p in (*copies, *widened)
        ]
        head = _head_gradients(step)
        yield "the last block's backward pass", [kept, again, *one, head, backward]
        rest = Part(kept.name, kept.bytes / layers, "what the first block keeps")
        most = _without(step, gradients, "model.layers.0.")
        yield "the first block's backward pass", [rest, again, *one, most, backward]
    else:
        head = _head_gradients(step)
        yield "the last block's backward pass", [kept, *copies, *widened, head, backward]
    yield "the end of the backward pass", [gradients, *_embedding(step)]
    if step.workers > 1:
        flat = min(BUCKET, gradients.bytes or step.trained * 4)
        yield "the sum over workers", [gradients, Part("bucket", flat, "of the gradients")]


def _sharded_moments(step: Step) -> Iterable[tuple[str, list[Part]]]:
    """The same where the workers share the model: no block's weights are copied, they are gathered
    in the precision of the products, and of a block's gradients one worker's part is left."""
    layers, root, kept = step.shape.layers, sharding.root(step), _kept(step)
    widened, head = _widened(step), _head_gradients(step)
    of_all = [] if step.checkpointing else widened
    yield "the beginning of the forward pass", [root, *sharding.beginning(step)]
    yield _name_of_loss(step), [kept, root, *of_all, *_tail(step), *_loss(step)]
    backward = Part("backward pass", _working(step), "what one block's backward pass has in hand")
    # From one block to the next less is kept and more gradients are left. The most is taken at an
    # end or beside it: the last block finds no sum of another's gradients, the first gathers none.
    for at in dict.fromkeys((layers - 1, max(layers - 2, 0), min(1, layers - 1), 0)):
        here = [root, head, *sharding.left(step, layers - 1 - at)]
        if step.checkpointing:
            before = after = [_of_blocks(kept, at + 1, layers)]
            working = [*(_of_blocks(part, 1, layers) for part in widened), _again(step), backward]
        else:
            before = [_of_blocks(part, at + 1, layers) for part in (kept, *widened)]
            after = [_of_blocks(part, at, layers) for part in (kept, *widened)]
            working = [backward]
        name = _turn(at, layers)
        yield name, [*before, *here, *working, *sharding.block(step, at, done=False)]
        yield f"the end of {name}", [*after, *here, *sharding.block(step, at, done=True)]
    first = sharding.summed(step)  # the last one whose gradients were summed
    other = [] if step.shape.tied else [head]
    here = [root, first, *other, *sharding.left(step, layers)]
    yield "the end of the backward pass", [*here, *_embedding(step)]
    twice = _product("gradients of embeddings and head", 2 * sharding.root_learns(step), 4,
                     "parameters x 4 bytes (fp32), and the buffer that sums them")  # fmt: skip
    yield "the sum over workers", [*sharding.left(step, layers, outside=True), twice]


def _of_blocks(part: Part, number: int, layers: int) -> Part:
    """What `number` of all blocks have of it."""
    how = part.how if number == layers else f"{part.how}, of {number} of them"
    return Part(part.name, part.bytes * number / layers, how)


def _turn(at: int, layers: int) -> str:
    number = {0: "the first block", layers - 1: "the last block"}.get(at, f"block {at + 1}")
    return f"{number}'s backward pass"


def _asked(step: Step, other: Shape) -> list[Part]:
    """A frozen model reads the micro-batch, before the model itself does; what stays of that is
    held."""
    size = 2 if step.half else 4
    each = transient(other) * size / 2 + size * other.hidden
    parts = [Part("forward pass", step.tokens * each, f"of the {step.teacher_name}")]
    if step.opinions:
        one = max(SURROGATE_BUFFER, 16 * 4 * other.vocabulary)
        parts.append(Part("chunks of logits", 3.0 * one, "of the surrogate"))
    return parts


def _name_of_loss(step: Step) -> str:
    return "the backward pass of the loss" if step.late else "the loss"


def _again(step: Step) -> Part:
    """What checkpointing computes again for the backward pass of a block. What a selective one kept
    of it is taken over or goes: each result is handed out once."""
    each = layer_activations(step)
    there = stream(step) + (products_kept(step) if step.selective else 0)
    return Part(
        "activations of one block",
        step.tokens * max(each - there, 0),
        f"computed again: {count(step.tokens)} tokens x {each:,.0f} bytes",
    )


def _kept(step: Step) -> Part:
    """What all blocks keep until the backward pass."""
    layers, tokens = step.shape.layers, step.tokens
    if step.selective:
        each, what = stream(step) + products_kept(step), "inputs and products of"
    elif step.checkpointing:
        each, what = stream(step), "the inputs of"
    else:
        each, what = layer_activations(step), "of"
    size = tokens * layers * each
    if step.rank and not step.checkpointing and step.half:
        size -= 4 * step.shape.hidden * tokens  # the first norm's input learns nothing
    how = f"{what} {layers} blocks: {count(tokens)} tokens x {each:,.0f} bytes each"
    return Part("activations", max(size, 0), how)


def _tail(step: Step) -> list[Part]:
    """What lies after the last block: the final norm's, the hidden states, positions and mask."""
    hidden, wide = step.shape.hidden, step.wide
    each = (4 if step.rank else 8) * hidden + wide * hidden
    size = step.tokens * (each + 2 * step.shape.head_dim * (2 if step.rank and step.half else 4))
    if step.masked and step.checkpointing:
        size += step.rows * step.length**2  # bool
    return [Part("final norm and hidden states", size, f"{count(step.tokens)} tokens")]


def _copies(step: Step) -> list[Part]:
    """16-bit copies of fp32 weights that autocast makes and the backward pass needs."""
    if not step.half:
        return []
    shape = step.shape
    if step.rank:
        return [_product("16-bit copies", step.adapted, 2, "parameters of the adapters x 2 bytes")]
    block = sum(math.prod(size) for size in shape.layer().values() if len(size) > 1)
    return [_product("16-bit copies", shape.layers * block, 2, "weights of blocks x 2 bytes")]


def _widened(step: Step) -> list[Part]:
    """Experts with their adapters added, of all blocks."""
    size = step.shape.layers * step.widened
    return [Part("experts with adapters", size, "W + B A, whole")] if size else []


def _loss(step: Step) -> list[Part]:
    """The loss in its forward pass, which sums the gradients."""
    shape = step.shape
    buffers, how = chunk_buffers(step)
    parts = [_head_gradients(step), Part("chunks of logits", buffers, how)]
    parts.append(
        Part(
            "gradient of the hidden states",
            step.heads * step.tokens * shape.hidden * step.wide,
            f"{count(step.tokens)} tokens x {shape.hidden:,} x {step.wide} bytes",
        )
    )
    if step.half and not step.rank:
        table = shape.vocabulary * shape.hidden
        parts.append(_product("16-bit head", table, 2, "parameters x 2 bytes"))
    return parts


def _head_gradients(step: Step) -> Part:
    shape = step.shape
    name = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    size = step.heads * shape.vocabulary * shape.hidden * (name in step.learns)
    return _product("gradient of the head", size, 4, "parameters x 4 bytes (fp32)")


def _working(step: Step) -> float:
    """Bytes that the backward pass of a block takes for the time being (measured, but for adapters
    that are not cast)."""
    hidden, inner = step.shape.hidden, step.shape.intermediate
    inner *= max(step.shape.experts_per_token, 1)
    matrix = hidden * step.shape.intermediate
    casts = step.tokens * (hidden + inner) + matrix if step.float8 else 0  # of one product
    if step.rank:
        # The gradient of the stream, and that times alpha / rank; of the last product's input what
        # W gives, what the adapter gives, and their sum, when A's own input has gone.
        each = 4.0 * hidden + 4.0 * inner
        if step.casts:
            each = 8.3 * hidden + 6.5 * inner if step.checkpointing else 8.0 * hidden + 4.0 * inner
        whole = step.widened  # the gradient of W + B A, from which those of B and A follow
        if step.nf4:  # a matrix as the product has it
            whole += step.wide * max(map(math.prod, step.shape.projections.values()))
        return step.tokens * each * step.wide / 2 + whole + casts
    grows = 10 * matrix if step.checkpointing else 2 * matrix
    if step.sharded:  # its gradients are in the precision of the products, and counted as such
        grows = 0
    return step.tokens * (6 * hidden + 4 * inner) * step.wide / 2 + grows + casts


def _gradients(step: Step) -> Part:
    """The gradients at the end of the backward pass, but for the embedding's; with `accumulate`
    they are held all the time."""
    learns = {k: v for k, v in step.learns.items() if k != "model.embed_tokens.weight"}
    size = step.adapted + sum(math.prod(dimensions) for dimensions in learns.values())
    if step.accumulate > 1:
        size = 0
    return _product("gradients", size, 4, "parameters x 4 bytes (fp32)")


def _without(step: Step, gradients: Part, prefix: str) -> Part:
    """`gradients` without those of one block, with that of a tied head."""
    mine = sum(math.prod(d) for name, d in step.learns.items() if name.startswith(prefix))
    size = max(gradients.bytes / 4 - mine, 0)
    if step.shape.tied:
        size += _head_gradients(step).bytes / 4
    return _product("gradients", size, 4, "parameters x 4 bytes (fp32)")


def _embedding(step: Step) -> list[Part]:
    """The embedding's gradient is made whole, and where it is the head too, added to that one's."""
    if "model.embed_tokens.weight" not in step.learns:
        return []
    table = step.shape.vocabulary * step.shape.hidden
    if step.shape.tied:
        how = "parameters x 4 bytes (fp32), as embedding, as head, and their sum"
        return [
            Part(
                "gradient of the embedding", (2 + step.heads) * 4 * table, count(table) + " " + how
            )
        ]
    stream = Part("gradient of the stream", 4 * step.shape.hidden * step.tokens, "fp32")
    return [_product("gradient of the embedding", table, 4, "parameters x 4 bytes"), stream]


def _packed(shape: Shape, size: int) -> Part:
    """A base in NF4 (Dettmers et al. 2023): half a byte for a weight, one for the scale of 64, and
    for 256 of these 4 bytes, and 4 for their mean; what is not among `projections` is as it was."""
    held, inside = 0, 0
    for matrix in map(math.prod, shape.projections.values()):
        scales = -(-matrix // 64)
        held += -(-matrix // 2) + scales + 4 * -(-scales // 256) + 4
        inside += matrix
    held, inside = held * shape.layers, inside * shape.layers
    rest = shape.parameters - inside
    how = f"{count(inside)} parameters x {held / max(inside, 1):.3f} bytes (nf4), {count(rest)}"
    return Part("weights", held + rest * size, f"{how} x {size} bytes")


def _product(name: str, number: float, size: int, what: str) -> Part:
    return Part(name, number * size, f"{count(number)} {what}")
