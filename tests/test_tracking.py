"""metrics.jsonl is the truth: whole rows, each step once, whenever a process died."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import spec_of

from service.basics.errors import WillFailAgain
from service.plan.plan import make_plan
from service.runs.directory import open_run
from service.runs.tracking import MetricsFile, Outcome, Row, Tracker, Writer, read_metrics
from service.spec.files import load_spec, shown_values
from service.training.attempt import _config

ROOT = Path(__file__).parents[1]


def tracker_of(path: Path, *, resume_step: int | None = None) -> Tracker:
    metrics = MetricsFile(path, resume_step=resume_step)
    return Tracker([metrics], epoch_at=lambda step: step / 8, resume_step=resume_step)


def log_steps(path: Path, first: int, last: int, *, resume_step: int | None = None) -> None:
    tracker = tracker_of(path, resume_step=resume_step)
    for step in range(first, last + 1):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.close("done")


def steps_in(path: Path) -> list[int]:
    return [int(row["step"]) for row in read_metrics(path)]


def strict(line: str) -> dict[str, object]:
    """What a reader makes of it that knows JSON and nothing else."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_row_is_in_the_file_when_log_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker, before = tracker_of(path), time.time()
    tracker.log(10, {"train/loss": 0.25, "test/accuracy": 0.5})
    (line,) = path.read_text().splitlines(keepends=True)
    assert line.endswith("\n")
    assert list(strict(line)) == ["step", "epoch", "time", "train/loss", "test/accuracy"]
    assert before - 0.001 <= strict(line)["time"] <= time.time()
    assert strict(line) | {"time": 0} == {
        "step": 10,
        "epoch": 1.25,
        "time": 0,
        "train/loss": 0.25,
        "test/accuracy": 0.5,
    }
    tracker.close("done")


def test_numbers_that_json_cannot_write_survive_the_way_through_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = tracker_of(path)
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    tracker.close("failed")
    row = strict(path.read_text())
    assert [row[key] for key in "abcd"] == ["NaN", "Infinity", "-Infinity", 1.5]
    (back,) = read_metrics(path)
    assert math.isnan(back["a"])
    assert [back["b"], back["c"], back["d"]] == [math.inf, -math.inf, 1.5]


def test_a_resume_keeps_exactly_the_rows_up_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log_steps(path, 1, 9)
    before = path.read_bytes().splitlines()
    log_steps(path, 7, 12, resume_step=6)
    assert steps_in(path) == list(range(1, 13))
    assert path.read_bytes().splitlines()[:6] == before[:6]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log_steps(path, 1, 9)
    log_steps(path, 1, 3)
    assert steps_in(path) == [1, 2, 3]


def test_a_resume_finds_no_file_and_creates_one(tmp_path):
    log_steps(tmp_path / "metrics.jsonl", 7, 8, resume_step=6)
    assert steps_in(tmp_path / "metrics.jsonl") == [7, 8]


@pytest.mark.parametrize("torn_bytes", [1, 5, 40, 65])
def test_a_torn_last_line_is_left_out_and_then_dropped(tmp_path, torn_bytes):
    path = tmp_path / "metrics.jsonl"
    log_steps(path, 1, 4)
    torn = path.read_bytes()[:-torn_bytes]
    path.write_bytes(torn)
    whole = 4 if torn_bytes == 1 else 3  # without its line feed alone, the row is all there
    assert steps_in(path) == list(range(1, whole + 1))
    log_steps(path, whole + 1, 6, resume_step=whole)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]
    assert all(strict(line) for line in path.read_text().splitlines())


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\x00\x00\n{"step": 3}\n')
    with pytest.raises(WillFailAgain, match=r"metrics\.jsonl:2: .* Remove the line"):
        read_metrics(path)
    with pytest.raises(WillFailAgain, match=r"metrics\.jsonl:2: "):
        MetricsFile(path, resume_step=3)


