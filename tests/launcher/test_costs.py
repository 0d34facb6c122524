"""`launch costs`: what runs have cost, by what they are grouped by; as quick as `status --all`."""

from __future__ import annotations

import csv
import io
import json
import resource
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import pytest

from benchmarks.startup import make_home
from launcher import api, cli, costs
from launcher.backends.base import Phase
from launcher.errors import UsageError
from launcher.run import Attempt, JobState, Run

NOW = datetime(2026, 11, 3, 12, tzinfo=timezone.utc).timestamp()
HOUR = 3600.0


def run(
    name: str, *attempts: Attempt, recipe: str = "kd", owner: str = "ann", backend: str = "vertex"
) -> Run:
    return Run(
        id=name, name=name, recipe=recipe, fingerprint="f", owner=owner, root="/r",
        created=attempts[0].started if attempts and attempts[0].started else NOW - HOUR,
        jobs=[JobState(0, f"{name}-j0", backend, attempts=[*attempts])],
    )  # fmt: skip


def attempt(
    ago: float, hours: Optional[float], usd: Optional[float], accelerator: str = "L4:1"
) -> Attempt:
    """Began `ago` hours before now and worked for so many; None: it still does."""
    began = NOW - ago * HOUR
    ended = None if hours is None else began + hours * HOUR
    phase = Phase.RUNNING if hours is None else Phase.SUCCEEDED
    return Attempt(
        1, phase, started=began - 60, began=began, ended=ended, usd_per_hour=usd,
        accelerator=accelerator,
    )  # fmt: skip


def figures(found: costs.Costs) -> dict[str, tuple[int, float, float]]:
    return {row.key: (row.runs, round(row.hours, 6), round(row.usd, 6)) for row in found.rows}


RUNS = [
    run("c", attempt(2, None, 3.0, "A100-40GB:1"), owner="bob"),
    run("b", attempt(40, 4, 0.5), attempt(30, 2, 1.0), recipe="sft"),
    run("a", attempt(100, 10, None), attempt(80, 1, 2.0)),
]


def test_every_attempt_counts_at_its_own_price_and_for_its_own_time() -> None:
    found = costs.costs(RUNS, NOW)
    assert figures(found) == {"c": (1, 2, 6), "b": (1, 6, 4), "a": (1, 11, 2)}
    total = found.total
    assert (total.runs, total.hours, total.usd) == (3, pytest.approx(19), pytest.approx(12))
    assert (total.unpriced_hours, total.usd_per_hour) == (pytest.approx(10), 3.0)


@pytest.mark.parametrize(
    ("by", "rows"),
    [
        ("recipe", {"kd": (2, 13, 8), "sft": (1, 6, 4)}),
        ("owner", {"ann": (2, 17, 6), "bob": (1, 2, 6)}),
        ("backend", {"vertex": (3, 19, 12)}),
        ("accelerator", {"A100-40GB:1": (1, 2, 6), "L4:1": (2, 17, 6)}),
    ],
)
def test_groups(by: Any, rows: dict[str, tuple[int, float, float]]) -> None:
    assert figures(costs.costs(RUNS, NOW, by)) == rows


def test_a_month_has_what_was_spent_in_it_whenever_the_run_began() -> None:
    """100 hours before noon of November 3 is October 30, 8:00; 62 hours are of November."""
    long = run("long", attempt(100, None, 1.0))
    found = costs.costs([long], NOW, "month")
    assert figures(found) == {"2026-11": (1, 60, 60), "2026-10": (1, 40, 40)}
    assert [row.key for row in found.rows] == ["2026-11", "2026-10"]
    assert [row.usd_per_hour for row in found.rows] == [1.0, 0.0]
    assert found.total.runs == 1


def test_since_cuts_what_began_before_it() -> None:
    found = costs.costs(RUNS, NOW, since=NOW - 29 * HOUR)
    assert figures(found) == {"c": (1, 2, 6), "b": (1, 1, 1)}
    assert costs.costs(RUNS, NOW, since=NOW + 1).rows == []


