"""Hand-written loops for one job: the baseline of the other benchmarks.

The task is a network of three linear layers whose step takes half a millisecond, so that the
overhead per step is as visible as possible.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch._dynamo  # any program that creates an optimizer imports it; Evenstep does not have to
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from service.data.task import Task, supervised

ROWS, TEST_ROWS, FEATURES = 16_384, 10_007, 64


def task() -> Task:
    """Ten classes of 64 numbers."""
    return supervised(
        model=network,
        train=rows(ROWS, seed=1),
        test=rows(TEST_ROWS, seed=2),
        loss="cross_entropy",
        measures=("accuracy",),
    )


def network() -> nn.Module:
    """Three linear layers: [B, 64] to [B, 10]."""
    return nn.Sequential(
        nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def rows(count: int, *, seed: int) -> TensorDataset:
    """Numbers [count, 64] and the class each row of them belongs to [count]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(inputs, inputs[:, :10].argmax(1))


class Fetched(Dataset[tuple[Tensor, Tensor]]):
    """A data set with `__getitems__` (a list of indices): the fastest way to feed a DataLoader."""

    def __init__(self, data: TensorDataset) -> None:
        self._tensors = data.tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        index = torch.tensor(rows)
        return [tensor.index_select(0, index) for tensor in self._tensors]


def as_it_is(value: list[Tensor]) -> list[Tensor]:
    """A collate function for rows that are already a batch."""
    return value


class ByHand:
    """Minimal training and test loops of the task; the test is exact."""

    def __init__(self, *, batch: int, loader: bool) -> None:
        """`loader`: rows come from a DataLoader, as in most scripts; otherwise by index."""
        self.batch = batch
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.train, self.test = rows(ROWS, seed=1), rows(TEST_ROWS, seed=2)
        torch.manual_seed(0)
        self.model = network()
        self.called: nn.Module = self.model
        if self.processes > 1:
            self.called = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self._loader: DataLoader[list[Tensor]] | None = None
        if loader:
            data = Fetched(self.train)
            sampler: DistributedSampler[tuple[Tensor, Tensor]] | None = None
            if self.processes > 1:
                sampler = DistributedSampler(data)
            self._loader = DataLoader(
                data,  # type: ignore[arg-type]
                batch_size=batch,
                sampler=sampler,
                shuffle=sampler is None,
                collate_fn=as_it_is,
                drop_last=True,
            )

    def batches(self) -> Iterator[list[Tensor]]:
        """The micro-batches of one process, epoch after epoch."""
        while True:
            yield from self._loader if self._loader is not None else self._picked()

    def _picked(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(ROWS)[self.rank :: self.processes]
        for index in order.split(self.batch)[:-1]:
            yield [tensor.index_select(0, index) for tensor in self.train.tensors]

    def train_steps(self, batches: Iterator[list[Tensor]], steps: int) -> None:
        """Take `steps` optimizer steps; read the loss every 50 steps."""
        self.called.train()
        for step in range(steps):
            inputs, targets = next(batches)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.called(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            if step % 50 == 49:
                loss.item()

    @torch.no_grad()
    def tested(self, batch: int) -> tuple[float, float]:
        """(mean loss, accuracy) over the whole test set, each row once."""
        self.model.eval()
        inputs, targets = self.test.tensors
        sums = torch.zeros(3, dtype=torch.float64)
        for first in range(self.rank * batch, TEST_ROWS, batch * self.processes):
            x, y = inputs[first : first + batch], targets[first : first + batch]
            logits = self.model(x)
            sums[0] += F.cross_entropy(logits, y, reduction="sum").double()
            sums[1] += (logits.argmax(1) == y).sum()
            sums[2] += len(y)
        if self.processes > 1:
            dist.all_reduce(sums)
        self.model.train()
        return float(sums[0] / sums[2]), float(sums[1] / sums[2])
