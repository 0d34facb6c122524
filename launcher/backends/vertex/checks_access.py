"""Rows of `launch doctor` about what the job itself needs: its service account, the secrets that it
reads, its image.

A caller can be told its own permissions only. What the job's account may do is known where its
roles are bound on the bucket or the secret itself and the caller may read that; roles that it has
through the project, a folder or a group are not looked for, so a row never says that it lacks one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from infra.google import OBJECTS
from launcher.backends.base import Check
from launcher.backends.vertex.asking import Caller, Hidden, Missing, Wanted

_ACT_AS = "iam.serviceAccounts.actAs"
_ACCESSOR = "roles/secretmanager.secretAccessor"
#: Roles on a bucket that are enough for a job; the least comes first.
_BUCKET_ROLES = (OBJECTS, "roles/storage.objectAdmin", "roles/storage.admin")
#: LOCATION-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE[:TAG|@DIGEST]; an image may hold slashes.
_IMAGE = re.compile(
    r"([a-z0-9-]+)-docker\.pkg\.dev/([^/]+)/([^/]+)/([^:@]+)(?::([^@]+))?(?:@(sha256:[0-9a-f]+))?"
)


def accounts(caller: Caller, asked: Wanted) -> Iterator[Check]:
    """The job's service account: there, enabled, and the caller may let a job act as it."""
    if asked.default_account:
        more = ": it cannot read secrets" if asked.secrets else ""
        yield Check("service account", "warn" if asked.secrets else "skip",
                    f"none is named: jobs run as Vertex AI's own service agent{more}",
                    "set hardware.vertex.service_account")  # fmt: skip
    for email in asked.accounts:
        yield from _account(caller, asked, email)


def secrets(caller: Caller, asked: Wanted) -> Iterator[Check]:
    """Each secret: there, its newest version enabled. Its value is not read."""
    if not asked.secrets:
        yield Check("secrets", "skip", "the recipe names none of Secret Manager")
    for variable, project, name in asked.secrets:
        yield _secret(caller, asked, variable, f"projects/{project}/secrets/{name}")


def images(caller: Caller, asked: Wanted) -> Iterator[Check]:
    """Each image that lies in Artifact Registry: whether that tag or digest is there."""
    if not asked.images:
        yield Check("image", "skip", "the recipe names none")
    for uri in asked.images:
        yield _image(caller, uri)


def _account(caller: Caller, asked: Wanted, email: str) -> Iterator[Check]:
    path = f"v1/projects/-/serviceAccounts/{quote(email, safe='@')}"
    name, project = email.partition("@")[0], asked.project
    disabled = False
    try:
        disabled = bool(caller.get("iam", path, email).get("disabled"))
    except Missing:
        yield Check("service account", "fail", f"there is no {email}",
                    f"gcloud iam service-accounts create {name} --project={project}")  # fmt: skip
        return
    except Hidden:
        pass  # whoever may act as it need not be allowed to read it
    if disabled:
        yield Check("service account", "fail", f"{email} is disabled",
                    f"gcloud iam service-accounts enable {email}")  # fmt: skip
        return
    try:
        may_act = _ACT_AS in caller.allowed("iam", path, email, _ACT_AS)
    except Hidden as problem:
        yield Check("service account", "warn", f"{email}: {problem}", problem.hint)
        return
    if not may_act:
        yield Check("service account", "fail", f"you may not act as {email}",
                    f"gcloud iam service-accounts add-iam-policy-binding {email} "
                    "--role=roles/iam.serviceAccountUser --member=user:YOU")  # fmt: skip
        return
    yield Check("service account", "pass", f"you may act as {email}")
    for bucket in asked.buckets:
        yield _on_bucket(caller, email, bucket)


def _on_bucket(caller: Caller, email: str, bucket: str) -> Check:
    """What the account may do in the bucket, as far as the bucket's own policy says."""
    try:
        path = f"storage/v1/b/{quote(bucket, safe='')}/iam"
        policy = caller.get("storage", path, f"gs://{bucket}", optionsRequestedPolicyVersion=3)
    except (Hidden, Missing):
        policy = {}
    held = sorted(set(_BUCKET_ROLES) & set(_roles(policy, email)))
    if held:
        return Check("its bucket", "pass", f"{email} has {held[0]} on gs://{bucket}")
    return Check("its bucket", "skip", f"what {email} may do in gs://{bucket} cannot be seen from "
                 f"here; if it has nothing through the project: gcloud storage buckets "
                 f"add-iam-policy-binding gs://{bucket} --role={_BUCKET_ROLES[0]} "
                 f"--member=serviceAccount:{email}")  # fmt: skip


def _secret(caller: Caller, asked: Wanted, variable: str, resource: str) -> Check:
    name = resource.rpartition("/")[2]
    project = resource.split("/")[1]
    try:
        version = caller.get("secretmanager", f"v1/{resource}/versions/latest", resource)
    except Missing:
        return Check("secrets", "fail", f"{variable}: there is no {resource}, or it has no version",
                     f"gcloud secrets create {name} --project={project} --data-file=FILE (or "
                     "`gcloud secrets versions add`)")  # fmt: skip
    except Hidden:
        return Check("secrets", "skip", f"{variable}: you may not look at {resource}; the job "
                     "reads it with its own account")  # fmt: skip
    if version.get("state") != "ENABLED":
        return Check("secrets", "fail", f"{variable}: the newest version of {resource} is "
                     f"{str(version.get('state', 'gone')).lower()}",
                     f"gcloud secrets versions add {name} --project={project} "
                     "--data-file=FILE")  # fmt: skip
    reader = _reader(caller, asked, resource)
    return Check("secrets", "pass", f"{variable}: {resource} has an enabled version{reader}")


def _reader(caller: Caller, asked: Wanted, resource: str) -> str:
    """Words about the job's account and this secret, as far as its own policy says."""
    try:
        policy = caller.get("secretmanager", f"v1/{resource}:getIamPolicy", resource)
    except (Hidden, Missing):
        policy = {}
    able = [email for email in asked.accounts if _ACCESSOR in _roles(policy, email)]
    if asked.accounts and len(able) == len(asked.accounts):
        return f", which {', '.join(able)} may read"
    return "; whether the job's account may read it cannot be seen from here" if able == [] else ""


def _image(caller: Caller, uri: str) -> Check:
    match = _IMAGE.fullmatch(uri)
    if match is None:
        return Check("image", "skip", f"{uri} is not in Artifact Registry: not looked for")
    location, project, repository, image, tag, digest = match.groups()
    where = f"v1/projects/{project}/locations/{location}/repositories/{repository}/packages/"
    where += quote(image, safe="")
    where += f"/versions/{quote(digest, safe=':')}" if digest else f"/tags/{tag or 'latest'}"
    try:
        caller.get("artifactregistry", where, uri)
    except Missing:
        return Check("image", "fail", f"there is no {uri}",
                     "build docker/Dockerfile and push it, or name another tag")  # fmt: skip
    except Hidden:
        return Check("image", "skip", f"you may not look for {uri}; the service pulls it as its "
                     "own agent")  # fmt: skip
    return Check("image", "pass", f"{uri} is there")


def _roles(policy: Any, email: str) -> Iterator[str]:
    """Roles that an IAM policy binds to the account itself, without a condition."""
    member = f"serviceAccount:{email}"
    for binding in policy.get("bindings", ()):
        if member in binding.get("members", ()) and not binding.get("condition"):
            yield str(binding.get("role", ""))
