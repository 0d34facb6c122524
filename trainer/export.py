"""Exporting: a model and its tokenizer as a plain Hugging Face folder, or as one GGUF file, read
back before it is shown, and sent to a store or to the Hub when asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer import adapters, copies
from trainer.checkpoint import CheckpointError, resolve
from trainer.config import ConfigError, Export
from trainer.gguf_export import write_gguf
from trainer.merge import encode_prompts, publish, stored_dtype, write_folder
from trainer.models import PLAIN_ATTENTION, load_pretrained, load_tokenizer, parameter_count
from trainer.store import StoreError, disk_full, open_store, sha256_file

HUB = "hub:"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Say = Callable[[str], None]


def export_model(config: Export, folder: Path, say: Say) -> dict[str, float]:
    """Write the model at `config.model` to `config.to`; without `to`, and for a store or the Hub,
    to the stage's `folder`. Returns `parameters` and `bytes`, and what `write_gguf` adds. Errors:
    `ConfigError` for a reference that is no model, a target that is taken, a missing token;
    `CheckpointError` when what was written does not read back the same, or the Hub
    refuses it; `StoreError`."""
    name = config.to.removeprefix(HUB) if config.to and config.to.startswith(HUB) else None
    remote = copies.REMOTE.match(config.to or "") is not None
    if name is not None:
        _check_hub(name)
    elif config.to is not None and not remote:
        _check_place(Path(config.to).expanduser())
    source = resolve(config.model)
    if adapters.is_adapter(source):
        raise ConfigError(f"export.model: '{config.model}' is an adapter; merge it first")
    write = write_gguf if config.format == "gguf" else _write_plain
    written, facts = write(config, folder, say)
    try:
        size = sum(path.stat().st_size for path in written.iterdir())
        if name is not None:
            _upload(written, name, config.private)
            say(f"uploaded to the Hub: {name} ({size:,} bytes)")
        if remote:
            _send(written, str(config.to))
            say(f"uploaded: {config.to} ({size:,} bytes)")
    except (ConfigError, CheckpointError, StoreError):
        shutil.rmtree(written)
        raise
    if config.to is None or name is not None or remote:
        publish(written, folder)
        say(f"exported: {folder} ({size:,} bytes)")
    else:
        _move(written, Path(config.to).expanduser())
        say(f"exported: {config.to} ({size:,} bytes)")
    return {**facts, "bytes": float(size)}


def _write_plain(config: Export, folder: Path, say: Say) -> tuple[Path, dict[str, float]]:
    """A Hugging Face folder inside `folder`, hidden, and what is to be said of it."""
    del say
    dtype = _DTYPES.get(config.precision) or stored_or_error(config.model)
    model = load_pretrained(config.model, dtype, PLAIN_ATTENTION)
    tokens = load_tokenizer(config.model)
    written = write_folder(model, tokens, folder)
    try:
        _check_written(model, tokens, written)
    except CheckpointError:
        shutil.rmtree(written)
        raise
    return written, {"parameters": float(parameter_count(model))}


def stored_or_error(reference: str) -> torch.dtype:
    """`merge.stored_dtype`. Errors: `ConfigError` where there is no model."""
    try:
        return stored_dtype(reference)
    except (OSError, ValueError) as error:
        why = adapters.trouble(resolve(reference), error)
        raise ConfigError(f"cannot load the model '{reference}': {why}") from error


def _check_written(model: Any, tokens: Any, folder: Path) -> None:
    """Every tensor and every token must come back as it was."""
    again = load_pretrained(str(folder), model.dtype, PLAIN_ATTENTION)
    ours, theirs = model.state_dict(), again.state_dict()
    wrong = [n for n in ours if n not in theirs or not torch.equal(ours[n], theirs[n])]
    wrong += [n for n in theirs if n not in ours]
    if wrong:
        raise CheckpointError(f"{folder}: {wrong[0]} does not read back as it was written")
    for one, other in zip(encode_prompts(tokens), encode_prompts(load_tokenizer(str(folder)))):
        if not torch.equal(one, other):
            raise CheckpointError(f"{folder}: its tokenizer does not read back as it was written")


def _move(written: Path, target: Path) -> None:
    """Put the folder in its place. One of equal content may be there: this stage was killed after
    it had put it there."""
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        if _digests(written) != _digests(target):
            shutil.rmtree(written)
            raise ConfigError(f"export.to: {target} is taken and holds something else")
        shutil.rmtree(written)
        return
    beside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmdir()
        try:
            written.rename(target)
        except OSError:  # another file system
            shutil.copytree(written, beside)
            beside.rename(target)
            shutil.rmtree(written)
    except OSError as error:
        for folder in (beside, written):
            shutil.rmtree(folder, ignore_errors=True)
        why = disk_full(error) or adapters.one_line(error)
        raise CheckpointError(f"export.to: cannot write {target}: {why}") from error


def _check_place(target: Path) -> None:
    """Look before the work is done."""
    there = next(path for path in (target, *target.absolute().parents) if path.exists())
    if there != target and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "is read-only for this user" if there.is_dir() else "is no folder"
        raise ConfigError(f"export.to: {there} {why}, so that {target} cannot be written")


def _send(folder: Path, uri: str) -> None:
    """Put the folder's files into a store; config.json, without which it is no model, comes last.
    What is there already must be the same: this stage was killed while it wrote."""
    store = open_store(uri)
    digests = _digests(folder)
    there = store.list()
    differ = [name for name in there if digests.get(name) != store.checksum(name)]
    if differ:
        raise ConfigError(f"export.to: {uri} is taken and holds something else ({differ[0]})")
    for name in sorted(digests, key=lambda name: name == "config.json"):
        if name not in there:
            store.put_file(name, folder / name)


def _digests(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    return {p.name: sha256_file(p) if p.is_file() else "" for p in folder.iterdir()}


def _check_hub(name: str) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ConfigError(f"export.to: '{name}' is no name for the Hub: {error}") from error
    if not get_token():
        raise ConfigError(
            f"export.to: {HUB}{name} needs a token of the Hub that may write: give it as secret"
            " HF_TOKEN"
        )


def _upload(folder: Path, name: str, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        # Without the owner, a refusal of `create_repo` would be told as a name that cannot be read.
        whole = name if "/" in name else f"{api.whoami()['name']}/{name}"
        api.create_repo(whole, private=private, exist_ok=True)
        api.upload_folder(repo_id=whole, folder_path=folder, commit_message="Export")
    except (OSError, ValueError) as error:
        line = adapters.one_line(error)
        raise CheckpointError(f"the Hub did not take {name}: {line}") from error
