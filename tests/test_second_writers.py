"""TensorBoard and trackio: the real clients keep each row once, and a broken one hurts nothing."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from commands import CLEAN, DEADLINE_SECONDS, evenstep

from service.basics.background_queue import LONGEST
from service.observability.background_writer import BackgroundWriter, TrackerBackend
from service.runs.tracking import MetricsFile, Row, Tracker, read_metrics

ASKED = (
    "run",
    "digits",
    "length.epochs=2",
    "tracking.wandb=",
    "tracking.tensorboard=true",
    "tracking.trackio={project: tests}",
)
# The clients' own readers, in a process of their own: their imports warn of each other.
READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
print(json.dumps({
    tag: [(event.step, event.value) for event in events.Scalars(tag)]
    for tag in events.Tags()["scalars"]
}))
"""
READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps({
    "runs": SQLiteStorage.get_runs("tests"),
    "rows": [SQLiteStorage.get_logs("tests", name) for name in SQLiteStorage.get_runs("tests")],
    "config": SQLiteStorage.get_run_config("tests", SQLiteStorage.get_runs("tests")[0]),
}))
"""


def read(script, *words, **environ):
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, words)]
    done = subprocess.run(
        command, env=CLEAN | environ, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run that was killed after step 13 in effect: stopped there, and resumed to the end."""
    place = tmp_path_factory.mktemp("kept")
    environ = {"TRACKIO_DIR": str(place / "trackio")}
    stopped = evenstep(*ASKED, "--stop-at", 13, cwd=place, **environ)
    assert stopped.returncode == 75, stopped.stderr
    done = evenstep(*ASKED, cwd=place, **environ)
    assert done.returncode == 0, done.stderr
    for ended in (stopped, done):
        assert "lacks" not in ended.stdout
        assert "Traceback" not in ended.stderr
    return place


def series(rows):
    keys = dict.fromkeys(key for row in rows for key in row)
    return {
        key: [(row["step"], row[key]) for row in rows if key in row]
        for key in keys
        if key not in ("step", "epoch", "time")
    }


def test_tensorboard_reads_exactly_the_rows_of_both_attempts(kept):
    rows = read_metrics(kept / "runs/digits/metrics.jsonl")
    wanted = {
        key: [(step, float(np.float32(value))) for step, value in points]
        for key, points in series(rows).items()
    }
    found = read(READ_EVENTS, kept / "runs/digits/tensorboard")
    assert {key: [tuple(point) for point in points] for key, points in found.items()} == wanted


def test_trackio_holds_exactly_the_rows_of_both_attempts(kept):
    found = read(READ_TRACKIO, TRACKIO_DIR=str(kept / "trackio"))
    assert found["runs"] == [json.loads((kept / "runs/digits/run.json").read_text())["id"]]
    held = [{k: v for k, v in row.items() if k != "timestamp"} for row in found["rows"][0]]
    rows = read_metrics(kept / "runs/digits/metrics.jsonl")
    wanted = [{k: v for k, v in row.items() if k not in ("time", "epoch")} for row in rows]
    assert sorted(held, key=lambda row: row["step"]) == wanted
    assert found["config"]["optimizer"]["lr"] == 0.1
    assert found["config"]["spec_sha256"]


# What a run of this name and id would send, twice.
TWO_RUNS = """
import sys
from pathlib import Path
from service.observability.other_writers import second_writers
from service.runs.tracking import MetricsFile, Tracker
from service.spec.models import TrackingSpec
tracking = TrackingSpec.model_validate({"trackio": {"project": "tests"}})
for number in ("digits-1", "digits-2"):
    place = Path(sys.argv[1], number)
    place.mkdir()
    [writer] = second_writers(tracking, directory=place, name="digits", run_id=number, config={},
                              resume_step=None, say=print)
    tracker = Tracker([MetricsFile(place / "metrics.jsonl", resume_step=None), writer],
                      epoch_at=float, resume_step=None)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.close("done")
print("0")
"""


