"""The report: one file, nothing fetched, curves that are there, words that cannot become markup."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import chart, report
from launcher.home import Unwritable
from tests.launcher.recorded import GATE_LINE, START, Recorder, quickstart

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
_VOID = {"meta", "link", "br", "line", "circle", "path", "input"}


class _Page(HTMLParser):
    """Tags, and whether each one is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def charts(self) -> dict[str, dict[str, Any]]:
        return {
            a["aria-label"]: json.loads(a["data-chart"])
            for _, a in self.attributes
            if "data-chart" in a
        }


def _written(made: Recorder) -> _Page:
    page = _Page(report.write(made.run()).read_text())
    assert page.open == []
    return page


def test_it_draws_loss_learning_rate_and_throughput_of_every_stage(tmp_path: Path) -> None:
    charts = _written(quickstart(tmp_path)).charts()

    assert list(charts) == ["Loss", "Learning rate", "Throughput"]
    names = [name for name, _ in charts["Loss"]["series"]]
    assert names == ["kd training", "kd held out", "ce training", "ce held out"]
    kd = dict(charts["Loss"]["series"])["kd training"]
    assert [step for step, _ in kd] == list(range(10, 101, 10))
    assert kd[-1][1] < kd[0][1]
    assert [name for name, _ in charts["Throughput"]["series"]] == ["kd", "ce"]


def test_an_objective_that_is_no_cross_entropy_gets_a_chart_of_its_own(tmp_path: Path) -> None:
    made = Recorder(tmp_path, stages=(("kd", "kd"), ("ce", "pretrain")))
    for stage, scale in (("kd", 0.5), ("ce", 1.0)):
        made.metrics(stage, [
            {"kind": "step", "global_step": n, "ce_loss": (6.0 - n) * (1 + 1e-6),
             "train_loss": scale * (6.0 - n),
             "lr": 0.1}
            for n in range(4)
        ])  # fmt: skip

    charts = _written(made).charts()

    losses = dict(charts["Loss"]["series"])
    assert losses["kd training"] == losses["ce training"]
    (objective,) = (found for title, found in charts.items() if "objective" in title)
    assert objective["series"] == [["kd", [[n, 3.0 - n / 2] for n in range(4)]]]


def test_it_tells_the_facts_the_gate_and_the_comparison(tmp_path: Path) -> None:
    made = quickstart(tmp_path)
    words = " ".join(_written(made).words)

    for fact in (
        made.name, "succeeded", GATE_LINE, "student-kd", "5.2000", "418,000", "9,169", "torch",
        "2.13.0", "local (here)", "17", "fp32", "nan_skipped", "1m35s", "$0",
    ):  # fmt: skip
        assert fact in words, fact


