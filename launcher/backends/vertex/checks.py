"""Rows of `launch doctor` for Vertex AI: each one line, with what to do. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timezone
from typing import Any

from launcher import google
from launcher.backends.base import Check, Env
from launcher.backends.vertex import jobs
from launcher.backends.vertex.request import DEFAULT_PLACES
from launcher.errors import LaunchError

_LOGINS = ("google.oauth2.credentials", "google.auth.external_account_authorized_user")
_METRIC = "aiplatform.googleapis.com/custom_model_training_"


def rows(env: Env) -> Iterator[Check]:
    """Credentials and how long they live, project, API, quota; later rows need the earlier ones."""
    try:
        found = google.credentials(env.environ)
        yield _life(found, env)
    except LaunchError as error:
        yield Check("credentials", "fail", str(error), error.hint)
        return
    project = jobs.project_of(env.environ)
    if project is None:
        yield Check("project", "warn", "the environment names none",
                    "set hardware.vertex.project or GOOGLE_CLOUD_PROJECT")  # fmt: skip
        return
    yield Check("project", "pass", project)
    place = DEFAULT_PLACES[0]
    try:
        jobs.reach(env, project, place)
    except LaunchError as error:
        yield Check("api", "fail", str(error), error.hint)
        return
    yield Check("api", "pass", f"jobs of {project} in {place} can be listed")
    yield _quota(env, project)


def _life(found: Any, env: Env) -> Check:
    """Whether the credentials outlast a run. A user's login may end by policy at any time; a
    service account, or the machine's own identity, goes on."""
    kind = type(found).__name__
    if kind == "AnonymousCredentials":
        return Check("credentials", "warn", "none are sent (they are switched off)",
                     "unset CLOUDSDK_AUTH_DISABLE_CREDENTIALS")  # fmt: skip
    with google.signals("Google credentials", ""):
        if not found.valid:
            found.refresh(google.library("google.auth.transport.requests").Request())
    expiry = getattr(found, "expiry", None)
    minutes = ""
    if expiry is not None:
        left = expiry.replace(tzinfo=timezone.utc).timestamp() - env.clock.now()
        minutes = f"; the token lives {left / 60:.0f} more minutes and is renewed"
    if found.__class__.__module__ in _LOGINS:
        return Check(
            "credentials", "warn", f"a user's login{minutes}, until the login itself ends",
            "for runs of many hours use a service account; a job goes on without its driver",
        )  # fmt: skip
    return Check("credentials", "pass", f"{kind}{minutes}")


def _quota(env: Env, project: str) -> Check:
    base = google.endpoint(env.environ, "serviceusage", "https://serviceusage.googleapis.com")
    url = f"{base}/v1beta1/projects/{project}/services/aiplatform.googleapis.com"
    url += "/consumerQuotaMetrics"
    try:
        answer = google.call(
            google.session(env.environ), "GET", url, "reading quotas", DEFAULT_PLACES[0],
            params={"pageSize": 500},
        )  # fmt: skip
    except LaunchError as error:
        return Check("quota", "warn", str(error), error.hint or "look in the console")
    ours = [m["metric"] for m in answer.get("metrics", ()) if m["metric"].startswith(_METRIC)]
    if not ours:
        return Check("quota", "warn", "no quota for training is listed",
                     "look for custom_model_training in the console")  # fmt: skip
    return Check("quota", "pass", f"{len(ours)} quotas of custom training can be read")