def test_a_fresh_run_of_the_same_name_is_another_run_in_trackio(tmp_path):
    environ = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    read(TWO_RUNS, tmp_path, **environ)
    found = read(READ_TRACKIO, **environ)
    assert sorted(found["runs"]) == ["digits-1", "digits-2"]
    assert [sorted(row["step"] for row in rows) for rows in found["rows"]] == [[1, 2, 3]] * 2


def test_what_is_not_installed_is_reported_before_anything_is_started(tmp_path):
    (tmp_path / "site").mkdir()
    hide = "import sys; sys.modules.update(tensorboard=None, trackio=None)"
    (tmp_path / "site/sitecustomize.py").write_text(hide)
    hidden = {"PYTHONPATH": str(tmp_path / "site")}
    for package, value in (("tensorboard", "true"), ("trackio", "{project: a}")):
        words = ("digits", f"tracking.{package}={value}")
        for command in ("run", "check"):
            told = evenstep(command, *words, cwd=tmp_path, **hidden)
            assert told.returncode == 64
            assert f"tracking.{package}: the package {package} is not installed" in told.stderr
            assert f"pip install 'evenstep[{package}]'" in told.stderr
        assert not (tmp_path / "runs").exists()


class Kept(TrackerBackend):
    """A place as somebody else would write one; it waits, or fails, as it is told."""

    def __init__(self, held_step=-1, opens=None, fails_at=None):
        if opens is not None:
            assert opens.wait(20)
        self.held_step, self.fails_at = held_step, fails_at
        self.steps = []

    def put(self, step, time, values, files):
        if step == self.fails_at:
            raise OSError("the place is gone")
        self.steps.append(step)

    def close(self, outcome):
        self.steps.append("closed")


def tracked(tmp_path, place, *, resume_step=None, close_seconds=20.0):
    said = []
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, resume_step=resume_step)
    beside = BackgroundWriter(
        "there",
        place,
        metrics=path,
        resume_step=resume_step,
        say=said.append,
        close_seconds=close_seconds,
    )
    return Tracker([metrics, beside], epoch_at=float, resume_step=resume_step), said


def test_a_resume_hands_over_what_is_lacking_and_repeats_nothing(tmp_path):
    tracker, _ = tracked(tmp_path, Kept)
    for step in range(1, 10):
        tracker.log(step, {"a": step})
    tracker.close("failed")
    behind, ahead = Kept(held_step=3), Kept(held_step=8)
    for place, steps in ((behind, [4, 5, 6, 7, 8, 9, 10]), (ahead, [9, 10])):
        tracker, said = tracked(tmp_path, lambda place=place: place, resume_step=6)
        for step in range(7, 11):
            tracker.log(step, {"a": step})
        tracker.close("done")
        assert place.steps == [*steps, "closed"]
        assert said == []


def test_a_place_that_breaks_is_reported_once_and_lacks_what_came_after(tmp_path):
    tracker, said = tracked(tmp_path, lambda: Kept(fails_at=3))
    for step in range(1, 6):
        tracker.log(step, {"a": step})
    tracker.close("done")
    assert said == [
        "there stopped: OSError: the place is gone. Training continues without it.",
        "there lacks 3 of this attempt's 5 rows: OSError: the place is gone. "
        f"{tmp_path}/metrics.jsonl has them all.",
    ]


def test_a_tracker_that_never_opens_blocks_nothing(tmp_path):
    never = threading.Event()
    tracker, said = tracked(tmp_path, lambda: Kept(opens=never), close_seconds=0.2)
    beside = tracker._writers[1]
    for step in range(LONGEST + 5):
        beside.write(Row(step, 0.0, 0.0, {}))
    assert len(beside._rows) == LONGEST
    tracker.close("done")
    never.set()
    assert said == [
        f"there lacks 10005 of this attempt's 10005 rows: it had not finished after 0.2 s. "
        f"{tmp_path}/metrics.jsonl has them all."
    ]
