"""`python -m launcher.rehearsal [--folder F] [--port P] [--project NAME] [--bucket NAME] ...`:
Google's services on this machine until SIGTERM or Ctrl-C.

Prints one `export NAME=VALUE` a line, for `eval`, then a comment, then serves. Jobs really run, as
processes. With `--folder`, `writes.jsonl` there has a line for every object written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import secrets
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from launcher.rehearsal.google import Google
from launcher.rehearsal.http import HttpError
from launcher.rehearsal.rpc import Rpc
from launcher.rehearsal.vertex import Real, Stub
from trainer.store import BUCKET_NAME, BUCKET_SPELLING

#: What the last line before serving begins with.
READY = "# serving"
_TICK = 0.25


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.while_open:
        threading.Thread(target=_until_closed, args=(stop,), daemon=True).start()
    try:
        google = Google(folder=options.folder, port=options.port, project=options.project)
    except OSError as error:
        where = error.filename or f"127.0.0.1:{options.port}"
        said = f"cannot serve: {where}: {error.strerror or error}; name another --port or --folder"
        sys.stderr.write(f"python -m launcher.rehearsal: {said}\n")
        return 2
    with google as server, Rpc(server) as rpc:
        _prepare(server, options)
        lines = [f"export {name}={shlex.quote(value)}" for name, value in server.environ().items()]
        lines.append(f"{READY}; jobs, logs and secrets over gRPC at {rpc.address}")
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        try:
            while not stop.wait(_TICK):
                server.vertex.advance()
        finally:
            if options.home is not None:
                _relieve(options.home)
    return 0


def _prepare(server: Google, options: argparse.Namespace) -> None:
    """Buckets, secrets, and what becomes of jobs."""
    for name in options.bucket:
        with contextlib.suppress(HttpError):  # an earlier server made it in the same folder
            server.objects.create_bucket(name, {})
    for name in options.secret:
        server.secrets.values[name] = f"rehearsal-{secrets.token_hex(12)}"
    if options.folder is not None:
        server.objects.finalized.append(_noting(options.folder / "writes.jsonl"))
    server.vertex.environ.update(options.env)
    usual = Real(preempted=options.preempt, restarts=options.restarts)
    server.vertex.fate = Stub() if options.stubs else usual
    for taken in range(len(options.preempt_on)):
        # Whatever a job before it should have been taken at, and was not, counts as well.
        on = "|".join(f"(?:{pattern})" for pattern in options.preempt_on[taken:])
        server.vertex.fates.append(Real(restarts=options.restarts, preempted_on=on))


def _noting(file: Path) -> Callable[[str, str, int], None]:
    lock = threading.Lock()

    def note(bucket: str, name: str, size: int) -> None:
        with lock, file.open("a") as out:
            out.write(json.dumps({"uri": f"gs://{bucket}/{name}", "bytes": size}) + "\n")

    return note


def _until_closed(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


def _relieve(folder: Path) -> None:
    """Have the drivers of the runs there leave: whoever started them may be gone without a word."""
    from launcher import api, driver, home

    here = replace(api.env(), home=folder)
    for run_id in home.ids(folder):
        driver.relieve(run_id, here).close()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m launcher.rehearsal")
    add = parser.add_argument
    add("--folder", type=Path, help="keep the state here")
    add("--port", type=_port, default=0, help="default: a free one")
    add("--project", default="rehearsal", type=_project)
    add("--bucket", action="append", default=[], type=_bucket, help="create it; may be repeated")
    add("--secret", action="append", default=[], metavar="PROJECT/NAME", type=_secret,
        help="a secret with a random value; may be repeated")  # fmt: skip
    add("--env", action="append", default=[], metavar="NAME=VALUE", type=_variable,
        help="a variable that all containers have; may be repeated")  # fmt: skip
    add("--stubs", action="store_true", help="jobs follow a script, nothing runs")
    add("--preempt", type=float, metavar="S", help="take every job's machine after S seconds")
    add("--preempt-on", action="append", default=[], metavar="REGEX", type=_pattern,
        help="take the first job's machine once such a gs:// URI is written; may be repeated: the "
        "second one is for the second job")  # fmt: skip
    add("--restarts", type=int, default=0, help="start a failed worker again so often in a job")
    add("--home", type=Path, help="at the end, drivers of runs in this $LAUNCH_HOME leave, too")
    add("--while-open", action="store_true", help="end, too, when standard input is closed")
    return parser.parse_args(arguments)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 0 (a free one) to 65535")
    return int(text)


def _project(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9:.-]*[a-z0-9]", text):
        allowed = "lower-case letters, digits and '-', a letter first"
        raise argparse.ArgumentTypeError(f"{text!r} cannot name a project: {allowed}")
    return text


def _bucket(text: str) -> str:
    if not re.fullmatch(BUCKET_NAME, text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot name a bucket: {BUCKET_SPELLING}")
    return text


def _secret(text: str) -> str:
    if not re.fullmatch(r"[^/]+/[^/]+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write PROJECT/NAME")
    return text


def _variable(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not name or not mark:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    return name, value


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
