"""A dry run: the same stages with tiny random models, two batches and one optimizer step.

Nothing is downloaded: what is not on this disk is replaced, and every replacement is said.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch

from trainer import phases
from trainer.checkpoint import resolve
from trainer.config import (
    Adapter,
    Data,
    Distill,
    Evaluate,
    Export,
    Grpo,
    Merge,
    Model,
    Sdce,
    Source,
    StageConfig,
    Targets,
    Train,
)
from trainer.data.manifest import expand
from trainer.data.read import sample_names, source_name
from trainer.data.tokenizer import byte_tokenizer
from trainer.freeze import StandIn
from trainer.models import load_tokenizer
from trainer.teacher_files import sample_files

_WIDTH, _LAYERS, _HEADS, _LENGTH, _ROWS, _VOCABULARY = 64, 2, 4, 128, 2, 512
_TARGET_ROWS = 64
_PAIR_LENGTH = 1024
#: Of stages that answer prompts: tokens of prompt and answer, answers to a prompt, tokens of one.
_PROMPT, _GROUP, _ANSWER = 4096, 4, 16
#: A reward that needs nothing of the data.
STAND_IN_REWARD = "trainer.rewards:short"

#: What in a pattern such as `model.layers.1[0-9].*` counts layers: numbers, and nothing else up to
#: the next dot or star.
_LAYER_NUMBER = re.compile(r"(?<=\.)(?:\d|\[!?[\d-]+\])(?:\d|\?|\[!?[\d-]+\])*(?=[.*]|$)")


def shrink(config: StageConfig, made: set[str]) -> tuple[StageConfig, list[str]]:
    """A stage made small, and one line for everything that was changed. `made`: the folders of
    the job's stages; those before this one have run, so references to them stay."""
    notes: list[str] = []
    scratch = Path(config.output) / "dry-run"
    data = _data(config.data, config.stage, notes)
    changes: dict[str, Any] = {"data": data}
    if config.tokenizer is not None:
        size = min(config.tokenizer.vocab_size, _VOCABULARY)
        if size != config.tokenizer.vocab_size:
            notes.append(f"tokenizer: {size} tokens instead of {config.tokenizer.vocab_size}")
        changes["tokenizer"] = replace(config.tokenizer, vocab_size=size)
    if config.train is not None:
        changes["train"] = _train(config.train, notes)
    if config.model is not None and config.train is not None:
        tokenizer = _tokenizer(config.model.tokenizer or config.model.name, scratch, made, notes)
        kind = model_type(config.model)
        adapted = config.model.adapter is not None
        student = tiny(scratch / "model", kind, tokenizer, weights=adapted)
        notes.append(f"model {config.model.name or 'random'}: {words(kind)}")
        changes["model"] = replace(
            config.model,
            name=student,
            init="pretrained" if adapted else "random",
            architecture=None,
            tokenizer=tokenizer,
            # A tiny model has no layer 17: patterns that count layers mean its first.
            freeze=tuple(first_layer(pattern) for pattern in config.model.freeze),
            attention="auto",  # what needs a GPU is not tried here
            float8="off",
        )
        if config.kd is not None:
            _check_logits(config.kd, config.data.train, data.train)
            changes["kd"] = _distill(config.kd, tokenizer, scratch, made, notes)
        if config.sdce is not None:
            changes["sdce"] = _sdce(config.sdce, tokenizer, scratch, made, notes)
        if config.grpo is not None:
            changes["grpo"] = _grpo(config.grpo, data.train == expand(config.data.train), notes)
    if config.targets is not None:
        changes["targets"] = _targets(config.targets, scratch, made, notes)
    if config.evaluate is not None:
        changes["evaluate"] = _evaluate(config.evaluate, scratch, made, notes)
    if data.chat_template is None and any(scratch.rglob("tokenizer")):
        # Only where a tokenizer was replaced: what the recipe lacks, the dry run is to find out.
        changes["data"] = replace(data, chat_template="chatml")
    if config.merge is not None:
        changes["merge"] = _merge(config.merge, scratch, made, notes)
    if config.export is not None:
        changes["export"] = _export(config.export, scratch, made, notes)
    if config.smoke is not None:
        notes.append("smoke: as it is, in one process on the CPU")
    return replace(config, **changes), list(dict.fromkeys(notes))


def _data(data: Data, stage: str, notes: list[str]) -> Data:
    # A tokenizer of bytes writes long texts: of a pair both must fit, and prompts are not cut.
    length = min(data.sequence_length, _LENGTH)
    if stage in ("dpo", "ipo"):
        length = _PAIR_LENGTH
    elif stage == "grpo":
        length = max(data.sequence_length, _PROMPT)
    if length != data.sequence_length and (data.train or data.validation):
        notes.append(f"data.sequence_length: {length} instead of {data.sequence_length}")
    return replace(
        data,
        train=_sources(data.train, "train", stage, notes),
        validation=_sources(data.validation, "heldout", stage, notes),
        sequence_length=length,
        curriculum=phases.shortened(data, length),
        chat_template=_template(data.chat_template, notes),
    )


