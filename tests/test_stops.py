"""A request to stop: heard in a test pass too, and within the time that there is."""

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos.campaign import differences
from commands import DEADLINE_SECONDS, command
from jobs import plain_rows, spec_of
from processes import ProcessesOf

from launch.commands.doctor import Asked, _stop
from launch.environment import torchrun_grace
from service.basics.errors import DataBroken, SpecError, Stopped
from service.distributed.world import World
from service.health.stop_budget import (
    GracePeriod,
    StopBudget,
    budget_seconds,
    estimated,
    grace_periods,
    longest_save,
    stop_in_words,
)
from service.health.stop_request import StopRequest
from service.plan.plan import make_plan
from service.runs.checkpoint_files import checkpoints_in
from service.runs.directory import RunDirectory, open_run
from service.runs.tracking import read_metrics
from service.spec.files import load_spec
from service.training.worker import run

# 517 rows in 17 micro-batches of 32 on three processes: six of them, six and five.
JOB = spec_of("plain_rows", faults={"stop_poll_steps": 1}) | {
    "early_stopping": {"measure": "test/loss", "mode": "min", "patience": 9},
}
NEVER = math.inf


class Asking:
    """Test rows; SIGTERM comes when the row is read the `nth` time."""

    def __init__(self, rows: Any, stop: StopRequest, *, row: int, nth: float) -> None:
        self._rows, self._stop, self._row, self._nth = rows, stop, row, nth

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        self._nth -= row == self._row
        if row == self._row and self._nth == 0:
            self._stop.hear(signal.SIGTERM)
        return self._rows[row]


class Lasting:
    """Training rows; so many of them can be read."""

    def __init__(self, rows: Any, readings: float) -> None:
        self._rows, self._left = rows, readings

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("the rows are gone")
        return self._rows[row]


def ending(
    world: World, name: str, runs: Path, row: int, nth: float = 1, readings: float = NEVER
) -> str:
    """How an attempt ends on every process, after what its data does to it."""
    spec, stop, task = load_spec(JOB | {"name": name}), StopRequest(), plain_rows()
    test = Asking(task.test_data(), stop, row=row, nth=nth)
    train = Lasting(task.train_data(), readings)
    task.test_data, task.train_data = lambda: test, lambda: train  # type: ignore[method-assign]
    plan = make_plan(spec, processes=world.processes, train_rows=103, test_rows=517)
    try:
        run(plan, task, world, runs=runs, stop=stop)
    except (Stopped, DataBroken) as told:
        return str(told)
    return "done"


def test_a_stop_does_not_wait_for_a_test_pass_which_is_repeated_later(
    processes: ProcessesOf, tmp_path: Path
) -> None:
    job, three = tmp_path / "job", processes(3)

    def ends(name: str, *how: float) -> str:
        told = three.run(ending, name, tmp_path, *how)
        what = {each.partition(" on row ")[0][:30] for each in told}  # each names a row of its own
        assert len(what) == 1, told
        return told[0]

    def rows() -> list[float]:
        return [row["step"] for row in read_metrics(job / "metrics.jsonl")]

    assert ends("whole", 0, NEVER) == "done"
    told = ends("job", 6 * 32 + 100)  # in the fourth micro-batch of rank 1, in the test of step 20
    assert "Stopped after step 20 of 40" in told
    assert told.endswith("to continue, in its test, which is then repeated.")
    assert rows() == [*range(1, 20)], "the row of a step is written once, and whole"
    assert [(c.step, c.untested) for c in checkpoints_in(job / "checkpoints")] == [(20, True)]

    # Where the next attempt ends before another checkpoint, the step gets its row again.
    assert "the rows are gone" in ends("job", 0, NEVER, 5)
    assert rows() == [*range(1, 21)]
    assert [(c.step, c.untested) for c in checkpoints_in(job / "checkpoints")] == [(20, True)]

    told = ends("job", 12 * 32, 2)  # in the first micro-batch of rank 2, in the test of step 40
    assert "Stopped after step 40 of 40" in told
    assert rows() == [*range(1, 40)]
    assert checkpoints_in(job / "checkpoints")[-1].untested

    assert ends("job", 0, NEVER) == "done"
    assert differences(job, tmp_path / "whole") == []
    assert {"train/loss", "test/accuracy"} <= read_metrics(job / "metrics.jsonl")[19].keys()
    assert not any(c.untested for c in checkpoints_in(job / "checkpoints") if c.step == 40)


