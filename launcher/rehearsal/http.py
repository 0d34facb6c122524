"""A small threaded HTTP/1.1 server on 127.0.0.1 that all rehearsal services share.

It reads a request whole, asks the fault schedule, calls the service and writes the answer. What a
path means is the service's business.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.parse
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional

from launcher.clock import Clock, SystemClock
from launcher.rehearsal.faults import Fault, Schedule, Script

_PIECE = 1 << 20
#: Bytes of one header.
_LONGEST = 1 << 16
_BODILESS = (204, 304)
#: What Google's services call an error; `status` of the error body.
_NAMES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    409: "ALREADY_EXISTS", 412: "FAILED_PRECONDITION", 416: "OUT_OF_RANGE",
    429: "RESOURCE_EXHAUSTED", 499: "CANCELLED", 500: "INTERNAL", 501: "UNIMPLEMENTED",
    503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip
_REASONS = {
    401: "authError", 403: "forbidden", 404: "notFound", 409: "conflict", 412: "conditionNotMet",
    416: "requestedRangeNotSatisfiable", 429: "rateLimitExceeded", 503: "backendError",
}  # fmt: skip


@dataclass
class Request:
    """`path` is as sent, still percent-encoded: a name may hold an encoded slash."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes
    base: str  # http://127.0.0.1:PORT, as this client knows the server
    fault: Optional[Fault] = None
    cut: bool = False  # the connection broke before the end of the body

    def arg(self, name: str, default: str = "") -> str:
        """A query parameter, decoded; the last one if it is given several times."""
        return self.query.get(name, [default])[-1]

    def number(self, name: str) -> Optional[int]:
        """A query parameter that is a whole number. Errors: `HttpError` 400."""
        text = self.arg(name)
        try:
            return int(text) if text else None
        except ValueError:
            raise HttpError(400, f"Invalid value for {name}: {text!r}") from None

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body is {}. Errors: `HttpError` 400."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError:
            raise HttpError(400, "Parse Error: the body is not JSON") from None
        if not isinstance(value, dict):
            raise HttpError(400, "Parse Error: the body is not a JSON object")
        return value


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HttpError(Exception):
    """Raised by a service: the error body that Google's services send."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.response = error(status, message, reason)


def answer(value: Any, status: int = 200) -> Response:
    """A JSON answer."""
    body = json.dumps(value, ensure_ascii=False).encode()
    return Response(status, body, {"Content-Type": "application/json; charset=UTF-8"})


def error(status: int, message: str, reason: str = "") -> Response:
    """The error body of Google's REST services, in the old form and the new one at once."""
    reason = reason or _REASONS.get(status, "invalid" if status < 500 else "backendError")
    detail = {"message": message, "domain": "global", "reason": reason}
    body = {"code": status, "message": message, "status": name(status), "errors": [detail]}
    return answer({"error": body}, status)


def name(status: int) -> str:
    """What Google's services call an HTTP status: a name of google.rpc.Code."""
    return _NAMES.get(status, "UNKNOWN")


