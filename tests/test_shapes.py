"""What a task gives has the shape it promises; torch makes [B, B] of [B, 1] and [B], unasked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import spec_of, train_in_process
from processes import ProcessesFailed
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from service.basics.errors import DataBroken, SpecError
from service.data.task import LOSSES, MEASURES, supervised
from service.runs.tracking import read_metrics

ROWS = 61


class Line(nn.Linear):
    """A linear layer with one output a row: [B, 1], or [B] where it is flat."""

    def __init__(self, flat: bool) -> None:
        super().__init__(4, 1)
        self.flat = flat

    def forward(self, rows: Tensor) -> Tensor:
        outputs = super().forward(rows)
        return outputs.flatten() if self.flat else outputs


def columns(flat_outputs: bool, flat_targets: bool, loss: str = "mean_squared") -> supervised:
    points = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    aims = points @ torch.tensor([1.0, -2.0, 3.0, 0.5])
    aims = (aims > 0).float() if loss == "binary_cross_entropy" else aims
    rows = TensorDataset(points, aims if flat_targets else aims[:, None])
    measures = ("absolute_error", "squared_error")
    return supervised(
        model=lambda: Line(flat_outputs), train=rows, test=rows, loss=loss, measures=measures
    )


def job(factory: str, **sections: Any) -> dict[str, Any]:
    return spec_of("") | {
        "task": f"{__file__}:{factory}",
        "batch": {"global_batch": 25, "micro_batch": 6},  # the last micro-batch has one row
        "length": {"steps": 4},
        "test": {"every_steps": 2, "micro_batch": 15},  # and so has this one's
        **sections,
    }


def measured(runs: Path) -> list[dict[str, float]]:
    found = read_metrics(runs / "job/metrics.jsonl")
    names = ("train/loss", "test/loss", "test/absolute_error", "test/squared_error")
    return [{name: row[name] for name in names if name in row} for row in found]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("loss", ["mean_squared", "binary_cross_entropy"])
def test_columns_and_flat_values_are_compared_one_by_one(processes, tmp_path, loss, count):
    found = {}
    for flat in [(False, False), (True, False), (False, True), (True, True)]:
        place = tmp_path / str(flat)
        sides = {"flat_outputs": flat[0], "flat_targets": flat[1], "loss": loss}
        processes(count).run(train_in_process, job("columns", task_args=sides), place)
        found[flat] = measured(place)
    assert len(found[True, True]) == 4
    for values, same in zip(found[True, True], found[False, False], strict=True):
        assert values == pytest.approx(same, rel=1e-6)
    assert found[True, False] == found[True, True]
    assert found[False, True] == found[False, False]


@pytest.mark.parametrize("name", ["mean_squared", "binary_cross_entropy"])
@pytest.mark.parametrize(
    ("given", "targets"),
    [([6], [6, 1]), ([6, 1], [6]), ([6, 1, 2, 3], [6, 2, 3]), ([6, 6], [6, 2, 3]), ([], [1])],
)
def test_equal_numbers_of_values_in_one_order_are_the_same_values(name, given, targets):
    outputs, aims = torch.randn(given), torch.rand(targets)
    rows = len(aims)
    same = LOSSES[name](outputs.reshape(rows, -1), aims.reshape(rows, -1))
    assert torch.equal(LOSSES[name](outputs, aims), same)
    assert same.shape == (rows,)


@pytest.mark.parametrize("name", ["mean_squared", "binary_cross_entropy", *MEASURES])
@pytest.mark.parametrize(
    ("given", "targets"),
    [([6, 2], [6]), ([6, 2], [1, 2]), ([6, 2], [2, 6]), ([6, 3, 2], [6, 2, 3]), ([6, 3], [3])],
)
def test_values_that_cannot_be_the_same_ones_are_refused_with_both_shapes(name, given, targets):
    shape = given
    if name in ("accuracy", "error"):  # which compare what is the largest along a dimension
        given = [given[0], 5, *given[1:]]
    told = f"have the shape {shape}, and the targets {targets}"
    with pytest.raises(SpecError, match=re.escape(told)):
        (LOSSES | MEASURES)[name](torch.zeros(given), torch.zeros(targets))


def test_accuracy_takes_a_column_of_labels_and_no_column_of_outputs():
    outputs, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    flat = MEASURES["accuracy"](outputs, labels)
    assert torch.equal(MEASURES["accuracy"](outputs, labels[:, None]).flatten(), flat)
    for alone in ([6, 1], [6]):
        with pytest.raises(SpecError, match=re.escape(f"the outputs are {alone}. With one output")):
            MEASURES["accuracy"](torch.randn(alone), labels)


# ---- of one's own


def own(kind: str) -> supervised:
    points = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    rows = TensorDataset(points, points.sum(1))

    class InTest(Line):
        def forward(self, rows: Tensor) -> Tensor:
            self.flat = self.training
            return super().forward(rows)

    def apart(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square()

    def at_times(outputs: Tensor, targets: Tensor) -> Tensor:
        errors = apart(outputs, targets)
        return errors.mean() if targets.max() > points.sum(1)[:6].max() else errors

    sizes = {"size": lambda outputs, targets: outputs.abs()}
    two = {**sizes, "mean": lambda outputs, targets: outputs.mean()}
    losses = {"broadcast": apart, "in test": apart, "at times": at_times, "measure": "mean_squared"}
    return supervised(
        model=lambda: InTest(True) if kind in ("in test", "measure") else Line(kind != "broadcast"),
        train=rows,
        test=rows,
        loss=losses.get(kind, apart),
        measures=two if kind == "two" else sizes if kind == "measure" else {},
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_loss_that_compares_each_row_with_every_other_is_refused_before_anything_is_written(
    processes, tmp_path, count
):
    told = (
        r"task.loss: must give one value for each row, so the shape \[2\], but gave \[2, 2\]: each"
    )
    with pytest.raises(ProcessesFailed, match=told):
        processes(count).run(
            train_in_process, job("own", task_args={"kind": "broadcast"}), tmp_path
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("in test", r"task.loss: must give .* \[15\], but gave \[15, 15\]"),
        ("measure", r"task.measure: must have the shape \[15, 1\], .* has \[15, 1, 1\]"),
        ("at times", r"task.loss: must give one value for each row, .* but gave \[\]"),
        ("two", r"must have the same shape, but they return size \[1\], mean \[\]"),
    ],
)
def test_a_shape_that_only_some_micro_batches_have_is_reported_when_one_has_it(
    alone, tmp_path, kind, told
):
    with pytest.raises(SpecError, match=told):
        train_in_process(alone, job("own", task_args={"kind": kind}), tmp_path)
    rows = tmp_path / "job/metrics.jsonl"
    assert not rows.exists() or not any("test/loss" in row for row in read_metrics(rows))


def dropping() -> supervised:
    def keep(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        kept = [row for row in rows if row[0][0] < 20]  # of 61 rows, numbered in their inputs
        return torch.stack([row[0] for row in kept]), torch.tensor([row[1] for row in kept])

    rows = [(torch.full((4,), float(row)), row % 3) for row in range(ROWS)]
    return supervised(model=lambda: nn.Linear(4, 3), train=rows, test=rows[:9], collate=keep)


def test_a_collate_that_drops_rows_is_refused(alone, tmp_path):
    with pytest.raises(DataBroken, match=r"Of \d requested rows, \d were returned \(step 0"):
        train_in_process(alone, job("dropping"), tmp_path)
