"""The same services over gRPC: Vertex jobs, Logging, Secret Manager.

Messages and packages are those of the installed client libraries, and every call ends in the very
function that answers REST. Not served: Cloud Storage, whose clients ask by REST.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Optional

from launcher.google import library
from launcher.rehearsal.faults import Fault
from launcher.rehearsal.google import Google
from launcher.rehearsal.http import HttpError, name
from launcher.rehearsal.routes import Method

grpc = library("grpc")
_THREADS = 8
#: How a broken connection looks to a client of gRPC.
_BROKEN = "UNAVAILABLE", "the rehearsal cut the connection"


class Rpc:
    """A gRPC server without encryption on 127.0.0.1, beside `google` and with its faults. A context
    manager; `address` is valid at once. A request is "GRPC /SERVICE/METHOD" to a fault schedule."""

    def __init__(self, google: Google, port: int = 0) -> None:
        self._google = google
        self._server = grpc.server(ThreadPoolExecutor(_THREADS))
        for service, methods in (
            ("JobService", google.vertex.methods),
            ("LoggingServiceV2", google.logging.methods),
            ("SecretManagerService", google.secrets.methods),
        ):
            for method in methods:
                self._server.add_generic_rpc_handlers((self._handler(service, method),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"

    def __enter__(self) -> Rpc:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._server.stop(grace=None).wait()

    def _handler(self, service: str, method: Method) -> Any:
        package = method.message.pb(method.message()).DESCRIPTOR.file.package
        handler = grpc.unary_unary_rpc_method_handler(
            self._answering(f"/{package}.{service}/{method.name}", method),
            request_deserializer=method.message.deserialize,
            response_serializer=_serialized,
        )
        return grpc.method_handlers_generic_handler(f"{package}.{service}", {method.name: handler})

    def _answering(self, path: str, method: Method) -> Callable[[Any, Any], Any]:
        def answer(asked: Any, context: Any) -> Any:
            fault = self._google.faults.next(f"GRPC {path}")
            _before(fault, context, self._google)
            self._google.vertex.advance()
            try:
                made = method.act(asked)
            except HttpError as error:
                _abort(context, name(error.status), str(error))
            if fault is not None and fault.kind in ("cut_after", "cut_download"):
                _abort(context, *_BROKEN)
            return made

        return answer


def _before(fault: Optional[Fault], context: Any, google: Google) -> None:
    """What goes wrong before the request is applied."""
    if fault is None:
        return
    if fault.kind == "slow":
        google.clock.sleep(fault.seconds)
    if fault.kind == "status":
        words = f"the rehearsal answers {fault.status} to this request"
        _abort(context, name(fault.status), words)
    if fault.kind in ("cut_before", "cut_upload", "page"):  # what makes a page speaks no gRPC
        _abort(context, *_BROKEN)


def _abort(context: Any, code: str, words: str) -> None:
    """End the call; does not return."""
    context.abort(getattr(grpc.StatusCode, code), words)


def _serialized(message: Any) -> bytes:
    """Of the libraries' own messages and of plain ones (Empty, Operation)."""
    made = type(message)
    return bytes(made.serialize(message) if hasattr(made, "pb") else message.SerializeToString())