def test_what_waits_for_a_machine_costs_nothing() -> None:
    waits = Attempt(1, Phase.QUEUED, started=NOW - 5 * HOUR, usd_per_hour=9.0)
    found = costs.costs([run("w", waits), run("new")], NOW)
    assert (found.total.runs, found.total.usd, found.total.usd_per_hour) == (2, 0.0, 0.0)


def test_times_that_are_understood() -> None:
    assert costs.since("7d", NOW) == NOW - 7 * 24 * HOUR
    assert costs.since("2w", NOW) == NOW - 14 * 24 * HOUR
    assert costs.since("2026-11-03T12:00:00+00:00", NOW) == NOW
    assert costs.since("2026-11-03T12:00:00Z", NOW) == NOW
    for text in ("soon", "0001-01-01"):  # the second has no local time
        with pytest.raises(UsageError, match=f"--since {text}"):
            costs.since(text, NOW)
    for unclear in ("1m", "90s"):  # a month, or a minute?
        with pytest.raises(UsageError, match=f"--since {unclear}: no time that is known"):
            costs.since(unclear, NOW)


def test_the_command_in_its_three_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_home(tmp_path, runs=25, records=4)
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    assert cli.run(["costs", "--json", "--by", "backend"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["v"] == 1 and document["total"]["runs"] == 25
    assert sum(row["runs"] for row in document["rows"]) == 25
    assert cli.run(["costs", "--csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(table) == 25 and set(table[0]) >= {"run", "hours", "usd", "unpriced_hours"}
    assert cli.run(["costs"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + 20 + 1 + 2 and shown[-2].startswith("5 more: ")
    assert "price unknown" in shown[1] and "have no known price" in shown[-1]
    assert cli.run(["costs", "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 25 + 1 + 1
    assert cli.run(["costs", "--by", "recipes"]) == 2
    assert "did you mean 'recipe'?" in capsys.readouterr().err


def test_the_table_for_spreadsheets_has_exact_cents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path / "home"))
    make_home(tmp_path / "home", 1)
    (file,) = (tmp_path / "home").glob("runs/*/summary.json")
    raw = json.loads(file.read_text())
    begun = NOW - 3e7
    raw["jobs"][0]["attempts"] = raw["jobs"][0]["attempts"][:1]
    raw["jobs"][0]["attempts"][0].update(
        started=begun, ended=begun + 1000 * HOUR, usd_per_hour=1234.567891)  # fmt: skip
    file.write_text(json.dumps(raw))
    assert cli.run(["costs", "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["runs"], row["usd"], row["hours"]) == ("1", "1234567.89", "1000.0000")


@pytest.mark.parametrize(
    ("name", "figure"),
    [("started", -1e18), ("ended", 1e18), ("ended", float("nan")), ("usd_per_hour", "3")],
)
def test_a_damaged_summary_is_not_believed_and_the_rest_is_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, figure: Any
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path / "home"))
    make_home(tmp_path / "home", 2)
    file = min((tmp_path / "home").glob("runs/*/summary.json"))
    raw = json.loads(file.read_text())
    raw["jobs"][0]["attempts"][0][name] = figure
    file.write_text(json.dumps(raw))
    found = costs.costs(api.list_runs(all=True), NOW, "month").total
    assert found.runs == 2 and 0 < found.hours < 1  # its journal is read in its place


def test_a_thousand_runs_are_summed_up_as_quickly_as_they_are_listed(tmp_path: Path) -> None:
    make_home(tmp_path, runs=1000, records=4)

    def cpu(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "launcher", *words], check=True, capture_output=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]),
                 "LAUNCH_HOME": str(tmp_path)},
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    rounds = [(cpu("costs", "--by", "recipe"), cpu("status", "--all")) for _ in range(2)]
    assert min(ours for ours, _ in rounds) <= 1.5 * min(theirs for _, theirs in rounds), rounds
