"""Reading the shards of an optimizer's state (sharded.py) without trusting them.

torch.distributed.checkpoint describes them in a pickle, `.metadata`. It is read with a list of the
few classes that belong there, and what it says is checked against the optimizer before any file is
opened; tensors are read with `weights_only`.
"""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from trainer.checkpoint import CheckpointError
from trainer.parallel import like
from trainer.sharded import (
    FOLDER,
    NAMES,
    PARAMETERS,
    PREFIX,
    line_of,
    parameter_names,
    parameter_shapes,
)

_FILE = re.compile(r"__\d+_\d+\.distcp")
_METADATA = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"
#: What may be named in `.metadata`, besides the data types of torch.
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILES, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def optimizer_state(
    found: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes, of a checkpoint's folder and its plain `state`,
    whether its optimizer is in shards or not. From shards, tensors come on the devices of their
    parameters. Errors: `CheckpointError`, also where other parameters learn now."""
    plain: dict[str, Any] = state["optimizer"]
    _check_parameters(found, state, model, optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if NAMES not in state:
        return {**plain, "state": _placed(plain["state"], parameters)}
    names = parameter_names(model, optimizer)
    tensors = _read(found / FOLDER, dict(zip(names, parameters)))
    entries: dict[int, dict[str, Any]] = {i: dict(held) for i, held in plain["state"].items()}
    numbers = {name: index for index, name in enumerate(names)}
    for full, value in tensors.items():
        name, key = _split(full)
        entries.setdefault(numbers[name], {})[key] = value
    return {**plain, "state": entries}


def _placed(entries: dict[int, dict[str, Any]], parameters: list[Any]) -> dict[int, dict[str, Any]]:
    """State that is whole, as the parameters are that it belongs to."""
    return {
        index: {
            key: like(value, parameters[index]) if isinstance(value, Tensor) else value
            for key, value in held.items()
        }
        for index, held in entries.items()
    }


def _check_parameters(
    found: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Moments belong to parameters by their numbers alone: other ones would get them unnoticed."""
    now = parameter_shapes(model, optimizer)
    groups = state["optimizer"]["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    differ = ""
    if PARAMETERS in state:
        same = state[PARAMETERS] == now
        before, here = dict(state[PARAMETERS]), dict(now)
        apart = [name for name in {**before, **here} if before.get(name) != here.get(name)]
        differ = f" (the first one: {apart[0]})" if apart else ""
    elif NAMES in state:  # older checkpoints know the names, if in shards, or only how many
        same = state[NAMES] == [name for name, _ in now]
    else:
        sizes = [[len(group["params"]) for group in of] for of in (groups, optimizer.param_groups)]
        same = sizes[0] == sizes[1]
    if not same:
        raise CheckpointError(
            f"{found}: its optimizer holds {count} parameters, now {len(now)} learn, or others"
            f"{differ}; resume with the model and the settings it was started with"
            " (model.freeze, model.adapter), or start a new run"
        )


def _read(folder: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    metadata = read_metadata(folder)
    targets: dict[str, Tensor] = {}
    for name, described in metadata.state_dict_metadata.items():
        parameter = parameters.get(_split(name)[0])
        if parameter is None or described.size not in (parameter.shape, torch.Size([])):
            raise CheckpointError(f"{folder}: {name} is not of this model's optimizer")
        dtype = described.properties.dtype
        if described.size == parameter.shape:  # of one that is sharded, this rank's part alone
            targets[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            targets[name] = torch.empty(described.size, dtype=dtype, device=parameter.device)

    class Reader(dcp.FileSystemReader):  # type: ignore[misc]
        def read_metadata(self, *arguments: Any, **options: Any) -> Any:
            return metadata

    planner = DefaultLoadPlanner(flatten_state_dict=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads alone is meant
            dcp.load(targets, storage_reader=Reader(folder), planner=planner, no_dist=True)
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        if isinstance(error, CheckpointException):
            error = min(error.failures.items())[1][0]
        raise CheckpointError(f"{folder}: cannot be read: {line_of(error)}") from error
    return targets


def _split(full: str) -> tuple[str, str]:
    """`state.<parameter>.<key>` -> (parameter, key); an empty parameter for any other name."""
    name, _, key = full.rpartition(".")
    return (name[len(PREFIX) :], key) if name.startswith(PREFIX) else ("", key)


def read_metadata(folder: Path) -> Any:
    """The `Metadata` of a folder of shards. Nothing it names is called or opened that does not
    belong to one. Errors: `CheckpointError`."""
    file = folder / ".metadata"
    try:
        with file.open("rb") as stream:
            metadata = _Unpickler(stream).load()
        wrong = _wrong(metadata)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: refused: {line_of(error)}") from error
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    except Exception as error:  # a pickle that is torn or forged can raise anything
        raise CheckpointError(f"{file}: damaged, it cannot be read") from error
    if wrong:
        raise CheckpointError(f"{file}: refused: {wrong}")
    return metadata


def _wrong(metadata: Any) -> str:
    """What does not belong into shards of tensors. Pickled bytes would be loaded by torch without
    `weights_only`, and a path could lead to any file."""
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    if type(metadata) is not Metadata or type(metadata.storage_data) is not dict:
        return "it is not the description of a checkpoint"
    for name, described in metadata.state_dict_metadata.items():
        if type(name) is not str or type(described) is not TensorStorageMetadata:
            return f"{name!r} is not a tensor"
    for info in metadata.storage_data.values():
        if not _FILE.fullmatch(info.relative_path) or info.transform_descriptors:
            return f"it names {info.relative_path!r}, which is no file of a checkpoint"
    return ""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")
