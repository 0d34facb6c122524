"""A dry run: the same stages with tiny random models, two batches and one optimizer step.

Nothing is downloaded: what is not on this disk is replaced, and every replacement is said.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from trainer.checkpoint import resolve
from trainer.config import Data, Evaluate, Model, Source, StageConfig, Train
from trainer.data.tokenizer import byte_tokenizer
from trainer.models import load_tokenizer

_WIDTH, _LAYERS, _HEADS, _LENGTH, _ROWS, _VOCABULARY = 64, 2, 4, 128, 2, 512


def shrink(config: StageConfig, made: set[str]) -> tuple[StageConfig, list[str]]:
    """A stage made small, and one line for everything that was changed. `made`: the folders of
    the job's stages; those before this one have run, so references to them stay."""
    notes: list[str] = []
    scratch = Path(config.output) / "dry-run"
    changes: dict[str, Any] = {"data": _data(config.data, notes)}
    if config.tokenizer is not None:
        size = min(config.tokenizer.vocab_size, _VOCABULARY)
        notes.append(f"tokenizer: {size} tokens instead of {config.tokenizer.vocab_size}")
        changes["tokenizer"] = replace(config.tokenizer, vocab_size=size)
    if config.train is not None:
        changes["train"] = _train(config.train, notes)
    if config.model is not None and config.train is not None:
        tokenizer = _tokenizer(config.model.tokenizer or config.model.name, scratch, made, notes)
        kind = _model_type(config.model)
        student = _tiny(scratch / "model", kind, tokenizer, weights=False)
        notes.append(f"model {config.model.name or 'random'}: {_words(kind)}")
        changes["model"] = replace(
            config.model,
            name=student,
            init="random",
            architecture=None,
            tokenizer=tokenizer,
            attention="auto",  # what needs a GPU is not tried here
        )
        if config.kd is not None and not _made(config.kd.teacher, made):
            kind = _model_type(Model(name=config.kd.teacher))
            teacher = _tiny(scratch / "teacher", kind, tokenizer, weights=True)
            notes.append(f"teacher {config.kd.teacher}: {_words(kind)}")
            changes["kd"] = replace(config.kd, teacher=teacher)
    if config.evaluate is not None:
        changes["evaluate"] = _evaluate(config.evaluate, scratch, made, notes)
    if config.smoke is not None:
        notes.append("smoke: as it is, in one process on the CPU")
    return replace(config, **changes), list(dict.fromkeys(notes))


def _data(data: Data, notes: list[str]) -> Data:
    length = min(data.sequence_length, _LENGTH)
    if length != data.sequence_length:
        notes.append(f"data.sequence_length: {length} instead of {data.sequence_length}")
    return replace(
        data,
        train=tuple(_source(source, "train", notes) for source in data.train),
        validation=tuple(_source(source, "heldout", notes) for source in data.validation),
        sequence_length=length,
    )


def _source(source: Source, split: Any, notes: list[str]) -> Source:
    if source.path is None or "://" not in source.path or source.path.startswith("file://"):
        return source
    notes.append(f"data {source.path}: not on this machine, Python's own reference instead")
    return Source(builtin="python-reference", split=split)


def _train(train: Train, notes: list[str]) -> Train:
    rows = _ROWS if isinstance(train.micro_batch, str) else min(train.micro_batch, _ROWS)
    notes.append(f"train: 1 step of 2 batches of {rows} rows, one evaluation, one checkpoint")
    return replace(
        train,
        steps=1,
        epochs=None,
        seconds_of=None,
        until=None,
        micro_batch=rows,
        accumulate=2,
        global_batch=None,
        limit_batches=2,
        evaluate_every=0,
        evaluate_batches=1,
        save_every=0,
        log_every=1,
    )


def _evaluate(evaluate: Evaluate, scratch: Path, made: set[str], notes: list[str]) -> Evaluate:
    models = {}
    for label, reference in evaluate.models.items():
        if not _made(reference, made):
            tokenizer = _tokenizer(reference, scratch / label, made, notes)
            kind = _model_type(Model(name=reference))
            notes.append(f"model {reference}: {_words(kind)}")
            reference = _tiny(scratch / label / "model", kind, tokenizer, weights=True)
        models[label] = reference
    return Evaluate(models=models)


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


def _model_type(model: Model) -> str:
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
        return max(known, key=len) if known else "llama"


def _tiny(folder: Path, kind: str, tokenizer: str, weights: bool) -> str:
    """A folder with a tiny model of architecture `kind`: its configuration, and random weights
    where somebody will load them."""
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


def _words(kind: str) -> str:
    return f"a random {kind} of {_LAYERS} layers and width {_WIDTH} instead"
