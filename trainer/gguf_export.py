"""Writing a model as one GGUF file, the form that llama.cpp and what is built on it read.

Tensor by tensor, so that memory holds a few copies of the largest and not the model. What was
written is read back: every tensor within what its kind of number can hold, every sample text to the
same token ids.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch

from trainer import copies
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError, Export
from trainer.gguf_model import ROPE_FREQUENCIES, Source
from trainer.gguf_vocab import (
    Vocabulary,
    cuts_marks,
    differences,
    is_known,
    sample_texts,
    vocabulary,
)
from trainer.manifest import make_readable
from trainer.merge import fresh
from trainer.models import load_tokenizer

#: Kinds that keep tensors as they are stored, by safetensors' names.
_KINDS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
#: Numbers compared at a time.
_BLOCK = 1 << 22
#: Of a value, or of its group's largest: how far the stored number may be off. f16, bf16: half of
#: the last of their 11 and 8 bits; q8_0: half a step of 127; q4_0: a step of 8, which the far end
#: may lose; and, of those two, what their 16-bit scale loses.
_ERRORS = {
    "F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.5 / 127 + 2**-11, "Q4_0": 1 / 8 + 2**-11,
}  # fmt: skip
#: Numbers that share a scale in q8_0 and q4_0.
_GROUP = 32

Say = Callable[[str], None]


def write_gguf(config: Export, folder: Path, say: Say) -> tuple[Path, dict[str, float]]:
    """Write NAME-KIND.gguf into a fresh hidden folder inside `folder`, for `merge.publish`. Returns
    that folder, and `parameters` and `max_difference`: of a stored weight, as a share of its
    tensor's largest. Errors: `ConfigError` for a model or tokenizer that is not written here;
    `CheckpointError` when what was written does not read back."""
    gguf = library()
    source = Source(config.model)
    tokens = load_tokenizer(config.model)
    vocab = vocabulary(tokens, source.configuration, source.folder)
    for line in source.notes():
        say(line)
    if vocab.model == "gpt2" and not is_known(tokens):
        count = len(sample_texts())
        say(f"tokenizer: words are cut as in {vocab.pre}: equal ids on {count} texts")
    if cuts_marks(vocab, tokens):
        say(
            f"warning: llama.cpp cuts words ({vocab.pre}) at combining marks: texts in Hindi, Khmer"
            " and the like get other ids from it"
        )
    kind = config.quantize
    if kind == "auto":
        kind = _as_stored(source)
    kinds = _kinds(source, kind)
    if packed := [name for name, part in source.parts.items() if part.packed]:
        say(f"{len(packed)} tensors of experts stay in MXFP4")
    if rounded := [n for n, k in kinds.items() if k == "F16" and kind in ("q8_0", "q4_0")]:
        say(f"{kind}: {len(rounded)} tensors are f16, as their rows are no multiple of {_GROUP}")
    with fresh(folder) as hidden:
        path = hidden / f"{file_name(config)}-{_file_kind(kind, kinds)}.gguf"
        parameters = _write(gguf, path, source, vocab, kinds, kind, config)
        worst = _check_tensors(gguf, path, source, kinds)
        _check_vocabulary(gguf, path, vocab, tokens)
        make_readable(hidden)
    say(
        f"{path.name}: {path.stat().st_size:,} bytes, {len(kinds)} tensors in {kind}; weights"
        f" differ by at most {worst:.1e} of the largest of their tensor; equal token ids"
    )
    return hidden, {"parameters": float(parameters), "max_difference": worst}


def library() -> Any:
    """The package `gguf`. Errors: `ConfigError` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            'export.format: gguf needs the package gguf: pip install "launch-llm[quantize]"'
        ) from error
    return gguf


def file_name(config: Export) -> str:
    """What the file is called without its kind: after the place it goes to, else the model."""
    given = config.to or copies.origin(config.model)
    name = given.rstrip("/").removeprefix("hub:").rpartition("/")[2]
    return name.removesuffix("@best").removesuffix("@last").removesuffix(".gguf") or "model"


def _as_stored(source: Source) -> str:
    """The kind that loses nothing: that of all matrices, f32 where they differ."""
    found = {
        source.dtype(name)
        for name, part in source.parts.items()
        if not (part.packed or _stays_wide(name, part.shape))
    }
    return _KINDS.get(found.pop(), "f32") if len(found) == 1 else "f32"


