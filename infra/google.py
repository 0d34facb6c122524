"""The foundations of a recipe on Google Cloud, as one table of resources.

`resources` is that table: plain names and inputs, known before anything runs. `program` declares it
with Pulumi, `infra.checks` holds it against the provider's own types, `infra.export` writes it down
as a project of its own. Pulumi is imported on use. Jobs are not here: they are no foundation.

Least roles. The job's account reads and writes objects of its bucket (the trainer never asks for
the bucket itself), reads its secrets and writes logs; it neither makes jobs nor pulls the image:
Vertex AI pulls with its own service agents, which may read the registries of their project
(https://docs.cloud.google.com/vertex-ai/docs/general/custom-service-account). Whoever starts a job
that runs as this account needs iam.serviceAccounts.actAs on it (the same page), which
roles/iam.serviceAccountUser gives.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

SERVICE, BUCKET = "gcp:projects/service:Service", "gcp:storage/bucket:Bucket"
ACCOUNT = "gcp:serviceaccount/account:Account"
SECRET = "gcp:secretmanager/secret:Secret"
REPOSITORY = "gcp:artifactregistry/repository:Repository"
PROJECT_ROLE = "gcp:projects/iAMMember:IAMMember"
BUCKET_ROLE = "gcp:storage/bucketIAMMember:BucketIAMMember"
ACCOUNT_ROLE = "gcp:serviceaccount/iAMMember:IAMMember"
SECRET_ROLE = "gcp:secretmanager/secretIamMember:SecretIamMember"
REPOSITORY_ROLE = "gcp:artifactregistry/repositoryIamMember:RepositoryIamMember"

#: Days after which the parts of an upload that nobody finished go.
UPLOAD_DAYS = 7
#: How long a deleted object can be brought back: seconds, the shortest that the service keeps.
SOFT_DELETE = 7 * 24 * 3600
_JOB_PROJECT_ROLES = ("roles/logging.logWriter",)
#: serviceUsageConsumer: to read quotas, and to be billed to this project as a person.
_OPERATOR_PROJECT_ROLES = (
    "roles/aiplatform.user",
    "roles/logging.viewer",
    "roles/serviceusage.serviceUsageConsumer",
)
_VIEWER_PROJECT_ROLES = ("roles/aiplatform.viewer", "roles/logging.viewer")
#: What a run needs of its buckets: to write one, and only to read one.
OBJECTS, READ_OBJECTS = "roles/storage.objectUser", "roles/storage.objectViewer"


@dataclass(frozen=True)
class Expiry:
    """Objects of the bucket whose name begins with `prefix`, or ends in `suffix`, go after
    `days`. Exactly one of the two is given."""

    days: int
    prefix: str = ""
    suffix: str = ""


@dataclass(frozen=True)
class Repository:
    """A repository of images: LOCATION-docker.pkg.dev/PROJECT/NAME."""

    location: str
    name: str


@dataclass(frozen=True)
class Foundations:
    """All that a recipe declares. `name`: of the recipe; no resource has it, for the recipes of one
    bucket share its foundations (`infra.sharing`). What may be None or empty is not declared.
    `accounts`: identities of jobs, each ID@PROJECT.iam.gserviceaccount.com of `project`. `missing`:
    what the recipe names elsewhere and has to be there, one line each."""

    name: str
    project: str
    region: str
    services: tuple[str, ...] = ()
    bucket: Optional[str] = None
    bucket_location: Optional[str] = None  # None: the region
    storage_class: str = "STANDARD"
    expiries: tuple[Expiry, ...] = ()
    retain_bucket: bool = True
    accounts: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    repositories: tuple[Repository, ...] = ()
    operators: tuple[str, ...] = ()
    viewers: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Declared:
    """One resource. `name` is its name in the stack; `physical_id` what the provider calls it once
    it is there, `import_id` what `pulumi import` takes for one that is. `after`: names of those
    that must be there before; `retain`: a destroy leaves it in the cloud."""

    name: str
    type_token: str
    physical_id: str
    import_id: str
    inputs: Mapping[str, Any]
    after: tuple[str, ...] = ()
    retain: bool = False


def resources(f: Foundations) -> list[Declared]:
    """Every resource, in an order in which each stands behind those in its `after`. Names follow
    from `f` alone, so that whatever an interrupted update left behind can be found and adopted."""
    made = [_service(f, name) for name in f.services]
    if f.bucket is not None:
        made.append(_bucket(f, f.bucket))
    made += [_account(f, email) for email in f.accounts]
    made += [_secret(f, name) for name in f.secrets]
    made += [_repository(f, one) for one in f.repositories]
    return [*made, *_grants(f)]


def program(f: Foundations, adopt: Collection[str] = ()) -> Callable[[], None]:
    """What Pulumi runs: declares `resources(f)` and exports `outputs(f)`.

    Those whose `name` is in `adopt` are there already, and are taken into the stack as they are
    instead of being made: an import whose inputs differ from what is there would fail. The next
    update without `adopt` brings them in line."""

    return registered(resources(f), outputs(f), adopt)


def registered(
    declared: Sequence[Declared],
    exports: Mapping[str, Any],
    adopt: Collection[str] = (),
    hold: Collection[str] = (),
) -> Callable[[], None]:
    """The program that declares just these and exports `exports`. Those named in `hold` are in the
    state, and stay as they are there; `adopt` as of `program`."""

    def declare() -> None:
        import pulumi

        made: dict[str, Any] = {}
        for one in declared:
            as_it_is = one.name in adopt or one.name in hold
            options = pulumi.ResourceOptions(
                depends_on=[made[name] for name in one.after],
                retain_on_delete=True if one.retain else None,
                import_=one.import_id if one.name in adopt else None,
                ignore_changes=list(one.inputs) if as_it_is else None,
            )
            made[one.name] = resource_class(one.type_token)(one.name, **one.inputs, opts=options)
        for name, value in exports.items():
            pulumi.export(name, value)

    return declare


def outputs(f: Foundations) -> dict[str, Any]:
    """What the stack says about itself: the names that a recipe uses. No secret is among them."""
    return {
        "project": f.project,
        "region": f.region,
        **({"bucket": f"gs://{f.bucket}"} if f.bucket else {}),
        **({"service_accounts": list(f.accounts)} if f.accounts else {}),
        **({"secrets": [secret_uri(f, name) for name in f.secrets]} if f.secrets else {}),
        **({"images": [image_prefix(f, one) for one in f.repositories]} if f.repositories else {}),
    }


def config(f: Foundations) -> dict[str, str]:
    """The stack's configuration of the provider. Every resource names its project too."""
    return {"gcp:project": f.project, "gcp:region": f.region}


