"""The foundations that a recipe needs, read off the recipe: what `launch infra` declares.

Only names are read here; nothing is asked of the cloud, and Pulumi is not loaded. What lies in
another project, and buckets that the recipe only reads, are never declared: they are listed as
what has to be there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Optional

from infra.google import Expiry, Foundations, Repository
from launcher import home
from launcher.backends.vertex.request import DEFAULT_PLACES, label
from launcher.errors import UsageError
from launcher.google import project_of
from launcher.spec import Infra, Recipe, Stage, Vertex
from trainer.config import to_dict

if TYPE_CHECKING:
    from launcher.recipe import Loaded

_BUCKET = re.compile(r"gs://([^/]+)")
_SECRET = re.compile(r"secret-manager://([^/]+)/([^/]+)")
_IMAGE = re.compile(r"([a-z0-9-]+)-docker\.pkg\.dev/([^/]+)/([^/]+)/")
_ACCOUNT = re.compile(r"[^@]+@([^@]+)\.iam\.gserviceaccount\.com")
#: Google's own registry of training images, which everybody may read.
_PUBLIC = "vertex-ai"


def of_recipe(recipe: Recipe, environ: Mapping[str, str]) -> Foundations:
    """What the stages of `recipe` on Google Cloud need. `environ` names the project where the
    recipe does not, and the owner for the labels.

    Errors: `UsageError` when no stage runs there, or the project is not one and known."""
    stages = [stage for stage in recipe.stages if stage.hardware.backend == "vertex"]
    if not stages:
        raise UsageError(
            f"{recipe.name}: no stage runs on Google Cloud, so there is nothing to declare",
            "foundations are made for `hardware.backend: vertex`",
        )
    wanted, project = recipe.infra or Infra(), _project(recipe, stages, environ)
    vertex = [stage.hardware.vertex or Vertex() for stage in stages]
    accounts = _once(one.service_account for one in vertex)
    images = _once(one.image for one in vertex)
    repositories = _repositories(images, project)
    secrets = _secrets(recipe)
    places = [place for stage in stages for place in stage.hardware.places] or [*DEFAULT_PLACES]
    used = {"secretmanager": bool(secrets), "artifactregistry": bool(repositories),
            "compute": any(one.network for one in vertex)}  # fmt: skip
    services = ("cloudresourcemanager", "iam", "storage", "logging", "aiplatform",
                *(name for name, needed in used.items() if needed))  # fmt: skip
    found = _BUCKET.match(recipe.artifacts or "")
    bucket = found[1] if found else None
    kept = _BUCKET.match(wanted.state or "")
    if kept and kept[1] == bucket:
        raise UsageError(
            f"infra.state: gs://{bucket} is the bucket that these foundations make",
            "keep the state in another bucket, one that is there, or leave it out",
        )
    return Foundations(
        name=recipe.name,
        project=project,
        region=places[0],
        services=tuple(f"{name}.googleapis.com" for name in services),
        bucket=bucket,
        bucket_location=wanted.bucket_location,
        storage_class=wanted.storage_class,
        expiries=tuple(_expiry(name, days) for name, days in wanted.delete_after_days.items()),
        retain_bucket=wanted.retain_bucket,
        accounts=tuple(one for one in accounts if _project_of_account(one) == project),
        secrets=tuple(name for owner, name in secrets if owner == project),
        repositories=repositories,
        operators=_once(wanted.operators),
        viewers=_once(wanted.viewers),
        missing=(
            *((f"gs://{kept[1]}: has to be there; it keeps the state",) if kept else ()),
            *_missing_accounts(vertex, project),
            *_missing_buckets(recipe, stages, bucket),
            *_missing_secrets(secrets, project),
            *_missing_images(images, project),
        ),
        labels={"managed-by": "launch", "launch-owner": label(home.owner(environ))},
    )


def refuse_placeholders(loaded: Loaded, f: Foundations) -> None:
    """Errors: `UsageError` where the project or the bucket has a name that only stands in for a
    variable which is not set: it is an example, and may be somebody's."""
    named = {f"project {f.project}": f.project, f"gs://{f.bucket}": f.bucket}
    found = {
        variable: what
        for variable, value in loaded.defaults.items()
        for what, name in named.items()
        if name and (value == name or name in _BUCKET.findall(value))
    }
    if found:
        names, what = ", ".join(found), " and ".join(dict.fromkeys(found.values()))
        raise UsageError(
            f"{names} not set: the recipe says {what} in its place, and nothing is made under a "
            "name that only stands in for one",
            f"set {names} in the environment, or give --set hardware.vertex.project=... and "
            "--set artifacts=gs://...",
        )


