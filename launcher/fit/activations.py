"""What the blocks of a model keep of one token, in bytes: for their backward pass, where they are
only read, and where answers are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.shapes import Shape

if TYPE_CHECKING:
    from launcher.fit.step import Step


def layer_activations(step: Step) -> float:
    """What one block keeps for its backward pass: the inputs of products, of RMSNorm (in fp32), of
    attention and of the gated MLP, as Transformers' modules save them."""
    shape, half = step.shape, step.half
    hidden, inner = shape.hidden, shape.intermediate * max(shape.experts_per_token, 1)
    query, pair = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = step.wide
    inputs: float
    if step.rank:
        # Per norm its fp32 input; a base that learns nothing keeps no inputs, each A its own.
        norms = 2 * 4 * hidden
        inputs = _adapter_inputs(step)
        outputs = wide * step.rank * len(step.targets)
    else:
        # Per norm its fp32 input and result; under autocast each product has a copy of its input.
        norms = 2 * 2 * 4 * hidden
        inputs = 5 * wide * hidden if half else 2 * wide * hidden
        inputs += wide * inner  # of the last product; attention's result is counted below
        outputs = 0
    kept = 3 * wide * inner  # gate, its activation, and up
    keys = query if step.masked or step.eager else pair  # with a mask, heads are repeated
    attention = wide * (2 * query + 2 * keys) + 4 * shape.heads + 8
    if step.eager:  # scores, and their softmax in fp32 and 16 bits
        attention += shape.heads * step.length * (4 + 2 * wide)
    if step.masked:
        attention += wide * step.length
    if shape.family.startswith("qwen3"):  # queries and keys have norms of their own
        attention += (4 + (0 if step.rank else wide)) * (query + pair)
        attention += 4 * (shape.heads + shape.kv_heads)
    return norms + inputs + outputs + kept + attention


def products_kept(step: Step) -> float:
    """What selective checkpointing keeps of one block (trainer/blocks.py): the results of its
    matrix products, those of an adapter too, and that of fused attention with its logarithm."""
    shape, sizes = step.shape, step.shape.projections
    outputs = sum(size[0] for size in sizes.values())
    if shape.experts:  # gate, up and down of each one that a token meets
        outputs += shape.experts_per_token * (2 * shape.intermediate + shape.hidden)
    outputs += sum(step.rank + sizes[name][0] for name in step.targets)
    attention = 0 if step.eager else step.wide * step.shape.heads * step.shape.head_dim
    return step.wide * outputs + attention + (0 if step.eager else 4 * step.shape.heads)


def stream(step: Step) -> float:
    """The residual stream: fp32 unless the embedding is 16-bit."""
    return step.shape.hidden * (2 if step.rank and step.half else 4)


def transient(shape: Shape) -> float:
    """What a block of a model that is only read has in hand at most (measured: 8.4 hidden + 6
    intermediate)."""
    return 8.4 * shape.hidden + 6 * shape.intermediate * max(shape.experts_per_token, 1)


def cache(step: Step) -> float:
    """Bytes of the keys and values of one token while answers are drawn: keys are fp32, as rotary
    embeddings leave them, unless the model itself is 16-bit."""
    key = step.base_bytes if step.half else 4
    return step.shape.layers * step.shape.kv_heads * step.shape.head_dim * (key + step.wide)


def _adapter_inputs(step: Step) -> float:
    """What the A's of a block keep of their inputs: where these are cast, a copy each. Else q, k
    and v share one input, gate and up another; that of o is attention's result, counted there."""
    sizes = {name: step.shape.projections[name][1] for name in step.targets}
    if step.casts:
        return 2 * sum(sizes.values())
    together = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    inputs = {together.get(name, name): size for name, size in sizes.items() if name != "o_proj"}
    return step.wide * sum(inputs.values())
