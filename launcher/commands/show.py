"""Commands that only look: status, logs, pull, report, tensorboard."""

from __future__ import annotations

import json
import os
import sys
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from launcher import api, console
from launcher.artifacts import is_remote
from launcher.errors import Exit, UsageError
from launcher.home import Unwritable

if TYPE_CHECKING:
    from launcher.backends.base import Line
    from launcher.run import Run

#: Seconds between two looks of `status --watch`.
_EVERY = 2.0


def status(run: Optional[str], *, watch: bool, everything: bool, limit: int, as_json: bool) -> int:
    if watch and as_json:
        raise UsageError("--json does not go with --watch", "--json prints one document: now")
    if watch:
        return _watch(run, everything, limit)
    now = api.env().clock.now()
    if run is not None:
        found = api.status(run)
        if as_json:
            console.document(found.to_json())
        else:
            _print(console.run_lines(found, now))
            _warn([found])
        return Exit.OK
    listed = api.list_runs(limit=limit, all=everything)
    if as_json:
        console.document({"runs": [{**one.to_json()} for one in listed]})
    elif not listed:
        console.notice("no runs yet: `launch up quickstart` starts one")
    else:
        _print(console.runs(listed, now))
        _warn(listed)
    return Exit.OK


def logs(
    run: str,
    *,
    follow: bool,
    worker: Optional[int],
    tail: Optional[int],
    since: Optional[str],
    timestamps: bool,
    as_json: bool,
) -> int:
    from launcher import logs as reading

    env = api.env()
    start = None if since is None else reading.since(since, env.clock.now())
    found = api.status(run)
    there = reading.workers(found)
    if worker is not None and there and worker not in there:
        names = ", ".join(map(str, there))
        raise UsageError(f"{found.name} has no worker {worker}; there are: {names}")
    if not there and not is_remote(found.root):  # a service's own logs may come before boot's
        console.notice(f"{found.name} has logged nothing yet")
    if follow:
        lines = reading.follow(
            lambda: api.status(found.id), env, worker=worker, since=start, tail=tail
        )
    else:
        lines = iter(reading.read(found, env, worker=worker, since=start, tail=tail))
    several = worker is None
    try:
        for line in lines:
            console.write(_shown(line, several, timestamps, as_json))
            if follow:
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not follow:
            raise
    return Exit.OK


def pull(run: str, *, to: Optional[str], as_json: bool) -> int:
    found = api.status(run)
    place = api.pull(run, Path(to) if to is not None else Path(found.name))
    if as_json:
        console.document({"run": found.id, "path": str(place)})
    else:
        console.say(str(place))
    return Exit.OK


def report(run: str, *, output: Optional[str], as_json: bool) -> int:
    from launcher import report as writing

    found = api.status(run)
    try:
        path = writing.write(found, Path(output) if output is not None else None)
    except Unwritable as error:
        if output is None:
            raise
        why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        raise Unwritable(f"cannot write {output}: {why}", "name another file: -o FILE") from error
    if as_json:
        console.document({"run": found.id, "path": str(path)})
    else:
        console.say(str(path))
    return Exit.OK


def tensorboard(run: str, *, port: int) -> int:
    """Becomes TensorBoard: Ctrl-C ends it, and its exit code is the command's."""
    found = api.status(run)
    if util.find_spec("tensorboard") is None:
        raise UsageError("TensorBoard is not installed", "pip install 'launch-llm[train]'")
    uri, folder = api.event_files(found)
    copied = " (copied now; again with the next `launch tensorboard`)" if is_remote(uri) else ""
    console.notice(f"TensorBoard of {found.name}, event files under {uri}{copied}")
    arguments = ["-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *arguments])


def _watch(run: Optional[str], everything: bool, limit: int) -> int:
    """Drawn again every few seconds on a terminal; elsewhere, again when something changed. One
    run: until it is over."""
    from launcher.commands.live import View

    clock = api.env().clock
    view = View() if console.can_show_live() else None
    before: list[str] = []
    try:
        if view:
            view.__enter__()
        while True:
            found = [api.status(run)] if run else api.list_runs(limit=limit, all=everything)
            lines = (
                [console.progress_line(one) for one in found]
                if view is None
                else (console.runs(found, clock.now()))
            )
            if view and run:
                view.run(found[0], clock.now())
            elif view:
                view.lines(lines)
            elif lines != before:
                _print(lines)
                before = lines
            if run and found[0].ended is not None:
                return Exit.OK
            clock.sleep(_EVERY)
    except KeyboardInterrupt:
        return Exit.OK
    finally:
        if view:
            view.__exit__(None, None, None)


def _shown(line: Line, several: bool, timestamps: bool, as_json: bool) -> str:
    if as_json:
        facts = {"v": 1, "worker": line.worker, "time": line.time, "text": line.text}
        return json.dumps(facts)
    before = f"{console.moment(line.time)} " if timestamps else ""
    return before + (f"[{line.worker}] " if several and line.worker > 0 else "") + line.text


def _print(lines: list[str]) -> None:
    for line in lines:
        console.say(line)


def _warn(runs: list[Run]) -> None:
    for run in runs:
        for warning in run.warnings:
            console.notice(
                console.paint("warning: ", "yellow", sys.stderr) + f"{run.name}: {warning}"
            )
