"""One small task for each thing that usually makes a run depend on the number of processes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, TensorDataset

from service.data.task import Task, supervised
from service.recipes import digits

ROWS, TEST_ROWS = 389, 131
PLAIN: dict[str, Any] = {"dropout": 0.0, "batchnorm": False}


def _digits(kind: torch.dtype) -> tuple[TensorDataset, TensorDataset]:
    train, test = digits.split_by_class(*digits.load())

    def first(data: TensorDataset, count: int) -> TensorDataset:
        images, labels = data.tensors
        return TensorDataset(images[:count].to(kind), labels[:count])

    return first(train, ROWS), first(test, TEST_ROWS)


class Augmented:
    """Rows shifted and made noisy by Python's, numpy's and torch's global generators."""

    def __init__(self, data: TensorDataset) -> None:
        self.images, self.labels = data.tensors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image = self.images[row].roll(random.choice((-1, 0, 1)), dims=-1)
        image = image * np.random.uniform(0.8, 1.2) + 0.05 * torch.randn(image.shape).to(image)
        return image, self.labels[row]


class Weighted(Augmented):
    """Rows that weigh 0.5, 1, 1.5 ... 3.5."""

    def __getitem__(self, row: int) -> tuple[Tensor, tuple[Tensor, float]]:
        return self.images[row], (self.labels[row], 0.5 * (1 + row % 7))


def network(
    double: bool = True, dropout: float = 0.25, augmented: bool = False, batchnorm: bool = True
) -> Task:
    """The digits network, with what the name of each argument says."""
    kind = torch.float64 if double else torch.float32
    train, test = _digits(kind)

    def model() -> nn.Module:
        layers = list(digits.network(8, dropout))
        kept = [m for m in layers if batchnorm or not isinstance(m, nn.BatchNorm2d)]
        return nn.Sequential(*kept).to(kind)

    return supervised(
        model=model,
        train=Augmented(train) if augmented else train,
        test=test,
        measures=("accuracy",),
    )


def biased_network(double: bool = True) -> Task:
    """The digits network with biases that BatchNorm takes away: their gradient is 0 in theory."""
    kind = torch.float64 if double else torch.float32
    train, test = _digits(kind)

    def model() -> nn.Module:
        layers = list(digits.network(8, 0.0))
        layers[0] = nn.Conv2d(1, 8, 3, padding=1)
        layers[4] = nn.Conv2d(8, 16, 3, padding=1)
        return nn.Sequential(*layers).to(kind)

    return supervised(model=model, train=train, test=test, measures=("accuracy",))


def weighted_rows(double: bool = True) -> Task:
    """Rows of different weight."""
    kind = torch.float64 if double else torch.float32
    train, test = _digits(kind)
    return supervised(
        model=lambda: digits.network(8, 0.25).to(kind),
        train=Weighted(train),
        test=Weighted(test),
        loss=lambda outputs, targets: F.cross_entropy(outputs, targets[0], reduction="none"),
        measures={"accuracy": lambda outputs, targets: outputs.argmax(1) == targets[0]},
        weight=lambda targets: targets[1],
    )


class Reader(nn.Module):
    """Guesses the next letter: [B, T] to [B, letters, T]."""

    def __init__(self, letters: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, letters)

    def forward(self, texts: Tensor) -> Tensor:
        states, _ = self.memory(self.embedding(texts))
        return self.head(self.dropout(states)).transpose(1, 2)


LONGEST = 40


def _sentences(first: int) -> TensorDataset:
    """Texts of 1 to 40 letters: letters [N, T] and the next letters, -100 past the end."""
    texts = torch.zeros(211, LONGEST, dtype=torch.long)
    following = torch.full((211, LONGEST), -100)
    for number in range(211):
        length = 2 + (first + 17 * number) % LONGEST
        codes = torch.tensor([97 + (at * (1 + (first + number) % 5)) % 26 for at in range(length)])
        texts[number, : length - 1] = codes[:-1]
        following[number, : length - 1] = codes[1:]
    return TensorDataset(texts, following)


