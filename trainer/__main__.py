"""`python -m trainer run JOB.json`: a job's stages, in order; `smoke [FLAGS]`: that stage alone;
`inputs JOB.json FOLDER`: what the job reads from stores; `stand-ins JOB.json FOLDER URI`: what a
rehearsal reads instead; `check [JOB.json]`: whether this machine can train. Exit codes:
docs/contracts.md."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from trainer import check, copies, inputs
from trainer.config import ConfigError, Job, load_job
from trainer.data import DataError
from trainer.store import StoreError, Transient

OK, ERROR, CONFIG, DATA, ENVIRONMENT, AGAIN = 0, 1, 64, 65, 78, 75
USAGE = (
    "usage: python -m trainer run JOB.json | inputs JOB.json FOLDER | smoke [--epochs N ...] | "
    "check [JOB.json] [--json]"
)


def main(arguments: list[str]) -> int:
    """Run, and turn every failure into one clear line and its exit code."""
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        say(USAGE)
        return OK
    if not command:
        sys.stderr.write(USAGE + "\n")
        return CONFIG
    counts = {"run": (2,), "inputs": (3,), "stand-ins": (4,), "check": (1, 2)}
    given = [a for a in arguments if a != "--json"] if command == "check" else arguments
    if command == "check" and {"-h", "--help"} & set(given):
        say(USAGE)
        return OK
    options = [a for a in given if command == "check" and a.startswith("-")]
    if options or (command != "smoke" and len(given) not in counts.get(command, ())):
        print_error(f"not understood: {' '.join(arguments)!r}; {USAGE}")
        return CONFIG
    try:
        if command == "inputs":
            inputs.command(arguments[1], arguments[2], say)
            return OK
        if command == "check":
            return check.command(arguments[1:], say)
        if command == "stand-ins":
            return stand_ins(*arguments[1:])
        return smoke(arguments[1:]) if command == "smoke" else run(load_job(arguments[1]))
    except ConfigError as error:
        print_error(str(error))
        return CONFIG
    except StoreError as error:
        print_error(str(error))
        return AGAIN if isinstance(error, Transient) else ENVIRONMENT
    except ImportError as error:
        print_error(f"cannot import {error.name or error}: install launch-llm[train]")
        return ENVIRONMENT
    except DataError as error:
        print_error(str(error))
        return DATA
    except Exception as error:
        return _explain(error)


def run(job: Job) -> int:
    """The job's stages; those already completed are left out."""
    if job.dry_run:  # before the libraries are imported: they read it once
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    copies.use(job.copies)
    from trainer import environment, interrupts, reward_functions, runtime, stages
    from trainer.context import stop_asked

    _quieten()
    try:
        environment.check(dataclasses.asdict(job))
    except environment.Unfit as error:
        raise ConfigError(str(error)) from error
    reward_functions.check(job.stages)
    made = {config.output for config in job.stages}
    with interrupts.listening() as signalled, runtime.start() as process:
        for config in job.stages:
            if process.any(signalled())[0]:
                say(f"stage {config.id}: not begun, the job was asked to leave")
                return OK if stop_asked(job) else AGAIN
            # On all nodes: one that was filled from the store may know less than one that stayed.
            if not process.any(not inputs.completed(Path(config.output)))[0]:
                say(f"stage {config.id}: completed before, skipped")
                continue
            if job.dry_run:
                from trainer.shrink import shrink

                config, notes = shrink(config, made)
                for note in notes:
                    say(f"dry run: {note}")
            outcome = stages.run_stage(config, job, process, say, signalled)
            if outcome.stopped is None:
                continue
            say(f"stage {config.id}: stopped at step {outcome.step} ({outcome.stopped})")
            return AGAIN if outcome.stopped == "signal" else OK
    return OK


def smoke(flags: list[str]) -> int:
    """The smoke test by its flags, without a job."""
    from trainer import runtime
    from trainer import smoke as test

    config = test.parse(flags)
    test.preflight(os.environ)
    with runtime.start() as process:
        test.run(config, process, say)
        process.barrier()  # a rank that leaves first would have torchrun end the others
    return OK


def stand_ins(job: str, folder: str, place: str) -> int:
    """Small files and models for a job, and the job for them; its changes, one a line."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    from trainer.stand_ins import write

    _quieten()
    for note in write(load_job(job), Path(folder), place):
        say(note)
    return OK


def _quieten() -> None:
    """A log is read as lines, and each should say something of the run. Transformers imports
    torchao wherever it is installed, which warns of its kernels for GPUs that are not here."""
    import logging

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say(line: str) -> None:
    """One line to the log, from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def print_error(line: str) -> None:
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()


def _explain(error: Exception) -> int:
    import torch

    from trainer.checkpoint import CheckpointError
    from trainer.loop import NonFiniteError
    from trainer.sharded import line_of
    from trainer.smaller import Leave
    from trainer.smoke import FAILED, GroupError, SmokeFailed

    if isinstance(error, SmokeFailed):
        print_error(str(error))
        return FAILED
    if isinstance(error, (CheckpointError, GroupError)):
        print_error(str(error))
        return ENVIRONMENT
    if isinstance(error, NonFiniteError):
        print_error(str(error))
        return ERROR
    if isinstance(error, Leave):
        print_error(str(error))
        return error.code
    if isinstance(error, torch.OutOfMemoryError):  # what fewer rows help against is caught before
        print_error(
            f"out of memory where fewer rows at a time do not help ({line_of(error)}):"
            " take a smaller model, an adapter (model.adapter), a larger accelerator, or several of"
            " them with train.parallel: fsdp"
        )
        return CONFIG
    traceback.print_exception(error)
    print_error(f"{type(error).__name__}: {error}")
    return ERROR


def leave(code: int) -> NoReturn:
    """Exit with `code` as `runtime.leave` does, where there is torch to need it."""
    if "torch" in sys.modules:
        from trainer import runtime

        runtime.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