def test_it_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = _written(quickstart(tmp_path))

    for tag, attributes in page.attributes:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form", "video"), tag
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    text = report.write(quickstart(tmp_path, number=2).run()).read_text()
    assert "url(" not in text and "@import" not in text and "http:" not in text
    policy = next(a["content"] for t, a in page.attributes if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_a_run_that_recorded_nothing_has_a_report_too(tmp_path: Path) -> None:
    made = Recorder(tmp_path)
    words = " ".join(_written(made).words)

    assert "No stage has recorded training steps." in words and "planned" in words


_NASTY = "<script>alert('x')</script>\"'&{}</svg>]]>"


def test_whatever_a_run_wrote_stays_text(tmp_path: Path) -> None:
    made = Recorder(tmp_path, stages=((_NASTY.replace("/", "|"), "kd"),))
    made.begin()
    stage = made.ids[0]
    made.train(stage)
    rows = [{_NASTY: _NASTY, "model": _NASTY, "val_loss": 1.0}]
    made.metrics(stage, [
        {"kind": "table", "global_step": 0, "rows": rows},
        {"kind": "event", "global_step": 1, "event": _NASTY, "time": START, _NASTY: _NASTY},
    ])  # fmt: skip
    made.gate(stage, False, _NASTY)
    made.end("failed", 6, why=_NASTY)
    (made.root / "recipe.yaml").write_text(_NASTY)

    text = report.write(made.run()).read_text()

    assert text.count("<script") == 1
    assert _NASTY not in text and html.escape(_NASTY) in text
    assert _Page(text).open == []


def test_numbers_that_are_not_finite_neither_break_nor_bend_a_curve(tmp_path: Path) -> None:
    made = Recorder(tmp_path, stages=(("kd", "kd"),))
    losses = [5.0, "nan", 4.0, "inf", 3.0]
    made.metrics("kd", [
        {"kind": "step", "global_step": n, "train_loss": loss, "lr": 0.1, "tokens_per_sec": 5.0}
        for n, loss in enumerate(losses)
    ])  # fmt: skip

    (_, drawn), *_ = _written(made).charts()["Loss"]["series"]

    assert drawn == [[0, 5.0], [2, 4.0], [4, 3.0]]


def test_it_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    made = quickstart(tmp_path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    assert report.write(made.run()) == made.root / "report.html"
    assert report.write(made.run(), folder / "new" / "mine.html").is_file()
    assert report.write(made.run(), folder).name == f"{made.name}.html"
    with pytest.raises(Unwritable, match="cannot write"):
        report.write(made.run(), Path("/proc/nowhere/report.html"))


def test_a_long_run_makes_a_small_file_and_keeps_its_spikes(tmp_path: Path) -> None:
    made = Recorder(tmp_path, stages=(("kd", "kd"),))
    lines = [
        {"kind": "step", "global_step": n, "lr": 1e-4, "tokens_per_sec": 9.0,
         "train_loss": 50.0 if n == 31_417 else 2.0 + n / 1e6}
        for n in range(40_000)
    ]  # fmt: skip
    made.metrics("kd", lines)

    path = report.write(made.run())

    assert path.stat().st_size < 200_000
    (_, drawn), *_ = _Page(path.read_text()).charts()["Loss"]["series"]
    assert [31_417, 50.0] in drawn
    assert drawn[0][0] == 0 and drawn[-1][0] == 39_999


_FINITE = st.floats(-1e12, 1e12, allow_nan=False)


@settings(max_examples=100, derandomize=True)
@given(st.lists(_FINITE, min_size=1, max_size=20))
def test_axes_hold_every_value_and_have_round_ticks(values: list[float]) -> None:
    low, high = chart.bounds(values, margin=0.05)
    marks = chart.ticks(low, high)

    assert low < high and low <= min(values) and max(values) <= high
    room = (high - low) * 1e-6
    assert all(low - room <= mark <= high + room for mark in marks)
    assert 1 <= len(marks) <= 14
    if len(marks) > 1:
        step = marks[1] - marks[0]
        digits = step / 10 ** math.floor(math.log10(step * 1.000001))
        assert min(abs(digits - round_one) for round_one in (1, 2, 5, 10)) < 1e-3


@settings(max_examples=60, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 10**6), _FINITE), max_size=3000, unique_by=lambda p: p[0]))
def test_thinning_keeps_order_ends_and_extremes(points: list[tuple[int, float]]) -> None:
    curve = sorted((float(x), y) for x, y in points)
    kept = chart.thin(curve)

    assert kept == sorted(kept) and set(kept) <= set(curve) and len(kept) <= 1000
    if curve:
        assert kept[0] == curve[0] and kept[-1] == curve[-1]
        assert min(y for _, y in kept) == min(y for _, y in curve)
        assert max(y for _, y in kept) == max(y for _, y in curve)


def test_tick_labels_are_short() -> None:
    assert chart.tick_label(0.0, 1) == "0"
    assert chart.tick_label(5.2, 0.2) == "5.2"
    assert chart.tick_label(0.0005, 0.0005) == "0.0005"
    assert chart.tick_label(8000, 2000) == "8k"
    assert chart.tick_label(3_000_000, 1_000_000) == "3M"
    assert chart.tick_label(250, 50) == "250"


@pytest.mark.browser
@pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()), reason="chromium and chromium-driver are absent"
)
@pytest.mark.skipif(util.find_spec("selenium") is None, reason="selenium is not installed")
def test_a_browser_draws_every_curve_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    path = report.write(quickstart(tmp_path).run())
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,1600",
                     "--disable-background-networking", "--disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        browser.get(path.as_uri())
        charts = browser.find_elements(By.CSS_SELECTOR, "svg[data-chart]")
        curves = browser.execute_script(
            "return [...document.querySelectorAll('svg .curve path')].map(path => {"
            " const box = path.getBoundingClientRect();"
            " return [path.getAttribute('d').split('L').length, path.getTotalLength(),"
            " box.width, box.height] })"
        )
        ActionChains(browser).move_to_element(charts[0]).perform()
        read = charts[0].find_element(By.XPATH, "../p[@class='read']").text
        complaints = browser.get_log("browser")
        messages = [
            json.loads(entry["message"])["message"] for entry in browser.get_log("performance")
        ]
    finally:
        browser.quit()

    assert len(charts) == 3 and len(curves) == 8
    for points, length, width, height in curves:
        assert points > 2 and length > 0 and width > 0 and height > 0
    assert re.match(r"step \d+: .*kd training \d", read), read
    assert complaints == []
    asked = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
