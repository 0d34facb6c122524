"""Small stand-ins for what a job reads from buckets and hubs, and the job that is fit for them.

`python -m trainer stand-ins JOB.json FOLDER gs://BUCKET/PLACE`: below FOLDER/objects/BUCKET/ lies
what belongs below gs://BUCKET/; FOLDER/job.json is the job with few steps, short rows and tiny
random models; FOLDER/notes.txt says each change in one line. Nothing is read from a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import torch

from trainer import phases
from trainer.config import (
    ConfigError,
    Data,
    Distill,
    Evaluate,
    Export,
    Grpo,
    Job,
    Merge,
    Model,
    Source,
    StageConfig,
    Targets,
    Train,
    to_dict,
)
from trainer.data.corpus import python_reference
from trainer.data.preferences import python_preferences
from trainer.data.questions import python_questions
from trainer.data.read import source_name
from trainer.data.shapes import TEXTS
from trainer.data.tokenizer import byte_tokenizer
from trainer.shrink import STAND_IN_REWARD, first_layer, model_type, tiny, words

#: Enough to lose a machine after the first checkpoint and to have much left to do.
STEPS, EVERY = 24, 4
PROMPT = 1024  # tokens of prompt and answer: prompts are not cut
LENGTH, MICRO_BATCH, BATCHES, DOCUMENTS, CHARACTERS = 128, 2, 16, 300, 800
PAIR_LENGTH = 2 * LENGTH
#: Of a job that stores targets: enough shards that a machine, which is told of its end seconds
#: after the first of them is in the bucket, still has some to make.
CHARACTERS_OF_TARGETS = 5 * CHARACTERS
GROUP, ANSWER = 2, 8  # answers to a prompt, tokens of one
_VOCABULARY, _TOP_K = 512, 16
_KINDS = {
    "text": "pieces of Python's own reference",
    "math_tool": "pieces of Python's own reference",
    "messages": "questions about Python",
    "prompt": "questions about Python",
    "preference": "questions about Python with two answers",
}
_MAGIC = re.compile(r"\[[^\]]*\]|[*?]+")


def write(job: Job, folder: Path, place: str) -> list[str]:
    """Write everything below `folder`, and return the notes. `place`: where stand-ins go that the
    job names no URI for. Errors: `ConfigError` for what cannot be rehearsed."""
    stores = any(config.stage == "targets" for config in job.stages)
    making = _Making(
        folder, place.rstrip("/"), {config.output for config in job.stages},
        CHARACTERS_OF_TARGETS if stores else CHARACTERS,
    )  # fmt: skip
    stages = tuple(making.stage(config) for config in job.stages)
    notes = list(dict.fromkeys(making.notes))
    (folder / "job.json").write_text(json.dumps(to_dict(replace(job, stages=stages))))
    (folder / "notes.txt").write_text("".join(f"{note}\n" for note in notes))
    return notes


@dataclass
class _Making:
    """`made`: the outputs of the job's stages; references to them stay as they are. `characters`:
    of a document, at most."""

    folder: Path
    place: str
    made: set[str]
    characters: int
    notes: list[str] = field(default_factory=list)

    def stage(self, config: StageConfig) -> StageConfig:
        data = self._data(config.data, config.stage)
        changes: dict[str, Any] = {"data": data}
        if config.tokenizer is not None:
            size = min(config.tokenizer.vocab_size, _VOCABULARY)
            changes["tokenizer"] = replace(config.tokenizer, vocab_size=size)
            self._say("tokenizer.vocab_size", size, config.tokenizer.vocab_size)
        if config.train is not None:
            changes["train"] = self._train(config.train)
        if config.model is not None:
            changes["model"] = self._model(config.model)
        if config.kd is not None:
            changes["kd"] = self._distill(config.kd, data)
        if config.sdce is not None and config.sdce.surrogate is not None:
            surrogate = self._reference(config.sdce.surrogate)
            changes["sdce"] = replace(config.sdce, surrogate=surrogate)
        if config.grpo is not None:
            changes["grpo"] = self._grpo(config.grpo)
        if config.targets is not None:
            changes["targets"] = self._targets(config.targets)
        if config.evaluate is not None:
            models = {
                label: self._reference(name) for label, name in config.evaluate.models.items()
            }
            changes["evaluate"] = Evaluate(models=models)
        if config.merge is not None:
            changes["merge"] = self._merge(config.merge)
        if config.export is not None:
            changes["export"] = self._export(config.export)
        return replace(config, **changes)

    # Data.

    def _data(self, data: Data, stage: str) -> Data:
        # The tiny tokenizer writes long texts: of a pair both must fit, and prompts are not cut.
        length = min(data.sequence_length, LENGTH)
        if stage in ("dpo", "ipo"):
            length = PAIR_LENGTH
        elif stage == "grpo":
            length = PROMPT
        self._say("data.sequence_length", length, data.sequence_length)
        template = data.chat_template
        if template is not None and "://" in template:
            self.notes.append(f"data.chat_template: chatml instead of {template}")
            template = "chatml"
        elif template is None and _talks(data, stage):
            self.notes.append("data.chat_template: chatml, which the tiny tokenizer lacks")
            template = "chatml"
        return replace(
            data,
            train=tuple(self._source(source, "train", stage) for source in data.train),
            validation=tuple(self._source(source, "heldout", stage) for source in data.validation),
            sequence_length=length,
            curriculum=phases.shortened(data, length),
            chat_template=template,
        )

    def _source(self, source: Source, split: str, stage: str) -> Source:
        if source.builtin is not None:
            return source
        shape: Any = _shape(source, stage)
        count = self._documents(self._uri_of(source, split), source, split, shape)
        self.notes.append(f"data {source_name(source)}: {count} {_KINDS[shape]}")
        if source.hf is None:
            return source
        path = self._uri_of(source, split)
        return Source(path=path, format=shape, field=source.field, weight=source.weight,
                      share=source.share)  # fmt: skip

    def _uri_of(self, source: Source, split: str) -> str:
        if source.hf is not None:
            return f"{self.place}/data/{_slug(source.hf.name)}-{split}.jsonl"
        return str(source.path or source.manifest)

    def _documents(self, uri: str, source: Source, split: str, shape: str) -> int:
        """A file at `uri`, or where a reader of `uri` looks; the number of its documents."""
        path = self._local(_MAGIC.sub(_chosen, uri))
        if source.manifest is not None:
            listed = {"path": f"{path.stem}-0.jsonl", "type": shape}
            _write(path, json.dumps(listed) + "\n")
            path = path.with_name(listed["path"])
        elif path.suffix not in (".jsonl", ".txt"):  # a folder
            path = path / "0.jsonl"
        records = list(_records(split, shape, source.field, self.characters))
        if path.suffix == ".txt":
            _write(path, "\n\n".join(str(record[source.field]) for record in records))
            return 1
        _write(path, "".join(json.dumps(record) + "\n" for record in records))
        return len(records)

    # Training.

    def _train(self, train: Train) -> Train:
        # Few steps, each of them many batches: a machine can be taken in the middle.
        self.notes.append(
            f"train: {STEPS} steps of {BATCHES} batches of {MICRO_BATCH} rows; evaluated and saved"
            f" every {EVERY} steps, logged every step"
        )
        board = tuple(name for name in train.report_to if name == "tensorboard")
        if board != train.report_to:
            self.notes.append("train.report_to: without the trackers that need a network")
        if train.resume is not None:
            self.notes.append(f"train.resume: from the start instead of {train.resume}")
        return replace(
            train, steps=STEPS, epochs=None, seconds_of=None, until=None, limit_batches=None,
            resume=None,
            micro_batch=MICRO_BATCH, accumulate=BATCHES, global_batch=None,
            warmup=train.warmup if train.warmup < 1 else 1,
            evaluate_every=EVERY if train.evaluate_every else 0, evaluate_batches=2,
            save_every=EVERY, log_every=1, report_to=board,
        )  # fmt: skip

    # Models.

    def _model(self, model: Model) -> Model:
        changes: dict[str, Any] = {
            "attention": "auto",  # what needs a GPU is not there
            "float8": "off",
            "freeze": tuple(str(first_layer(pattern)) for pattern in model.freeze),
        }
        if model.tokenizer is not None:
            changes["tokenizer"] = self._reference(model.tokenizer)
        if model.architecture is not None:
            kept = model.architecture
            changes["architecture"] = replace(
                kept, hidden_size=64, layers=min(kept.layers, 2), heads=4, kv_heads=2,
                intermediate_size=128,
            )  # fmt: skip
            self.notes.append("model.architecture: 2 layers of width 64")
        elif model.name is not None:
            changes["name"] = self._reference(model.name, model)
        return replace(model, **changes)

    def _reference(self, reference: str, of: Optional[Model] = None) -> str:
        """A tiny model with its tokenizer in the place of one that no stage of the job makes; `of`
        says what is done with it."""
        if reference.split("@")[0] in self.made:
            return reference
        uri = f"{self.place}/models/{_slug(reference)}"
        if not self._local(uri).exists():
            kind = model_type(of or Model(name=reference))
            self.notes.append(f"model {reference}: {words(kind)}, at {uri}")
            # A seed of its own: student and teacher are to differ, and every rehearsal to be alike.
            torch.manual_seed(sum(reference.encode()))
            tokenizer = self.folder / "tokenizer"
            if not tokenizer.exists():
                byte_tokenizer(tokenizer)
            tiny(self._local(uri), kind, str(tokenizer), weights=True)
        return uri

    def _distill(self, kd: Distill, data: Data) -> Distill:
        if kd.logits_dir is not None:
            raise ConfigError(
                "kd.logits_dir: files of logits belong to the real data, so they cannot be "
                "rehearsed; rehearse with kd.targets, or with a kd.teacher"
            )
        if kd.teacher is not None:
            return replace(kd, teacher=self._reference(kd.teacher))
        if kd.targets is None or kd.targets in self.made:
            return kd
        teacher = self._reference(f"{kd.targets.rstrip('/')}/teacher")
        targets = Targets(
            teacher=str(self._local(teacher)), top_k=_TOP_K, temperature=kd.temperature
        )
        here = replace(data, train=tuple(self._here(source) for source in data.train))
        _answer(
            StageConfig(id="targets", stage="targets", output=str(self._local(kd.targets)),
                        data=here, targets=targets)
        )  # fmt: skip
        self.notes.append(f"kd.targets {kd.targets}: the {_TOP_K} best tokens of a tiny teacher")
        return kd

    def _grpo(self, grpo: Grpo) -> Grpo:
        """Rewards of the recipe's own need its own data."""
        own = all(name.startswith("trainer.rewards:") for name in grpo.rewards)
        rewards = grpo.rewards if own else (STAND_IN_REWARD,)
        self._say("grpo.rewards", ", ".join(rewards), ", ".join(grpo.rewards))
        self._say("grpo.rollouts", "generate", grpo.rollouts)
        self._say("grpo.group", min(grpo.group, GROUP), grpo.group)
        self._say("grpo.max_new_tokens", min(grpo.max_new_tokens, ANSWER), grpo.max_new_tokens)
        return replace(
            grpo, rewards=rewards, reward_weights=grpo.reward_weights if own else (),
            group=min(grpo.group, GROUP), max_new_tokens=min(grpo.max_new_tokens, ANSWER),
            rollouts="generate", vllm_server=None,
        )  # fmt: skip

    def _targets(self, targets: Targets) -> Targets:
        # One row at a time, so that a machine can be taken between two shards.
        self._say("targets.micro_batch", 1, targets.micro_batch)
        return replace(targets, teacher=self._reference(targets.teacher), micro_batch=1)

    def _merge(self, merge: Merge) -> Merge:
        if merge.adapter.split("@")[0] not in self.made:
            raise ConfigError(
                f"merge.adapter: {merge.adapter} belongs to a model that is not here, so it cannot "
                "be rehearsed; rehearse a pipeline that trains it"
            )
        return replace(merge, base=None)  # the adapter names the tiny one that it was trained on

    def _export(self, export: Export) -> Export:
        if export.to is not None:
            self.notes.append(f"export: to the stage's folder instead of {export.to}")
        return replace(export, to=None, model=self._reference(export.model))

    # Places.

    def _here(self, source: Source) -> Source:
        path = source.path and str(self._local(source.path))
        return replace(source, path=path, manifest=source.manifest and str(
            self._local(source.manifest)))  # fmt: skip

    def _local(self, uri: str) -> Path:
        scheme, mark, rest = uri.partition("://")
        if not mark or scheme == "file":
            raise ConfigError(f"{uri}: a rehearsal replaces what is in buckets and on hubs only")
        return self.folder / "objects" / rest

    def _say(self, what: str, now: Any, before: Any) -> None:
        if now != before:
            self.notes.append(f"{what}: {now} instead of {before}")