POD = {"image": "registry/image:1", "storage_claim": "runs", "grace_seconds": 40}


def test_a_stop_is_given_what_its_saves_were_measured_to_take(tmp_path: Path) -> None:
    spec = load_spec(JOB)
    directory = RunDirectory(tmp_path / "job")
    assert budget_seconds(spec, directory) == 120, "before any save was measured"
    opened = open_run(tmp_path, spec, fresh=False)
    opened.start_attempt(processes=2, device="cpu", step=0)
    opened.end_attempt("stopped", step=4, longest_save_seconds=100.5)
    opened.start_attempt(processes=2, device="cpu", step=4)
    opened.end_attempt("stopped", step=9, longest_save_seconds=0.25)
    opened.close()
    facts = directory.facts.read_text()
    assert budget_seconds(spec, directory) == 2 * (2 * 100.5 + 10), "twice what it takes"
    directory.facts.write_text("{")
    assert budget_seconds(spec, directory) == 120, "what cannot be read ends no stop"
    directory.facts.write_text(facts)
    asked = spec_of("plain_rows", faults={"stop_budget_seconds": 7})
    assert budget_seconds(load_spec(asked), directory) == 7, "who says a number gets it"
    in_pod = load_spec(JOB | {"kubernetes": POD})
    told = stop_in_words(in_pod, longest_save(directory))
    assert "211 s (two saves of 1e+02 s, as measured in this run" in told
    assert "WARNING: kubernetes.grace_seconds allows only 40 s, raise it to 211" in told
    (finding,) = _stop(Asked(runs=tmp_path, spec=in_pod))
    assert (finding.state, finding.fix.partition(",")[0]) == (
        "warning",
        "Raise kubernetes.grace_seconds to 211",
    )


def test_before_that_it_is_estimated_or_said_to_be_unknown(tmp_path: Path) -> None:
    in_pod = load_spec(JOB | {"kubernetes": POD})
    assert stop_in_words(in_pod, None) == (
        "an unknown time, until a save of this run has been measured; "
        "kubernetes.grace_seconds allows 40 s"
    )
    large = estimated(1 << 50, tmp_path)
    assert large is not None
    assert large.save_seconds > 1000
    assert "estimated from 1.13e+09 MB at the" in large.words()
    assert estimated(None, tmp_path) is None
    assert os.listdir(tmp_path) == [], "the trial leaves nothing"
    said: list[str] = []
    stopping = StopBudget(
        grace_periods(in_pod, launcher=GracePeriod(30, "torchrun's own")), say=said.append
    )
    for seconds in (1.0, 12.0, 16.0, 99.0):
        stopping.learned(seconds, "as measured in this run")
    assert [line.partition(", but ")[2].partition(" allows")[0] for line in said] == [
        "torchrun's own",
        "kubernetes.grace_seconds",
    ], "each once, as soon as it is too little"


def test_a_foreign_torchrun_says_how_long_its_grace_period_is(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(
        "from launch.environment import torchrun_grace\nprint(torchrun_grace().seconds)"
    )
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, 'child.py'])"
    )
    said = {(): 30, ("--shutdown_timeout=7",): 7, ("--shutdown-timeout", "45"): 45}
    for words, seconds in said.items():
        started = ("env", sys.executable, "parent.py", *words)  # not forked: its title is read
        done = command(*started, cwd=tmp_path, timeout=DEADLINE_SECONDS)
        assert float(done.stdout) == seconds, done.stderr


def test_a_grace_period_that_is_no_number_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "abc")
    with pytest.raises(SpecError, match="SHUTDOWN_TIMEOUT must be a number of seconds, but is"):
        torchrun_grace()