def _template(given: Optional[str], notes: list[str]) -> Optional[str]:
    if not _remote(given):
        return given
    notes.append(f"data.chat_template {given}: not on this machine, chatml instead")
    return "chatml"


def _sources(
    sources: tuple[Source, ...], split: Any, stage: str, notes: list[str]
) -> tuple[Source, ...]:
    """What is not on this machine is replaced, also where a manifest names it."""
    found: list[Source] = []
    for source in sources:
        listed = (source,) if _remote(source.manifest) else expand((source,))
        found += [_source(each, split, stage, notes) for each in listed]
    return tuple(found)


def _source(source: Source, split: Any, stage: str, notes: list[str]) -> Source:
    if source.hf is None and not _remote(source.path) and not _remote(source.manifest):
        return source
    if stage == "grpo":  # plain strings: whether its prompts need a template is not known
        notes.append(f"data {source_name(source)}: not on this machine, counting digits instead")
        return Source(builtin="digits", split=split)
    chat = stage == "sft" or source.format in ("messages", "prompt")
    kind = "questions" if chat else "reference"
    if stage in ("dpo", "ipo"):
        kind = "preferences"
    notes.append(f"data {source_name(source)}: not on this machine, Python's own {kind} instead")
    builtin: Any = f"python-{kind}"
    return Source(builtin=builtin, split=split)


def _remote(uri: Optional[str]) -> bool:
    return uri is not None and "://" in uri and not uri.startswith("file://")


def _train(train: Train, notes: list[str]) -> Train:
    rows = _ROWS if isinstance(train.micro_batch, str) else min(train.micro_batch, _ROWS)
    notes.append(f"train: 1 step of 2 batches of {rows} rows, one evaluation, one checkpoint")
    return replace(
        train,
        steps=1,
        epochs=None,
        seconds_of=None,
        until=None,
        resume=None,
        micro_batch=rows,
        accumulate=2,
        global_batch=None,
        limit_batches=2,
        evaluate_every=0,
        evaluate_batches=1,
        save_every=0,
        log_every=1,
    )


def first_layer(pattern: str) -> StandIn:
    """A pattern on names of parameters, for a model that has few layers."""
    return StandIn(_LAYER_NUMBER.sub("0", pattern), pattern)


def _check_logits(kd: Distill, asked: tuple[Source, ...], here: tuple[Source, ...]) -> None:
    """The folder of `kd.logits_dir` must be there as in the run itself, with a file of a sample
    where the data is on this machine. Errors: `DataError`."""
    if kd.logits_dir is not None and not _remote(kd.logits_dir):
        known = here == expand(asked) if not any(_remote(s.manifest) for s in asked) else False
        sample_files(kd.logits_dir, sample_names(here).values() if known else ())


def _distill(
    kd: Distill, tokenizer: str, scratch: Path, made: set[str], notes: list[str]
) -> Distill:
    """Answers that this job does not store itself belong to another tokenizer or to data that is
    not read here: a tiny teacher is asked instead."""
    if _made(kd.teacher or kd.targets or "", made):
        return kd
    kind = model_type(Model(name=kd.teacher or str(kd.targets or kd.logits_dir)))
    teacher = tiny(scratch / "teacher", kind, tokenizer, weights=True)
    notes.append(f"teacher {kd.teacher or kd.targets or kd.logits_dir}: {words(kind)}")
    return replace(kd, mode="online", teacher=teacher, targets=None, logits_dir=None)


def _sdce(sdce: Sdce, tokenizer: str, scratch: Path, made: set[str], notes: list[str]) -> Sdce:
    if sdce.surrogate is None or _made(sdce.surrogate, made):
        return sdce
    own = _tokenizer(sdce.surrogate, scratch / "surrogate", made, notes)
    if own != sdce.surrogate and sdce.loss == "kl":
        own = tokenizer  # what is not here is taken to be as it must be
    kind = model_type(Model(name=sdce.surrogate))
    notes.append(f"surrogate {sdce.surrogate}: {words(kind)}")
    return replace(sdce, surrogate=tiny(scratch / "surrogate" / "model", kind, own, weights=True))


def _grpo(grpo: Grpo, own_data: bool, notes: list[str]) -> Grpo:
    """Rewards are tried where their data is on this machine: what they ask for is there, too."""
    group, tokens = min(grpo.group, _GROUP), min(grpo.max_new_tokens, _ANSWER)
    notes.append(f"grpo: {group} answers of {tokens} tokens to a prompt, drawn here")
    small = replace(grpo, group=group, max_new_tokens=tokens, rollouts="generate", vllm_server=None)
    if own_data:
        return small
    notes.append(f"grpo.rewards: {STAND_IN_REWARD} instead: their data is not on this machine")
    return replace(small, rewards=(STAND_IN_REWARD,), reward_weights=())


