"""The real wandb client, well and ill: what it keeps, and how long it can hold us."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import CLEAN, ROOT, start
from wandb_log import read_segments
from wandb_server import WandBServer

from service.runs.tracking import read_metrics

# A job in a process of its own, so that its exit is a real one: rows first+1 .. last, a word with
# the test over stdin and stdout before the second half, then its own exit code.
HELD_SECONDS = 25.0
"""Who waits for a W&B that does not answer waits for minutes; who does not is away long before."""
JOB = """
import json, os, signal, sys, threading, time
from pathlib import Path
import psutil
from service.spec.models import WandBSpec
from service.runs.tracking import MetricsFile, Tracker
from service.observability.wandb_writer import WandB

job = json.loads(sys.argv[1])
directory, resume_step = Path(job["directory"]), job["first"] or None
said, started = [], threading.Event()

def say(text):
    said.append(text)
    if "upload the run" in text or "http" in text:
        started.set()

def cores():
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.name() == "wandb-core"]

def log(steps):
    slowest = 0.0
    for step in steps:
        values = {"train/loss": 1 / step, "test/accuracy": step / 8}
        begin = time.perf_counter()
        tracker.log(step, values)
        slowest = max(slowest, time.perf_counter() - begin)
    return slowest

if job["awaits_stop"]:
    import asyncio
    from wandb.sdk.lib import run_stopping
    run_stopping._SLEEP = lambda seconds: asyncio.sleep(0.05)  # it asks every 15 s

metrics = MetricsFile(directory / "metrics.jsonl", resume_step=resume_step)
begin = time.perf_counter()
wandb = WandB(
    WandBSpec(
        project="digits", tags=("a", "b"), mode=job["mode"], finish_seconds=job["close_seconds"]
    ),
    run_id="digits-07",
    name="digits",
    directory=directory,
    config={"seed": 0, "batch": {"global_batch": 517}, "dirty": True},
    say=say,
    resume_step=resume_step,
    init_seconds=job["init_seconds"],
).start()
tracker = Tracker([metrics, wandb], epoch_at=lambda step: step / 8, resume_step=resume_step)
build_seconds = time.perf_counter() - begin
half = (job["first"] + job["last"]) // 2
log(range(job["first"] + 1, half + 1))
pids = []
if job["waits"]:
    assert started.wait(30), said
    pids = [core.pid for core in cores()]
    print(json.dumps(said), flush=True)
    sys.stdin.readline()
if job["signal"]:
    os.kill(pids[0], job["signal"])
slowest_log = log(range(half + 1, job["last"] + 1))
if job["awaits_stop"]:
    deadline = time.monotonic() + 40
    while not tracker.stop_requested and time.monotonic() < deadline:
        threading.Event().wait(0.05)
