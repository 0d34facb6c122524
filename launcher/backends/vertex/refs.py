"""What a ref of a custom job says, checked. Refs come from journals: those may be damaged, or a
stranger's, and what they name becomes part of addresses that get our credentials, of file names and
of commands to type. Nothing else reads a ref's `data`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Optional

from launcher.backends.base import Ref
from launcher.errors import BadRequest

_PLACE = re.compile(r"[a-z]+(?:-[a-z]+)*[0-9]*")
_PROJECT = re.compile(r"[a-z0-9][a-z0-9:.-]*")
_NUMBER = re.compile(r"[0-9]{1,30}")
_RESOURCE = re.compile(
    rf"projects/({_PROJECT.pattern})/locations/({_PLACE.pattern})/customJobs/({_NUMBER.pattern})"
)
_FOUND = "`launch teardown` still deletes what carries the run's label"


def check(place: str, project: str = "-") -> None:
    """Errors: `BadRequest` for what is no region, or no project."""
    if not _PLACE.fullmatch(place):
        raise BadRequest("hardware.places", f"{ascii(place)[:80]} is no region",
                         "such as us-central1")  # fmt: skip
    if project != "-" and not _PROJECT.fullmatch(project):
        raise BadRequest("hardware.vertex.project", f"{ascii(project)[:80]} is no project")


def where(ref: Ref) -> tuple[str, str]:
    """The project and the place of a ref. Errors: `BadRequest`."""
    project = _data(ref).get("project")
    if not isinstance(project, str) or not _PROJECT.fullmatch(project):
        raise _odd(ref, "project", project)
    if not isinstance(ref.place, str) or not _PLACE.fullmatch(ref.place):
        raise _odd(ref, "place", ref.place)
    return project, ref.place


def resource(ref: Ref) -> Optional[str]:
    """The service's name of the job, in the ref's own place; None: the ref has none that makes
    sense, and the job is to be found by its label."""
    name = _data(ref).get("resource")
    found = _RESOURCE.fullmatch(name) if isinstance(name, str) else None
    return found[0] if found is not None and found[2] == ref.place else None


def title(ref: Ref) -> str:
    """The display name of the job: a ref's, less what sets it off from others of that name."""
    return ref.name.partition("~")[0]


def number(ref: Ref) -> str:
    """By what the service's logs know the job. Errors: `BadRequest`."""
    found = _data(ref).get("job_id")
    if not isinstance(found, str) or not is_number(found):
        raise _odd(ref, "job_id", found)
    return found


def is_number(text: str) -> bool:
    """Whether this can be the number of a job."""
    return _NUMBER.fullmatch(text) is not None


def workers(ref: Ref) -> int:
    """How many workers a node of the job has. Errors: `BadRequest`."""
    found = _data(ref).get("workers", 1)
    if type(found) is not int or found < 1:
        raise _odd(ref, "workers", found)
    return found


def by_hand(ref: Ref) -> Optional[str]:
    """The command that ends a job, from its resource's name alone."""
    found = _RESOURCE.fullmatch(str(_data(ref).get("resource", "")))
    if found is None:
        return None
    project, place, job = found.groups()
    return f"gcloud ai custom-jobs cancel {job} --project={project} --region={place}"


def _data(ref: Ref) -> Mapping[str, Any]:
    return ref.data if isinstance(ref.data, Mapping) else {}


def _odd(ref: Ref, what: str, found: object) -> BadRequest:
    return BadRequest("journal", f"{ref.name}: its {what} is {ascii(found)[:80]}", _FOUND)
