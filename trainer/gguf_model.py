"""Models as llama.cpp reads them from a GGUF file: numbers of the architecture, and tensors under
its names. Tensors are read one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Optional

import torch
from torch import Tensor

from trainer import adapters, quantized
from trainer.checkpoint import CheckpointError, resolve
from trainer.config import ConfigError
from trainer.gguf_parts import Part, parts

CONVERTER = "python convert_hf_to_gguf.py FOLDER --outfile NAME.gguf"
ROPE_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """`architecture`: llama.cpp's name. `permuted`: its rotary embedding turns neighbouring rows
    of q and k, where Transformers turns rows half a head apart."""

    architecture: str
    permuted: bool


#: Transformers' `model_type` -> family.
FAMILIES = {
    "llama": Family("llama", True),
    "mistral": Family("llama", True),
    "qwen2": Family("qwen2", False),
    "qwen3": Family("qwen3", False),
    "mixtral": Family("llama", True),
    "qwen3_moe": Family("qwen3moe", False),
    "gpt_oss": Family("gpt-oss", False),
}


class Source:
    """A model in Transformers' files. Errors: `ConfigError` for one that is not written here."""

    def __init__(self, reference: str) -> None:
        from transformers import AutoConfig

        self.reference = reference
        self.folder = _folder(reference)
        try:
            self.configuration: Any = AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            why = adapters.trouble(str(self.folder), error)
            raise ConfigError(f"cannot load the model '{reference}': {why}") from error
        kind = self.configuration.model_type
        if kind not in FAMILIES:
            self._refuse(
                f"'{reference}' is of the family {kind}; {', '.join(FAMILIES)} are written"
            )
        method = quantized.method(self.configuration)
        if method is not None and (kind, method) != ("gpt_oss", quantized.MXFP4):
            self._refuse(f"'{reference}' is quantised; name the full-precision model")
        self.family = FAMILIES[kind]
        self.head_size = int(
            getattr(self.configuration, "head_dim", None)
            or self.configuration.hidden_size // self.configuration.num_attention_heads
        )
        self.rope = dict(self.configuration.rope_parameters or {})
        if self.rope_type not in ("default", "linear", "yarn", "llama3"):
            self._refuse(f"'{reference}' has rotary embeddings of the kind {self.rope_type}")
        if self.rope_type == "llama3" and not self.family.permuted:
            self._refuse(f"'{reference}' has rotary embeddings of the kind llama3 in a {kind}")
        if self.configuration.hidden_act != "silu":
            self._refuse(f"'{reference}' has the activation {self.configuration.hidden_act}")
        if odd := _odd(self.configuration):
            self._refuse(f"'{reference}' has {odd}")
        self._names = _names(self.family.architecture, self.configuration.num_hidden_layers)
        self._files = _stored(_weights(self.folder, reference))
        #: Name in the file -> what it is made of, but for `ROPE_FREQUENCIES`.
        self.parts = self._parts()

    @property
    def rope_type(self) -> str:
        return str(self.rope.get("rope_type", "default"))

    def notes(self) -> list[str]:
        """What of the model the file cannot say, a line each."""
        if self.family.architecture == "gpt-oss":
            return []  # its window is a key of the file
        window = getattr(self.configuration, "sliding_window", None)
        if window and getattr(self.configuration, "use_sliding_window", True):
            return [f"warning: llama.cpp attends to all tokens, not to the last {window} only"]
        return []

    def write_numbers(self, writer: Any) -> None:
        """Everything that llama.cpp needs to know of the architecture."""
        import gguf

        c = self.configuration
        writer.add_block_count(c.num_hidden_layers)
        writer.add_context_length(c.max_position_embeddings)
        writer.add_embedding_length(c.hidden_size)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(self.rope["rope_theta"])
        if self.family.architecture == "llama":
            writer.add_vocab_size(c.vocab_size)
            writer.add_rope_dimension_count(self.head_size)
        if experts := getattr(c, "num_local_experts", None):
            writer.add_expert_count(experts)
            writer.add_expert_used_count(c.num_experts_per_tok)
        if self.family.architecture == "gpt-oss":
            writer.add_sliding_window(c.sliding_window)
            writer.add_expert_feed_forward_length(c.intermediate_size)
        elif self.family.architecture == "qwen3moe":
            writer.add_expert_feed_forward_length(c.moe_intermediate_size)
        if self.rope_type in ("linear", "yarn"):
            yarn = self.rope_type == "yarn"
            kinds = gguf.RopeScalingType
            writer.add_rope_scaling_type(kinds.YARN if yarn else kinds.LINEAR)
            writer.add_rope_scaling_factor(self.rope["factor"])
        if self.rope_type == "yarn":
            original = self.rope.get("original_max_position_embeddings", c.max_position_embeddings)
            writer.add_rope_scaling_orig_ctx_len(original)
            for key, add in (
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if self.rope.get(key) is not None:
                    add(self.rope[key])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file -> shape, in the order in which `tensors` gives them."""
        own = {ROPE_FREQUENCIES: (self.head_size // 2,)} if self.rope_type == "llama3" else {}
        return {**own, **{name: part.shape for name, part in self.parts.items()}}

    def dtype(self, name: str) -> str:
        """How the numbers of a part are stored, as safetensors calls it; `F32` for several."""
        found = {self._files[stored].dtype for stored in self.parts[name].stored}
        return found.pop() if len(found) == 1 else "F32"

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the file, tensor) of each, one at a time: fp32, or the bytes of MXFP4. Errors:
        `CheckpointError` for numbers that are not finite."""
        from safetensors import safe_open

        if self.rope_type == "llama3":
            yield ROPE_FREQUENCIES, self._rope_factors()
        with ExitStack() as stack:
            opened = {
                path: stack.enter_context(safe_open(path, framework="pt"))
                for path in sorted({stored.path for stored in self._files.values()})
            }
            for new, part in self.parts.items():
                stored = [opened[self._files[n].path].get_tensor(n) for n in part.stored]
                tensor = part.make(stored)
                if not part.packed:
                    tensor = self._turned(part.stored[0], tensor.float())
                    if not torch.isfinite(tensor).all():
                        path = self._files[part.stored[0]].path
                        raise CheckpointError(
                            f"{path.name}: {part.stored[0]} holds numbers that are not finite"
                        )
                yield new, tensor

    def _parts(self) -> dict[str, Part]:
        """Every stored tensor that llama.cpp does not make itself. Errors: `ConfigError` where one
        has no place, or one is missing."""
        c = self.configuration
        found: dict[str, Part] = {}
        for name, part in parts({n: stored.shape for n, stored in self._files.items()}).items():
            if name.endswith(".rotary_emb.inv_freq"):
                continue
            if name == "lm_head.weight" and c.tie_word_embeddings:
                continue
            new = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
            if new is None or not new.endswith((".weight", ".bias")):
                self._refuse(f"'{self.reference}' has a tensor {name}, for which there is no place")
            found[str(new)] = part
        self._check_names(found)
        return found

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        """Rows of q and k of each head in the order that llama.cpp's rotary embedding wants."""
        c = self.configuration
        if not self.family.permuted:
            return tensor
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            heads = c.num_attention_heads
        elif name.endswith(("k_proj.weight", "k_proj.bias")):
            heads = c.num_key_value_heads
        else:
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape).contiguous()

    def _rope_factors(self) -> Tensor:
        """What each frequency is divided by in Llama 3.1: 1 for short waves, `factor` for those
        longer than the original context, a blend between (Transformers' `llama3` scaling)."""
        low, high = self.rope["low_freq_factor"], self.rope["high_freq_factor"]
        context, factor = self.rope["original_max_position_embeddings"], self.rope["factor"]
        steps = torch.arange(0, self.head_size, 2, dtype=torch.float32) / self.head_size
        waves = 2 * math.pi * self.rope["rope_theta"] ** steps
        smooth = (context / waves - low) / (high - low)
        blend = 1 / ((1 - smooth) / factor + smooth)
        one, whole = torch.ones_like(waves), torch.full_like(waves, factor)
        return torch.where(
            waves < context / high, one, torch.where(waves > context / low, whole, blend)
        )

    def _check_names(self, found: dict[str, Part]) -> None:
        """Every block has what the first has, with all experts, and there is an embedding."""
        layers = self.configuration.num_hidden_layers
        first = [name.removeprefix("blk.0.") for name in found if name.startswith("blk.0.")]
        wanted = [f"blk.{i}.{name}" for i in range(layers) for name in first]
        wanted += ["token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight"]
        if not self.configuration.tie_word_embeddings:
            wanted.append("output.weight")
        experts = getattr(self.configuration, "num_local_experts", None)
        lacking = [name for name in wanted if name not in found]
        lacking += [n for n, p in found.items() if "_exps." in n and p.shape[0] != experts]
        there = self._files.keys()
        lacking += [n for p in found.values() for n in p.stored if n not in there]
        if lacking:
            raise ConfigError(
                f"cannot load the model '{self.reference}': its files lack {len(lacking)} of its"
                f" tensors, such as {lacking[0]}; fetch or write them again"
            )

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"export.format: gguf: {what}. For others write `format: huggingface` and run"
            f" llama.cpp's own converter on the folder: {CONVERTER}"
        )