begin = time.perf_counter()
tracker.close(job["outcome"])
print(json.dumps({
    "said": said,
    "pids": pids,
    "build_seconds": build_seconds,
    "slowest_log": slowest_log,
    "close_seconds": time.perf_counter() - begin,
    "stop_requested": tracker.stop_requested,
    "cores_left": len([core for core in cores() if core.status() != psutil.STATUS_ZOMBIE]),
    "imported": "wandb" in sys.modules,
    "closed_at": time.time(),
}), flush=True)
sys.exit(7)
"""


@dataclass
class Job:
    """A running job; `finish` gives what it found."""

    process: subprocess.Popen[str]

    def wait_for_start(self) -> list[str]:
        """What it has said by the time W&B has the run."""
        assert self.process.stdout
        return json.loads(self.process.stdout.readline() or "null")

    def finish(self) -> dict[str, Any]:
        out, err = self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 7, err
        found = json.loads(out.splitlines()[-1])
        # From the end of `close` to the end of the process: nothing of wandb's may hold the exit.
        found["exit_seconds"] = time.time() - found["closed_at"]
        found["stderr"] = err
        return found


class Jobs:
    def __init__(self, home: Path) -> None:
        self.directory = home / "run"
        self._home = home
        self._started: list[Job] = []
        self.directory.mkdir()

    def start(self, last: int, *, first: int = 0, outcome: str = "done", **options: Any) -> Job:
        environment = options.pop("environment", {})
        job = {
            "directory": str(self.directory),
            "first": first,
            "last": last,
            "outcome": outcome,
            "mode": "auto",
            "init_seconds": 120,
            "close_seconds": 120.0,
            "waits": False,
            "signal": 0,
            "awaits_stop": False,
        }
        assert not options.keys() - job.keys()
        process = start(
            [sys.executable, "-c", JOB, json.dumps(job | options)],
            cwd=ROOT,
            env=self._environment() | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(Job(process))
        return self._started[-1]

    def run(self, last: int, **options: Any) -> dict[str, Any]:
        return self.start(last, **options).finish()

    def end(self) -> None:
        """Leave nothing behind, whatever a failed test has left frozen."""
        for job in self._started:
            with suppress(psutil.NoSuchProcess):
                tree = psutil.Process(job.process.pid).children(recursive=True)
                for process in [*tree, job.process]:
                    process.kill()
            with job.process:
                pass

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in CLEAN.items() if key != "WANDB_MODE"}
        return kept | {
            "HOME": str(self._home),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "WANDB__STATS_COREWEAVE_METADATA_BASE_URL": "http://127.0.0.1:9",
        }


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path)
    yield jobs
    jobs.end()


@pytest.fixture
def server() -> Iterator[WandBServer]:
    with WandBServer() as server:
        yield server


def expected_rows(*steps: int) -> list[dict[str, float]]:
    return [
        {"step": step, "epoch": step / 8, "train/loss": 1 / step, "test/accuracy": step / 8}
        for step in steps
    ]


def steps_in_metrics_file(jobs: Jobs) -> list[int]:
    return [int(row["step"]) for row in read_metrics(jobs.directory / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("outcome", "exit_code", "preempting"),
    [("done", 0, False), ("stopped", 75, True), ("failed", 1, False)],
)
def test_an_offline_run_holds_exactly_what_was_logged(
    jobs: Jobs, outcome: str, exit_code: int, preempting: bool
) -> None:
    found = jobs.run(5, outcome=outcome)
    (log,) = read_segments(jobs.directory)
    assert log.run_id == "digits-07"
    assert log.rows == expected_rows(1, 2, 3, 4, 5)
    assert log.config == {"seed": 0, "batch": {"global_batch": 517}, "dirty": True}
    assert log.step_metrics == {"*": "step"}
    assert (log.exit_code, log.preempting) == (exit_code, preempting)
    assert log.summary["outcome"] == outcome
    assert found["said"][0] == "W&B has no API key here (WANDB_API_KEY, ~/.netrc)."
    assert found["said"][1].startswith("W&B is offline; upload the run with: wandb sync /")
    assert len(found["said"]) == 2
    assert found["cores_left"] == 0
    assert found["stderr"] == ""


def test_each_step_is_logged_once_over_the_attempts_of_an_offline_run(jobs: Jobs) -> None:
    jobs.run(9, outcome="failed")
    jobs.run(12, first=6)
    first, second = read_segments(jobs.directory)
    assert first.run_id == second.run_id == "digits-07"
    assert first.rows == expected_rows(*range(1, 10))
    assert second.rows == expected_rows(10, 11, 12)
    assert steps_in_metrics_file(jobs) == list(range(1, 13))


def test_after_a_kill_each_step_is_on_wandb_once(jobs: Jobs) -> None:
    job = jobs.start(18, waits=True)
    job.wait_for_start()  # nine rows are on their way to the disk, where a kill may overtake them
    job.process.kill()
    job.process.wait()
    jobs.run(12, first=6)
    first, second = read_segments(jobs.directory)
    assert first.exit_code is None
    assert first.steps + second.steps == list(range(1, 13))
    assert steps_in_metrics_file(jobs) == list(range(1, 13))


def test_a_resume_sends_what_wandb_lacks(jobs: Jobs) -> None:
    found = jobs.run(9, environment={"WANDB_MODE": "disabled"})
    assert not found["imported"]
    assert found["said"] == []
    jobs.run(12, first=9, mode="offline")
    (log,) = read_segments(jobs.directory)
    assert log.rows == expected_rows(*range(1, 13))


def test_a_sweep_names_the_run_and_a_variable_the_directory(jobs: Jobs, tmp_path: Path) -> None:
    sweep = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "from-sweep", "WANDB_DIR": str(tmp_path / "d")}
    jobs.run(3, environment=sweep)
    (log,) = read_segments(tmp_path / "d")
    assert log.run_id == "from-sweep"
    assert log.rows == expected_rows(1, 2, 3)


def test_an_online_run_continues_where_the_server_has_it(jobs: Jobs, server: WandBServer) -> None:
    first = jobs.run(9, outcome="stopped", environment=server.environment())
    run = server.runs["digits-07"]
    assert run.steps == list(range(1, 10))
    assert (run.exit_code, run.preempting) == (75, True)
    assert run.config["batch"]["value"] == {"global_batch": 517}
    assert first["said"] == [f"W&B: {server.url}/me/digits/runs/digits-07"]

    key_in_netrc = server.environment()
    login = f"machine {server.netloc} login user password {key_in_netrc.pop('WANDB_API_KEY')}\n"
    (jobs.directory.parent / ".netrc").write_text(login)
    jobs.run(12, first=6, environment=key_in_netrc)
    assert run.steps == list(range(1, 13))
    assert [row["train/loss"] for row in run.history] == [1 / step for step in range(1, 13)]
    assert run.offsets[-1] >= 9
    assert run.exit_code == 0


def test_rows_kept_offline_are_not_sent_online_as_well(jobs: Jobs, server: WandBServer) -> None:
    jobs.run(9, mode="offline", environment=server.environment())
    jobs.run(12, first=6, mode="online", environment=server.environment())
    assert server.runs["digits-07"].steps == [10, 11, 12]


def test_the_stop_button_asks_the_run_to_stop(jobs: Jobs, server: WandBServer) -> None:
    job = jobs.start(
        4, outcome="stopped", waits=True, awaits_stop=True, environment=server.environment()
    )
    job.wait_for_start()
    server.runs["digits-07"].stop_pressed = True
    found = job.finish()
    assert found["stop_requested"]
    run = server.runs["digits-07"]
    assert (run.exit_code, run.preempting) == (0, False)


def test_a_server_that_cannot_be_reached_leaves_the_run_offline(
    jobs: Jobs, server: WandBServer
) -> None:
    nobody = server.environment() | {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    found = jobs.run(5, init_seconds=1, environment=nobody)
    (log,) = [log for log in read_segments(jobs.directory) if log.rows]
    assert log.rows == expected_rows(1, 2, 3, 4, 5)
    assert log.run_id == "digits-07"
    assert found["said"][0].startswith("W&B did not start (")
    assert found["close_seconds"] < HELD_SECONDS
    assert found["exit_seconds"] < HELD_SECONDS
    assert found["build_seconds"] < 1, "it does not wait for init_seconds"


@pytest.mark.parametrize("mode", ["refusing key", "failing", "hanging"])
def test_a_server_that_refuses_leaves_the_run_offline(
    jobs: Jobs, server: WandBServer, mode: Any
) -> None:
    server.mode = mode
    found = jobs.run(5, init_seconds=1, environment=server.environment())
    (log,) = [log for log in read_segments(jobs.directory) if log.rows]
    assert log.rows == expected_rows(1, 2, 3, 4, 5)
    assert found["said"][0].startswith("W&B did not start (")
    assert found["close_seconds"] < HELD_SECONDS
    assert found["exit_seconds"] < HELD_SECONDS


@pytest.mark.parametrize("mode", ["failing", "hanging"])
def test_a_server_that_fails_later_does_not_hold_the_end(
    jobs: Jobs, server: WandBServer, mode: Any
) -> None:
    job = jobs.start(10, waits=True, close_seconds=1.0, environment=server.environment())
    job.wait_for_start()
    server.wait_until(lambda: len(server.runs["digits-07"].history) == 5)
    server.mode = mode
    found = job.finish()
    assert found["slowest_log"] < HELD_SECONDS
    assert found["close_seconds"] < HELD_SECONDS
    assert found["exit_seconds"] < HELD_SECONDS
    assert found["said"][-1].startswith("W&B did not finish: it had not finished after 1 s. Upload")
    assert steps_in_metrics_file(jobs) == list(range(1, 11))
    (log,) = read_segments(jobs.directory)
    assert log.rows == expected_rows(*range(1, 11))
    assert log.exit_code == 0


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_a_frozen_or_killed_wandb_core_costs_rows_on_wandb_alone(jobs: Jobs, name: str) -> None:
    job = jobs.start(3010, waits=True, close_seconds=1.0, signal=int(getattr(signal, name)))
    job.wait_for_start()
    found = job.finish()
    assert steps_in_metrics_file(jobs) == list(range(1, 3011))
    assert found["slowest_log"] < HELD_SECONDS
    assert found["close_seconds"] < HELD_SECONDS
    assert found["exit_seconds"] < HELD_SECONDS
    assert found["cores_left"] == 0
    assert found["said"][-1].startswith("W&B lacks ")
    assert found["said"][-1].endswith("metrics.jsonl has them all.")
    # A kill is told at once, unless the job ends before the thread comes to notice it.
    assert len(found["said"]) in {"SIGSTOP": (3,), "SIGKILL": (3, 4)}[name]
