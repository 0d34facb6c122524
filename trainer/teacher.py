"""Answers of a teacher, kept on disk: the shards that stage `targets` writes, and who reads them.

An answer belongs to a chunk of a document and is found by a key made of the chunk's own tokens and
targets. Packing, order, sampling weights and the number of workers therefore do not matter, and
where data, tokenizer or length are not those of the store, an answer is missing, never wrong.

    targets/shard-00000/keys.npy       [chunks]         u64
                        positions.npy  [chunks + 1]     u64: where a chunk's tokens begin
                        offsets.npy    [tokens + 1]     u64: where a token's entries begin
                        ids.npy        [entries]        u32
                        values.npy     [entries]        f16 probabilities, or u16 counts of samples
                        meta.json      written last: a shard without it does not exist
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from trainer.batch import IGNORE, Batch
from trainer.config import ConfigError
from trainer.data import DataError
from trainer.data.stream import Rows
from trainer.store import atomic_write

Array = NDArray[Any]
#: What all shards of a store share; older ones lack some of it.
_COMMON = (
    "teacher",
    "weights",
    "precision",
    "tokenizer",
    "temperature",
    "sampler",
    "top_k",
    "samples",
)
_ARRAYS = ("keys", "positions", "offsets", "ids", "values")


class Segment(NamedTuple):
    """The `nth` chunk of a batch. Its m supervised tokens are `begin:end` among those of the batch,
    and `places` [m] inside the chunk. `key`: 64 bits of a hash of its tokens and targets."""

    key: int
    begin: int
    end: int
    places: NDArray[np.int64]
    nth: int


class Answer(NamedTuple):
    """What is known about m tokens: token i has the next `counts[i]` entries of `ids` and `p`; none
    where there is no answer."""

    counts: NDArray[np.int64]  # [m]
    ids: Array  # [entries]
    p: Array  # [entries]


class Answers(Protocol):
    """`sampled`: the entries are shares of samples; else what they leave of 1 is "other tokens".
    `name`: where they come from, for messages. `known`: how many of the tokens `places` of a chunk
    have an answer, without reading it."""

    name: str
    sampled: bool

    def known(self, key: int, places: NDArray[np.int64]) -> int: ...
    def read(self, key: int, places: NDArray[np.int64]) -> Optional[Answer]: ...


@dataclass(frozen=True)
class Gathered:
    """The answers for the n supervised tokens of a batch. `status` [n]: whether there is one."""

    ids: Tensor  # [n, K], int64; -1: no entry
    p: Tensor  # [n, K], fp32 or float64
    status: Tensor  # [n], bool


def segments(batch: Batch) -> Iterator[Segment]:
    """The chunks of a batch on the CPU that have something to learn, in order."""
    ids = batch.input_ids.numpy().astype(np.int32).ravel()
    targets = batch.targets.numpy().astype(np.int32).ravel()
    supervised = np.flatnonzero(targets != IGNORE)
    borders = np.append(np.flatnonzero(batch.position_ids.numpy().ravel() == 0), len(ids))
    ranks = np.searchsorted(supervised, borders)
    for at, (start, stop) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist())):
        begin, end = int(ranks[at]), int(ranks[at + 1])
        if begin == end:
            continue
        # What follows the last target, padding perhaps, has no part in it.
        stop = min(stop, int(supervised[end - 1]) + 1)
        content = ids[start:stop].tobytes() + targets[start:stop].tobytes()
        key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        yield Segment(key, begin, end, supervised[begin:end] - start, at)


def gather(answers: Answers, batch: Batch) -> Gathered:
    """The answers for a batch on the CPU."""
    found = [(s, answers.read(s.key, s.places)) for s in segments(batch)]
    n = int((batch.targets != IGNORE).sum())
    width = max((int(a.counts.max()) for _, a in found if a is not None), default=0)
    wide = any(a is not None and a.p.dtype == np.float64 for _, a in found)
    ids = np.full((n, max(width, 1)), -1, dtype=np.int64)
    p = np.zeros(ids.shape, dtype=np.float64 if wide else np.float32)
    status = np.zeros(n, dtype=bool)
    for segment, answer in found:
        if answer is None:
            continue
        row = segment.begin + np.repeat(np.arange(len(answer.counts)), answer.counts)
        first = np.cumsum(answer.counts) - answer.counts
        column = np.arange(len(answer.ids)) - np.repeat(first, answer.counts)
        ids[row, column], p[row, column] = answer.ids, answer.p
        status[segment.begin : segment.end] = answer.counts > 0
    return Gathered(torch.from_numpy(ids), torch.from_numpy(p), torch.from_numpy(status))


class Coverage(NamedTuple):
    """Of rows: the supervised tokens and how many have an answer; the chunks, and how many have
    an answer for at least one token."""

    known: int
    tokens: int
    known_chunks: int
    chunks: int

    @property
    def missing(self) -> float:
        """The share of tokens without an answer."""
        return 1 - self.known / self.tokens


def coverage(answers: Answers, rows: Rows) -> Coverage:
    """What of `rows` has answers. Errors: `DataError` when nothing has."""
    known, tokens = [], 0
    for row in range(len(rows)):
        for segment in segments(rows.batch([row])):
            known.append(answers.known(segment.key, segment.places))
            tokens += len(segment.places)
    if not any(known):
        raise DataError(
            f"{answers.name}: no answer for any of the {len(known)} chunks of data.train; they"
            " need the same documents, tokenizer and data.sequence_length"
        )
    return Coverage(sum(known), tokens, sum(n > 0 for n in known), len(known))


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of a tokenizer's vocabulary: equal where equal ids mean equal tokens."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


class ShardWriter:
    """Collects the answers for one shard and writes it. `dtype`: of probabilities; f16 is accurate
    to 0.05%, and to 3e-8 below 6e-5."""

    def __init__(self, folder: Path, meta: dict[str, Any], dtype: DTypeLike = np.float16) -> None:
        self.folder, self.meta, self.dtype = folder, meta, np.dtype(dtype)
        self._keys: dict[int, int] = {}  # key -> tokens
        self._counts: list[Array] = []
        self._ids: list[Array] = []
        self._values: list[Array] = []

    def add(self, key: int, answer: Answer) -> None:
        """One chunk; a document that comes twice is stored once."""
        if key in self._keys:
            return
        self._keys[key] = len(answer.counts)
        self._counts.append(answer.counts)
        self._ids.append(answer.ids.astype(np.uint32))
        self._values.append(answer.p.astype(self.dtype))

    def close(self) -> dict[str, Any]:
        """Write the arrays, then meta.json with what was counted; the meta data."""
        arrays = (
            np.array(list(self._keys), dtype=np.uint64),
            _offsets(np.array(list(self._keys.values()), dtype=np.uint64)),
            _offsets(np.concatenate(self._counts)),
            np.concatenate(self._ids),
            np.concatenate(self._values),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, array in zip(_ARRAYS, arrays):
            content = io.BytesIO()
            np.save(content, array)
            atomic_write(self.folder / f"{name}.npy", content.getvalue())
        meta = {**self.meta, "chunks": len(arrays[0]), "tokens": len(arrays[2]) - 1,
                "entries": len(arrays[3]), "values": self.dtype.name}  # fmt: skip
        atomic_write(self.folder / "meta.json", json.dumps(meta, indent=1, sort_keys=True).encode())
        return meta


class StoredAnswers:
    """The shards below a folder, memory-mapped. Errors: `ConfigError` where there are none, they
    were not all made in one way, or with another tokenizer or temperature; `DataError` for a
    damaged shard."""

    def __init__(self, reference: str, tokenizer: Any, temperature: float) -> None:
        folder = Path(reference)
        folder = folder / "targets" if (folder / "targets").is_dir() else folder
        metas = sorted(folder.glob("shard-*/meta.json"))
        if not metas:
            raise ConfigError(f"kd.targets: no stored targets in {folder}; run a stage `targets`")
        self.name = str(folder)
        self.shards = [Shard(path.parent) for path in metas]
        meta = self.shards[0].meta
        for what in _COMMON:
            for other in self.shards[1:]:
                if other.meta.get(what) != meta.get(what):
                    raise ConfigError(
                        f"kd.targets: {folder}: {metas[0].parent.name} and {other.name} differ in"
                        f" `{what}`: the stage `targets` was changed and not run to its end; run it"
                    )
        for what, ours in (("tokenizer", tokenizer_hash(tokenizer)), ("temperature", temperature)):
            if meta.get(what) != ours:
                said = (
                    "another tokenizer" if what == "tokenizer" else f"temperature {meta.get(what)}"
                )
                raise ConfigError(
                    f"kd.targets: {folder} was made with {said}; this stage has"
                    + (" its own" if what == "tokenizer" else f" {ours}")
                )
        self.sampled = meta["sampler"] == "sample"
        keys = np.concatenate([shard.arrays["keys"] for shard in self.shards])
        sizes = [len(shard.arrays["keys"]) for shard in self.shards]
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._first = np.cumsum([0, *sizes])

    def known(self, key: int, places: NDArray[np.int64]) -> int:
        return 0 if self._find(key) is None else len(places)

    def read(self, key: int, places: NDArray[np.int64]) -> Optional[Answer]:
        """The answer for the chunk `key`. All of its supervised tokens are stored, in order, so
        `places` adds nothing here."""
        found = self._find(key)
        if found is None:
            return None
        shard = int(np.searchsorted(self._first, found, side="right")) - 1
        return self.shards[shard].read(found - int(self._first[shard]))

    def _find(self, key: int) -> Optional[int]:
        at = int(np.searchsorted(self._keys, np.uint64(key)))
        if at == len(self._keys) or int(self._keys[at]) != key:
            return None
        return int(self._order[at])


class Shard:
    """The arrays of one shard, memory-mapped. Errors: `DataError` when it is not whole."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
            self.arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in _ARRAYS
            }
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: cannot be read: {error}; store the targets again") from None
        sizes = {name: self.meta.get(name) for name in ("chunks", "entries")}
        if sizes != {"chunks": len(self.arrays["keys"]), "entries": len(self.arrays["ids"])}:
            raise DataError(f"{folder}: its arrays are not those of meta.json; store them again")

    def read(self, chunk: int) -> Answer:
        begin, end = (int(x) for x in self.arrays["positions"][chunk : chunk + 2])
        offsets = self.arrays["offsets"][begin : end + 1].astype(np.int64)
        part = slice(int(offsets[0]), int(offsets[-1]))
        p = self.arrays["values"][part]
        if p.dtype.kind == "u":
            p = p / np.float32(self.meta["samples"])
        return Answer(np.diff(offsets), self.arrays["ids"][part], p)


def _offsets(counts: Array) -> NDArray[np.uint64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