def problems(f: Foundations) -> list[str]:
    """What is wrong with the inputs, one line each, before the engine starts. Pulumi itself checks
    neither nested keys nor enums nor types."""
    from infra.checks import problems as found

    return found(f)


def resource_class(type_token: str) -> Any:
    """The class of pulumi_gcp for `gcp:MODULE/file:Class`."""
    _, module, name = type_token.split(":")
    return getattr(importlib.import_module(f"pulumi_gcp.{module.partition('/')[0]}"), name)


def secret_uri(f: Foundations, name: str) -> str:
    """How a recipe names a secret of the project."""
    return f"secret-manager://{f.project}/{name}"


def image_prefix(f: Foundations, one: Repository) -> str:
    """Where images of a repository are pushed to."""
    return f"{one.location}-docker.pkg.dev/{f.project}/{one.name}"


def _service(f: Foundations, name: str) -> Declared:
    """An API that is on. It stays on after a destroy: others of the project may use it."""
    identity = f"{f.project}/{name}"
    inputs = {"project": f.project, "service": name, "disable_on_destroy": False}
    return Declared(_service_name(name), SERVICE, identity, identity, inputs)


def _service_name(api: str) -> str:
    return f"service-{api.partition('.')[0]}"


def _on(f: Foundations, service: str) -> tuple[str, ...]:
    """The API that has to be on first, where the foundations turn it on."""
    return tuple(_service_name(api) for api in f.services if api == f"{service}.googleapis.com")


def _bucket(f: Foundations, name: str) -> Declared:
    rules: list[dict[str, Any]] = [
        {"action": {"type": "AbortIncompleteMultipartUpload"}, "condition": {"age": UPLOAD_DAYS}},
        *({"action": {"type": "Delete"}, "condition": _condition(expiry)} for expiry in f.expiries),
    ]
    inputs = {
        "project": f.project,
        "name": name,
        "location": (f.bucket_location or f.region).upper(),
        "storage_class": f.storage_class,
        "uniform_bucket_level_access": True,
        "public_access_prevention": "enforced",
        "versioning": {"enabled": False},  # checkpoints are never overwritten
        "soft_delete_policy": {"retention_duration_seconds": SOFT_DELETE},
        "lifecycle_rules": rules,
        "labels": dict(f.labels),
        # Of a bucket with objects in it the service refuses the deletion unless this is set.
        "force_destroy": not f.retain_bucket,
    }
    identity = f"{f.project}/{name}"
    after, retain = _on(f, "storage"), f.retain_bucket
    return Declared("bucket", BUCKET, name, identity, inputs, after, retain)


def _condition(expiry: Expiry) -> dict[str, Any]:
    kind, text = ("prefixes", expiry.prefix) if expiry.prefix else ("suffixes", expiry.suffix)
    return {"age": expiry.days, f"matches_{kind}": [text]}


def _account(f: Foundations, email: str) -> Declared:
    account_id = email.partition("@")[0]
    identity = _account_name(f, email)
    inputs = {
        "project": f.project,
        "account_id": account_id,
        "display_name": "launch: training jobs",
        "description": "The identity of training jobs; declared by launch.",
    }
    return Declared(f"account-{account_id}", ACCOUNT, identity, identity, inputs, _on(f, "iam"))


