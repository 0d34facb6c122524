"""Answers of a teacher as a file of logits for each sample: `kd.logits_dir`."""

from __future__ import annotations

import pickle
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data import DataError
from trainer.data.stream import Rows
from trainer.teacher import Answer, segments


class LogitFiles:
    """`FOLDER/SAMPLE.npy` or `.pt`, each [tokens, vocabulary]: row t holds the logits after token t
    of the document. `samples`: (index of the source, document id) -> SAMPLE. `vocabularies`: the
    sizes that the last dimension may have; entries from `tokens` on are padding and are left out.
    Of each row the `top_k` most probable tokens at `temperature` are kept.

    A document that is longer than its file has no answer for what is beyond it. Errors: `DataError`
    for a file that is not such an array. Pickles never run: `.pt` files may hold tensors only."""

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
        if not Path(folder).is_dir():
            raise DataError(f"kd.logits_dir: {folder}: no such folder")
        self.tokens, self.vocabularies = tokens, vocabularies
        self.temperature, self.top_k = temperature, top_k
        files = {p.stem: p for p in sorted(Path(folder).iterdir()) if p.suffix in (".npy", ".pt")}
        #: key of a chunk -> its file, and where the chunk begins in the document
        self._where: dict[int, tuple[Path, int]] = {}
        chunks = rows.chunks
        for row in range(len(rows)):
            for segment in segments(rows.batch([row])):
                chunk = int(rows.packing[row][segment.nth])
                sample = samples.get(chunks.documents[chunks.document[chunk]])
                file = files.get(sample) if sample is not None else None
                if file is not None:
                    self._where[segment.key] = file, chunks.offset(chunk)
        # A document longer than a row asks for its file once for each of its chunks.
        self._logits = lru_cache(maxsize=4)(self._load)

    def has(self, key: int) -> bool:
        return key in self._where

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


def _array(path: Path) -> Any:
    try:
        if path.suffix == ".npy":
            mapped = np.load(path, mmap_mode="c", allow_pickle=False)
            return torch.from_numpy(mapped)
        with warnings.catch_warnings():  # about protocols of pickles: they are not run
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: holds more than tensors, and is not opened: it could run code; save the"
            " tensor alone"
        ) from error
    except (OSError, ValueError, TypeError, RuntimeError, EOFError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path}: cannot be read: {line}; write the logits of this sample again"
        ) from error


def _words(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}"
    return f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