def _targets(targets: Targets, scratch: Path, made: set[str], notes: list[str]) -> Targets:
    # More than a student's dry run reads, so that it finds its answers.
    notes.append(f"targets: at most {_TARGET_ROWS} rows")
    small = replace(targets, limit_rows=min(targets.limit_rows or _TARGET_ROWS, _TARGET_ROWS))
    if _made(targets.teacher, made):
        return small
    tokenizer = _tokenizer(targets.teacher, scratch, made, notes)
    kind = model_type(Model(name=targets.teacher))
    notes.append(f"teacher {targets.teacher}: {words(kind)}")
    return replace(small, teacher=tiny(scratch / "teacher", kind, tokenizer, weights=True))


def _evaluate(evaluate: Evaluate, scratch: Path, made: set[str], notes: list[str]) -> Evaluate:
    models = {}
    for label, reference in evaluate.models.items():
        if not _made(reference, made):
            tokenizer = _tokenizer(reference, scratch / label, made, notes)
            kind = model_type(Model(name=reference))
            notes.append(f"model {reference}: {words(kind)}")
            reference = tiny(scratch / label / "model", kind, tokenizer, weights=True)
        models[label] = reference
    return Evaluate(models=models)


def _merge(merge: Merge, scratch: Path, made: set[str], notes: list[str]) -> Merge:
    """The adapter of an earlier stage names the base that it had there."""
    if _made(merge.adapter, made):
        return replace(merge, base=None)
    from trainer import adapters
    from trainer.models import PLAIN_ATTENTION, load_pretrained

    tokenizer = _tokenizer(None, scratch, made, notes)
    kind = model_type(Model(name=merge.base)) if merge.base else "llama"
    base = tiny(scratch / "base", kind, tokenizer, weights=True)
    plain = load_pretrained(base, torch.float32, PLAIN_ATTENTION)
    model = adapters.attach(plain, Adapter(rank=2), base)
    folder = scratch / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    adapters.save(model, folder)
    notes.append(f"adapter {merge.adapter}: a random one on {words(kind)}")
    return replace(merge, adapter=str(folder), base=None)


def _export(export: Export, scratch: Path, made: set[str], notes: list[str]) -> Export:
    if export.to is not None:
        notes.append(f"export: to a scratch folder instead of {export.to}")
    if _made(export.model, made):
        return replace(export, to=None)
    tokenizer = _tokenizer(export.model, scratch, made, notes)
    kind = model_type(Model(name=export.model))
    notes.append(f"model {export.model}: {words(kind)}")
    return replace(export, to=None, model=tiny(scratch / "model", kind, tokenizer, weights=True))


def _tokenizer(reference: Optional[str], scratch: Path, made: set[str], notes: list[str]) -> str:
    """The recipe's tokenizer if it is on this disk or will be made by an earlier stage."""
    if reference is not None:
        if _made(reference, made):
            return reference
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(resolve(reference), local_files_only=True)
            return reference
        except Exception:
            notes.append(f"tokenizer of {reference}: not on this disk, a byte-level one instead")
    folder = scratch / "tokenizer"
    byte_tokenizer(folder)
    return str(folder)


def model_type(model: Model) -> str:
    """The architecture: from the recipe, the model's config.json on this disk, or its name."""
    if model.architecture is not None:
        return model.architecture.family
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    name = str(model.name)
    try:
        found = AutoConfig.from_pretrained(resolve(name), local_files_only=True)
        return str(found.model_type)
    except Exception:
        plain = name.lower().replace("-", "").replace(".", "")
        known = [kind for kind in CONFIG_MAPPING_NAMES if kind.replace("_", "") in plain]
        experts = model.adapter is not None and model.adapter.experts
        return max(known, key=len) if known else "mixtral" if experts else "llama"


def tiny(folder: Path, kind: str, tokenizer: str, weights: bool) -> str:
    """Write a folder with a tiny model of architecture `kind`, and return it: the configuration,
    and with `weights` random ones and the tokenizer beside them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = load_tokenizer(tokenizer)
    size = {
        "vocab_size": len(tokens),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS // 2,
        "head_dim": _WIDTH // _HEADS,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    if kind == "qwen3_moe":  # as those that are published, and not as the class has it
        size["norm_topk_prob"] = True
    configuration = AutoConfig.for_model(kind, **size)
    configuration.architectures = None
    if weights:
        AutoModelForCausalLM.from_config(configuration).save_pretrained(folder)
        tokens.save_pretrained(folder)
    else:
        configuration.save_pretrained(folder)
    return str(folder)


def _made(reference: str, made: set[str]) -> bool:
    return reference.split("@")[0] in made


def words(kind: str) -> str:
    """What is said about such a model."""
    return f"a random {kind} of {_LAYERS} layers and width {_WIDTH} instead"
