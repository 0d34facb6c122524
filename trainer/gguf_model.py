"""Models as llama.cpp reads them from a GGUF file: numbers of the architecture, and tensors under
its names. Tensors are read one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

import torch
from torch import Tensor

from trainer import adapters
from trainer.checkpoint import CheckpointError, resolve
from trainer.config import ConfigError

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
        if getattr(self.configuration, "quantization_config", None) is not None:
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
        self._files = _weights(self.folder, reference)
        self._names = _names(self.family.architecture, self.configuration.num_hidden_layers)

    @property
    def rope_type(self) -> str:
        return str(self.rope.get("rope_type", "default"))

    def notes(self) -> list[str]:
        """What of the model the file cannot say, a line each."""
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
        from safetensors import safe_open

        found: dict[str, tuple[int, ...]] = {}
        if self.rope_type == "llama3":
            found[ROPE_FREQUENCIES] = (self.head_size // 2,)
        for path in self._files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if (new := self._name(name)) is not None:
                        found[new] = tuple(file.get_slice(name).get_shape())
        self._check_names(found)
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the file, fp32 tensor) of each, one at a time. Errors: `CheckpointError` for
        numbers that are not finite."""
        from safetensors import safe_open

        if self.rope_type == "llama3":
            yield ROPE_FREQUENCIES, self._rope_factors()
        for path in self._files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    new = self._name(name)
                    if new is None:
                        continue
                    tensor = file.get_tensor(name).float()
                    if not torch.isfinite(tensor).all():
                        raise CheckpointError(
                            f"{path.name}: {name} holds numbers that are not finite"
                        )
                    yield new, self._turned(name, tensor)

    def _name(self, name: str) -> Optional[str]:
        """llama.cpp's name for a tensor; None for what it makes itself."""
        if name.endswith(".rotary_emb.inv_freq"):
            return None
        if name == "lm_head.weight" and self.configuration.tie_word_embeddings:
            return None
        new = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            self._refuse(f"'{self.reference}' has a tensor {name}, for which there is no place")
        return str(new)

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

    def _check_names(self, found: dict[str, tuple[int, ...]]) -> None:
        """Every block has what the first has, and there is an embedding."""
        layers = self.configuration.num_hidden_layers
        first = [name.removeprefix("blk.0.") for name in found if name.startswith("blk.0.")]
        wanted = [f"blk.{i}.{name}" for i in range(layers) for name in first]
        wanted += ["token_embd.weight", "output_norm.weight"]
        if not self.configuration.tie_word_embeddings:
            wanted.append("output.weight")
        lacking = [name for name in wanted if name not in found]
        if lacking or not first:
            raise ConfigError(
                f"cannot load the model '{self.reference}': its files lack {len(lacking)} of its"
                f" tensors, such as {lacking[0]}; fetch or write them again"
            )

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"export.format: gguf: {what}. For others write `format: huggingface` and run"
            f" llama.cpp's own converter on the folder: {CONVERTER}"
        )


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
                name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]
            )
        )
    except (OSError, ValueError) as error:
        why = adapters.trouble(name, error)
        raise ConfigError(f"cannot load the model '{reference}': {why}") from error


def _weights(folder: Path, reference: str) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ConfigError(
            f"export.model: no model*.safetensors in {folder}; export '{reference}' with"
            " `format: huggingface` first, and name that"
        )
    return files
