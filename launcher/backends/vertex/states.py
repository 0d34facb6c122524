"""What a state and an error of a custom job mean: phase, held, cause. Tables and texts, no calls.

The texts are those that users have reported; the service documents only the codes. A text that is
not known counts by its code, and never as a success.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Optional

from launcher import google, retry
from launcher.backends.base import Held, Phase
from launcher.errors import QuotaFull

#: JobState without its prefix -> what the job does, what it costs. FAILED and EXPIRED are judged by
#: `ended`. Anything that the service adds later counts as PENDING until somebody looks it up.
STATES = {
    "UNSPECIFIED": (Phase.QUEUED, Held.CREATING),
    "QUEUED": (Phase.QUEUED, Held.CREATING),
    "PENDING": (Phase.PROVISIONING, Held.LIVE),
    "RUNNING": (Phase.RUNNING, Held.LIVE),
    "SUCCEEDED": (Phase.SUCCEEDED, Held.NONE),
    "FAILED": (Phase.FAILED, Held.NONE),
    "CANCELLING": (Phase.STOPPING, Held.DELETING),
    "CANCELLED": (Phase.CANCELLED, Held.NONE),
    "PAUSED": (Phase.QUEUED, Held.LIVE),
    "EXPIRED": (Phase.FAILED, Held.NONE),
    "UPDATING": (Phase.RUNNING, Held.LIVE),
    "PARTIALLY_SUCCEEDED": (Phase.FAILED, Held.NONE),
}
UNKNOWN = (Phase.PROVISIONING, Held.LIVE)
_SAID = {
    "QUEUED": "in the queue (for machines, or for quota: the service does not say which)",
    "PENDING": "the machines are being made ready",
    "PAUSED": "paused by the service",
    "UPDATING": "being updated by the service",
    "CANCELLED": "the job was cancelled",
}

# google.rpc.Code
_DEADLINE, _DENIED, _EXHAUSTED, _UNAUTHENTICATED = 4, 7, 8, 16
_INTERNAL = (2, 10, 13, 14)  # unknown, aborted, internal, unavailable
#: Exit codes of the container: boot saved and asks to go on; SIGTERM ended it.
_AGAIN, _TERMINATED = 75, 143

_EXIT = re.compile(r"non-zero (?:exit )?status(?: code)?(?: of)?:? (\d+)", re.I)
_IMAGE = re.compile(
    r"(?:pull|find|fetch|access|download)\w*\s.{0,60}\bimage|image\s.{0,300}\s"
    r"(?:not found|not exist|invalid|cannot be|could not be)|ImagePullBackOff|"
    r"ErrImagePull|manifest unknown",
    re.I,
)
_PERMISSION = re.compile(r"permission|denied|not authorized|unauthorized|forbidden", re.I)
_PREEMPTED = re.compile(r"preempt|spot vm", re.I)


@dataclass(frozen=True)
class Ended:
    """Why a job failed; `cause` is a word of `launcher.retry`."""

    phase: Phase
    cause: str
    why: str
    exit_code: Optional[int] = None


def name_of(state: Any) -> str:
    """`RUNNING` of JobState.JOB_STATE_RUNNING; a number that this client does not know as text."""
    return str(getattr(state, "name", state)).removeprefix("JOB_STATE_")


def said(state: str) -> str:
    """What there is to say about a state that carries no error."""
    return _SAID.get(state, "")


def ended(state: str, code: int, message: str, place: str, started: bool, spot: bool) -> Ended:
    """Judge a job that is FAILED, EXPIRED or PARTIALLY_SUCCEEDED by its error. `started`: it has
    run; `spot`: on capacity that may be taken away."""
    text = google.one_line(message) or f"{state.lower()}, and the service does not say why"
    if state == "EXPIRED":
        if started:
            return Ended(Phase.PREEMPTED, retry.DEADLINE, f"the time limit was reached: {text}")
        return Ended(Phase.FAILED, retry.CAPACITY, f"no capacity in {place} in time: {text}")
    found = _EXIT.search(message)
    if found:
        return _exited(int(found[1]), text, spot)
    if _PREEMPTED.search(message):
        return Ended(Phase.PREEMPTED, retry.PREEMPTED, text)
    short = google.shortage(message, place)
    if isinstance(short, QuotaFull):
        return Ended(Phase.FAILED, retry.CAPACITY, str(short))
    if short is not None or code == _EXHAUSTED:
        if spot and started:  # the machine was taken and there is no other one
            return Ended(Phase.PREEMPTED, retry.PREEMPTED, f"preempted: {text}")
        return Ended(Phase.FAILED, retry.CAPACITY, str(short or f"no capacity in {place}: {text}"))
    if _IMAGE.search(message):
        cause = retry.ACCESS if _PERMISSION.search(message) else retry.REQUEST
        return Ended(Phase.FAILED, cause, f"the image cannot be used: {text}")
    if code in (_DENIED, _UNAUTHENTICATED) or _PERMISSION.search(message):
        return Ended(Phase.FAILED, retry.ACCESS, text)
    if code in _INTERNAL or code == _DEADLINE:
        return Ended(Phase.FAILED, retry.INFRASTRUCTURE, text)
    return Ended(Phase.FAILED, retry.JOB, text)


def _exited(code: int, text: str, spot: bool) -> Ended:
    if code == _AGAIN or (spot and code == _TERMINATED):
        return Ended(Phase.PREEMPTED, retry.PREEMPTED, text, code)
    return Ended(Phase.FAILED, retry.JOB, text, code)
