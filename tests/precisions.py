"""Small tasks that go astray on purpose: rows that overflow, rows that are not numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jobs import train_in_process
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from service.basics.errors import EvenstepError
from service.data.task import Task, supervised
from service.distributed.world import World
from service.recipes import digits

HERE = Path(__file__)
ROWS = 103
BAD_ROW = 41


def images(
    *, bad: float | None = None, dropout: float = 0.0, double: bool = False, falling: bool = False
) -> Task:
    """The digits network on 103 rows, of which one holds the value `bad`.

    Args:
        double: in float64.
        falling: the measure raises an error.
    """
    kind = torch.float64 if double else torch.float32
    train, test = digits.split_by_class(*digits.load())
    pixels, labels = (tensor[:ROWS].clone() for tensor in train.tensors)
    if bad is not None:
        pixels[BAD_ROW, 0, 3, 3] = bad
    return supervised(
        model=lambda: digits.network(8, dropout).to(kind),
        train=TensorDataset(pixels.to(kind), labels),
        test=TensorDataset(test.tensors[0][:61].to(kind), test.tensors[1][:61]),
        measures={"broken": _broken} if falling else ("accuracy",),
    )


def _broken(outputs: Tensor, targets: Tensor) -> Tensor:
    raise ZeroDivisionError("in the test loop")


def nan_row() -> Task:
    """Row 41 is not a number."""
    return images(bad=float("nan"))


def weightless() -> Task:
    """Rows whose weights are all 0."""
    rows = TensorDataset(torch.ones(ROWS, 3), torch.zeros(ROWS, dtype=torch.long))
    return supervised(
        model=lambda: nn.Linear(3, 2), train=rows, weight=lambda targets: torch.zeros(len(targets))
    )


class Root(nn.Module):
    """The square root of a weighted sum: 0 for the row of zeros, with no gradient there."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.line.weight, 0.5)

    def forward(self, rows: Tensor) -> Tensor:
        return self.line(rows).squeeze(1).sqrt()


def root_of_zero() -> Task:
    """Every loss is finite; the gradient of row 41 is not."""
    rows = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    rows[BAD_ROW] = 0.0
    data = TensorDataset(rows, torch.ones(ROWS))
    return supervised(model=Root, train=data, test=data, loss="mean_squared")


def steep() -> Task:
    """A row 10,000 times longer than others: its gradient overflows fp16 at the first scale."""
    rows = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(1))
    rows[BAD_ROW] *= 1e4
    labels = (rows[:, 0] > rows[:, 1]).long()
    data = TensorDataset(rows, labels)
    return supervised(model=lambda: nn.Linear(3, 2), train=data, test=data, measures=("accuracy",))


def job(task: str, **sections: Any) -> dict[str, Any]:
    """A spec: 50 rows a step in micro-batches of 9, each epoch about two steps."""
    values: dict[str, Any] = {
        "name": "job",
        "task": f"{HERE}:{task}",
        "seed": 3,
        "batch": {"global_batch": 50, "micro_batch": 9},
        "length": {"steps": 8},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "tracking": {"log_every_steps": 1},
        "checkpoint": {"every_steps": 1, "keep": 100},
        "test": {"micro_batch": 32},
    }
    return values | sections


def ended(world: World, spec: dict[str, Any], runs: Path) -> tuple[int, str]:
    """How a run ended: its exit code, and what it said."""
    try:
        train_in_process(world, spec, runs)
    except EvenstepError as error:
        return error.exit_code, str(error)
    return 0, ""