def tokens(double: bool = True) -> Task:
    """A language model on texts of unequal length: each letter counts 1, padding nothing."""
    kind = torch.float64 if double else torch.float32
    return supervised(
        model=lambda: Reader(128, 16).to(kind),
        train=_sentences(0),
        test=_sentences(3),
        loss=lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"),
        measures={"accuracy": lambda outputs, targets: outputs.argmax(1) == targets},
        weight=lambda targets: targets.ne(-100).float(),
    )


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """The rows of a data set in an order that each pass shuffles anew, made noisy, with a state."""

    def __init__(self, data: TensorDataset) -> None:
        self.images, self.labels = data.tensors
        self.at, self.epoch = 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.at, self.epoch = 0, epoch

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.epoch = state["at"], state["epoch"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        while self.at < len(order):
            row = int(order[self.at])
            self.at += 1
            noise = 0.05 * torch.randn(self.images[row].shape)
            yield self.images[row] + noise.to(self.images), self.labels[row]


def streamed(double: bool = True) -> Task:
    """The digits as a stream that can only be iterated."""
    kind = torch.float64 if double else torch.float32
    train, test = _digits(kind)
    plain = network(double, **PLAIN)
    return supervised(model=plain.model, train=Endless(train), test=test, measures=("accuracy",))


ONE_EACH = "one each"


def at(job: dict[str, Any], processes: int) -> dict[str, Any]:
    """The job at so many processes; a micro-batch of `ONE_EACH` is a process's share."""
    batch = job["batch"]
    if batch["micro_batch"] != ONE_EACH:
        return job
    return job | {"batch": batch | {"micro_batch": math.ceil(batch["global_batch"] / processes)}}


def _job(task: str, arguments: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    batch = {"global_batch": 50, "micro_batch": 9}  # six micro-batches, the last of 5 rows
    return {
        "name": "job",
        "task": f"{Path(__file__)}:{task}",
        "task_args": arguments or {},
        "seed": 7,
        "batch": batch,
        "length": {"steps": 100},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "tracking": {"log_every_steps": 1},
        **sections,
    }


FEATURES: dict[str, dict[str, Any]] = {
    "nothing but rows": _job("network", PLAIN),
    "dropout": _job("network", {"batchnorm": False}),
    "BatchNorm, micro": _job("network", {"dropout": 0.0}),
    "BatchNorm, sync, one micro-batch a process": _job(
        "network",
        {"dropout": 0.0},
        batch={"global_batch": 50, "micro_batch": ONE_EACH},
        model={"batchnorm": "sync"},
    ),
    "augmentation": _job("network", PLAIN | {"augmented": True}),
    "augmentation in 2 loader workers": _job(
        "network", PLAIN | {"augmented": True}, loader={"workers": 2}
    ),
    "gradient clipping": _job(
        "network", PLAIN, max_grad_norm=0.5, optimizer={"name": "sgd", "lr": 0.02, "momentum": 0.9}
    ),
    "moving average of weights": _job("network", PLAIN, model={"moving_average": 0.95}),
    "weights of rows": _job("weighted_rows"),
    "weights of tokens": _job("tokens", optimizer={"name": "sgd", "lr": 0.5}),
    "a stream, read whole": _job("streamed"),
    "full batch (all rows a step)": _job(
        "network",
        {"batchnorm": False},
        batch={"global_batch": "all", "micro_batch": 60},
        optimizer={"name": "sgd", "lr": 0.01, "momentum": 0.9},
    ),
    "all of it, bitwise": _job("network", {"augmented": True}, exactness="bitwise"),
    "AdamW": _job("network", PLAIN, optimizer={"name": "adamw", "lr": 0.003}),
}
# Held to no bound: Adam divides a gradient by its own size, and that of a bias before BatchNorm is
# rounding noise around 0.  The noise becomes full steps, of weights that nothing depends on.
AMPLIFYING: dict[str, dict[str, Any]] = {
    "AdamW, biases before BatchNorm": _job(
        "biased_network", optimizer={"name": "adamw", "lr": 0.003}
    ),
}
