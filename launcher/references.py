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
from trainer.config import KeyPath, Problem

_STAGE = re.compile(r"\$\{stage:([^}]*)\}(@best|@last)?")


@dataclass(frozen=True)
class Written:
    """What the other stages of the recipe will write: `folders` (stage id -> the `export.to` of a
    stage, absolute), `adapters`, the ids of stages that train one, and `files`, the ids of those
    that write a GGUF file."""

    folders: Mapping[str, str] = field(default_factory=dict)
    adapters: Collection[str] = ()
    files: Collection[str] = ()


def reference_problems(
    stage: Stage, earlier: Collection[str], written: Written
) -> Iterator[Problem]:
    """Local folders that are not there, and an adapter where a whole model is needed. `earlier`:
    the stages that this one waits for."""
    for path, given in references(stage):
        match = _STAGE.fullmatch(given)
        if match and match[1] in written.files:
            yield (
                path,
                f"stage '{match[1]}' writes a GGUF file, which is not read here; "
                "name the model that it exports",
            )
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
    if stage.export is not None:
        match = _STAGE.fullmatch(stage.export.model)
        if match and match[1] in written.adapters:
            yield (
                ("export", "model"),
                f"stage '{match[1]}' trains an adapter, which is not exported as it is; "
                "merge it with a stage `merge` first, and name that stage",
            )


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
