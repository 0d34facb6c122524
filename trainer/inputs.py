"""`python -m trainer inputs JOB.json FOLDER`: what a job reads from stores, brought to this disk.

Every gs:// and s3:// URI that the job names as input is fetched into FOLDER, and JOB.json is
rewritten to the copies; without such URIs it stays as it is. Which part of a job is an input is
said here; what each kind needs, in wanted.py; how it is fetched, in downloads.py.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from trainer import copies
from trainer.config import ConfigError, Job, KeyPath, StageConfig, dotted, load_job
from trainer.data import DataError
from trainer.downloads import Shelf
from trainer.manifest import MANIFEST, verify
from trainer.store import NotFound, Store, StoreError, atomic_write, open_store
from trainer.wanted import Inputs, Missing

Say = Callable[[str], None]
#: (where in the stage, what it says, what fetches it and returns the path to write there).
Field = tuple[KeyPath, str, Callable[[Inputs, str, str], Optional[str]]]


def command(job: str, folder: str, say: Say) -> None:
    """Fetch, as a process of its own: a SIGTERM ends it at once with 75, since what is half
    fetched is fetched again anyway. Errors: those of `fetch_inputs`."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    fetch_inputs(job, folder, say)


def fetch_inputs(
    path: str | Path, folder: str | Path, say: Say, opened: Callable[[str], Store] = open_store
) -> None:
    """Fetch what the job file names and rewrite it. Files that are whole in `folder` stay; stages
    that are completed need nothing. `opened` opens a bucket by its URI.

    Errors: `ConfigError` for a job file or a URI that is not one; `DataError`, a line for each
    input that is not there; `StoreError` with the name of the field."""
    job = load_job(path)
    copies.use(job.copies)
    shelf = Shelf(Path(folder), opened)
    broken: set[str] = set()
    told: set[str] = set()

    def warn(line: str) -> None:
        if line not in told:
            told.add(line)
            say(f"warning: {line}")

    while True:
        inputs = Inputs(shelf, broken, warn)
        changes = _plan(job, inputs)
        found = shelf.fetch(say)
        if not found:
            break
        broken |= found  # another checkpoint, or none
        shelf.forget()
    if changes or inputs.bases:
        _rewrite(Path(path), changes, _known(job, inputs))


def completed(folder: Path) -> bool:
    """Whether a stage's folder says that it is done."""
    try:
        return bool(json.loads((folder / "run_meta.json").read_text()).get("completed"))
    except (OSError, json.JSONDecodeError):
        return False


def _plan(job: Job, inputs: Inputs) -> dict[KeyPath, str]:
    """Have everything wanted. Returns what is to be written where in the job file."""
    changes: dict[KeyPath, str] = {}
    problems: list[str] = []
    made: dict[str, str] = {}  # where an earlier stage exports to -> its folder here
    for index, stage in enumerate(job.stages):
        for at, given, wanted in () if completed(Path(stage.output)) else _fields(stage):
            field = dotted(at) if len(job.stages) == 1 else f"stage {stage.id}: {dotted(at)}"
            whole = ("stages", index, *at)
            if (own := _exported(given, made)) is not None:
                changes[whole] = own
                continue
            try:
                path = wanted(inputs, given, field)
            except (Missing, NotFound) as error:
                problems.append(f"{field}: {error}")
            except ConfigError as error:
                raise ConfigError(f"{field}: {error}") from error
            except StoreError as error:
                raise type(error)(f"{field}: {error}") from error
            else:
                if path is not None and path != given:
                    changes[whole] = path
        if stage.export is not None and copies.REMOTE.match(stage.export.to or ""):
            made[str(stage.export.to).rstrip("/")] = stage.output
    if problems:
        raise DataError("\n".join(problems))
    return changes


def _exported(given: str, made: Mapping[str, str]) -> Optional[str]:
    """What an earlier stage of the same job will have written, in that stage's own folder."""
    for to, folder in made.items():
        if given == to or given.startswith((f"{to}/", f"{to}@")):
            return folder + given[len(to) :]
    return None


