"""Models and tokenizers: loading, initialising, and the two things that losses need of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer import adapters, blocks, parallel, quantized
from trainer.attention import PLAIN_ATTENTION as PLAIN_ATTENTION
from trainer.attention import attention_implementations as attention_implementations
from trainer.attention import decoder_inputs
from trainer.attention import pick_attention as pick_attention
from trainer.batch import Batch
from trainer.checkpoint import resolve
from trainer.config import Architecture, ConfigError, Model
from trainer.freeze import freeze
from trainer.runtime import Runtime

#: `architecture.family` -> Hugging Face configuration class.
FAMILIES = {"llama": "LlamaConfig", "qwen3": "Qwen3Config"}
#: Configuration fields that change the logits after the head: the chunked losses do not apply them.
_LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "output_multiplier_scale",
    "logits_soft_cap",
    "lm_head_multiplier",
)


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden states [n, hidden] at the supervised positions of `batch`."""
    # No mask and no cache: anything else lets documents of a packed row see each other.
    inputs = {**decoder_inputs(model, batch), "use_cache": False}
    if parallel.is_sharded(model):
        hidden: Tensor = getattr(model, parallel.DECODE)(**inputs).flatten(0, 1)
    else:
        hidden = model.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)
    assert batch.supervised is not None
    hidden = hidden.index_select(0, batch.supervised)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        # The residual stream is fp32 under autocast; the head's products are to run in 16 bits.
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return hidden


def head_weight(model: nn.Module) -> Tensor:
    """The output embedding [vocabulary, hidden] as it is: the losses cast it for their products
    and return its gradient in its own precision."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, no recomputation of activations; the mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def load_tokenizer(reference: str) -> Any:
    """The tokenizer at a model reference. Errors: `ConfigError` when there is none."""
    from transformers import AutoTokenizer

    name = resolve(reference)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library raises many kinds for "not there"
        why = adapters.trouble(name, error)
        raise ConfigError(f"no tokenizer at '{reference}': {why}") from error


def load_model(
    config: Model,
    tokenizer: Any,
    runtime: Runtime,
    seed: int,
    *,
    adapter_from: Optional[Path] = None,
    share: parallel.Parallel = "ddp",
    say: Callable[[str], None] = lambda line: None,
    before_placing: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """The model to be trained, on the runtime's device, in training mode: what learns is fp32, the
    base of an adapter has the runtime's dtype. `adapter_from`: a checkpoint of the adapter;
    `share`: how several workers hold it; `before_placing` is called with the whole model, which may
    be on the CPU. Errors: `ConfigError` for a model that is not there or
    that the losses cannot serve."""
    torch.manual_seed(seed)
    attention = attention_implementations(config, runtime)
    if config.architecture is not None:
        model = _from_config(_configuration(config.architecture, tokenizer), attention)
    elif config.name is None:
        raise ConfigError("model: give `name`, or `architecture` with `init: random`")
    elif config.init == "random":
        model = _from_config(_load_configuration(config.name), attention)
    else:
        _refuse_adapter(config.name)
        dtype = torch.float32 if config.adapter is None else runtime.dtype
        if config.adapter is not None and config.adapter.quantization == "nf4":
            known = _load_configuration(config.name)
            packed = quantized.nf4_options(config.name, known, runtime)
            model = load_pretrained(config.name, dtype, attention, packed)
            say(quantized.settle(model))
        else:
            model = load_pretrained(config.name, dtype, attention)
        if quantized.was_widened(model):
            say(
                f"mxfp4: the weights are widened to {str(dtype).rpartition('.')[2]}, without a loss"
            )
    _check(model, tokenizer, config.name or "model.architecture")
    blocks.recompute(model, config.gradient_checkpointing)
    for line in _freeze_unused(model):
        say(line)
    if config.adapter is not None:
        assert config.name is not None
        model = adapters.attach(model, config.adapter, config.name, adapter_from)
        for line in adapters.left_out(model):
            say(line)
    for line in freeze(model, config.freeze):
        say(line)
    model.train()
    before_placing(model)
    parallel.place(model, runtime, share, say)
    return model


def load_frozen(reference: str, runtime: Runtime, attention: Sequence[str]) -> nn.Module:
    """A model that is only read (a teacher, a model under evaluation), in the runtime's dtype."""
    model = load_pretrained(reference, runtime.dtype, attention)
    _check(model, None, reference)
    return model.to(runtime.device).eval().requires_grad_(False)


