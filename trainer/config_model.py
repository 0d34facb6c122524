"""The blocks of a job that say which model is trained, and how it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional, Union

from trainer.loading import Strict, require


@dataclass(frozen=True)
class Architecture(Strict):
    """A model to be initialised at random, in the words of Hugging Face configurations."""

    family: Literal["llama", "qwen3"] = "llama"
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: Optional[int] = None  # None: as many as heads
    intermediate_size: Optional[int] = None  # None: 8/3 of hidden_size, rounded up to 32
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    dropout: float = 0.0  # attention dropout

    def __post_init__(self) -> None:
        kv_heads = self.kv_heads or self.heads
        require(
            self,
            hidden_size=(self.hidden_size > 0 and self.hidden_size % max(self.heads, 1) == 0,
                         f"must be a positive multiple of heads ({self.heads})"),
            layers=(self.layers > 0, "must be at least 1"),
            heads=(self.heads > 0, "must be at least 1"),
            kv_heads=(kv_heads > 0 and self.heads % max(kv_heads, 1) == 0,
                      f"must divide heads ({self.heads})"),
            intermediate_size=(self.intermediate_size is None or self.intermediate_size > 0,
                               "must be at least 1"),
            dropout=(0 <= self.dropout < 1, "must be in [0, 1)"),
        )  # fmt: skip


@dataclass(frozen=True)
class Adapter(Strict):
    """Low-rank adapters beside frozen weights: W x + alpha / rank * B A x, with A [rank, in] and
    B [out, rank] trained (Hu et al. 2021, arXiv 2106.09685). `targets`: names of linear layers, as
    the ends of their dotted names; `auto` is every projection of attention and MLP. `experts`: also
    those that are one tensor [experts, in, out], an A and a B for each expert. `quantization`: of
    the frozen weights of those layers (QLoRA, Dettmers et al. 2023, arXiv 2305.14314)."""

    type: Literal["lora"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # on the input of A
    targets: Union[Literal["auto"], tuple[str, ...]] = "auto"
    experts: bool = False
    quantization: Literal["none", "nf4"] = "none"

    def __post_init__(self) -> None:
        require(
            self,
            rank=(self.rank >= 1, "must be at least 1"),
            alpha=(self.alpha > 0, "must be greater than 0"),
            dropout=(0 <= self.dropout < 1, "must be in [0, 1)"),
            targets=(len(self.targets) > 0, "must name at least one layer, or be `auto`"),
            experts=(not self.experts or self.dropout == 0,
                     "needs `dropout: 0`: W + B A is made before the input is known"),
            quantization=(not self.experts or self.quantization == "none",
                          "nf4 does not reach experts that are one tensor; leave one of both out"),
        )  # fmt: skip


@dataclass(frozen=True)
class Model(Strict):
    """The model that is trained. `name`: hub name, local folder, or a stage's output folder
    (`FOLDER`, `FOLDER@best`, `FOLDER@last`); not needed when `architecture` is given."""

    name: Optional[str] = None
    init: Literal["pretrained", "random"] = "pretrained"
    architecture: Optional[Architecture] = None
    tokenizer: Optional[str] = None  # default: the one beside the model
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on CUDA, else fp32
    attention: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "varlen", "flex"
    ] = "auto"
    float8: Literal["off", "auto", "torchao", "transformer_engine"] = "off"
    #: `selective`: results of matrix products and of attention are kept, the rest computed again.
    gradient_checkpointing: Union[Literal["selective"], bool] = False
    compile: bool = False  # each block, by torch.compile
    adapter: Optional[Adapter] = None
    freeze: tuple[str, ...] = ()  # patterns (`*`, `?`, `[...]`) on names of parameters

    def __post_init__(self) -> None:
        flat = self.attention.startswith("flash") or self.attention == "varlen"
        bare = self.attention in ("flash_attention_3", "varlen", "flex")
        drops = self.architecture is not None and self.architecture.dropout > 0
        require(
            self,
            attention=(not (bare and drops),
                       f"{self.attention} has no dropout; set architecture.dropout to 0, or take "
                       "sdpa"),
            precision=(not (flat and self.precision == "fp32"),
                       f"{self.attention} computes in bf16 or fp16 only; set attention to auto"),
            float8=(self.float8 in ("off", "auto") or self.precision in ("auto", "bf16"),
                    "needs precision bf16"),
            architecture=(self.architecture is None or self.init == "random",
                          "needs `init: random` (a pretrained model brings its own architecture)"),
            tokenizer=(self.architecture is None or self.tokenizer is not None,
                       "must be named when `architecture` is given: it sets the vocabulary"),
            adapter=(self.adapter is None or self.init == "pretrained",
                     "needs `init: pretrained`: its checkpoints hold nothing of the base model"),
        )  # fmt: skip
