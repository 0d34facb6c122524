"""Custom jobs and their objects through the official clients: one call, or a few, and no waiting.

Nothing is retried here: retry=None everywhere, because the engine owns time. The service names its
jobs and takes no request id, so a job is found again by label and display name.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from launcher import google
from launcher.backends.base import Env, Held, Intent, JobHandle, Labelled, Phase, Ref, Seen
from launcher.backends.vertex import refs, states
from launcher.backends.vertex.request import DEFAULT_PLACES, JOB, NAME, OBJECT, label
from launcher.errors import BadRequest, Denied, Transient

_PROJECT = re.compile(r"/projects/([^/]+)/locations/")
_PAGE = 100
#: Seconds for which a request may be applied late, and what it made be missing in reads and lists.
#: The service promises nothing; a minute is long for it.
SETTLE = 60.0
_PLACE_VARIABLES = ("CLOUDSDK_AI_REGION", "CLOUDSDK_COMPUTE_REGION")


def upload(intent: Intent, env: Env) -> Ref:
    """Create an object unless it is there; what is there is not sent again."""
    request = intent.request
    ref = Ref(NAME, OBJECT, intent.name, intent.place, request["labels"]["launch-run"], False,
              {"project": request["project"]})  # fmt: skip
    bucket_name, _, name = intent.name.removeprefix("gs://").partition("/")
    exceptions = google.library("google.api_core.exceptions")
    with google.signals(f"gs://{bucket_name}", intent.place):
        try:
            blob = google.storage(env.environ).bucket(bucket_name).blob(name)
            given = {"if_generation_match": 0, "retry": None, "timeout": google.TIMEOUT}
            if "json" in request:
                data = json.dumps(request["json"], ensure_ascii=False)
                blob.upload_from_string(data, content_type="application/json", **given)
            elif not blob.exists(retry=None, timeout=google.TIMEOUT):
                blob.upload_from_filename(_file(request["file"], intent.name), **given)
        except exceptions.PreconditionFailed:
            return ref  # an attempt before this one has sent it
        except exceptions.NotFound as error:
            raise BadRequest(
                "artifacts", f"there is no bucket gs://{bucket_name}",
                f"gcloud storage buckets create gs://{bucket_name} --location={intent.place}",
            ) from error  # fmt: skip
    return ref


def create(intent: Intent, env: Env) -> Ref:
    """The job of the intent: one that exists under its name and label, or a new one."""
    project = _project(intent)
    parent = f"projects/{project}/locations/{intent.place}"
    body = intent.request["body"]
    run = body["labels"]["launch-run"]
    try:
        existing = _find(env, parent, run, intent.name)
    except Transient as signal:
        signal.refused = True  # nothing was asked for yet
        raise
    if existing is None:
        _remember(env.home, project, intent.place)
        with google.signals(f"creating {intent.name}", intent.place):
            existing = _client(env, intent.place).create_custom_job(
                parent=parent, custom_job=_message(body), retry=None, timeout=google.TIMEOUT
            )
    return _ref(existing, project, intent.place)


def observe(job: JobHandle, env: Env) -> Seen:
    """One read. Without a job's ref (its reply was lost) the job is looked up by its label."""
    ref = next((r for r in reversed(job.refs) if r.kind == JOB), None)
    kept = tuple((r, Held.NONE) for r in job.refs if r.kind == OBJECT)
    if ref is not None:
        _remember(env.home, *refs.where(ref))  # of a run from another machine
        found = _get(env, ref)
        if found is None:
            return Seen(Phase.LOST, (*kept, (ref, Held.GONE)), "somebody has deleted the job")
    else:
        found, ref = _unanswered(job, env)
        if found is None or ref is None:
            return Seen(Phase.LOST, kept, "no job was created")
    return _seen(found, ref, kept)


def other(job: JobHandle, told: str, env: Env) -> Optional[Ref]:
    """The job of this attempt whose number is `told`, when it is another than the one that is
    followed and carries our labels and its name."""
    followed = next((r for r in reversed(job.refs) if r.kind == JOB), None)
    if followed is None or not refs.is_number(told):
        return None
    project, place = refs.where(followed)
    resource = f"projects/{project}/locations/{place}/customJobs/{told}"
    if (refs.resource(followed) or "").endswith(f"/{told}"):
        return None
    found = _get(
        env, replace(followed, run=job.run, data={"project": project, "resource": resource})
    )
    wanted = f"{job.name}-a{job.attempt}", label(env.owner)
    if found is None or (found.display_name, found.labels.get("launch-owner")) != wanted:
        return None
    return _ref(found, project, place)


def cancel_unless_running(job: JobHandle, env: Env) -> None:
    """A job that has not begun is cancelled; boot, once it runs, reads the marker by itself."""
    for ref in job.refs:
        found = _get(env, ref) if ref.kind == JOB else None
        if found is not None and states.name_of(found.state) in ("QUEUED", "PENDING"):
            _cancel(env, ref, found)


