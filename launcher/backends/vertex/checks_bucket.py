"""Rows of `launch doctor` about buckets: there, near the machines, writable, and free of what would
break a run (retention) or cost more than it seems (versions, soft deletion)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from infra.google import OBJECTS, READ_OBJECTS
from launcher.backends.base import Check
from launcher.backends.vertex.asking import Caller, Hidden, Missing, Wanted

#: What the driver does with a run's bucket. Deleting is part of replacing: pointers are replaced.
_WRITES = ("storage.objects.create", "storage.objects.delete", "storage.objects.get",
           "storage.objects.list")  # fmt: skip
_READS = ("storage.objects.get", "storage.objects.list")
#: Multi-regions and dual-regions of Cloud Storage, and how the regions within them begin.
_WITHIN = {
    "US": ("us-",), "EU": ("europe-",), "ASIA": ("asia-",),
    "NAM4": ("us-central1", "us-east1"), "EUR4": ("europe-north1", "europe-west4"),
    "ASIA1": ("asia-northeast1", "asia-northeast2"),
}  # fmt: skip
_DAY = 86400
#: A rule that deletes objects this young may take a run's checkpoints while it goes on.
_SHORT_DAYS = 30


def buckets(caller: Caller, asked: Wanted) -> Iterator[Check]:
    """The buckets that the recipe writes to, then those that it only reads."""
    for name in asked.buckets:
        yield from _bucket(caller, asked, name, _WRITES)
    for name in asked.inputs:
        yield from _bucket(caller, asked, name, _READS)


def _bucket(
    caller: Caller, asked: Wanted, name: str, permissions: tuple[str, ...]
) -> Iterator[Check]:
    what, path = f"gs://{name}", f"storage/v1/b/{quote(name, safe='')}"
    written = permissions == _WRITES
    row = "bucket" if written else "input bucket"
    try:
        facts = caller.get("storage", path, what)
    except Missing:
        place = asked.places[0]
        yield Check(row, "fail", f"there is no {what}",
                    f"gcloud storage buckets create {what} --location={place} "
                    f"--project={asked.project}")  # fmt: skip
        return
    except Hidden:  # objectUser may not see the bucket's own facts: no fault
        facts = {}
    try:
        query = {"permissions": list(permissions)}
        answer = caller.get("storage", f"{path}/iam/testPermissions", what, **query)
    except Hidden as problem:
        yield Check(row, "fail" if written else "warn", str(problem), _grant(name, written))
        return
    lacking = [one for one in permissions if one not in answer.get("permissions", ())]
    if lacking:
        words = f"{what}: you lack {', '.join(lacking)}"
        if written:
            yield Check(row, "fail", words, _grant(name, written))
        else:  # the job reads it, with its own account
            yield Check(row, "skip", f"{words}; the job reads it with its own account")
    else:
        yield Check(row, "pass", f"{what}: you may {'write' if written else 'read'} it")
    yield from _place(facts, asked, row, what)
    if written:
        yield from _keeping(facts, row, what)


def _place(facts: Mapping[str, Any], asked: Wanted, row: str, what: str) -> Iterator[Check]:
    if "location" not in facts:
        yield Check(f"{row} place", "skip", f"{what}: where it lies may not be seen (it takes "
                    "storage.buckets.get)")  # fmt: skip
        return
    location = str(facts["location"]).upper()
    own = [str(one).lower() for one in
           facts.get("customPlacementConfig", {}).get("dataLocations", ())]  # fmt: skip
    near = _WITHIN.get(location, (location.lower(),))
    if location not in _WITHIN and "-" not in location and not own:
        yield Check(f"{row} place", "skip", f"{what} lies in {location}; which regions that is "
                    "is not known here")  # fmt: skip
        return
    far = [place for place in asked.places
           if place not in own and not place.startswith(near)]  # fmt: skip
    if far:
        yield Check(f"{row} place", "warn", f"{what} lies in {location}, not beside "
                    f"{', '.join(far)}: data and checkpoints cross regions, slower and billed",
                    "use a bucket in the region of hardware.places, or those places")  # fmt: skip
    else:
        yield Check(f"{row} place", "pass", f"{what} lies in {location}")


def _keeping(facts: Mapping[str, Any], row: str, what: str) -> Iterator[Check]:
    """Rules that keep what a run replaces and deletes, or delete what it keeps."""
    name = f"{row} rules"
    if "location" not in facts:
        yield Check(name, "skip", f"{what}: retention and versions may not be seen")
        return
    kept = int(facts.get("retentionPolicy", {}).get("retentionPeriod", 0))
    if kept or facts.get("defaultEventBasedHold"):
        why = f"keeps every object for {kept / _DAY:g} days" if kept else "holds every new object"
        yield Check(name, "fail", f"{what} {why}: a run cannot replace its pointers, nor delete "
                    "old checkpoints", "use a bucket without retention and holds")  # fmt: skip
        return
    if facts.get("billing", {}).get("requesterPays"):
        yield Check(name, "fail", f"{what}: the requester pays, and requests without a project are "
                    "refused", "use a bucket whose owner pays")  # fmt: skip
        return
    if days := _deleted_after(facts):
        yield Check(name, "warn", f"{what}: a rule deletes objects after {days} days, checkpoints "
                    "of a long run too", "limit that rule to other prefixes")  # fmt: skip
        return
    if facts.get("versioning", {}).get("enabled"):
        yield Check(name, "warn", f"{what} keeps versions: every replaced pointer and deleted "
                    "checkpoint stays, and bills",
                    f"gcloud storage buckets update {what} --no-versioning")  # fmt: skip
        return
    soft = int(facts.get("softDeletePolicy", {}).get("retentionDurationSeconds", 0))
    if soft:
        yield Check(name, "pass", f"{what}: what is deleted bills for {soft / _DAY:g} days more "
                    "(soft deletion)")  # fmt: skip
    else:
        yield Check(name, "pass", f"{what}: no retention, no versions")


def _deleted_after(facts: Mapping[str, Any]) -> int:
    """The fewest days after which a rule for all live objects deletes them; 0: none so soon."""
    ages = []
    for rule in facts.get("lifecycle", {}).get("rule", ()):
        condition = rule.get("condition", {})
        only = {"age"} >= set(condition)
        if rule.get("action", {}).get("type") == "Delete" and only and "age" in condition:
            ages.append(int(condition["age"]))
    shortest = min(ages, default=_SHORT_DAYS + 1)
    return max(1, shortest) if shortest <= _SHORT_DAYS else 0


def _grant(name: str, written: bool) -> str:
    role = OBJECTS if written else READ_OBJECTS
    return (
        f"gcloud storage buckets add-iam-policy-binding gs://{name} --role={role} "
        "--member=user:YOU (or serviceAccount:...)"
    )
