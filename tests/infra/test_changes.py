"""What the engine's events come to: one change a resource, one line a reason."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("pulumi", reason="needs the extra `infra`")

from pulumi.automation import EngineEvent

from infra.changes import Change, Collector, Step, exists_already, is_access, kind_of, one_line

BUCKET = "urn:pulumi:s::launch::gcp:storage/bucket:Bucket::bucket"
STACK = "urn:pulumi:s::launch::pulumi:pulumi:Stack::launch-s"
PROVIDER = "urn:pulumi:s::launch::pulumi:providers:gcp::default_10_2_0"


@pytest.fixture
def told() -> list[Step]:
    return []


@pytest.fixture
def seen(told: list[Step]) -> Collector:
    return Collector(told.append)


def _step(kind: str, op: str, urn: str = BUCKET, **more: Any) -> EngineEvent:
    facts = {"op": op, "urn": urn, "type": urn.split("::")[2], "provider": "", **more}
    return EngineEvent.from_json({"sequence": 1, "timestamp": 1, kind: {"metadata": facts}})


def _diagnosis(urn: str, message: str, severity: str = "error") -> EngineEvent:
    facts = {"urn": urn, "message": message, "color": "raw", "severity": severity}
    return EngineEvent.from_json({"sequence": 1, "timestamp": 1, "diagnosticEvent": facts})


def test_a_replacement_told_in_three_steps_is_one_change(seen: Collector) -> None:
    for op in ("create-replacement", "replace", "delete-replaced"):
        seen.see(_step("resourcePreEvent", op, keys=["location"], diffs=["labels", "location"]))

    assert seen.changes == (Change("bucket", "storage.Bucket", "replace", ("location",)),)


def test_a_refresh_is_what_comes_of_it(seen: Collector, told: list[Step]) -> None:
    seen.see(_step("resourcePreEvent", "refresh"))
    assert told == []
    seen.see(_step("resOutputsEvent", "update", diffs=["labels"]))

    assert seen.changes == (Change("bucket", "storage.Bucket", "update", ("labels",)),)


@pytest.mark.parametrize(
    ("old", "word"),
    [
        ({"retainOnDelete": True}, "leave"),
        ({"inputs": {"disableOnDestroy": False}}, "leave"),
        ({"inputs": {"disableOnDestroy": True}}, "delete"),
        ({}, "delete"),
    ],
)
def test_what_a_deletion_leaves_in_the_cloud_is_told_apart(
    seen: Collector, old: dict[str, Any], word: str
) -> None:
    seen.see(_step("resourcePreEvent", "delete", old={"urn": BUCKET, **old}))
    seen.see(_step("resOutputsEvent", "delete"))

    assert [change.change for change in seen.changes] == [word]


def test_steps_that_change_something_are_told_as_they_come(
    seen: Collector, told: list[Step]
) -> None:
    seen.see(_step("resourcePreEvent", "create"))
    seen.see(_step("resOutputsEvent", "create"))
    seen.see(_step("resourcePreEvent", "same", STACK))
    seen.see(_step("resourcePreEvent", "create", PROVIDER))
    seen.see(_step("resourcePreEvent", "same", f"{BUCKET}-2"))

    bucket = Change("bucket", "storage.Bucket", "create")
    assert told == [Step(bucket, "started"), Step(bucket, "done")]
    assert [change.name for change in seen.changes] == ["bucket", "bucket-2"]


def test_a_refusal_has_the_name_and_the_reason_of_its_resource(seen: Collector) -> None:
    seen.see(_diagnosis(BUCKET, "deprecated", severity="warning"))
    seen.see(_diagnosis(BUCKET, "<{%reset%}>1 error occurred:\n\t* Error 403: no\n\n<{%reset%}>"))
    seen.see(_step("resOpFailedEvent", "create"))
    seen.see(_diagnosis(STACK, "update failed"))

    assert seen.failures() == [("bucket", "Error 403: no")]


def test_a_failure_of_the_program_belongs_to_no_resource(seen: Collector) -> None:
    seen.see(_diagnosis(STACK, "KeyError: 'x'"))

    assert seen.failures() == [("", "KeyError: 'x'")]


@pytest.mark.parametrize(
    ("reason", "exists", "access"),
    [
        ("googleapi: Error 409: Requested entity already exists, alreadyExists", True, False),
        ("googleapi: Error 409: You already own it., conflict", True, False),
        ("googleapi: Error 403: Permission denied", False, True),
        ("could not find default credentials", False, True),
        ("googleapi: Error 503: try later", False, True),
        ("googleapi: Error 400: Invalid location 4032", False, False),
    ],
)
def test_reasons_are_told_apart(reason: str, exists: bool, access: bool) -> None:
    assert exists_already(reason) == exists
    assert is_access(reason) == access


def test_words_are_short() -> None:
    assert kind_of("gcp:secretmanager/secretIamMember:SecretIamMember") == (
        "secretmanager.SecretIamMember"
    )
    assert kind_of("odd") == "odd"
    assert len(one_line("x " * 1000)) == 400
