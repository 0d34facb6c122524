"""What a job is told to do: frozen dataclasses and a small strict loader. Standard library only.

The launcher validates recipes against these classes and ships one `Job` as JSON; the trainer
reads it back with `load_job`. Nothing here imports torch, pydantic or yaml.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, Union

from trainer.loading import FieldErrors as FieldErrors
from trainer.loading import KeyPath as KeyPath
from trainer.loading import Problem as Problem
from trainer.loading import build as build
from trainer.loading import dotted as dotted
from trainer.loading import nearest as nearest
from trainer.loading import require as require
from trainer.loading import to_dict as to_dict

SCHEMA = 1
#: Stages this trainer can run; `stages.py` holds one row for each.
STAGES = ("tokenizer", "pretrain", "sft", "targets", "kd", "evaluate", "merge", "export", "smoke")
StageName = Literal[
    "tokenizer", "pretrain", "sft", "targets", "kd", "evaluate", "merge", "export", "smoke"
]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line per problem (exit code 64)."""


class Strict:
    """Mixin: the JSON Schema (`launch schema`, by pydantic) allows no other keys."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


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
    the ends of their dotted names; `auto` is every projection of attention and MLP."""

    type: Literal["lora"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # on the input of A
    targets: Union[Literal["auto"], tuple[str, ...]] = "auto"

    def __post_init__(self) -> None:
        require(
            self,
            rank=(self.rank >= 1, "must be at least 1"),
            alpha=(self.alpha > 0, "must be greater than 0"),
            dropout=(0 <= self.dropout < 1, "must be in [0, 1)"),
            targets=(len(self.targets) > 0, "must name at least one layer, or be `auto`"),
        )


@dataclass(frozen=True)
class Model(Strict):
    """The model that is trained. `name`: hub name, local folder, or a stage's output folder
    (`FOLDER`, `FOLDER@best`, `FOLDER@last`); not needed when `architecture` is given."""

    name: Optional[str] = None
    init: Literal["pretrained", "random"] = "pretrained"
    architecture: Optional[Architecture] = None
    tokenizer: Optional[str] = None  # default: the one beside the model
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on CUDA, else fp32
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False
    adapter: Optional[Adapter] = None
    freeze: tuple[str, ...] = ()  # patterns (`*`, `?`, `[...]`) on names of parameters

    def __post_init__(self) -> None:
        require(
            self,
            architecture=(self.architecture is None or self.init == "random",
                          "needs `init: random` (a pretrained model brings its own architecture)"),
            tokenizer=(self.architecture is None or self.tokenizer is not None,
                       "must be named when `architecture` is given: it sets the vocabulary"),
            adapter=(self.adapter is None or self.init == "pretrained",
                     "needs `init: pretrained`: its checkpoints hold nothing of the base model"),
        )  # fmt: skip


@dataclass(frozen=True)
class Hub(Strict):
    """A dataset of the Hugging Face hub (or a local folder of one), by name and configuration."""

    name: str
    config: Optional[str] = None
    split: str = "train"


@dataclass(frozen=True)
class Source(Strict):
    """Where documents come from, exactly one of: `path` (file, folder or glob; .jsonl or .txt; a
    URI), `builtin` (text that is part of CPython), `hf` (a dataset of the hub) and `manifest` (a
    JSONL file of sources). `share` keeps that part of the documents, by hash."""

    path: Optional[str] = None
    builtin: Optional[Literal["python-reference", "python-questions"]] = None
    hf: Optional[Hub] = None
    manifest: Optional[str] = None
    split: Optional[Literal["train", "heldout"]] = None  # builtin sources: which topics
    #: None: what the stage reads by default; `auto`: seen in the first line of each file.
    format: Optional[Literal["auto", "text", "messages", "prompt", "math_tool"]] = None
    field: str = "text"  # the JSONL key that holds the text
    weight: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        given = [w for w in (self.path, self.builtin, self.hf, self.manifest) if w is not None]
        said_elsewhere = self.builtin is not None or self.manifest is not None
        require(
            self,
            path=(len(given) == 1, "give exactly one of `path`, `builtin`, `hf` and `manifest`"),
            split=(self.split is None or self.builtin is not None, "belongs to `builtin` sources"),
            format=(self.format is None or not said_elsewhere,
                    "belongs to `path` and `hf` sources (a manifest says `type` on each line)"),
            weight=(self.weight > 0, "must be greater than 0"),
            share=(0 < self.share <= 1, "must be in (0, 1]"),
        )  # fmt: skip


@dataclass(frozen=True)
class ToolUse(Strict):
    """`ratio`: the part of the `math_tool` documents, by hash, whose `CALL tool:"..."` lines are
    answered with a `RESULT:` line; what the tool says is read and not learned."""

    ratio: float

    def __post_init__(self) -> None:
        require(self, ratio=(0 <= self.ratio <= 1, "must be in [0, 1]"))


@dataclass(frozen=True)
class Data(Strict):
    """What is read and how rows are cut. With `packing`, several documents share a row of
    `sequence_length` tokens and never see each other; without, a row is one document.
    `chat_template`: `chatml` or a Jinja file, in place of the one that the tokenizer brings."""

    train: tuple[Source, ...] = ()
    validation: tuple[Source, ...] = ()
    sequence_length: int = 1024
    packing: bool = True
    chat_template: Optional[str] = None
    tool_use: Optional[ToolUse] = None
    skip_bad: bool = False  # leave out and count lines that cannot be used, instead of stopping

    def __post_init__(self) -> None:
        require(self, sequence_length=(self.sequence_length >= 2, "must be at least 2"))


@dataclass(frozen=True)
class Train(Strict):
    """Length, batch and optimizer. Exactly one of `steps`, `epochs`, `seconds_of` sets the horizon
    of the schedule (`seconds_of`: the training time of another stage's output folder)."""

    steps: Optional[int] = None
    epochs: Optional[float] = None
    seconds_of: Optional[str] = None
    micro_batch: Union[Literal["auto"], int] = 8  # rows per forward pass and device
    accumulate: int = 1  # micro-batches per optimizer step
    global_batch: Optional[int] = None  # rows per optimizer step, where micro_batch is "auto"
    lr: float = 1e-4
    min_lr_ratio: float = 0.05  # the schedule ends at lr * min_lr_ratio
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03  # below 1: share of the horizon; from 1: steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 1.0  # largest norm of the whole gradient; 0: off
    evaluate_every: int = 0  # steps; 0: only at the end
    evaluate_batches: int = 0  # of micro_batch rows over all workers (auto: 8); 0: all
    save_every: int = 0  # steps; 0: only at the end
    log_every: int = 10
    keep: int = 3  # newest checkpoints kept, besides the best one
    save_async: bool = True  # write a checkpoint while the next steps run
    sharded: bool = False  # all workers write the optimizer's state, each a part
    seed: int = 0
    limit_batches: Optional[int] = None  # read at most this many micro-batches of the data
    until: Optional[int] = None  # pause after this step; the schedule's horizon stays
    report_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    resume: Optional[str] = None  # another run's stage folder, or one of its checkpoints

    def __post_init__(self) -> None:
        horizons = [h for h in (self.steps, self.epochs, self.seconds_of) if h is not None]
        automatic, at_least_1 = self.micro_batch == "auto", "must be at least 1"
        require(
            self,
            steps=(len(horizons) == 1 and (self.steps is None or self.steps >= 1),
                   "give exactly one of `steps`, `epochs` and `seconds_of`, greater than 0"),
            epochs=(self.epochs is None or self.epochs > 0, "must be greater than 0"),
            micro_batch=(isinstance(self.micro_batch, str) or self.micro_batch >= 1, at_least_1),
            accumulate=(self.accumulate >= 1 and (self.accumulate == 1 or not automatic),
                        "follows from global_batch; leave it out" if automatic else at_least_1),
            global_batch=((self.global_batch or 0) >= 1 if automatic else self.global_batch is None,
                          "must say the rows of one optimizer step, since micro_batch is auto"
                          if automatic else "belongs to `micro_batch: auto`"),
            lr=(self.lr > 0, "must be greater than 0"),
            min_lr_ratio=(0 <= self.min_lr_ratio <= 1, "must be in [0, 1]"),
            warmup=(self.warmup >= 0, "must not be negative"),
            weight_decay=(self.weight_decay >= 0, "must not be negative"),
            clip=(self.clip >= 0, "must not be negative"),
            evaluate_every=(self.evaluate_every >= 0, "must not be negative"),
            evaluate_batches=(self.evaluate_batches >= 0, "must not be negative"),
            save_every=(self.save_every >= 0, "must not be negative"),
            log_every=(self.log_every >= 1, at_least_1),
            keep=(self.keep >= 1, at_least_1),
            limit_batches=(self.limit_batches is None or self.limit_batches >= 1, at_least_1),
            until=(self.until is None or self.until >= 1, at_least_1),
        )  # fmt: skip


@dataclass(frozen=True)
class KeepLogits(Strict):
    """Hold the student near its starting logits. `fade`: the share of the horizon over which the
    weight falls linearly to 0."""

    weight: float = 0.1
    fade: float = 0.5

    def __post_init__(self) -> None:
        require(
            self,
            weight=(self.weight > 0, "must be greater than 0"),
            fade=(0 < self.fade <= 1, "must be in (0, 1]"),
        )


@dataclass(frozen=True)
class Distill(Strict):
    """Knowledge distillation. loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher || student),
    both at temperature T inside the KL (Hinton et al. 2015, arXiv 1503.02531). `precompute`: the
    teacher's answers are read from `targets` (a stage of that name) or `logits_dir` (a file for
    each sample), of which `top_k` logits a token are kept."""

    teacher: Optional[str] = None
    mode: Literal["online", "precompute"] = "online"
    temperature: float = 2.0
    alpha: float = 0.5
    alpha_final: Optional[float] = None  # alpha at the end of the horizon
    alpha_schedule: Literal["constant", "linear", "cosine"] = "constant"
    keep_logits: Optional[KeepLogits] = None
    targets: Optional[str] = None
    logits_dir: Optional[str] = None
    top_k: int = 64

    def __post_init__(self) -> None:
        online = self.mode == "online"
        anneals = self.alpha_schedule != "constant"
        stored = [given for given in (self.targets, self.logits_dir) if given is not None]
        where = "belongs to `mode: precompute`"
        require(
            self,
            teacher=((self.teacher is not None) == online,
                     "must be named" if online else "is not read with `mode: precompute`"),
            mode=(online or len(stored) == 1,
                  "`precompute` needs exactly one of `targets` and `logits_dir`"),
            temperature=(self.temperature > 0, "must be greater than 0"),
            alpha=(0 <= self.alpha <= 1, "must be in [0, 1]"),
            alpha_final=(self.alpha_final is None or 0 <= self.alpha_final <= 1,
                         "must be in [0, 1]"),
            alpha_schedule=(anneals == (self.alpha_final is not None),
                            "`linear` and `cosine` go with `alpha_final`, and it with them"),
            targets=(not online or self.targets is None, where),
            logits_dir=(not online or self.logits_dir is None, where),
            top_k=(self.top_k >= 1, "must be at least 1"),
        )  # fmt: skip


@dataclass(frozen=True)
class Targets(Strict):
    """A teacher's answers on `data.train`, stored for `kd` with `mode: precompute`. `top_k`: the
    most probable tokens, the rest as one; `sample`: `samples` draws, unbiased (arXiv 2503.16870).
    `temperature` is that of the `kd` stage."""

    teacher: str
    top_k: int = 64
    sampler: Literal["top_k", "sample"] = "top_k"
    samples: int = 32
    temperature: float = 2.0
    micro_batch: int = 8  # rows per forward pass
    seed: int = 0  # of the draws
    limit_rows: Optional[int] = None  # read only as much as fills that many rows

    def __post_init__(self) -> None:
        at_least_1 = "must be at least 1"
        require(
            self,
            top_k=(self.top_k >= 1, at_least_1),
            samples=(1 <= self.samples < 65536, "must be in 1..65535"),
            temperature=(self.temperature > 0, "must be greater than 0"),
            micro_batch=(self.micro_batch >= 1, at_least_1),
            limit_rows=(self.limit_rows is None or self.limit_rows >= 1, at_least_1),
        )


@dataclass(frozen=True)
class Tokenizer(Strict):
    """A byte-level BPE tokenizer to be trained on `data.train`."""

    vocab_size: int = 32000
    min_frequency: int = 2

    def __post_init__(self) -> None:
        require(
            self,
            vocab_size=(self.vocab_size >= 260, "must be at least 260 (256 bytes and specials)"),
            min_frequency=(self.min_frequency >= 1, "must be at least 1"),
        )


@dataclass(frozen=True)
class Evaluate(Strict):
    """Models to compare on `data.validation`: label -> what `model.name` accepts."""

    models: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self, models=(bool(self.models), "must name at least one model"))


