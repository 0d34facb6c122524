"""The JSON API of Google Cloud Storage on 127.0.0.1: buckets, objects, uploads, preconditions.

    with GcsServer() as server:        # os.environ["STORAGE_EMULATOR_HOST"] = server.url
        server.objects.create_bucket("runs", {})

What the service keeps is in gcs_state.py; here are the routes. Not served: access lists, versions,
notifications, encryption keys, the XML API.
"""

from __future__ import annotations

import base64
import email
import gzip
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.clock import Clock
from launcher.rehearsal.faults import Schedule
from launcher.rehearsal.gcs_state import GRAIN, Conditions, Objects, Upload, crc32c, linked
from launcher.rehearsal.http import HttpError, Request, Response, Server, answer, error

_PREFIX = re.compile(r"/(?:(upload|resumable/upload|download|batch)/)?storage/v1(?:/|$)")
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_WANTED = re.compile(r"bytes=(\d*)-(\d*)$")


class GcsServer(Server):
    """A server with its state in `objects`. `folder`: the state outlives the process there."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        port: int = 0,
        faults: Schedule | None = None,
        clock: Clock | None = None,
        limit_writes: bool = False,
    ) -> None:
        self.objects = Objects(folder, clock=clock, limit_writes=limit_writes)
        handle = Gcs(self.objects).handle
        super().__init__(handle, port=port, faults=faults, clock=clock)

    def __enter__(self) -> GcsServer:
        self.start()
        return self


class Gcs:
    """The routes over a state; one request at a time."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    def handle(self, request: Request) -> Response:
        """Answer one request. Errors: `HttpError`."""
        match = _PREFIX.match(request.path)
        if match is None:
            raise HttpError(404, f"Not Found: {request.path}")
        kind = (match.group(1) or "").rpartition("/")[2]
        parts = [urllib.parse.unquote(part) for part in request.path[match.end() :].split("/")]
        with self.objects.lock:
            if kind == "batch":
                return self._batch(request)
            if parts[0] != "b":
                raise HttpError(404, f"Not Found: {request.path}")
            self._authorize(request, parts)
            if request.cut and not request.arg("upload_id"):
                return Response(500)  # never sent: the connection is gone, nothing was applied
            if kind == "upload":
                return self._upload(request, parts[1])
            if len(parts) < 3 or parts[2] != "o":
                return self._bucket(request, [part for part in parts[1:] if part])
            if len(parts) == 3:
                return self._list(request, parts[1])
            return self._object(request, parts[1], parts[3], parts[4:])

    def _authorize(self, request: Request, parts: list[str]) -> None:
        name = parts[1] if len(parts) > 1 else ""
        reading = request.method in ("GET", "HEAD")
        if name in self.objects.denied or (not reading and f"{name}:write" in self.objects.denied):
            verb = "storage.objects.get" if reading else "storage.objects.create"
            raise HttpError(
                403, f"the caller does not have {verb} access to the Google Cloud Storage object."
            )

    def _bucket(self, request: Request, parts: list[str]) -> Response:
        objects, method = self.objects, request.method
        if not parts:
            if method == "POST":
                wanted = request.json()
                return answer(objects.create_bucket(str(wanted.get("name", "")), wanted))
            prefix = request.arg("prefix")
            names = sorted(name for name in objects.buckets if name.startswith(prefix))
            found = [objects.buckets[name] for name in names]
            return answer({"kind": "storage#buckets", "items": found})
        name, below = parts[0], parts[1:]
        bucket = objects.bucket(name)
        if below == ["storageLayout"]:
            layout = {key: bucket[key] for key in ("location", "locationType")}
            flat = {"hierarchicalNamespace": {"enabled": False}}
            return answer({"kind": "storage#storageLayout", "bucket": name, **layout, **flat})
        if below == ["iam"]:
            bound = objects.policies.get(name, [])
            return answer(
                {"kind": "storage#policy", "version": 1, "etag": "CAE=", "bindings": bound}
            )
        if below == ["iam", "testPermissions"]:
            lacking = objects.lacking.get(name, set())
            asked = [one for one in request.query.get("permissions", []) if one not in lacking]
            return answer({"kind": "storage#testIamPermissionsResponse", "permissions": asked})
        if below:
            raise HttpError(404, f"Not Found: {request.path}")
        if method == "DELETE":
            objects.delete_bucket(name)
            return Response(204)
        if method in ("PATCH", "PUT"):
            return answer(objects.patch_bucket(name, request.json()))
        return answer(bucket)

    def _list(self, request: Request, bucket: str) -> Response:
        prefix, delimiter = request.arg("prefix"), request.arg("delimiter")
        most = min(request.number("maxResults") or 1000, 1000)
        token = request.arg("pageToken")
        after = base64.urlsafe_b64decode(token).decode() if token else ""
        start, end = request.arg("startOffset"), request.arg("endOffset")
        rows: dict[str, str | None] = {}  # name or common prefix -> object name, None for a prefix
        common = set()
        for name in self.objects.names(bucket):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            at = name.find(delimiter, len(prefix)) if delimiter else -1
            row = name if at < 0 else name[: at + len(delimiter)]
            common |= {row} if at >= 0 else set()
            if row > after and (at < 0 or row not in rows):
                rows[row] = name if at < 0 else None
            if row == name and at >= 0 and request.arg("includeTrailingDelimiter") == "true":
                rows[row] = name
        page, more = list(rows)[:most], len(rows) > most
        found = [rows[row] for row in page]
        metas = [self.objects.get(bucket, name) for name in found if name is not None]
        body: dict[str, Any] = {"kind": "storage#objects"}
        body["items"] = [linked(meta, request.base) for meta in metas]
        body["prefixes"] = [row for row in page if row in common]
        if more:
            body["nextPageToken"] = base64.urlsafe_b64encode(page[-1].encode()).decode()
        return answer({key: value for key, value in body.items() if value})

    def _object(self, request: Request, bucket: str, name: str, below: list[str]) -> Response:
        objects, method = self.objects, request.method
        if below:
            return self._copy(request, bucket, name, below)
        generation = request.number("generation")
        if method == "GET" or method == "HEAD":
            meta = objects.get(bucket, name, generation)
            _conditions(request).check(meta, reading=True)
            if request.arg("alt") == "media":
                return self._media(request, meta)
            seen = linked(meta, request.base)
            if request.fault and request.fault.kind == "corrupt":
                seen["crc32c"] = crc32c(seen["crc32c"].encode())
            return answer(seen)
        if method == "DELETE":
            _conditions(request).check(objects.get(bucket, name, generation))
            objects.delete(bucket, name)
            return Response(204)
        if method in ("PATCH", "PUT"):
            _conditions(request).check(objects.get(bucket, name, generation))
            made = objects.patch(bucket, name, request.json(), replace=method == "PUT")
            return answer(linked(made, request.base))
        raise HttpError(404, f"Not Found: {method} {request.path}")

    def _media(self, request: Request, meta: Mapping[str, Any]) -> Response:
        content = self.objects.content(meta["bucket"], meta["name"])
        size = len(content)
        hashes = [f"crc32c={meta['crc32c']}"]
        hashes += [f"md5={meta['md5Hash']}"] if "md5Hash" in meta else []
        headers = {
            "Content-Type": meta["contentType"],
            "X-Goog-Hash": ",".join(hashes),
            "X-Goog-Generation": meta["generation"],
            "X-Goog-Metageneration": meta["metageneration"],
            "X-Goog-Stored-Content-Length": str(size),
            "X-Goog-Stored-Content-Encoding": "identity",
            "X-Goog-Storage-Class": meta["storageClass"],
            "ETag": meta["etag"],
            "Accept-Ranges": "bytes",
        }
        packed = meta.get("contentEncoding") == "gzip"
        if packed:
            headers["X-Goog-Stored-Content-Encoding"] = "gzip"
        if packed and "gzip" not in request.headers.get("Accept-Encoding", ""):
            # The service unpacks it, whatever range was asked; hashes are of what it stores.
            return Response(200, gzip.decompress(content), headers)
        if "contentEncoding" in meta:
            headers["Content-Encoding"] = meta["contentEncoding"]
        harm = _damaged if request.fault and request.fault.kind == "corrupt" else bytes
        wanted = _WANTED.match(request.headers.get("Range", ""))
        if wanted is None or wanted.groups() == ("", ""):
            return Response(200, harm(content), headers)
        first, last = wanted.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            beyond = error(416, "Request range not satisfiable")
            beyond.headers["Content-Range"] = f"bytes */{size}"
            return beyond
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Response(206, harm(content[start:stop]), headers)

    def _copy(self, request: Request, bucket: str, name: str, below: list[str]) -> Response:
        objects = self.objects
        if below == ["iam"]:
            return answer({"kind": "storage#policy", "version": 1, "bindings": []})
        if below == ["compose"]:
            return self._compose(request, bucket, name)
        act = below[0]
        if act in ("rewriteTo", "copyTo") and len(below) == 5:
            to_bucket, to_name = below[2], below[4]
        elif act == "moveTo" and len(below) == 3:
            to_bucket, to_name = bucket, below[2]
        else:
            raise HttpError(404, f"Not Found: {request.path}")
        meta = objects.get(bucket, name, request.number("sourceGeneration"))
        _conditions(request, "ifSource").check(meta)
        content = objects.content(bucket, name)
        said = {key: value for key, value in meta.items() if key not in ("crc32c", "md5Hash")}
        said |= {key: value for key, value in request.json().items() if key not in ("name", "etag")}
        made = objects.insert(to_bucket, to_name, content, said, _conditions(request))
        if act == "moveTo":
            objects.delete(bucket, name)
        seen = linked(made, request.base)
        if act != "rewriteTo":
            return answer(seen)
        sizes = {"totalBytesRewritten": seen["size"], "objectSize": seen["size"]}
        return answer({"kind": "storage#rewriteResponse", "done": True, **sizes, "resource": seen})

    def _compose(self, request: Request, bucket: str, name: str) -> Response:
        asked = request.json()
        pieces, components = [], 0
        for source in asked.get("sourceObjects", []):
            meta = self.objects.get(bucket, source["name"], int(source.get("generation", 0)))
            wanted = source.get("objectPreconditions", {}).get("ifGenerationMatch")
            Conditions(int(wanted) if wanted is not None else None).check(meta)
            components += int(meta.get("componentCount", 1))
            pieces.append(self.objects.content(bucket, source["name"]))
        if not 1 <= len(pieces) <= 32:
            raise HttpError(400, f"compose takes 1 to 32 source objects, got {len(pieces)}")
        made = self.objects.insert(
            bucket, name, b"".join(pieces), asked.get("destination", {}), _conditions(request),
            components=components,
        )  # fmt: skip
        return answer(linked(made, request.base))

    def _upload(self, request: Request, bucket: str) -> Response:
        if request.arg("upload_id"):
            return self._continue(request)
        self.objects.bucket(bucket)
        kind, name = request.arg("uploadType"), request.arg("name")
        if kind == "resumable":
            wanted = request.json()
            wanted.setdefault("contentType", request.headers.get("X-Upload-Content-Type"))
            name = name or str(wanted.get("name", ""))
            upload = self.objects.begin(bucket, _named(name), wanted, _conditions(request))
            query = urllib.parse.urlencode({"uploadType": "resumable", "upload_id": upload.id})
            where = f"{request.base}{request.path}?{query}"
            return Response(200, b"", {"Location": where, "X-GUploader-UploadID": upload.id})
        if kind == "multipart":
            said, kind_of, content = _two_parts(request.body)
            wanted = Request("", "", {}, request.headers, said, "").json()
            wanted.setdefault("contentType", kind_of)
        elif kind == "media":
            wanted, content = {"contentType": request.headers.get("Content-Type")}, request.body
        else:
            raise HttpError(400, f"Invalid upload type {kind!r}")
        name = _named(name or str(wanted.get("name", "")))
        _said_hashes(request, wanted)
        if request.fault and request.fault.kind == "corrupt":
            content = _damaged(content)
        made = self.objects.insert(bucket, name, content, wanted, _conditions(request))
        return answer(linked(made, request.base))

    def _continue(self, request: Request) -> Response:
        upload = self.objects.uploads.get(request.arg("upload_id"))
        if upload is None:
            raise HttpError(404, "No such upload: it is unknown, or over for more than a week")
        if request.method == "DELETE":
            del self.objects.uploads[upload.id]
            return Response(499)
        if upload.done is not None:
            return answer(linked(upload.done, request.base))
        match = _RANGE.match(request.headers.get("Content-Range", ""))
        start = int(match.group(1)) if match and match.group(1) else 0
        if match and match.group(3) != "*":
            upload.total = int(match.group(3))
        elif match is None:
            upload.total = len(request.body)  # all of it in one request
        asking = match is not None and match.group(1) is None
        if start > len(upload.received):
            raise HttpError(400, f"Invalid range: {len(upload.received)} bytes are here")
        if not asking:
            upload.received += request.body[len(upload.received) - start :]
        whole = upload.total is not None and len(upload.received) >= upload.total
        if whole and not request.cut:
            return self._finish(request, upload)
        del upload.received[len(upload.received) // GRAIN * GRAIN :]
        self.objects.save_upload(upload)
        kept = len(upload.received)
        return Response(308, b"", {"Range": f"bytes=0-{kept - 1}"} if kept else {})

    def _finish(self, request: Request, upload: Upload) -> Response:
        _said_hashes(request, upload.wanted)
        content = bytes(upload.received[: upload.total])
        if request.fault and request.fault.kind == "corrupt":
            content = _damaged(content)
        upload.done = self.objects.insert(
            upload.bucket, upload.name, content, upload.wanted, upload.conditions
        )
        upload.received.clear()
        self.objects.save_upload(upload)
        return answer(linked(upload.done, request.base))

    def _batch(self, request: Request) -> Response:
        kind = request.headers.get("Content-Type", "")
        head = f"Content-Type: {kind}\r\n\r\n".encode()
        pieces = []
        for part in email.message_from_bytes(head + request.body).walk():
            if part.get_content_type() != "application/http":
                continue
            first, _, rest = str(part.get_payload()).lstrip().partition("\n")
            inner = email.message_from_string(rest)
            method, target, *_ = first.split()
            path, _, query = urllib.parse.urlsplit(target)[2], "", urllib.parse.urlsplit(target)[3]
            body = str(inner.get_payload()).strip().encode()
            fields = urllib.parse.parse_qs(query, keep_blank_values=True)
            try:
                done = self.handle(Request(method, path, fields, inner, body, request.base))
            except HttpError as raised:
                done = raised.response
            number = part.get("Content-ID", "").strip("<>")
            pieces.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n"
                f"\r\nHTTP/1.1 {done.status} -\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(done.body)}\r\n\r\n{done.body.decode()}\r\n"
            )
        text = "".join(pieces) + "--batch--\r\n"
        return Response(200, text.encode(), {"Content-Type": "multipart/mixed; boundary=batch"})


