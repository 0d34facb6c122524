"""What a job is told to do: frozen dataclasses and a small strict loader. Standard library only.

The launcher validates recipes against these classes and ships one `Job` as JSON; the trainer
reads it back with `load_job`. Nothing here imports torch, pydantic or yaml.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, Union

SCHEMA = 1
#: Stages this trainer can run; `stages.py` holds one row for each.
STAGES = ("tokenizer", "pretrain", "kd", "evaluate", "smoke")
StageName = Literal["tokenizer", "pretrain", "kd", "evaluate", "smoke"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line per problem (exit code 64)."""


class FieldErrors(ValueError):
    """Problems of single fields of one dataclass: `problems` is a list of (field name, message)."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{name}: {message}" for name, message in problems))
        self.problems = problems


def require(owner: object, **rules: tuple[bool, str]) -> None:
    """Raise `FieldErrors` for every rule `field=(holds, message)` that does not hold."""
    problems = [(name, message) for name, (holds, message) in rules.items() if not holds]
    if problems:
        raise FieldErrors(problems)


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
class Model(Strict):
    """The model that is trained. `name`: hub name, local folder, or a stage's output folder
    (`FOLDER`, `FOLDER@best`, `FOLDER@last`); not needed when `architecture` is given."""

    name: Optional[str] = None
    init: Literal["pretrained", "random"] = "pretrained"
    architecture: Optional[Architecture] = None
    tokenizer: Optional[str] = None  # default: the one beside the model
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        require(
            self,
            architecture=(self.architecture is None or self.init == "random",
                          "needs `init: random` (a pretrained model brings its own architecture)"),
            tokenizer=(self.architecture is None or self.tokenizer is not None,
                       "must be named when `architecture` is given: it sets the vocabulary"),
        )  # fmt: skip


@dataclass(frozen=True)
class Source(Strict):
    """Where documents come from: `path` (file, folder or glob; .jsonl or .txt; a URI), or
    `builtin` (text that is part of CPython). `share` keeps that part of the documents, by hash."""

    path: Optional[str] = None
    builtin: Optional[Literal["python-reference"]] = None
    split: Optional[Literal["train", "heldout"]] = None  # builtin sources: which topics
    field: str = "text"  # the JSONL key that holds the text
    weight: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        require(
            self,
            path=((self.path is None) != (self.builtin is None),
                  "give exactly one of `path` and `builtin`"),
            split=(self.split is None or self.builtin is not None, "belongs to `builtin` sources"),
            weight=(self.weight > 0, "must be greater than 0"),
            share=(0 < self.share <= 1, "must be in (0, 1]"),
        )  # fmt: skip


@dataclass(frozen=True)
class Data(Strict):
    """What is read and how rows are cut. With `packing`, several documents share a row of
    `sequence_length` tokens and never see each other; without, a row is one document."""

    train: tuple[Source, ...] = ()
    validation: tuple[Source, ...] = ()
    sequence_length: int = 1024
    packing: bool = True

    def __post_init__(self) -> None:
        require(self, sequence_length=(self.sequence_length >= 2, "must be at least 2"))


@dataclass(frozen=True)
class Train(Strict):
    """Length, batch and optimizer. Exactly one of `steps`, `epochs`, `seconds_of` sets the horizon
    of the schedule (`seconds_of`: the training time of another stage's output folder)."""

    steps: Optional[int] = None
    epochs: Optional[float] = None
    seconds_of: Optional[str] = None
    micro_batch: Union[int, Literal["auto"]] = 8  # rows per forward pass and device
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
    evaluate_batches: int = 0  # 0: the whole validation set
    save_every: int = 0  # steps; 0: only at the end
    log_every: int = 10
    keep: int = 3  # newest checkpoints kept, besides the best one
    seed: int = 0
    limit_batches: Optional[int] = None  # read at most this many micro-batches of the data
    until: Optional[int] = None  # pause after this step; the schedule's horizon stays
    report_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)

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
class Distill(Strict):
    """Knowledge distillation. loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher || student),
    both at temperature T inside the KL (Hinton et al. 2015, arXiv 1503.02531)."""

    teacher: str
    mode: Literal["online"] = "online"
    temperature: float = 2.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        require(
            self,
            temperature=(self.temperature > 0, "must be greater than 0"),
            alpha=(0 <= self.alpha <= 1, "must be in [0, 1]"),
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
            lr=(0 < self.lr < math.inf, "must be greater than 0"),
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
    tokenizer: Optional[Tokenizer] = None
    evaluate: Optional[Evaluate] = None
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


#: The blocks a stage needs and those it may have; the launcher and the trainer both check it.
NEEDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "tokenizer": (frozenset({"tokenizer", "data"}), frozenset()),
    "pretrain": (frozenset({"model", "data", "train"}), frozenset()),
    "kd": (frozenset({"model", "data", "train", "kd"}), frozenset()),
    "evaluate": (frozenset({"evaluate", "data"}), frozenset()),
    "smoke": (frozenset({"smoke"}), frozenset()),
}


