"""Rows of `launch doctor` about the project: whether it is the right one, what the caller may do in
it, which APIs are on, and what its quotas allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Optional
from urllib.parse import quote

from launcher.backends.base import Check
from launcher.backends.vertex.asking import Caller, Hidden, Missing, Need, Wanted, fix_of

#: What the driver asks of the project: jobs, and their log lines.
_PERMISSIONS = (
    "aiplatform.customJobs.create", "aiplatform.customJobs.get", "aiplatform.customJobs.list",
    "aiplatform.customJobs.cancel", "aiplatform.customJobs.delete", "logging.logEntries.list",
)  # fmt: skip
_SERVICE = "aiplatform.googleapis.com"
#: Accelerator -> its part of the names of Vertex AI's quotas of training, as far as Google's own
#: guides name them (read 2026-11-21). Of others the name is not guessed.
_METRICS = {
    "L4": "nvidia_l4_gpus",
    "A100-40GB": "nvidia_a100_gpus",
    "A100-80GB": "nvidia_a100_80gb_gpus",
    "H100": "nvidia_h100_gpus",
    "H100-MEGA": "nvidia_h100_mega_gpus",
}
#: Spot and flex-start jobs count against a quota of their own.
_PREEMPTIBLE = ("spot", "flex")
_UNLIMITED = -1


def project(caller: Caller, asked: Wanted) -> Iterator[Check]:
    """The project as Resource Manager knows it, and the caller's permissions in it."""
    name = str(asked.project)
    try:
        found = caller.get("cloudresourcemanager", f"v3/projects/{name}", f"project {name}")
    except (Missing, Hidden) as problem:
        yield Check("project", "fail" if isinstance(problem, Missing) else "warn",
                    f"{name}: does not exist, or may not be seen ({problem})",
                    fix_of(problem, "`gcloud projects list` shows those that you may see; "
                           "hardware.vertex.project takes the id"))  # fmt: skip
        return
    number = str(found.get("name", "")).rpartition("/")[2]
    own, state = str(found.get("projectId", name)), found.get("state", "ACTIVE")
    detail = f"{own} (number {number})"
    if state != "ACTIVE":
        yield Check("project", "fail", f"{detail} is {state}", f"gcloud projects undelete {own}")
    elif name.isdigit():
        yield Check("project", "warn", f"{detail} is given by its number",
                    f"write the id, {own}: links, and what launch remembers, go by it")  # fmt: skip
    else:
        yield Check("project", "pass", detail)
    allowed = caller.allowed(
        "cloudresourcemanager", f"v3/projects/{name}", "permissions", *_PERMISSIONS
    )
    lacking = [one for one in _PERMISSIONS if one not in allowed]
    if lacking:
        role = "roles/aiplatform.user" if any("aip" in one for one in lacking) else ""
        role = role or "roles/logging.viewer"
        yield Check("permissions", "fail", f"in {own} you lack {', '.join(lacking)}",
                    f"gcloud projects add-iam-policy-binding {own} --role={role} "
                    "--member=user:YOU")  # fmt: skip
    else:
        yield Check("permissions", "pass", f"jobs and their logs in {own}")


def services(caller: Caller, asked: Wanted) -> Iterator[Check]:
    """Which APIs are on, then the quotas, which the same service knows."""
    parent = f"projects/{asked.project}"
    needed = [_SERVICE, "storage.googleapis.com", "logging.googleapis.com"]
    needed += ["secretmanager.googleapis.com"] if asked.secrets else []
    needed += (
        ["artifactregistry.googleapis.com"]
        if any("-docker.pkg.dev/" in image for image in asked.images)
        else []
    )
    names = [f"{parent}/services/{one}" for one in needed]
    try:
        answer = caller.get("serviceusage", f"v1/{parent}/services:batchGet", "APIs", names=names)
    except (Hidden, Missing) as problem:
        yield Check("apis", "warn", f"which ones are on may not be read: {problem}",
                    fix_of(problem, "ask for roles/serviceusage.serviceUsageViewer"))  # fmt: skip
    else:
        on = {str(one["name"]).rpartition("/")[2] for one in answer.get("services", ())
              if one.get("state") == "ENABLED"}  # fmt: skip
        off = [one for one in needed if one not in on]
        short = ", ".join(one.partition(".")[0] for one in needed)
        if off:
            yield Check("apis", "fail", f"off in {asked.project}: {', '.join(off)}",
                        f"gcloud services enable {' '.join(off)} "
                        f"--project={asked.project}")  # fmt: skip
        else:
            yield Check("apis", "pass", f"on: {short}")
    for group in _alike(asked.needs):
        found = [_quota(caller, str(asked.project), need) for need in group]
        for row in found:  # capacities are tried in turn: one that is not there is no failure
            spare = row.result == "fail" and any(one.result != "fail" for one in found)
            yield replace(row, result="warn") if spare else row