class _Stored(NamedTuple):
    path: Path
    shape: tuple[int, ...]
    dtype: str


def _stored(files: list[Path]) -> dict[str, _Stored]:
    """Name of a tensor -> where it is stored, and how."""
    from safetensors import safe_open

    found: dict[str, _Stored] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = _Stored(path, tuple(part.get_shape()), str(part.get_dtype()))
    return found


def _odd(c: Any) -> Optional[str]:
    """What llama.cpp takes to be otherwise in models of this family, and no key can say."""
    if c.model_type == "gpt_oss":
        kinds = ("sliding_attention", "full_attention")
        in_turn = [kinds[i % 2] for i in range(c.num_hidden_layers)]
        if list(c.layer_types) != in_turn or not c.sliding_window:
            return "layers that do not attend to a window and to all tokens in turn"
        if (getattr(c, "swiglu_alpha", 1.702), c.swiglu_limit) != (1.702, 7.0):
            return "experts with another swiglu_alpha or swiglu_limit than 1.702 and 7"
        if not c.attention_bias:
            return "attention without biases"
    if c.model_type == "qwen3_moe":
        if c.mlp_only_layers or c.decoder_sparse_step != 1:
            return "layers without experts"
        if not c.norm_topk_prob:
            return "weights of experts that do not add up to 1 (norm_topk_prob: false)"
    return None


def _names(architecture: str, layers: int) -> Any:
    """The library's table from Transformers' names to llama.cpp's."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], layers)


def _folder(reference: str) -> Path:
    """Where the files of a model reference are; those of a name on the hub are fetched."""
    name = resolve(reference)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"],
                ignore_patterns=["*/*"],  # the same weights again, in other forms
            )
        )
    except (OSError, ValueError) as error:
        why = adapters.trouble(name, error)
        raise ConfigError(f"cannot load the model '{reference}': {why}") from error


def _weights(folder: Path, reference: str) -> list[Path]:
    """The files that `from_pretrained` would read: the one, else its parts."""
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise ConfigError(
            f"export.model: no model*.safetensors in {folder}; export '{reference}' with"
            " `format: huggingface` first, and name that"
        )
    return files