def load_pretrained(
    reference: str,
    dtype: torch.dtype,
    attention: str | Sequence[str],
    packed: Optional[dict[str, Any]] = None,
) -> Any:
    """A causal language model at a model reference, on the CPU; an adapter comes on its base, which
    is never quantised for it. `attention`: see `pick_attention`; `packed`: of `nf4_options`."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    name = resolve(reference)
    if adapters.is_adapter(name):
        try:
            base = load_pretrained(adapters.base_of(name), dtype, attention)
        except ConfigError as error:
            raise ConfigError(f"the base model of the adapter '{reference}': {error}") from error
        return adapters.load(base, name)
    configuration = _load_configuration(reference)
    kind = pick_attention(configuration, attention)
    widened = quantized.method(configuration) == quantized.MXFP4
    options = packed or (quantized.mxfp4_options() if widened else {})
    try:
        model, facts = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=kind, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        why = adapters.trouble(name, error)
        raise ConfigError(f"cannot load the model '{reference}': {why}") from error
    if missing := sorted(facts["missing_keys"]):  # Transformers draws them at random, and goes on
        raise ConfigError(
            f"cannot load the model '{reference}': its files lack {len(missing)} of its tensors,"
            f" such as {missing[0]}; fetch or write them again"
        )
    if widened:
        quantized.forget(model)
    return model


def check_vocabularies(student: Any, teacher: Any) -> None:
    """Both tokenizers must give equal tokens equal ids. Errors: `ConfigError`, with an example."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    token = min(
        (t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t)),
        key=lambda t: (min(ours.get(t, 1 << 60), theirs.get(t, 1 << 60)), t),
    )
    raise ConfigError(
        f"kd.teacher: its vocabulary differs from the student's ({len(theirs)} and {len(ours)}"
        f" tokens; {token!r} is {theirs.get(token)} and {ours.get(token)}); distillation compares"
        " tokens by id: take a teacher with the student's tokenizer"
    )


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once; of packed ones, those that they stand for."""
    return sum(quantized.elements(parameter) for parameter in model.parameters())


def configuration(plan: Model, tokenizer: Any) -> Any:
    """The text configuration of the model that `load_model` makes. Errors: `ConfigError`."""
    if plan.architecture is not None:
        return _configuration(plan.architecture, tokenizer)
    return _load_configuration(str(plan.name)).get_text_config()


def _refuse_adapter(reference: str) -> None:
    folder = resolve(reference)
    if adapters.is_adapter(folder):
        raise ConfigError(
            f"model.name: '{reference}' is an adapter of '{adapters.base_of(folder)}': merge it"
            " first (stage merge), or name the base and train a new adapter"
        )


def _configuration(architecture: Architecture, tokenizer: Any) -> Any:
    import transformers

    wide = architecture.intermediate_size or -(-architecture.hidden_size * 8 // 3 // 32) * 32
    return getattr(transformers, FAMILIES[architecture.family])(
        vocab_size=len(tokenizer),
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads or architecture.heads,
        head_dim=architecture.hidden_size // architecture.heads,
        intermediate_size=wide,
        tie_word_embeddings=architecture.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta},
        attention_dropout=architecture.dropout,
        max_position_embeddings=1 << 17,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _load_configuration(reference: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(reference))
    except (OSError, ValueError) as error:
        why = adapters.trouble(resolve(reference), error)
        raise ConfigError(f"cannot load the model '{reference}': {why}") from error


def _from_config(configuration: Any, attention: Sequence[str]) -> Any:
    from transformers import AutoModelForCausalLM

    kind = pick_attention(configuration, attention)
    return AutoModelForCausalLM.from_config(
        configuration, dtype=torch.float32, attn_implementation=kind
    )


def _check(model: Any, tokenizer: Any, name: str) -> None:
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ConfigError(f"'{name}' has no plain output embedding (bias-free linear head)")
    for configuration in (model.config, model.config.get_text_config()):
        for field in _LOGIT_CHANGES:
            if getattr(configuration, field, None) not in (None, 0, 1, 1.0):
                raise ConfigError(f"'{name}' rescales its logits ({field}); not supported")
    if tokenizer is not None and len(tokenizer) > head.weight.shape[0]:
        raise ConfigError(
            f"'{name}' has {head.weight.shape[0]} output tokens, its tokenizer {len(tokenizer)}"
        )


def _freeze_unused(model: Any) -> list[str]:
    """Freeze what text does not pass through, such as a vision tower: it would get no gradient, on
    several ranks zeros, and weight decay with them. Returns a line about it, if any."""
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    runs = adapters.language_model(model)
    beside = runs.rstrip(".").rpartition(".")[0]
    count, parts = 0, set()
    for name, parameter in model.named_parameters():
        if name.startswith(runs) or id(parameter) in head:
            continue
        parameter.requires_grad_(False)
        count += parameter.numel()
        parts.add(".".join(name.split(".")[: beside.count(".") + 2 if beside else 1]))
    if not count:
        return []
    names = ", ".join(sorted(parts))
    return [f"frozen: {names}, {count:,} parameters that text does not pass through"]


def has_tokenizer(reference: str) -> bool:
    """Whether a local folder carries a tokenizer; hub names are taken to have one."""
    folder = Path(resolve(reference))
    return not folder.is_dir() or (folder / "tokenizer_config.json").exists()


def vocabulary_size(reference: str) -> int:
    """The number of logits of the model at a model reference. Errors: `ConfigError`."""
    return int(_load_configuration(reference).get_text_config().vocab_size)