def _conditions(request: Request, start: str = "if") -> Conditions:
    # The Python client spells the last one with a capital G in uploads.
    other = request.number(f"{start}MetaGenerationNotMatch")
    last = request.number(f"{start}MetagenerationNotMatch")
    return Conditions(
        request.number(f"{start}GenerationMatch"),
        request.number(f"{start}GenerationNotMatch"),
        request.number(f"{start}MetagenerationMatch"),
        other if last is None else last,
    )


def _two_parts(body: bytes) -> tuple[bytes, str | None, bytes]:
    """Metadata, type and content of a multipart body. Clients disagree about quotes around the
    boundary and about line ends, so both are taken from the body itself."""
    line, _, _ = body.partition(b"\n")
    end = b"\r\n" if line.endswith(b"\r") else b"\n"
    mark = line.rstrip(b"\r")
    pieces = body[len(mark) :].split(end + mark)
    if not mark.startswith(b"--") or len(pieces) < 3:
        raise HttpError(400, "Parse Error: the body is not multipart/related with two parts")
    said = pieces[0].partition(end * 2)[2]
    head, _, content = (end + mark).join(pieces[1:-1]).partition(end * 2)
    return said, email.message_from_bytes(head.strip() + b"\n\n")["Content-Type"], content


def _said_hashes(request: Request, wanted: dict[str, Any]) -> None:
    for said in request.headers.get("X-Goog-Hash", "").split(","):
        kind, _, value = said.strip().partition("=")
        if kind in ("crc32c", "md5"):
            wanted["crc32c" if kind == "crc32c" else "md5Hash"] = value


def _named(name: str) -> str:
    if not name or len(name.encode()) > 1024 or "\n" in name or "\r" in name:
        raise HttpError(400, "Invalid object name: 1 to 1024 bytes of UTF-8, no line break")
    return name


def _damaged(content: bytes) -> bytes:
    return bytes([content[0] ^ 255]) + content[1:] if content else b"?"
