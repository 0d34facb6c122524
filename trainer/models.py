"""Models and tokenizers: loading, initialising, and the two things that losses need of a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer import adapters, blocks
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
#: What the library can run attention on everywhere, best first.
PLAIN_ATTENTION = ("sdpa", "eager")


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden states [n, hidden] at the supervised positions of `batch`."""
    ids, positions = batch.input_ids, batch.position_ids
    if getattr(model.config, "_attn_implementation", "") == "flash_attention_2":
        # Its variable-length path sees documents only in one flat row.
        ids, positions = ids.view(1, -1), positions.view(1, -1)
    # No mask and no cache: anything else lets documents of a packed row see each other.
    output = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state.flatten(0, 1)
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
    say: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """The model to be trained, on the runtime's device, in training mode: what learns is fp32, the
    base of an adapter has the runtime's dtype. `adapter_from`: a checkpoint of the adapter.
    Errors: `ConfigError` for a model that is not there or that the losses cannot serve."""
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
        model = load_pretrained(config.name, dtype, attention)
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
    model.to(runtime.device).train()
    runtime.broadcast([*model.parameters(), *model.buffers()])
    return model


def load_frozen(reference: str, runtime: Runtime, attention: Sequence[str]) -> nn.Module:
    """A model that is only read (a teacher, a model under evaluation), in the runtime's dtype."""
    model = load_pretrained(reference, runtime.dtype, attention)
    _check(model, None, reference)
    return model.to(runtime.device).eval().requires_grad_(False)


def load_pretrained(reference: str, dtype: torch.dtype, attention: str | Sequence[str]) -> Any:
    """A causal language model at a model reference, on the CPU; an adapter comes on its base.
    `attention`: see `pick_attention`."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    name = resolve(reference)
    if adapters.is_adapter(name):
        try:
            base = load_pretrained(adapters.base_of(name), dtype, attention)
        except ConfigError as error:
            raise ConfigError(f"the base model of the adapter '{reference}': {error}") from error
        return adapters.load(base, name)
    kind = pick_attention(_load_configuration(reference), attention)
    try:
        model, facts = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=kind, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = adapters.trouble(name, error)
        raise ConfigError(f"cannot load the model '{reference}': {why}") from error
    if missing := sorted(facts["missing_keys"]):  # Transformers draws them at random, and goes on
        raise ConfigError(
            f"cannot load the model '{reference}': its files lack {len(missing)} of its tensors,"
            f" such as {missing[0]}; fetch or write them again"
        )
    return model


def attention_implementations(config: Optional[Model], runtime: Runtime) -> tuple[str, ...]:
    """What may run attention, best first. `auto`: flash-attn on CUDA in bf16 or fp16 when it is
    installed, then SDPA, then eager. Errors: `ConfigError` for flash-attn where it cannot run."""
    wanted = config.attention if config else "auto"
    flash = flash_attention_status(runtime)
    usable = flash.startswith("usable")
    if wanted == "auto":
        return ("flash_attention_2", *PLAIN_ATTENTION) if usable else PLAIN_ATTENTION
    if wanted == "flash_attention_2" and not usable:
        raise ConfigError(f"model.attention: flash_attention_2 is {flash}; use auto or sdpa")
    return (wanted,)


def pick_attention(configuration: Any, wanted: str | Sequence[str]) -> str:
    """The first of `wanted` that models of this configuration have. A class with flash-attn but
    without SDPA has attention sinks, which flash-attn's version 2 leaves out and gives no gradient.
    Errors: `ConfigError` when a model has none of them, or is no causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    choices = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    # The one place that says which class a configuration gives, composite ones too.
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(configuration), None)
    if found is None:
        raise ConfigError(
            f"cannot load the model '{configuration.name_or_path}': Transformers has no causal"
            f" language model of the kind {configuration.model_type}; choose another"
        )
    has = {
        "eager": True,
        "sdpa": bool(found._supports_sdpa),
        "flash_attention_2": bool(found._supports_flash_attn and found._supports_sdpa),
    }
    for choice in choices:
        if has.get(choice, True):
            return choice
    sinks = choices == ("flash_attention_2",) and found._supports_flash_attn
    raise ConfigError(
        f"model.attention: {found.__name__} does not run on {' or '.join(choices)}"
        f"{' (its attention sinks would be left out)' if sinks else ''}; use auto or eager"
    )


def flash_attention_status(runtime: Runtime) -> str:
    """One phrase for the banner: `usable`, or why not."""
    if runtime.device.type != "cuda":
        return "not usable (no CUDA device)"
    if importlib.util.find_spec("flash_attn") is None:
        return "not installed"
    if runtime.precision == "fp32":
        return "not usable (precision is fp32)"
    return "usable"


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
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


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
