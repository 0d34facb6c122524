"""Object services on this machine for tests: the rehearsal's own for gs://, moto's for s3://."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Waits that no test notices; the library draws them at random below these.
QUICK = {"first": 0.001, "longest": 0.002}


@contextmanager
def environment(**wanted: str | None) -> Iterator[None]:
    """Environment variables for a while; None removes one."""
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


@contextmanager
def moto_server() -> Iterator[str]:
    """The URL of an S3 server in a process of its own, on a free port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        seen = ""
        for line in process.stderr:
            seen += line
            if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            raise AssertionError(f"moto_server ended: {seen}")
        # It logs every request there: a pipe that nobody reads would stop it.
        reader = threading.Thread(target=process.stderr.read, daemon=True)
        reader.start()
        yield found.group(1)
    finally:
        process.kill()
        process.wait()


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
