"""Rows that are tensors in memory: they are picked by index, a micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from service.batches import each_tensor, tensors_of


@dataclass(frozen=True)
class InMemory:
    """All rows of a data set as tensors, or nests of them, whose first dimension is the row."""

    inputs: Any
    """What the model takes: [N, ...]."""
    targets: Any
    """What the loss compares with: [N, ...]."""

    def __len__(self) -> int:
        return len(tensors_of(self.targets)[0])

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        inputs, targets = (each_tensor(v, lambda t: t[row]) for v in (self.inputs, self.targets))
        return inputs, targets

    def on(self, device: torch.device) -> InMemory:
        """The same on the device."""
        moved = [each_tensor(v, lambda t: t.to(device)) for v in (self.inputs, self.targets)]
        return InMemory(*moved)


def in_memory(data: Any) -> InMemory | None:
    """The data set as tensors, where it is two of them already, or a part of such a one."""
    if isinstance(data, InMemory):
        return data
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        return InMemory(*data.tensors)
    if isinstance(data, Subset):
        whole = in_memory(data.dataset)
        if whole is not None:
            rows = torch.as_tensor(data.indices)
            return InMemory(picker(whole.inputs)(rows), picker(whole.targets)(rows))
    return None


def joined(pieces: Sequence[tuple[Any, Any]]) -> InMemory:
    """The rows of (inputs, targets), one piece after the other.

    Raises:
        RuntimeError: rows of one piece have another shape than those of another.
    """
    return InMemory(*(_joined([piece[side] for piece in pieces]) for side in (0, 1)))


def _joined(values: Sequence[Any]) -> Any:
    leaves = list(zip(*(tensors_of(value) for value in values), strict=True))
    whole = iter([torch.cat(parts) for parts in leaves])
    return each_tensor(values[0], lambda _: next(whole))


def picker(value: Any) -> Callable[[Tensor], Any]:
    """Picks rows by their index [B], in memory of their own."""
    if isinstance(value, Tensor):
        return partial(value.index_select, 0)
    return lambda index: each_tensor(value, lambda tensor: tensor.index_select(0, index))


def run_copier(value: Any) -> Callable[[int, int], Any]:
    """Copies so many rows from a first one on."""
    if isinstance(value, Tensor):
        return partial(value.narrow_copy, 0)
    return lambda first, count: each_tensor(value, lambda t: t.narrow_copy(0, first, count))