def _secret(f: Foundations, name: str) -> Declared:
    """A secret without a version: its value comes later, past Pulumi, and is in no state."""
    identity = f"projects/{f.project}/secrets/{name}"
    inputs = {
        "project": f.project,
        "secret_id": name,
        "replication": {"auto": {}},
        "labels": dict(f.labels),
    }
    return Declared(f"secret-{name}", SECRET, identity, identity, inputs, _on(f, "secretmanager"))


def _repository(f: Foundations, one: Repository) -> Declared:
    identity = f"projects/{f.project}/locations/{one.location}/repositories/{one.name}"
    inputs = {
        "project": f.project,
        "location": one.location,
        "repository_id": one.name,
        "format": "DOCKER",
        "description": "Images of training jobs; declared by launch.",
        "labels": dict(f.labels),
    }
    after = _on(f, "artifactregistry")
    return Declared(_repository_name(one), REPOSITORY, identity, identity, inputs, after)


def _repository_name(one: Repository) -> str:
    return f"repository-{one.location}.{one.name}"  # a dot, which neither part can hold


def _grants(f: Foundations) -> Iterator[Declared]:
    """Who may do what. A grant adds one member to one role and leaves all others alone."""
    for email in f.accounts:
        member, made = f"serviceAccount:{email}", (f"account-{email.partition('@')[0]}",)
        yield from _of_project(f, member, _JOB_PROJECT_ROLES, made)
        yield from _of_bucket(f, member, OBJECTS, made)
        yield from _of_secrets(f, member, "roles/secretmanager.secretAccessor", made)
    for member in f.operators:
        yield from _of_project(f, member, _OPERATOR_PROJECT_ROLES)
        yield from _of_bucket(f, member, OBJECTS)
        yield from _of_secrets(f, member, "roles/secretmanager.secretVersionAdder")
        yield from _of_accounts(f, member)
        yield from _of_repositories(f, member)
    for member in (one for one in f.viewers if one not in f.operators):
        yield from _of_project(f, member, _VIEWER_PROJECT_ROLES)
        yield from _of_bucket(f, member, READ_OBJECTS)


def _of_project(
    f: Foundations, member: str, roles: tuple[str, ...], after: tuple[str, ...] = ()
) -> Iterator[Declared]:
    after = (*_on(f, "cloudresourcemanager"), *after)
    for role in roles:
        inputs = {"project": f.project, "role": role, "member": member}
        yield _grant(PROJECT_ROLE, "project", f.project, inputs, after)


def _of_bucket(
    f: Foundations, member: str, role: str, after: tuple[str, ...] = ()
) -> Iterator[Declared]:
    if f.bucket is None:
        return
    inputs = {"bucket": f.bucket, "role": role, "member": member}
    holder = f"b/{f.bucket}"
    yield _grant(BUCKET_ROLE, "bucket", holder, inputs, ("bucket", *after))


def _of_secrets(
    f: Foundations, member: str, role: str, after: tuple[str, ...] = ()
) -> Iterator[Declared]:
    for name in f.secrets:
        inputs = {"project": f.project, "secret_id": name, "role": role, "member": member}
        holder = f"projects/{f.project}/secrets/{name}"
        yield _grant(SECRET_ROLE, f"secret-{name}", holder, inputs, (f"secret-{name}", *after))


def _of_accounts(f: Foundations, member: str) -> Iterator[Declared]:
    for email in f.accounts:
        name, holder = f"account-{email.partition('@')[0]}", _account_name(f, email)
        role = "roles/iam.serviceAccountUser"
        inputs = {"service_account_id": holder, "role": role, "member": member}
        yield _grant(ACCOUNT_ROLE, name, holder, inputs, (name,))


def _of_repositories(f: Foundations, member: str) -> Iterator[Declared]:
    for one in f.repositories:
        name = _repository_name(one)
        holder = f"projects/{f.project}/locations/{one.location}/repositories/{one.name}"
        inputs = {
            "project": f.project,
            "location": one.location,
            "repository": one.name,
            "role": "roles/artifactregistry.writer",
            "member": member,
        }
        yield _grant(REPOSITORY_ROLE, name, holder, inputs, (name,))


def _grant(
    token: str, of: str, holder: str, inputs: dict[str, Any], after: tuple[str, ...]
) -> Declared:
    """One member of one role. The provider's id joins holder, role and member with `/`, and an
    import wants them apart by spaces."""
    role, member = inputs["role"], inputs["member"]
    name = f"{of}-{role.removeprefix('roles/')}-{member}"
    identity = f"{holder}/{role}/{member}"
    return Declared(name, token, identity, f"{holder} {role} {member}", inputs, after)


def _account_name(f: Foundations, email: str) -> str:
    return f"projects/{f.project}/serviceAccounts/{email}"
