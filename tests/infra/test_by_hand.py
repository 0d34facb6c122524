"""The commands that delete what a destroy leaves."""

from __future__ import annotations

import pytest

from infra import by_hand, google
from tests.infra.registered import FULL

_PROJECT = "--project=proj-123"
_EMAIL = "trainer@proj-123.iam.gserviceaccount.com"
_ANN = "--member=user:ann@example.com"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("account-trainer", f"iam service-accounts delete {_EMAIL} {_PROJECT}"),
        ("secret-hf-token", f"secrets delete hf-token {_PROJECT}"),
        ("repository-us-central1.train",
         f"artifacts repositories delete train --location=us-central1 {_PROJECT}"),
        (f"project-logging.logWriter-serviceAccount:{_EMAIL}",
         f"projects remove-iam-policy-binding proj-123 --member=serviceAccount:{_EMAIL} "
         "--role=roles/logging.logWriter"),
        ("secret-hf-token-secretmanager.secretVersionAdder-user:ann@example.com",
         f"secrets remove-iam-policy-binding hf-token {_PROJECT} {_ANN} "
         "--role=roles/secretmanager.secretVersionAdder"),
        ("account-trainer-iam.serviceAccountUser-user:ann@example.com",
         f"iam service-accounts remove-iam-policy-binding {_EMAIL} {_ANN} "
         "--role=roles/iam.serviceAccountUser"),
        ("repository-us-central1.train-artifactregistry.writer-user:ann@example.com",
         "artifacts repositories remove-iam-policy-binding train --location=us-central1 "
         f"{_PROJECT} {_ANN} --role=roles/artifactregistry.writer"),
    ],
)  # fmt: skip
def test_each_kind_has_its_command(name: str, command: str) -> None:
    (one,) = (one for one in google.resources(FULL) if one.name == name)

    assert by_hand.deletion(one) == f"gcloud {command}"


def test_what_has_a_rule_of_its_own_has_no_command() -> None:
    (bucket,) = (one for one in google.resources(FULL) if one.name == "bucket")

    with pytest.raises(ValueError, match="no command deletes"):
        by_hand.deletion(bucket)
