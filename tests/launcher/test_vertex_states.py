"""What the states and errors of Vertex AI mean: every member of the client's enum, every kind of
text."""

from __future__ import annotations

import pytest

from launcher import retry
from launcher.backends.base import Held, Phase
from launcher.backends.vertex.states import STATES, ended, name_of

aiplatform = pytest.importorskip("google.cloud.aiplatform_v1", reason="needs `rehearse`")

IMAGE = "Image us-docker.pkg.dev/p/r/trainer:1 not found."
QUOTA = (
    "The following quota metrics exceed quota limits: "
    "aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus"
)
STOCK_OUT = "Resources are insufficient in region: us-central1. Please try a different region."


def test_every_state_of_the_client_has_a_meaning_and_there_is_no_other() -> None:
    known = {name_of(state) for state in aiplatform.JobState}
    assert known == set(STATES) and len(known) == 12


def test_a_job_that_ended_holds_nothing_and_one_that_did_not_holds_something() -> None:
    for phase, held in STATES.values():
        assert phase.over == (held is Held.NONE)


def test_a_state_that_this_client_does_not_know_has_a_name() -> None:
    assert name_of(77) == "77"


@pytest.mark.parametrize(
    ("code", "text", "started", "spot", "phase", "cause", "exit_code"),
    [
        (8, STOCK_OUT, False, True, Phase.FAILED, retry.CAPACITY, None),
        (8, STOCK_OUT, True, True, Phase.PREEMPTED, retry.PREEMPTED, None),
        (8, STOCK_OUT, True, False, Phase.FAILED, retry.CAPACITY, None),
        (8, "something is exhausted", False, False, Phase.FAILED, retry.CAPACITY, None),
        (8, QUOTA, True, True, Phase.FAILED, retry.CAPACITY, None),
        (13, "the VM was preempted", True, False, Phase.PREEMPTED, retry.PREEMPTED, None),
        (3, IMAGE, False, False, Phase.FAILED, retry.REQUEST, None),
        (3, "Failed to pull image x/y:1: manifest unknown", False, False,
         Phase.FAILED, retry.REQUEST, None),
        (7, "Permission denied to access image x/y:1", False, False,
         Phase.FAILED, retry.ACCESS, None),
        (7, "no", False, False, Phase.FAILED, retry.ACCESS, None),
        (3, "The replica workerpool0-0 exited with a non-zero status of 1.", True, True,
         Phase.FAILED, retry.JOB, 1),
        (3, "The replica workerpool1-2 exited with a non-zero status of 75.", True, False,
         Phase.PREEMPTED, retry.PREEMPTED, 75),
        (3, "The replica workerpool0-0 exited with a non-zero status of 143.", True, True,
         Phase.PREEMPTED, retry.PREEMPTED, 143),
        (3, "The replica workerpool0-0 exited with a non-zero status of 143.", True, False,
         Phase.FAILED, retry.JOB, 143),
        (3, "The replica workerpool0-0 ran out-of-memory and exited with a non-zero status of "
         "9(SIGKILL)", True, False, Phase.FAILED, retry.JOB, 9),
        (13, "Internal error occurred for the current attempt.", True, False,
         Phase.FAILED, retry.INFRASTRUCTURE, None),
        (4, "ran for longer than its timeout", True, False,
         Phase.FAILED, retry.INFRASTRUCTURE, None),
        (3, "the command is wrong", False, False, Phase.FAILED, retry.JOB, None),
        (0, "", False, False, Phase.FAILED, retry.JOB, None),
    ],
)  # fmt: skip
def test_an_error_is_judged_by_its_text_and_its_code(
    code: int, text: str, started: bool, spot: bool, phase: Phase, cause: str,
    exit_code: int | None,
) -> None:  # fmt: skip
    end = ended("FAILED", code, text, "us-central1", started, spot)
    assert (end.phase, end.cause, end.exit_code) == (phase, cause, exit_code)
    assert end.why and "\n" not in end.why


def test_a_traceback_that_speaks_of_permissions_or_quota_is_the_jobs_own() -> None:
    text = "The replica workerpool0-0 exited with a non-zero status of 1.\nPermissionError: denied"
    assert ended("FAILED", 3, text, "p", True, True).cause == retry.JOB


def test_expired_is_the_wait_for_machines_or_the_limit_of_time() -> None:
    waited = ended("EXPIRED", 0, "", "us-west1", started=False, spot=False)
    assert (waited.phase, waited.cause) == (Phase.FAILED, retry.CAPACITY)
    assert "no capacity in us-west1" in waited.why
    ran = ended("EXPIRED", 0, "", "us-west1", started=True, spot=False)
    assert (ran.phase, ran.cause) == (Phase.PREEMPTED, retry.DEADLINE)
    assert "time limit" in ran.why


def test_partial_success_is_no_success() -> None:
    end = ended("PARTIALLY_SUCCEEDED", 0, "", "p", started=True, spot=False)
    assert (end.phase, end.cause) == (Phase.FAILED, retry.JOB)
    assert "does not say why" in end.why
