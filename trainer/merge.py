"""Merging: an adapter added into the weights of its base model, and shown to have changed nothing.

W + alpha / rank * B A is computed in fp32, on a base that was never quantised: adding into weights
of 4 or 8 bits rounds the adapter away. The logits of real texts are compared twice: with the
adapter against merged in memory, and against the folder as it is read back.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from trainer import adapters, quantized
from trainer.checkpoint import CheckpointError, resolve
from trainer.config import ConfigError, Merge
from trainer.data.corpus import python_reference
from trainer.manifest import make_readable
from trainer.models import PLAIN_ATTENTION, has_tokenizer, load_pretrained, load_tokenizer
from trainer.store import disk_full, free_bytes, fsync

#: Largest difference of logits, as a share of the largest logit, by the dtype of the weights: what
#: rounding each weight once (2^-24, 2^-11, 2^-9) may add up to over the layers of a large model.
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: Texts and tokens of a comparison.
PROMPTS, TOKENS = 4, 64
_WHOLE = {"F64", "F32", "F16", "BF16"}

Say = Callable[[str], None]


def merge_adapter(config: Merge, folder: Path, say: Say) -> dict[str, float]:
    """Write the merged model and its tokenizer into `folder`, readable by `from_pretrained`.
    Returns `max_difference` (in memory, fp32), `max_difference_saved` and `adapter_effect` (base
    against adapter), as shares of the largest logit, and `merged_tensors`. Errors: `ConfigError`
    when the references are no adapter and no full-precision base; `CheckpointError` when the logits
    differ, or other tensors than those of the adapter have changed."""
    source = adapters.fetch(config.adapter)
    if not adapters.is_adapter(source):
        raise ConfigError(
            f"merge.adapter: '{config.adapter}' is not an adapter: no {adapters.CONFIG} in {source}"
        )
    base = config.base or adapters.base_of(source)
    refuse_quantised(base)
    dtype = stored_dtype(base) if config.precision == "auto" else _DTYPES[config.precision]
    tokens = load_tokenizer(source if has_tokenizer(source) else base)
    prompts = encode_prompts(tokens, config.prompts)
    plain = load_pretrained(base, torch.float32, PLAIN_ATTENTION).eval()
    without, marks = logits(plain, prompts), _marks(plain)
    adapted = adapters.load(plain, source).eval()
    before, wanted = logits(adapted, prompts), adapters.adapted_tensors(adapted)
    count = len(adapters.attached(adapted))
    if len(wanted) < count:
        say(
            f"warning: the adapter leaves {count - len(wanted)} of its {count} tensors as they are:"
            " there it is all zeros, as before the first step"
        )
    merged = adapted.merge_and_unload(safe_merge=True)
    facts = {
        "merged_tensors": _merged(marks, merged, wanted),
        "adapter_effect": largest_difference(without, before),
        "max_difference": agree(logits(merged, prompts), before, torch.float32, "merged"),
    }
    say(
        f"merged: {len(wanted)} tensors; logits differ by {facts['max_difference']:.1e} of the"
        f" largest on {len(prompts)} texts; the adapter changes them by"
        f" {facts['adapter_effect']:.1e}"
    )
    written = write_folder(merged.to(dtype), tokens, folder)
    again = load_pretrained(str(written), torch.float32, PLAIN_ATTENTION).eval()
    try:
        facts["max_difference_saved"] = agree(logits(again, prompts), before, dtype, "saved")
    except CheckpointError:
        shutil.rmtree(written)
        raise
    publish(written, folder)
    rounded = facts["max_difference_saved"]
    say(f"saved in {_word(dtype)}: logits differ by {rounded:.1e}; {folder}")
    if rounded > facts["adapter_effect"] / 2:
        say(
            f"warning: rounding to {_word(dtype)} changes the logits by {rounded:.1e}, the adapter"
            f" by {facts['adapter_effect']:.1e}; write merge.precision: fp32"
        )
    return facts


def refuse_quantised(reference: str) -> None:
    """Errors: `ConfigError` for a model whose configuration or weights say that it is quantised.
    MXFP4 is widened as it is loaded, without a loss: a model in it is a base like others."""
    from transformers import AutoConfig

    name = resolve(reference)
    hint = "merge into the full-precision model it was made from (merge.base)"
    try:
        configuration = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        why = adapters.trouble(name, error)
        raise ConfigError(f"cannot read the base model '{reference}': {why}") from error
    found = quantized.method(configuration)
    if found == quantized.MXFP4:
        return
    if found is not None:
        raise ConfigError(f"the base model '{reference}' is quantised ({found}); {hint}")
    for path in sorted(Path(name).glob("*.safetensors")):
        narrow = {n: d for n, d in _dtypes(path).items() if d not in _WHOLE}
        if narrow:
            first, kind = min(narrow.items())
            where = f"{first} in {path.name} is {kind}"
            raise ConfigError(f"the base model '{reference}' is quantised: {where}; {hint}")


def stored_dtype(reference: str) -> torch.dtype:
    """The dtype that a model's configuration gives; else bf16 for one in MXFP4, whose other weights
    are that, and fp32 for others."""
    from transformers import AutoConfig

    configuration = AutoConfig.from_pretrained(resolve(reference))
    found = getattr(configuration, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    if found is None and quantized.method(configuration) == quantized.MXFP4:
        return torch.bfloat16
    return found if found in LIMITS else torch.float32


def encode_prompts(tokens: Any, given: tuple[str, ...] = ()) -> list[Tensor]:
    """Ids [1, at most TOKENS] of the given texts, else of passages that CPython brings.
    Errors: `ConfigError` for a text that gives no token."""
    passages = [text for _, text in python_reference("heldout")]
    texts = given or tuple(passages[:: max(len(passages) // PROMPTS, 1)][:PROMPTS])
    rows = [tokens(text, return_tensors="pt").input_ids[:, :TOKENS] for text in texts]
    for text, row in zip(texts, rows):
        if row.shape[1] == 0:
            raise ConfigError(f"merge.prompts: {text!r} gives no token")
    return rows


@torch.no_grad()  # type: ignore[untyped-decorator]
def logits(model: Any, prompts: list[Tensor]) -> list[Tensor]:
    """Logits [1, length, vocabulary] in fp32, one tensor a prompt."""
    return [model(input_ids=ids, use_cache=False).logits.float() for ids in prompts]


def agree(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype, what: str) -> float:
    """`largest_difference`, when it is within the limit of `dtype`. Errors: `CheckpointError`."""
    difference = largest_difference(found, wanted)
    if not difference <= LIMITS[dtype]:
        raise CheckpointError(
            f"the {what} model is not the adapted one: logits differ by {difference:.1e} of the"
            f" largest, more than {LIMITS[dtype]:.0e} ({_word(dtype)}); nothing was written"
        )
    return difference


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """max |found - wanted| / max |wanted| over all prompts; NaN when any of them is not finite."""
    if not all(torch.isfinite(t).all() for t in (*found, *wanted)):
        return float("nan")
    largest = max(float(b.abs().max()) for b in wanted)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted)) / max(largest, 1e-30)


def write_folder(model: Any, tokens: Optional[Any], folder: Path) -> Path:
    """`from_pretrained`'s files in a `fresh` hidden folder; `publish` shows them."""
    with fresh(folder) as hidden:
        model.save_pretrained(hidden)
        if tokens is not None:
            tokens.save_pretrained(hidden)
        make_readable(hidden)
    return hidden


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder` to write into, which is gone when that fails. Errors:
    `CheckpointError` for a full disk."""
    hidden = folder / ".writing"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        yield hidden
    except BaseException as error:
        free = free_bytes(hidden) / 1e6
        shutil.rmtree(hidden)
        if full := disk_full(error):
            raise CheckpointError(
                f"{full}: the model was not written to {folder}: {free:.1f} MB were free; free some"
                " space, or write elsewhere"
            ) from error
        raise


def publish(hidden: Path, folder: Path) -> None:
    """Move what `write_folder` wrote up into `folder`; config.json, without which it is no model,
    comes last, so that a process killed in between leaves nothing that looks whole."""
    (folder / "config.json").unlink(missing_ok=True)
    for path in sorted(hidden.iterdir(), key=lambda path: path.name == "config.json"):
        fsync(path)
        path.replace(folder / path.name)
    hidden.rmdir()
    fsync(folder)


def _marks(model: Any) -> dict[str, tuple[float, float]]:
    """Sum and norm of every parameter, in fp64: enough to see which ones have changed."""
    return {
        name: (float(p.sum(dtype=torch.float64)), float(p.norm(dtype=torch.float64)))
        for name, p in ((name, p.detach()) for name, p in model.named_parameters())
    }


def _merged(before: dict[str, Any], model: Any, wanted: set[str]) -> float:
    """How many tensors have changed. Errors: `CheckpointError` when they are not those `wanted`, or
    when the model has other tensors than `before`."""
    after = _marks(model)
    changed = {name for name, mark in after.items() if before.get(name) != mark}
    if changed != wanted or before.keys() != after.keys():
        first = min((changed ^ wanted) | (before.keys() ^ after.keys()))
        raise CheckpointError(
            f"the adapter changes {len(wanted)} tensors, the merge has changed {len(changed)}: they"
            f" differ in {first}; nothing was written"
        )
    return float(len(changed))


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _word(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def _dtypes(path: Path) -> dict[str, str]:
    """Tensor -> dtype, from the header of a safetensors file: 8 bytes of length, then JSON."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        return {name: str(e["dtype"]) for name, e in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(f"{path}: damaged, it is not a safetensors file") from error