def jobs_listed(caller: Caller, asked: Wanted) -> Iterator[Check]:
    """The one request that every run makes first: whether jobs can be listed in each place."""
    for place in asked.places:
        path = f"v1/projects/{asked.project}/locations/{place}/customJobs"
        try:
            caller.get(f"{place}-aiplatform", path, f"jobs in {place}", pageSize=1)
        except (Missing, Hidden) as problem:
            hint = problem.hint if isinstance(problem, Hidden) else ""
            yield Check("jobs", "fail", str(problem), hint or "docs/vertex.md lists the roles")
            return
    yield Check("jobs", "pass", f"can be listed in {', '.join(asked.places)}")


def metric_of(accelerator: str, capacity: str) -> Optional[str]:
    """The quota that a job of this accelerator and capacity counts against; None: not known."""
    part = _METRICS.get(accelerator)
    if part is None or capacity == "reserved":
        return None
    kind = "preemptible_" if capacity in _PREEMPTIBLE else ""
    return f"{_SERVICE}/custom_model_training_{kind}{part}"


def limits(answer: Mapping[str, Any], places: tuple[str, ...]) -> dict[str, Optional[int]]:
    """What a quota metric allows in each place: the most specific bucket that names no other place.
    A bucket without a figure allows 0 (JSON leaves zeros out), -1 is no limit, and None stands for
    a place that no bucket covers."""
    found: dict[str, Optional[int]] = dict.fromkeys(places)
    for limit in answer.get("consumerQuotaLimits", ()):
        for bucket in limit.get("quotaBuckets", ()):  # the least specific one comes first
            dimensions = bucket.get("dimensions", {})
            for place in places:
                if set(dimensions.items()) <= {("region", place)}:
                    found[place] = int(bucket.get("effectiveLimit", 0))
    return found


def _alike(needs: tuple[Need, ...]) -> Iterator[list[Need]]:
    """Needs that differ in capacity alone: one of them has to be met."""
    groups: dict[tuple[object, ...], list[Need]] = {}
    for need in needs:
        groups.setdefault((need.accelerator, need.gpus, need.places), []).append(need)
    yield from groups.values()


def _quota(caller: Caller, project: str, need: Need) -> Check:
    """One row: enough in all places passes, in some warns, in none fails."""
    what = f"{need.gpus} {need.accelerator} {need.capacity}"
    console = f"https://console.cloud.google.com/iam-admin/quotas?project={project}"
    look = f"{what}: look for custom_model_training at {console}"
    metric = metric_of(need.accelerator, need.capacity)
    if metric is None:
        return Check("quota", "skip", f"the name of its quota is not known; {look}")
    path = f"v1beta1/projects/{project}/services/{_SERVICE}/consumerQuotaMetrics/"
    try:
        answer = caller.get("serviceusage", path + quote(metric, safe=""), "quotas", view="BASIC")
    except Missing:
        return Check("quota", "skip", f"{project} has no {metric.partition('/')[2]}; {look}")
    except Hidden as problem:
        return Check("quota", "skip", f"may not be read: {problem}; {look}")
    by_place = limits(answer, need.places)
    known = {place: limit for place, limit in by_place.items() if limit is not None}
    if not known:
        return Check("quota", "skip", f"no limit is told for {', '.join(need.places)}; {look}")
    enough = [p for p, limit in known.items() if limit == _UNLIMITED or limit >= need.gpus]
    told = ", ".join(f"{p}: {'no limit' if n == _UNLIMITED else n}" for p, n in known.items())
    name = metric.partition("/")[2]
    detail = f"{what}; {name} {told}"
    if len(enough) == len(need.places):
        return Check("quota", "pass", detail)
    fix = f"ask for more of {name} at {console}"
    if enough:
        return Check("quota", "warn", f"{detail}: enough in {', '.join(enough)} only", fix)
    return Check("quota", "fail", f"{detail}: not enough", fix)
