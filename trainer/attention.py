"""Which implementation of attention a model runs on: what there is here, what is right for the
model, and why another is refused. The functions themselves are in `attention_kernels`.

Documents that share a row are kept apart in one of two ways. SDPA, eager and flex take a mask that
Transformers makes of the position ids. The flat ones (flash-attn, torch's varlen) take no mask but
the borders of the documents, in one row of all tokens.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer import attention_kernels
from trainer.batch import Batch
from trainer.config import ConfigError, Model
from trainer.runtime import Runtime

#: What the library can run attention on everywhere, best first.
PLAIN_ATTENTION = ("sdpa", "eager")
#: What needs a GPU, best first.
FAST = ("flash_attention_3", "flash_attention_2", "varlen", "flex")
#: Those that see documents only as stretches of one flat row; they compute in 16 bits.
FLAT = ("flash_attention_3", "flash_attention_2", "varlen")
#: Our functions: name in a recipe -> name in the library's table.
OWN = {"varlen": attention_kernels.VARLEN, "flex": attention_kernels.FLEX}
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
#: Compute capability from which all of them have kernels (Ampere).
_CAPABILITY = (8, 0)
#: Of the heads: the widest for flash-attn's kernels, which varlen uses, too; flex's narrowest.
_WIDEST, _NARROWEST = 256, 16


def attention_implementations(config: Optional[Model], runtime: Runtime) -> tuple[str, ...]:
    """What may run attention, best first. `auto`: those of `FAST` that can run here, then SDPA,
    then eager. Errors: `ConfigError` for one that is asked for and cannot run here."""
    wanted = config.attention if config else "auto"
    if wanted == "auto":
        return (*(kind for kind in FAST if status(kind, runtime) == "usable"), *PLAIN_ATTENTION)
    found = status(wanted, runtime)
    if found != "usable":
        raise ConfigError(f"model.attention: {wanted} is {found}; use auto or sdpa")
    return (wanted,)


def status(kind: str, runtime: Runtime) -> str:
    """One phrase: `usable` on the runtime's device, or why not."""
    if kind in PLAIN_ATTENTION:
        return "usable"
    if runtime.device.type != "cuda":
        # Torch computes flex on a CPU, but no gradient of it.
        return "not usable (no CUDA device)"
    if kind in _PACKAGES and importlib.util.find_spec(_PACKAGES[kind]) is None:
        return "not installed"
    if kind in FLAT and runtime.precision == "fp32":
        return "not usable (precision is fp32)"
    found = torch.cuda.get_device_capability(runtime.device)
    if found < _CAPABILITY or (kind == "flash_attention_3" and found[0] != 9):
        needs = "a Hopper GPU" if kind == "flash_attention_3" else "compute capability 8.0"
        return f"not usable (needs {needs}, this GPU has {found[0]}.{found[1]})"
    if kind == "varlen" and not attention_kernels.has_varlen():
        return f"not usable (torch {torch.__version__} has no varlen_attn with windows)"
    if kind == "flex" and importlib.util.find_spec("triton") is None:
        return "not usable (Triton is not installed)"
    return "usable"


def flash_attention_status(runtime: Runtime) -> str:
    """One phrase for the banner: `usable`, or why not."""
    return status("flash_attention_2", runtime)


