"""`evenstep watch` and `report --serve`: runs as they are now, of any number and with any name."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import click
import pytest
from browser import needs_chromium, opened
from click.testing import CliRunner
from clients import free_port, get, listens
from commands import BIN, CLEAN, DEADLINE_SECONDS, ROOT, evenstep, start
from injuring import until
from jobs import spec_of, train_in_process
from processes import ProcessesOf

from launch.cli import evenstep as command
from launch.commands.runs import _live
from service.monitoring.http_server import BadRequest, Request
from service.monitoring.live_report import MOST_SIDE_BY_SIDE, LiveReport
from service.monitoring.live_runs import LiveRun, LiveRuns
from service.monitoring.watch import cells_of, line_of, sparkline
from service.runs.directory import RunDirectory

HOSTILE = "\x1b]0;gone\x07<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, processes: ProcessesOf) -> Path:
    """Two runs of this machine, and a directory in which one of them is a link."""
    place = tmp_path_factory.mktemp("watched")
    for name in ("first", "other"):
        spec = spec_of("cut_of_digits", name=name)
        processes(1).run(train_in_process, spec, place / "runs", 17)
    return place


def write_run(runs: Path, name: str, *, state: str = "running", steps: int = 40) -> RunDirectory:
    """A run as another process would have begun it, without a process."""
    run = RunDirectory(runs / name)
    run.path.mkdir(parents=True)
    facts = {"format": 1, "id": name, "state": state, "created": time.time(), "attempts": []}
    run.facts.write_text(json.dumps(facts))
    spec = {"name": name, "batch": {"global_batch": 8}, "length": {"steps": steps}}
    run.spec.write_text(json.dumps(spec))
    return run


def add_row(run: RunDirectory, step: int, **values: float) -> None:
    row = {"step": step, "epoch": 0.1, "time": time.time(), "train/loss": 2.0 / step, **values}
    with run.metrics.open("a") as file:
        file.write(json.dumps(row) + "\n")


# ---- in a terminal


def test_watch_prints_a_line_for_each_run_where_there_is_no_terminal(place: Path) -> None:
    told = evenstep("watch", "first", "runs/other", cwd=place)
    assert told.returncode == 0, told.stderr
    lines = sorted(told.stdout.splitlines())
    assert [line.split(" ")[:3] for line in lines] == [
        ["first", "state=stopped", "step=17/40"],
        ["other", "state=stopped", "step=17/40"],
    ]
    assert "\x1b" not in told.stdout
    assert evenstep("watch", "--all", cwd=place).stdout.count("\n") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("watch",), "RUN or --all: name the runs"),
        (("watch", "first", "--all"), "RUN or --all: name the runs"),
        (("watch", "frist"), "did you mean 'first'?"),
        (("watch", "--all", "--runs", "nowhere"), "There is no directory nowhere."),
        (("report", "--all"), "--all is for --serve"),
        (("report",), "RUN: name the runs"),
    ],
)
def test_a_mistake_is_one_line(place: Path, words: tuple[str, ...], told: str) -> None:
    ended = evenstep(*words, cwd=place)
    assert ended.returncode == 64
    assert told in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


class OnTerminal:
    """A command on a terminal of its own."""

    def __init__(self, *words: object, cwd: Path, is_its_own: bool = False) -> None:
        """Its errors are in a file; `is_its_own`: the terminal is that of its session."""

        def begin() -> None:
            if is_its_own:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        ours, theirs = pty.openpty()
        self._errors = (cwd / "errors").open("wb")
        environ = {k: v for k, v in CLEAN.items() if k != "CI"}
        self.process = subprocess.Popen(
            [str(BIN / "evenstep"), *map(str, words)],
            cwd=cwd,
            env=environ | {"TERM": "xterm", "COLUMNS": "140", "LINES": "20", "LANG": "C.UTF-8"},
            stdin=theirs,
            stdout=theirs,
            stderr=self._errors,
            start_new_session=True,
            preexec_fn=begin,
        )
        os.close(theirs)
        os.set_blocking(ours, False)
        self._ours = ours
        self.said = b""

    def read(self) -> str:
        with suppress(OSError):  # nothing new, or nobody is there any more
            self.said += os.read(self._ours, 1 << 20)
        return self.said.decode(errors="replace")

    def hang_up(self) -> None:
        """Close the terminal."""
        if self._ours >= 0:
            os.close(self._ours)
        self._ours = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_SECONDS)
        self.hang_up()
        self._errors.close()


def test_watch_draws_a_table_that_follows_a_run_and_ends_cleanly(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "live")
    write_run(tmp_path / "runs", HOSTILE.replace("/", "_"), state="done")
    add_row(run, 2, **{"train/rows_per_second": 4.0, "train/data_wait": 0.25, "test/loss": 0.5})
    shown = OnTerminal("watch", "--all", "--every", "0.1", cwd=tmp_path)
    try:
        until(lambda: "2/40" in shown.read(), "the table")
        first = shown.read()
        assert first.count("\x1b[?1049h") == 1, "a screen of its own"
        assert "\x1b[2J" not in first.partition("2/40")[2], "it is not cleared: no flicker"
        for cell in ("live", "running", "loss 0.5", "25%", "0:01:16"):  # 38 steps of 2 s
            assert cell in first, cell
        assert "\x1b]0;" not in first, "a name sets no title"
        add_row(run, 3)
        until(lambda: "3/40" in shown.read(), "the news")
        shown.process.send_signal(signal.SIGINT)
        assert shown.process.wait(DEADLINE_SECONDS) == 0

        def after_the_screen() -> str:
            return shown.read().rpartition("\x1b[?1049l")[2]

        until(lambda: "3/40" in after_the_screen(), "the table stays where the command was given")
        assert "Traceback" not in shown.read()
        assert "\x1b[?25h" in shown.read(), "the cursor is back"
    finally:
        shown.close()


def test_watch_says_that_there_is_nothing_to_show(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    done = evenstep("watch", "--all", "--once", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "There are no runs here.\n"), done.stderr


@pytest.mark.parametrize(("hears", "code"), [(True, 0), (False, 141)])
def test_watch_ends_without_a_word_when_its_terminal_is_closed(
    tmp_path: Path, hears: bool, code: int
) -> None:
    """Of its own terminal it gets SIGHUP, of another one only that nothing can be written."""
    run = write_run(tmp_path / "runs", "live")
    add_row(run, 2)
    shown = OnTerminal("watch", "--all", "--every", "0.1", cwd=tmp_path, is_its_own=hears)
    try:
        until(lambda: "2/40" in shown.read(), "the table")
        shown.hang_up()
        add_row(run, 3)
        assert shown.process.wait(DEADLINE_SECONDS) == code
    finally:
        shown.close()
    assert (tmp_path / "errors").read_text() == ""


@pytest.mark.parametrize(
    "words", [("watch", "x", "--every", "nan"), ("verify", "x", "y", "--tolerance", "NaN")]
)
def test_nan_is_no_number_of_an_option(words: tuple[str, ...]) -> None:
    with pytest.raises(click.BadParameter, match=r"(?i)'nan' is not a number"):
        CliRunner().invoke(command, words, catch_exceptions=False, standalone_mode=False)


def test_every_text_of_a_run_is_safe_to_print(tmp_path: Path) -> None:
    run = write_run(tmp_path, HOSTILE.replace("/", "_"), state="\x1b[31mred\x07")
    add_row(run, 1, **{"test/\x1b[2J": 1.0})
    now = LiveRun(run.path).look()
    for text in (*cells_of(now), line_of(now)):
        assert not re.search(r"[\x00-\x1f\x7f]", text), text


@pytest.mark.parametrize(
    "row",
    [
        {"step": "NaN"},
        {"step": "Infinity"},
        {"time": "Infinity"},
        {"time": -1},
        {"step": 1e300},
        {"step": -1, "epoch": 1.0},
        {"step": "no number", "epoch": 1.0},
    ],
)
def test_a_row_whose_step_or_time_is_none_does_not_end_a_look_at_all_runs(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    for name in ("good", "strange"):
        add_row(write_run(tmp_path, name), 3)
    strange = write_run(tmp_path, "other")
    spec = {"batch": {"global_batch": 10**400}, "length": {"epochs": 2.0}}
    strange.spec.write_text(json.dumps(spec))
    with strange.metrics.open("a") as file:
        file.write(json.dumps({"step": 4, "time": time.time(), "train/loss": 1.0, **row}) + "\n")
    found, broken = LiveRuns(directory=tmp_path).look()
    assert len(found) + len(broken) == 3
    assert {now.name for now in found} >= {"good", "strange"}
    for now in found:
        assert line_of(now)


def test_a_run_that_is_extended_while_it_is_watched_has_its_new_length(tmp_path: Path) -> None:
    run = write_run(tmp_path, "job", steps=40)
    runs = LiveRuns(directory=tmp_path)
    add_row(run, 1)
    lengths = [runs.look()[0][0].steps]
    longer = json.loads(run.spec.read_text()) | {"length": {"steps": 4000}}
    run.spec.with_name("new").write_text(json.dumps(longer))
    run.spec.with_name("new").rename(run.spec)
    lengths.append(runs.look()[0][0].steps)
    run.spec.unlink()
    lengths.append(runs.look()[0][0].steps)
    assert lengths == [40, 4000, None]


def test_a_run_that_a_watched_sweep_starts_later_is_shown(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "runs": {}}))
    add_row(write_run(tmp_path, "lr-0.1"), 1)
    with _live((tmp_path,), False, tmp_path) as runs:
        assert [run.name for run in runs.look()[0]] == ["lr-0.1"]
        add_row(write_run(tmp_path, "lr-0.2"), 1)
        assert {run.name for run in runs.look()[0]} == {"lr-0.1", "lr-0.2"}


def test_of_a_long_run_the_latest_losses_and_tests_are_found(tmp_path: Path) -> None:
    run = write_run(tmp_path, "long", steps=900)
    for step in range(1, 301):
        add_row(run, step, **({"test/loss": 0.25, "test/b": step} if step in (20, 40) else {}))
    for step in (301, 302):  # as another program might write it
        with run.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "train/loss": "text", "test/loss": None}) + "\n")
    now = LiveRun(run.path).look()
    assert (now.step, now.latest["train/loss"]) == (302, 2.0 / 300)
    assert (now.latest["test/loss"], now.latest["test/b"]) == (0.25, 40)
    assert now.losses == tuple(2.0 / step for step in range(241, 301))
    add_row(run, 303, **{"test/b": 7})
    look = LiveRun(run.path).look()
    assert (look.latest["test/b"], look.latest["test/loss"]) == (7, 0.25)


def test_a_small_chart_is_low_where_values_are_low_and_marks_what_is_not_finite() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], columns=8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5], columns=8) == "▁▁"
    assert sparkline([0.0, float("nan"), 7.0], columns=2) == "!▁"
    assert sparkline([], columns=8) == ""
    assert sparkline([-1.7e308, 1.7e308], columns=8) == "▁█"


# ---- in a browser


@contextmanager
def served(*words: object, cwd: Path) -> Iterator[tuple[int, Any]]:
    """(the port, the process) of `report WORDS --serve`."""
    port = free_port()
    process = start(
        [BIN / "evenstep", "report", *words, "--serve", "--port", port],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: process.poll() is not None or listens(port), "it listens")
        yield port, process
    finally:
        process.kill()
        process.communicate()


def test_the_page_is_served_on_loopback_and_has_what_changed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "live")
    add_row(run, 2)
    with served("live", cwd=tmp_path) as (port, process):
        page = get(port, "/")
        assert page.status == 200
        assert "<h1>live</h1>" in page.text
        assert "connect-src &#x27;self&#x27;" in page.text or "connect-src 'self'" in page.text
        assert not re.findall(r"(?:src|href)=|url\(|@import|https?://", page.text)
        state = json.loads(get(port, "/state").text)["version"]
        assert json.loads(get(port, "/state").text)["version"] == state, "nothing has changed"
        add_row(run, 3, **{"test/accuracy": 0.75})

        def is_new() -> bool:
            return bool(json.loads(get(port, "/state").text)["version"] != state)

        until(is_new, "the page learns of it")
        assert "test/accuracy" in get(port, "/").text
        for path in ("/../../etc/passwd", "/runs/live/run.json", "/live"):
            assert get(port, path).status == 404
        assert get(port, "/?run=../live").status == 404
        assert get(port, "/", Host="evil.example").status == 421, "no DNS rebinding"
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 0, said
        assert (
            said == f"http://127.0.0.1:{port}/ shows live, on this machine only; Ctrl-C ends it.\n"
        )


# The first question of the page whether something is new waits until `go` is true.
WAITS = """
const ask = window.fetch;
window.fetch = async (...words) => {
  while (!window.go) await new Promise((then) => setTimeout(then, 10));
  return ask(...words);
};
"""


@needs_chromium
def test_a_page_in_a_browser_follows_its_run_from_the_moment_of_its_load(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "live")
    other = write_run(tmp_path / "runs", "<img src=x onerror=alert(1)>other", state="done")
    for each in (run, other):
        add_row(each, 2)
    with served("--all", cwd=tmp_path) as (port, process), opened(tmp_path / "profile") as tab:
        tab.open(f"http://127.0.0.1:{port}/?run=live", before=WAITS)
        tab.until("document.querySelectorAll('svg').length > 0")
        tab.value("document.querySelector('details').open = true")
        version = json.loads(get(port, "/state?run=live").text)["version"]
        assert tab.value("document.querySelector('main').dataset.version") == version
        add_row(run, 3, **{"test/accuracy": 0.75})
        until(
            lambda: json.loads(get(port, "/state?run=live").text)["version"] != version, "it is new"
        )
        assert not tab.value("document.body.textContent.includes('accuracy')")
        tab.value("window.go = true")
        tab.until("document.body.textContent.includes('accuracy')")
        assert tab.value("document.querySelector('details').open"), "as the reader left it"
        add_row(run, 4, **{"test/recall": 0.5})
        tab.until("document.body.textContent.includes('recall')")

        # The list: what is chosen stays chosen while the list is renewed, and is shown.
        tab.open(f"http://127.0.0.1:{port}/", before="window.go = true")
        tab.until("document.querySelectorAll('input').length === 2")
        tab.value("document.querySelectorAll('input').forEach((each) => each.click())")
        add_row(run, 5)
        tab.until("document.body.textContent.includes('5/40')")
        assert tab.value("document.querySelectorAll('input:checked').length") == 2
        tab.value("document.querySelector('button').click()")
        tab.until("document.body.textContent.includes('Side by side')")
        assert tab.value("location.search").count("run=") == 2
        assert tab.errors == []

        process.kill()  # the server ends: what is shown stays
        process.wait(DEADLINE_SECONDS)
        assert tab.value("document.body.textContent.includes('Side by side')")


def asked(report: LiveReport, path: str = "/", **query: list[str]) -> str:
    return report.answer(Request(path, query, {})).body.decode()


STOPPED_WHILE_IT_ANSWERS = """
import os, signal, sys
from types import SimpleNamespace
from service.monitoring.http_server import Answer, bound
from service.monitoring.live_report import serve

