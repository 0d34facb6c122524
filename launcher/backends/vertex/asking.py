"""What the checks of Vertex AI share: what a recipe needs of Google, and one short request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional
from urllib.parse import urlencode

from launcher import google, hardware
from launcher.backends.base import Env
from launcher.backends.vertex.request import DEFAULT_PLACES, NAME
from launcher.errors import LaunchError
from launcher.spec import Recipe
from trainer.config import to_dict

#: Seconds that one request of a check may take.
SECONDS = 5.0
_BUCKET = re.compile(r"gs://([^/{}]+)")
_MANAGED = "secret-manager://"


@dataclass(frozen=True)
class Need:
    """GPUs of one kind at once, in one capacity, in places of which one will do."""

    accelerator: str
    gpus: int
    capacity: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """What a recipe needs of Google, as far as it says. `buckets` are read and written, `inputs`
    read by the job; `secrets` are (variable, project, name)."""

    project: Optional[str]
    places: tuple[str, ...] = DEFAULT_PLACES
    needs: tuple[Need, ...] = ()
    buckets: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    accounts: tuple[str, ...] = ()
    default_account: bool = False  # a stage names none: the service's own is taken
    images: tuple[str, ...] = ()
    secrets: tuple[tuple[str, str, str], ...] = ()
    hours: Optional[float] = None  # that the driver may be needed


def wanted(env: Env, recipe: Optional[Recipe]) -> Wanted:
    """What `recipe` needs of Google; without one, what the environment names."""
    if recipe is None:
        return Wanted(google.project_of(env.environ))
    asked = [stage.hardware for stage in recipe.stages if stage.hardware.backend == NAME]
    settings = [one.vertex for one in asked if one.vertex]
    projects = [one.project for one in settings if one.project]
    accounts = [one.service_account for one in settings if one.service_account]
    roots = [uri for uri in (recipe.artifacts, recipe.tensorboard) if uri]
    written = _unique(_buckets(roots))
    read = [name for stage in recipe.stages for name in _buckets(_texts(to_dict(stage)))]
    secrets = []
    for variable, source in recipe.secrets.items():
        project, _, name = source.removeprefix(_MANAGED).partition("/")
        if source.startswith(_MANAGED):
            secrets.append((variable, project, name.partition("/")[0]))
    needs = []
    for one in asked:
        accelerator = hardware.parse(one.accelerator)
        count, places = accelerator.count * one.nodes, one.places or DEFAULT_PLACES
        needs += [Need(accelerator.kind.name, count, capacity, places) for capacity in one.capacity]
    return Wanted(
        project=projects[0] if projects else google.project_of(env.environ),
        places=_unique(place for one in asked for place in one.places or DEFAULT_PLACES),
        needs=tuple(dict.fromkeys(needs)),
        buckets=written,
        inputs=tuple(name for name in _unique(read) if name not in written),
        accounts=_unique(accounts),
        default_account=len(accounts) < len(asked),
        images=_unique(one.image for one in settings if one.image),
        secrets=tuple(secrets),
        hours=recipe.budget.hours,
    )


class Missing(Exception):
    """The service says that there is no such thing (404)."""


class Hidden(Exception):
    """The service does not let this caller look (403)."""

    def __init__(self, problem: LaunchError) -> None:
        super().__init__(str(problem))
        self.hint = problem.hint


def fix_of(problem: Exception, otherwise: str) -> str:
    """The command that the refusal itself names (an API that is off), else `otherwise`."""
    hint = getattr(problem, "hint", "")
    return hint if hint.startswith("gcloud ") else otherwise


class Caller:
    """Sends one short request at a time with the credentials of this machine."""

    def __init__(self, env: Env) -> None:
        self.environ = env.environ
        self.session = google.session(env.environ)

    def get(self, service: str, path: str, what: str, **query: Any) -> Any:
        """A GET; lists in `query` are sent as repeated parameters. Errors: `Missing`, `Hidden`,
        else the signals."""
        return self._send("GET", service, path, what, params=urlencode(query, doseq=True))

    def allowed(self, service: str, path: str, what: str, *permissions: str) -> set[str]:
        """Those of `permissions` that this caller has on a resource: `path`:testIamPermissions.
        Errors: as `get`."""
        body = {"permissions": list(permissions)}
        path = f"{path}:testIamPermissions"
        answer = self._send("POST", service, path, what, json=body)
        return set(answer.get("permissions", ()))

    def _send(self, method: str, service: str, path: str, what: str, **given: Any) -> Any:
        try:
            return google.call(
                self.session, method, f"{self._base(service)}/{path}", what, service,
                timeout=SECONDS, **given,
            )  # fmt: skip
        except LaunchError as problem:
            code = getattr(problem.__cause__, "code", None)
            if code == 404:
                raise Missing(str(problem)) from problem
            if code == 403:
                raise Hidden(problem) from problem
            raise

    def _base(self, service: str) -> str:
        if service == "storage" and (emulator := self.environ.get("STORAGE_EMULATOR_HOST")):
            return emulator.rstrip("/")
        name = service.rpartition("-")[2]  # us-central1-aiplatform
        return google.endpoint(self.environ, name, f"https://{service}.googleapis.com")


def _texts(value: Any) -> Iterator[str]:
    """All texts within JSON-able data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)


def _buckets(texts: Any) -> Iterator[str]:
    return (found[1] for text in texts if (found := _BUCKET.match(text)))


def _unique(names: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
