"""Handwritten digits: a small convolutional network on the 1,797 images in this package.

Copy this file and digits.yaml to start your own job.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from service.task import Task, supervised


def task(width: int = 32, dropout: float = 0.25) -> Task:
    """Ten classes of 8x8 images; 1,433 to train on and 364 to test on."""
    train, test = split_by_class(*load())
    return supervised(
        model=lambda: network(width, dropout),
        train=train,
        test=test,
        loss="cross_entropy",
        measures=("accuracy",),
    )


def network(width: int, dropout: float) -> nn.Module:
    """Two convolutions with BatchNorm, and a head with Dropout: [B, 1, 8, 8] to [B, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),  # [B, width, 4, 4]
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),  # [B, 2 width, 2, 2]
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8 * width, 10),
    )


def load() -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 [1797, 1, 8, 8] in [0, 1] and labels int64 [1797]."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        images = torch.from_numpy(stored["images"]).float().unsqueeze(1) / 16
        labels = torch.from_numpy(stored["labels"]).long()
    return images, labels


def split_by_class(
    images: torch.Tensor, labels: torch.Tensor
) -> tuple[TensorDataset, TensorDataset]:
    """Every fifth image of each class, from its first on, is for testing; the rest for training."""
    order_in_class = torch.zeros_like(labels)
    for digit in range(10):
        of_digit = labels == digit
        order_in_class[of_digit] = torch.arange(int(of_digit.sum()))
    held_out = order_in_class % 5 == 0
    return (
        TensorDataset(images[~held_out], labels[~held_out]),
        TensorDataset(images[held_out], labels[held_out]),
    )
