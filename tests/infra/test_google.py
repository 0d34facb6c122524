"""The foundations' program: every resource, input, order and option, against a golden file
(`python -m tests.infra.registered > tests/golden/infra/kd_l4.json` writes it anew)."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import export, google
from infra.google import Expiry, Foundations, Repository
from tests.infra.registered import FULL

pytest.importorskip("pulumi_gcp", reason="needs the extra `infra`")

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "infra" / "kd_l4.json"
JOB = "serviceAccount:trainer@proj-123.iam.gserviceaccount.com"


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """[what the program registers with the bucket adopted, what the exported one registers]."""
    folder = tmp_path_factory.mktemp("exported")
    export.write(FULL, folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.infra.registered", "bucket", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_do_not_tell"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "hf_do_not_tell" not in done.stdout
    return json.loads(done.stdout)


def test_every_resource_is_registered_with_these_inputs_and_options(told: Any, golden: Any) -> None:
    adopting = told[0]

    assert adopting["outputs"] == golden["outputs"]
    assert adopting["resources"].keys() == golden["resources"].keys()
    for name, found in adopting["resources"].items():
        if name != "bucket":
            assert found == golden["resources"][name], name


def test_an_adopted_resource_is_imported_as_it_is(told: Any, golden: Any) -> None:
    found, expected = told[0]["resources"]["bucket"], golden["resources"]["bucket"]

    assert found == {
        **expected,
        "import": "proj-123/my-bkt",
        "ignored": sorted(expected["inputs"]),
    }
    assert not expected["import"] and not expected["ignored"]


def test_the_exported_project_registers_the_very_same(told: Any, golden: Any) -> None:
    assert told[1] == golden


def test_the_table_says_what_is_registered(golden: Any) -> None:
    declared = {one.name: one for one in google.resources(FULL)}

    assert declared.keys() == golden["resources"].keys()
    for name, found in golden["resources"].items():
        one = declared[name]
        assert (one.type_token, sorted(one.after), one.retain) == (
            found["type"], found["after"], found["retain"],
        )  # fmt: skip
        assert {_camel(key) for key in one.inputs} == set(found["inputs"])


def test_the_bucket_is_private_kept_and_loses_only_what_was_asked_for(golden: Any) -> None:
    bucket = golden["resources"]["bucket"]
    inputs = bucket["inputs"]

    assert bucket["retain"] is True and inputs["forceDestroy"] is False
    assert inputs["uniformBucketLevelAccess"] is True
    assert inputs["publicAccessPrevention"] == "enforced"
    rules = [(rule["action"]["type"], rule["condition"]) for rule in inputs["lifecycleRules"]]
    assert rules == [
        ("AbortIncompleteMultipartUpload", {"age": 7}),
        ("Delete", {"age": 7, "matchesPrefixes": ["tmp/"]}),
        ("Delete", {"age": 30, "matchesSuffixes": ["/crash_dump.pt"]}),
    ]


def test_a_bucket_that_need_not_be_kept_goes_with_its_objects() -> None:
    (bucket,) = (
        one for one in google.resources(replace(FULL, retain_bucket=False)) if one.name == "bucket"
    )

    assert not bucket.retain and bucket.inputs["force_destroy"] is True


def test_the_job_gets_these_roles_and_no_other(golden: Any) -> None:
    granted = {
        (found["type"].rpartition(":")[2], found["inputs"]["role"])
        for found in golden["resources"].values()
        if found["inputs"].get("member") == JOB
    }

    assert granted == {
        ("BucketIAMMember", "roles/storage.objectUser"),
        ("SecretIamMember", "roles/secretmanager.secretAccessor"),
        ("IAMMember", "roles/logging.logWriter"),
    }


def test_nobody_but_the_job_may_read_a_secret(golden: Any) -> None:
    readers = {
        found["inputs"]["member"]
        for found in golden["resources"].values()
        if found["inputs"].get("role") == "roles/secretmanager.secretAccessor"
    }

    assert readers == {JOB}


def test_secrets_have_no_version_and_so_no_value_in_any_state(golden: Any) -> None:
    secrets = [one for one in golden["resources"].values() if "secret:" in one["type"]]

    assert [set(one["inputs"]) for one in secrets] == [
        {"project", "secretId", "replication", "labels"}
    ] * 2
    assert not [one for one in golden["resources"].values() if "ersion:" in one["type"]]


def test_services_stay_on_after_a_destroy(golden: Any) -> None:
    services = [one for one in golden["resources"].values() if one["type"] == google.SERVICE]

    assert len(services) == len(FULL.services)
    assert all(one["inputs"]["disableOnDestroy"] is False for one in services)


_id = st.text(string.ascii_lowercase, min_size=6, max_size=9)
_word = st.from_regex(r"[a-z][a-z0-9-]{1,8}[a-z0-9]", fullmatch=True)
_member = st.builds(lambda name: f"user:{name}@example.com", _word)
_foundations = st.builds(
    Foundations,
    name=_word,
    project=_id,
    region=st.just("us-west1"),
    services=st.sets(st.sampled_from(FULL.services)).map(tuple),
    bucket=st.none() | _word,
    expiries=st.lists(st.builds(Expiry, st.integers(1, 99), _word), max_size=2).map(tuple),
    accounts=st.sets(_id, max_size=3).map(
        lambda ids: tuple(f"{one}@proj-123.iam.gserviceaccount.com" for one in sorted(ids))
    ),
    secrets=st.sets(st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True), max_size=3).map(tuple),
    repositories=st.sets(
        st.builds(Repository, st.sampled_from(("us", "us-central1")), _word), max_size=3
    ).map(tuple),
    operators=st.sets(_member, max_size=2).map(tuple),
    viewers=st.sets(_member, max_size=2).map(tuple),
)


@settings(max_examples=40, deadline=None)
@given(f=_foundations)
def test_names_are_unique_stable_and_behind_what_they_need(f: Foundations) -> None:
    declared = google.resources(f)

    assert google.resources(f) == declared
    for part in ("name", "physical_id"):
        names = [(one.type_token, getattr(one, part)) for one in declared]
        assert len(set(names)) == len(names)
    assert len({one.name for one in declared}) == len(declared)
    before: set[str] = set()
    for one in declared:
        assert before.issuperset(one.after), one.name
        before.add(one.name)
    assert google.problems(f) == []
    compile(export.program_text(f), "__main__.py", "exec")


def test_the_repository_of_another_region_is_another_resource() -> None:
    two = (Repository("us", "central1-x"), Repository("us-central1", "x"))
    names = [one.name for one in google.resources(replace(FULL, repositories=two))]

    assert len(set(names)) == len(names)


def _camel(key: str) -> str:
    first, *rest = key.split("_")
    return first + "".join(part.capitalize() for part in rest)