def _fields(stage: StageConfig) -> Iterator[Field]:
    """Everything in a stage that may name an input, in the order of the recipe's pages."""
    if stage.model is not None:
        random = stage.model.init == "random"
        yield from _models(("model", "name"), stage.model.name, _words if random else _weights)
        yield from _models(("model", "tokenizer"), stage.model.tokenizer, _words)
    for key in ("train", "validation"):
        for index, source in enumerate(getattr(stage.data, key)):
            at: KeyPath = ("data", key, index)
            yield from _remote((*at, "path"), source.path, Inputs.data)
            if source.manifest is not None:
                yield (*at, "manifest"), source.manifest, Inputs.manifest
            yield from _remote((*at, "hf", "name"), source.hf and source.hf.name, Inputs.folder)
    yield from _remote(("data", "chat_template"), stage.data.chat_template, Inputs.file)
    if stage.train is not None:
        yield from _remote(("train", "seconds_of"), stage.train.seconds_of, Inputs.seconds)
        if not _begun(Path(stage.output)):
            yield from _remote(("train", "resume"), stage.train.resume, Inputs.resume)
    if stage.kd is not None:
        yield from _models(("kd", "teacher"), stage.kd.teacher, _weights)
        yield from _remote(("kd", "targets"), stage.kd.targets, Inputs.answers)
        yield from _remote(("kd", "logits_dir"), stage.kd.logits_dir, Inputs.folder)
    if stage.sdce is not None:
        yield from _models(("sdce", "surrogate"), stage.sdce.surrogate, _weights)
    if stage.targets is not None:
        yield from _models(("targets", "teacher"), stage.targets.teacher, _weights)
    if stage.evaluate is not None:
        for label, reference in stage.evaluate.models.items():
            yield from _models(("evaluate", "models", label), reference, _all)
    if stage.merge is not None:
        yield from _models(("merge", "adapter"), stage.merge.adapter, _weights)
        yield from _models(("merge", "base"), stage.merge.base, _weights)
    if stage.export is not None:
        yield from _models(("export", "model"), stage.export.model, _weights)


def _remote(
    at: KeyPath, given: Optional[str], wanted: Callable[[Inputs, str, str], Optional[str]]
) -> Iterator[Field]:
    if given is not None and copies.REMOTE.match(given):
        yield at, given, wanted


def _models(
    at: KeyPath, given: Optional[str], wanted: Callable[[Inputs, str, str], Optional[str]]
) -> Iterator[Field]:
    """A model reference; a folder of this machine may be an adapter with a remote base."""
    if given is not None:
        yield at, given, wanted if copies.REMOTE.match(given) else _local


def _words(inputs: Inputs, given: str, field: str) -> str:
    return inputs.model(given, field, "words")


def _weights(inputs: Inputs, given: str, field: str) -> str:
    return inputs.model(given, field, "weights")


def _all(inputs: Inputs, given: str, field: str) -> str:
    # The table of a comparison tells the steps and the time that made a model.
    return inputs.model(given, field, "all")


def _local(inputs: Inputs, given: str, field: str) -> None:
    name = given.removeprefix("file://")
    for text in (name, name.removesuffix("@best").removesuffix("@last")):
        inputs.bases_of(Path(text), field)


def _begun(output: Path) -> bool:
    """Whether a stage has a whole checkpoint of its own to go on from."""
    folders = (path.parent for path in output.glob(f"checkpoints/step-*/{MANIFEST}"))
    return any(not verify(folder) for folder in folders)


def _known(job: Job, inputs: Inputs) -> dict[str, str]:
    """`Job.copies`: of every bucket from which something came, and of the bases of adapters."""
    shelf = inputs.shelf
    buckets = [path for path in shelf.folder.glob("*/*") if path.parent.name in ("gs", "s3")]
    found = {f"{path.parent.name}://{path.name}": str(path) for path in sorted(buckets)}
    return {**found, **inputs.bases, **job.copies}


def _rewrite(path: Path, changes: dict[KeyPath, str], known: dict[str, str]) -> None:
    raw: dict[str, Any] = json.loads(path.read_text())
    for at, value in changes.items():
        holder: Any = raw
        for part in at[:-1]:
            holder = holder[part]
        holder[at[-1]] = value
    raw["copies"] = known
    atomic_write(path, json.dumps(raw, indent=1) + "\n")
