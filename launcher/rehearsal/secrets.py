"""Secret Manager as far as a job reads it (versions.access), a person fills it (addVersion) and a
caller looks at it, and the metadata server from which a machine in the cloud takes its token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Optional

from launcher.google import library
from launcher.rehearsal.http import HttpError, Request, Response, answer
from launcher.rehearsal.routes import Method, dispatch, routes

_types = library("google.cloud.secretmanager_v1.types")
_policies = library("google.iam.v1.iam_policy_pb2"), library("google.iam.v1.policy_pb2")
_TRANSPORT = library(
    "google.cloud.secretmanager_v1.services.secret_manager_service.transports.rest_base"
)._BaseSecretManagerServiceRestTransport
TOKEN = "rehearsal-token"
EMAIL = "rehearsal@rehearsal.iam.gserviceaccount.com"
_NAME = re.compile(r"projects/([^/]+)/(?:locations/[^/]+/)?secrets/([^/]+)/versions/[^/]+")
_PARENT = re.compile(r"projects/([^/]+)/(?:locations/[^/]+/)?secrets/([^/]+)")
_LARGEST = 65536
_FLAVOR = {"Metadata-Flavor": "Google"}
_ACCOUNT = "/computeMetadata/v1/instance/service-accounts"


class Secrets:
    """`values`, the newest ones, by `project/name`; `denied` names those that may not be read or
    written, `hidden` those that may not be looked at, `disabled` those whose version is, `empty`
    those that are there and have no version yet; `versions` counts; `readers` the members that may
    read, by secret."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values, self.denied, self.empty = dict(values), set[str](), set[str]()
        self.hidden, self.disabled = set[str](), set[str]()
        self.versions: dict[str, int] = {}
        self.readers: dict[str, list[str]] = {}
        self.methods = [
            Method("AccessSecretVersion", _types.AccessSecretVersionRequest, self._access),
            Method("AddSecretVersion", _types.AddSecretVersionRequest, self._add),
        ]
        looks = [
            Method("GetSecretVersion", _types.GetSecretVersionRequest, self._version),
            Method("GetIamPolicy", _policies[0].GetIamPolicyRequest, self._policy),
        ]
        self._routes = routes(_TRANSPORT, [*self.methods, *looks])

    def handle(self, request: Request) -> Optional[Response]:
        return dispatch(self._routes, request)

    def _version(self, asked: Any) -> Any:
        key = self._seen(asked.name)
        state = _types.SecretVersion.State
        found = state.DISABLED if key in self.disabled else state.ENABLED
        return _types.SecretVersion(name=asked.name, state=found)

    def _policy(self, asked: Any) -> Any:
        members = self.readers.get(self._seen(f"{asked.resource}/versions/latest"), [])
        role = "roles/secretmanager.secretAccessor"
        binding = _policies[1].Binding(role=role, members=members)
        return _policies[1].Policy(bindings=[binding] if members else [])

    def _seen(self, name: str) -> str:
        """`project/name` of a version that the caller may look at. Errors: `HttpError`."""
        found = _NAME.fullmatch(name)
        key = f"{found[1]}/{found[2]}" if found else name
        if key in self.hidden:
            raise HttpError(
                403, f"Permission 'secretmanager.versions.get' denied for resource {name}"
            )
        if key not in self.values:
            raise HttpError(404, f"Secret [{name}] not found or has no versions.")
        return key

    def _access(self, asked: Any) -> Any:
        found = _NAME.fullmatch(asked.name)
        key = f"{found[1]}/{found[2]}" if found else asked.name
        if key in self.denied:
            raise HttpError(
                403, f"Permission 'secretmanager.versions.access' denied for resource {asked.name}"
            )
        if key not in self.values:
            raise HttpError(404, f"Secret [{asked.name}] not found or has no versions.")
        data = self.values[key].encode()
        payload = _types.SecretPayload(data=data, data_crc32c=library("google_crc32c").value(data))
        return _types.AccessSecretVersionResponse(name=asked.name, payload=payload)

    def _add(self, asked: Any) -> Any:
        found = _PARENT.fullmatch(asked.parent)
        key, data = f"{found[1]}/{found[2]}" if found else asked.parent, asked.payload.data
        if key in self.denied:
            raise HttpError(
                403, f"Permission 'secretmanager.versions.add' denied for resource {asked.parent}"
            )
        if key not in self.values and key not in self.empty:
            raise HttpError(404, f"Secret [{asked.parent}] not found.")
        if len(data) > _LARGEST:
            raise HttpError(
                400, f"The payload of [{asked.parent}] is larger than {_LARGEST} bytes."
            )
        sent = asked.payload.data_crc32c if "data_crc32c" in asked.payload else None
        if sent not in (None, library("google_crc32c").value(data)):
            raise HttpError(400, f"The checksum of the payload of [{asked.parent}] does not match.")
        number = self.versions.get(key, 1 if key in self.values else 0) + 1
        self.versions[key], self.values[key] = number, data.decode()
        self.empty.discard(key)
        enabled = _types.SecretVersion.State.ENABLED
        return _types.SecretVersion(
            name=f"{asked.parent}/versions/{number}",
            state=enabled,
            client_specified_payload_checksum=sent is not None,
        )


class Metadata:
    """The metadata server of a machine: one service account with a token."""

    def __init__(self, project: str = "rehearsal") -> None:
        self.project = project

    def handle(self, request: Request) -> Optional[Response]:
        path = request.path.rstrip("/")
        if path == "" and request.method == "GET":  # how libraries ask whether it is there
            return Response(200, b"computeMetadata/\n", dict(_FLAVOR))
        if not path.startswith("/computeMetadata/"):
            return None
        if request.headers.get("Metadata-Flavor") != "Google":
            raise HttpError(403, "Missing Metadata-Flavor:Google header.")
        response = self._answer(path)
        response.headers.update(_FLAVOR)
        return response

    def _answer(self, path: str) -> Response:
        if path == f"{_ACCOUNT}/default/token":
            return answer({"access_token": TOKEN, "expires_in": 3599, "token_type": "Bearer"})
        if path == f"{_ACCOUNT}/default":
            scopes = ["https://www.googleapis.com/auth/cloud-platform"]
            return answer({"aliases": ["default"], "email": EMAIL, "scopes": scopes})
        texts = {"/computeMetadata/v1/project/project-id": self.project,
                 f"{_ACCOUNT}/default/email": EMAIL,
                 "/computeMetadata/v1/universe/universe-domain": "googleapis.com"}  # fmt: skip
        if path not in texts:
            raise HttpError(404, f"the metadata server has no {path}")
        return Response(200, texts[path].encode(), {"Content-Type": "application/text"})