def pick_attention(configuration: Any, wanted: str | Sequence[str]) -> str:
    """The first of `wanted` that is right for models of this configuration, by its name in the
    library's table, where ours are then registered. Errors: `ConfigError` when none is right, or
    for what is no causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    choices = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    # The one place that says which class a configuration gives, composite ones too.
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(configuration), None)
    if found is None:
        raise ConfigError(
            f"cannot load the model '{configuration.name_or_path}': Transformers has no causal"
            f" language model of the kind {configuration.model_type}; choose another"
        )
    reasons = []
    for choice in choices:
        reason = wrong(choice, found, configuration)
        if reason is None:
            if choice in OWN:
                attention_kernels.register()
            return OWN.get(choice, choice)
        reasons.append(reason)
    why = next((f" ({reason})" for reason in reasons if reason), "")
    raise ConfigError(
        f"model.attention: {found.__name__} does not run on {' or '.join(choices)}{why};"
        " use auto or eager"
    )


def wrong(kind: str, found: Any, configuration: Any) -> Optional[str]:
    """None when models of the class `found` run on `kind` and come out right; else why not: a few
    words, or none when the class just does not have it."""
    text = configuration.get_text_config()
    if kind == "eager":
        return None
    if kind == "sdpa":
        return None if found._supports_sdpa else ""
    if kind == "flex":
        if not found._supports_flex_attn:
            return ""
        if (width := _head_width(text)) < _NARROWEST:
            return f"its heads of {width} are narrower than {_NARROWEST}"
        return _dropout(text)
    if not found._supports_flash_attn:
        return ""
    if not found._supports_sdpa:
        # What a class with flash-attn lacks SDPA for. Flash-attn 2 and 3 give sinks no gradient.
        capped = getattr(text, "attn_logit_softcapping", None)
        return "its scores are capped" if capped else "its attention sinks would be left out"
    if stateful(found, text):
        return "its recurrent or convolution layers would carry state from row to row"
    if kind == "varlen" and not found._supports_attention_backend:
        return ""
    if kind == "varlen" and (width := _head_width(text)) > _WIDEST:
        return f"its heads of {width} are wider than {_WIDEST}"
    if kind == "varlen" and getattr(text, "v_head_dim", None) is not None:
        return "its queries and values may differ in width"
    return None if kind == "flash_attention_2" else _dropout(text)


def stateful(found: Any, text: Any) -> bool:
    """Whether layers of such a model run along the row and know nothing of documents: in one flat
    row the rows of a micro-batch would be one text to them."""
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    others = [kind for kind in types if "attention" not in kind or kind.startswith("linear")]
    return bool(getattr(found, "_is_stateful", False) or others)


def kind_of(model: Any) -> str:
    """What a loaded model runs attention on, as recipes call it."""
    name = str(getattr(model.config, "_attn_implementation", "?"))
    return next((kind for kind, ours in OWN.items() if ours == name), name)


def decoder_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """What the decoder of `model` is called with: ids and positions, in one flat row where that is
    how documents are seen, and then their borders, found once for all layers and on the host, so
    that nothing waits for the device."""
    ids, positions = batch.input_ids, batch.position_ids
    if kind_of(model) not in FLAT:
        return {"input_ids": ids, "position_ids": positions}
    given: dict[str, Any] = {"input_ids": ids.view(1, -1), "position_ids": positions.view(1, -1)}
    if getattr(model, "_supports_attention_backend", False):  # it passes on what it does not know
        at_host = batch.host.position_ids if batch.host is not None else positions
        borders, longest = documents(at_host)
        borders = borders.to(ids.device, non_blocking=True)
        given.update(
            cu_seq_lens_q=borders, cu_seq_lens_k=borders,
            max_length_q=longest, max_length_k=longest,
        )  # fmt: skip
    return given


def documents(position_ids: Tensor) -> tuple[Tensor, int]:
    """Where the documents of the rows [rows, length] begin in the flat row, with its end, int32
    [documents + 1], and the tokens of the longest. A document begins with a row, and wherever a
    position does not follow the one before it."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = begins.flatten().nonzero().flatten().tolist()
    borders = [*starts, position_ids.numel()]
    longest = max(end - start for start, end in itertools.pairwise(borders))
    return torch.tensor(borders, dtype=torch.int32), longest


def needs_16_bits(model: nn.Module) -> bool:
    """Whether the model's attention cannot compute in fp32."""
    return kind_of(model) in FLAT


def _dropout(text: Any) -> Optional[str]:
    """Flash-attn 3, varlen and flex have none, and the library would not say so of the first."""
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    if any(isinstance(p := getattr(text, name, None), float) and p > 0 for name in names):
        return "its attention dropout would be left out"
    return None


def _head_width(text: Any) -> int:
    if width := getattr(text, "head_dim", None):
        return int(width)
    heads = getattr(text, "num_attention_heads", None)
    return int(text.hidden_size) // int(heads) if heads else _WIDEST
