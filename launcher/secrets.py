"""Values of secrets, on their way to Secret Manager. They come from standard input, a file or a
variable, never from a command line, and are in no message, journal, log or state.

Secrets themselves are declared by `infra.google`, without a value.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from launcher import google
from launcher.errors import BadRequest, Transient, UsageError

#: The service takes no larger one.
LARGEST = 65536
_PROJECT = re.compile(r"[a-z][a-z0-9:.-]*")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,255}")


def set_value(project: str, name: str, value: str, environ: Mapping[str, str]) -> str:
    """Make `value` the newest version of the secret `name`, and say the version's number.

    One request, not repeated: a second one would be a second version, with the same value.
    Errors: `UsageError` for a value or a name that cannot be one, or a secret that is not there;
    `Transient` where the service does not confirm the value's checksum; other signals of
    `launcher.google`. None of them holds the value."""
    if not _PROJECT.fullmatch(project) or not _NAME.fullmatch(name):
        raise UsageError(
            f"secret {project}/{name}: is no name of a secret",
            "write letters, digits, - and _ for the name, and the id of a project",
        )
    data = _checked(name, value)
    what = f"secret {name} of project {project}"
    base = google.endpoint(environ, "secretmanager", "https://secretmanager.googleapis.com")
    crc32c = google.library("google_crc32c").value(data)
    payload = {"data": base64.b64encode(data).decode(), "dataCrc32c": str(crc32c)}
    url = f"{base}/v1/projects/{project}/secrets/{name}:addVersion"
    session = google.session(environ)
    try:
        answer = google.call(session, "POST", url, what, "", json={"payload": payload})
    except BadRequest as signal:
        # Not with the words of the service, which may repeat what was sent.
        raise _refused(signal, project, name) from None
    version = str(answer["name"]).rpartition("/")[2]
    if not answer.get("clientSpecifiedPayloadChecksum"):
        raise Transient(f"{what}: version {version} was made unchecked; give the value again")
    return version


def from_stream(stream: BinaryIO, name: str) -> str:
    """The value for the secret `name` from standard input, without the newline at its end."""
    return _text(stream.read(LARGEST + 3), name)


def from_file(path: Path, name: str) -> str:
    """The value for the secret `name` in a file, without the newline at its end. Errors:
    `UsageError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return from_stream(file, name)
    except OSError as error:
        what = f"secret {name}: {path}: {error.strerror or type(error).__name__}"
        raise UsageError(what, "name a file that holds the value and nothing else") from None


def from_variable(variable: str, name: str, environ: Mapping[str, str]) -> str:
    """The value for the secret `name` in a variable of the environment. Errors: `UsageError` when
    it is not set."""
    if variable not in environ:
        raise UsageError(
            f"secret {name}: the variable {variable} is not set",
            f"export {variable}, or give the value on standard input",
        )
    return environ[variable]


def _text(data: bytes, name: str) -> str:
    """Of an editor's or echo's newline at the end, no token is meant to have one."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise _unfit(name, "is not text in UTF-8") from None
    return text.removesuffix("\n").removesuffix("\r")


def _checked(name: str, value: str) -> bytes:
    """The value as it is sent: what a job can have in a variable."""
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise _unfit(name, "is not text in UTF-8") from None
    if not value.strip():
        raise _unfit(name, "is empty")
    if "\0" in value:
        raise _unfit(name, "holds a zero byte, which no variable can")
    if len(data) > LARGEST:
        raise _unfit(name, f"is larger than {LARGEST} bytes")
    return data


def _unfit(name: str, what: str) -> UsageError:
    return UsageError(f"secret {name}: the value {what}", "give the value itself, and nothing else")


def _refused(signal: BadRequest, project: str, name: str) -> UsageError:
    code = getattr(signal.__cause__, "code", None)
    if code == 404:
        return UsageError(
            f"project {project} has no secret {name}",
            f"`launch infra up` declares it where a recipe says secret-manager://{project}/{name}",
        )
    return UsageError(
        f"secret {name} of project {project}: the service does not take the value ({code})",
        f"see what it is: gcloud secrets describe {name} --project={project}",
    )
