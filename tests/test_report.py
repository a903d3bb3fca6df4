"""The record of runs: `evenstep runs`, and the page of `evenstep report` in a real browser."""

import json
import math
import re

import pytest
from browser import needs_chromium, probe
from commands import ROOT, evenstep
from hypothesis import given
from hypothesis import strategies as st
from jobs import spec_of, train_in_process

from service.basics.errors import SpecError
from service.observability.charts import (
    Axis,
    Line,
    chart,
    path,
    short,
    smoothed,
    step_axis,
    thinned,
    value_axis,
)
from service.observability.report import _title, page
from service.runs.history import differing, read_history

BEST = {"best": {"measure": "test/accuracy", "mode": "max"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory, processes):
    """Three runs: one in two attempts with a failure report, a changed one, and one cut short."""
    place = tmp_path_factory.mktemp("report")
    runs = place / "runs"
    pool = processes(1)
    first = spec_of("cut_of_digits", name="first", checkpoint=BEST)
    pool.run(train_in_process, first, runs, 17)
    pool.run(train_in_process, first, runs)
    other = spec_of("cut_of_digits", name="other", seed=8, checkpoint=BEST) | {
        "optimizer": {"name": "adam", "lr": 0.003}
    }
    pool.run(train_in_process, other, runs)
    pool.run(train_in_process, spec_of("plain_rows", name="odd", length={"epochs": 1.5}), runs, 2)
    failures = runs / "first" / "failures"
    failures.mkdir()
    started = read_history(runs / "first").attempts[1]["started"]
    report = {"time": started + 0.01, "rank": 3, "message": "Diverged: loss <script>alert(1)"}
    (failures / "one-rank-3.json").write_text(json.dumps(report))
    hang = {
        "time": started + 0.02,
        "rank": 0,
        "kind": "hang",
        "line": "loops.py:60",
        "stacks": "<f>",
    }
    (failures / "one-rank-0.json").write_text(json.dumps(hang))
    (failures / "two.json").write_text("{torn")
    return place


def test_runs_lists_the_latest_news_first(place):
    listed = evenstep("runs", cwd=place)
    assert listed.returncode == 0, listed.stderr
    head, *rows = [re.split(r" {2,}", line) for line in listed.stdout.splitlines()]
    assert head == ["run", "state", "step", "best", "when"]
    assert [row[:3] for row in rows] == [
        ["odd", "stopped", "2/4"],
        ["other", "done", "40/40"],
        ["first", "done", "40/40"],
    ]
    assert re.fullmatch(r"test/accuracy 0\.\d+ at step [24]0", rows[2][3])


def test_runs_reports_what_it_cannot_read_and_lists_the_rest(place, tmp_path):
    broken = tmp_path / "runs" / "torn"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{")
    (tmp_path / "runs" / "first").symlink_to(place / "runs" / "first")
    listed = evenstep("runs", cwd=tmp_path)
    assert "first" in listed.stdout
    assert "torn/run.json cannot be read" in listed.stderr
    assert evenstep("runs", "nowhere", cwd=tmp_path).returncode == 64


def test_a_run_whose_process_is_gone_is_reported_as_lost(place, tmp_path):
    run = tmp_path / "gone"
    run.mkdir()
    for name in ("run.json", "spec.yaml", "metrics.jsonl", ".lock"):
        (run / name).write_bytes((place / "runs" / "first" / name).read_bytes())
    facts = json.loads((run / "run.json").read_text())
    for key in ("ended", "to_step", "outcome"):
        del facts["attempts"][-1][key]
    (run / "run.json").write_text(json.dumps(facts | {"state": "running"}))
    host = (run / ".lock").read_text().split()[-1]
    assert read_history(run).state == "running", "its process, of the pool, is still there"
    (run / ".lock").write_text(f"process {2**22 + 1} on {host}")
    assert read_history(run).state == "lost"
    assert [outcome for _, _, outcome in read_history(run).spans()] == ["stopped", "lost"]


def test_a_name_that_is_no_run_is_reported_with_what_is_near(place):
    told = evenstep("report", "frist", cwd=place)
    assert told.returncode == 64
    assert "There is no run frist; did you mean 'first'?" in told.stderr
    assert not (place / "report.html").exists()


def test_the_page_loads_nothing_and_escapes_everything(place):
    text = page([read_history(place / "runs" / name) for name in ("first", "other")], now=0)
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://", text)
    assert "<script>alert" not in text
    assert "loss &lt;script&gt;alert(1)" in text
    assert "two.json cannot be read" in text
    assert "rank 0: hang at loops.py:60" in text
    assert "<pre>&lt;f&gt;</pre>" in text


def test_the_account_of_a_run_is_shown_where_it_keeps_one(place, tmp_path):
    run = tmp_path / "kept"
    run.mkdir()
    for name in ("spec.yaml", "metrics.jsonl"):
        (run / name).write_bytes((place / "runs" / "first" / name).read_bytes())
    facts = json.loads((place / "runs/first/run.json").read_text())
    facts["attempts"][0]["outcome"] = facts["state"] = "gave up"
    seconds = {"training": 61.0, "waiting for data": 0.25, "stopped": 7.5}
    facts["account"] = {"goodput": 0.4321, "steps_again": 1003, "seconds": seconds}
    (run / "run.json").write_text(json.dumps(facts))
    text = page([read_history(run)], now=0)
    assert "43% of the time since the first start" in text
    assert 'class="bar gave-up"' in text
    assert "Time accounting" in text
    (whole,) = re.findall(r"<tr><td>all</td>(.*?)</tr>", text)
    assert "<td>1,003</td><td>1 min 01 s</td><td>0.25 s</td><td>7.5 s</td>" in whole
    del facts["account"]["steps_again"]
    (run / "run.json").write_text(json.dumps(facts))
    assert "Time accounting" in page([read_history(run)], now=0)


def test_the_table_shows_what_differs_and_nothing_else(place):
    histories = [read_history(place / "runs" / name) for name in ("first", "other")]
    table = dict(differing([history.spec for history in histories]))
    assert table["optimizer.lr"] == ["0.05", "0.003"]
    assert table["seed"] == ["7", "8"]
    assert "batch.global_batch" not in table
    text = page(histories, now=0)
    assert re.search("optimizer.name</th><td>sgd</td><td>adam</td>", text)


CURVES = """
const curves = [...document.querySelectorAll(".chart")].map(figure => {
  const area = figure.querySelector(".area").getBoundingClientRect();
  return {
    title: figure.querySelector("figcaption").firstChild.textContent.trim(),
    drawn: [...figure.querySelectorAll("path.line, path.dots, path.thin")].map(path => {
      const box = path.getBoundingClientRect();
      return {
        points: path.getAttribute("d").match(/[ML]/g).length,
        wide: box.width / area.width,
        inside: box.top >= area.top - 5 && box.bottom <= area.bottom + 5,
        stroke: getComputedStyle(path).stroke,
      };
    }),
  };
});
const area = document.querySelector(".area"), box = area.getBoundingClientRect();
area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2}));
return {
  curves, tip: document.querySelector(".tip").textContent,
  overflow: document.documentElement.scrollWidth - innerWidth,
  page: getComputedStyle(document.body).backgroundColor,
  bars: [...document.querySelectorAll(".bar")].map(bar => bar.getBoundingClientRect().width),
  flags: document.querySelectorAll(".flag").length,
};
"""


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["laptop", "phone"])
def test_a_browser_draws_the_curves(place, width, dark):
    done = evenstep("report", "first", "runs/other", "-o", f"{width}.html", cwd=place)
    assert done.returncode == 0, done.stderr
    found = probe(place / f"{width}.html", CURVES, width=width, dark=dark)
    by_title = {curve["title"]: curve["drawn"] for curve in found["curves"]}
    assert {"Loss", "Accuracy", "Learning rate", "Rows per second", "Gradient norm"} <= set(
        by_title
    )
    assert [curve["points"] for curve in by_title["Learning rate"]] == [40, 40]
    for drawn in by_title.values():
        assert all(curve["inside"] for curve in drawn)
        if max(curve["points"] for curve in drawn) > 2:  # a save or two are dots, and no curve
            assert max(curve["wide"] for curve in drawn) > 0.4
        assert {curve["stroke"] for curve in drawn} & {"none", "rgba(0, 0, 0, 0)"} == set()
        assert len({curve["stroke"] for curve in drawn}) == 2, "one colour for each run"
    assert re.search(r"first train/loss · step 20", found["tip"])
    assert found["overflow"] <= 0, "nothing is wider than the screen"
    assert len(found["bars"]) == 3
    assert min(found["bars"]) >= 3
    assert found["flags"] == 3
    darkness = sum(map(int, re.findall(r"\d+", found["page"])[:3]))
    assert (darkness < 200) == dark


finite = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=40))
def test_an_axis_holds_every_value_and_has_labels(values):
    axis = value_axis(values)
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in values)
    ticks = axis.ticks()
    assert ticks
    assert all(-1e-6 <= axis.place(tick) <= 1 + 1e-6 for tick in ticks)


