"""Who is told what happens to a run: the recipe's `notify:` block.

The driver tells, from its own host, after the record of what happened is in the journal. Of each
event `notified` is written first, so that no later driver tells it again; a delivery never holds
the run up, and one that fails is said once, as `undelivered`. The address of a webhook is a secret:
it is read when it is used, and stands in no message.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from launcher import console, money, retry
from launcher.backends.base import Env, Phase
from launcher.claim import Claim
from launcher.errors import Exit, LaunchError
from launcher.fold import Fold, spent
from launcher.posting import post
from launcher.run import Attempt, Run
from launcher.spec import Budget, Notify

#: Version of the message.
VERSION = 1
#: How often one delivery is tried, and the seconds that it may take in all.
TRIES, PATIENCE = 3, 10.0
_SECRET_MANAGER = "https://secretmanager.googleapis.com"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Event:
    """What happened. `id` is the same for every driver that sees it; `names`: what the recipe may
    call it in `on`, the most exact one first."""

    id: str
    names: tuple[str, ...]
    text: str


class Herald:
    """Tells of one claimed run. `patience`: seconds that one delivery may take."""

    def __init__(self, claim: Claim, patience: float = PATIENCE) -> None:
        self.claim, self.patience = claim, patience
        self._under_way: list[_Delivery] = []
        self._refused = False

    def tell(self) -> None:
        """Begin to deliver what has happened since it was last called; waits for nothing."""
        claim = self.claim
        if not claim.recipe.notify:
            return
        if claim.foreign:  # no program and no variable that another machine has named is used
            if not self._refused:
                claim.say("notify: this recipe comes from another machine: nobody is told")
            self._refused = True
            return
        for event in events(claim.fold, claim.recipe.budget, claim.clock.now()):
            if event.id not in claim.fold.notified:
                self._send(event)
        self._collect()

    def finish(self) -> None:
        """`tell`, then wait until everything is delivered or given up. The run is over: a journal
        that takes no more records changes nothing about how it ended."""
        try:
            self.tell()
            for delivery in self._under_way:
                delivery.wait()
            self._collect()
        except (LaunchError, OSError) as error:
            self.claim.say(f"notify: {error}")

    def _send(self, event: Event) -> None:
        claim = self.claim
        wanted = [
            (to, next(name for name in event.names if name in to.on))
            for to in claim.recipe.notify
            if set(event.names) & set(to.on)
        ]
        if not wanted:
            return
        claim.record("notified", id=event.id, to=[label(to) for to, _ in wanted])
        for to, name in wanted:
            told = message(claim.run, name, event.text, claim.clock.now())
            self._under_way.append(_Delivery(to, told, claim.env, self.patience))

    def _collect(self) -> None:
        """Say and record what could not be delivered."""
        for delivery in self._under_way:
            delivery.give_up_late()
        for delivery in [one for one in self._under_way if one.over]:
            self._under_way.remove(delivery)
            if delivery.why:
                to, name = label(delivery.to), delivery.message["event"]
                self.claim.say(f"notify: '{name}' could not be told to {to}: {delivery.why}")
                self.claim.record("undelivered", event=name, to=to, why=delivery.why)


def events(fold: Fold, budget: Budget, now: float) -> Iterator[Event]:
    """What is worth telling, since the run was last opened, by its journal."""
    run = fold.run
    for job in run.jobs:
        fresh = job.attempts[fold.before.get(job.index, 0) :]
        for attempt, following in pairwise(fresh):
            if attempt.phase is Phase.PREEMPTED:
                name = f"preempted-{job.index}-{attempt.number}"
                yield Event(name, ("preempted",), _of_preempted(run, attempt, following))
            elif attempt.cause == retry.DEADLINE:
                name = f"deadline-{job.index}-{attempt.number}"
                yield Event(name, ("budget",), _of_deadline(run, attempt, following))
    if run.ended is not None:
        name = f"end-{fold.resumed}-{run.exit_code}"
        yield Event(name, _names(run), _of_end(run))
        return
    newest = [attempt for job in run.jobs for attempt in job.attempts][-1:]
    if not newest or newest[0].phase.over:
        return
    limit = money.almost(run, budget, now, newest[0].usd_per_hour)
    if limit is not None:
        left = console.duration(limit.left)
        text = f"{run.name}: {limit} are used; {left} more at this pace"
        # Of a budget that was changed in place it is told again.
        yield Event(f"almost-{fold.resumed}-{budget.usd}-{budget.hours}", ("budget",), text)


def message(run: Run, event: str, text: str, now: float) -> dict[str, Any]:
    """What is told of a run, as JSON. `text` is one line, which is all that chat tools read."""
    return {
        "v": VERSION, "event": event, "run": run.name, "recipe": run.recipe,
        "phase": run.phase.value, "why": run.why, "exit_code": run.exit_code,
        "spent_usd": spent(run, run.ended or now), "root": run.root,
        "text": " ".join(console.plain(text).split()),
    }  # fmt: skip


def label(to: Notify) -> str:
    """How messages call it: the reference to an address, never the address."""
    return f"command {to.command[0]}" if to.command else f"webhook {to.webhook}"


def unready(to: Notify, env: Env) -> str:
    """Why a driver on this machine could not tell anybody, as far as that can be seen without
    asking anyone; empty: nothing is missing."""
    if to.command:
        found = shutil.which(to.command[0], path=env.environ.get("PATH"))
        return "" if found else f"there is no program {to.command[0]} here"
    if str(to.webhook).startswith("env://"):
        try:
            _address(str(to.webhook), env)
        except _Undelivered as problem:
            return str(problem)
    return ""


def deliver(to: Notify, told: Mapping[str, Any], env: Env, patience: float = PATIENCE) -> str:
    """Deliver one message: up to three tries, in `patience` seconds of real time; the waits between
    them are the clock's. Returns why it could not be done; empty: it was."""
    ends = time.monotonic() + patience
    why = ""
    for tries in range(1, TRIES + 1):
        left = ends - time.monotonic()
        if left <= 0:
            break
        try:
            if to.command:
                _run(to.command, told, env, left)
            else:
                _post(_address(str(to.webhook), env), told, min(left, patience / 2))
            return ""
        except _Undelivered as problem:
            why = str(problem)
            if not problem.again:
                break
        if tries < TRIES:
            env.clock.sleep(retry.backoff(tries))
    return why