class Body(bytes):
    def __len__(self):  # which the server asks for when it sends the answer
        os.kill(os.getpid(), number)
        return 2

def end(number, frame):  # as `evenstep report` does
    raise KeyboardInterrupt

number = int(sys.argv[2])
signal.signal(number, end)
listening = bound("127.0.0.1", int(sys.argv[1]))
print("listens", flush=True)
serve(SimpleNamespace(answer=lambda request: Answer(200, Body(b"ok"))), [listening])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_is_ended_while_it_answers_writes_no_trace(number: signal.Signals) -> None:
    port, pipe = free_port(), subprocess.PIPE
    words = [sys.executable, "-c", STOPPED_WHILE_IT_ANSWERS, str(port), str(int(number))]
    with start(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        with suppress(ConnectionError, HTTPException):
            get(port, "/")
        _, wrong = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, wrong) == (0, "")


def test_of_a_thousand_runs_a_look_reads_only_the_one_that_changed(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"run-{n:04d}", state="done") for n in range(1000)]
    for run in runs:
        add_row(run, 7)
    live = LiveRuns(directory=tmp_path)
    report = LiveReport(live, "1,000 runs", lists=True)
    page = asked(report)
    assert page.count("<tr><td><input") == 1000
    read: list[str] = []
    plain_read = LiveRun._read

    def counted(self: LiveRun, signature: Any) -> Any:
        read.append(self._directory.name)
        return plain_read(self, signature)

    LiveRun._read = counted  # type: ignore[method-assign]  # counts, and reads as before
    try:
        assert asked(report) == page
        add_row(runs[123], 8)
        report._looked = -1e9
        assert "run=run-0123" in asked(report)
        assert read == ["run-0123"]
    finally:
        LiveRun._read = plain_read  # type: ignore[method-assign]