def _project(recipe: Recipe, stages: list[Stage], environ: Mapping[str, str]) -> str:
    default = project_of(environ)
    named = _once((stage.hardware.vertex or Vertex()).project or default for stage in stages)
    if not named:
        raise UsageError(
            f"{recipe.name}: the project is not known",
            "set hardware.vertex.project in the recipe, or GOOGLE_CLOUD_PROJECT",
        )
    if len(named) > 1:
        raise UsageError(
            f"{recipe.name}: its stages run in {len(named)} projects: {', '.join(named)}",
            "foundations are of one project: make a recipe for each",
        )
    return named[0]


def _secrets(recipe: Recipe) -> list[tuple[str, str]]:
    """(project, name) of each secret that jobs read."""
    found = (_SECRET.match(reference) for reference in recipe.secrets.values())
    return list(dict.fromkeys((one[1], one[2]) for one in found if one))


def _repositories(images: tuple[str, ...], project: str) -> tuple[Repository, ...]:
    found = (_IMAGE.match(image) for image in images)
    ours = (Repository(one[1], one[3]) for one in found if one and one[2] == project)
    return tuple(dict.fromkeys(ours))


def _expiry(name: str, days: int) -> Expiry:
    return Expiry(days, suffix=name[1:]) if name.startswith("*") else Expiry(days, prefix=name)


def _project_of_account(email: str) -> Optional[str]:
    found = _ACCOUNT.fullmatch(email)
    return found[1] if found else None


def _missing_accounts(vertex: list[Vertex], project: str) -> Iterator[str]:
    for one in _once(one.service_account for one in vertex):
        if _project_of_account(one) != project:
            yield (
                f"service account {one}: is not one of project {project}, so it is not declared "
                "and gets no role here"
            )
    if any(one.service_account is None for one in vertex):
        yield (
            "hardware.vertex.service_account is unset: jobs run as Vertex AI's own agent, which "
            "gets no role here; name ID@PROJECT.iam.gserviceaccount.com to have one declared"
        )


def _missing_buckets(recipe: Recipe, stages: list[Stage], ours: Optional[str]) -> Iterator[str]:
    """Buckets beside `ours`, with the role that the job's account needs there."""
    written = {stage.export.to for stage in stages if stage.export} | {recipe.tensorboard}
    uris = [recipe.tensorboard or ""]
    uris += [text for stage in stages for text in _texts({**to_dict(stage), "hardware": None})]
    roles: dict[str, str] = {}
    for uri in uris:
        found = _BUCKET.match(uri)
        if found and found[1] != ours and roles.get(found[1]) != "User":
            roles[found[1]] = "User" if uri in written else "Viewer"
    for name, kind in roles.items():
        yield (
            f"gs://{name}: has to be there; the job's account needs roles/storage.object{kind} "
            "on it"
        )


def _missing_secrets(secrets: list[tuple[str, str]], project: str) -> Iterator[str]:
    for owner, name in secrets:
        if owner != project:
            yield (
                f"secret {name} of project {owner}: has to be there; the job's account needs "
                "roles/secretmanager.secretAccessor on it"
            )


def _missing_images(images: tuple[str, ...], project: str) -> Iterator[str]:
    for image in images:
        found = _IMAGE.match(image)
        if found and found[2] in (project, _PUBLIC):
            continue
        yield (
            f"image {image}: is not in a registry of project {project}; its Vertex AI service "
            "agents, which pull it, have to be able to read it"
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _texts(child)
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child)


def _once(values: Any) -> tuple[str, ...]:
    """Those that are given, each once, in their order."""
    return tuple(dict.fromkeys(value for value in values if value))