class _Undelivered(Exception):
    """Why a try failed, without any address; `again`: another one may do."""

    def __init__(self, why: str, again: bool = True) -> None:
        super().__init__(why)
        self.again = again


@dataclass
class _Delivery:
    """One message on its way, in a thread that ends with the process."""

    to: Notify
    message: Mapping[str, Any]
    env: Env
    patience: float
    over: bool = False
    why: str = ""
    _thread: threading.Thread = field(init=False)
    _ends: float = field(init=False)

    def __post_init__(self) -> None:
        self._ends = time.monotonic() + self.patience + 1.0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is over; one that a slow answer keeps is given up."""
        self._thread.join(max(0.0, self._ends - time.monotonic()))
        self.give_up_late()

    def give_up_late(self) -> None:
        """What no limit of a connection ends: the look-up of a name, a service of the cloud."""
        if not self.over and time.monotonic() >= self._ends:
            self.over, self.why = True, f"not done within {self.patience:g} s"

    def _work(self) -> None:
        try:
            why = deliver(self.to, self.message, self.env, self.patience)
        except Exception as error:  # a message must not cost the run anything
            why = type(error).__name__
        if not self.over:
            self.why, self.over = why, True


def _post(address: str, told: Mapping[str, Any], seconds: float) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "launch"}
    try:
        post(address, json.dumps(told).encode(), headers, seconds)
    except urllib.error.HTTPError as error:
        again = error.code >= 500 or error.code in (408, 429)
        raise _Undelivered(f"it answers {error.code}", again) from None
    except urllib.error.URLError as error:
        what = getattr(error.reason, "strerror", None) or type(error.reason).__name__
        raise _Undelivered(f"it cannot be reached: {what}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Undelivered(f"it does not answer ({type(error).__name__})") from None
    except ValueError:
        raise _Undelivered("it is no address", again=False) from None


def _address(reference: str, env: Env) -> str:
    """The address that a reference stands for: https://, or http:// on this machine."""
    scheme, _, source = reference.partition("://")
    value = _managed(source, env) if scheme == "secret-manager" else env.environ.get(source, "")
    if not value:
        raise _Undelivered(f"{source} is not set where the driver runs", again=False)
    try:
        parts = urlsplit(value.strip())
        host = parts.hostname
    except ValueError:
        raise _Undelivered("it is no address", again=False) from None
    if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOOPBACK):
        raise _Undelivered("its address does not begin with https://", again=False)
    return value.strip()


def _managed(source: str, env: Env) -> str:
    """A value of Secret Manager, with the identity of the driver's host."""
    from launcher import google

    project, secret, version = (*source.split("/"), "latest")[:3]
    base = google.endpoint(env.environ, "secretmanager", _SECRET_MANAGER)
    url = f"{base}/v1/projects/{project}/secrets/{secret}/versions/{version}:access"
    try:
        answer = google.call(google.session(env.environ), "GET", url, f"secret {secret}", "")
        return base64.b64decode(answer["payload"]["data"]).decode()
    except LaunchError as error:
        raise _Undelivered(str(error)) from None
    except (KeyError, TypeError, ValueError):
        raise _Undelivered(f"secret {secret} holds no text", again=False) from None


def _run(command: tuple[str, ...], told: Mapping[str, Any], env: Env, seconds: float) -> None:
    """The message on its standard input; what it prints is not kept."""
    given = {**env.environ, "LAUNCH_EVENT": str(told["event"]), "LAUNCH_RUN": str(told["run"])}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=given, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise _Undelivered(f"it cannot be started: {error.strerror}", again=False) from None
    try:
        process.communicate(json.dumps(told).encode() + b"\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise _Undelivered(f"it was not done within {seconds:.0f} s: killed", again=False) from None
    if process.returncode:
        raise _Undelivered(f"it ended with exit code {process.returncode}")


def _names(run: Run) -> tuple[str, ...]:
    """What the end of a run is called: one name, and `gate` is a kind of failure."""
    if run.exit_code in (Exit.LEAKED, Exit.BUDGET):
        return ("leaked",) if run.exit_code == Exit.LEAKED else ("budget",)
    if run.exit_code == Exit.OK:
        return ("ended",)
    stopped = any(stage.gate not in (None, "passed") for stage in run.stages)
    return ("gate", "failed") if stopped else ("failed",)


def _of_end(run: Run) -> str:
    took = console.duration(run.lasted(run.ended or run.created))
    why = f": {run.why}" if run.why else ""
    return f"{run.name} {run.phase.value} after {took}, {console.spent(run)}{why}"


def _of_preempted(run: Run, attempt: Attempt, following: Attempt) -> str:
    return f"{run.name}: preempted in {attempt.place} ({attempt.why}); {_goes_on(following)}"


def _of_deadline(run: Run, attempt: Attempt, following: Attempt) -> str:
    what = f"attempt {attempt.number} was ended by the deadline that its budget had set"
    return f"{run.name}: {what}; {_goes_on(following)}"


def _goes_on(attempt: Attempt) -> str:
    step = f"step {attempt.from_step}" if attempt.from_step else "the beginning"
    return f"attempt {attempt.number} goes on from {step} in {attempt.place}"
