"""`launch offers`: what is compared, in which order, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import cli, fit, hardware, offering, recipe
from launcher.backends.base import Env
from launcher.clock import ManualClock
from launcher.commands import offers as command
from launcher.errors import Exit
from launcher.fit import Memory, Part
from launcher.spec import Recipe, Stage

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def environment(home: Path) -> Env:
    return Env(home, {}, ManualClock(1_795_000_000.0), "me", "python3")


def shipped(name: str, *overrides: str) -> Recipe:
    return recipe.load(RECIPES / f"{name}.yaml", overrides, environ={}).recipe


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage takes 30 GiB, of what the device has."""

    def memory(stage: Stage, accelerator: hardware.Accelerator, *more: Any) -> Memory:
        return Memory((Part("all", 30 * 2**30, ""),), accelerator.kind.memory_gib * 2**30)

    monkeypatch.setattr(fit, "memory", memory)
    monkeypatch.setattr(fit, "changes", lambda *given: ())


def test_what_fits_comes_first_then_what_costs_least(tmp_path: Path, sized: None) -> None:
    found = offering.rank(shipped("kd_l4"), environment(tmp_path), any_accelerator=True).ranked
    assert [row.fits for row in found] == sorted((row.fits for row in found), reverse=True)
    good = [row for row in found if row.fits]
    assert len(good) > 5 and all(not row.recipe for row in good), "the L4 of the recipe is small"
    totals = [row.usd[1] for row in good if row.usd is not None]
    assert totals == sorted(totals)
    kinds = {row.offer.accelerator for row in good}
    assert {"A100-40GB:1", "H100:1"} <= kinds and not any("T4" in kind for kind in kinds)
    assert {row.offer.accelerator for row in found if not row.fits} == {"L4:1"}
    for row in good:
        assert row.hours is not None and row.usd is not None and row.offer.usd_per_hour is not None
        assert row.usd[0] == pytest.approx(row.hours[0] * row.offer.usd_per_hour)


def test_more_devices_do_the_same_work_in_less_time(tmp_path: Path, sized: None) -> None:
    found = offering.rank(shipped("kd_l4"), environment(tmp_path), any_accelerator=True).ranked
    hours = {row.offer.accelerator: row.hours[1] for row in found if row.hours is not None}
    assert hours["A100-40GB:8"] == pytest.approx(hours["A100-40GB:1"] / 8)


def test_a_step_has_as_many_rows_where_only_a_micro_batch_can_be_cut(
    tmp_path: Path, sized: None
) -> None:
    """Eight devices do not do eight times the work in the time of one."""
    asked = shipped("kd_l4", "train.micro_batch=32", "train.accumulate=1")
    found = offering.rank(asked, environment(tmp_path), any_accelerator=True).ranked
    rows = {row.offer.accelerator: row for row in found}
    one, eight = rows["A100-40GB:1"], rows["A100-40GB:8"]
    assert one.hours is not None and eight.hours is not None
    assert one.tokens_per_second is not None and eight.tokens_per_second is not None
    assert eight.hours[1] * eight.tokens_per_second == pytest.approx(
        one.hours[1] * one.tokens_per_second
    )


def test_only_the_recipes_own_accelerator_is_offered_unless_asked(
    tmp_path: Path, sized: None
) -> None:
    found = offering.rank(shipped("kd_a100"), environment(tmp_path))
    assert {row.offer.accelerator for row in found.ranked} == {"A100-40GB:1"}
    assert all(row.recipe for row in found.ranked)
    assert [row.offer.capacity for row in found.ranked] == ["spot", "standard"]


def test_an_unknown_price_comes_last_and_is_not_guessed(tmp_path: Path, sized: None) -> None:
    asked = shipped("kd_a100", "hardware.places=[us-east1, us-central1]")
    found = offering.rank(asked, environment(tmp_path)).ranked
    assert [row.offer.place for row in found] == ["us-central1"] * 2 + ["us-east1"] * 2
    assert [row.usd is None for row in found] == [False, False, True, True]


def test_a_price_of_the_recipe_is_not_taken_for_that_of_another_machine(
    tmp_path: Path, sized: None
) -> None:
    asked = shipped("kd_a100", "hardware.usd_per_hour=1")
    found = offering.rank(asked, environment(tmp_path), any_accelerator=True).ranked
    assert {row.offer.usd_per_hour for row in found if row.recipe} == {1.0}
    assert all(row.offer.price_source != "the recipe" for row in found if not row.recipe)


