"""A POST whose whole time is bounded: however slowly the other side answers, byte by byte too."""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Optional


def post(address: str, body: bytes, headers: Mapping[str, str], seconds: float) -> None:
    """Send `body`; its answer is what the status says. No redirect is followed: an address is meant
    as it is given. Errors: those of urllib and http.client; `ValueError`: no address."""
    request = urllib.request.Request(address, body, dict(headers), method="POST")
    with _Deadline(seconds) as deadline:
        opener = urllib.request.build_opener(_NoRedirect, _Http(deadline), _Https(deadline))
        try:
            with opener.open(request, timeout=seconds) as answer:
                # The end of a connection that was cut looks like that of the headers.
                if deadline.passed:
                    raise TimeoutError
                with suppress(OSError, http.client.HTTPException):
                    answer.read(1024)  # so that the other side sees a reader; it has answered
        except (OSError, http.client.HTTPException) as error:
            if deadline.passed:
                raise TimeoutError from error
            raise


class _Deadline:
    """Ends the connections that it was shown when its time is over."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._lock = threading.Lock()
        self._held: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._timer.cancel()
        with self._lock:
            for held in self._held:
                held.close()
            self._held.clear()

    def hold(self, connection: socket.socket) -> None:
        """A duplicate is held: TLS takes the first one's place, before it shakes hands."""
        with self._lock:
            self._held.append(connection.dup())
            if self.passed:
                self._end()

    def _cut(self) -> None:
        with self._lock:
            self.passed = True
            self._end()

    def _end(self) -> None:
        for held in self._held:
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)


class _Watched(http.client.HTTPConnection):
    """Shows its deadline the socket as soon as there is one."""

    def __init__(self, deadline: _Deadline, host: str, **given: Any) -> None:
        self._deadline = deadline
        super().__init__(host, **given)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "sock" and type(value) is socket.socket:
            self._deadline.hold(value)


class _WatchedTls(_Watched, http.client.HTTPSConnection):
    """The same over TLS."""


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Watched, self._deadline), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_WatchedTls, self._deadline), req)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What is told goes nowhere else."""

    def redirect_request(self, *args: Any, **given: Any) -> None:
        return None
