"""`python -m trainer check [JOB.json] [--json]`: is this machine fit to train? Rows of pass, warn,
fail and skip, each with its reason and its fix, then the environment score.

The facts come from `check_facts`; `check_gpu` and `check_host` judge them. Only the standard
library is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from trainer import check_gpu, check_host
from trainer.check_facts import Facts, gather
from trainer.check_row import Row
from trainer.config import Job, load_job

OK, ENVIRONMENT = 0, 78


def command(arguments: Sequence[str], say: Callable[[str], None]) -> int:
    """Print the rows and the score (`--json`: as one document). Returns 0, or 78 when a row fails.
    Errors: `ConfigError` for a job that cannot be read."""
    paths = [given for given in arguments if given != "--json"]
    job = load_job(paths[0]) if paths else None
    output = job.stages[-1].output if job and job.stages else "."
    folder = Path.cwd() if "://" in output else Path(output)
    found = rows(gather(check_host.WATCHED, folder, os.environ), job)
    if "--json" in arguments:
        checks = [{**asdict(row), "lost": row.lost} for row in found]
        say(json.dumps({"v": 1, "score": score(found), "ok": _ok(found), "checks": checks}))
    else:
        for line in lines(found):
            say(line)
    return OK if _ok(found) else ENVIRONMENT


def rows(facts: Facts, job: Job | None = None) -> list[Row]:
    """Everything that is judged of a machine, and of what `job` asks of it."""
    return [*check_gpu.rows(facts), *check_host.rows(facts, job)]


def score(found: Sequence[Row]) -> float:
    """The environment score, 0 to 100: 100 less the points that the rows lose (WEIGHTS)."""
    return 100.0 - sum(row.lost for row in found)


def lines(found: Sequence[Row]) -> list[str]:
    """The rows for a terminal, their fixes, the score and the reason of every lost point."""
    width = max(len(row.name) for row in found)
    shown = []
    for row in found:
        shown.append(f"{row.name:<{width}}  {row.result}  {row.detail}")
        if row.fix and row.result in ("warn", "fail"):
            shown.append(f"{'':<{width}}  fix: {row.fix}")
    shown.append(f"environment score: {score(found):g} of 100")
    shown += [f"  -{row.lost:g} {row.name}: {row.detail}" for row in found if row.lost]
    return shown


def _ok(found: Sequence[Row]) -> bool:
    return all(row.result != "fail" for row in found)