def _talks(data: Data, stage: str) -> bool:
    """Whether a chat template is needed."""
    shapes = {_shape(source, stage) for source in (*data.train, *data.validation)}
    return stage in ("sft", "dpo", "ipo", "grpo") or not shapes <= {*TEXTS}


def _shape(source: Source, stage: str) -> str:
    """The shape of a source's records: what the stage reads in any case, else what the source
    says, else what fits the stage. The source keeps what it says."""
    if stage in ("dpo", "ipo"):
        return "preference"
    if stage == "grpo":
        return "messages"
    if str(source.path).endswith(".txt") and source.format != "math_tool":
        return "text"
    if source.format not in (None, "auto"):
        return source.format
    return "messages" if stage == "sft" else "text"


def _records(split: Any, shape: str, key: str, characters: int) -> Iterator[dict[str, Any]]:
    """Some hundred documents that this Python brings."""
    if shape not in TEXTS:
        brought = python_preferences if shape == "preference" else python_questions
        found: Iterator[tuple[str, Any]] = brought(split)
        make: Callable[[Any], dict[str, Any]] = _completion if shape == "prompt" else dict
    else:
        found, make = python_reference(split), lambda text: {key: text[:characters]}
    for (_, content), _ in zip(found, range(DOCUMENTS)):
        yield make(content)


def _completion(exchange: dict[str, Any]) -> dict[str, Any]:
    """A question and its answer as a record of the shape `prompt`."""
    *asked, answer = exchange["messages"]
    return {"prompt": asked[-1]["content"], "completion": answer["content"]}


def _chosen(wild: re.Match[str]) -> str:
    """One character that a wildcard stands for."""
    allowed = wild[0][1:-1]
    if not allowed:
        return "0"
    return "0" if allowed[0] == "!" else allowed[0]


def _answer(config: StageConfig) -> None:
    """Run a stage of targets here."""
    from trainer import runtime, stages

    job = Job(run="stand-ins", stages=(config,), dry_run=True)
    with runtime.start() as process:
        stages.run_stage(config, job, process, lambda line: None, lambda: False)


def _slug(name: Optional[str]) -> str:
    """A name of a hub or a URI as the name of a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", str(name).partition("://")[2].lower() or str(name).lower())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
