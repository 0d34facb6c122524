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
from typing import Literal, Optional

from trainer.config_data import Data as Data
from trainer.config_data import Hub as Hub
from trainer.config_data import Phase as Phase
from trainer.config_data import Source as Source
from trainer.config_data import ToolUse as ToolUse
from trainer.config_model import Adapter as Adapter
from trainer.config_model import Architecture as Architecture
from trainer.config_model import Model as Model
from trainer.config_objectives import Distill as Distill
from trainer.config_objectives import Grpo as Grpo
from trainer.config_objectives import KeepLogits as KeepLogits
from trainer.config_objectives import Preference as Preference
from trainer.config_objectives import Sdce as Sdce
from trainer.config_objectives import Targets as Targets
from trainer.config_objectives import preference_problems as preference_problems
from trainer.config_train import Train as Train
from trainer.loading import FieldErrors as FieldErrors
from trainer.loading import KeyPath as KeyPath
from trainer.loading import Problem as Problem
from trainer.loading import Strict as Strict
from trainer.loading import build as build
from trainer.loading import dotted as dotted
from trainer.loading import nearest as nearest
from trainer.loading import require as require
from trainer.loading import to_dict as to_dict

SCHEMA = 1
#: Stages this trainer can run; `stages.py` holds one row for each.
STAGES = (
    "tokenizer", "pretrain", "sft", "targets", "kd", "sdce", "dpo", "ipo", "grpo", "evaluate",
    "merge", "export", "smoke",
)  # fmt: skip
StageName = Literal[
    "tokenizer", "pretrain", "sft", "targets", "kd", "sdce", "dpo", "ipo", "grpo", "evaluate",
    "merge", "export", "smoke",
]  # fmt: skip
#: Those that train a model in the loop.
TRAINING = ("pretrain", "sft", "kd", "sdce", "dpo", "ipo", "grpo")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line per problem (exit code 64)."""


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


#: Kinds of numbers that a GGUF file may get here.
QUANTIZE = ("auto", "f32", "f16", "bf16", "q8_0", "q4_0")


@dataclass(frozen=True)
class Export(Strict):
    """A model to be written as a plain Hugging Face folder, or as one GGUF file (llama.cpp): to
    `to` (default: the stage's own folder; a URI gets a copy), or to the Hub with `to: hub:NAME`."""

    model: str
    to: Optional[str] = None
    format: Literal["huggingface", "gguf"] = "huggingface"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of `huggingface`; auto: as it is
    quantize: str = "auto"  # of `gguf`: one of QUANTIZE; auto: as it is
    private: bool = True  # a new repository on the Hub

    def __post_init__(self) -> None:
        folder = self.format == "huggingface"
        require(
            self,
            to=(self.to is None or self.to.startswith(("gs://", "s3://"))
                or (self.to not in ("", "hub:") and "://" not in self.to),
                "must be a folder, gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or hub:NAME"),
            precision=(folder or self.precision == "auto",
                       "belongs to `format: huggingface`; write `quantize`"),
            quantize=(self.quantize == "auto" if folder else self.quantize in QUANTIZE,
                      "belongs to `format: gguf`" if folder else _kinds(self.quantize)),
        )  # fmt: skip


def _kinds(given: str) -> str:
    """What to do about a kind of numbers that is not written here."""
    kind = given.upper()
    return (
        f"must be one of {', '.join(QUANTIZE)}; llama.cpp makes others: write `quantize: f16`, then"
        f" llama-quantize NAME-F16.gguf NAME-{kind}.gguf {kind}"
    )


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
    sdce: Optional[Sdce] = None
    preference: Optional[Preference] = None
    grpo: Optional[Grpo] = None
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
    restart: int = 0  # how often a service started this attempt again
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
    "sdce": (frozenset({"model", "data", "train", "sdce"}), frozenset()),
    "dpo": (frozenset({"model", "data", "train"}), frozenset({"preference"})),
    "ipo": (frozenset({"model", "data", "train"}), frozenset({"preference"})),
    "grpo": (frozenset({"model", "data", "train", "grpo"}), frozenset()),
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
