"""What the object store of a rehearsal holds: buckets, objects, unfinished uploads.

Kept in memory, or in a folder as well, where it outlives the process. Generations, preconditions
and the limit of one write a second to one object are decided here; HTTP is not known here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Optional

from launcher.clock import Clock, SystemClock
from launcher.rehearsal.http import HttpError

#: Unfinished uploads are kept in whole multiples of this many bytes.
GRAIN = 256 * 1024
#: What a client may say about an object; everything else is the service's to say.
_WRITABLE = (
    "contentType", "contentEncoding", "contentDisposition", "contentLanguage", "cacheControl",
    "customTime", "metadata", "storageClass", "temporaryHold", "eventBasedHold",
)  # fmt: skip
_LIMIT = (
    "The object {} exceeded the rate limit for object mutation operations (create, update, and "
    "delete). Please reduce your request rate."
)


@dataclass(frozen=True)
class Conditions:
    """Preconditions of a request on one object; None: not asked. Generation 0: there is none."""

    generation: Optional[int] = None
    generation_not: Optional[int] = None
    metageneration: Optional[int] = None
    metageneration_not: Optional[int] = None

    def check(self, meta: Optional[Mapping[str, Any]], *, reading: bool = False) -> None:
        """Errors: `HttpError` 412, or 304 where a reader has this version already."""
        generation = int(meta["generation"]) if meta else 0
        metageneration = int(meta["metageneration"]) if meta else 0
        pairs = ((self.generation, generation), (self.metageneration, metageneration))
        unlike = ((self.generation_not, generation), (self.metageneration_not, metageneration))
        if any(wanted is not None and wanted != found for wanted, found in pairs):
            raise HttpError(412, "At least one of the pre-conditions you specified did not hold.")
        if any(unwanted == found for unwanted, found in unlike):
            raise HttpError(304 if reading else 412, "The version is the one that was excluded.")


@dataclass
class Upload:
    """A resumable upload: `received` bytes are kept, `total` is None until the client knows."""

    id: str
    bucket: str
    name: str
    wanted: dict[str, Any]
    conditions: Conditions
    total: Optional[int] = None
    done: Optional[dict[str, Any]] = None
    received: bytearray = field(default_factory=bytearray)
    saved: int = 0  # bytes of `received` that lie in the folder, if there is one


@dataclass
class _Held:
    meta: dict[str, Any]
    content: bytes | Path

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


class Objects:
    """The state. Methods raise `HttpError` as the service would answer.

    `folder`: keep everything there too. `limit_writes`: refuse a second write to an object within
    a second. `denied`: names of buckets to which every request is refused, or "name:write".
    `finalized`: called with bucket, name and bytes of every object that was written."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        clock: Clock | None = None,
        limit_writes: bool = False,
    ) -> None:
        self.folder, self.clock, self.limit_writes = folder, clock or SystemClock(), limit_writes
        self.denied: set[str] = set()
        self.lacking: dict[str, set[str]] = {}  # permissions that the caller has not, by bucket
        self.policies: dict[str, list[dict[str, Any]]] = {}  # IAM bindings, by bucket
        self.finalized: list[Callable[[str, str, int], None]] = []
        self.buckets: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, Upload] = {}
        self.lock = threading.RLock()
        self._objects: dict[str, dict[str, _Held]] = {}
        self._written: dict[tuple[str, str], float] = {}
        self._last = self._begun = 0
        if folder is not None:
            self._load(folder)

    def create_bucket(self, name: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        if not name:
            raise HttpError(400, "Required parameter: name")
        if name in self.buckets:
            raise HttpError(409, "Your previous request to create the named bucket succeeded.")
        made: dict[str, Any] = {
            "location": "US",
            "storageClass": "STANDARD",
            "locationType": "multi-region",
        }
        made |= {"iamConfiguration": {"uniformBucketLevelAccess": {"enabled": True}}}
        made |= {**wanted, "kind": "storage#bucket", "id": name, "name": name}
        made |= {"metageneration": "1", "timeCreated": self._time(), "updated": self._time()}
        self.buckets[name], self._objects[name] = made, {}
        self._save_bucket(name)
        return made

    def patch_bucket(self, name: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        found = self.bucket(name)
        found |= wanted
        found["metageneration"] = str(int(found["metageneration"]) + 1)
        self._save_bucket(name)
        return found

    def bucket(self, name: str) -> dict[str, Any]:
        if name not in self.buckets:
            raise HttpError(404, "The specified bucket does not exist.")
        return self.buckets[name]

    def delete_bucket(self, name: str) -> None:
        self.bucket(name)
        if self._objects[name]:
            raise HttpError(409, "The bucket you tried to delete is not empty.")
        del self.buckets[name], self._objects[name]
        if self.folder is not None:
            (self.folder / name / "bucket.json").unlink()

    def names(self, bucket: str) -> list[str]:
        self.bucket(bucket)
        return sorted(self._objects[bucket])

    def find(self, bucket: str, name: str) -> Optional[dict[str, Any]]:
        """The resource of an object, or None."""
        self.bucket(bucket)
        held = self._objects[bucket].get(name)
        return held.meta if held else None

    def get(self, bucket: str, name: str, generation: Optional[int] = None) -> dict[str, Any]:
        meta = self.find(bucket, name)
        if meta is None or (generation and int(meta["generation"]) != generation):
            raise HttpError(404, f"No such object: {bucket}/{name}")
        return meta

    def content(self, bucket: str, name: str) -> bytes:
        self.get(bucket, name)
        return self._objects[bucket][name].read()

    def insert(
        self,
        bucket: str,
        name: str,
        content: bytes,
        wanted: Mapping[str, Any],
        conditions: Conditions,
        *,
        components: int = 0,
    ) -> dict[str, Any]:
        """Write a new generation. A checksum among `wanted` must be that of the content."""
        conditions.check(self.find(bucket, name))
        crc = crc32c(content)
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        for title, key, found in (("CRC32C", "crc32c", crc), ("MD5 hash", "md5Hash", md5)):
            if wanted.get(key) and wanted[key] != found:
                why = f'Provided {title} "{wanted[key]}" doesn\'t match calculated {title}'
                raise HttpError(400, f'{why} "{found}".')
        self._pace(bucket, name)
        self._last = max(self._last + 1, int(self.clock.now() * 1e6))
        now = self._time()
        meta: dict[str, Any] = {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self._last}",
            "name": name,
            "bucket": bucket,
            "generation": str(self._last),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(len(content)),
            "crc32c": crc,
            "etag": base64.b64encode(str(self._last).encode()).decode(),
            "timeCreated": now,
            "updated": now,
            "timeStorageClassUpdated": now,
        }
        meta |= {"componentCount": components} if components else {"md5Hash": md5}
        meta |= {key: wanted[key] for key in _WRITABLE if wanted.get(key) is not None}
        self._keep(bucket, name, meta, content)
        for tell in self.finalized:
            tell(bucket, name, len(content))
        return meta

    def patch(
        self, bucket: str, name: str, wanted: Mapping[str, Any], *, replace: bool
    ) -> dict[str, Any]:
        """Change what clients may say about an object; null removes."""
        self._pace(bucket, name)
        meta = dict(self.get(bucket, name))
        for key in _WRITABLE:
            if key == "metadata" and wanted.get(key) and not replace:
                merged = {**meta.get("metadata", {}), **wanted["metadata"]}
                meta["metadata"] = {k: v for k, v in merged.items() if v is not None}
            elif key in wanted:
                meta[key] = wanted[key]
            elif replace and key != "storageClass":
                meta[key] = None
        meta = {key: value for key, value in meta.items() if value is not None}
        meta |= {"metageneration": str(int(meta["metageneration"]) + 1), "updated": self._time()}
        self._objects[bucket][name].meta = meta
        self._save(bucket, name, meta)
        return meta

    def delete(self, bucket: str, name: str) -> None:
        self.get(bucket, name)
        self._pace(bucket, name)
        held = self._objects[bucket].pop(name)
        if self.folder is not None:
            self._file(bucket, name).unlink()
        if isinstance(held.content, Path):
            held.content.unlink()

    def begin(
        self, bucket: str, name: str, wanted: dict[str, Any], conditions: Conditions
    ) -> Upload:
        """Open a resumable upload. Its preconditions are looked at now and again at its end."""
        conditions.check(self.find(bucket, name))
        self._begun += 1
        number = hashlib.sha256(f"{bucket}/{name} {self._begun}".encode()).hexdigest()[:24]
        upload = self.uploads[number] = Upload(number, bucket, name, wanted, conditions)
        self.save_upload(upload)
        return upload

    def save_upload(self, upload: Upload) -> None:
        if self.folder is None:
            return
        part = self.folder / "uploads" / f"{upload.id}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("r+b" if part.exists() else "wb") as file:
            file.seek(min(upload.saved, len(upload.received)))
            file.write(memoryview(upload.received)[upload.saved :])
            file.truncate(len(upload.received))
        upload.saved = len(upload.received)
        facts = {name: value for name, value in vars(upload).items() if name != "received"}
        facts["conditions"] = asdict(upload.conditions)
        _write(part.with_suffix(".json"), json.dumps(facts).encode())

    def _pace(self, bucket: str, name: str) -> None:
        now = self.clock.now()
        if self.limit_writes and now - self._written.get((bucket, name), now - 1) < 1:
            raise HttpError(429, _LIMIT.format(f"{bucket}/{name}"))
        self._written[(bucket, name)] = now

    def _keep(self, bucket: str, name: str, meta: dict[str, Any], content: bytes) -> None:
        held = self._objects[bucket].get(name)
        kept: bytes | Path = content
        if self.folder is not None:
            file = self._file(bucket, name)
            kept = file.with_name(f"{file.stem}-{meta['generation']}.bin")
            _write(kept, content)
        self._objects[bucket][name] = _Held(meta, kept)
        self._save(bucket, name, meta)
        if held and isinstance(held.content, Path):
            held.content.unlink()

    def _save(self, bucket: str, name: str, meta: Mapping[str, Any]) -> None:
        if self.folder is not None:
            _write(self._file(bucket, name), json.dumps(meta).encode())

    def _save_bucket(self, name: str) -> None:
        if self.folder is not None:
            _write(self.folder / name / "bucket.json", json.dumps(self.buckets[name]).encode())

    def _file(self, bucket: str, name: str) -> Path:
        assert self.folder is not None
        return self.folder / bucket / f"o-{hashlib.sha256(name.encode()).hexdigest()[:40]}.json"

    def _load(self, folder: Path) -> None:
        for file in folder.glob("*/bucket.json"):
            name = file.parent.name
            self.buckets[name], self._objects[name] = json.loads(file.read_bytes()), {}
            for one in file.parent.glob("o-*.json"):
                meta = json.loads(one.read_bytes())
                content = one.with_name(f"{one.stem}-{meta['generation']}.bin")
                self._objects[name][meta["name"]] = _Held(meta, content)
                self._last = max(self._last, int(meta["generation"]))
        for file in (folder / "uploads").glob("*.json"):
            facts = json.loads(file.read_bytes())
            facts["conditions"] = Conditions(**facts["conditions"])
            part = file.with_suffix(".part").read_bytes()
            facts["received"] = bytearray(part[: facts["saved"]])
            facts["saved"] = len(facts["received"])
            self.uploads[facts["id"]] = Upload(**facts)
        self._begun = len(self.uploads)

    def _time(self) -> str:
        from datetime import datetime, timezone

        now = datetime.fromtimestamp(self.clock.now(), timezone.utc)
        return now.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def crc32c(content: bytes) -> str:
    """CRC-32C as the service writes it: base64 of four bytes, the most significant first."""
    value: int = import_module("google_crc32c").value(content)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def linked(meta: Mapping[str, Any], base: str) -> dict[str, Any]:
    """A resource as a client sees it: with links to this server."""
    name = urllib.parse.quote(meta["name"], safe="")
    path = f"storage/v1/b/{meta['bucket']}/o/{name}"
    media = f"{base}/download/{path}?generation={meta['generation']}&alt=media"
    return {**meta, "selfLink": f"{base}/{path}", "mediaLink": media}


def _write(file: Path, content: bytes) -> None:
    # Whole after a killed process; a rehearsal need not survive a power cut.
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}")
    temporary.write_bytes(content)
    temporary.replace(file)
