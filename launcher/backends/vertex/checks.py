"""Rows of `launch doctor` for Vertex AI: credentials first, then each service, side by side.

Reads only. Every request takes 5 seconds at most; a service that does not answer is one row, a
network that is away is one row. What each row asks is in `checks_project`, `checks_access` and
`checks_bucket`."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Iterator
from datetime import timezone
from typing import Any, Optional

from launcher import abreast, google
from launcher.backends.base import Check, Env
from launcher.backends.vertex import checks_access, checks_bucket, checks_project, request
from launcher.backends.vertex.asking import SECONDS, Caller, Hidden, Wanted, wanted
from launcher.errors import LaunchError, Transient
from launcher.spec import Recipe

#: Seconds for the credentials to be found (a metadata server may not answer), and for the rest.
_FOUND, _ALL = 4.0, 7.0
_USER = "google.oauth2.credentials"
_WORKFORCE = "google.auth.external_account_authorized_user"
_SERVICE_ACCOUNT = (
    "use a service account: GOOGLE_APPLICATION_CREDENTIALS with its file, or a machine in the "
    "cloud; the job itself goes on without its driver, `launch resume` follows it again"
)
#: A login that policy may end: of fewer hours no more is said.
_SHORT = 1.0
#: What stays unknown without credentials or a project.
_REST = ("project", "apis", "jobs", "quota", "bucket", "service account", "secrets", "image")
Group = Callable[[Caller, Wanted], Iterator[Check]]
_GROUPS: dict[str, Group] = {
    "cloudresourcemanager": checks_project.project,
    "serviceusage": checks_project.services,
    "aiplatform": checks_project.jobs_listed,
    "storage": checks_bucket.buckets,
    "iam": checks_access.accounts,
    "secretmanager": checks_access.secrets,
    "artifactregistry": checks_access.images,
}


def rows(env: Env, recipe: Optional[Recipe] = None) -> Iterator[Check]:
    """Credentials and how long they live, then what the recipe needs of each service. Without
    credentials, or a project, the rest is skipped."""
    asked = wanted(env, recipe)
    now = datetime.datetime.fromtimestamp(env.clock.now(), timezone.utc).date()
    settings = [stage.hardware for stage in recipe.stages] if recipe else []
    warnings = {line for one in settings if one.vertex for line in request.warnings(one, now)}
    found = abreast.ask({"": functools.partial(_credentials, env, asked.hours)}, _FOUND)[""]
    if isinstance(found, Exception):
        yield _failed("credentials", found, google.LOGIN)
        yield from _skipped("needs credentials")
        return
    yield found
    if asked.project is None:
        yield Check("project", "fail" if recipe else "warn", "the environment names none",
                    "set hardware.vertex.project or GOOGLE_CLOUD_PROJECT")  # fmt: skip
        yield from _skipped("needs a project")
        return
    caller = Caller(env)
    tasks = {name: functools.partial(_group, group, caller, asked)
             for name, group in _GROUPS.items()}  # fmt: skip
    yield from _told(abreast.ask(tasks, _ALL))
    for line in sorted(warnings):
        yield Check("image", "warn", line, "build docker/Dockerfile, push it, and name it")


def lifetime(found: Any, hours: Optional[float], now: float) -> Check:
    """Whether these credentials last as long as a driver of `hours` (None: nobody knows) needs
    them. A service account, or the machine's own identity, goes on; a user's login may end by
    policy; a token that nobody renews ends when it says. `now`: UTC seconds."""
    kind, who = type(found).__module__, _whose(found)
    term = f"the {hours:g} hours of budget.hours" if hours else "a run of many hours"
    if type(found).__name__ == "AnonymousCredentials":
        return Check("credentials", "warn", "none are sent (they are switched off)",
                     "unset CLOUDSDK_AUTH_DISABLE_CREDENTIALS")  # fmt: skip
    if kind == "google.auth.impersonated_credentials":
        source = lifetime(found._source_credentials, hours, now)
        return Check("credentials", source.result, f"{who} by impersonation, from {source.detail}",
                     source.fix)  # fmt: skip
    if kind == _USER and not (found.refresh_token or found.refresh_handler):
        left = _hours_left(found, now)
        if left is None:
            detail = "an access token that nobody renews and that ends at a time unknown"
            detail += f"; a driver needs it for {term}"
            return Check("credentials", "warn", detail, _SERVICE_ACCOUNT)
        detail = f"an access token with {left * 60:.0f} minutes left, which nobody renews; "
        enough = hours is not None and left >= hours
        return Check("credentials", "pass" if enough else "fail",
                     f"{detail}a driver needs it for {term}", _SERVICE_ACCOUNT)  # fmt: skip
    if kind in (_USER, _WORKFORCE):
        what = "a user's login through a workforce pool" if kind == _WORKFORCE else "a user's login"
        if hours is not None and hours <= _SHORT:
            return Check("credentials", "pass", f"{what}{who and f' ({who})'}")
        return Check("credentials", "warn", f"{what}{who and f' ({who})'}, which policy may end "
                     f"before {term}", _SERVICE_ACCOUNT)  # fmt: skip
    names = {
        "google.oauth2.service_account": "the key of a service account",
        "google.auth.compute_engine.credentials": "this machine's own identity",
    }
    what = names.get(kind, type(found).__name__)
    return Check("credentials", "pass", f"{what}{who and f' ({who})'}; renewed as long as it runs")


def _credentials(env: Env, hours: Optional[float]) -> Check:
    found = google.credentials(env.environ)
    if type(found).__name__ != "AnonymousCredentials" and not found.valid:
        transport = google.library("google.auth.transport.requests").Request()
        with google.signals("Google credentials", ""):
            found.refresh(functools.partial(transport, timeout=SECONDS))
    return lifetime(found, hours, env.clock.now())


def _whose(found: Any) -> str:
    """The account's name, where the credentials tell one."""
    for name in ("service_account_email", "account"):
        who = getattr(found, name, None)
        if isinstance(who, str) and "@" in who:
            return who
    return ""