def delete(ref: Ref, env: Env) -> Held:
    """Cancel what runs, delete what is over. An object holds no money, and other runs may read
    it: it stays."""
    if ref.kind != JOB:
        return Held.NONE
    found = _get(env, ref)
    if found is None:
        return Held.GONE
    state = states.name_of(found.state)
    phase, _ = states.STATES.get(state, states.UNKNOWN)
    if phase.over:
        _remove(env, ref, found)
    elif phase is not Phase.STOPPING:
        _cancel(env, ref, found)
    return Held.DELETING


def labelled(env: Env, everyone: bool) -> Iterator[Labelled]:
    """The owner's jobs (`everyone`: those of all owners), in every place where this machine has
    created one, and in those that the environment names; of the latter, those that may not be read
    hold nothing of ours."""
    used = _remembered(env.home)
    named = _named(env.environ)
    labels = {} if everyone else {"launch-owner": label(env.owner)}
    for project, place in [*used, *(pair for pair in named if pair not in used)]:
        try:
            found = list(_list(env, f"projects/{project}/locations/{place}", labels))
        except (Denied, BadRequest):
            if (project, place) in used:
                raise
            continue
        yield from (_labelled(job, project, place) for job in found if "launch-run" in job.labels)


def of_run(run: str, known: Iterable[Ref], env: Env) -> Iterator[Ref]:
    """The run's jobs, in the places where `known` refs of it lie."""
    labels = {"launch-run": run, "launch-owner": label(env.owner)}
    for project, place in sorted({refs.where(ref) for ref in known}):
        for job in _list(env, f"projects/{project}/locations/{place}", labels):
            yield _ref(job, project, place)


def _seen(found: Any, ref: Ref, kept: tuple[tuple[Ref, Held], ...]) -> Seen:
    state = states.name_of(found.state)
    phase, money = states.STATES.get(state, states.UNKNOWN)
    held = (*kept, (ref, money))
    began, ended = _seconds(found.start_time), _seconds(found.end_time)
    if phase is not Phase.FAILED:
        return Seen(phase, held, states.said(state), None, state, "", began, ended)
    scheduling = found.job_spec.scheduling
    end = states.ended(
        state, found.error.code, found.error.message, ref.place,
        started=found.start_time is not None, spot=scheduling.strategy.name == "SPOT",
    )  # fmt: skip
    return Seen(end.phase, held, end.why, end.exit_code, state, end.cause, began, ended)


def _seconds(time: Any) -> Optional[float]:
    """A time of the service in UTC seconds; None: it has not come."""
    return float(time.timestamp()) if time else None


def _unanswered(job: JobHandle, env: Env) -> tuple[Any, Optional[Ref]]:
    """The job whose creation was never answered. Its objects, created before it, know where."""
    told = next((r for r in reversed(job.refs) if r.kind == OBJECT), None)
    if told is None:
        return None, None
    project, place = refs.where(told)
    parent = f"projects/{project}/locations/{place}"
    found = _find(env, parent, job.run, f"{job.name}-a{job.attempt}")
    return found, found and _ref(found, project, place)


def _find(env: Env, parent: str, run: str, name: str) -> Any:
    """The run's job of that display name, the oldest of several; None: there is none."""
    ours = _list(env, parent, {"launch-run": run, "launch-owner": label(env.owner)}, name)
    return min(ours, key=lambda job: job.create_time, default=None)


def _list(env: Env, parent: str, labels: Mapping[str, str], name: str = "") -> Iterator[Any]:
    """The jobs with these labels, and of that display name if one is given. They are looked at
    again here: a server that knows no filter must not make us adopt, or delete, what is not ours.
    """
    terms = [f'labels.{key}="{value}"' for key, value in labels.items()]
    wanted = " AND ".join([*terms, f'display_name="{name}"'] if name else terms)
    place = parent.rpartition("/")[2]
    with google.signals(f"listing jobs in {parent}", place):
        for job in _list_page(env, parent, wanted, _PAGE):
            carried = dict(job.labels)
            if labels.items() <= carried.items() and name in ("", job.display_name):
                yield job


def _list_page(env: Env, parent: str, wanted: str, size: int) -> Any:
    place = parent.rpartition("/")[2]
    request = {"parent": parent, "filter": wanted, "page_size": size}
    with google.signals(f"listing jobs in {parent}", place):
        return _client(env, place).list_custom_jobs(
            request=request, retry=None, timeout=google.TIMEOUT
        )


def _get(env: Env, ref: Ref) -> Any:
    """The job of a ref, or None when it is not there. One without the run's label is not the one
    that was meant: a stranger's journal may name any job. Where the ref names none, the label
    finds it."""
    project, place = refs.where(ref)
    resource = refs.resource(ref)
    if resource is None:
        return _find(env, f"projects/{project}/locations/{place}", ref.run, refs.title(ref))
    with google.signals(f"reading {ref.name}", place):
        try:
            found = _client(env, place).get_custom_job(
                name=resource, retry=None, timeout=google.TIMEOUT
            )
        except google.library("google.api_core.exceptions").NotFound:
            return None
    return found if found.labels.get("launch-run") == ref.run else None


