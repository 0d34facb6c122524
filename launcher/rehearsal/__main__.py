"""`python -m launcher.rehearsal [--folder F] [--port P] [--project NAME] [--bucket NAME]`: Google's
services on this machine until SIGTERM or Ctrl-C.

Prints one `export NAME=VALUE` a line, for `eval`, then serves. Jobs really run, as processes.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
import threading
from pathlib import Path

from launcher.rehearsal.google import Google
from launcher.rehearsal.http import HttpError
from launcher.rehearsal.vertex import Real, Stub

_TICK = 0.25


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Google(folder=options.folder, port=options.port, project=options.project) as server:
        server.vertex.fate = Stub() if options.stubs else Real(preempted=options.preempt)
        for name in options.bucket:
            with contextlib.suppress(HttpError):  # an earlier server made it in the same folder
                server.objects.create_bucket(name, {})
        lines = [f"export {name}={shlex.quote(value)}" for name, value in server.environ().items()]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        while not stop.wait(_TICK):
            server.vertex.advance()
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launcher.rehearsal")
    parser.add_argument("--folder", type=Path, help="keep the state here")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--project", default="rehearsal")
    parser.add_argument("--bucket", action="append", default=[], help="create it; may be repeated")
    parser.add_argument("--stubs", action="store_true", help="jobs follow a script, nothing runs")
    parser.add_argument("--preempt", type=float, help="take every job's machine after so many s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