EXTREME = (0.0, 1e-320, 1e-29, 1e-10, 1.0, 1e38, 1e290, 1e299, 1e300, 1e308, -1e300, math.nan)


@pytest.mark.parametrize("low", EXTREME)
@pytest.mark.parametrize("high", EXTREME)
def test_a_curve_of_any_two_numbers_is_drawn(low, high):
    drawn = chart("t", [Line("t", [(1, low), (2, high)], 0)], x=step_axis([1, 2]))
    assert not re.search(r"[\"M ]-?(nan|inf)", drawn)


@given(st.lists(st.one_of(finite, st.just(math.nan)), min_size=1, max_size=3000))
def test_a_thinned_curve_keeps_its_extremes_and_every_gap(values):
    points = list(enumerate(values))
    kept = thinned(points, most=100)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    known = [value for value in values if not math.isnan(value)]
    left = [value for _, value in kept if not math.isnan(value)]
    assert (min(left), max(left)) == (min(known), max(known)) if known else not left
    assert (len(kept) > len(left)) == any(map(math.isnan, values))
    length = math.ceil(2 * len(values) / 100) if len(values) > 100 else 1
    broken = {step // length for step, value in points if math.isnan(value)}
    assert {step // length for step, value in kept if math.isnan(value)} == broken
    assert len(kept) <= 4 * math.ceil(len(values) / length)


def test_a_curve_is_interrupted_where_the_loss_was_no_number():
    unit = Axis(0, 1)
    assert path([(0, 0), (0.5, math.nan), (1, 1)], unit, unit) == "M0.0 1000.0M1000.0 0.0"


def test_smoothing_begins_at_the_first_value_and_keeps_a_constant():
    assert smoothed([(step, 3.0) for step in range(500)])[0][1] == pytest.approx(3.0)
    assert {round(value, 9) for _, value in smoothed([(s, 3.0) for s in range(500)])} == {3.0}


def test_a_curve_of_zeros_has_an_axis_that_shows_zero():
    assert value_axis([0.0, 0.0]) == Axis(-1.0, 1.0)
    assert value_axis([5e-324, 0.0]) == Axis(-1.0, 1.0)
    assert 0.0 in value_axis([0.0]).ticks()


def test_what_the_console_shows_of_stragglers_has_a_title_in_words():
    shown = (ROOT / "service/observability/console.py").read_text()
    keys = set(re.findall(r"system/slowest_\w+", shown))
    assert len(keys) == 2
    assert not [key for key in keys if "slowest_" in _title(key)]


def test_numbers_are_short():
    told = [short(v) for v in (0, 0.0634, 0.000012, 9876.5, 14800, 3.1e6, -math.inf, math.nan)]
    assert told == ["0", "0.0634", "1.2e-05", "9876", "14.8k", "3.1M", "-∞", "NaN"]


def test_a_directory_without_a_run_is_a_mistake(tmp_path):
    with pytest.raises(SpecError, match=r"is not a run: it has no run\.json"):
        read_history(tmp_path)


def test_an_axis_of_one_step_begins_at_0():
    """A run that was logged once: `report` ended in a division by zero."""
    assert step_axis([8.0, 8.0]) == Axis(0, 8)
    assert step_axis([8.0, 10.0]) == Axis(8, 10)