@dataclass(frozen=True)
class Merge(Strict):
    """An adapter to be added into the weights of its base model, in fp32. `base`: the model to take
    instead of the one that the adapter names. `prompts`: texts on which logits are compared."""

    adapter: str
    base: Optional[str] = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the result; auto: as the base's
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self, prompts=(all(self.prompts), "must not be empty texts"))


@dataclass(frozen=True)
class Export(Strict):
    """A model to be written as a plain Hugging Face folder: to `to` (default: the stage's own
    folder; a URI gets a copy), or to the Hub with `to: hub:NAME`."""

    model: str
    to: Optional[str] = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: as it is
    private: bool = True  # a new repository on the Hub

    def __post_init__(self) -> None:
        require(
            self,
            to=(self.to is None or self.to.startswith(("gs://", "s3://"))
                or (self.to not in ("", "hub:") and "://" not in self.to),
                "must be a folder, gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or hub:NAME"),
        )  # fmt: skip


@dataclass(frozen=True)
class Smoke(Strict):
    """A test of device, process group and training on synthetic data; `batch` is per process."""

    epochs: int = 2
    batch: int = 256
    samples: int = 4096
    features: int = 128
    classes: int = 4
    lr: float = 3e-3
    seed: int = 42

    def __post_init__(self) -> None:
        at_least_1 = "must be at least 1"
        require(
            self,
            epochs=(self.epochs >= 1, at_least_1),
            batch=(self.batch >= 1, at_least_1),
            samples=(self.samples >= 1, at_least_1),
            features=(self.features >= 1, at_least_1),
            classes=(self.classes >= 2, "must be at least 2"),
            lr=(self.lr > 0, "must be greater than 0"),
            seed=(0 <= self.seed < 2**63, "must not be negative, and below 2**63"),
        )


