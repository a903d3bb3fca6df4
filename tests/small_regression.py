"""A regression small enough to be computed again in NumPy: 61 rows, 23 to a step, float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from service.basics import randomness
from service.data.task import Task, supervised
from service.plan.samplers import rows_at

HERE = Path(__file__)
ROWS, SEED = 61, 7
Arrays = dict[str, NDArray[np.float64]]


def _rows() -> TensorDataset:
    draw = np.random.default_rng(3)
    x = draw.normal(size=(ROWS, 5))
    y = np.stack([np.sin(x).sum(1), (x[:, 0] * x[:, 1])], 1)
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))


def dense(bias: bool = True) -> Task:
    """Two linear layers with a tanh between them."""
    rows = _rows()
    return supervised(
        model=lambda: nn.Sequential(
            nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias)
        ).double(),
        train=rows,
        test=rows,
        loss="mean_squared",
        measures=("absolute_error",),
    )


class Words(nn.Module):
    """The mean of some words' vectors, and a linear layer where asked."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(11, 2, mode="mean", sparse=True)
        self.head: nn.Module = nn.Linear(2, 2) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.words(x))
        return out


def sparse(head: bool = False) -> Task:
    """Rows of three words out of eleven; their gradients are sparse."""
    words = torch.from_numpy(np.random.default_rng(5).integers(0, 11, size=(ROWS, 3)))
    rows = TensorDataset(words, _rows().tensors[1])
    return supervised(
        model=lambda: Words(head).double(), train=rows, test=rows, loss="mean_squared"
    )


def spec_for(optimizer: dict[str, Any], *, factory: str = "dense", **sections: Any) -> Any:
    """Ten steps of 23 rows in six micro-batches, the last of 3 rows."""
    values: dict[str, Any] = {
        "name": "job",
        "task": f"{HERE}:{factory}",
        "seed": SEED,
        "batch": {"global_batch": 23, "micro_batch": 4},
        "length": {"steps": 10},
        "optimizer": optimizer,
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "tracking": {"log_every_steps": 1},
    }
    return values | sections


def rows_of_step(step: int) -> NDArray[np.int64]:
    """The ids of the rows of a step, counted from 0."""
    return rows_at(np.arange(step * 23, (step + 1) * 23), rows=ROWS, seed=SEED)


def first_model(task: Task) -> nn.Module:
    """The model as a run begins with it."""
    torch.manual_seed(randomness.key(randomness.WEIGHTS, SEED))
    return task.model()


def first_weights(task: Task) -> Arrays:
    return {n: p.detach().numpy().copy() for n, p in first_model(task).named_parameters()}


def gradients(weights: Arrays, rows: NDArray[np.int64]) -> Arrays:
    """Of the mean squared error of `dense`, by hand."""
    x, y = (tensor.numpy()[rows] for tensor in _rows().tensors)
    hidden = np.tanh(x @ weights["0.weight"].T + weights["0.bias"])
    outputs = hidden @ weights["2.weight"].T + weights["2.bias"]
    of_outputs = 2 * (outputs - y) / y.size
    of_hidden = of_outputs @ weights["2.weight"] * (1 - hidden**2)
    return {
        "0.weight": of_hidden.T @ x,
        "0.bias": of_hidden.sum(0),
        "2.weight": of_outputs.T @ hidden,
        "2.bias": of_outputs.sum(0),
    }
