"""Tasks whose models, steps and streams do something that the dry run does not see, or rarely."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from own_steps import classified, hard_step, points
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, TensorDataset

from service.data.batches import Batch
from service.data.losses import Loss, StepContext
from service.data.task import Task, custom, supervised


def network() -> nn.Module:
    layers = nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


# ---- random numbers


class Fourier(nn.Module):
    """Random features, which are no part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("waves", torch.randn(6, 16).double(), persistent=False)
        self.head = nn.Linear(16, 3).double()

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(torch.sin(rows @ self.waves))


def fourier() -> Task:
    train, test = classified()
    return supervised(model=Fourier, train=train, test=test, measures=("accuracy",))


class NoisyInNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3).double()

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(rows + torch.from_numpy(np.random.randn(*rows.shape)))


def noisy_in_numpy() -> Task:
    train, test = classified()
    return supervised(model=NoisyInNumpy, train=train, test=test, measures=("accuracy",))


def late_step(model: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
    rows: Any = batch.inputs
    if context.step >= 4:
        rows = rows + 0.3 * torch.from_numpy(np.random.randn(*rows.shape)) + random.random()
    return {"ce": cross_entropy(model(rows), batch.targets)}


def late_draws() -> Task:
    """Draws from numpy and Python long after the dry run."""
    train, test = classified()
    return custom(step=late_step, model=network, train=train, test=test)


def shrink_at_random(model: nn.Module, context: StepContext) -> None:
    if random.random() < 0.5:
        for parameter in model.parameters():
            parameter.mul_(0.9)


def plain_step(model: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
    return {"ce": cross_entropy(model(batch.inputs), batch.targets)}


def random_update() -> Task:
    train, test = classified()
    return custom(
        step=plain_step, model=network, train=train, test=test, after_update=shrink_at_random
    )


# ---- streams


class Rows(IterableDataset):
    def __init__(self) -> None:
        self.rows = points()[:71].double()

    def row(self, number: int) -> tuple[Tensor, int]:
        values = self.rows[number]
        return values, int(values[0] > 0) + int(values[1] > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return map(self.row, range(71))


class Shuffled(Rows):
    """Draws the order of an epoch when it begins, and not when the first row is read."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        order = list(range(71))
        random.shuffle(order)
        return map(self.row, order)


class ShuffledByEpoch(Shuffled):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class ShuffledBySetEpoch(Rows):
    """Draws the order when it is told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.order = list(range(71))
        random.shuffle(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return map(self.row, self.order)


class ShuffledWithState(Shuffled):
    """Goes on in the middle of the order that it draws when it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0

    def set_epoch(self, epoch: int) -> None:
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return map(self.counted, list(super().__iter__())[self.at :])

    def counted(self, row: tuple[Tensor, int]) -> tuple[Tensor, int]:
        self.at += 1
        return row


class Skipping:
    def __init__(self, rows: list[tuple[Tensor, int]]) -> None:
        self.rows = rows

    def __iter__(self) -> Skipping:
        return self

    def __next__(self) -> tuple[Tensor, int]:
        if not self.rows:
            raise StopIteration
        return self.rows.pop(0)

    def skip(self, count: int) -> int:
        passed = min(count, len(self.rows))
        del self.rows[:passed]
        return passed


class ShuffledWithSkip(Shuffled):
    def __iter__(self) -> Skipping:
        return Skipping(list(super().__iter__()))


def noisy(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    inputs = torch.stack([values for values, _ in rows])
    return inputs + 0.5 * torch.randn_like(inputs), torch.tensor([label for _, label in rows])


def stream(kind: str) -> Task:
    kinds = {"shuffled": Shuffled, "by_epoch": ShuffledByEpoch, "skipping": ShuffledWithSkip}
    kinds |= {"in_set_epoch": ShuffledBySetEpoch, "with_state": ShuffledWithState}
    _, test = classified()
    if kind == "noisy":
        return supervised(model=network, train=Rows(), test=test, collate=noisy)
    return supervised(model=network, train=kinds[kind](), test=test)


# ---- losses of all rows


class Contrast(nn.Module):
    """Two towers, with a learned temperature that only the loss uses."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 4), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.one(rows)), F.normalize(self.other(rows))


def learned_temperature(shape: tuple[int, ...] = ()) -> Task:
    def step(model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        def contrast(one: Tensor, other: Tensor) -> Tensor:
            logits = one @ other.T * model.scale.exp()
            return cross_entropy(logits, torch.arange(len(one)))

        [rows] = batch.inputs
        return {"contrast": Loss.of_all_rows(contrast, *model(rows))}

    rows = points().double()
    train, test = TensorDataset(rows[:71]), TensorDataset(rows[71:])
    return custom(step=step, model=lambda: Contrast(tuple(shape)).double(), train=train, test=test)


def by_label(features: Tensor, labels: Tensor) -> Tensor:
    features = F.normalize(features)
    same = (labels[:, None] == labels).double()
    return -((features @ features.T / 0.5).log_softmax(1) * same).sum(1) / same.sum(1)


def by_label_step(model: nn.Module, batch: Batch, context: StepContext) -> dict[str, Loss]:
    return {"contrast": Loss.of_all_rows(by_label, model(batch.inputs), batch.targets)}


def supervised_contrast() -> Task:
    train, test = classified()
    return custom(step=by_label_step, model=network, train=train, test=test)


# ---- buffers and parameters that the forward pass changes


class Centred(nn.Module):
    """Keeps a mean of the rows, which moves only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3).double()
        self.register_buffer("mean", torch.zeros(6).double())

    def forward(self, rows: Tensor, moves: bool = False) -> Tensor:
        if moves:
            with torch.no_grad():
                self.mean.lerp_(rows.mean(0), 0.3)
        return self.head(rows - self.mean)


def centre_step(model: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
    moves = context.training and context.step >= 3
    return {"ce": cross_entropy(model(batch.inputs, moves), batch.targets)}


def late_buffer() -> Task:
    train, test = classified()
    return custom(step=centre_step, model=Centred, train=train, test=test)


def move_mean(model: Any, context: StepContext) -> None:
    model.mean += 0.01 * context.step


def buffer_of_update() -> Task:
    """The same buffer, changed where every process does the same."""
    train, test = classified()
    return custom(step=plain_step, model=Centred, train=train, test=test, after_update=move_mean)


class Rewriting(nn.Module):
    """Writes to saved buffers, and to a parameter, what every process writes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3).double())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it is the old one
            self.old_norm = nn.utils.weight_norm(nn.Linear(6, 3).double())
        self.scale = nn.Parameter(torch.ones(()).double())
        for name in ("scratch", "table", "tests"):
            self.register_buffer(name, torch.zeros(6).double())
        self.register_buffer("rate", torch.zeros(()).double())

    def forward(self, rows: Tensor) -> Tensor:
        self.scratch.zero_()
        self.table = torch.zeros(6).double()
        with torch.no_grad():
            self.scale.clamp_(0, 4)
        if not self.training:
            self.tests += 1
        return (self.head(rows) + self.old_norm(rows)) * self.scale * (1 + self.rate)


def rate_step(model: Any, batch: Batch, context: StepContext) -> dict[str, Tensor]:
    if context.training:
        model.rate.fill_(min(1.0, context.step / 10))
    return {"ce": cross_entropy(model(batch.inputs), batch.targets)}


def rewriting() -> Task:
    train, test = classified()
    return custom(step=rate_step, model=Rewriting, train=train, test=test)


def limited_embedding() -> Task:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(11, (103,), generator=generator)

    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(11, 6, max_norm=100.0), nn.Linear(6, 3)).double()

    train, test = (TensorDataset(rows[at], rows[at] % 3) for at in (slice(71), slice(71, None)))
    return supervised(model=model, train=train, test=test)


class Drifting(nn.Module):
    """Adds to a parameter that is trained, where torch does not count it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3).double()

    def forward(self, rows: Tensor) -> Tensor:
        self.head.bias.data.add_(rows.mean())
        return self.head(rows)


def drifting() -> Task:
    train, test = classified()
    return supervised(model=Drifting, train=train, test=test)


class Taught(nn.Module):
    """Lets a teacher follow its student in the forward pass."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.student, self.teacher = network(), network().requires_grad_(False)
        self.hidden = hidden  # starts as a copy, and is written to where torch does not count
        if hidden:
            self.teacher.load_state_dict(self.student.state_dict())

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
                for old, new in pairs:
                    (old.data if self.hidden else old).lerp_(new, 0.1)
        return self.student(rows) + self.teacher(rows)


def taught(hidden: bool = False) -> Task:
    train, test = classified()
    return supervised(model=lambda: Taught(hidden), train=train, test=test)


class Counting(nn.Module):
    """Counts its passes, and keeps a mean of the rows, in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3).double()
        self.calls, self.mean, self.width = 0, torch.zeros(6).double(), 6
        self.latest: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        self.calls, self.latest = self.calls + 1, rows
        self.mean = self.mean * 0.9 + 0.1 * rows.detach().mean(0)
        return self.head(rows - self.mean)


def counting() -> Task:
    train, test = classified()
    return supervised(model=Counting, train=train, test=test)


# ---- losses whose weight only the forward pass shows, with BatchNorm


def normalized() -> nn.Module:
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def normalized_hard() -> Task:
    train, test = classified()
    return custom(step=hard_step, model=normalized, train=train, test=test)


# ---- steps of which no row counts, and rows of other forms


def mean_of_some(model: nn.Module, batch: Batch, context: StepContext) -> dict[str, Loss]:
    counts = (batch.inputs[:, 0] > 1.0).double()
    losses = cross_entropy(model(batch.inputs), batch.targets)
    return {"some": Loss.mean((losses * counts).sum() / counts.sum(), weight=counts.sum())}


def mean_over_nothing() -> Task:
    train, test = classified()
    return custom(step=mean_of_some, model=network, train=train, test=test)


def few_that_count() -> Task:
    """Rows of weight 0, except for a few: some steps have none at all."""
    train, test = classified()
    return supervised(
        model=network, train=train, test=test, weight=lambda targets: targets.eq(2).double()
    )


def whole_rows() -> Task:
    """Rows of one tensor, which the task's own step takes as they are."""
    rows = points().double()

    def step(model: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        [inputs] = batch.inputs
        return {"size": model(inputs).square().mean(1)}

    train, test = TensorDataset(rows[:71]), TensorDataset(rows[71:])
    return custom(step=step, model=network, train=train, test=test)


def by_name(rows: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    inputs, labels = zip(*rows, strict=True)
    return {"input": torch.stack(inputs)}, torch.stack(labels)


def collated_by_name() -> Task:
    train, test = classified()
    return supervised(model=network, train=train, test=test, collate=by_name)


# ---- sparse gradients


def bags() -> Task:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(11, (103, 4), generator=generator)
    labels = rows[:, 0] % 3

    def model() -> nn.Module:
        embedding = nn.EmbeddingBag(11, 6, sparse=True, mode="sum")
        return nn.Sequential(embedding, nn.Linear(6, 3)).double()

    train, test = (TensorDataset(rows[at], labels[at]) for at in (slice(71), slice(71, None)))
    return supervised(model=model, train=train, test=test)
