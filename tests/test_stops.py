"""A request to stop: heard in a test pass too, and within the time that there is."""

import math
import signal
from pathlib import Path
from typing import Any

import torch
from chaos.campaign import differences
from jobs import plain_rows, spec_of
from processes import ProcessesOf

from service.checkpoint_files import checkpoints_in
from service.errors import DataBroken, Stopped
from service.faults import StopRequest
from service.plan import make_plan
from service.spec_file import load_spec
from service.tracking import read_metrics
from service.worker import run
from service.world import World

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


def test_a_stop_does_not_wait_for_a_test_pass_which_is_done_anew_later(
    processes: ProcessesOf, tmp_path: Path
) -> None:
    job, three = tmp_path / "job", processes(3)

    def ends(name: str, *how: float) -> str:
        told = three.run(ending, name, tmp_path, *how)
        assert all(other[:30] == told[0][:30] for other in told)  # each names a row of its own
        return told[0]

    def rows() -> list[float]:
        return [row["step"] for row in read_metrics(job / "metrics.jsonl")]

    assert ends("whole", 0, NEVER) == "done"
    told = ends("job", 6 * 32 + 100)  # in the fourth micro-batch of rank 1, in the test of step 20
    assert "Stopped after step 20 of 40" in told
    assert told.endswith("to continue, in its test, which is then done anew.")
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
