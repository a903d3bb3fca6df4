"""Tasks whose rows do not come once an epoch each."""

from __future__ import annotations

import os

import own_steps
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from service.data.task import Task, supervised
from service.plan.sampling import (
    Sampling,
    balanced,
    proportions,
    shuffled,
    stages,
    weighted,
)


class Noisy:
    """Rows that come one by one, each with noise of its own."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.data[row]
        return inputs + 0.1 * torch.randn(6).double(), target


def chosen(kind: str, labels: Tensor) -> Sampling:
    by_row = torch.arange(71) % 5
    kinds = {
        "weighted": lambda: weighted(by_row),
        "lighter": lambda: weighted(by_row + 1),
        "balanced": lambda: balanced(labels),
        "curriculum": lambda: stages({0: weighted(by_row == 0), 5: balanced(labels)}),
    }
    return kinds[kind]()


def task(kind: str, noisy: bool = False) -> Task:
    train, test = own_steps.classified()
    rows = Noisy(train) if noisy else train
    return supervised(
        model=own_steps.classifier,
        train=rows,
        test=test,
        measures=("accuracy",),
        sampling=chosen(os.environ.get("SAMPLED", kind), train.tensors[1]),
    )


def mixture() -> Task:
    train, test = own_steps.classified()
    inputs, labels = train.tensors
    return supervised(
        model=own_steps.classifier,
        train={
            "few": TensorDataset(inputs[:13], labels[:13]),
            "many": lambda: TensorDataset(inputs[13:], labels[13:]),
        },
        test=test,
        sampling=stages({0: proportions({"few": 0.25, "many": 0.75}), 6: shuffled()}),
    )