def _hours_left(found: Any, now: float) -> Optional[float]:
    expiry = getattr(found, "expiry", None)  # UTC, without a zone
    if expiry is None:
        return None
    return max(0.0, (float(expiry.replace(tzinfo=timezone.utc).timestamp()) - now) / 3600)


def _group(group: Group, caller: Caller, asked: Wanted) -> list[Check]:
    return list(group(caller, asked))


def _told(outcomes: dict[str, Any]) -> Iterator[Check]:
    """The rows of all services, or one row where none of them can be reached."""
    away = {name: one for name, one in outcomes.items() if isinstance(one, _AWAY)}
    if len(away) == len(outcomes):
        first = next(iter(away.values()))
        yield Check("network", "fail", f"none of Google's services answers: {first}",
                    "look at the network, the proxy (HTTPS_PROXY) and the firewall")  # fmt: skip
        return
    for name, outcome in outcomes.items():
        if not isinstance(outcome, Exception):
            yield from outcome
        elif isinstance(outcome, _AWAY):
            yield Check(name, "warn", f"not looked at: {outcome}", "try again in a while")
        elif isinstance(outcome, _STRANGE):
            yield Check(name, "warn", f"its answer is not one that is known ({outcome})",
                        "look at who answers: the proxy (HTTPS_PROXY), and "
                        "CLOUDSDK_API_ENDPOINT_OVERRIDES_...")  # fmt: skip
        else:
            yield _failed(name, outcome, "")


_AWAY = (Transient, abreast.Late)
#: What comes of reading JSON that is not what the service is known to answer: a proxy's, say.
_STRANGE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def _failed(name: str, problem: Exception, fix: str) -> Check:
    """Errors: what is none of a service's words is raised again, as a bug."""
    if isinstance(problem, (LaunchError, Hidden)):
        return Check(name, "fail", str(problem), problem.hint or fix)
    if isinstance(problem, abreast.Late):
        return Check(name, "fail", f"none were found: {problem}", fix)
    raise problem


def _skipped(why: str) -> Iterator[Check]:
    for name in _REST:
        if name != "project" or why != "needs a project":
            yield Check(name, "skip", why)