def missing_blocks(stage: str, given: typing.Collection[str]) -> list[str]:
    """Blocks that `stage` needs and `given` lacks, sorted."""
    return sorted(NEEDS[stage][0] - set(given))


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest allowed name, else the list of what is allowed."""
    options = sorted(allowed)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(options)}"


def to_dict(value: Any) -> Any:
    """Plain dicts, lists and scalars of a configuration, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return value


KeyPath = tuple[Union[str, int], ...]
Problem = tuple[KeyPath, str]  # the path of a key, and what is wrong with it


def dotted(path: KeyPath) -> str:
    """`("stages", 0, "train")` as `stages[0].train`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


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


def build(kind: Any, raw: Any, at: KeyPath, problems: list[Problem]) -> Any:
    """`raw` (of JSON or YAML) as an instance of the type `kind`: no unknown key, no conversion but
    int to float. Every problem is appended; what is wrong becomes None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if raw is None:
            return None if type(None) in arguments else _wrong(raw, "a value", at, problems)
        kinds = [argument for argument in arguments if argument is not type(None)]
        if len(kinds) == 1:
            return build(kinds[0], raw, at, problems)
        return _build_any(kinds, raw, at, problems)
    if origin is Literal:
        if raw not in arguments or isinstance(raw, bool):
            problems.append(
                (at, f"{raw!r} is not allowed; {nearest(str(raw), map(str, arguments))}")
            )
        return raw
    if origin is tuple:
        if not isinstance(raw, (list, tuple)):
            return _wrong(raw, "a list", at, problems)
        return tuple(build(arguments[0], item, (*at, i), problems) for i, item in enumerate(raw))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(raw, Mapping):
            return _wrong(raw, "a mapping", at, problems)
        return {key: build(arguments[1], v, (*at, key), problems) for key, v in raw.items()}
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, raw, at, problems)
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if not isinstance(raw, kind) or (kind is not bool and isinstance(raw, bool)):
        return _wrong(raw, _WORDS.get(kind, kind.__name__), at, problems)
    if kind is float and not math.isfinite(raw):
        return _wrong(raw, "a finite number", at, problems)
    return raw


_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _build_any(kinds: list[Any], raw: Any, at: KeyPath, problems: list[Problem]) -> Any:
    """`raw` as the first of several scalar types that it fits."""
    words: list[str] = []
    for kind in kinds:
        tried: list[Problem] = []
        value = build(kind, raw, at, tried)
        if not tried:
            return value
        literal = typing.get_origin(kind) is Literal
        words += map(repr, typing.get_args(kind)) if literal else [_WORDS[kind]]
    return _wrong(raw, " or ".join(words), at, problems)


def _build_dataclass(kind: Any, raw: Any, at: KeyPath, problems: list[Problem]) -> Any:
    if not isinstance(raw, Mapping):
        return _wrong(raw, "a mapping", at, problems)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    before = len(problems)
    for key in raw:
        if key not in fields:
            problems.append(((*at, key), f"unknown key; {nearest(str(key), fields)}"))
    values = {
        name: build(hints[name], raw[name], (*at, name), problems) for name in fields if name in raw
    }
    for name, f in fields.items():
        no_default = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if no_default and name not in raw:
            problems.append((at, f"missing key `{name}`"))
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except FieldErrors as error:
        problems.extend(((*at, name), message) for name, message in error.problems)
        return None


def _wrong(raw: Any, wanted: str, at: KeyPath, problems: list[Problem]) -> None:
    problems.append((at, f"expected {wanted}, got {raw!r}"))
