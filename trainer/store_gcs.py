"""gs:// on google-cloud-storage.

Credentials are the application default ones; none are looked for when STORAGE_EMULATOR_HOST names
a server, as the official tools do. Retries are the library's, bounded by `Patience`; added to them:
a lost reply of create-once, an upload session that the service forgot, damage on the way. Objects
with `Content-Encoding: gzip` are unpacked here, as their readers expect: the service's checksums
and ranges are of what is stored.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from trainer.store import Denied, NotFound, StoreError, Transient, no_answer
from trainer.store_remote import (
    ONCE,
    SHA256,
    WRITER,
    Content,
    Damaged,
    Entry,
    Exists,
    Patience,
    RemoteStore,
    changed,
    first_line,
)

#: Large files are sent in pieces of this many bytes; a cut connection costs at most one.
CHUNK_BYTES = 32 << 20
_REQUEST_SECONDS = (10.0, 60.0)  # to connect, between two bytes
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
#: How `Content-Encoding` says that an object is packed; others are as good as none.
_GZIP = ("gzip", "x-gzip")
_LOGIN = "log in: gcloud auth application-default login"


def open_uri(uri: str, again: bool = True) -> GcsStore:
    """The store at gs://BUCKET/FOLDER; the rest of the name is taken as it is, '#', '?', '%' and
    spaces too. Errors: `StoreError` for a URI without a bucket."""
    return GcsStore(uri, None if again else ONCE)


class GcsStore(RemoteStore):
    """Values are objects. `chunk_bytes`: a multiple of 256 KiB."""

    scheme = "gs"

    def __init__(
        self, uri: str, patience: Patience | None = None, *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        super().__init__(uri, patience)
        self.chunk_bytes = chunk_bytes
        self._packed: set[str] = set()  # names of objects that were seen to be stored so

    def _connect(self) -> Any:
        try:
            storage = import_module("google.cloud.storage")
            auth = import_module("google.auth")
        except ImportError as error:
            raise StoreError(
                f"{self.uri}: gs:// needs google-cloud-storage; install it: pip install "
                "'launch-llm[google]'"
            ) from error
        # Unless told not to, the library asks for the bucket's own facts in a thread, for traces
        # that nobody records here: a right (storage.buckets.get) that a job need not have.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            return storage.Client()
        try:
            credentials, project = auth.default(scopes=[_SCOPE])
        except auth.exceptions.DefaultCredentialsError as error:
            named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
            if named:
                wrong = "is no credentials file" if Path(named).exists() else "does not exist"
                text = f"{self.uri}: GOOGLE_APPLICATION_CREDENTIALS: {named} {wrong}; {_LOGIN}"
                raise Denied(text) from error
            raise Denied(f"{self.uri}: no Google credentials on this machine; {_LOGIN}") from error
        except (PermissionError, IsADirectoryError) as error:  # what names them
            why = f"{error.filename}: {error.strerror}"
            raise Denied(f"{self.uri}: no Google credentials: {why}; {_LOGIN}") from error
        return storage.Client(project=project, credentials=credentials)

    def _send(self, name: str, content: Content, writer: str | None) -> None:
        errors = import_module("google.api_core.exceptions")
        media = import_module("google.cloud.storage.exceptions")
        blob = self._blob(name)
        blob.chunk_size = self.chunk_bytes
        blob.metadata = {SHA256: content.sha256, **({WRITER: writer} if writer else {})}
        with content.open() as file:
            try:
                blob.upload_from_file(
                    file,
                    size=content.size,
                    if_generation_match=None if writer is None else 0,
                    checksum="auto",
                    timeout=_REQUEST_SECONDS,
                    retry=self._retry(),
                )
            except errors.PreconditionFailed as error:
                if writer is None:
                    raise
                raise Exists from error
            except media.DataCorruption as error:
                raise Damaged(first_line(error)) from error
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise
            except ValueError as error:  # fewer bytes than were measured
                raise changed(content) from error
            except errors.GoogleAPICallError as error:
                if _forgotten(error) or _mismatch(error):
                    raise Damaged(_said(error)) from error
                raise
            self._same(blob, content, file)

    def _same(self, blob: Any, content: Content, file: BinaryIO) -> None:
        """What the service holds is what was measured before, not only what was sent."""
        if content.source:
            file.seek(0)
            if int(blob.size) != content.size or blob.crc32c != _crc32c(file, content.size):
                raise changed(content)
        elif int(blob.size) != content.size:
            raise Damaged(f"{blob.size} bytes arrived of {content.size}")

    def _receive(self, name: str, into: BinaryIO) -> None:
        if self._fetch(name, into, name in self._packed):
            return
        into.seek(0)
        into.truncate()
        if not self._fetch(name, into, name in self._packed):
            raise Damaged("it is being replaced")

    def _fetch(self, name: str, into: BinaryIO, packed: bool) -> bool:
        """Write an object to `into`: what it holds, `packed`, or what is stored; whether that was
        right, which only the answer can tell. Errors: as `_receive`; `StoreError` for what is not
        packed as it says."""
        media = import_module("google.cloud.storage.exceptions")
        unpacking = _Unpacking(into)
        blob, summing = self._blob(name), _Summing(unpacking if packed else into)
        try:
            blob.download_to_file(
                summing, raw_download=True, checksum="auto", timeout=_REQUEST_SECONDS,
                retry=self._retry(),
            )  # fmt: skip
        except media.DataCorruption as error:
            raise Damaged(first_line(error)) from error
        # The library verifies no download that it had to continue after a cut.
        if not blob.crc32c:  # nor is it the service that answers without one
            raise Damaged("no checksum came with it")
        if blob.crc32c != summing.crc32c:
            raise Damaged(f"crc32c {summing.crc32c} instead of {blob.crc32c}")
        if self._noted(blob) != packed:
            return False
        if packed and (wrong := unpacking.wrong()):
            uri = f"gs://{self.bucket}/{name}"
            raise StoreError(
                f"cannot read {uri}: it is stored with `Content-Encoding: gzip`, but {wrong}; "
                "write it again or, if it was never packed: gcloud storage objects update "
                f"--clear-content-encoding '{uri}'"
            )
        return True

    def _noted(self, blob: Any) -> bool:
        """Whether an object is packed, by what the service has just said of it."""
        packed = (blob.content_encoding or "").lower() in _GZIP
        (self._packed.add if packed else self._packed.discard)(blob.name)
        return packed

    def _look(self, name: str) -> tuple[int, Mapping[str, str]]:
        blob = self._blob(name)
        blob.reload(timeout=_REQUEST_SECONDS, retry=self._retry())
        self._noted(blob)
        return int(blob.size), blob.metadata or {}

    def _listed(self, prefix: str) -> Iterable[Entry]:
        found = self.client.list_blobs(
            self.bucket,
            prefix=prefix,
            fields="items(name,size,generation,contentEncoding),nextPageToken",
            timeout=_REQUEST_SECONDS,
            retry=self._retry(),
        )
        return (
            Entry(blob.name, int(blob.size), str(blob.generation), self._noted(blob))
            for blob in found
        )

    def _remove(self, name: str) -> None:
        self._blob(name).delete(timeout=_REQUEST_SECONDS, retry=self._retry())

    def _blob(self, name: str) -> Any:
        return self.client.bucket(self.bucket).blob(name)

    def _retry(self) -> Any:
        patience = self.patience
        retry = import_module("google.cloud.storage.retry").DEFAULT_RETRY
        waits = retry.with_delay(initial=patience.first, maximum=patience.longest, multiplier=2.0)
        return waits.with_timeout(patience.total)

    def _meaning(
        self, error: Exception, failed: str, name: str, writing: bool
    ) -> StoreError | None:
        auth = import_module("google.auth.exceptions")
        core = import_module("google.api_core.exceptions")
        requests = import_module("requests.exceptions")
        if isinstance(error, auth.TransportError):
            return Transient(f"{failed}: the login service does not answer; try again later")
        if isinstance(error, auth.GoogleAuthError):
            return Denied(f"{failed}: the Google credentials are refused or have expired; {_LOGIN}")
        if isinstance(error, core.RetryError):
            cause = error.cause
            if isinstance(cause, Exception) and not isinstance(cause, core.RetryError):
                return self._meaning(cause, failed, name, writing)
        code = _status(error)
        if code == 404 and _no_bucket(error):
            make = f"gcloud storage buckets create gs://{self.bucket}"
            return StoreError(
                f"{failed}: there is no bucket {self.bucket}; correct the name, or make it: {make}"
            )
        if code == 404:
            return NotFound(f"{failed}: it does not exist")
        if code == 401:
            return Denied(f"{failed}: the Google credentials are refused or have expired; {_LOGIN}")
        if code == 403:
            return Denied(f"{failed}: access denied ({_said(error)}); {self._grant(writing)}")
        if 0 < code < 400 or isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
            what = "not the service has answered: no JSON (a proxy, or a login page?)"
            return Transient(f"{failed}: {what}; try again later")
        raw = import_module("urllib3.exceptions").HTTPError  # of a body read as it is stored
        away = (requests.RequestException, raw, ConnectionError, TimeoutError)
        if code in (408, 429) or code >= 500 or isinstance(error, away):
            silent = no_answer(error) if isinstance(error, away) and not code else ""
            if silent:
                return Transient(f"{failed}: {silent}{self.patience.told()}; try again later")
            return Transient(
                f"{failed}: the service does not answer as it should{self.patience.told()} "
                f"({_said(error)}); try again later"
            )
        return StoreError(f"{failed}: {_said(error)}") if code else None

    def _grant(self, writing: bool) -> str:
        role = "roles/storage.objectUser" if writing else "roles/storage.objectViewer"
        where = f"gcloud storage buckets add-iam-policy-binding gs://{self.bucket}"
        return f"grant {role} to this identity: {where} --member=MEMBER --role={role}"


def _status(error: Any) -> int:
    # What the retries give up on is the media layer's error, which the library wraps elsewhere.
    response = getattr(error, "response", None)
    return int(getattr(error, "code", None) or getattr(response, "status_code", None) or 0)


def _no_bucket(error: Exception) -> bool:
    return "bucket does not exist" in str(error)


def _forgotten(error: Any) -> bool:
    """An upload session that the service does not know any more: it is begun again."""
    return error.code in (404, 410) and "upload_id=" in str(error)


def _mismatch(error: Any) -> bool:
    return bool(error.code == 400 and "match calculated" in str(error))


def _said(error: Exception) -> str:
    """What the service said, without the URL that the library puts before it."""
    listed = getattr(error, "errors", None)
    if listed and isinstance(listed[0], dict) and listed[0].get("message"):
        return str(listed[0]["message"]).splitlines()[0][:200]
    text = getattr(getattr(error, "response", None), "text", "")
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(text)["error"]["message"]).splitlines()[0][:200]
    return first_line(error)


def _crc32c(file: BinaryIO, size: int) -> str:
    checksum = import_module("google_crc32c").Checksum()
    while size and (piece := file.read(min(size, 1 << 20))):
        checksum.update(piece)
        size -= len(piece)
    return base64.b64encode(checksum.digest()).decode()


class _Summing:
    """A file to write to that knows the crc32c of what was written."""

    def __init__(self, file: BinaryIO | _Unpacking) -> None:
        self._file = file
        self._checksum = import_module("google_crc32c").Checksum()

    @property
    def crc32c(self) -> str:
        return base64.b64encode(self._checksum.digest()).decode()

    def write(self, data: bytes) -> int:
        self._checksum.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


class _Unpacking:
    """A file to write gzip to; `file` gets what is in it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._member = _gunzip()
        self._written = False
        self._wrong = ""

    def write(self, data: bytes) -> int:
        left = data
        while left and not self._wrong:
            if self._member.eof:  # gzip may hold several, and zeros behind the last one
                left = left.lstrip(b"\0")
                if not left:
                    break
                self._member = _gunzip()
            try:
                self._file.write(self._member.decompress(left))
            except zlib.error as error:
                self._wrong = f"is no whole gzip ({first_line(error)})"
            left, self._written = self._member.unused_data, True
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def wrong(self) -> str:
        """What is wrong with all that was written, empty: nothing."""
        cut = self._written and not self._member.eof
        return self._wrong or ("is no whole gzip (it ends too early)" if cut else "")


def _gunzip() -> Any:
    return zlib.decompressobj(16 + zlib.MAX_WBITS)
