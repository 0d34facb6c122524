"""The backend `vertex`: custom jobs of Vertex AI.

`request.py` makes the requests (pure), `jobs.py` sends them, `states.py` says what the answers
mean, `logs.py` and `quota.py` read Cloud Logging. Rows of `launch doctor`: `checks.py` begins them,
`checks_project.py`, `checks_access.py` and `checks_bucket.py` ask one service each question.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from typing import Optional

from launcher.backends.base import (
    Capabilities,
    Check,
    Env,
    Held,
    Intent,
    JobHandle,
    JobSpec,
    Labelled,
    Line,
    LogQuery,
    Offer,
    Plan,
    Ref,
    Seen,
)
from launcher.backends.vertex import checks, jobs, logs, refs, request
from launcher.spec import Hardware, Recipe


class VertexBackend:
    """Creates are not idempotent there: a job is labelled, and looked up before it is created."""

    name = request.NAME
    can = Capabilities(
        spot=True, nodes=True, follow=True, native_retry=True, timeout=True, drain=logs.DRAIN,
        settle=jobs.SETTLE,
    )  # fmt: skip

    def check(self, env: Env) -> Iterable[Check]:
        return checks.rows(env)

    def examine(self, recipe: Recipe, env: Env) -> Iterable[Check]:
        return checks.rows(env, recipe)

    def offers(self, spec: Hardware, env: Env) -> Iterable[Offer]:
        return request.offers(spec)

    def plan(self, spec: JobSpec, offer: Offer) -> Plan:
        return request.plan(spec, offer)

    def warnings(self, spec: Hardware, env: Env) -> Iterable[str]:
        now = datetime.datetime.fromtimestamp(env.clock.now(), datetime.timezone.utc)
        return request.warnings(spec, now.date())

    def create(self, intent: Intent, env: Env) -> Ref:
        """Upload an object, or create the job, unless it is there."""
        if intent.kind == request.OBJECT:
            return jobs.upload(intent, env)
        return jobs.create(intent, env)

    def observe(self, job: JobHandle, env: Env) -> Seen:
        return jobs.observe(job, env)

    def logs(self, job: JobHandle, query: LogQuery, env: Env) -> Iterator[Line]:
        return logs.read(job, query, env)

    def stop(self, job: JobHandle, env: Env, grace: float) -> None:
        """A job that has not begun is cancelled. One that runs reads the marker itself and saves;
        a cancellation would not leave it the time."""
        jobs.cancel_unless_running(job, env)

    def delete(self, ref: Ref, env: Env) -> Held:
        return jobs.delete(ref, env)

    def sweep(self, env: Env) -> Iterator[Ref]:
        return (found.ref for found in jobs.labelled(env, everyone=False))

    def of_run(self, run: str, known: Iterable[Ref], env: Env) -> Iterator[Ref]:
        return jobs.of_run(run, known, env)

    def other(self, job: JobHandle, told: str, env: Env) -> Optional[Ref]:
        return jobs.other(job, told, env)

    def labelled(self, env: Env, everyone: bool) -> Iterator[Labelled]:
        return jobs.labelled(env, everyone)

    def by_hand(self, ref: Ref) -> Optional[str]:
        return refs.by_hand(ref)