class Server:
    """`handle` is called once a request, from several threads. A context manager; `url` is valid
    at once, and the same after `stop` and a new server with `port`.

    `log` holds (method, target as sent, status) of the latest requests; status 0: cut."""

    def __init__(
        self,
        handle: Callable[[Request], Response],
        *,
        port: int = 0,
        faults: Schedule | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.handle, self.clock = handle, clock or SystemClock()
        self.faults: Schedule = faults if faults is not None else Script()
        self.log: deque[tuple[str, str, int]] = deque(maxlen=100_000)
        self._open: set[socket.socket] = set()
        self._http = _Threads(("127.0.0.1", port), _Connection)
        self._http.owner = self
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Server:
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def stop(self) -> None:
        """Refuse new connections and cut the open ones, as a process that dies does."""
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
            self._thread = None
        self._http.server_close()
        for connection in list(self._open):
            _cut(connection)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    owner: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)  # a client that went away is no error


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Threads
    raw_requestline: bytes

    def setup(self) -> None:
        super().setup()
        self.server.owner._open.add(self.connection)

    def parse_request(self) -> bool:
        """The request line and the headers. The standard library reads them as a mail, and compiles
        the boundary of each multipart body: more work than most answers."""
        self.requestline = self.raw_requestline.decode("latin-1").rstrip("\r\n")
        words = self.requestline.split()
        self.request_version = self.protocol_version  # of the answer, if it is an error
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            self.send_error(HTTPStatus.BAD_REQUEST, f"Bad request ({self.requestline!r})")
            return False
        self.command, self.path, self.request_version = words
        self.headers = Message()
        while line := self.rfile.readline(_LONGEST).rstrip(b"\r\n"):
            field, _, value = line.decode("latin-1").partition(":")
            self.headers[field] = value.strip()
        wish, old = self.headers.get("Connection", "").lower(), words[2] == "HTTP/1.0"
        self.close_connection = wish == "close" or (old and wish != "keep-alive")
        if self.headers.get("Expect", "").lower() == "100-continue":
            return self.handle_expect_100()
        return True

    def finish(self) -> None:
        self.server.owner._open.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def _serve(self) -> None:
        owner = self.server.owner
        path, _, query = self.path.partition("?")
        asked = f"{self.command} {urllib.parse.unquote(path)}{'?' + query if query else ''}"
        fault = owner.faults.next(asked)
        response = self._respond(path, query, fault)
        # Before the answer leaves: who has it may look.
        owner.log.append((self.command, self.path, response.status if response else 0))
        if response is not None:
            self._write(response, fault)
        else:
            _cut(self.connection)
            self.close_connection = True

    def _respond(self, path: str, query: str, fault: Fault | None) -> Response | None:
        """None: the connection is to be cut."""
        owner, kind = self.server.owner, fault.kind if fault else ""
        if kind == "cut_before":
            return None
        limit = fault.at_bytes if fault and kind == "cut_upload" else None
        body = self._body(limit)
        if fault and kind == "slow":
            owner.clock.sleep(fault.seconds)
        if fault and kind == "status":
            return error(fault.status, f"the rehearsal answers {fault.status} to this request")
        if kind == "page":
            return Response(
                200, b"<html>Log in to use this network.</html>", {"Content-Type": "text/html"}
            )
        host = self.headers.get("Host") or f"127.0.0.1:{owner.port}"
        fields = urllib.parse.parse_qs(query, keep_blank_values=True)
        request = Request(
            self.command, path, fields, self.headers, body, f"http://{host}", fault,
            cut=kind == "cut_upload",
        )  # fmt: skip
        try:
            response = owner.handle(request)
        except HttpError as raised:
            response = raised.response
        return None if kind in ("cut_after", "cut_upload") else response

    def _body(self, limit: int | None) -> bytes:
        pieces = bytearray()
        for size in self._sizes():
            while size:
                want = size if limit is None else min(size, limit - len(pieces))
                piece = self.rfile.read(min(want, _PIECE)) if want else b""
                pieces += piece
                size -= len(piece)
                if limit is not None and len(pieces) >= limit:
                    return bytes(pieces)
                if not piece:
                    raise ConnectionResetError("the client went away in the middle of a body")
        return bytes(pieces)

    def _sizes(self) -> Any:
        """The sizes of the pieces of the body that come next on the connection."""
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            yield int(self.headers.get("Content-Length") or 0)
            return
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield size
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _write(self, response: Response, fault: Fault | None) -> None:
        status, body = response.status, response.body
        date = formatdate(self.server.owner.clock.now(), usegmt=True)
        headers = {"Date": date, "Content-Length": str(len(body)), **response.headers}
        if status in _BODILESS:
            headers.pop("Content-Length")
            body = b""
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "-"
        head = f"HTTP/1.1 {status} {phrase}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        if fault and fault.kind == "cut_download":
            # Never all of it: the client would take the answer, and only its next request on this
            # connection would fail, or not, as fast as the end of the connection arrives.
            if body:
                sent = body[: min(fault.at_bytes, len(body) - 1)]
                self.wfile.write(head.encode("latin-1") + sent)
            _cut(self.connection)
            self.close_connection = True
            return
        self.wfile.write(head.encode("latin-1") + (b"" if self.command == "HEAD" else body))

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = _serve  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