def _stays_wide(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp wants f32 whatever the rest is: norms, biases, routers of experts."""
    routers = (".bias", ".ffn_gate_inp.weight", "_norm.weight")
    return len(shape) == 1 or name.endswith(routers)


def _kinds(source: Source, kind: str) -> dict[str, str]:
    """The kind of number of every tensor: norms, biases and routers stay f32, rows that do not
    divide into groups f16. With q4_0 the head keeps 8 bits: it is where 4 cost most."""
    found: dict[str, str] = {}
    shapes = source.shapes()
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    for name, shape in shapes.items():
        if name in source.parts and source.parts[name].packed:
            found[name] = "MXFP4"
        elif _stays_wide(name, shape):
            found[name] = "F32"
        elif kind in ("q8_0", "q4_0") and shape[-1] % _GROUP:
            found[name] = "F16"
        elif kind == "q4_0" and name == head:
            found[name] = "Q8_0"
        else:
            found[name] = kind.upper()
    return found


def _file_kind(kind: str, kinds: dict[str, str]) -> str:
    """What a file is called after: most of its numbers, which experts hold."""
    packed = kind in _KINDS.values() and "MXFP4" in kinds.values()
    return "MXFP4" if packed else kind.upper()


def _write(
    gguf: Any, path: Path, source: Source, vocab: Vocabulary, kinds: dict[str, str], kind: str,
    config: Export,
) -> int:  # fmt: skip
    writer = _writer(gguf, path, source.family.architecture)
    shapes = source.shapes()
    for name, shape in shapes.items():
        number = gguf.GGMLQuantizationType[kinds[name]]
        stored = gguf.quant_shape_to_byte_shape(shape, number)
        writer.add_tensor_info(
            name, stored, numpy.dtype(numpy.uint8), math.prod(stored), raw_dtype=number
        )
    total, shared, expert, experts = writer.get_total_parameter_count()
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(file_name(config))
    writer.add_size_label(gguf.size_label(total, shared, expert, experts))
    source.write_numbers(writer)
    mostly = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
    named = _file_kind(kind, kinds)
    writer.add_file_type(gguf.LlamaFileType[mostly.get(named, f"MOSTLY_{named}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_vocabulary(gguf, writer, vocab)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in source.tensors():
            writer.write_tensor_data(_stored(gguf, name, tensor, kinds[name]))
    finally:
        writer.close()
    return int(total - (source.head_size // 2 if ROPE_FREQUENCIES in shapes else 0))


def _writer(gguf: Any, path: Path, architecture: str) -> Any:
    class Writer(gguf.GGUFWriter):  # type: ignore[misc]
        """The library refuses an empty list; a tokenizer of bytes has no merges, and llama.cpp
        wants the list."""

        def _pack_val(self, val: Any, vtype: Any, *rest: Any, **named: Any) -> bytes:
            if vtype == gguf.GGUFValueType.ARRAY and not val:
                header = (int(vtype), int(gguf.GGUFValueType.STRING))
                return struct.pack("<IIQ", *header, 0)
            return bytes(super()._pack_val(val, vtype, *rest, **named))

    return Writer(path, architecture)


def _write_vocabulary(gguf: Any, writer: Any, vocab: Vocabulary) -> None:
    keys = gguf.Keys.Tokenizer
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    if vocab.scores:
        writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)
    if vocab.model == "gpt2":
        writer.add_key_value(keys.MERGES, vocab.merges, gguf.GGUFValueType.ARRAY)
    for name, token in vocab.special.items():
        add = getattr(writer, f"add_{name}_token_id", None)
        if add is not None:
            add(token)
    writer.add_add_bos_token(vocab.adds["bos"])
    writer.add_add_eos_token(vocab.adds["eos"])
    if vocab.model == "llama":
        writer.add_add_space_prefix(vocab.space_prefix)
    templates = vocab.template if isinstance(vocab.template, Mapping) else {}
    others = sorted(set(templates) - {"default"})
    for name in others:
        writer.add_string(keys.CHAT_TEMPLATE_N.format(name=name), templates[name])
    writer.add_array(keys.CHAT_TEMPLATES, others)
    default = templates.get("default") if templates else vocab.template
    if isinstance(default, str):
        writer.add_chat_template(default)


def _stored(gguf: Any, name: str, tensor: torch.Tensor, kind: str) -> Any:
    """The bytes of a tensor. Errors: `CheckpointError` where 16 bits do not reach."""
    if kind == "MXFP4":
        return tensor.numpy()
    with numpy.errstate(over="ignore"):
        stored = gguf.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind])
    if kind == "F16" and not numpy.isfinite(stored).all():
        raise CheckpointError(
            f"{name} holds numbers beyond the range of f16 (65504); write export.quantize: bf16"
        )
    return stored.view(numpy.uint8)


def _check_tensors(gguf: Any, path: Path, source: Source, kinds: dict[str, str]) -> float:
    """Read every tensor back beside its source; the largest difference, as a share of the largest
    number of its tensor. Errors: `CheckpointError`."""
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if set(there) != set(kinds):
        name = min(set(there) ^ set(kinds))
        raise CheckpointError(f"{path.name}: {name} does not read back as it was written")
    worst, shapes = 0.0, source.shapes()
    for name, tensor in source.tensors():
        found = there[name]
        number = gguf.GGMLQuantizationType[kinds[name]]
        stored = gguf.quant_shape_to_byte_shape(shapes[name], number)
        good = found.tensor_type == number and found.data.nbytes == math.prod(stored)
        largest, off = float(tensor.abs().max()), 0.0
        packed = kinds[name] == "MXFP4"
        if packed:
            good = good and numpy.array_equal(found.data, tensor.numpy())
        for rows in _rows(tensor) if good and not packed else ():
            wanted = tensor[rows].numpy() if tensor.dim() > 1 else tensor.numpy()
            data = found.data[rows] if tensor.dim() > 1 else found.data
            got = gguf.dequantize(data, number).reshape(wanted.shape)
            difference = numpy.abs(got - wanted)
            good = good and bool((difference <= _limit(wanted, kinds[name])).all())
            off = max(off, float(difference.max()))
        if not good:
            raise CheckpointError(f"{path.name}: {name} does not read back as it was written")
        worst = max(worst, off / max(largest, 1e-30))
    return worst


def _rows(tensor: torch.Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, tensor.numel() // tensor.shape[0]))
    if tensor.dim() == 1:
        step = tensor.shape[0]
    return (slice(i, i + step) for i in range(0, tensor.shape[0], step))


def _limit(values: Any, kind: str) -> Any:
    """How far a stored number may be from `values`; below the smallest scale that 16 bits hold,
    a fixed amount."""
    sizes = numpy.abs(values)
    if kind in ("Q8_0", "Q4_0"):
        groups = sizes.reshape(-1, _GROUP).max(axis=1, keepdims=True)
        sizes = numpy.broadcast_to(groups, (groups.shape[0], _GROUP)).reshape(values.shape)
    floor = {"F32": 0.0, "F16": 2**-24, "BF16": 1e-38, "Q8_0": 2**-18, "Q4_0": 2**-21}[kind]
    return sizes * _ERRORS[kind] + floor


def _check_vocabulary(gguf: Any, path: Path, vocab: Vocabulary, tokens: Any) -> None:
    """What llama.cpp reads must be what was meant, and give the ids of the tokenizer. Errors:
    `CheckpointError`."""
    fields = gguf.GGUFReader(path).fields
    keys = gguf.Keys.Tokenizer

    def read(key: str, default: Any = ()) -> Any:
        return fields[key].contents() if key in fields else default

    special = {"bos": keys.BOS_ID, "eos": keys.EOS_ID}
    again = replace(
        vocab,
        model=read(keys.MODEL),
        pre=read(keys.PRE),
        tokens=tuple(read(keys.LIST)),
        types=tuple(read(keys.TOKEN_TYPE)),
        merges=tuple(read(keys.MERGES) or ()),
        scores=tuple(read(keys.SCORES)),
        special={name: read(key) for name, key in special.items() if key in fields},
        adds={"bos": read(keys.ADD_BOS), "eos": read(keys.ADD_EOS)},
        space_prefix=read(keys.ADD_PREFIX, True),
    )
    if wrong := differences(again, tokens):
        raise CheckpointError(
            f"{path.name}: its tokenizer does not read back as it was written: other ids for"
            f" {wrong[0][:40]!r}"
        )
