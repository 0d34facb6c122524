"""What `launch doctor` asks of Google beside jobs and buckets: the project and the caller's
permissions (Resource Manager v3), which APIs are on and what quotas allow (Service Usage), service
accounts (IAM v1) and images (Artifact Registry v1), as far as those questions go.

The installed clients know none of these services: routes and answers are our reading of their REST
references. Everything is there and allowed, until a test or a user says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Optional
from urllib.parse import unquote

from launcher.rehearsal.http import HttpError, Request, Response, answer

NUMBER = "123456789012"
#: GPUs that each quota allows in each place, unless `quotas` says otherwise.
_USUAL = 8
_QUOTA = re.compile(r"aiplatform\.googleapis\.com/custom_model_training_\w+")


class Access:
    """`off`: APIs that are not enabled. `lacking`: permissions that the caller does not have, on
    anything. `quotas`: GPUs by metric and region. `missing`: projects, service accounts (by email)
    and images (by URI) that do not exist; `disabled`: service accounts. `states`: of projects."""

    def __init__(self) -> None:
        self.off: set[str] = set()
        self.lacking: set[str] = set()
        self.missing: set[str] = set()
        self.disabled: set[str] = set()
        self.states: dict[str, str] = {}
        self.quotas: dict[str, dict[str, int]] = {}
        resources, usage = "cloudresourcemanager.googleapis.com", "serviceusage.googleapis.com"
        iam, registry = "iam.googleapis.com", "artifactregistry.googleapis.com"
        table: dict[str, tuple[str, Callable[..., Any]]] = {
            r"GET /v3/projects/([^/:]+)": (resources, self._project),
            r"POST /v3/projects/([^/:]+):testIamPermissions": (resources, self._test),
            r"GET /v1/projects/([^/]+)/services:batchGet": (usage, self._services),
            r"GET /v1beta1/projects/([^/]+)/services/[^/]+/consumerQuotaMetrics/(.+)": (
                usage,
                self._quota,
            ),
            r"GET /v1/projects/-/serviceAccounts/([^/:]+)": (iam, self._account),
            r"POST /v1/projects/-/serviceAccounts/([^/:]+):testIamPermissions": (iam, self._test),
            r"GET /v1/projects/([^/]+)/locations/([^/]+)/repositories/([^/]+)/packages/(.+)/"
            r"(tags|versions)/([^/]+)": (registry, self._image),
        }
        self._table = [(re.compile(pattern), *what) for pattern, what in table.items()]

    def handle(self, request: Request) -> Optional[Response]:
        """The answer, or None for a path of another service. Errors: `HttpError`."""
        asked = f"{request.method} {request.path}"
        for pattern, service, act in self._table:
            if match := pattern.fullmatch(asked):
                if service in self.off:
                    raise HttpError(403, f"{service} has not been used in project {NUMBER} before "
                                    "or it is disabled.")  # fmt: skip
                return answer(act(request, *map(unquote, match.groups())))
        return None

    def _project(self, request: Request, name: str) -> Any:
        if name in self.missing:  # who may not see a project is told the same
            raise HttpError(403, "The caller does not have permission")
        own = "rehearsal" if name == NUMBER else name
        state = self.states.get(own, "ACTIVE")
        return {"name": f"projects/{NUMBER}", "projectId": own, "state": state}

    def _test(self, request: Request, name: str) -> Any:
        if name in self.missing:
            raise HttpError(404, f"Unknown resource {name}")
        asked = request.json().get("permissions", [])
        return {"permissions": [one for one in asked if one not in self.lacking]}

    def _services(self, request: Request, project: str) -> Any:
        found = []
        for name in request.query.get("names", []):
            on = name.rpartition("/")[2] not in self.off
            found.append({"name": name, "state": "ENABLED" if on else "DISABLED"})
        return {"services": found}

    def _quota(self, request: Request, project: str, metric: str) -> Any:
        if not _QUOTA.fullmatch(metric):
            raise HttpError(404, f"Quota metric {metric} not found")
        regions = self.quotas.get(metric)
        buckets: list[dict[str, Any]] = [{"effectiveLimit": str(_USUAL), "dimensions": {}}]
        if regions is not None:
            buckets = [{"dimensions": {}}]  # 0: JSON leaves it out
            buckets += [{"effectiveLimit": str(limit), "dimensions": {"region": region}}
                        for region, limit in regions.items()]  # fmt: skip
        limit = {"metric": metric, "unit": "1/{project}/{region}", "quotaBuckets": buckets}
        return {"metric": metric, "consumerQuotaLimits": [limit]}

    def _account(self, request: Request, email: str) -> Any:
        if email in self.missing:
            raise HttpError(404, f"Unknown service account {email}")
        return {"email": email, "disabled": email in self.disabled}

    def _image(
        self, request: Request, project: str, place: str, repository: str, image: str, kind: str,
        name: str,
    ) -> Any:  # fmt: skip
        mark = "@" if kind == "versions" else ":"
        uri = f"{place}-docker.pkg.dev/{project}/{repository}/{image}{mark}{name}"
        if uri in self.missing:
            raise HttpError(404, "Requested entity was not found.")
        return {"name": request.path.removeprefix("/v1/")}