@dataclass(frozen=True)
class StageConfig(Strict):
    """One stage as the trainer runs it. Paths are resolved; `output` is this stage's folder."""

    id: str
    stage: StageName
    output: str
    model: Optional[Model] = None
    data: Data = field(default_factory=Data)
    train: Optional[Train] = None
    kd: Optional[Distill] = None
    targets: Optional[Targets] = None
    tokenizer: Optional[Tokenizer] = None
    evaluate: Optional[Evaluate] = None
    merge: Optional[Merge] = None
    export: Optional[Export] = None
    smoke: Optional[Smoke] = None


@dataclass(frozen=True)
class Job(Strict):
    """What one process group does: `stages` in order, those already completed left out.
    `control`: the folder where `stop.json` may appear. `dry_run`: shrink models (models.py)."""

    run: str
    stages: tuple[StageConfig, ...]
    schema: int = SCHEMA
    attempt: int = 1
    control: Optional[str] = None
    dry_run: bool = False
    commit: Optional[str] = None  # git commit of the user's tree, when known
    project: Optional[str] = None  # cloud project, when there is one
    peak_tflops: Optional[float] = None  # bf16, of one worker's accelerator, when known
    name: Optional[str] = None  # the run's, for people
    copies: Mapping[str, str] = field(default_factory=dict)  # URI -> its copy on this machine


