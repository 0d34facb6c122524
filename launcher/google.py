"""What every Google backend shares: credentials, endpoints, and the signals that errors become.

The client libraries are imported on use. Endpoints are those of the service, or what the official
command line reads: CLOUDSDK_API_ENDPOINT_OVERRIDES_<SERVICE>, STORAGE_EMULATOR_HOST;
CLOUDSDK_AUTH_DISABLE_CREDENTIALS sends requests without credentials.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Optional

from launcher.errors import BadRequest, Denied, NoCapacity, QuotaFull, Signal, Transient
from trainer.store import no_answer

#: Seconds that one request may take.
TIMEOUT = 60.0
LOGIN = (
    "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS "
    "to the file of a service account"
)
_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
_RETRY_SOON, _RETRY_LATER = 2.0, 15.0
#: Where the official tools look for the project, in this order.
_PROJECT_VARIABLES = ("GOOGLE_CLOUD_PROJECT", "CLOUDSDK_CORE_PROJECT")
#: What a proxy, or the login page of a network, says in place of the service.
_NO_JSON = "not the service has answered: no JSON (a proxy, or a login page?)"
_TEMPORARY = {408, 409, 499, 500, 502, 503, 504}
_QUOTA = re.compile(
    r"quota metrics? exceeds? quota limits?:\s*([\w./, -]+)|quotas? (?:is|are) exceeded:\s*"
    r"([\w./, -]+)|quota exceeded for quota metric '([^']+)'",
    re.I,
)
_RATE = re.compile(r"per (minute|second|100 seconds)|rate.?limit|PerMinute", re.I)
_STOCK_OUT = re.compile(
    r"stock-?out|resources? (?:are|is) insufficient|insufficient (?:capacity|resources)|"
    r"not have enough (?:resources|capacity)|resource_pool_exhausted|"
    r"(?:machine type|accelerator|gpu)s? (?:is |are )?temporarily unavailable",
    re.I,
)
_NOT_THERE = re.compile(r"not (?:supported|available) in (?:the )?(?:region|location|zone)", re.I)
_OFF = re.compile(r"has not been used in project|it is disabled|SERVICE_DISABLED", re.I)
#: What the clients put before the words of the service.
_ADDRESS = re.compile(r"^[A-Z]+ https?://\S+: ")
_SERVICE = re.compile(r"\b([a-z]+\.googleapis\.com)\b")


def project_of(environ: Mapping[str, str]) -> Optional[str]:
    """The project that the environment names."""
    return next((environ[name] for name in _PROJECT_VARIABLES if environ.get(name)), None)


def library(name: str) -> Any:
    """A module of the Google clients. Errors: `BadRequest` when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadRequest(
            "python packages", f"{name} cannot be imported: {error}",
            "pip install 'launch-llm[google]'",
        ) from error  # fmt: skip


def endpoint(environ: Mapping[str, str], service: str, default: str) -> str:
    """The base URL of a service (`aiplatform`, `logging`, ...), without a slash at its end."""
    override = environ.get(f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}")
    return (override or default).rstrip("/")


def credentials(environ: Mapping[str, str]) -> Any:
    """The credentials of this machine, with the scope of the cloud platform; kept, so that a token
    is fetched once. Errors: `Denied` when there are none."""
    if environ.get("CLOUDSDK_AUTH_DISABLE_CREDENTIALS", "").lower() in ("1", "true", "yes"):
        return _anonymous()
    with signals("Google credentials", ""):
        try:
            return _default_credentials()
        except (PermissionError, IsADirectoryError) as error:  # what names them
            why = f"{error.filename}: {error.strerror}"
            raise Denied(f"Google credentials: {why}", LOGIN) from error


def session(environ: Mapping[str, str]) -> Any:
    """An HTTP session that carries the credentials and refreshes them."""
    return _session(credentials(environ))


def storage(environ: Mapping[str, str]) -> Any:
    """A client of Cloud Storage. Its project is not used: buckets are named without one."""
    return _storage(credentials(environ), environ.get("STORAGE_EMULATOR_HOST"))


def call(session: Any, method: str, url: str, what: str, place: str, **given: Any) -> Any:
    """One JSON request without a retry, its answer parsed. Errors: signals."""
    return dated(session, method, url, what, place, **given)[0]


def dated(
    session: Any, method: str, url: str, what: str, place: str, **given: Any
) -> tuple[Any, Optional[float]]:
    """As `call`, and when that was by the service's clock: UTC seconds, whole ones; None where it
    does not say. `given` goes to the session; `timeout` (seconds) may be in it. Errors: signals."""
    with signals(what, place):
        response = session.request(method, url, **{"timeout": TIMEOUT, **given})
        if response.status_code >= 400:
            raise library("google.api_core.exceptions").from_http_response(response)
        answer = response.json()
        if not isinstance(answer, dict):
            raise Transient(f"{what}: {_NO_JSON}", _RETRY_SOON)
    try:
        return answer, parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return answer, None


@contextmanager
def signals(what: str, place: str) -> Iterator[None]:
    """Turn what the clients raise into the signals of `launcher.errors`; `what` was being done."""
    try:
        yield
    except Exception as error:
        signal = signal_of(error, what, place)
        if signal is None:
            raise
        raise signal from error


