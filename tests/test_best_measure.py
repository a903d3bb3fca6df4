"""A measure that is not finite is never the best: in checkpoints, schedules, reports and lists."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from commands import evenstep
from jobs import spec_of, train_in_process
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from launch.commands.checkpoints import checkpoints
from service.data.task import supervised
from service.observability.report import page
from service.plan.early_stopping import EarlyStopping, is_better
from service.runs.checkpoint_files import best_of, checkpoints_in
from service.runs.history import read_history
from service.runs.tracking import read_metrics
from service.spec.models import EarlyStoppingSpec

NAN, INF = math.nan, math.inf
MEASURED = [0.0, NAN, NAN, INF, 0.3, 0.7, NAN, -INF, 0.5]
"""By step: the best of them is at step 5."""


class Falling(nn.Module):
    """Its only weight is minus the number of steps that were taken at a rate of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * 0 + self.weight


def falling() -> supervised:
    rows = TensorDataset(torch.ones(31), torch.ones(31))
    return supervised(
        model=Falling,
        train=rows,
        test=rows,
        loss=lambda outputs, targets: outputs,
        measures={
            "found": lambda outputs, _: torch.tensor(MEASURED)[(-outputs).round().long()],
            "lost": lambda outputs, _: -torch.tensor(MEASURED)[(-outputs).round().long()],
        },
    )


def job(measure: str, mode: str, **sections: Any) -> dict[str, Any]:
    return spec_of("") | {
        "task": f"{__file__}:falling",
        "batch": {"global_batch": 12, "micro_batch": 3},
        "length": {"steps": len(MEASURED) - 1},
        "optimizer": {"name": "sgd", "lr": 1.0},
        "schedule": {},
        "test": {"every_steps": 1, "micro_batch": 7},
        "checkpoint": {"keep": 1, "best": {"measure": measure, "mode": mode}},
        **sections,
    }


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("measure", "mode"), [("test/found", "max"), ("test/lost", "min")])
def test_the_best_checkpoint_is_that_of_the_best_number_and_is_kept(
    processes, tmp_path, count, measure, mode
):
    processes(count).run(train_in_process, job(measure, mode), tmp_path, 2)  # only NaN so far
    directory = tmp_path / "job/checkpoints"
    assert best_of(directory) is None
    processes(count).run(train_in_process, job(measure, mode), tmp_path, 6)
    assert best_of(directory) == 5
    processes(1).run(train_in_process, job(measure, mode), tmp_path)
    assert best_of(directory) == 5
    assert {checkpoint.step for checkpoint in checkpoints_in(directory)} == {5, 8}
    history = read_history(tmp_path / "job")
    assert history.best is not None
    assert (history.best.step, abs(history.best.value)) == (5, pytest.approx(0.7))
    assert f"best {measure}" in page([history], now=0.0)
    if count == 1:
        listed = evenstep("runs", tmp_path, cwd=tmp_path).stdout
        assert f"{measure} {history.best.value:.4g} at step 5" in listed


def test_several_of_the_best_are_kept_and_a_resumed_run_knows_them(processes, tmp_path):
    wanted = {"measure": "test/found", "mode": "max"}
    spec = job("", "", checkpoint={"keep": 1, "keep_best": 2, "best": wanted})
    directory = tmp_path / "job/checkpoints"
    # By step: 0.3 is the best at 4, 0.7 at 5; 0.5 at 8 then takes the place of 0.3.
    processes(2).run(train_in_process, spec, tmp_path, 6)
    assert {checkpoint.step for checkpoint in checkpoints_in(directory)} == {4, 5, 6}
    assert best_of(directory) == 5
    processes(1).run(train_in_process, spec, tmp_path, 7)
    assert {checkpoint.step for checkpoint in checkpoints_in(directory)} == {4, 5, 7}
    processes(1).run(train_in_process, spec, tmp_path)
    assert {checkpoint.step for checkpoint in checkpoints_in(directory)} == {5, 8}
    assert best_of(directory) == 5
    listed = CliRunner().invoke(checkpoints, [str(tmp_path / "job")])
    ranks = [re.search(r"step +(\d+) .*good(.*)", line) for line in listed.output.splitlines()]
    assert [found.groups() for found in ranks] == [("5", ", best"), ("8", ", 2nd best")]


@pytest.mark.parametrize("count", [1, 3])
def test_a_measure_that_is_no_number_is_no_improvement_for_who_waits_for_one(
    processes, tmp_path, count
):
    waiting = {"measure": "test/found", "mode": "max"}
    spec = job(
        "test/found",
        "max",
        early_stopping={**waiting, "patience": 4},
        schedule={"name": "plateau", **waiting, "patience": 3, "gamma": 0.25},
    )
    # The rate falls after the third test, and so the weight does not reach the next number.
    processes(count).run(train_in_process, spec, tmp_path)
    rows = read_metrics(tmp_path / "job/metrics.jsonl")
    assert [row["train/lr"] for row in rows] == [1.0, 1.0, 1.0, 0.25]
    assert best_of(tmp_path / "job/checkpoints") is None


def test_a_run_that_never_measured_a_number_has_no_best(processes, tmp_path):
    spec = job("test/found", "max", length={"steps": 3})
    processes(1).run(train_in_process, spec, tmp_path)
    assert read_history(tmp_path / "job").best is None
    assert evenstep("runs", tmp_path, cwd=tmp_path).stdout.splitlines()[1].split()[3] == "-"


@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_is_not_finite_is_never_better_and_never_stays(mode):
    for endless in (NAN, INF, -INF):
        for best in (None, 0.5, NAN, INF, -INF):
            assert not is_better(endless, best, mode=mode)
        assert is_better(0.5, endless, mode=mode)
    assert is_better(0.5, None, mode=mode)
    assert not is_better(0.5, 0.5, mode=mode)


def test_early_stopping_continues_from_an_infinity_that_an_older_version_took_for_the_best():
    patience = EarlyStopping(EarlyStoppingSpec(measure="test/a", mode="max", patience=2))
    patience.remember({"best": INF, "waited": 1})
    assert patience.tested({"test/a": 0.1})
    assert (patience.best, patience.waited) == (0.1, 0)