def _cancel(env: Env, ref: Ref, found: Any) -> None:
    with google.signals(f"cancelling {ref.name}", ref.place), _unless_it_ended():
        _client(env, ref.place).cancel_custom_job(
            name=found.name, retry=None, timeout=google.TIMEOUT
        )


def _remove(env: Env, ref: Ref, found: Any) -> None:
    with google.signals(f"deleting {ref.name}", ref.place), _unless_it_ended():
        _client(env, ref.place).delete_custom_job(
            name=found.name, retry=None, timeout=google.TIMEOUT
        )


@contextmanager
def _unless_it_ended() -> Iterator[None]:
    """The job may have changed since it was looked at; the next look decides. The REST classes are
    the parents of those that gRPC raises."""
    exceptions = google.library("google.api_core.exceptions")
    try:
        yield
    except exceptions.NotFound:
        pass
    except exceptions.BadRequest as error:
        if "state" not in str(error).lower():
            raise


def _ref(job: Any, project: str, place: str) -> Ref:
    number = job.name.rpartition("/")[2]
    command = f"gcloud ai custom-jobs cancel {number} --project={project} --region={place}"
    phase, _ = states.STATES.get(states.name_of(job.state), states.UNKNOWN)
    pools = job.job_spec.worker_pool_specs
    data = {
        "resource": job.name, "project": project, "job_id": number, "delete_command": command,
        "workers": max(1, pools[0].machine_spec.accelerator_count) if pools else 1,  # of a node
    }  # fmt: skip
    return Ref(NAME, JOB, job.display_name, place, job.labels["launch-run"], not phase.over, data)


def _labelled(job: Any, project: str, place: str) -> Labelled:
    """What there is to say of a job that its run may have forgotten. Its last argument is the boot
    specification, which lies below the artifact root (request.py)."""
    _, money = states.STATES.get(states.name_of(job.state), states.UNKNOWN)
    bills = _seconds(job.start_time) if money is Held.LIVE else None
    pools = job.job_spec.worker_pool_specs
    arguments = list(pools[0].container_spec.args) if pools else []
    root, mark, _ = arguments[-1].rpartition("/boot/") if arguments else ("", "", "")
    return Labelled(
        _ref(job, project, place), job.labels.get("launch-owner", ""), _seconds(job.create_time),
        bills, root if mark else "",
    )  # fmt: skip


def _message(body: Mapping[str, Any]) -> Any:
    """The planned JSON as the client's message: the preview is the request. Errors: `BadRequest`
    for what the message does not know."""
    types = google.library("google.cloud.aiplatform_v1")
    json_format = google.library("google.protobuf.json_format")
    message = types.CustomJob()
    try:
        json_format.ParseDict(body, types.CustomJob.pb(message))
    except json_format.ParseError as error:
        raise BadRequest("custom job", google.one_line(error)) from error
    return message


def _client(env: Env, place: str) -> Any:
    refs.check(place)
    default = f"https://{place}-aiplatform.googleapis.com"
    return _job_service(
        google.endpoint(env.environ, "aiplatform", default), google.credentials(env.environ)
    )


@functools.lru_cache(maxsize=32)
def _job_service(endpoint: str, credentials: Any) -> Any:
    """REST, because one variable then redirects it, and no channel outlives a fork."""
    return google.library("google.cloud.aiplatform_v1").JobServiceClient(
        credentials=credentials, transport="rest", client_options={"api_endpoint": endpoint}
    )


def _file(path: Optional[str], uri: str) -> str:
    if path is None:
        raise BadRequest(
            "artifacts",
            f"{uri} is not there, and no file that another machine's journal names is sent from "
            "here",
            "put it there, then `launch resume` the run",
        )
    if not Path(path).is_file():
        raise BadRequest("bundle", f"{path} is not there any more", "run `launch up` again")
    return path


def _project(intent: Intent) -> str:
    found = _PROJECT.search(intent.request["url"])
    if found is None or "$" in found[1]:
        raise BadRequest("hardware.vertex.project", "is unset",
                         "set it, or GOOGLE_CLOUD_PROJECT")  # fmt: skip
    return found[1]


def _remember(home: Path, project: str, place: str) -> None:
    """Written before a place's first job, so that a sweep looks there whatever happens next."""
    refs.check(place, project)
    folder = home / "google" / "vertex-places"
    file = folder / f"{place}@{project}"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()


def _remembered(home: Path) -> list[tuple[str, str]]:
    names = sorted(file.name for file in (home / "google" / "vertex-places").glob("*@*"))
    return [(name.partition("@")[2], name.partition("@")[0]) for name in names]


def _named(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    project = google.project_of(environ)
    places = [environ[name] for name in _PLACE_VARIABLES if environ.get(name)]
    return [(project, place) for place in places or DEFAULT_PLACES] if project else []
