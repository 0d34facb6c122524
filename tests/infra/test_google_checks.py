"""What Pulumi itself lets through is told before the engine starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infra import checks, google
from infra.google import Declared, Expiry, Repository
from tests.infra.registered import FULL

pytest.importorskip("pulumi_gcp", reason="needs the extra `infra`")


def test_whole_foundations_have_no_problem() -> None:
    assert google.problems(FULL) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"versioning": {"enbaled": True}},
         "versioning.enbaled: unknown key; did you mean 'enabled'?"),
        ({"versioning": {"enbaled": True}}, "versioning.enabled: is missing, and required"),
        ({"versioning": {"enabled": "yes please"}},
         "versioning.enabled: must be true or false, not 'yes please'"),
        ({"versioning": True}, "versioning: must be a mapping, not bool"),
        ({"force_destroy": "no"}, "force_destroy: must be true or false, not 'no'"),
        ({"storage_class": 5}, "storage_class: must be a text, not 5"),
        ({"storage_class": "FAST"},
         "storage_class: 'FAST' is not allowed; write one of STANDARD, NEARLINE, COLDLINE, "
         "ARCHIVE"),
        ({"location": None}, "location: is null"),
        ({"location": "us_central1"},
         "location: 'us_central1' is not allowed; write a region (US-CENTRAL1) or a multi-region "
         "(US, EU, ASIA)"),
        ({"lifecycle_rules": {"action": {}}}, "lifecycle_rules: must be a list, not dict"),
        ({"lifecycle_rules": [{"action": {"type": "Delete"}}]},
         "lifecycle_rules[0].condition: is missing, and required"),
        ({"lifecycle_rules": [{"action": {"type": "Remove"}, "condition": {"age": 1}}]},
         "lifecycle_rules[0].action.type: 'Remove' is not allowed; write one of Delete, "
         "AbortIncompleteMultipartUpload, SetStorageClass"),
        ({"lifecycle_rules": [{"action": {"type": "Delete"}, "condition": {"age": "7"}}]},
         "lifecycle_rules[0].condition.age: must be a whole number, not '7'"),
        ({"lifecycle_rules": [{"action": {"type": "Delete"}, "condition": {"age": True}}]},
         "lifecycle_rules[0].condition.age: must be a whole number, not True"),
        ({"soft_delete_policy": {"retention_duration_seconds": 60}},
         "soft_delete_policy.retention_duration_seconds: 60 is not allowed; write 0, or 604800 "
         "(7 days) to 7776000 (90 days)"),
        ({"labels": {"launch-owner": 3}}, "labels.launch-owner: must be a text, not 3"),
        ({"labels": {"launch-owner": "Ann B"}},
         "labels.launch-owner: 'Ann B' is not allowed; write at most 63 of a-z, 0-9, - and _"),
        ({"public": True}, "public: unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_input_of_the_bucket_is_one_line(change: dict[str, Any], line: str) -> None:
    (bucket,) = (one for one in google.resources(FULL) if one.name == "bucket")

    found = list(checks.of_declared(_with(bucket, change)))

    assert any(one.startswith(f"bucket: {line}") for one in found), found


def test_a_required_input_that_is_missing_is_told() -> None:
    (bucket,) = (one for one in google.resources(FULL) if one.name == "bucket")
    without = {key: value for key, value in bucket.inputs.items() if key != "location"}

    found = list(checks.of_declared(replace(bucket, inputs=without)))

    assert found == ["bucket: location: is missing, and required"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"project": "Proj"}, "bucket: project: 'Proj' is not allowed"),
        ({"bucket": "No_Such/Bucket"}, "bucket: name: 'No_Such/Bucket' is not allowed"),
        ({"bucket_location": "mars"}, "bucket: location: 'MARS' is not allowed"),
        ({"accounts": ("me@proj-123.iam.gserviceaccount.com",)},
         "account-me: account_id: 'me' is not allowed; write 6 to 30 of a-z, 0-9 and -, a letter "
         "first"),
        ({"secrets": ("hf.token",)}, "secret-hf.token: secret_id: 'hf.token' is not allowed"),
        ({"repositories": (Repository("us", "Train"),)},
         "repository-us.Train: repository_id: 'Train' is not allowed"),
        ({"operators": ("ann@example.com",)},
         "bucket-storage.objectUser-ann@example.com: member: 'ann@example.com' is not allowed; "
         "write user:EMAIL, group:EMAIL"),
        ({"viewers": ("allUsers",)}, "bucket-storage.objectViewer-allUsers: member: 'allUsers'"),
        ({"expiries": (Expiry(0, "tmp/"),)},
         "bucket: lifecycle_rules[1].condition.age: 0 is not allowed; write 1 day or more"),
        ({"expiries": (Expiry(7),)},
         "bucket: lifecycle_rules[1].condition.matches_suffixes[0]: '' is not allowed; write a "
         "part of a name"),
        ({"services": ("storage",)}, "service-storage: service: 'storage' is not allowed"),
        ({"secrets": ("a", "a")}, "secret-a: declared twice"),
    ],
)  # fmt: skip
def test_wrong_foundations_are_told_by_resource_and_input(wrong: Any, told: str) -> None:
    found = google.problems(replace(FULL, **wrong))

    assert any(line.startswith(told) for line in found), found


def test_a_role_that_is_misspelt_is_told() -> None:
    grant = next(one for one in google.resources(FULL) if "role" in one.inputs)

    (line,) = checks.of_declared(_with(grant, {"role": "role/storage.admin"}))

    assert line.endswith("write roles/..., or a role of a project or an organization")


def _with(one: Declared, change: dict[str, Any]) -> Declared:
    return replace(one, inputs={**one.inputs, **change})
