"""Accelerators and their dated prices."""

from __future__ import annotations

import csv
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import hardware


@pytest.mark.parametrize(
    ("text", "kind", "count", "shown"),
    [
        ("L4:1", "L4", 1, "L4:1"),
        ("l4", "L4", 1, "L4:1"),
        ("H100:8", "H100", 8, "H100:8"),
        ("A100", "A100-40GB", 1, "A100-40GB:1"),
        ("A100-80GB:4", "A100-80GB", 4, "A100-80GB:4"),
        ("cpu:2", "cpu", 2, "cpu:2"),
        ("v4-32", "v4", 16, "v4-32"),
        ("v5litepod-8", "v5litepod", 8, "v5litepod-8"),
        ("v5e-8", "v5litepod", 8, "v5litepod-8"),
        ("v6e-1", "v6e", 1, "v6e-1"),
    ],
)
def test_names_people_use_are_understood(text: str, kind: str, count: int, shown: str) -> None:
    found = hardware.parse(text)
    assert (found.kind.name, found.count, str(found)) == (kind, count, shown)
    assert hardware.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("L44:1", "no accelerator 'L44'; did you mean 'L4'?"),
        ("H100:0", "write KIND:COUNT"),
        ("H100:x", "write KIND:COUNT"),
        ("", "write KIND:COUNT"),
        ("v4", "write its size, such as v4-8"),
        ("v4-7", "'v4-7' is not a TPU slice; write v4-8"),
        ("v4-8:2", "write v4-8 and no count"),
        ("zzzz", "no accelerator 'zzzz'; allowed: A100-40GB"),
    ],
)
def test_what_is_not_an_accelerator_is_said_in_one_line(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=r"accelerator|TPU slice") as caught:
        hardware.parse(text)
    assert what in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=200, derandomize=True)
@given(st.text(alphabet="aAhHlLvV4581e0p:-. \n", max_size=12))
def test_parsing_gives_an_accelerator_or_a_value_error(text: str) -> None:
    try:
        found = hardware.parse(text)
    except ValueError:
        return
    assert found.count >= 1 and hardware.parse(str(found)) == found


def test_memory_is_that_of_all_chips() -> None:
    assert hardware.parse("A100-80GB:8").memory_gib == 640
    assert hardware.parse("v4-32").memory_gib == 512


def test_prices_carry_their_source_and_date() -> None:
    (price,) = hardware.prices(hardware.parse("H100:8"), "gcp")
    assert (price.machine, price.region) == ("a3-highgpu-8g", "us-east4")
    assert (price.on_demand, price.spot) == (87.8325, 34.16)
    assert "catalogs/v9/gcp/vms.csv" in price.source and "2026-11-21" in price.snapshot
    (slice_price,) = hardware.prices(hardware.parse("v4-32"), "gcp")
    assert slice_price.on_demand == 51.52


def test_a_price_that_nobody_has_read_is_unknown() -> None:
    l4 = {p.region: p for p in hardware.prices(hardware.parse("L4:1"), "gcp")}
    assert sorted(l4) == ["us-central1", "us-west1"], "the places of recipes/kd_l4.yaml"
    assert all((p.on_demand, p.spot) == (0.85362, 0.43623) for p in l4.values())
    assert all(p.machine == "g2-standard-8" and "L4 0.56004" in p.note for p in l4.values())
    assert hardware.prices(hardware.parse("L4:8"), "gcp") == ()
    assert all(price.spot is None for price in hardware.prices(hardware.parse("H200:8"), "vast"))


def test_the_table_of_prices_agrees_with_the_facts_in_the_code() -> None:
    text = resources.files("launcher").joinpath("data/prices.csv").read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) > 30
    for row in rows:
        name = row["accelerator"]
        found = hardware.parse(name if "-" in name and name[0] == "v" else f"{name}:{row['count']}")
        assert found.count == int(row["count"]), row
        assert found.kind.memory_gib == float(row["memory_gib_each"]), row
        assert found.kind.bf16_tflops == float(row["bf16_dense_tflops_each"]), row
        assert row["price_source"] and row["price_snapshot"]
        on_demand, spot = row["on_demand_usd_h"], row["spot_usd_h"]
        assert not (on_demand and spot) or float(on_demand) >= float(spot), row
        if row["cloud"] == "gcp" and found.kind.vendor == "nvidia":
            assert hardware.machine(found, "gcp") == row["machine_type"]


def test_machines_are_known_by_count() -> None:
    kind = hardware.parse("L4").kind
    assert hardware.counts(kind, "gcp") == (1, 2, 4, 8)
    assert hardware.machine(hardware.parse("L4:2"), "gcp") == "g2-standard-24"
    assert hardware.machine(hardware.parse("L4:3"), "gcp") is None
    assert "RTX4090" not in hardware.kinds("gcp")
