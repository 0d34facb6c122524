"""How large a model is, before anything of it is fetched: its shape, from which the number of its
parameters follows exactly.

A shape comes from the recipe's own `architecture`, from the `config.json` of a local folder or of
the hub's cache on this machine, else from a dated table of well-known names. A model that none of
these knows has no shape: nothing is guessed. Nothing here asks the network.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Optional

from launcher.spec import Stage
from trainer.config import Architecture, Model

#: Shapes of the models of one stage: `model` (what is trained, merged or exported), `teacher` (or
#: surrogate), and `evaluate.LABEL`. What is not known is absent.
Shapes = Mapping[str, "Shape"]

#: Families (`model_type`) whose tensors `Shape.tensors` lists as Transformers makes them.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_oss", "mixtral", "qwen3_moe")
_ALWAYS_BIASED = {"qwen2": (True, False), "gpt_oss": (True, True)}
_STAGE = re.compile(r"\$\{stage:([^}]*)\}(?:@best|@last)?")
_WITHOUT = "forecast.examples_per_hour gives the time without it"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Shape:
    """A decoder-only language model. `intermediate` is the width of the MLP (of one expert where
    there are `experts`); `source` says where the numbers come from."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool
    experts: int = 0
    experts_per_token: int = 0
    family: str = "llama"
    source: str = ""
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output
    mlp_bias: bool = False

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(math.prod(dimensions) for dimensions in self.tensors().values())

    @property
    def attention(self) -> str:
        """The best kernel that models of this family have without flash-attn: `sdpa` or `eager`."""
        return "eager" if self.family == "gpt_oss" else "sdpa"

    @property
    def fused_experts(self) -> bool:
        """Whether experts are tensors of three dimensions: adapters reach them by parameter
        (`model.adapter.experts`), 4 bits do not."""
        return self.experts > 0

    @property
    def projections(self) -> dict[str, tuple[int, ...]]:
        """The linear layers of one block that adapters and 4 bits reach, by their last name:
        [out, in]."""
        return {
            name.split(".")[-2]: size
            for name, size in self.layer().items()
            if len(size) == 2 and name.endswith("_proj.weight")
        }

    @property
    def expert_tensors(self) -> dict[str, tuple[int, ...]]:
        """The weights of all experts of one block: [experts, in, out] or [experts, out, in]."""
        return {
            name: size for name, size in self.layer().items()
            if len(size) == 3 and ".experts." in name
        }  # fmt: skip

    def layer(self) -> dict[str, tuple[int, ...]]:
        """Names and dimensions of the parameters of one block; of linear layers [out, in]."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {}
        for name, size in (("q", wide), ("k", narrow), ("v", narrow)):
            found[f"self_attn.{name}_proj.weight"] = (size, self.hidden)
            if self.qkv_bias:
                found[f"self_attn.{name}_proj.bias"] = (size,)
        found["self_attn.o_proj.weight"] = (self.hidden, wide)
        if self.output_bias:
            found["self_attn.o_proj.bias"] = (self.hidden,)
        if self.family in ("qwen3", "qwen3_moe"):
            found["self_attn.q_norm.weight"] = found["self_attn.k_norm.weight"] = (self.head_dim,)
        if self.family == "gpt_oss":
            found["self_attn.sinks"] = (self.heads,)
        found.update(self._mlp())
        found["input_layernorm.weight"] = found["post_attention_layernorm.weight"] = (self.hidden,)
        return found

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and dimensions of all parameters, tied ones under their first name."""
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        block = self.layer()
        for number in range(self.layers):
            found.update({f"model.layers.{number}.{name}": size for name, size in block.items()})
        found["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def _mlp(self) -> dict[str, tuple[int, ...]]:
        hidden, inner, experts = self.hidden, self.intermediate, self.experts
        if self.family == "gpt_oss":  # its experts are [in, out], all with biases
            return {
                "mlp.router.weight": (experts, hidden),
                "mlp.router.bias": (experts,),
                "mlp.experts.gate_up_proj": (experts, hidden, 2 * inner),
                "mlp.experts.gate_up_proj_bias": (experts, 2 * inner),
                "mlp.experts.down_proj": (experts, inner, hidden),
                "mlp.experts.down_proj_bias": (experts, hidden),
            }
        if experts:
            return {
                "mlp.gate.weight": (experts, hidden),
                "mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),
                "mlp.experts.down_proj": (experts, hidden, inner),
            }
        sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        found: dict[str, tuple[int, ...]] = {}
        for name, size in sizes.items():
            found[f"mlp.{name}_proj.weight"] = size
            if self.mlp_bias:
                found[f"mlp.{name}_proj.bias"] = size[:1]
        return found


@dataclass(frozen=True)
class Absent:
    """A model whose shape is not known: `why`, and what to do about it."""

    part: str
    reference: str
    why: str
    remedy: str


def of_model(model: Model, base: Path, vocabulary: Optional[int] = None) -> Optional[Shape]:
    """The shape of the model that a stage trains; None: not known. `base`: the folder that relative
    paths start from. `vocabulary`: the size of the tokenizer that `architecture` needs, where the
    caller knows it; else it is read from the tokenizer's own files."""
    if model.architecture is not None:
        size = vocabulary or _tokens(str(model.tokenizer), base)
        return None if size is None else _of_architecture(model.architecture, size)
    return None if model.name is None else of_reference(model.name, base)


def of_reference(reference: str, base: Path) -> Optional[Shape]:
    """The shape of the model at a folder or of a hub name (`@best` and `@last` may follow)."""
    folder = _folder(reference, base)
    if folder is not None:
        adapter = _read(folder / "adapter_config.json")
        if adapter is not None and not (folder / "config.json").is_file():
            under = adapter.get("base_model_name_or_path")
            return of_reference(under, folder) if isinstance(under, str) and under else None
        return _of_config(_read(folder / "config.json"), f"{folder}/config.json")
    cached = _cached(reference, "config.json")
    if cached is not None:
        found = _of_config(_read(cached), f"config.json of {reference} in the hub's cache")
        if found is not None:
            return found
    return _table().get(reference.casefold())


def of_stage(stage: Stage, stages: Sequence[Stage], base: Path) -> Shapes:
    """The shapes of a stage's models, by their part in it. `stages`: those of the whole recipe,
    which `${stage:ID}` may name."""
    found: dict[str, Optional[Shape]] = {}
    if stage.model is not None:
        found["model"] = _trained(stage, stages, base)
    if stage.kd is not None and stage.kd.teacher is not None:
        found["teacher"] = _named(stage.kd.teacher, stages, base)
    if stage.sdce is not None and stage.sdce.surrogate is not None:
        found["teacher"] = _named(stage.sdce.surrogate, stages, base)
    if stage.targets is not None:
        found["teacher"] = _named(stage.targets.teacher, stages, base)
    if stage.merge is not None:
        found["model"] = _named(stage.merge.base or stage.merge.adapter, stages, base)
    if stage.export is not None:
        found["model"] = _named(stage.export.model, stages, base)
    if stage.evaluate is not None:
        for label, reference in stage.evaluate.models.items():
            found[f"evaluate.{label}"] = _named(reference, stages, base)
    return {part: shape for part, shape in found.items() if shape is not None}


def absent(stage: Stage, known: Shapes, base: Path) -> tuple[Absent, ...]:
    """The models of a stage that `known` (its `of_stage`) lacks."""
    named: dict[str, tuple[str, str]] = {}  # part -> its key in a recipe, and what it refers to
    if stage.model is not None:
        if stage.model.architecture is not None:
            named["model"] = ("model.tokenizer", str(stage.model.tokenizer))
        else:
            named["model"] = ("model.name", str(stage.model.name))
    if stage.kd is not None and stage.kd.teacher is not None:
        named["teacher"] = ("kd.teacher", stage.kd.teacher)
    if stage.sdce is not None and stage.sdce.surrogate is not None:
        named["teacher"] = ("sdce.surrogate", stage.sdce.surrogate)
    if stage.targets is not None:
        named["teacher"] = ("targets.teacher", stage.targets.teacher)
    if stage.evaluate is not None:
        for label, reference in stage.evaluate.models.items():
            named[f"evaluate.{label}"] = (f"evaluate.models.{label}", reference)
    return tuple(
        Absent(part, reference, *_why(key, reference, base, stage.hardware.backend == "local"))
        for part, (key, reference) in named.items()
        if part not in known
    )


def _why(key: str, reference: str, base: Path, here: bool) -> tuple[str, str]:
    """Why what `key` refers to has no shape, and what to do. `here`: jobs run on this machine, and
    can read its folders."""
    if (made_by := _STAGE.fullmatch(reference)) is not None:
        return f"the shape of {reference} is not known", f"see stage {made_by[1]}"
    file = "tokenizer.json" if key == "model.tokenizer" else "config.json"
    what = "vocabulary" if key == "model.tokenizer" else "shape"
    folder = _folder(reference, base)
    config = _read(folder / file) if folder is not None else None
    if folder is None and (cached := _cached(reference, file)) is not None:
        config = _read(cached)
    if config is not None:
        family = config.get("model_type")
        why = f"the {what} of {reference} cannot be read from its {file}"
        if what == "shape" and family not in FAMILIES:
            why = f"{reference} is of the family {family}, which launch cannot count"
        return why, _WITHOUT
    why = f"the {what} of {reference} is not known on this machine"
    if folder is not None:
        return why, f"its folder has no {file} that can be read: put it there"
    if _HUB_NAME.fullmatch(reference):
        folders = f"; or name a local folder: {key}" if here else ""
        return why, f"fetch it: hf download {reference} {file}{folders}"
    return why, _WITHOUT


def _trained(stage: Stage, stages: Sequence[Stage], base: Path) -> Optional[Shape]:
    assert stage.model is not None
    if stage.model.architecture is None:
        name = stage.model.name
        return None if name is None else _named(name, stages, base)
    made_by = _stage_of(str(stage.model.tokenizer), stages)
    size = None
    if made_by is not None and made_by.tokenizer is not None:
        size = made_by.tokenizer.vocab_size  # at most: a small corpus may give fewer
    shape = of_model(stage.model, base, size)
    if shape is not None or made_by is None or made_by.model is None or made_by is stage:
        return shape
    # The tokenizer of another stage's model.
    beside = _trained(made_by, stages, base)
    return None if beside is None else of_model(stage.model, base, beside.vocabulary)


def _named(reference: str, stages: Sequence[Stage], base: Path) -> Optional[Shape]:
    """The shape of what `reference` means, also the output of a stage of this recipe."""
    stage = _stage_of(reference, stages)
    if stage is None:
        return None if "${" in reference else of_reference(reference, base)
    earlier = [other for other in stages if other is not stage]  # a circle ends here
    if stage.model is not None:
        return _trained(stage, earlier, base)
    if stage.merge is not None:
        return _named(stage.merge.base or stage.merge.adapter, earlier, base)
    return None if stage.export is None else _named(stage.export.model, earlier, base)


def _stage_of(reference: str, stages: Sequence[Stage]) -> Optional[Stage]:
    match = _STAGE.fullmatch(reference)
    return next((s for s in stages if match and s.id == match[1]), None)


def _of_architecture(architecture: Architecture, vocabulary: int) -> Shape:
    """The model that `architecture` describes, with the trainer's own defaults (models.py)."""
    hidden, heads = architecture.hidden_size, architecture.heads
    wide = architecture.intermediate_size or -(-hidden * 8 // 3 // 32) * 32
    return Shape(
        vocabulary, hidden, architecture.layers, heads, architecture.kv_heads or heads,
        hidden // heads, wide, architecture.tie_embeddings, family=architecture.family,
        source="model.architecture of the recipe",
    )  # fmt: skip


def _of_config(config: Optional[Mapping[str, Any]], source: str) -> Optional[Shape]:
    """The shape that a Hugging Face `config.json` describes; None for a family whose tensors are
    not known here, and for layers that are not all alike."""
    family = config.get("model_type") if config is not None else None
    if config is None or family not in FAMILIES:
        return None
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    uneven = config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    if family == "qwen3_moe" and uneven:
        return None
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        wide = config["moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"]
        biased = bool(config.get("attention_bias", False))
        qkv, output = _ALWAYS_BIASED.get(str(family), (biased, biased))
        return Shape(
            vocabulary=int(config["vocab_size"]),
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(wide),
            tied=bool(config.get("tie_word_embeddings", False)),
            experts=int(experts),
            experts_per_token=int(config.get("num_experts_per_tok") or 0),
            family=str(family),
            source=source,
            qkv_bias=qkv,
            output_bias=output,
            mlp_bias=bool(config.get("mlp_bias", False)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _tokens(reference: str, base: Path) -> Optional[int]:
    """How many tokens a tokenizer has; of a hub name that is not on this machine, the vocabulary
    of its model, which may be padded by a few hundred."""
    folder = _folder(reference, base)
    if folder is not None and not (folder / "tokenizer.json").is_file():
        folder = folder / "tokenizer"
    at = folder / "tokenizer.json" if folder is not None else _cached(reference, "tokenizer.json")
    content = _read(at) if at is not None else None
    if content is not None:
        try:
            names = content["model"]["vocab"]
            known = {str(name if isinstance(name, str) else name[0]) for name in names}
            return len(known | {str(token["content"]) for token in content["added_tokens"]})
        except (KeyError, TypeError, IndexError):
            return None
    known_model = of_reference(reference, base)
    return None if known_model is None else known_model.vocabulary


def _folder(reference: str, base: Path) -> Optional[Path]:
    """The folder on this machine that holds a model's files: itself, or of a stage's output the
    newest or the best checkpoint."""
    text = reference.removeprefix("file://")
    match = re.fullmatch(r"(.+)@(best|last)", text)
    for given, which in ((text, "last"), *([(match[1], match[2])] if match else [])):
        try:
            folder = base / Path(given).expanduser()
            if "://" in given or not folder.is_dir():
                continue
        except (OSError, ValueError, RuntimeError):  # a name that no file can have
            continue
        pointer = _read(folder / "checkpoints" / f"{which}.json")
        pointed = folder / "checkpoints" / f"step-{pointer.get('step') if pointer else None}"
        return pointed if pointed.is_dir() else folder
    return None


def _cached(reference: str, name: str) -> Optional[Path]:
    """A file of a hub name in the hub's cache on this machine, at the revision fetched last."""
    home = os.environ.get("HF_HOME") or str(
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or str(Path(home) / "hub")
    if not _HUB_NAME.fullmatch(reference):
        return None
    try:
        root = Path(cache).expanduser() / f"models--{reference.replace('/', '--')}"
        commit = (root / "refs" / "main").read_text().strip()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return None
    found = root / "snapshots" / commit / name
    return found if found.is_file() else None


def _read(path: Path) -> Optional[Mapping[str, Any]]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@functools.cache
def _table() -> Mapping[str, Shape]:
    """The dated table, by names in small letters."""
    text = resources.files("launcher").joinpath("data/shapes.json").read_text("utf-8")
    content = json.loads(text)
    found: dict[str, Shape] = {}
    for entry in content["models"]:
        values = dict(zip(content["columns"], entry["shape"]))
        qkv, output = _ALWAYS_BIASED.get(values["family"], (False, False))
        shape = Shape(**values, qkv_bias=qkv, output_bias=output)
        for name in entry["names"]:
            source = f"config.json of {name}, as of {content['as_of']}"
            found[name.casefold()] = replace(shape, source=source)
    return found
