"""Reading and following logs: every line once, in order, whatever the connection does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import backends, logs
from launcher.backends.base import Env, JobHandle, Line, LogQuery
from launcher.backends.local import LocalBackend
from launcher.errors import Transient, UsageError
from launcher.run import Run
from tests.launcher.recorded import START, Recorder


class Unreliable(LocalBackend):
    """The local backend behind a bad connection: every read is cut after `cut` lines, and starts
    again `overlap` lines too early, as services with at-least-once delivery do."""

    cut, overlap = 7, 3

    def __init__(self) -> None:
        self.before: dict[tuple[str, int], list[Line]] = {}

    def logs(self, job: JobHandle, query: LogQuery, env: Env) -> Iterator[Line]:
        given = self.before.setdefault((job.name, job.attempt), [])
        if query.cursor:
            yield from given[-self.overlap :]
        for count, line in enumerate(super().logs(job, query, env)):
            if count == self.cut:
                raise Transient("connection reset by peer", after=1.0)
            given.append(line)
            yield line


_CONNECTION = Unreliable()


def connection() -> Unreliable:
    return _CONNECTION


def _run(home: Path, attempts: int = 1, backend: str = "local") -> Recorder:
    made = Recorder(home, backend=backend)
    for attempt in range(1, attempts + 1):
        made.begin(attempt)
    return made


def _texts(lines: Iterator[Line] | list[Line]) -> list[str]:
    return [line.text for line in lines]


def test_lines_of_all_workers_come_in_time_order(tmp_path: Path) -> None:
    made = _run(tmp_path)
    made.log(0, ["a0", "a1", "a2"], every=1.0)
    made.clock.sleep(0.5)
    made.log(1, ["b0", "b1"], every=1.0)

    found = list(logs.read(made.run(), made.env))

    assert [(line.worker, line.text) for line in found] == [
        (0, "a0"), (1, "b0"), (0, "a1"), (1, "b1"), (0, "a2"),
    ]  # fmt: skip


def test_one_worker_and_the_last_lines_exactly(tmp_path: Path) -> None:
    made = _run(tmp_path)
    made.log(0, [f"zero {n}" for n in range(20)])
    made.log(1, [f"one {n}" for n in range(20)])
    run = made.run()

    assert _texts(list(logs.read(run, made.env, worker=1, tail=2))) == ["one 18", "one 19"]
    assert len(list(logs.read(run, made.env, tail=1000))) == 40
    assert list(logs.read(run, made.env, tail=0)) == []


def test_since_keeps_the_line_of_that_very_instant(tmp_path: Path) -> None:
    made = _run(tmp_path)
    began = made.clock.now()
    made.log(0, ["early", "exact", "late"], every=10.0)

    assert _texts(list(logs.read(made.run(), made.env, since=began + 10))) == ["exact", "late"]


def test_attempts_follow_each_other(tmp_path: Path) -> None:
    made = _run(tmp_path, attempts=2)
    made.log(0, ["first"], attempt=1)
    made.clock.sleep(60)
    made.log(0, ["second"], attempt=2)

    assert _texts(list(logs.read(made.run(), made.env))) == ["first", "second"]


def test_following_ends_when_the_run_is_over_and_loses_nothing_that_came_late(
    tmp_path: Path,
) -> None:
    made = _run(tmp_path)
    made.log(0, ["before 0", "before 1", "before 2"])
    looks = 0

    def look() -> Run:
        nonlocal looks
        looks += 1
        if looks == 2:
            made.log(0, ["while it ran"])
        if looks == 3:
            made.end()
            run = made.run()
            made.log(0, ["after the end was recorded"])
            return run
        return made.run()

    found = _texts(logs.follow(look, made.env, tail=1))

    assert found == ["before 2", "while it ran", "after the end was recorded"]
    assert looks == 3


def test_a_torn_line_is_shown_once_when_it_is_whole(tmp_path: Path) -> None:
    made = _run(tmp_path)
    made.log(0, ["whole"])
    part = made.root / "logs" / "worker-0" / "00-0001.log"
    reader = logs.Reader(made.env)
    with part.open("a") as out:
        out.write("2026-09-21T12:00:00.000001Z half")
    first = _texts(reader.new(made.run()))
    with part.open("a") as out:
        out.write(" and half\n")

    assert first == ["whole"]
    assert _texts(reader.new(made.run())) == ["half and half"]
    assert _texts(reader.new(made.run())) == []


def test_cut_and_repeating_connections_show_every_line_once_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}._CONNECTION", Unreliable())
    monkeypatch.setitem(backends.BACKENDS, "unreliable", f"{__name__}:connection")
    made = _run(tmp_path, backend="unreliable")
    for worker in range(3):
        made.log(worker, [f"{worker}: same words" for _ in range(50)], every=0.5)
    began = made.clock.now()

    found = list(logs.read(made.run(), made.env))

    assert len(found) == 150
    for worker in range(3):
        times = [line.time for line in found if line.worker == worker]
        assert times == sorted(set(times))
    assert made.clock.now() > began  # it waited as the service asked, on the clock it was given


def test_a_connection_that_never_comes_back_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = Unreliable()
    dead.cut = 0
    monkeypatch.setattr(f"{__name__}._CONNECTION", dead)
    monkeypatch.setitem(backends.BACKENDS, "unreliable", f"{__name__}:connection")
    made = _run(tmp_path, backend="unreliable")
    made.log(0, ["never seen"])

    with pytest.raises(Transient, match="connection reset"):
        list(logs.read(made.run(), made.env))


def test_a_run_whose_driver_died_is_not_followed_for_ever(tmp_path: Path) -> None:
    made = _run(tmp_path)
    made.journal.append("driver")
    made.log(0, ["last words"])
    seen: list[str] = []

    with pytest.raises(logs.NoDriver, match="no driver"):
        for line in logs.follow(made.run, made.env):
            seen.append(line.text)

    assert seen == ["last words"]


def test_a_living_driver_is_waited_for_however_silent(tmp_path: Path) -> None:
    made = _run(tmp_path)
    made.journal.append("driver")
    looks = 0

    def look() -> Run:
        nonlocal looks
        looks += 1
        if looks == 200:
            made.end()
        run = made.run()
        assert run.driver is not None
        return replace(run, driver=replace(run.driver, alive=True))

    assert list(logs.follow(look, made.env)) == []
    assert looks == 200


@pytest.mark.parametrize(
    ("text", "seconds_ago"),
    [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172800), ("0s", 0)],
)
def test_since_reads_durations(text: str, seconds_ago: float) -> None:
    assert logs.since(text, START) == START - seconds_ago


def test_since_reads_iso_times_as_utc_unless_they_say_otherwise() -> None:
    wanted = 1_790_000_000.0

    assert logs.since("2026-09-21T14:13:20Z", 0) == wanted
    assert logs.since("2026-09-21 14:13:20", 0) == wanted
    assert logs.since("2026-09-21T16:13:20+02:00", 0) == wanted
    assert logs.since("2026-09-21", 0) == wanted - (14 * 3600 + 13 * 60 + 20)


@settings(max_examples=100, derandomize=True)
@given(st.text(max_size=20) | st.from_regex(r"\d{1,40}[smhd]?", fullmatch=True))
def test_any_other_since_is_one_clear_error(text: str) -> None:
    try:
        assert isinstance(logs.since(text, START), float)
    except UsageError as error:
        assert "--since" in str(error) and "10m" in error.hint


def test_ten_thousand_lines_a_second(tmp_path: Path) -> None:
    made = _run(tmp_path)
    for worker in range(2):
        made.log(worker, [f"step {n} train_loss 5.1234" for n in range(10_000)], every=0.001)
    run = made.run()
    started = time.process_time()

    count = sum(1 for _ in logs.read(run, made.env))

    spent = time.process_time() - started
    assert count == 20_000
    assert count / spent > 10_000, f"{count / spent:.0f} lines a second"
