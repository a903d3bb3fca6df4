"""What is trained: a model, its data, its loss.  How it is trained is in my_job.yaml."""

import math

import torch
from torch import nn
from torch.utils.data import Dataset

from service.task import Task, supervised


class Spirals(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Points on two spirals; the task is to predict the spiral of each point.

    Put your own data here: any object with a length and rows by number.  A row is
    (inputs, targets).  Read from disk in __getitem__, so that loader workers do it.
    """

    def __init__(self, rows: int, noise: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(rows) % 2
        angle = 3 * math.pi * torch.rand(rows, generator=generator) + 1
        turned = angle + math.pi * self.labels
        points = torch.stack([angle * turned.cos(), angle * turned.sin()], dim=1)
        self.points = points / 10 + noise * torch.randn(rows, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Random numbers drawn here (torch, numpy, random) depend only on the seed, the epoch and
        # the row: an augmentation is the same at every number of processes and workers.
        return self.points[row], self.labels[row]


def task(width: int = 64, noise: float = 0.02) -> Task:
    """Arguments come from `task_args` in the spec."""
    return supervised(
        # Called once in each process, after the seed of the spec is set.
        model=lambda: nn.Sequential(
            nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        ),
        train=Spirals(2000, noise, seed=0),
        test=Spirals(500, noise, seed=1),
        # A name, or a function of (outputs, targets) with one value per row: never a mean.
        loss="cross_entropy",
        measures=("accuracy",),
    )
