"""Answers of a teacher as a file of logits for each sample: `kd.logits_dir`."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.adapters import one_line
from trainer.data import DataError
from trainer.data.stream import Rows
from trainer.teacher import Answer, segments

#: So many files are looked at before training begins, evenly among all.
CHECKED = 1000


class LogitFiles:
    """`FOLDER/SAMPLE.npy` or `.pt`, each [tokens, vocabulary]: row t holds the logits after token t
    of the document. `samples`: (index of the source, document id) -> SAMPLE. `vocabularies`: the
    sizes that the last dimension may have; entries from `tokens` on are padding and are left out.
    Of each row the `top_k` most probable tokens at `temperature` are kept.

    A document that is longer than its file has no answer for what is beyond it. A later part of a
    document that reads like that of another has none either: its answer depends on what came
    before, which its key does not tell. Errors: `DataError` for a folder without a file of any
    sample, and for a file that is not such an array, of the first `CHECKED` at once. Pickles never
    run: `.pt` files may hold tensors only."""

    sampled = False

    def __init__(
        self,
        folder: str,
        samples: dict[tuple[int, str], str],
        rows: Rows,
        *,
        tokens: int,
        vocabularies: tuple[int, ...],
        temperature: float,
        top_k: int,
    ) -> None:
        self.name = folder
        self.tokens, self.vocabularies = tokens, vocabularies
        self.temperature, self.top_k = temperature, top_k
        files = sample_files(folder, samples.values())
        #: key of a chunk -> its file, and where the chunk begins in the document
        self._where = _places(files, samples, rows)
        # A document longer than a row asks for its file once for each of its chunks.
        self._logits = lru_cache(maxsize=4)(self._load)
        used = sorted({path for path, _ in self._where.values()})
        #: file -> its tokens, of those that were looked at
        self._lengths = {path: len(self._load(path)) for path in _evenly(used, CHECKED)}

    def known(self, key: int, places: NDArray[np.int64]) -> int:
        """How many of the tokens `places` have an answer; of a file that was not looked at, all."""
        if key not in self._where:
            return 0
        path, offset = self._where[key]
        length = self._lengths.get(path)
        return len(places) if length is None else int((places + offset < length).sum())

    def read(self, key: int, places: NDArray[np.int64]) -> Optional[Answer]:
        """The answer for the tokens `places` [m] of the chunk `key`."""
        if key not in self._where:
            return None
        path, offset = self._where[key]
        logits = self._logits(path)
        inside = places[places + offset < len(logits)] + offset
        rows = logits[torch.from_numpy(inside)][:, : self.tokens]
        wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
        top = torch.softmax(rows.to(wide) / self.temperature, dim=1).topk(
            min(self.top_k, rows.shape[1]), dim=1
        )
        if bool(torch.isnan(top.values).any()):  # also of +inf, and of a row of -inf
            raise DataError(
                f"{path}: its logits are no distribution (NaN or infinite); write this sample again"
            )
        counts = np.where(places + offset < len(logits), top.values.shape[1], 0)
        return Answer(counts, top.indices.numpy().ravel(), top.values.numpy().ravel())

    def _load(self, path: Path) -> Tensor:
        found = _array(path)
        if not isinstance(found, Tensor) or found.dim() != 2 or not found.is_floating_point():
            raise DataError(
                f"{path}: expected logits as one array [tokens, vocabulary], got {_words(found)}"
            )
        if found.shape[1] not in self.vocabularies:
            allowed = " or ".join(str(size) for size in sorted(set(self.vocabularies)))
            raise DataError(
                f"{path}: logits over {found.shape[1]} tokens, but the student's vocabulary has"
                f" {allowed}; they were made with another tokenizer"
            )
        return found


def sample_files(folder: str, samples: Iterable[str]) -> dict[str, Path]:
    """SAMPLE -> its file. Errors: `DataError` without the folder, or without a file of any of
    `samples` (none: not known)."""
    if not Path(folder).is_dir():
        raise DataError(f"kd.logits_dir: {folder}: no such folder")
    files = {p.stem: p for p in sorted(Path(folder).iterdir()) if p.suffix in (".npy", ".pt")}
    expected = dict.fromkeys(samples)
    if expected and not files.keys() & expected.keys():
        names = " or ".join(f"{name}.npy" for name in list(expected)[:2])
        raise DataError(
            f"kd.logits_dir: {folder}: none of its {len(files)} files is named after a sample of"
            f" data.train, such as {names} (or .pt); a sample is the `id` of a line, else FILE-LINE"
        )
    return files


def _places(
    files: dict[str, Path], samples: dict[tuple[int, str], str], rows: Rows
) -> dict[int, tuple[Path, int]]:
    """Key of a chunk -> its file and offset. A key that stands for chunks after different tokens
    is left out."""
    found: dict[int, tuple[Path, int]] = {}
    first: dict[int, NDArray[np.int32]] = {}  # key -> the tokens before the first chunk with it
    ambiguous = set()
    chunks = rows.chunks
    for row in range(len(rows)):
        for segment in segments(rows.batch([row])):
            chunk = int(rows.packing[row][segment.nth])
            start, offset = int(chunks.starts[chunk]), chunks.offset(chunk)
            before = chunks.tokens[start - offset : start]
            if not np.array_equal(first.setdefault(segment.key, before), before):
                ambiguous.add(segment.key)
            file = files.get(samples.get(chunks.documents[int(chunks.document[chunk])], ""))
            if file is not None:
                found.setdefault(segment.key, (file, offset))
    return {key: place for key, place in found.items() if key not in ambiguous}


def _evenly(paths: list[Path], count: int) -> list[Path]:
    """All `paths`, or `count` of them from the first to the last."""
    if len(paths) <= count:
        return paths
    return [paths[round(i * (len(paths) - 1) / (count - 1))] for i in range(count)]


def _array(path: Path) -> Any:
    """The array, mapped where its format allows: only the rows that are used are read."""
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        with warnings.catch_warnings():  # about protocols of pickles: they are not run
            warnings.simplefilter("ignore")
            mapped = zipfile.is_zipfile(path)  # tensors of old have a format of their own
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: holds more than tensors, and is not opened: it could run code; save the"
            " tensor alone"
        ) from error
    except (OSError, ValueError, TypeError, RuntimeError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read: {one_line(error)}; write the logits of this sample again"
        ) from error


def _words(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}"
    return f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
