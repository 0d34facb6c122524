"""s3:// on boto3, for Amazon S3 and what speaks its protocol (AWS_ENDPOINT_URL_S3).

Credentials and region are found as the official tools find them. Retries are botocore's standard
mode, as many as fit into `Patience`; added to them: a lost reply of create-once, two creations at
once, and downloads that break off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib import import_module
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

#: Files above this size are sent in parts of it.
PART_BYTES = 32 << 20
_PIECE = 1 << 20
_CONFLICTS = 5  # how often a creation that met another one at that moment is sent again
_LOGIN = "give some: aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_REFUSED = {
    "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken",
    "SignatureDoesNotMatch", "TokenRefreshRequired", "401",
}  # fmt: skip
_BUSY = {
    "InternalError", "RequestTimeout", "RequestTimeTooSkewed", "ServiceUnavailable", "SlowDown",
    "Throttling", "ThrottlingException", "TooManyRequests", "OperationAborted",
}  # fmt: skip


def open_uri(uri: str, again: bool = True) -> S3Store:
    """The store at s3://BUCKET/FOLDER; the rest of the name is taken as it is. Errors: `StoreError`
    for a URI without a bucket."""
    return S3Store(uri, None if again else ONCE)


class S3Store(RemoteStore):
    """Values are objects. `part_bytes`: at least 5 MiB, which is the service's limit."""

    scheme = "s3"

    def __init__(
        self, uri: str, patience: Patience | None = None, *, part_bytes: int = PART_BYTES
    ) -> None:
        super().__init__(uri, patience)
        self.part_bytes = part_bytes
        self._bucket_is_there = False

    def _connect(self) -> Any:
        try:
            boto3, config = import_module("boto3"), import_module("botocore.config")
        except ImportError as error:
            raise StoreError(
                f"{self.uri}: s3:// needs boto3; install it: pip install 'launch-llm[s3]'"
            ) from error
        retries = {"mode": "standard", "total_max_attempts": self._attempts()}
        settings = config.Config(retries=retries, connect_timeout=10, read_timeout=60)
        try:
            # A session of our own: the module's default one is not safe to share between threads.
            return boto3.session.Session().client("s3", config=settings)
        except (import_module("botocore.exceptions").BotoCoreError, ValueError) as error:
            raise StoreError(f"{self.uri}: {first_line(error)}") from error

    def _attempts(self) -> int:
        """How many fit: waits double from the first to the longest, at most 20 s in botocore."""
        patience, attempts, spent, wait = self.patience, 1, 0.0, self.patience.first
        while patience.total > 0 and spent + wait <= patience.total:
            attempts, spent = attempts + 1, spent + wait
            wait = min(wait * 2, patience.longest, 20.0)
        return attempts

    def _send(self, name: str, content: Content, writer: str | None) -> None:
        metadata = {SHA256: content.sha256, **({WRITER: writer} if writer else {})}
        if writer is not None:
            return self._create(name, content, metadata)
        if content.size <= self.part_bytes:
            with content.open() as file:
                data = file.read()
            if hashlib.sha256(data).hexdigest() != content.sha256:
                raise changed(content)
            self.client.put_object(Bucket=self.bucket, Key=name, Body=data, Metadata=metadata)
        else:
            transfer = import_module("boto3.s3.transfer")
            config = transfer.TransferConfig(
                multipart_threshold=self.part_bytes,
                multipart_chunksize=self.part_bytes,
                max_concurrency=4,
            )
            with content.open() as file:
                self.client.upload_fileobj(
                    file, self.bucket, name, ExtraArgs={"Metadata": metadata}, Config=config
                )
        self._same(name, content)
        return None

    def _create(self, name: str, content: Content, metadata: Mapping[str, str]) -> None:
        client_error = import_module("botocore.exceptions").ClientError
        with content.open() as file:
            data = file.read()
        for left in reversed(range(_CONFLICTS)):
            try:
                self.client.put_object(
                    Bucket=self.bucket, Key=name, Body=data, Metadata=metadata, IfNoneMatch="*"
                )
                return
            except client_error as error:
                if _code(error) == "PreconditionFailed" or _status(error) == 412:
                    raise Exists from error
                if _code(error) != "ConditionalRequestConflict" or not left:
                    raise

    def _same(self, name: str, content: Content) -> None:
        """What the service holds is what was measured before."""
        if not content.source:
            return
        size, metadata = self._look(name)
        if size != content.size or metadata.get(SHA256) != content.sha256:
            raise changed(content)

    def _receive(self, name: str, into: BinaryIO) -> None:
        errors = import_module("botocore.exceptions")
        found = self.client.get_object(Bucket=self.bucket, Key=name)
        digest = hashlib.sha256()
        try:
            for piece in found["Body"].iter_chunks(_PIECE):
                digest.update(piece)
                into.write(piece)
        except (
            errors.ResponseStreamingError,
            errors.IncompleteReadError,
            errors.ReadTimeoutError,
            errors.FlexibleChecksumError,
        ) as error:
            raise Damaged(first_line(error)) from error
        known = found.get("Metadata", {}).get(SHA256)
        if known and known != digest.hexdigest():
            raise Damaged(f"sha256 {digest.hexdigest()} instead of {known}")

    def _look(self, name: str) -> tuple[int, Mapping[str, str]]:
        try:
            found = self.client.head_object(Bucket=self.bucket, Key=name)
        except import_module("botocore.exceptions").ClientError as error:
            # The answer to HEAD has no body that would say which of the two is missing.
            if _status(error) == 404 and not self._bucket_is_there:
                self.client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)
                self._bucket_is_there = True
            raise
        return int(found["ContentLength"]), found.get("Metadata", {})

    def _listed(self, prefix: str) -> Iterable[Entry]:
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                mark = f"{item['ETag']} {item['LastModified'].isoformat()}"
                yield Entry(item["Key"], int(item["Size"]), mark)

    def _remove(self, name: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=name)

    def _meaning(
        self, error: Exception, failed: str, name: str, writing: bool
    ) -> StoreError | None:
        errors = import_module("botocore.exceptions")
        boto3 = import_module("boto3.exceptions")
        cause = error.__cause__ or error.__context__
        if isinstance(error, boto3.Boto3Error) and isinstance(cause, Exception):
            return self._meaning(cause, failed, name, writing)  # the transfer manager wraps
        missing = (errors.NoCredentialsError, errors.PartialCredentialsError)
        if isinstance(error, missing) or _code(error) in _REFUSED:
            return Denied(f"{failed}: no AWS credentials, or they are refused or over; {_LOGIN}")
        code, status = _code(error), _status(error)
        if code == "NoSuchBucket":
            make = f"aws s3 mb s3://{self.bucket}"
            return StoreError(
                f"{failed}: there is no bucket {self.bucket}; correct the name, or make it: {make}"
            )
        if code == "NoSuchKey" or status == 404:
            return NotFound(f"{failed}: it does not exist")
        if status == 403:
            right = "s3:PutObject and s3:DeleteObject" if writing else "s3:GetObject"
            return Denied(
                f"{failed}: access denied ({_said(error)}); grant {right}, and s3:ListBucket, on "
                f"the bucket {self.bucket} to this identity"
            )
        away = isinstance(error, (errors.HTTPClientError, errors.ConnectionError))
        if away and (silent := no_answer(error)):
            text = f"{failed}: {silent}, asked {self._attempts()} times; try again later"
            return Transient(text)
        if away or code in _BUSY or status == 429 or status >= 500:
            return Transient(
                f"{failed}: the service does not answer as it should, asked {self._attempts()} "
                f"times ({_said(error)}); try again later"
            )
        known = (errors.BotoCoreError, errors.ClientError, boto3.Boto3Error)
        return StoreError(f"{failed}: {_said(error)}") if isinstance(error, known) else None


def _code(error: Exception) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _status(error: Exception) -> int:
    found = getattr(error, "response", {}).get("ResponseMetadata", {})
    return int(found.get("HTTPStatusCode", 0))


def _said(error: Exception) -> str:
    message = getattr(error, "response", {}).get("Error", {}).get("Message", "")
    return str(message).splitlines()[0][:200] if message else first_line(error)
