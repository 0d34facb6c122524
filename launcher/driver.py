"""One driver process per run: `launch drive RUN` in the foreground, or in a session of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Optional

from launcher import home
from launcher.backends.base import Env
from launcher.errors import Exit, LaunchError

#: Where a driver finds the number of the descriptor that holds its lock.
_LOCK = "LAUNCH_DRIVER_LOCK"
_LEAVE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def drive(run: str, take_over: bool = False, env: Optional[Env] = None) -> int:
    """Drive a run (name, id or prefix) to its end, in this process; returns its exit code.

    SIGTERM, SIGINT and SIGHUP make the driver leave: the job goes on, and any later driver takes
    it from there; that is exit code 0. Errors: `LaunchError`.
    """
    from launcher import engine
    from launcher.api import env as default_env

    env = env or default_env()
    run_id = home.find(env.home, run)["id"]
    handed = os.environ.pop(_LOCK, "")
    lock = None
    if handed.isdigit():
        lock = home.DriverLock.inherited(home.folder(env.home, run_id), int(handed))
    try:
        with _leaving():
            done = engine.drive(run_id, env, lock=lock, take_over=take_over)
    except _Left:
        name = home.find(env.home, run_id)["name"]
        sys.stderr.write(f"left {name}; its job goes on. `launch attach {name}` drives on\n")
        return int(Exit.OK)
    return int(done.exit_code or 0)


def spawn(run_id: str, env: Env, lock: home.DriverLock) -> int:
    """Start a driver in a session of its own, with its output in driver.log; returns its pid. The
    lock passes to it without a gap in which nobody, or somebody else, would drive."""
    place = home.folder(env.home, run_id)
    try:
        with (place / "driver.log").open("ab") as log:
            process = subprocess.Popen(
                [env.python, "-m", "launcher.driver", run_id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock.descriptor,),
                env={**env.environ, "LAUNCH_HOME": str(env.home), _LOCK: str(lock.descriptor)},
            )
        lock.claim(process.pid, env.clock.now())
    except OSError as error:
        raise home.unwritable(place, error) from error
    finally:
        lock.close()
    return process.pid


def relieve(run_id: str, env: Env, patience: float = 15.0) -> home.DriverLock:
    """The run's lock, after its driver on this host (if any) was asked to leave; one that does not
    is killed, which is safe at any instant. Errors: `LaunchError`."""
    place = home.folder(env.home, run_id)
    who = home.holder(place)
    for request, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        if who and who["pid"] > 1 and home.holds(place, who["pid"]):
            try:
                os.kill(who["pid"], request)
            except ProcessLookupError:
                pass
            except PermissionError as error:
                text = f"the driver of {run_id} (process {who['pid']}) belongs to somebody else"
                raise home.Unwritable(text, "ask its owner to stop it") from error
        lock = home.DriverLock.acquire(place, wait=wait)
        if lock is not None:
            return lock
        who = home.holder(place)
    raise LaunchError(f"{place / 'driver.lock'} is held and cannot be taken over")


@contextmanager
def relieved(run_id: str, env: Env) -> Iterator[Optional[LaunchError]]:
    """The run without a driver of this host, for as long as the context lasts; yields why it may
    have one all the same: its lock cannot be had."""
    lock, refused = None, None
    try:
        lock = relieve(run_id, env)
    except LaunchError as error:
        refused = error
    try:
        yield refused
    finally:
        if lock is not None:
            lock.close()


def main() -> int:
    """`python -m launcher.driver RUN`: what `spawn` starts."""
    try:
        return drive(sys.argv[1])
    except LaunchError as error:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        hint = f" ({error.hint})" if error.hint else ""
        sys.stderr.write(f"{stamp} {error}{hint}\n")
        return int(error.code)


class _Left(BaseException):
    """Not an `Exception`: nothing on the way out may take it for a failure of its own."""


@contextmanager
def _leaving() -> Iterator[None]:
    """Signals end the block with `_Left`. (Only a main thread can take signals.)"""

    def leave(number: int, frame: Optional[FrameType]) -> None:
        for name in _LEAVE:
            signal.signal(name, signal.SIG_IGN)  # once is enough
        raise _Left

    try:
        before = [signal.signal(name, leave) for name in _LEAVE]
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for name, handler in zip(_LEAVE, before):
            signal.signal(name, handler)


if __name__ == "__main__":
    sys.exit(main())
