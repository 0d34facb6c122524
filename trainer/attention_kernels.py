"""Attention functions that Transformers' models can run on beside the library's own: torch's
`varlen_attn`, and `flex_attention`. Each is registered under a name in the library's table on use.

A feature that a function does not have is refused when a model asks for it, and never left out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer.config import ConfigError

VARLEN, FLEX = "launch_varlen", "launch_flex"


@functools.cache
def register() -> None:
    """Put both into the library's tables, of attention functions and of their masks."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, varlen)
    AttentionMaskInterface.register(VARLEN, mask_where_needed)
    AttentionInterface.register(FLEX, flex)
    AttentionMaskInterface.register(FLEX, block_mask)


@functools.cache
def has_varlen() -> bool:
    """Whether this torch has a `varlen_attn` with windows and a scale."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "scale"} <= inspect.signature(varlen_attn).parameters.keys()


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    sliding_window: Optional[int] = None,
    cu_seq_lens_q: Optional[Tensor] = None,
    max_length_q: Optional[int] = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents by `torch.nn.attention.varlen.varlen_attn`. `query`
    [rows, heads, length, width], `key` and `value` with as many heads or fewer. `cu_seq_lens_q`
    [documents + 1], int32: where documents begin in the flat row of all tokens, and its end;
    without it each row is one. A mask, or more keys than queries, means that text is generated:
    SDPA does that. `sliding_window`: tokens that one sees, itself included. Returns
    [rows, length, heads, width], of the dtype of the products. Errors: `ConfigError`."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse("varlen", module, dropout, others, ("softcap", "s_aux", "position_bias"))
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling)
    rows, _, length, _ = query.shape
    query, key, value = (
        t.transpose(1, 2).flatten(0, 1) for t in _of_one_kind(query, key, value)
    )  # fmt: skip
    if cu_seq_lens_q is None or max_length_q is None:
        ends = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
        cu_seq_lens_q, max_length_q = ends * length, length
    options: dict[str, Any] = {}
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            times = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(times, dim=1) for t in (key, value))
    found = varlen_attn(
        query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling,
        # (tokens before, tokens after); a window counts the token itself.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **options,
    )  # fmt: skip
    assert isinstance(found, Tensor)
    return found.reshape(rows, length, *found.shape[1:]), None


def flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    softcap: Optional[float] = None,
    s_aux: Optional[Tensor] = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention by `flex_attention` under the block mask that `block_mask` made: documents, windows
    and chunks are in it. Shapes as `varlen`. `softcap` c: scores become c tanh(score / c).
    `s_aux` [heads]: attention sinks, a further score of each row of scores that has no value. With
    the logsumexp L of the others, the result is that of these times 1 / (1 + exp(s - L)).
    Errors: `ConfigError`."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    _refuse("flex", module, dropout, others, ("position_bias",))
    if not isinstance(attention_mask, BlockMask):
        raise ConfigError("model.attention: the model makes its own masks; flex cannot, use eager")
    query, key, value = _of_one_kind(query, key, value)
    capped = None
    if softcap is not None:

        def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

    found = _flex(query.device.type)(
        query, key, value, score_mod=capped, block_mask=attention_mask, scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        return_aux=None if s_aux is None else AuxRequest(lse=True),
    )  # fmt: skip
    if s_aux is not None:
        found, aux = found
        share = torch.sigmoid(aux.lse - s_aux.to(aux.lse.dtype).view(1, -1, 1))
        found = (found * share.unsqueeze(-1)).to(value.dtype)
    return found.transpose(1, 2).contiguous(), None


def mask_where_needed(
    q_length: int, kv_length: int, attention_mask: Optional[Tensor] = None, **others: Any
) -> Optional[Tensor]:
    """The mask of `varlen`: none for whole rows, SDPA's where text is generated."""
    if q_length == kv_length and (attention_mask is None or bool(attention_mask.all())):
        return None
    from transformers.masking_utils import sdpa_mask

    mask: Optional[Tensor] = sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **others
    )
    return mask


def block_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Optional[Tensor] = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Any:
    """The mask of `flex`, made once a forward pass: which blocks of scores are computed, and inside
    them which scores. `mask_function(row, head, query, key)`: whether one token sees another.
    Offsets: of the first query and key, where text is generated; `attention_mask`: False where a
    row is padded."""
    from torch.nn.attention.flex_attention import create_block_mask

    del others

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Any:
        found = mask_function(row, head, query + q_offset, key + kv_offset)
        return found if attention_mask is None else found & attention_mask[row, key + kv_offset]

    return create_block_mask(
        sees, batch_size, None, q_length, kv_length, device=str(device),
        # Compiled, the whole matrix of the mask is never held.
        _compile=torch.device(device).type == "cuda",
    )  # fmt: skip


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    """Compiled on a GPU, where it would else hold whole matrices of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    plain: Callable[..., Any] = flex_attention
    if device != "cuda":
        return plain
    compiled = torch.compile(plain)

    def run(*tensors: Tensor, **options: Any) -> Any:
        # Inside a block that is compiled itself, it is compiled with it.
        inside = torch.compiler.is_compiling()
        return (plain if inside else compiled)(*tensors, **options)

    return run


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor],
    dropout: float,
    scaling: Optional[float],
) -> tuple[Tensor, None]:
    from transformers import AttentionInterface

    function = AttentionInterface()["sdpa"]
    query, key, value = _of_one_kind(query, key, value)
    output, _ = function(module, query, key, value, mask, dropout=dropout, scaling=scaling)
    return output, None


def _of_one_kind(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in autocast's dtype: rotary embeddings leave queries and keys in fp32."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _refuse(
    kind: str, module: nn.Module, dropout: float, others: dict[str, Any], lacks: tuple[str, ...]
) -> None:
    """One line for what a model asks of a function that it does not have."""
    asked = [name for name in lacks if others.get(name) is not None]
    if dropout > 0 and module.training:
        asked.append("dropout")
    if asked:
        words = {"softcap": "capped scores", "s_aux": "attention sinks"}
        named = " and ".join(words.get(name, name.replace("_", " ")) for name in asked)
        raise ConfigError(f"model.attention: {kind} has no {named}; use auto or eager")