#: The blocks a stage needs and those it may have; the launcher and the trainer both check it.
NEEDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "tokenizer": (frozenset({"tokenizer", "data"}), frozenset()),
    "pretrain": (frozenset({"model", "data", "train"}), frozenset()),
    "sft": (frozenset({"model", "data", "train"}), frozenset()),
    "targets": (frozenset({"targets", "data"}), frozenset()),
    "kd": (frozenset({"model", "data", "train", "kd"}), frozenset()),
    "evaluate": (frozenset({"evaluate", "data"}), frozenset()),
    "merge": (frozenset({"merge"}), frozenset()),
    "export": (frozenset({"export"}), frozenset()),
    "smoke": (frozenset({"smoke"}), frozenset()),
}


def missing_blocks(stage: str, given: typing.Collection[str]) -> list[str]:
    """Blocks that `stage` needs and `given` lacks, sorted."""
    return sorted(NEEDS[stage][0] - set(given))


def load_job(path: str | Path) -> Job:
    """Read a job file. Errors: `ConfigError`, one line for each problem, all of them."""
    try:
        raw = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    if isinstance(raw, dict) and raw.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: schema {raw.get('schema')!r}; this trainer reads {SCHEMA}")
    problems: list[Problem] = []
    job: Job = build(Job, raw, (), problems)
    if problems:
        raise ConfigError("\n".join(f"{path}: {dotted(at)}: {what}" for at, what in problems))
    return job