def test_two_runs_of_one_name_can_both_be_chosen(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, "same").path for name in ("a", "b")]
    for step, path in enumerate(paths, start=2):
        add_row(RunDirectory(path), step)
    report = LiveReport(LiveRuns(paths), "runs", lists=True)
    page = asked(report)
    for path in paths:
        assert f'value="{path}"' in page
        assert str(path) not in asked(report, run=[str(path)]).partition("Side by side")[2]
    assert "Side by side" in asked(report, run=list(map(str, paths)))


def test_the_list_follows_no_link_and_shows_chosen_runs_side_by_side(
    place: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    for name in ("first", "other"):
        (runs / name).mkdir(parents=True)
        for file in ("run.json", "spec.yaml", "metrics.jsonl"):
            (runs / name / file).write_bytes((place / "runs" / name / file).read_bytes())
    (runs / "link").symlink_to(place / "runs/first")
    secret = write_run(runs, "leaky", state="done")
    secret.metrics.symlink_to(place / "runs/first/metrics.jsonl")
    write_run(runs, "<b>bold", state="done")
    report = LiveReport(LiveRuns(directory=runs), "runs", lists=True)
    page = asked(report)
    assert "&lt;b&gt;bold" in page
    assert "<b>bold" not in page.replace("<b>runs</b>", "")
    assert "link" not in re.findall(r'value="([^"]*)"', page)
    both = asked(report, run=["first", "other"])
    assert "Side by side" in both
    assert "train/loss" in both
    with pytest.raises(BadRequest, match="no such run"):
        asked(report, run=["link"])
    with pytest.raises(BadRequest, match="link"):
        asked(report, run=["leaky"])
    with pytest.raises(BadRequest, match=f"at most {MOST_SIDE_BY_SIDE}"):
        asked(report, run=[str(n) for n in range(MOST_SIDE_BY_SIDE + 1)])


def test_a_port_that_is_taken_is_told_in_one_line(place: Path) -> None:
    with served("first", cwd=place) as (port, _):
        told = evenstep("report", "first", "--serve", "--port", port, cwd=place)
    assert told.returncode == 64
    assert (
        told.stderr == f"error: --port: {port}: Address already in use. Choose another; 0 is any.\n"
    )