def test_backends_that_cannot_take_it_are_left_out_with_the_reason(tmp_path: Path) -> None:
    found = offering.rank(shipped("kd_h100"), environment(tmp_path))
    assert any(reason.startswith("local: ") and "no GPU" in reason for reason in found.left_out)
    here = offering.rank(shipped("quickstart"), environment(tmp_path))
    assert [row.offer.backend for row in here.ranked] == ["local"]
    assert here.left_out == ("vertex: it has no machine without an accelerator",)


def test_a_backend_whose_client_is_not_installed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(offering._CLIENTS, "vertex", ("no.such.module", "google"))
    found = offering.rank(shipped("kd_h100"), environment(tmp_path))
    assert found.ranked == ()
    assert "vertex: pip install 'launch-llm[google]' to use it" in found.left_out


def test_every_job_of_a_pipeline_is_ranked(tmp_path: Path, sized: None) -> None:
    whole = shipped("kd_l4_precompute")
    first, second = whole.stages
    moved = replace(second, hardware=replace(second.hardware, accelerator="H100:1"))
    found = offering.rank(replace(whole, stages=(first, moved)), environment(tmp_path)).ranked
    assert [(row.job, row.stages) for row in found][:1] == [(0, ("targets",))]
    assert {row.job for row in found} == {0, 1}
    assert [row.job for row in found] == sorted(row.job for row in found)


def test_the_command_prints_a_table_and_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    sized: None,
) -> None:  # fmt: skip
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    assert cli.run(["offers", "kd-l4", "--any", "-n", "3"]) == Exit.OK
    said = capsys.readouterr()
    head, *rows = said.out.splitlines()[1:]
    assert head.split() == [
        "PLACE", "MACHINE", "DEVICES", "CAPACITY", "FITS", "TOKENS/S", "HOURS", "USD/H", "USD",
    ]  # fmt: skip
    assert len(rows) == 3 and "~ rests on an assumed speed" in said.err
    assert all("yes" in row for row in rows) and "more; --limit" in said.err
    dear = sum(float(row.split()[-2]) > 3 for row in rows)
    assert dear and f"{dear} of these cost more than budget.usd_per_hour (3) allows" in said.err
    assert cli.run(["offers", "kd-l4", "--any", "-n", "3", "--json"]) == Exit.OK
    document = json.loads(capsys.readouterr().out)
    assert len(document["offers"]) == 3 and document["offers"][0]["fits"] is True


def test_the_table_has_hours_in_one_unit_and_at_most_100_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    sized: None,
) -> None:  # fmt: skip
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    assert cli.run(["offers", "kd-h100", "--any", "-n", "99"]) == Exit.OK
    out = capsys.readouterr().out
    assert " 0.395 " in out and " min " not in out and max(map(len, out.splitlines())) <= 100
    (row, *_) = offering.rank(shipped("kd_h100"), environment(tmp_path)).ranked
    far = replace(row.offer, place="northamerica-northeast1", accelerator="A100-80GB:16")
    wide = replace(row, offer=far, hours=(208.0, 312.0), usd=(52100.0, 78100.0))
    command._print(0, [wide, replace(wide, offer=replace(far, backend="local"))])
    head, *rows = capsys.readouterr().out.splitlines()[1:]
    assert max(map(len, (head, *rows))) <= 100 and "208 to 312" in rows[0]
    assert "BACKEND" in head and "MACHINE" not in head


def test_a_recipe_that_fits_nowhere_is_sent_to_other_accelerators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    sized: None,
) -> None:  # fmt: skip
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    hint = "a job fits nowhere here; --any compares other accelerators"
    assert cli.run(["offers", "kd-l4"]) == Exit.OK
    assert hint in capsys.readouterr().err
    assert cli.run(["offers", "kd-l4", "--any"]) == Exit.OK
    assert hint not in capsys.readouterr().err
    assert cli.run(["offers", "kd-a100"]) == Exit.OK
    assert hint not in capsys.readouterr().err


def test_no_offer_at_all_is_an_error_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    monkeypatch.setitem(offering._CLIENTS, "vertex", ("no.such.module", "google"))
    assert cli.run(["offers", "kd-h100"]) == Exit.USAGE
    assert "no backend of this machine offers what kd_h100.yaml asks for" in capsys.readouterr().err