def test_a_process_killed_while_it_logs_leaves_no_gap_and_no_repeated_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    endless = (
        "import sys; from pathlib import Path\n"
        "from service.runs.tracking import MetricsFile, Tracker\n"
        "tracker = Tracker([MetricsFile(Path(sys.argv[1]))], epoch_at=float)\n"
        "for step in range(1, 10**9):\n"
        "    tracker.log(step, {'train/loss': 1 / step})\n"
        "    if step == 500: print(flush=True)\n"
    )
    command = [sys.executable, "-c", endless, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        process.kill()
    written = steps_in(path)
    assert len(written) >= 500
    assert written == list(range(1, len(written) + 1))
    log_steps(path, 491, 493, resume_step=490)
    assert steps_in(path) == list(range(1, 494))


def test_a_full_disk_keeps_rows_back_until_a_checkpoint_needs_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    limited = (
        "import resource, sys; from pathlib import Path\n"
        "from service.runs.tracking import MetricsFile, Tracker\n"
        "tracker = Tracker([MetricsFile(Path(sys.argv[1]))], epoch_at=float)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "for step in range(1, 9):\n"
        "    tracker.log(step, {'train/loss': 1 / 3})\n"
        "tracker.sync()\n"
    )
    command = [sys.executable, "-c", limited, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("metrics.jsonl could not be written: it would exceed the limit") == 1
    assert "File too large: '" + str(path) in done.stderr
    assert steps_in(path) == [1]


def test_a_step_is_logged_once_and_in_order(tmp_path):
    tracker = tracker_of(tmp_path / "metrics.jsonl", resume_step=6)
    for step in (5, 6):
        with pytest.raises(AssertionError, match=f"step {step} is logged after step 6"):
            tracker.log(step, {"train/loss": 1.0})
    tracker.log(7, {"train/loss": 1.0})
    with pytest.raises(AssertionError, match="step 7 is logged after step 7"):
        tracker.log(7, {"test/accuracy": 1.0})
    tracker.close("done")
    with pytest.raises(AssertionError, match="step 8 is logged after close"):
        tracker.log(8, {"train/loss": 1.0})


def test_the_other_processes_have_the_same_tracker_without_writers():
    tracker = Tracker(epoch_at=float)
    tracker.log(1, {"train/loss": 1.0})
    with pytest.raises(AssertionError):
        tracker.log(1, {"train/loss": 1.0})
    tracker.sync()
    assert not tracker.stop_requested
    tracker.close("done")


class Recorder(Writer):
    """A writer as somebody else would add one."""

    def __init__(self, name: str, events: list[str], *, fails: bool = False) -> None:
        self.name, self.events, self.fails = name, events, fails

    def write(self, row: Row) -> None:
        self.events.append(f"{self.name} {row.step}")

    def close(self, outcome: Outcome) -> None:
        self.events.append(f"{self.name} {outcome}")
        if self.fails:
            raise OSError(self.name)


def test_rows_reach_the_writers_in_order_and_all_are_closed_the_last_one_first():
    events: list[str] = []
    writers = [Recorder("file", events), Recorder("bad", events, fails=True), Recorder("w", events)]
    tracker = Tracker(writers, epoch_at=float)
    tracker.log(3, {})
    with pytest.raises(OSError, match="bad"):
        tracker.close("failed")
    tracker.close("failed")
    assert events == ["file 3", "bad 3", "w 3", "w failed", "bad failed", "file failed"]


def test_a_stop_asked_of_one_writer_is_asked_of_the_tracker():
    class StopButton(Recorder):
        stop_requested = True

    assert Tracker([Recorder("a", []), StopButton("b", [])], epoch_at=float).stop_requested
    assert not Tracker([Recorder("a", [])], epoch_at=float).stop_requested


def test_trackers_show_what_is_not_finite_as_the_spec_writes_it(tmp_path: Path) -> None:
    """They are sent JSON, in which it would be null."""
    values = {"limit": math.inf, "parts": [-math.inf, {"a": math.nan, "b": None}, 0.5]}
    spec = load_spec({**spec_of("rows"), "task_args": values})
    plan = make_plan(spec, processes=1, train_rows=97, test_rows=13)
    opened = open_run(tmp_path, spec, fresh=False)
    config = _config(plan, opened)
    opened.close()
    shown = {"limit": ".inf", "parts": ["-.inf", {"a": ".nan", "b": None}, 0.5]}
    assert config["task_args"] == shown
    finite = load_spec(spec_of("rows"))
    assert shown_values(finite) == finite.model_dump(mode="json")
