"""Regression on a table: the weight of a penguin from its bill, flipper, sex and species.

A base computes features of a row, with a regression head on top of it: the spec trains each part
with its own rate.  Copy this file and regression.yaml to start a job with your own table.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from service.task import Task, supervised

NUMBERS = ("bill_length_mm", "bill_depth_mm", "flipper_length_mm")
KINDS = {"species": ("Adelie", "Chinstrap", "Gentoo"), "sex": ("female", "male")}


class Regressor(nn.Module):
    """[B, columns] to [B]; its two parts have the names in the patterns of the spec."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.base = nn.Sequential(
            nn.Linear(columns, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.regression = nn.Linear(width, 1)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.regression(self.base(rows))  # [B, 1]
        return out.squeeze(1)


def task(width: int = 16) -> Task:
    """Kilograms from eight columns; 266 penguins to train on and 67 to test on."""
    columns, kilograms = load()
    held_out = torch.arange(len(kilograms)) % 5 == 0
    # The scale of a column comes from the training rows only.
    center, spread = columns[~held_out].mean(0), columns[~held_out].std(0)
    columns = (columns - center) / spread
    return supervised(
        model=lambda: Regressor(columns.shape[1], width),
        train=TensorDataset(columns[~held_out], kilograms[~held_out]),
        test=TensorDataset(columns[held_out], kilograms[held_out]),
        loss="mean_squared",
        measures=("absolute_error",),
    )


def load() -> tuple[Tensor, Tensor]:
    """Columns float32 [333, 8] and kilograms float32 [333], of penguins without missing values."""
    path = Path(__file__).with_name("regression.csv")
    with path.open(encoding="utf-8", newline="") as file:
        penguins = [row for row in csv.DictReader(file) if "NA" not in row.values()]
    columns = [
        [float(row[name]) for name in NUMBERS]
        + [float(row[name] == kind) for name, kinds in KINDS.items() for kind in kinds]
        for row in penguins
    ]
    return torch.tensor(columns), torch.tensor([float(r["body_mass_g"]) / 1000 for r in penguins])
