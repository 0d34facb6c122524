"""A disk that is full and a process that dies, both real."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let this process make any file longer than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def killed_at(act: Callable[[], Any], k: int) -> bool:
    """Run `act` in a forked child that is killed (SIGKILL) at its k-th call to the file system,
    from 0: just before the call, and for fsync also just after. False when it had fewer calls."""
    pid = os.fork()
    if pid == 0:
        _count_down(k)
        act()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _count_down(k: int) -> None:
    left = k

    def call() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir"):
            call()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        call()
        fsync(descriptor)
        call()

    def profile(frame: object, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ == "write":  # opened, still empty
            call()

    os.fsync = counted_fsync
    sys.addaudithook(hook)
    sys.setprofile(profile)
