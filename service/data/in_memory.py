"""Data sets whose rows are tensors in memory: selected by index, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from service.data.batches import each_tensor, tensors_of
from service.distributed.devices import free_bytes

# The fraction of the device's free memory that rows may use; training needs the rest.
_SHARE_OF_FREE = 0.25


@dataclass(frozen=True, eq=False)  # data sets are compared by identity
class InMemory:
    """All rows of a data set as tensors, or nested tensors, whose first dimension is the row."""

    inputs: Any
    """The inputs of the model: [N, ...]."""
    targets: Any
    """The targets for the loss: [N, ...]."""

    def __len__(self) -> int:
        return len(tensors_of((self.targets, self.inputs))[0])

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        inputs, targets = (each_tensor(v, lambda t: t[row]) for v in (self.inputs, self.targets))
        return inputs, targets

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(t.numel() * t.element_size() for t in tensors_of((self.inputs, self.targets)))

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return tensors_of((self.targets, self.inputs))[0].device

    def on(self, device: torch.device) -> InMemory:
        """The same on the device."""
        moved = [each_tensor(v, lambda t: t.to(device)) for v in (self.inputs, self.targets)]
        return InMemory(*moved)

    def fits_on(self, device: torch.device) -> bool:
        """Whether the rows fit on the device, in a quarter of its free memory."""
        free = free_bytes(device)
        return free is None or self.size_bytes <= _SHARE_OF_FREE * free


# The rows of each data set on the device: copied once, not for every test pass.
_RESIDENT: WeakKeyDictionary[Any, InMemory] = WeakKeyDictionary()


def near(data: Any, rows: InMemory, device: torch.device) -> InMemory:
    """The rows of a data set on the device while it exists; on the host if they do not fit."""
    if device.type == "cpu" or rows.device.type != "cpu":
        return rows
    if data not in _RESIDENT:
        if not rows.fits_on(device):
            return rows
        _RESIDENT[data] = rows.on(device)
    return _RESIDENT[data]


def bytes_on_device() -> int:
    """Bytes of device memory that rows use now."""
    return sum(rows.size_bytes for rows in _RESIDENT.values())


def in_memory(data: Any) -> InMemory | None:
    """The data set as tensors, if it consists of two tensors, or is a subset of such a data set."""
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
    """Selects rows by their index [B], in new memory."""
    if isinstance(value, Tensor):
        return partial(value.index_select, 0)
    return lambda index: each_tensor(value, lambda tensor: tensor.index_select(0, index))


def run_copier(value: Any) -> Callable[[int, int], Any]:
    """Copies the given number of rows from a first row on."""
    if isinstance(value, Tensor):
        return partial(value.narrow_copy, 0)
    return lambda first, count: each_tensor(value, lambda t: t.narrow_copy(0, first, count))
