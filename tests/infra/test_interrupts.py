"""Ctrl-C around work in a thread."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from infra.errors import EngineError, Stopped
from infra.interrupts import Interrupts

_LIMIT = 30.0


def _interrupted() -> tuple[Interrupts, threading.Event]:
    heard = threading.Event()
    return Interrupts(lambda text: heard.set()), heard


def test_after_an_interrupt_nothing_new_is_begun_and_the_handlers_are_back() -> None:
    interrupts, heard = _interrupted()
    before = signal.getsignal(signal.SIGINT)
    begun: list[str] = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert heard.wait(_LIMIT)
        interrupts.refuse()
        begun.append("more")

    with pytest.raises(Stopped) as stopped:
        interrupts.run(work)

    assert not stopped.value.killed
    assert begun == []
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_after_an_interrupt_is_an_interruption_and_before_it_is_itself() -> None:
    interrupts, heard = _interrupted()

    def fail() -> None:
        raise EngineError("refused")

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(_LIMIT)
        fail()

    with pytest.raises(EngineError, match="refused"):
        interrupts.run(fail)
    with pytest.raises(Stopped):
        interrupts.run(interrupted)


def test_work_that_was_done_all_the_same_counts() -> None:
    interrupts, heard = _interrupted()

    def work() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        assert heard.wait(_LIMIT)
        return "done"

    assert interrupts.run(work) == "done"


def test_work_of_another_thread_runs_there() -> None:
    interrupts, _ = _interrupted()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(interrupts.run(threading.get_ident)))
    thread.start()
    thread.join(_LIMIT)

    assert found == [thread.ident]