def signal_of(error: Exception, what: str, place: str) -> Optional[Signal]:
    """The one signal for an error of a client; None for errors that are not theirs."""
    if isinstance(error, Signal):
        return error
    auth = library("google.auth.exceptions")
    if isinstance(error, auth.DefaultCredentialsError):
        if named := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            wrong = "does not exist" if not Path(named).exists() else "is no credentials file"
            return Denied(f"{what}: GOOGLE_APPLICATION_CREDENTIALS: {named} {wrong}", LOGIN)
        return Denied(f"{what}: there are no Google credentials on this machine", LOGIN)
    if isinstance(error, auth.TransportError):
        return Transient(f"{what}: {_away(error)}", _RETRY_SOON)
    if isinstance(error, auth.GoogleAuthError):
        _forget()
        if getattr(error, "retryable", False):
            return Transient(f"{what}: {one_line(error)}", _RETRY_SOON)
        text = f"{what}: the Google credentials are not accepted any more: {one_line(error)}"
        return Denied(text, LOGIN)
    if isinstance(error, library("google.api_core.exceptions").GoogleAPICallError):
        return _of_answer(error, what, place)
    unread = library("google.protobuf.json_format").ParseError
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, unread)):
        return Transient(f"{what}: {_NO_JSON}", _RETRY_SOON)
    retry_error = library("google.api_core.exceptions").RetryError
    if isinstance(error, (library("requests").RequestException, retry_error, ConnectionError)):
        return Transient(f"{what}: {_away(error)}", _RETRY_SOON)
    return None


def shortage(text: str, place: str) -> Optional[Signal]:
    """The signal when a text of the service tells of a quota or of missing machines, else None."""
    quota = _QUOTA.search(text)
    if quota and not _RATE.search(text):
        metric = next(group for group in quota.groups() if group).strip(" .,")
        return QuotaFull(place, metric.removeprefix("aiplatform.googleapis.com/"))
    if _STOCK_OUT.search(text) or _NOT_THERE.search(text):
        return NoCapacity(place, one_line(text))
    return None


def one_line(error: object) -> str:
    """The words of an error in one line of at most 300 characters."""
    words = " ".join(str(error).split())
    return words if len(words) <= 300 else f"{words[:297]}..."


def _away(error: Exception) -> str:
    return no_answer(error) or f"cannot be reached: {one_line(error)}"


def _of_answer(error: Any, what: str, place: str) -> Signal:
    code, text = int(error.code or 500), one_line(_ADDRESS.sub("", error.message))
    everything = f"{error.message} {error.reason or ''} {error.errors or ''}"
    if code in (400, 403, 429) and (short := shortage(text, place)) is not None:
        return short
    if code == 429 or (code == 403 and _RATE.search(everything)):
        wait = _after(error, _RETRY_LATER)
        return Transient(f"{what}: too many requests: {text}", wait, refused=True)
    if code < 400:  # of an upload: there is no session in it
        return Transient(f"{what}: {_NO_JSON}", _RETRY_SOON)
    if code in _TEMPORARY:
        return Transient(f"{what}: {code}: {text}", _after(error, _RETRY_SOON))
    if code == 401:
        return Denied(f"{what}: the credentials are not accepted: {text}", LOGIN)
    if code == 403 and _OFF.search(everything):
        found = _SERVICE.search(everything)
        service = found[1] if found else "the service's API"
        return Denied(f"{what}: {service} is off: {text}", f"gcloud services enable {service}")
    if code == 403 or "permission" in text.lower():
        return Denied(f"{what}: {text}", "docs/vertex.md lists the roles that are needed")
    return BadRequest(_field(error) or what, text)


def _field(error: Any) -> str:
    """The request's field that the service names, if any."""
    for detail in error.details or ():
        for violation in getattr(detail, "field_violations", ()):
            return str(violation.field)
    return ""


def _after(error: Any, default: float) -> float:
    """Seconds that the service asks to wait: RetryInfo, or the header Retry-After."""
    for detail in error.details or ():
        delay = getattr(detail, "retry_delay", None)
        if delay is not None:
            return float(delay.seconds + delay.nanos / 1e9) or default
    headers = getattr(error.response, "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdigit() else default


@functools.lru_cache(maxsize=1)
def _default_credentials() -> Any:
    # It warns of a project that nobody needs here: recipes and the environment name it.
    logging.getLogger("google.auth._default").setLevel(logging.ERROR)
    found, _ = library("google.auth").default(scopes=_SCOPES)
    return found


@functools.lru_cache(maxsize=1)
def _anonymous() -> Any:
    return library("google.auth.credentials").AnonymousCredentials()


@functools.lru_cache(maxsize=4)
def _storage(found: Any, emulator: Optional[str]) -> Any:
    # Else the library asks for the bucket's own facts in a thread, for traces that nobody records.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    options = {"api_endpoint": emulator.rstrip("/")} if emulator else None
    client = library("google.cloud.storage").Client
    return client(project="-", credentials=found, client_options=options)


@functools.lru_cache(maxsize=4)
def _session(found: Any) -> Any:
    return library("google.auth.transport.requests").AuthorizedSession(found)


def _forget() -> None:
    """After a refusal: somebody may log in again while this process waits."""
    _default_credentials.cache_clear()
    _session.cache_clear()
    _storage.cache_clear()
