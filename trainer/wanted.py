"""What each kind of input needs of a store: data, manifests, models, answers, checkpoints.

Every method takes a URI and the name of its field, says to a `Shelf` which objects are wanted, and
returns the path that will stand in the URI's place. Nothing large is fetched here.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from trainer.config import ConfigError
from trainer.copies import REMOTE, here
from trainer.data.read import SUFFIXES, local_path
from trainer.downloads import Place, Shelf, parse
from trainer.manifest import MANIFEST, STATE, VERSION
from trainer.store import NotFound, StoreError, atomic_write
from trainer.store_remote import Entry

#: How much of a model is read: what a tokenizer needs, what `from_pretrained` reads, or also the
#: trainer's state, as training goes on from it.
Part = Literal["words", "weights", "all"]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")
_ADAPTER = "adapter_config.json"
_STEP = re.compile(rf"checkpoints/step-(\d+)/{re.escape(MANIFEST)}")
_ONE_STEP = re.compile(r"(?:(.*)/)?checkpoints/step-(\d+)")
_STAGE = ("run_meta.json", "args_snapshot.json")
#: What a stage leaves beside a model that it wrote (stages merge and export).
_BESIDE = re.compile(r"(?:checkpoints|metrics|logs|tensorboard|control|journal|attempts)/.*")
_TEXTS = f"only {' and '.join(SUFFIXES)} files are read"


class Missing(Exception):
    """One line: an input that is not there, or not what it should be."""


class _Broken(Exception):
    """A checkpoint that is not what its manifest says."""


class Inputs:
    """`broken`: checkpoints (their URIs) whose files turned out to be damaged. `warn` hears of what
    is passed over. `bases`: URI -> path of base models that adapters name."""

    def __init__(self, shelf: Shelf, broken: set[str], warn: Callable[[str], None]) -> None:
        self.shelf, self.broken, self.warn = shelf, broken, warn
        self.bases: dict[str, str] = {}

    def data(self, uri: str, field: str) -> str:
        """A file, a folder or a glob, of which only what the reader reads is wanted."""
        place = parse(uri)
        entry = self.shelf.entry(place)
        if entry is not None:
            if not place.key.endswith(SUFFIXES):
                raise Missing(f"{uri}: unknown kind of file; {_TEXTS}")
            self.shelf.want(place, entry, field)
            return str(self.shelf.path(place))
        found = self.shelf.below(place)
        kept = [name for name in found if name.endswith(SUFFIXES) and not _hidden(name)]
        self._want(place, found, kept, field)
        if kept:
            return str(self.shelf.path(place))
        if found:
            raise Missing(f"{uri}: no data file in this folder; {_TEXTS}")
        if not glob.has_magic(place.key):
            raise Missing(f"{uri}: there is no object of this name, and nothing below it")
        return self._glob(place, field)

    def manifest(self, given: str, field: str) -> str | None:
        """A manifest of this machine or of a store, with what it lists: a copy that names local
        files. None: there is nothing remote about it."""
        remote = REMOTE.match(given) is not None
        if remote:
            place = parse(given)
            content = self.shelf.read(place)
        else:
            path = local_path(given)
            try:
                content = path.read_bytes()
            except OSError:  # the reader says so
                return None
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:  # the same
            text = ""
        if not remote and not re.search(r'"(gs|s3):', text):
            return None
        base = str(place).rpartition("/")[0] if remote else str(path.absolute().parent)
        lines = [
            self._listed(line, base, f"{given}:{number}", field)
            for number, line in enumerate(text.split("\n"), 1)
        ]
        digest = hashlib.sha256(given.encode()).hexdigest()[:12]
        copy = self.shelf.folder / "manifests" / digest / PurePosixPath(given).name
        atomic_write(copy, "\n".join(lines) if text else content)
        return str(copy)

    def file(self, uri: str, field: str) -> str:
        """One object."""
        place = parse(uri)
        entry = self.shelf.entry(place)
        if entry is None:
            raise Missing(f"{uri}: there is no object of this name")
        self.shelf.want(place, entry, field)
        return str(self.shelf.path(place))

    def folder(self, uri: str, field: str) -> str:
        """Everything below a name."""
        place = parse(uri)
        found = self.shelf.below(place)
        kept = [name for name in found if not _hidden(name)]
        if not kept:
            raise Missing(f"{uri}: there is nothing below this name")
        self._want(place, found, kept, field)
        return str(self.shelf.path(place))

    def seconds(self, uri: str, field: str) -> str:
        """A stage's folder of which only its record is read."""
        self.file(f"{uri.rstrip('/')}/run_meta.json", field)
        return str(self.shelf.path(parse(uri)))

    def answers(self, uri: str, field: str) -> str:
        """The shards of a stage `targets`, or of a folder of them; those without meta.json are not
        finished."""
        place = parse(uri)
        found = self.shelf.below(place)
        inner = "targets/" if any(name.startswith("targets/") for name in found) else ""
        whole = [name.rpartition("/")[0] for name in found if name.endswith("/meta.json")]
        shards = {shard for shard in whole if re.fullmatch(rf"{inner}shard-[^/]+", shard)}
        kept = [name for name in found if name.rpartition("/")[0] in shards]
        if not kept:
            raise Missing(f"{uri}: there are no stored targets; run a stage `targets`")
        self._want(place, found, kept, field)
        return str(self.shelf.path(place))

    def model(self, uri: str, field: str, part: Part = "weights") -> str:
        """What a model reference names: a folder as it is, or the one checkpoint of a stage."""
        which, place = "last", parse(uri)
        found = self.shelf.below(place)
        suffix = re.fullmatch(r"(.+)@(best|last)", uri)
        if not found and suffix:
            place, which = parse(suffix.group(1)), suffix.group(2)
            found = self.shelf.below(place)
        if not found:
            raise Missing(f"{uri}: there is nothing of this name")
        steps = _steps(found)
        plain = "config.json" in found or _ADAPTER in found
        if MANIFEST in found and plain:
            try:
                return self._checkpoint(place, found, field, part)
            except _Broken as error:
                raise Missing(f"{uri}: {error}") from None
        if plain or not (steps or any(mark in found for mark in _STAGE)):
            return self._plain(place, found, field, part)
        if not steps and any(name.startswith("tokenizer/") for name in found):
            kept = [name for name in found if name.startswith("tokenizer/")]
            self._refuse_half(place, found)
            self._want(place, found, kept, field)
            return str(self.shelf.path(place.below("tokenizer")))
        if which == "best":
            return self._best(place, found, field, part)
        return self._newest(place, found, steps, field, part)

    def resume(self, uri: str, field: str) -> str:
        """A checkpoint with all of its state (that of a stage which is the newest whole one), and
        beside it the best one of those before."""
        place = parse(uri)
        named = _ONE_STEP.fullmatch(place.key)
        stage = Place(place.scheme, place.bucket, named.group(1) or "") if named else place
        found = self.shelf.below(stage, "checkpoints/")
        steps = [int(named.group(2))] if named else _steps(found)
        path = self._newest(stage, found, steps, field, "all")
        step = int(path.rpartition("-")[2])
        try:
            if self._pointed(stage) < step:
                self._best(stage, found, field, "all")
                pointer = "checkpoints/best.json"
                self.shelf.want(stage.below(pointer), found[pointer], field)
        except (Missing, KeyError) as error:
            self.warn(f"{field}: goes on without a best checkpoint: {error}")
        return path

    def bases_of(self, folder: Path, field: str) -> None:
        """The base models in stores that the adapters of a local folder name."""
        if folder.is_dir():
            for path in (*folder.glob(_ADAPTER), *folder.glob(f"checkpoints/step-*/{_ADAPTER}")):
                self._base(path.read_bytes(), field)

    def _glob(self, place: Place, field: str) -> str:
        parts = place.key.split("/")
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base, pattern = Place(place.scheme, place.bucket, "/".join(parts[:fixed])), parts[fixed:]
        start = re.split(r"[*?\[]", pattern[0], maxsplit=1)[0]
        found = self.shelf.below(base, start)
        kept = [n for n in found if not _hidden(n) and _matches(n.split("/"), pattern)]
        if not kept:
            raise Missing(f"{place}: no object matches this pattern")
        strangers = sorted(name for name in kept if not name.endswith(SUFFIXES))
        if strangers:
            raise Missing(f"{place}: matches {base.below(strangers[0])}; {_TEXTS}")
        self._want(base, found, kept, field)
        # Of the machine's own folder no character is to be taken for a part of the pattern.
        return "/".join([glob.escape(str(self.shelf.path(base))), *pattern])

    def _listed(self, line: str, base: str, at: str, field: str) -> str:
        """A line of a manifest with a path of this machine. What is wrong with it otherwise is for
        the reader to say."""
        try:
            record = json.loads(line)
            where = record["path"]
        except (ValueError, KeyError, TypeError):
            return line
        if not isinstance(where, str) or not where:
            return line
        if "://" not in where and not where.startswith("/"):
            where = _joined(base, where, at)
        if REMOTE.match(where):
            try:
                where = self.data(where, f"{field}: {at}")
            except (Missing, ConfigError, StoreError) as error:
                raise type(error)(f"{at}: {error}") from error
        return json.dumps({**record, "path": where}, ensure_ascii=False)

    def _refuse_half(self, place: Place, found: Mapping[str, Entry]) -> None:
        """Errors: `Missing` for the folder of a stage that has not written all of its model: its
        files come in any order, its completed record last."""
        if not any(mark in found for mark in _STAGE):
            return
        try:
            meta = json.loads(self.shelf.read(place.below("run_meta.json")))
            if meta["completed"] is True:
                return
        except (NotFound, ValueError, KeyError, TypeError):
            pass
        raise Missing(
            f"{place}: the stage that writes it is not completed; run (or resume) it first"
        )

    def _plain(self, place: Place, found: Mapping[str, Entry], field: str, part: Part) -> str:
        written = any(mark in found for mark in _STAGE)
        self._refuse_half(place, found)
        kept = [n for n in found if not _hidden(n) and not (written and _BESIDE.fullmatch(n))]
        if part == "words":
            kept = [name for name in kept if not name.endswith(_WEIGHTS)]
        self._want(place, found, kept, field)
        if _ADAPTER in found and "config.json" not in found and part != "words":
            self._base(self.shelf.read(place.below(_ADAPTER)), field)
        return str(self.shelf.path(place))

    def _newest(
        self, stage: Place, found: Mapping[str, Entry], steps: list[int], field: str, part: Part
    ) -> str:
        for step in steps:
            try:
                return self._step(stage, found, step, field, part)
            except _Broken as error:
                self.warn(f"{field}: skipping {stage}/checkpoints/step-{step}: {error}")
        raise Missing(f"{stage}: there is no whole checkpoint of a stage")

    def _best(self, stage: Place, found: Mapping[str, Entry], field: str, part: Part) -> str:
        step = self._pointed(stage)
        try:
            return self._step(stage, found, step, field, part)
        except _Broken as error:
            raise Missing(
                f"{stage}: the best checkpoint, step-{step}: {error}; use @last"
            ) from None

    def _step(
        self, stage: Place, found: Mapping[str, Entry], step: int, field: str, part: Part
    ) -> str:
        inner = f"checkpoints/step-{step}/"
        files = {n.removeprefix(inner): e for n, e in found.items() if n.startswith(inner)}
        return self._checkpoint(stage.below(inner.rstrip("/")), files, field, part)

    def _pointed(self, stage: Place) -> int:
        try:
            return int(json.loads(self.shelf.read(stage.below("checkpoints/best.json")))["step"])
        except NotFound:
            raise Missing(f"{stage}: no checkpoint is marked as best; use @last") from None
        except (ValueError, KeyError, TypeError):
            raise Missing(f"{stage}: checkpoints/best.json is damaged; use @last") from None

    def _checkpoint(self, place: Place, found: Mapping[str, Entry], field: str, part: Part) -> str:
        """The files of a checkpoint that `part` needs, each with what its manifest says of it."""
        if str(place) in self.broken:
            raise _Broken("it is damaged: a sha256 differs from its manifest")
        listed = self._manifest(place)
        for name, facts in listed.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise _Broken(f"{MANIFEST} names a file outside the folder: {name!r}")
            there = found.get(name)  # what is packed is compared once it is here
            if there is None or not (there.packed or there.size == facts["bytes"]):
                raise _Broken(f"{name} is missing, or not as large as {MANIFEST} says")
        kept = [name for name in listed if _belongs(name, part)]
        for name in kept:
            sha256 = str(listed[name]["sha256"])
            self.shelf.want(place.below(name), found[name], field, sha256, str(place))
        if part == "all":
            self.shelf.want(place.below(MANIFEST), found[MANIFEST], field)
        if _ADAPTER in kept and part != "words":
            self._base(self.shelf.read(place.below(_ADAPTER)), field)
        return str(self.shelf.path(place))

    def _manifest(self, place: Place) -> dict[str, dict[str, Any]]:
        try:
            manifest = json.loads(self.shelf.read(place.below(MANIFEST)))
            files: dict[str, dict[str, Any]] = manifest["files"]
            known = manifest["v"] == VERSION and STATE in files
            if known and all(f["bytes"] >= 0 and f["sha256"] for f in files.values()):
                return files
        except NotFound:
            raise _Broken(f"{MANIFEST} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise _Broken(f"{MANIFEST} is damaged, or of another version")

    def _base(self, content: bytes, field: str) -> None:
        """The model that an adapter's configuration names, if it is in a store and not here."""
        try:
            base = str(json.loads(content)["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError):  # whoever loads it says so
            return
        if REMOTE.match(base) and base not in self.bases and not Path(here(base)).exists():
            self.bases[base] = self.model(base, f"{field}, the base of this adapter")

    def _want(
        self, place: Place, found: Mapping[str, Entry], names: Iterable[str], field: str
    ) -> None:
        for name in names:
            self.shelf.want(place.below(name), found[name], field)


def _steps(found: Iterable[str]) -> list[int]:
    """The steps that have a manifest, newest first."""
    return sorted((int(m.group(1)) for m in map(_STEP.fullmatch, found) if m), reverse=True)


def _belongs(name: str, part: Part) -> bool:
    if part == "all":
        return True
    if name == STATE or name.startswith("state/"):
        return False
    return part == "weights" or not name.endswith(_WEIGHTS)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """As `pathlib.Path.glob` does: `*` stays inside a folder, `**` is any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:]
        return any(_matches(parts[i:], rest) for i in range(len(parts) + 1)) or not rest
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )


def _joined(base: str, where: str, at: str) -> str:
    """`where` seen from the folder `base`. Errors: `Missing` for what leads out of the bucket."""
    if not REMOTE.match(base):
        return f"{base}/{where}"
    root = base.split("/")[:3]
    parts = base.split("/")[3:]
    for part in where.split("/"):
        if part == ".." and not parts:
            raise Missing(f"{at}: {where} leads out of the bucket")
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join([*root, *parts])
