"""Tells the weights of model folders apart, without reading them whole and whatever the folders are
called: a model that was trained again has the same name, shapes and sizes."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import BinaryIO, Optional

from trainer.checkpoint import CheckpointError, resolve

#: Files of weights, as Transformers looks for them.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
#: Bytes from the middle of each tensor. Training changes nearly all numbers of what it changes.
_SAMPLE = 512
#: Bytes from the end of another file: PyTorch's are zip archives, whose checksums are there.
_END = 1 << 16


def fingerprint(reference: str) -> Optional[str]:
    """sha256 of a sample of the weights at a model reference, and of its configuration: a few bytes
    of each tensor. Copies have that of what they are copies of. None where there are no weights on
    this machine."""
    folder = _folder(reference)
    if folder is None:
        return None
    paths = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not paths:
        return None
    digest = hashlib.sha256()
    try:
        digest.update((folder / "config.json").read_bytes())
        for path in paths:
            size = path.stat().st_size
            digest.update(f"{path.name} {size};".encode())
            # Little is read ahead: what is read lies far apart.
            with path.open("rb", buffering=2 * _SAMPLE) as file:
                for begin, count in _places(file, size):
                    file.seek(begin)
                    digest.update(file.read(count))
    except OSError:
        return None
    return digest.hexdigest()


def _folder(reference: str) -> Optional[Path]:
    """Where the files of a model reference are, those of a name on the hub in its cache."""
    try:
        name = resolve(reference)
    except CheckpointError:  # it was there when the stage began
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub could know
        return None
    return Path(found).parent if isinstance(found, str) else None


def _places(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """(begin, bytes) of what is sampled of a file: of safetensors (8 bytes of length, then JSON,
    then numbers) that and the middle of each tensor."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        first = 8 + length
        header = json.loads(file.read(length)) if first <= size else {}
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        places = [(0, first)]
        for begin, end in sorted(spans):
            count = min(_SAMPLE, end - begin)
            places.append((first + begin + (end - begin - count) // 2, count))
        return places if len(places) > 1 else [(max(0, size - _END), _END)]
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return [(max(0, size - _END), _END)]
