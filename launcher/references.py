"""What a stage reads besides its data: models, tokenizers, adapters and stored answers.

Those that are folders of this machine must be there before a run is paid for, or be what an earlier
stage writes. Names on the hub and `${stage:ID}` are left to the run and to `rules`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from launcher.spec import Stage
from trainer.config import TRAINING, KeyPath, Problem

_STAGE = re.compile(r"\$\{stage:([^}]*)\}(@best|@last)?")
#: Stages that leave a whole model, or an adapter beside one.
_MODELS = (*TRAINING, "merge", "export")
#: Key -> the stages whose folder it can name, and what it needs of them.
_LEFT_BY = {
    ("model", "name"): (_MODELS, "model"),
    ("model", "tokenizer"): ((*_MODELS, "tokenizer"), "tokenizer"),
    ("kd", "teacher"): (_MODELS, "model"),
    ("kd", "targets"): (("targets",), "stored answers"),
    ("sdce", "surrogate"): (_MODELS, "model"),
    ("targets", "teacher"): (_MODELS, "model"),
    ("merge", "adapter"): (TRAINING, "adapter"),
    ("merge", "base"): (_MODELS, "model"),
    ("export", "model"): (_MODELS, "model"),
    ("evaluate", "models"): (_MODELS, "model"),
    ("train", "resume"): (TRAINING, "checkpoints"),
}


@dataclass(frozen=True)
class Written:
    """What the other stages of the recipe will write: `folders` (stage id -> the `export.to` of a
    stage, absolute), `adapters`, the ids of stages that train one, `files`, the ids of those that
    write a GGUF file, and `kinds` (stage id -> `stage`)."""

    folders: Mapping[str, str] = field(default_factory=dict)
    adapters: Collection[str] = ()
    files: Collection[str] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)


def reference_problems(
    stage: Stage, earlier: Collection[str], written: Written
) -> Iterator[Problem]:
    """Local folders that are not there, stages that leave something else than is needed. `earlier`:
    the stages that this one waits for."""
    for path, given in references(stage):
        match = _STAGE.fullmatch(given)
        if match and (unfit := _unfit(stage, path, match[1], earlier, written)) is not None:
            yield path, unfit
        stores = path[-1] in ("targets", "logits_dir", "resume")
        place = _local(given, named=not stores)
        if place is None:
            continue
        if stage.hardware.backend == "vertex":
            instead = "write gs://BUCKET/..."
            if not stores:
                instead += ", or name a model of the hub, or a stage"
            yield path, f"a Vertex AI job cannot read this machine's files; {instead}"
        elif stage.hardware.backend == "local":
            what = _absent(place, earlier, written)
            if what is not None:
                yield path, what


def references(stage: Stage) -> Iterator[tuple[KeyPath, str]]:
    """(path of the key, what it says) of every reference that the stage has."""
    for block, keys in (
        ("model", ("name", "tokenizer")),
        ("kd", ("teacher", "targets", "logits_dir")),
        ("sdce", ("surrogate",)),
        ("targets", ("teacher",)),
        ("merge", ("adapter", "base")),
        ("export", ("model",)),
        ("train", ("resume",)),
    ):
        for key in keys:
            given = getattr(getattr(stage, block), key, None)
            if given is not None:
                yield (block, key), given
    if stage.evaluate is not None:
        for label, given in stage.evaluate.models.items():
            yield ("evaluate", "models", label), given
    for key in ("train", "validation"):
        for index, source in enumerate(getattr(stage.data, key)):
            if source.hf is not None:
                yield ("data", key, index, "hf", "name"), source.hf.name


def _unfit(
    stage: Stage, path: KeyPath, named: str, earlier: Collection[str], written: Written
) -> Optional[str]:
    """Why the folder of the stage `named` is not what the key `path` needs; None: it is, or the
    stage cannot be reached, which `rules` says."""
    key, kind = path[:2], written.kinds.get(named)
    if named not in earlier or kind is None or key not in _LEFT_BY:
        return None
    if named in written.files:
        return (
            f"stage '{named}' writes a GGUF file, which is not read here; "
            "name the model that it exports"
        )
    refused = ""
    if key == ("export", "model"):
        refused = "is not exported as it is"
    elif key == ("model", "name") and stage.model is not None and stage.model.init == "pretrained":
        refused = "is not trained further"
    if refused and named in written.adapters:
        return (
            f"stage '{named}' trains an adapter, which {refused}; "
            "merge it with a stage `merge` first, and name that stage"
        )
    kinds, what = _LEFT_BY[key]
    fit = {other for other in earlier if written.kinds.get(other) in kinds} - set(written.files)
    if what == "adapter":
        fit &= set(written.adapters)
    if named in fit:
        return None
    if refused:
        fit -= set(written.adapters)
    allowed = f"; allowed: {', '.join(sorted(fit))}" if fit else ""
    return f"stage '{named}' ({kind}) leaves no {what}{allowed}"


def _local(given: str, named: bool) -> Optional[Path]:
    """The folder of this machine that is meant; None: a name on the hub, a stage, another store.
    `drafts` has made relative paths absolute. `named`: `@best` and `@last` may follow."""
    text = given.removeprefix("file://")
    if not text.startswith(("/", "~")) or "://" in text or "${stage:" in text:
        return None
    if named and not _is_there(Path(text)):
        text = re.sub(r"@(best|last)\Z", "", text)
    return Path(text)


def _absent(place: Path, earlier: Collection[str], written: Written) -> Optional[str]:
    if place.is_dir():
        return None
    if _is_there(place):
        return f"{place} is a file; name the folder"
    for stage, folder in written.folders.items():
        if place == Path(folder) or Path(folder) in place.parents:
            if stage in earlier:
                return None
            return f"no such folder yet: {place}; add '{stage}', which writes it, to `needs`"
    return f"no such folder: {place}"


def _is_there(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
