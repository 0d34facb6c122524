"""The memory of one device at its peak, for every kind of stage."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Optional

from launcher.fit import sharding
from launcher.fit import step as steps
from launcher.fit.activations import cache, transient
from launcher.fit.parts import COMMUNICATION, CONTEXT, SLACK, Memory, Part, count, usable
from launcher.fit.step import Step
from launcher.hardware import Accelerator
from launcher.shapes import Shape, Shapes
from launcher.spec import Stage
from trainer.config import TRAINING as TRAINING
from trainer.config import Grpo, Model

#: Rows of a forward pass of stage `evaluate` (trainer/stages.py); halved when they do not fit.
_EVALUATED_ROWS = 8
#: Bytes of a buffer of logits of stage `targets` (trainer/teacher_pass.py).
_TARGETS_BUFFER = 64 * 2**20
#: Objectives whose gradient is known only when all log-probs are (losses/linear.token_logprobs).
LATE = ("dpo", "ipo", "grpo")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def memory(stage: Stage, accelerator: Accelerator, nodes: int, shapes: Shapes) -> Optional[Memory]:
    """The memory of one device of `accelerator` at its peak, of a stage on `nodes` of them; None:
    not known, and `unknown` says why."""
    if unknown(stage, accelerator, shapes) is not None:
        return None
    workers, on_gpu = accelerator.count * nodes, accelerator.kind.vendor == "nvidia"
    slack = SLACK if on_gpu else 0.0
    if stage.stage in TRAINING:
        step = step_of(stage, accelerator, nodes, shapes)
        moment, parts = steps.peak(step, slack)
        notes = (*_notes(stage, step), *_notes_of_workers(stage, accelerator, step))
    else:
        moment, notes = "the forward pass", ()
        parts = _reading(stage, accelerator, shapes)
    if on_gpu:
        parts = [*parts, *_outside(steps.passing(parts), workers)]
    return Memory(tuple(parts), usable(accelerator.kind), moment, notes)


def staying(found: Memory) -> float:
    """Bytes of what is there all the time, also while nothing is learned."""
    parts = [part for part in found.parts if part.name != "allocator"]
    goes = steps.passing(part for part in parts if not part.outside)
    return sum(part.bytes for part in parts) - goes


def unknown(stage: Stage, accelerator: Accelerator, shapes: Shapes) -> Optional[str]:
    """Why `memory` has no answer, in a phrase; None when it has."""
    if stage.stage in ("merge", "export", "tokenizer"):
        return f"stage {stage.stage} runs on the CPU"
    if stage.stage == "smoke":
        return "stage smoke trains no language model"
    if stage.stage not in (*TRAINING, "targets", "evaluate"):
        return f"the memory of stage {stage.stage} is not computed yet"
    if accelerator.kind.vendor == "tpu":
        return "the trainer does not run on TPUs yet"
    wanted = ["model"] if stage.stage in TRAINING else []
    if stage.targets is not None or (stage.kd is not None and stage.kd.teacher is not None):
        wanted.append("teacher")
    if stage.sdce is not None and stage.sdce.surrogate is not None:
        wanted.append("teacher")
    if stage.evaluate is not None:
        wanted += [f"evaluate.{label}" for label in stage.evaluate.models]
    missing = [part for part in wanted if part not in shapes]
    if missing:
        guided = stage.sdce is not None
        named = ", ".join("surrogate" if guided and m == "teacher" else m for m in missing)
        return f"the shape of {named} is not known on this machine; fetch its config.json first"
    return None


def checkpoint_bytes(stage: Stage, shapes: Shapes) -> Optional[float]:
    """Bytes of one whole checkpoint of a training stage: its weights (an adapter: that alone) and
    AdamW's two moments of what learns, in fp32. None: it writes none, or the shape is not known."""
    if stage.stage not in TRAINING or "model" not in shapes or stage.model is None:
        return None
    model, shape = stage.model, shapes["model"]
    step = Step(shape, 1, 1, True, False, False, False, _learns(model, shape),
                *_adapter(model, shape), experts=_experts(model))  # fmt: skip
    weights = step.adapted if model.adapter is not None else shape.parameters
    return 4.0 * weights + 8.0 * step.trained


def step_of(stage: Stage, accelerator: Accelerator, nodes: int, shapes: Shapes) -> Step:
    """What of a training stage decides its memory; its shapes must be known."""
    assert stage.model is not None and stage.train is not None
    model, train, shape = stage.model, stage.train, shapes["model"]
    kd, sdce, grpo = stage.kd, stage.sdce, stage.grpo
    online = kd is not None and kd.mode == "online"
    guided = sdce is not None and sdce.surrogate is not None
    whole = sdce is not None and sdce.loss == "kl"
    keeps = kd is not None and kd.keep_logits is not None
    eager = model.attention == "eager" or shape.attention == "eager"
    automatic = isinstance(train.micro_batch, str)
    rank, targets = _adapter(model, shape)
    workers = accelerator.count * nodes
    made = Step(
        shape=shape,
        # Of stage grpo each prompt comes with all its answers, at most of full length.
        rows=(1 if automatic else int(train.micro_batch)) * (grpo.group if grpo else 1),
        length=stage.data.sequence_length,
        half=_half(model, accelerator),
        checkpointing=bool(model.gradient_checkpointing),
        selective=model.gradient_checkpointing == "selective",
        masked=stage.data.packing and model.attention in ("auto", "sdpa", "eager"),
        eager=eager,
        learns=_learns(model, shape),
        rank=rank,
        targets=targets,
        experts=_experts(model),
        nf4=model.adapter is not None and model.adapter.quantization == "nf4",
        # `auto` may end with single rows that add up; what a teacher says of all is kept anyway.
        accumulate=max(1, (train.global_batch or 1) // workers) if automatic else train.accumulate,
        workers=workers,
        heads=1 + (kd is not None and not online) + keeps,
        dense=online or keeps or whole,
        teacher=shapes.get("teacher") if online or guided else None,
        teacher_name="surrogate" if guided else "teacher",
        opinions=1 + sdce.k if sdce is not None and sdce.loss == "surrogate" else 0,
        late=stage.stage in LATE,
        start=keeps or (grpo is not None and grpo.beta > 0 and not rank),
        start_states=keeps,
        on_cpu=accelerator.kind.vendor == "cpu",
        float8=model.float8 != "off" and accelerator.kind.capability >= 8.9,
    )
    return replace(made, sharded=sharding.chosen(stage, accelerator, made) is not None)


def _half(model: Optional[Model], accelerator: Accelerator) -> bool:
    """Whether products run in 16 bits: what the trainer's `precision: auto` decides."""
    precision = model.precision if model is not None else "auto"
    has_bf16 = accelerator.kind.vendor == "nvidia" and accelerator.kind.capability >= 8
    return precision in ("bf16", "fp16") or (precision == "auto" and has_bf16)


def _learns(model: Model, shape: Shape) -> dict[str, tuple[int, ...]]:
    """The parameters of the model itself that are trained."""
    if model.adapter is not None:
        return {}
    tensors = shape.tensors()
    tied = {"model.embed_tokens.weight": "lm_head.weight"} if shape.tied else {}

    def frozen(name: str) -> bool:
        names = (name, tied.get(name, name))
        return any(fnmatchcase(n, pattern) for n in names for pattern in model.freeze)

    return {name: size for name, size in tensors.items() if not frozen(name)}


def _adapter(model: Model, shape: Shape) -> tuple[int, tuple[str, ...]]:
    if model.adapter is None:
        return 0, ()
    there = shape.projections
    wanted = model.adapter.targets
    if wanted == "auto":
        return model.adapter.rank, tuple(name for name in _PROJECTIONS if name in there)
    ends = {target.rpartition(".")[2] for target in wanted}
    return model.adapter.rank, tuple(n for n in _PROJECTIONS if n in ends and n in there)


def _experts(model: Model) -> bool:
    return model.adapter is not None and model.adapter.experts


def _notes(stage: Stage, step: Step) -> list[str]:
    assert stage.train is not None and stage.model is not None
    notes = []
    if isinstance(stage.train.micro_batch, str):
        notes.append("micro_batch auto: counted as one row, the least; the job tries for more")
    if stage.grpo is not None:
        notes += _notes_of_answers(stage.grpo, step)
    if step.opinions:
        notes.append("the surrogate is counted with as many tokens as the model reads")
    if step.float8:
        notes.append("float8 saves no memory: weights stay as they are, casts come on top")
    if step.masked and not step.eager:
        notes.append("attention through SDPA with a mask; with flash-attn it takes less")
    if step.nf4 and step.shape.fused_experts:
        notes.append("the job will refuse nf4: it does not reach experts that are one tensor")
    if step.experts and not step.shape.fused_experts:
        notes.append("the job will refuse model.adapter.experts: this model has no experts")
    if step.shape.experts:
        notes.append("experts are counted roughly: each token's, with no room for uneven routing")
    if step.eager:
        notes.append("eager attention keeps whole matrices of scores; counted roughly")
    return notes


def _notes_of_answers(grpo: Grpo, step: Step) -> list[str]:
    size = cache(step) * step.tokens / 2**30
    notes = [
        f"counted: {step.rows // grpo.group} prompts x {grpo.group} answers, each of"
        f" {step.length:,} tokens with its prompt, the most that may come"
    ]
    if grpo.rollouts == "vllm":
        return [*notes, "the vLLM server's memory is not counted"]
    return [
        *notes,
        f"not counted: {size:.1f} GiB of keys and values while all answers are drawn at once; "
        "where they do not fit, the job draws fewer at a time",
    ]


def _notes_of_workers(stage: Stage, accelerator: Accelerator, step: Step) -> list[str]:
    assert stage.train is not None
    if step.nf4 and stage.train.parallel == "fsdp":
        return ["the job will refuse train.parallel: fsdp with weights of 4 bits"]
    why = sharding.chosen(stage, accelerator, step)
    return [] if why is None else [f"{step.workers} workers share the model ({why})"]


def _reading(stage: Stage, accelerator: Accelerator, shapes: Shapes) -> list[Part]:
    """A model that is only read: its weights once, and one forward pass."""
    size = 2 if _half(stage.model, accelerator) else 4
    if stage.targets is not None:
        shape, rows = shapes["teacher"], stage.targets.micro_batch
        buffers = 3 * max(_TARGETS_BUFFER, 16 * 4 * shape.vocabulary)
    else:
        read = [shapes[part] for part in shapes if part.startswith("evaluate.")]
        shape, rows = max(read, key=lambda other: other.parameters), _EVALUATED_ROWS
        buffers = (
            2 * steps.CPU_BUFFER if accelerator.kind.vendor == "cpu" else (2 * steps.DEVICE_BUFFER)
        )
    tokens = rows * stage.data.sequence_length
    each = transient(shape) * size / 2 + size * shape.hidden
    parts = [
        Part("weights", shape.parameters * size,
             f"{count(shape.parameters)} parameters x {size} bytes"),
        Part("forward pass", tokens * each, f"{count(tokens)} tokens x {each:,.0f} bytes"),
        Part("chunks of logits", float(buffers), "buffers of the head's products"),
    ]  # fmt: skip
    if size == 2 and shape.attention == "eager":
        scores = rows * shape.heads * stage.data.sequence_length**2 * 6
        parts.append(Part("scores of attention", scores, "heads x tokens x tokens x 6 bytes"))
    return parts


def _outside(goes: float, workers: int) -> list[Part]:
    """What the allocator does not count as allocated."""
    parts = [
        Part("allocator", SLACK * goes, f"{SLACK:.0%} of what comes and goes (assumed)", True),
        Part("CUDA context", CONTEXT, "kernels and cuBLAS's workspace (assumed)", True),
    ]
    if workers > 1:
        parts.append(Part("NCCL", COMMUNICATION, "buffers between workers (assumed)", True))
    return parts
